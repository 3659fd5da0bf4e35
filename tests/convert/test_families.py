"""Families: which one a config.json is of, and its fields as `transformers` reads and writes them."""

import dataclasses

import jax
import numpy as np
import oracle
import pytest
import torch
from flax import nnx
from transformers import AutoConfig, AutoModelForCausalLM, Lfm2Config

from lfm_jax import ModelConfig
from lfm_jax.config import PRESETS
from lfm_jax.convert.families import config_from_hf, config_to_hf, family_of
from lfm_jax.convert.families.lfm2 import LFM2
from lfm_jax.convert.families.lfm2_encoder import LFM2_ENCODER
from lfm_jax.convert.families.lfm2_moe import LFM2_MOE
from lfm_jax.convert.families.lfm3 import LFM3
from lfm_jax.convert.hf import load_hf, save_hf, tensors
from lfm_jax.kinds import OPERATORS
from lfm_jax.testing import tiny_config, tiny_model

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


THETAS = {"full_attention": dict(rope_type="proportional", rope_theta=3e4, partial_rotary_factor=0.25),
          "sliding_attention": dict(rope_type="default", rope_theta=7.0)}
LFM3_FILES = {
    "nothing-said": {},
    "null-pattern": dict(layer_types=None, rope_parameters=None),
    "types": dict(layer_types=["sliding_attention", "full_attention", "sliding_attention", "conv"], sliding_window=9),
    "thetas": dict(rope_parameters=THETAS),
    "one-theta": dict(rope_parameters=dict.fromkeys(THETAS, THETAS["sliding_attention"])),
    "theta-outside": dict(rope_parameters=THETAS | dict(sliding_attention=dict(rope_type="default")), rope_theta=50.0),
    "thetas-win": dict(rope_parameters=THETAS, rope_theta=50.0),
    "old-theta-is-ignored": dict(rope_theta=50.0),
    "no-share": dict(rope_parameters=THETAS | dict(full_attention=dict(rope_type="proportional", rope_theta=2.0))),
    "bare": dict(use_sandwich_norm=False, use_attention_gate=False, tie_word_embeddings=False, conv_bias=True),
    "numbers": dict(norm_eps=1e-3, initializer_range=0.1, max_position_embeddings=77, pad_token_id=3, bos_token_id=4,
                    eos_token_id=[5, 6], head_dim=10, conv_L_cache=3, attention_dropout=0.1),
}


def built(hf_dict):
    """(config, name -> shape of every parameter) as `transformers` builds them."""
    hf_dict = dict(hf_dict)
    config = AutoConfig.for_model(hf_dict.pop("model_type"), **hf_dict)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: tuple(p.shape) for name, p in oracle.in_files(model, dict(model.named_parameters())).items()}
    return config, shapes


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


@pytest.mark.parametrize("name", LFM3_FILES)
def test_config_of_lfm3_builds_what_transformers_builds(name):
    """The angles too, of each kind of attention."""
    hf_dict = SIZES | dict(model_type="lfm3", head_dim=8, vocab_size=125_000) | LFM3_FILES[name]
    theirs, shapes = built(hf_dict)
    ours = config_from_hf(hf_dict)
    assert tensors(ours) == shapes
    assert ours.layer_types == tuple(theirs.layer_types)
    eos = theirs.eos_token_id
    assert ours.eos_ids == (tuple(eos) if isinstance(eos, list) else (eos,))
    same = dict(norm_eps="norm_eps", max_position="max_position_embeddings", init_std="initializer_range",
                pad_id="pad_token_id", bos_id="bos_token_id", conv_taps="conv_L_cache", conv_bias="conv_bias",
                tie_embedding="tie_word_embeddings", sliding_window="sliding_window", head_dim="head_dim",
                post_norm="use_sandwich_norm", attention_gate="use_attention_gate")
    assert {mine: getattr(ours, mine) for mine in same} == {mine: getattr(theirs, hf) for mine, hf in same.items()}
    rotary = AutoModelForCausalLM.from_config(theirs).model.rotary_emb
    for kind in rotary.layer_types:
        operator = OPERATORS[kind].find_module()(ours, rngs=nnx.Rngs(0))
        pairs = np.arange(ours.head_dim // 2)
        turning = pairs < int(operator.fraction * ours.head_dim // 2)
        expected = np.where(turning, operator.theta ** (-2 * pairs / ours.head_dim), 0)
        np.testing.assert_allclose(getattr(rotary, f"{kind}_inv_freq"), expected, rtol=1e-5)


def test_a_share_of_a_head_is_read_under_the_name_of_published_files_and_written_under_that_of_transformers():
    def file(name):
        full = dict(rope_type=name, rope_theta=1e6, partial_rotary_factor=0.5)
        return SIZES | dict(model_type="lfm3", vocab_size=125_000, rope_parameters=THETAS | dict(full_attention=full))

    config = config_from_hf(file("default"))
    assert config == config_from_hf(file("proportional"))
    assert config.rope_fraction == 0.5
    assert config_to_hf(config)["rope_parameters"]["full_attention"]["rope_type"] == "proportional"


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
        (dict(model_type="lfm2_vl"),
         r"model_type is 'lfm2_vl'; expected 'lfm2' \(LFM2\), 'lfm2_moe' \(LFM2 MoE\), 'lfm3' \(LFM3\)"),
        (dict(architectures=["Lfm3ForCausalLM"]), r"a list with Lfm2ForCausalLM, Lfm2B.* for model_type 'lfm2'"),
        (dict(architectures=["Lfm2BidirectionalForMaskedLM"]),
         r"architectures is \['Lfm2BidirectionalForMaskedLM'\]; expected a list with Lfm2ForCausalLM, Lfm2Bidirectional"
         r"Model for model_type 'lfm2'"),
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


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (dict(architectures=["Lfm2ForCausalLM"]), r"expected a list with Lfm3ForCausalLM for model_type 'lfm3'"),
        (dict(attention_bias=True), r"attention_bias is true"),
        (dict(layer_types=["conv", "mamba"], num_hidden_layers=2), r"mamba; LFM3 has conv, full_attention, s"),
        (dict(rope_parameters=dict(rope_type="default", rope_theta=1.0)), r"rope_parameters has no full_attention"),
        (dict(rope_parameters=THETAS | dict(full_attention=dict(rope_type="yarn"))), r"have rope_type 'yarn'"),
        (dict(rope_parameters=THETAS | dict(full_attention=THETAS["full_attention"] | dict(factor=2.0))),
         r"full_attention have rope_type 'proportional' and factor 2"),
        (dict(rope_parameters=dict.fromkeys(THETAS, THETAS["full_attention"])),
         r"sliding_attention have partial_rotary_factor 0.25"),
        (dict(num_hidden_layers=3, layer_types=["conv"]), r"layer_types has 1 entries but num_hidden_layers is 3"),
    ],
)
def test_config_of_lfm3_refuses(changes, match):
    with pytest.raises(ValueError, match=match):
        config_from_hf(SIZES | dict(model_type="lfm3", vocab_size=125_000, num_hidden_layers=5) | changes)


@pytest.mark.parametrize("architectures", [None, [], ["Lfm2ForCausalLM"], ["Other", "Lfm2ForCausalLM"]])
def test_a_file_may_name_its_architecture_among_others_or_not_at_all(architectures):
    assert config_from_hf(SIZES | dict(architectures=architectures)) == config_from_hf(SIZES)


def test_config_from_hf_lists_every_missing_size():
    with pytest.raises(ValueError, match=r"lacks hidden_size, num_key_value_heads, intermediate_size"):
        config_from_hf({key: SIZES[key] for key in
                                 ("model_type", "vocab_size", "num_hidden_layers", "num_attention_heads")})


@pytest.mark.parametrize("changes", [dict(qk_norm=False), dict(conv_gates="input")])
def test_config_to_hf_refuses_what_no_family_can_express(changes):
    (field,) = changes
    with pytest.raises(ValueError, match=rf"LFM2 in transformers has no {field}={changes[field]}; such"):
        config_to_hf(tiny_config(**changes))


@pytest.mark.parametrize("changes", [
    dict(post_norm=True), dict(attention_gate=True), dict(rope_fraction=0.5), dict(sliding_rope_theta=1e4),
    dict(layer_types=("conv", "sliding_attention")),
])
def test_what_lfm2_cannot_express_is_lfm3(changes):
    config = tiny_config(**changes)
    hf = config_to_hf(config)
    assert (hf["model_type"], hf["architectures"]) == ("lfm3", ["Lfm3ForCausalLM"])
    assert config_from_hf(hf) == config
    assert config_to_hf(tiny_config())["model_type"] == "lfm2"


def test_an_encoder_is_named_by_its_architecture():
    published = SIZES | RELEASE_ONLY | dict(architectures=["Lfm2BidirectionalModel"], tie_word_embeddings=False)
    config = config_from_hf(published)
    assert config == config_from_hf(SIZES | RELEASE_ONLY).replace(causal=False)
    hf = config_to_hf(config)
    assert (hf["model_type"], hf["architectures"], hf["use_cache"]) == ("lfm2", ["Lfm2BidirectionalModel"], False)
    assert family_of(config) is LFM2_ENCODER
    assert family_of(config.replace(causal=True)) is LFM2
    assert LFM2.lacks(config) == ["causal=False"]
    assert LFM2_ENCODER.lacks(config.replace(causal=True)) == ["causal=True"]
    with pytest.raises(ValueError, match="LFM3 in transformers has no causal=False; such"):
        config_to_hf(config.replace(attention_gate=True))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_encoder_round_trips_to_the_bit_under_names_without_a_prefix(tmp_path, dtype):
    model = tiny_model(causal=False, conv_bias=True, param_dtype=dtype, dtype=dtype)
    save_hf(model, tmp_path / "encoder")
    loaded, _ = load_hf(tmp_path / "encoder")
    assert loaded.config == model.config
    for a, b in zip(jax.tree.leaves(nnx.state(loaded)), jax.tree.leaves(nnx.state(model)), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
    names = tensors(model.config)
    assert {"embed_tokens.weight", "embedding_norm.weight", "layers.0.conv.conv.weight",
            "layers.1.self_attn.q_layernorm.weight", "layers.2.feed_forward.w1.weight"} < set(names)
    with_prefix = {f"model.{name}": shape for name, shape in names.items()}
    assert with_prefix == tensors(model.config.replace(causal=True))


def test_everything_that_a_family_lacks_comes_at_once():
    config = tiny_config(qk_norm=False, post_norm=True, layer_types=("recurrence", "conv", "sliding_attention"))
    with pytest.raises(ValueError, match="LFM3 in transformers has no qk_norm=False, recurrence layers; such"):
        config_to_hf(config)


NOT_THE_NETWORK = {"logits_dtype", "conv_impl", "scan_impl", "attention_impl", "experts_impl", "expert_bias_rate",
                   "router_z_loss", "init", "remat", "scan_layers", "quantize"}
"""How a model is computed, begun and trained, which no config.json says."""
MIXTURE = dict(num_experts=6, active_experts=3, expert_size=40, expert_bias=False, normed_weights=False,
               expert_scale=2.5)
RECURRENT, WINDOWS = {"recurrence"}, {"sliding_window"}
"""Of layers that a family may lack."""
CHANGED = dict(
    layer_types=("full_attention", "conv"), vocab_size=98, hidden_size=33, ffn_size=49, num_heads=6, num_kv_heads=3,
    head_dim=10, conv_taps=4, conv_bias=True, tie_embedding=False, norm_eps=1e-4, rope_theta=5e4, max_position=77,
    init_std=0.1, pad_id=3, bos_id=4, eos_ids=(5, 6), param_dtype="float16", dtype="float16",
)


CHANGED_MOE = CHANGED | MIXTURE | {"ffn_types": ("swiglu", "moe")}
CHANGED_LFM3 = CHANGED | dict(
    layer_types=("full_attention", "sliding_attention", "conv"), sliding_window=3, post_norm=True, attention_gate=True,
    rope_fraction=0.3, sliding_rope_theta=2e4,
)
CHANGED_ENCODER = {name: value for name, value in CHANGED.items() if name != "tie_embedding"} | {"causal": False}


@pytest.mark.parametrize(("family", "changed", "lacked"), [
    (LFM2, CHANGED, RECURRENT | WINDOWS | MIXTURE.keys()), (LFM2_MOE, CHANGED_MOE, RECURRENT | WINDOWS),
    (LFM3, CHANGED_LFM3, RECURRENT | MIXTURE.keys()),
    (LFM2_ENCODER, CHANGED_ENCODER, RECURRENT | WINDOWS | MIXTURE.keys()),
], ids=["lfm2", "lfm2_moe", "lfm3", "lfm2_encoder"])
def test_every_field_of_a_model_is_written_and_read_or_held_to_what_the_family_has(family, changed, lacked):
    """A field that ModelConfig gains must be one of these, or exports would lose it in silence."""
    known = changed.keys() | family.features.keys() | NOT_THE_NETWORK | lacked
    assert {field.name for field in dataclasses.fields(ModelConfig)} == known
    config = tiny_config(**changed)
    assert family_of(config) is family
    assert all(getattr(config, name) != getattr(tiny_config(), name) for name in changed)
    assert config_from_hf(config_to_hf(config)) == config


def test_config_to_hf_refuses_layers_that_no_family_has():
    with pytest.raises(ValueError, match="LFM2 in transformers has no recurrence layers; such"):
        config_to_hf(tiny_config(layer_types=("conv", "recurrence")))
