"""LFM2 with a mixture of experts: `Lfm2MoeForCausalLM`, as `transformers` 5.24 reads it (`models/lfm2_moe`).

The first layers are dense. A file has three tensors for each expert; `transformers` joins them in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lfm_jax.config import ModelConfig
from lfm_jax.convert.families.family import Family
from lfm_jax.convert.families.lfm2 import (
    DENSE,
    LAST,
    LAYER_TYPES,
    LFM2,
    MIXERS,
    read_layer_types,
    read_rope_theta,
    read_shared,
    rope_keys,
    write_shared,
)
from lfm_jax.convert.weights import Weight

_SIZES = ("moe_intermediate_size", "num_experts", "num_experts_per_tok", "layer_types")
_THERE, _HERE = "model.layers.{i}.feed_forward", "blocks.{i}.feed_forward"
_ROUTER = (
    Weight("moe", f"{_THERE}.gate.weight", f"{_HERE}.router", "E D -> E D"),
    Weight("moe", f"{_THERE}.expert_bias", f"{_HERE}.expert_bias", "E -> E", when={"expert_bias": True},
           dtype="float32"),
)
_EXPERTS = (
    Weight("moe", f"{_THERE}.experts.{{E}}.w1.weight", f"{_HERE}.w1", "{E} U D -> E D U"),
    Weight("moe", f"{_THERE}.experts.{{E}}.w3.weight", f"{_HERE}.w3", "{E} U D -> E D U"),
    Weight("moe", f"{_THERE}.experts.{{E}}.w2.weight", f"{_HERE}.w2", "{E} D U -> E U D"),
)
_JOINED_EXPERTS = (
    Weight("moe", f"{_THERE}.experts.gate_up_proj", (f"{_HERE}.w1", f"{_HERE}.w3"), "E (P U) D -> {P} E D U"),
    Weight("moe", f"{_THERE}.experts.down_proj", f"{_HERE}.w2", "E D U -> E U D"),
)


def _read(hf: Mapping[str, Any]) -> dict[str, Any]:
    fields = read_shared(hf, _SIZES)
    layer_types, dense = read_layer_types(hf, "LFM2 MoE", LAYER_TYPES), hf.get("num_dense_layers", 2)
    layers = len(layer_types)
    if not isinstance(dense, int) or not 0 <= dense < layers:
        raise ValueError(f"num_dense_layers is {dense!r}; expected a number of layers below {layers}")
    return fields | dict(
        layer_types=layer_types,
        ffn_types=("swiglu",) * dense + ("moe",) * (layers - dense),
        rope_theta=read_rope_theta(hf),
        num_experts=hf["num_experts"],
        active_experts=hf["num_experts_per_tok"],
        expert_size=hf["moe_intermediate_size"],
        expert_bias=hf.get("use_expert_bias", True),
        normed_weights=hf.get("norm_topk_prob", True),
        expert_scale=hf.get("routed_scaling_factor", 1.0),
    )


def _write(config: ModelConfig) -> dict[str, Any]:
    return write_shared(config) | rope_keys(config) | {
        "num_dense_layers": _dense_layers(config),
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.active_experts,
        "moe_intermediate_size": config.expert_size,
        "use_expert_bias": config.expert_bias,
        "norm_topk_prob": config.normed_weights,
        "routed_scaling_factor": config.expert_scale,
    }


def _dense_layers(config: ModelConfig) -> int:
    return sum(layer.feed_forward == "swiglu" for layer in config.layers)


def _lacks(config: ModelConfig) -> list[str]:
    first = config.layers[: _dense_layers(config)]
    return [] if all(layer.feed_forward == "swiglu" for layer in first) else ["dense layers after the first mixture"]


LFM2_MOE = Family(
    name="LFM2 MoE",
    model_types=("lfm2_moe",),
    architectures=("Lfm2MoeForCausalLM",),
    features={**LFM2.features, "ffn_types": ("swiglu", "moe")},
    also_lacks=_lacks,
    read=_read,
    write=_write,
    weights=MIXERS + DENSE + _ROUTER + _EXPERTS + LAST,
    state_dict=MIXERS + DENSE + _ROUTER + _JOINED_EXPERTS + LAST,
)
