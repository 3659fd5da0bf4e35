"""The architectures of llama.cpp that our models are written as: their keys, both ways, and their tables of tensors.

Names and keys are those of llama.cpp's converter (conversion/lfm2.py, conversion/llama.py) and of its readers
(src/models/lfm2.cpp, lfm2moe.cpp, llama.cpp).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lfm_jax.config import ModelConfig
from lfm_jax.convert.families.family import Format
from lfm_jax.convert.families.lfm2 import LFM2 as LFM2_FAMILY
from lfm_jax.convert.weights import Weight

_SIZES = ("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
          "attention.layer_norm_rms_epsilon")
_EXPERT_SIZES = ("expert_count", "expert_used_count", "expert_feed_forward_length", "expert_gating_func")
_SIGMOID = 2
"""The `expert_gating_func` of sigmoids."""
_MOST_LAYERS = 10_000
"""So that a damaged count takes no memory."""
_NEUTRAL = {"rope.scaling.type": "none", "rope.scaling.factor": 1.0, "attention.causal": True, "logit_scale": 1.0,
            "attention.sliding_window": 0, "embedding_scale": 1.0, "residual_scale": 1.0, "expert_weights_scale": 1.0,
            "expert_weights_norm": True}
"""Keys that change the network, with the value at which they do not."""


# -------------------------------------------------------------------- keys


def _read_shared(keys: Mapping[str, Any], sizes: Sequence[str] = ()) -> dict[str, Any]:
    """Reads the fields that all architectures have, all but the kinds of layers.

    Raises:
      ValueError: sizes are missing, of `sizes` too, or keys ask for what no model here has; the message lists them.
    """
    if missing := [key for key in (*_SIZES, *sizes) if key not in keys]:
        raise ValueError(f"the keys {', '.join(missing)} are missing")
    if strange := [f"{key} {keys[key]!r}" for key, value in _NEUTRAL.items() if keys.get(key, value) != value]:
        raise ValueError(f"{', '.join(strange)} {'is' if len(strange) == 1 else 'are'} not supported")
    if not 0 < keys["block_count"] <= _MOST_LAYERS:
        raise ValueError(f"block_count is {keys['block_count']}; expected 1 to {_MOST_LAYERS}")
    width, heads = keys["embedding_length"], keys["attention.head_count"]
    head_dim = keys.get("attention.key_length", width // max(heads, 1))
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.get(key, head_dim) != head_dim:
            raise ValueError(f"{key} is {keys[key]}; only {head_dim}, the width of a head, is supported")
    return dict(
        hidden_size=width,
        ffn_size=keys["feed_forward_length"],
        num_heads=heads,
        head_dim=head_dim,
        norm_eps=_decimal(keys["attention.layer_norm_rms_epsilon"]),
        rope_theta=_decimal(keys.get("rope.freq_base", 10_000.0)),
        max_position=keys["context_length"],
    )


def _decimal(value: float) -> float:
    """Returns the shortest decimal of a float32, which is what was meant: 1e-5 and not 9.99999975e-06."""
    return float(str(np.float32(value)))


def _write_shared(config: ModelConfig) -> dict[str, Any]:
    return {
        "block_count": config.num_layers,
        "context_length": config.max_position,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.ffn_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.layer_norm_rms_epsilon": float(config.norm_eps),
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.freq_base": float(config.rope_theta),
        "vocab_size": config.vocab_size,
    }


def _kv_heads(keys: Mapping[str, Any]) -> list[int]:
    """Returns the key/value heads of each layer."""
    heads, layers = keys.get("attention.head_count_kv", keys["attention.head_count"]), keys["block_count"]
    heads = heads if isinstance(heads, list) else [heads] * layers
    if len(heads) != layers:
        raise ValueError(f"attention.head_count_kv has {len(heads)} entries but block_count is {layers}")
    if len(others := {n for n in heads if n}) > 1:
        raise ValueError(f"attention.head_count_kv has {sorted(others)}; only one number of heads is supported")
    return heads


def _read_hybrid(keys: Mapping[str, Any], sizes: Sequence[str] = ()) -> dict[str, Any]:
    fields = _read_shared(keys, ("shortconv.l_cache", "attention.head_count_kv", *sizes))
    heads = _kv_heads(keys)
    return fields | dict(
        layer_types=tuple("full_attention" if n else "conv" for n in heads),
        num_kv_heads=max(heads),
        conv_taps=keys["shortconv.l_cache"],
    )


def _write_hybrid(config: ModelConfig) -> dict[str, Any]:
    heads = [config.num_kv_heads if kind == "full_attention" else 0 for kind in config.layer_types]
    return _write_shared(config) | {"attention.head_count_kv": heads, "shortconv.l_cache": config.conv_taps}


def _read_moe(keys: Mapping[str, Any]) -> dict[str, Any]:
    fields = _read_hybrid(keys, _EXPERT_SIZES)
    if keys["expert_gating_func"] != _SIGMOID:
        raise ValueError(f"expert_gating_func is {keys['expert_gating_func']}; only {_SIGMOID}, sigmoids, is supported")
    layers, dense = len(fields["layer_types"]), keys.get("leading_dense_block_count", 0)
    if not 0 <= dense <= layers:
        raise ValueError(f"leading_dense_block_count is {dense}; expected 0 to block_count, {layers}")
    return fields | dict(
        ffn_types=("swiglu",) * dense + ("moe",) * (layers - dense),
        num_experts=keys["expert_count"],
        active_experts=keys["expert_used_count"],
        expert_size=keys["expert_feed_forward_length"],
    )


def _write_moe(config: ModelConfig) -> dict[str, Any]:
    return _write_hybrid(config) | {
        "expert_count": config.num_experts,
        "expert_used_count": config.active_experts,
        "expert_feed_forward_length": config.expert_size,
        "expert_gating_func": _SIGMOID,
        "leading_dense_block_count": sum(layer.feed_forward == "swiglu" for layer in config.layers),
    }


def _read_llama(keys: Mapping[str, Any]) -> dict[str, Any]:
    if keys.get("expert_count"):
        raise ValueError(f"expert_count is {keys['expert_count']}; only dense models are supported")
    fields, heads = _read_shared(keys), _kv_heads(keys)
    if 0 in heads:
        raise ValueError("attention.head_count_kv has layers without heads; only attention is supported")
    return fields | dict(layer_types=("full_attention",) * len(heads), num_kv_heads=heads[0], qk_norm=False)


def _write_llama(config: ModelConfig) -> dict[str, Any]:
    return _write_shared(config) | {"rope.dimension_count": config.head_dim}


# -------------------------------------------------------------------- what cannot be written


def _hybrid_lacks(config: ModelConfig) -> list[str]:
    heads, found = config.num_heads * config.head_dim, []
    if heads != config.hidden_size:
        found.append(f"{config.num_heads} heads of {config.head_dim} in a width of {config.hidden_size} (their product "
                     "must be the width)")
    found += [f"models without {kind} layers, whose cache cannot be empty there"
              for kind in ("conv", "full_attention") if kind not in config.layer_types]
    if "conv" in config.layer_types and config.conv_taps < 2:
        found.append("convolutions of one tap")
    return found


def _moe_lacks(config: ModelConfig) -> list[str]:
    found, kinds = _hybrid_lacks(config), [layer.feed_forward for layer in config.layers]
    if "moe" in kinds and "swiglu" in kinds[kinds.index("moe") :]:
        found.append("dense layers after the first mixture")
    return found


# -------------------------------------------------------------------- tensors


_THERE, _HERE = "blk.{i}.", "blocks.{i}."
_FIRST = (
    Weight("model", "token_embd.weight", "embed", "V D -> V D"),
    Weight("block", f"{_THERE}attn_norm.weight", f"{_HERE}operator_norm.weight", "D -> D"),
)
_CONV = (
    Weight("conv", f"{_THERE}shortconv.in_proj.weight", f"{_HERE}operator.in_proj", "(C O) D -> C O D"),
    Weight("conv", f"{_THERE}shortconv.conv.weight", f"{_HERE}operator.conv", "D W -> W D"),
    Weight("conv", f"{_THERE}shortconv.out_proj.weight", f"{_HERE}operator.out_proj", "O D -> O D"),
)


def _attention(q: str, k: str) -> tuple[Weight, ...]:
    """Args: q, k: layouts of their tensors."""
    kind, there, here = "full_attention", f"{_THERE}attn_", f"{_HERE}operator."
    norms = {"qk_norm": True}
    return (
        Weight(kind, f"{there}q.weight", f"{here}q_proj", q),
        Weight(kind, f"{there}k.weight", f"{here}k_proj", k),
        Weight(kind, f"{there}v.weight", f"{here}v_proj", "(K H) D -> K H D"),
        Weight(kind, f"{there}output.weight", f"{here}out_proj", "D (N H) -> D N H"),
        Weight(kind, f"{there}q_norm.weight", f"{here}q_norm.weight", "H -> H", when=norms),
        Weight(kind, f"{there}k_norm.weight", f"{here}k_norm.weight", "H -> H", when=norms),
    )


_DENSE = (
    Weight("block", f"{_THERE}ffn_norm.weight", f"{_HERE}ffn_norm.weight", "D -> D"),
    Weight("swiglu", f"{_THERE}ffn_gate.weight", f"{_HERE}feed_forward.w1", "F D -> F D"),
    Weight("swiglu", f"{_THERE}ffn_up.weight", f"{_HERE}feed_forward.w3", "F D -> F D"),
    Weight("swiglu", f"{_THERE}ffn_down.weight", f"{_HERE}feed_forward.w2", "D F -> D F"),
)
_MOE = (
    Weight("moe", f"{_THERE}ffn_gate_inp.weight", f"{_HERE}feed_forward.router", "E D -> E D"),
    Weight("moe", f"{_THERE}exp_probs_b.bias", f"{_HERE}feed_forward.expert_bias", "E -> E", dtype="float32"),
    Weight("moe", f"{_THERE}ffn_gate_exps.weight", f"{_HERE}feed_forward.w1", "E U D -> E D U"),
    Weight("moe", f"{_THERE}ffn_up_exps.weight", f"{_HERE}feed_forward.w3", "E U D -> E D U"),
    Weight("moe", f"{_THERE}ffn_down_exps.weight", f"{_HERE}feed_forward.w2", "E D U -> E U D"),
)


def _last(norm: str) -> tuple[Weight, ...]:
    return (
        Weight("model", norm, "norm.weight", "D -> D"),
        Weight("model", "output.weight", "head", "V D -> V D", when={"tie_embedding": False}),
    )


_HYBRID = _FIRST + _CONV + _attention("(N H) D -> N H D", "(K H) D -> K H D") + _DENSE
_HYBRID_FEATURES = {**LFM2_FAMILY.features, "conv_bias": (False,)}

LFM2 = Format(
    name="lfm2",
    features=_HYBRID_FEATURES,
    also_lacks=_hybrid_lacks,
    read=_read_hybrid,
    write=_write_hybrid,
    weights=_HYBRID + _last("token_embd_norm.weight"),
)
LFM2_MOE = Format(
    name="lfm2moe",
    features={**_HYBRID_FEATURES, "ffn_types": ("swiglu", "moe"), "expert_bias": (True,), "normed_weights": (True,),
              "expert_scale": (1.0,)},
    also_lacks=_moe_lacks,
    read=_read_moe,
    write=_write_moe,
    weights=_HYBRID + _MOE + _last("token_embd_norm.weight"),
)
LLAMA = Format(
    name="llama",
    features={"causal": (True,), "qk_norm": (False,), "post_norm": (False,), "attention_gate": (False,),
              "rope_fraction": (1.0,), "layer_types": ("full_attention",), "ffn_types": ("swiglu",)},
    read=_read_llama,
    write=_write_llama,
    # Its rotary embedding turns neighbours, so rows of q and k lie in pairs; ours turns halves.
    weights=_FIRST + _attention("(N J R) D -> N (R J) D", "(K J R) D -> K (R J) D") + _DENSE
    + _last("output_norm.weight"),
)
ARCHS = {arch.name: arch for arch in (LFM2, LFM2_MOE, LLAMA)}
"""By `general.architecture`."""


def arch_of(config: ModelConfig) -> tuple[Format, list[str]]:
    """Returns the architecture that a model is written as, and why it cannot be, if so."""
    arch = LFM2
    if "moe" in config.ffn_types:
        arch = LFM2_MOE
    elif set(config.layer_types) == {"full_attention"} and not config.qk_norm:
        arch = LLAMA
    return arch, [f"{arch.name} in llama.cpp has no {what}" for what in arch.lacks(config)]
