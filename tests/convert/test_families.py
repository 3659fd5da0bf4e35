"""Families: which one a config.json is of, and its fields as `transformers` reads and writes them."""

import dataclasses

import numpy as np
import oracle
import pytest
import torch
from transformers import Lfm2Config, Lfm2ForCausalLM

from lfm_jax import ModelConfig
from lfm_jax.config import PRESETS
from lfm_jax.convert.families import config_from_hf, config_to_hf, family_of
from lfm_jax.convert.families.lfm2 import LFM2
from lfm_jax.convert.families.lfm2_moe import LFM2_MOE
from lfm_jax.convert.hf import tensors
from lfm_jax.testing import tiny_config

SIZES = dict(model_type="lfm2", vocab_size=120, hidden_size=24, num_hidden_layers=4, num_attention_heads=4,
             num_key_value_heads=2, intermediate_size=1000)
RELEASE_ONLY = dict(
    block_dim=24, num_heads=4, conv_dim=24, conv_dim_out=24, use_pos_enc=True, block_norm_eps=1e-5,
    block_use_swiglu=True, block_use_xavier_init=True, conv_use_xavier_init=True, block_mlp_init_scale=1.0,
    block_out_init_scale=1.0, eos_token_id=7,
)
FILES = {
    "release": RELEASE_ONLY | dict(
        block_ff_dim=1000, block_multiple_of=256, block_ffn_dim_multiplier=1.0, block_auto_adjust_ff_dim=True,
        full_attn_idxs=[2], tie_embedding=True, rope_theta=1e6, conv_L_cache=3, torch_dtype="bfloat16"),
    "nothing-said": {},
    "null-pattern": dict(layer_types=None, full_attn_idxs=None),
    "indices": dict(full_attn_idxs=[0, 3]),
    "types-win": dict(full_attn_idxs=[0, 1, 2, 3], layer_types=["conv", "conv", "full_attention", "conv"]),
    "block-ff-dim-wins": dict(block_ff_dim=700, intermediate_size=9999),
    "no-adjust": dict(block_auto_adjust_ff_dim=False, intermediate_size=77),
    "multiplier": dict(block_ffn_dim_multiplier=1.3, block_multiple_of=10, intermediate_size=101),
    "exact-multiple": dict(intermediate_size=768, block_multiple_of=256),
    "untied": dict(tie_word_embeddings=False),
    "alias-unties": dict(tie_embedding=False),
    "alias-wins": dict(tie_embedding=False, tie_word_embeddings=True),
    "old-theta": dict(rope_theta=5e4),
    "new-theta": dict(rope_parameters=dict(rope_type="default", rope_theta=3e4)),
    "new-theta-wins": dict(rope_parameters=dict(rope_type="default", rope_theta=3e4), rope_theta=9.0),
    "default-rope-scaling": dict(rope_scaling=dict(type="default"), rope_theta=4e4),
    "null-rope": dict(rope_parameters=None, rope_scaling=None),
    "heads": dict(head_dim=10, num_key_value_heads=1),
    "bias": dict(conv_bias=True, conv_L_cache=5, full_attn_idxs=[1]),
    "eos-list": dict(eos_token_id=[7, 2]),
    "no-eos": dict(eos_token_id=None),
    "numbers": dict(norm_eps=1e-3, initializer_range=0.1, max_position_embeddings=77, pad_token_id=3, bos_token_id=4),
}


def built(hf_dict):
    """(config, name -> shape of every parameter) as `transformers` builds them."""
    config = Lfm2Config.from_dict(dict(hf_dict))
    with torch.device("meta"):
        model = Lfm2ForCausalLM(config)
    return config, {name: tuple(p.shape) for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", FILES)
def test_config_from_hf_builds_what_transformers_builds(name):
    hf_dict = SIZES | FILES[name]
    theirs, shapes = built(hf_dict)
    ours = config_from_hf(hf_dict)
    assert tensors(ours) == shapes
    assert ours.num_params() == sum(int(np.prod(shape)) for shape in shapes.values())
    assert ours.layer_types == tuple(theirs.layer_types)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    eos = theirs.eos_token_id
    assert ours.eos_ids == (tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,))
    same = dict(norm_eps="norm_eps", max_position="max_position_embeddings", init_std="initializer_range",
                pad_id="pad_token_id", bos_id="bos_token_id", conv_taps="conv_L_cache", conv_bias="conv_bias",
                tie_embedding="tie_word_embeddings")
    assert {mine: getattr(ours, mine) for mine in same} == {mine: getattr(theirs, hf) for mine, hf in same.items()}


def test_the_multiplier_may_be_absent_altogether():
    """`transformers` skips the rounding then, though its own config class refuses the null since 5.0."""
    config = config_from_hf(SIZES | dict(block_ffn_dim_multiplier=None, intermediate_size=100))
    assert config.ffn_size == 66


def test_dtype_is_read_under_both_names_and_overrides_win():
    assert config_from_hf(SIZES | dict(torch_dtype="bfloat16")).param_dtype == "bfloat16"
    assert config_from_hf(SIZES | dict(dtype="float16", torch_dtype="bfloat16")).dtype == "float16"
    assert config_from_hf(SIZES).param_dtype == "float32"
    overridden = config_from_hf(SIZES | dict(dtype="float16"), dtype="float32", conv_impl="lax")
    assert (overridden.dtype, overridden.param_dtype, overridden.conv_impl) == ("float32", "float16", "lax")


def test_theta_under_its_oldest_name():
    assert config_from_hf(SIZES | dict(theta=2e5)).rope_theta == 2e5


@pytest.mark.parametrize("case", oracle.CASES)
def test_hf_round_trip_through_transformers(case):
    theirs = oracle.hf_config(**oracle.CASES[case])
    ours = config_from_hf(theirs.to_dict())
    assert config_from_hf(config_to_hf(ours)) == ours
    again, shapes = built(config_to_hf(ours))
    assert shapes == built(theirs.to_dict())[1]
    assert config_from_hf(again.to_dict()) == ours


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_presets_round_trip(name):
    config = ModelConfig.preset(name)
    assert config_from_hf(config_to_hf(config), dtype=config.dtype) == config


def adjusted(hf, size):
    """F as all of them adjust it, where there is a multiplier."""
    if not hf["block_auto_adjust_ff_dim"]:
        return size
    size = int(hf["block_ffn_dim_multiplier"] * int(2 * size / 3))
    return -(-size // hf["block_multiple_of"]) * hf["block_multiple_of"]


def again(hf):
    """A config.json as `transformers` writes it again."""
    return Lfm2Config.from_dict(dict(hf)).to_dict()


READERS = {
    "transformers 4.54 to 5.24: models/lfm2/{configuration,modeling}_lfm2.py":
        lambda hf: adjusted(hf, hf.get("block_ff_dim", hf["intermediate_size"])),
    "mlx-lm: mlx_lm/models/lfm2.py":
        lambda hf: hf["block_dim"] and adjusted(hf, hf.get("block_ff_dim") or hf["intermediate_size"]),
    "llama.cpp of 2025: convert_hf_to_gguf.py, LFM2Model": lambda hf: adjusted(hf, hf["block_ff_dim"]),
    "llama.cpp of 2026: LFM2Model, which AutoConfig may have read the file for":
        lambda hf: adjusted(again(hf), again(hf).get("block_ff_dim", again(hf)["intermediate_size"])),
    "ours": lambda hf: config_from_hf(hf).ffn_size,
}
"""F by the rule of each reader, which raises KeyError for what it wants and does not find."""


@pytest.mark.parametrize("ffn_size", [1, 48, 255, 256, 257, 4608, 6656, 10752])
@pytest.mark.parametrize("reader", READERS)
def test_every_reader_finds_the_same_width_of_the_feed_forward(reader, ffn_size):
    hf = config_to_hf(tiny_config(ffn_size=ffn_size))
    assert READERS[reader](hf) == ffn_size
    assert hf["block_dim"] == hf["hidden_size"]
    assert config_from_hf(again(hf)).ffn_size == ffn_size


def test_mlx_lm_builds_the_model_of_an_exported_config():
    lfm2 = pytest.importorskip("mlx_lm.models.lfm2")
    from mlx.utils import tree_flatten

    config = tiny_config(ffn_size=80)
    model = lfm2.Model(lfm2.ModelArgs.from_dict(config_to_hf(config)))
    assert sum(array.size for _, array in tree_flatten(model.parameters())) == config.num_params()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (dict(model_type="lfm2_vl"), r"model_type is 'lfm2_vl'; expected 'lfm2' \(LFM2\), 'lfm2_moe' \(LFM2 MoE\)"),
        (dict(architectures=["Lfm2BidirectionalModel"]),
         r"architectures is \['Lfm2BidirectionalModel'\]; expected a list with Lfm2ForCausalLM for model_type 'lfm2'"),
        (dict(architectures="Lfm2ForCausalLM"), r"architectures is 'Lfm2ForCausalLM'; expected a list"),
        (dict(architectures=[["Lfm2ForCausalLM"]]), r"expected a list with Lfm2ForCausalLM"),
        (dict(rope_parameters=dict(rope_type="yarn", rope_theta=1.0)), r"rope_type is 'yarn'"),
        (dict(rope_scaling=dict(type="linear", factor=2.0)), r"rope_type is 'linear'"),
        (dict(layer_types=["conv"]), r"layer_types has 1 entries but num_hidden_layers is 4"),
        (dict(layer_types=["conv", "mamba", "conv", "conv"]), r"layer_types has mamba; LFM2 has conv, full_attention"),
        (dict(layer_types=["conv", "sliding_attention", "conv", "conv"]), r"layer_types has sliding_attention; LFM2"),
    ],
)
def test_config_from_hf_refuses(changes, match):
    with pytest.raises(ValueError, match=match):
        config_from_hf(SIZES | changes)


@pytest.mark.parametrize("architectures", [None, [], ["Lfm2ForCausalLM"], ["Other", "Lfm2ForCausalLM"]])
def test_a_file_may_name_its_architecture_among_others_or_not_at_all(architectures):
    assert config_from_hf(SIZES | dict(architectures=architectures)) == config_from_hf(SIZES)


def test_config_from_hf_lists_every_missing_size():
    with pytest.raises(ValueError, match=r"lacks hidden_size, num_key_value_heads, intermediate_size"):
        config_from_hf({key: SIZES[key] for key in
                                 ("model_type", "vocab_size", "num_hidden_layers", "num_attention_heads")})


@pytest.mark.parametrize("changes", [dict(post_norm=True), dict(qk_norm=False), dict(conv_gates="input")])
def test_config_to_hf_refuses_what_lfm2_cannot_express(changes):
    (field,) = changes
    with pytest.raises(ValueError, match=rf"{field}={changes[field]}"):
        config_to_hf(tiny_config(**changes))


def test_everything_that_a_family_lacks_comes_at_once():
    config = tiny_config(qk_norm=False, post_norm=True, layer_types=("recurrence", "conv", "sliding_attention"))
    with pytest.raises(ValueError, match="LFM2 in transformers has no qk_norm=False, post_norm=True, "
                                         "recurrence layers, sliding_attention layers; such"):
        config_to_hf(config)


NOT_THE_NETWORK = {"logits_dtype", "conv_impl", "scan_impl", "attention_impl", "experts_impl", "expert_bias_rate",
                   "router_z_loss", "init", "remat", "scan_layers"}
"""How a model is computed, begun and trained, which no config.json says."""
MIXTURE = dict(num_experts=6, active_experts=3, expert_size=40, expert_bias=False, normed_weights=False,
               expert_scale=2.5)
OF_LAYERS_IT_LACKS = {"LFM2": {"recurrence", "sliding_window", *MIXTURE}, "LFM2 MoE": {"recurrence", "sliding_window"}}
CHANGED = dict(
    layer_types=("full_attention", "conv"), vocab_size=98, hidden_size=33, ffn_size=49, num_heads=6, num_kv_heads=3,
    head_dim=10, conv_taps=4, conv_bias=True, tie_embedding=False, norm_eps=1e-4, rope_theta=5e4, max_position=77,
    init_std=0.1, pad_id=3, bos_id=4, eos_ids=(5, 6), param_dtype="float16", dtype="float16",
)


@pytest.mark.parametrize(("family", "changed"), [
    (LFM2, CHANGED), (LFM2_MOE, CHANGED | MIXTURE | {"ffn_types": ("swiglu", "moe")}),
], ids=lambda x: getattr(x, "name", ""))
def test_every_field_of_a_model_is_written_and_read_or_held_to_what_the_family_has(family, changed):
    """A field that ModelConfig gains must be one of these, or exports would lose it in silence."""
    rest = NOT_THE_NETWORK | OF_LAYERS_IT_LACKS[family.name]
    assert {field.name for field in dataclasses.fields(ModelConfig)} == changed.keys() | family.features.keys() | rest
    config = tiny_config(**changed)
    assert family_of(config) is family
    assert all(getattr(config, name) != getattr(tiny_config(), name) for name in changed)
    assert config_from_hf(config_to_hf(config)) == config


@pytest.mark.parametrize("kind", ["recurrence", "sliding_attention"])
def test_config_to_hf_refuses_layers_that_lfm2_has_not(kind):
    with pytest.raises(ValueError, match=f"LFM2 in transformers has no {kind} layers"):
        config_to_hf(tiny_config(layer_types=("conv", kind)))
