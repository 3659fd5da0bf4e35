"""LFM3: `Lfm3ForCausalLM`. It is LFM2 with sandwich norms, windows, gated heads and a rotary embedding for each kind of
attention.

Config keys and names follow `transformers` 5.24 (`models/lfm3/configuration_lfm3.py`, `modeling_lfm3.py`, and
`conversion_mapping.py` for the gate, which is `gate_proj` in files and `g_proj` in memory).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lfm_jax.config import ModelConfig, lfm3_pattern
from lfm_jax.convert.families.family import Family
from lfm_jax.convert.families.lfm2 import LFM2, read_layer_types, read_shared, write_shared
from lfm_jax.convert.weights import Weight

_ATTENTION = ("full_attention", "sliding_attention")
_DEFAULTS = dict(head_dim=128, conv_L_cache=7, pad_token_id=124_893, bos_token_id=124_894, eos_token_id=124_900)
"""Of `Lfm3Config`, where they differ from those of `Lfm2Config`."""
_ROPE = {
    "full_attention": {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.5},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
"""The default of `rope_parameters`."""


def _attention_weights(kind: str, gate: str) -> list[Weight]:
    names, paths = "model.layers.{i}.self_attn.", "blocks.{i}.operator."
    return [
        Weight(kind, f"{names}q_proj.weight", f"{paths}q_proj", "(N H) D -> N H D"),
        Weight(kind, f"{names}k_proj.weight", f"{paths}k_proj", "(K H) D -> K H D"),
        Weight(kind, f"{names}v_proj.weight", f"{paths}v_proj", "(K H) D -> K H D"),
        Weight(kind, f"{names}o_proj.weight", f"{paths}out_proj", "D (N H) -> D N H"),
        Weight(kind, f"{names}q_norm.weight", f"{paths}q_norm.weight", "H -> H"),
        Weight(kind, f"{names}k_norm.weight", f"{paths}k_norm.weight", "H -> H"),
        Weight(kind, f"{names}{gate}.weight", f"{paths}gate", "N D -> N D", when={"attention_gate": True}),
    ]


def _weights(gate: str) -> tuple[Weight, ...]:
    """LFM2's rows, but for those of attention, with the norms after operator and feed-forward."""
    embed, *layers, norm, head = (row for row in LFM2.weights if row.where != "full_attention")
    post_norms = [
        Weight("block", f"model.layers.{{i}}.{name}.weight", f"blocks.{{i}}.{name}.weight", "D -> D",
               when={"post_norm": True})
        for name in ("post_operator_norm", "post_ffn_norm")
    ]
    attention = [row for kind in _ATTENTION for row in _attention_weights(kind, gate)]
    return (embed, *attention, *layers, *post_norms, norm, head)


def _read(hf: Mapping[str, Any]) -> dict[str, Any]:
    hf = {**_DEFAULTS, **hf}
    if hf.get("attention_bias"):
        raise ValueError("attention_bias is true; only attention without biases is supported")
    fields = read_shared(hf)
    if hf.get("layer_types") is None:
        layer_types = lfm3_pattern(hf["num_hidden_layers"])
    else:
        layer_types = read_layer_types(hf, "LFM3", ("conv", *_ATTENTION))
    return fields | _read_rope(hf, layer_types) | dict(
        layer_types=layer_types,
        sliding_window=hf.get("sliding_window", 256),
        post_norm=hf.get("use_sandwich_norm", True),
        attention_gate=hf.get("use_attention_gate", True),
    )


def _read_rope(hf: Mapping[str, Any], layer_types: tuple[str, ...]) -> dict[str, Any]:
    """Reads the rotary embedding of each kind of attention.

    A share of a head is read under either type: after NeMo AutoModel (`components/models/lfm3/config`), published
    files call it `default`, and then `transformers` turns whole heads, which the trained model does not.
    """
    of_kinds = hf.get("rope_parameters") or _ROPE
    theta: dict[str, float] = {}
    share: dict[str, float] = {}
    for kind in _ATTENTION:
        rope = of_kinds.get(kind, None if kind in layer_types else _ROPE[kind])
        if not isinstance(rope, Mapping):
            raise ValueError(f"rope_parameters has no {kind}; expected an entry for each of {', '.join(_ATTENTION)}")
        name = rope.get("rope_type", rope.get("type", "default"))
        if name not in ("default", "proportional") or rope.get("factor", 1.0) != 1.0:
            raise ValueError(f"rope_parameters of {kind} have rope_type {name!r} and factor {rope.get('factor', 1.0)}; "
                             "only 'default' and 'proportional' without a factor are supported")
        theta[kind] = float(rope.get("rope_theta") or hf.get("rope_theta") or 1e6)
        share[kind] = float(rope.get("partial_rotary_factor", 1.0))
    if share["sliding_attention"] != 1.0:
        raise ValueError(f"rope_parameters of sliding_attention have partial_rotary_factor "
                         f"{share['sliding_attention']}; only whole heads are supported there")
    own = theta["sliding_attention"] if theta["sliding_attention"] != theta["full_attention"] else None
    return dict(rope_theta=theta["full_attention"], rope_fraction=share["full_attention"], sliding_rope_theta=own)


def _write(config: ModelConfig) -> dict[str, Any]:
    """Writes the keys that `transformers` 5.24 loads."""
    full = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_fraction != 1:
        full |= {"rope_type": "proportional", "partial_rotary_factor": config.rope_fraction}
    sliding = {"rope_type": "default", "rope_theta": config.sliding_rope_theta or config.rope_theta}
    return write_shared(config) | {
        "rope_parameters": {"full_attention": full, "sliding_attention": sliding},
        "sliding_window": config.sliding_window,
        "use_sandwich_norm": config.post_norm,
        "use_attention_gate": config.attention_gate,
        "attention_bias": False,
        "use_cache": set(config.layer_types) != {"conv"},  # transformers 5 cannot cache a model without attention
    }


LFM3 = Family(
    name="LFM3",
    model_types=("lfm3",),
    architectures=("Lfm3ForCausalLM",),
    features={"causal": (True,), "qk_norm": (True,), "conv_gates": ("both",), "layer_types": ("conv", *_ATTENTION),
              "ffn_types": ("swiglu",)},
    read=_read,
    write=_write,
    weights=_weights("gate_proj"),
    state_dict=_weights("g_proj"),
)
