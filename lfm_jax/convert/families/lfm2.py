"""Dense LFM2 and LFM2.5: `Lfm2ForCausalLM`.

Config keys and traps follow the published checkpoints as `transformers` 5.23 reads them
(`models/lfm2/configuration_lfm2.py`, `modeling_lfm2.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lfm_jax.config import ModelConfig, hybrid_pattern
from lfm_jax.convert.families.family import Family
from lfm_jax.convert.weights import Weight

LAYER_TYPES = ("conv", "full_attention")
_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
          "intermediate_size")
_BIASED = {"conv_bias": True}
MIXERS = (
    Weight("model", "model.embed_tokens.weight", "embed", "V D -> V D"),
    Weight("block", "model.layers.{i}.operator_norm.weight", "blocks.{i}.operator_norm.weight", "D -> D"),
    Weight("conv", "model.layers.{i}.conv.in_proj.weight", "blocks.{i}.operator.in_proj", "(C O) D -> C O D"),
    Weight("conv", "model.layers.{i}.conv.in_proj.bias", "blocks.{i}.operator.in_bias", "(C O) -> C O", when=_BIASED),
    Weight("conv", "model.layers.{i}.conv.conv.weight", "blocks.{i}.operator.conv", "D 1 W -> W D"),
    Weight("conv", "model.layers.{i}.conv.conv.bias", "blocks.{i}.operator.conv_bias", "D -> D", when=_BIASED),
    Weight("conv", "model.layers.{i}.conv.out_proj.weight", "blocks.{i}.operator.out_proj", "O D -> O D"),
    Weight("conv", "model.layers.{i}.conv.out_proj.bias", "blocks.{i}.operator.out_bias", "O -> O", when=_BIASED),
    Weight("full_attention", "model.layers.{i}.self_attn.q_proj.weight", "blocks.{i}.operator.q_proj",
           "(N H) D -> N H D"),
    Weight("full_attention", "model.layers.{i}.self_attn.k_proj.weight", "blocks.{i}.operator.k_proj",
           "(K H) D -> K H D"),
    Weight("full_attention", "model.layers.{i}.self_attn.v_proj.weight", "blocks.{i}.operator.v_proj",
           "(K H) D -> K H D"),
    Weight("full_attention", "model.layers.{i}.self_attn.out_proj.weight", "blocks.{i}.operator.out_proj",
           "D (N H) -> D N H"),
    Weight("full_attention", "model.layers.{i}.self_attn.q_layernorm.weight", "blocks.{i}.operator.q_norm.weight",
           "H -> H"),
    Weight("full_attention", "model.layers.{i}.self_attn.k_layernorm.weight", "blocks.{i}.operator.k_norm.weight",
           "H -> H"),
    Weight("block", "model.layers.{i}.ffn_norm.weight", "blocks.{i}.ffn_norm.weight", "D -> D"),
)
"""Tensors of the table of embeddings, the operators and the norms of layers."""
DENSE = (
    Weight("swiglu", "model.layers.{i}.feed_forward.w1.weight", "blocks.{i}.feed_forward.w1", "F D -> F D"),
    Weight("swiglu", "model.layers.{i}.feed_forward.w3.weight", "blocks.{i}.feed_forward.w3", "F D -> F D"),
    Weight("swiglu", "model.layers.{i}.feed_forward.w2.weight", "blocks.{i}.feed_forward.w2", "D F -> D F"),
)
LAST = (
    Weight("model", "model.embedding_norm.weight", "norm.weight", "D -> D"),
    Weight("model", "lm_head.weight", "head", "V D -> V D", when={"tie_embedding": False}),
)


def _read(hf: Mapping[str, Any]) -> dict[str, Any]:
    fields = read_shared({"intermediate_size": hf["block_ff_dim"], **hf} if "block_ff_dim" in hf else hf)
    return fields | dict(
        layer_types=_read_layer_types(hf), ffn_size=_read_ffn_size(hf), rope_theta=read_rope_theta(hf)
    )


def read_shared(hf: Mapping[str, Any], sizes: Sequence[str] = ()) -> dict[str, Any]:
    """Reads the fields that other families have too, all but layer_types and the rotary embedding.

    Raises:
      ValueError: sizes are missing, of `sizes` too; the message lists them.
    """
    if missing := [key for key in (*_SIZES, *sizes) if key not in hf]:
        raise ValueError(f"config.json lacks {', '.join(missing)}; these sizes have no safe default")
    eos = hf.get("eos_token_id", 2)
    stored = hf.get("dtype") or hf.get("torch_dtype") or "float32"
    return dict(
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        ffn_size=hf["intermediate_size"],
        num_heads=hf["num_attention_heads"],
        num_kv_heads=hf["num_key_value_heads"],
        head_dim=hf.get("head_dim") or hf["hidden_size"] // max(hf["num_attention_heads"], 1),
        conv_taps=hf.get("conv_L_cache", 3),
        conv_bias=hf.get("conv_bias", False),
        tie_embedding=hf.get("tie_embedding", hf.get("tie_word_embeddings", True)),
        norm_eps=hf.get("norm_eps", 1e-5),
        max_position=hf.get("max_position_embeddings", 128_000),
        init_std=hf.get("initializer_range", 0.02),
        pad_id=_or_default(hf.get("pad_token_id"), 0),
        bos_id=_or_default(hf.get("bos_token_id"), 1),
        eos_ids=tuple(eos) if isinstance(eos, (list, tuple)) else () if eos is None else (eos,),
        param_dtype=stored,
        dtype=stored,
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    """Writes the keys that `transformers` 4.54 and 5.x load, and those that other readers ask for.

    F stands under both of its names and is not to be adjusted: every reader then takes it as it is. mlx-lm
    (`models/lfm2.py`) and llama.cpp (`LFM2Model` of its converter) want the keys of the adjustment all the same.
    """
    return write_shared(config) | rope_keys(config) | {
        "block_dim": config.hidden_size,
        "block_ff_dim": config.ffn_size,
        "block_auto_adjust_ff_dim": False,
        "block_ffn_dim_multiplier": 1.0,
        "block_multiple_of": 256,
    }


def rope_keys(config: ModelConfig) -> dict[str, Any]:
    """Writes the rotary embedding for `transformers` 4.54 and for 5.x."""
    theta = config.rope_theta
    return {"rope_theta": theta, "rope_parameters": {"rope_type": "default", "rope_theta": theta}}


def write_shared(config: ModelConfig) -> dict[str, Any]:
    """Writes the keys that other families have too, all but the rotary embedding."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "layer_types": list(config.layer_types),
        "conv_L_cache": config.conv_taps,
        "conv_bias": config.conv_bias,
        "norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_position,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tie_embedding,
        "pad_token_id": config.pad_id,
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_ids[0] if len(config.eos_ids) == 1 else (list(config.eos_ids) or None),
        "torch_dtype": config.param_dtype,
        "dtype": config.param_dtype,
        "use_cache": config.attention_layers > 0,  # transformers 5 cannot cache a model without attention
    }


def _or_default(value: Any, default: Any) -> Any:
    return default if value is None else value


def _read_ffn_size(hf: Mapping[str, Any]) -> int:
    """Returns F as `Lfm2MLP` computes it from intermediate_size (or `block_ff_dim`, which overrides it)."""
    size = hf.get("block_ff_dim", hf.get("intermediate_size"))
    if not hf.get("block_auto_adjust_ff_dim", True):
        return size
    size = int(2 * size / 3)
    multiplier = hf.get("block_ffn_dim_multiplier", 1.0)
    if multiplier is not None:
        multiple = hf.get("block_multiple_of", 256)
        size = multiple * math.ceil(int(multiplier * size) / multiple)
    return size


def _read_layer_types(hf: Mapping[str, Any]) -> tuple[Any, ...]:
    """Reads layer_types, else full_attn_idxs, else all layers are attention, as `Lfm2Config` does."""
    num_layers, attention_at = hf["num_hidden_layers"], hf.get("full_attn_idxs")
    if hf.get("layer_types") is not None:
        return read_layer_types(hf, "LFM2", LAYER_TYPES)
    return hybrid_pattern(num_layers, tuple(range(num_layers)) if attention_at is None else tuple(attention_at))


def read_layer_types(hf: Mapping[str, Any], family: str, known: tuple[str, ...]) -> tuple[Any, ...]:
    """Reads layer_types.

    Raises:
      ValueError: there is not one for each layer, or one that the family has not.
    """
    types = tuple(hf["layer_types"])
    if len(types) != hf["num_hidden_layers"]:
        raise ValueError(f"layer_types has {len(types)} entries but num_hidden_layers is {hf['num_hidden_layers']}")
    if unknown := sorted({str(kind) for kind in types} - set(known)):
        raise ValueError(f"layer_types has {', '.join(unknown)}; {family} has {', '.join(known)} only")
    return types


def read_rope_theta(hf: Mapping[str, Any]) -> float:
    rope = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"rope_type is {kind!r}; only 'default' is supported")
    return float(rope.get("rope_theta") or hf.get("rope_theta") or hf.get("theta") or 1e6)


LFM2 = Family(
    name="LFM2",
    model_types=("lfm2",),
    architectures=("Lfm2ForCausalLM",),
    features={"causal": (True,), "qk_norm": (True,), "post_norm": (False,), "attention_gate": (False,),
              "rope_fraction": (1.0,), "sliding_rope_theta": (None,), "conv_gates": ("both",),
              "layer_types": LAYER_TYPES, "ffn_types": ("swiglu",)},
    read=_read,
    write=_write,
    weights=MIXERS + DENSE + LAST,
)
