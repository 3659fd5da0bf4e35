"""Architectures of llama.cpp: no field of a model is lost between its config and the keys of a file."""

import dataclasses

import pytest

from lfm_jax.config import PRESETS, ModelConfig
from lfm_jax.convert.gguf.archs import ARCHS, LFM2, LFM2_MOE, LLAMA, arch_of
from lfm_jax.testing import tiny_config

NOT_IN_KEYS = {"vocab_size", "tie_embedding", "pad_id", "bos_id", "eos_ids"}
"""Fields that the tokenizer and the tensors of a file say (test_gguf_models.py)."""
NOT_THE_NETWORK = {"logits_dtype", "conv_impl", "scan_impl", "attention_impl", "experts_impl", "expert_bias_rate",
                   "router_z_loss", "init", "init_std", "remat", "scan_layers", "quantize", "param_dtype", "dtype"}
CHANGED = dict(layer_types=("full_attention", "conv"), hidden_size=60, ffn_size=49, num_heads=6, num_kv_heads=3,
               head_dim=10, conv_taps=4, norm_eps=1e-4, rope_theta=5e4, max_position=77)
CHANGED_MOE = CHANGED | dict(ffn_types=("swiglu", "moe"), num_experts=6, active_experts=3, expert_size=40)
CHANGED_LLAMA = {name: value for name, value in CHANGED.items() if name != "conv_taps"} | dict(
    layer_types=("full_attention",) * 2, qk_norm=False, head_dim=12)
RECURRENT, WINDOWS, MIXTURE = {"recurrence"}, {"sliding_window"}, {
    "num_experts", "active_experts", "expert_size", "expert_bias", "normed_weights", "expert_scale"}
CONVS = {"conv_taps", "conv_bias", "conv_gates"}


@pytest.mark.parametrize(("arch", "changed", "lacked"), [
    (LFM2, CHANGED, RECURRENT | WINDOWS | MIXTURE), (LFM2_MOE, CHANGED_MOE, RECURRENT | WINDOWS),
    (LLAMA, CHANGED_LLAMA, RECURRENT | WINDOWS | MIXTURE | CONVS | {"sliding_rope_theta"}),
], ids=ARCHS)
def test_every_field_of_a_model_is_written_and_read_or_held_to_what_there_is(arch, changed, lacked):
    """A field that ModelConfig gains must be one of these, or files would lose it in silence."""
    known = changed.keys() | arch.features.keys() | NOT_IN_KEYS | NOT_THE_NETWORK | lacked
    assert {field.name for field in dataclasses.fields(ModelConfig)} == known
    config = tiny_config(**changed)
    assert arch_of(config) == (arch, [])
    assert all(getattr(config, name) != getattr(tiny_config(), name) for name in changed)
    same = {name: getattr(config, name) for name in NOT_IN_KEYS | {"init_std", "dtype"}}
    assert ModelConfig(**arch.read(arch.write(config)) | same) == config


@pytest.mark.parametrize("name", PRESETS)
def test_presets_but_lfm3_can_be_written(name):
    arch, lacks = arch_of(ModelConfig.preset(name))
    assert arch is (LFM2_MOE if "a" in name.split("-")[-1] else LFM2)
    assert bool(lacks) == name.startswith("lfm3")


def test_keys_of_other_converters_are_read():
    """Those that llama.cpp has a default for, a head count for all layers, and a float32 for a decimal."""
    keys = LLAMA.write(tiny_config(**CHANGED_LLAMA | dict(head_dim=10)))
    for name in ("attention.key_length", "attention.value_length", "rope.dimension_count", "rope.freq_base"):
        del keys[name]
    fields = LLAMA.read(keys | {"attention.layer_norm_rms_epsilon": 9.999999747378752e-06, "rope.scaling.type": "none"})
    assert fields["norm_eps"] == 1e-5
    assert (fields["rope_theta"], fields["head_dim"], fields["num_kv_heads"]) == (1e4, 10, 3)
    with pytest.raises(ValueError, match="expert_count is 8; only dense models"):
        LLAMA.read(keys | {"expert_count": 8})
    moe = LFM2_MOE.write(tiny_config(**CHANGED_MOE))
    assert LFM2_MOE.read(moe | {"leading_dense_block_count": 0})["ffn_types"] == ("moe", "moe")
    with pytest.raises(ValueError, match="expert_gating_func is 1; only 2, sigmoids"):
        LFM2_MOE.read(moe | {"expert_gating_func": 1})


@pytest.mark.parametrize("key", ["block_count", "leading_dense_block_count"])
def test_a_damaged_count_takes_no_memory(key):
    keys = LFM2_MOE.write(tiny_config(**CHANGED_MOE)) | {"attention.head_count_kv": 3, key: 2**40}
    with pytest.raises(ValueError, match=f"{key} is {2**40}; expected"):
        LFM2_MOE.read(keys)
