"""ModelConfig: published counts, its folds against the real model, config.json as `transformers` reads it."""

from typing import get_args

import jax
import numpy as np
import oracle
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from transformers import Lfm3Config

import lfm_jax as lfm
from lfm_jax.config import ConvGates, Recurrence
from lfm_jax.convert.families import config_from_hf
from lfm_jax.convert.hf import tensors
from lfm_jax.kinds import FEED_FORWARDS, OPERATORS
from lfm_jax.testing import tiny_config

PUBLISHED = {
    "lfm2.5-230m": 229_693_184,
    "lfm2-350m": 354_483_968,
    "lfm2.5-350m": 354_483_968,
    "lfm2-700m": 742_489_344,
    "lfm2-1.2b": 1_170_340_608,
    "lfm2.5-1.2b": 1_170_340_608,
    "lfm2-2.6b": 2_569_272_320,
    "lfm2-8b-a1b": 8_339_929_856 + 704,  # The biases of experts are no parameters in PyTorch.
    "lfm2-24b-a2b": 23_843_661_440,
}
LARGE_VOCABULARY = {"lfm2.5-2.6b": 2_697_198_592, "lfm3-1.7b": 1_728_801_536}


@st.composite
def configs(draw):
    kinds = st.sampled_from(list(OPERATORS))
    group, K = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    names = ("conv_bias", "qk_norm", "attention_gate", "post_norm", "tie_embedding")
    flags = {name: draw(st.booleans()) for name in names}
    experts = draw(st.integers(1, 5))
    return tiny_config(
        layer_types=tuple(draw(st.lists(kinds, min_size=1, max_size=4))),
        ffn_types=(draw(st.sampled_from(list(FEED_FORWARDS))),), num_experts=experts,
        active_experts=draw(st.integers(1, experts)), expert_size=draw(st.integers(1, 9)),
        expert_bias=draw(st.booleans()),
        vocab_size=draw(st.integers(8, 50)), hidden_size=draw(st.integers(1, 40)), ffn_size=draw(st.integers(1, 40)),
        num_heads=group * K, num_kv_heads=K, head_dim=2 * draw(st.integers(1, 8)), conv_taps=draw(st.integers(1, 7)),
        conv_gates=draw(st.sampled_from(get_args(ConvGates))), recurrence=draw(st.sampled_from(get_args(Recurrence))),
        sliding_window=draw(st.integers(1, 20)), **flags,
    )


def abstract_params(config):
    model = nnx.eval_shape(lambda: lfm.LFM(config, rngs=nnx.Rngs(0)))
    return jax.tree.leaves(nnx.to_pure_dict(nnx.state(model, nnx.Param)))


# ---------------------------------------------------------------- counts


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_number_of_parameters(name):
    config = lfm.ModelConfig.preset(name)
    assert config.num_params() == PUBLISHED[name]
    assert sum(x.size for x in abstract_params(config)) == PUBLISHED[name]
    shared = (config.vocab_size, config.conv_taps, config.head_dim, config.num_kv_heads, config.rope_theta)
    assert shared == (65_536, 3, 64, 8, 1e6)
    assert (config.max_position, config.pad_id, config.bos_id, config.eos_ids) == (128_000, 0, 1, (7,))


@pytest.mark.parametrize("name", LARGE_VOCABULARY)
def test_presets_with_the_vocabulary_of_128_000(name):
    config = lfm.ModelConfig.preset(name)
    assert config.num_params() == LARGE_VOCABULARY[name] == sum(x.size for x in abstract_params(config))
    assert (config.vocab_size, config.pad_id, config.bos_id, config.eos_ids) == (128_000, 124_893, 124_894, (124_900,))
    assert set(lfm.config.PRESETS) == PUBLISHED.keys() | LARGE_VOCABULARY.keys()


def test_the_default_of_lfm3_is_its_preset():
    assert config_from_hf(Lfm3Config().to_dict() | dict(dtype="bfloat16"), param_dtype="float32") == (
        lfm.ModelConfig.preset("lfm3-1.7b"))


def test_the_350m_checkpoint_has_148_tensors_and_the_published_parts():
    config = lfm.ModelConfig.preset("lfm2.5-350m")
    assert len(tensors(config)) == 148
    size = {name: int(np.prod(shape)) for name, shape in tensors(config).items()}
    parts = {part: sum(n for name, n in size.items() if name.startswith(part))
             for part in ("model.layers.0.conv.", "model.layers.2.self_attn.", "model.layers.0.feed_forward.")}
    assert list(parts.values()) == [4_197_376, 3_145_856, 14_155_776]
    assert size["model.embed_tokens.weight"] == 67_108_864
    # Published for bfloat16: two columns of 10 conv layers are 40 KiB, keys and values 12 KiB a token.
    assert config.state_bytes(101) - config.state_bytes(100) == 12 * 1024
    assert config.state_bytes(1) - 12 * 1024 - 4 - 6 * 8 == 40 * 1024


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"lfm4.*lfm2-1\.2b, lfm2-2\.6b"):
        lfm.ModelConfig.preset("lfm4")


@given(config=configs())
def test_num_params_and_state_bytes_count_what_is_there(config):
    assert config.num_params() == sum(x.size for x in abstract_params(config))
    state = jax.eval_shape(lambda: lfm.LFM(config, rngs=nnx.Rngs(0)).init_state(1, 9))
    assert config.state_bytes(9) == sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert config.num_layers == len(config.layer_types)


@pytest.mark.parametrize("recurrence", get_args(Recurrence))
def test_a_recurrence_takes_the_place_of_a_convolution_at_equal_parameters(recurrence):
    config = lfm.ModelConfig.preset("lfm2.5-350m").replace(recurrence=recurrence)
    types = tuple("recurrence" if kind == "conv" else kind for kind in config.layer_types)
    other = config.replace(layer_types=types)
    assert abs(other.num_params() / config.num_params() - 1) < 1e-4
    assert (other.num_params() == config.num_params()) == (recurrence != "lti")
    # The state of a recurrence is one float32 column where a convolution has two bfloat16 ones.
    assert other.state_bytes(100) == config.state_bytes(100)


@pytest.mark.parametrize(
    ("kinds", "T"),
    [(("conv",) * 2, 32), (("full_attention",) * 2, 128), (("recurrence",) * 2, 32), (oracle.HYBRID, 48)],
)
def test_flops_are_those_that_xla_counts(kinds, T):
    config = tiny_config(layer_types=kinds, hidden_size=192, ffn_size=512, vocab_size=1000, head_dim=32, num_heads=6)
    graphdef, params = nnx.split(nnx.eval_shape(lambda: lfm.LFM(config, rngs=nnx.Rngs(0))), nnx.Param)
    tokens = jax.ShapeDtypeStruct((1, T), np.int32)
    compiled = jax.jit(lambda params, tokens: nnx.merge(graphdef, params)(tokens)[0]).lower(
        nnx.to_pure_dict(params), tokens).compile()
    # XLA computes all T x T scores and weights them; we count the T (T + 1) / 2 that the causal mask leaves.
    masked = config.attention_layers * 4 * config.num_heads * config.head_dim * (T * T - T * (T + 1) / 2)
    ours = T * config.flops_per_token(T) + masked
    # XLA adds elementwise work: norms, gates, rotary, softmax.
    assert 1 <= compiled.cost_analysis()["flops"] / ours < 1.04


def test_a_token_of_a_window_meets_no_more_keys_than_the_window():
    """Mean over a document of min(t + 1, window), counted one by one."""
    full = tiny_config(layer_types=("full_attention",), sliding_window=5)
    sliding = full.replace(layer_types=("sliding_attention",))
    per_key = 4 * full.num_heads * full.head_dim
    for T in (1, 4, 5, 6, 33):
        keys = sum(min(t + 1, 5) for t in range(T)) / T
        assert sliding.flops_per_token(T) == pytest.approx(full.flops_per_token(T) + per_key * (keys - (T + 1) / 2))


# ---------------------------------------------------------------- validation

BAD = {
    "hidden_size": [0, -1, 1.5, "64", True],
    "conv_taps": [0],
    "norm_eps": [0.0, float("nan"), "small"],
    "rope_theta": [float("inf")],
    "sliding_rope_theta": [0.0, "1e4", float("nan")],
    "rope_fraction": [1.5, -0.1, None, float("nan")],
    "attention_gate": [None, 1],
    "dtype": ["bf16", np.float32],
    "param_dtype": ["float64"],
    "logits_dtype": [None],
    "conv_impl": ["pallas"],
    "scan_impl": ["lax"],
    "attention_impl": ["flash"],
    "conv_gates": [True, "left"],
    "recurrence": ["mamba"],
    "sliding_window": [0, None],
    "conv_bias": [1],
    "tie_embedding": ["yes"],
    "layer_types": [(), ["conv"], None, ("conv", "mamba")],
    "num_kv_heads": [3],
    "head_dim": [7],
    "pad_id": [97, -1],
    "bos_id": [None],
    "eos_ids": [7, [7], (7, 1000), None],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in BAD.items() for value in values])
def test_a_bad_field_is_named_with_the_way_out(field, value):
    with pytest.raises(ValueError, match=rf"(?s)not valid.*{field}.*(must|choose|change|lie in)"):
        tiny_config(**{field: value})


def test_several_errors_come_at_once():
    with pytest.raises(ValueError, match="not valid") as caught:
        tiny_config(hidden_size=0, dtype="bf16", norm_eps=-1.0, layer_types=("lstm",))
    for word in ("hidden_size is 0", "dtype is 'bf16'", "norm_eps is -1.0", "layer_types has lstm"):
        assert word in str(caught.value)


def test_replace_validates_and_configs_can_be_keys():
    config = tiny_config()
    assert config.replace(dtype="bfloat16") != config
    assert {config: 1}[tiny_config()] == 1
    with pytest.raises(ValueError, match="vocab_size"):
        config.replace(vocab_size=-3)
