"""The weight table: total, named as `transformers` names it, and exactly invertible row by row."""

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from oracle import CASES, hf_config
from transformers import Lfm2ForCausalLM

from lfm_jax import LFM, ModelConfig
from lfm_jax.convert.families import config_from_hf
from lfm_jax.convert.weights import WEIGHTS, tensors
from lfm_jax.testing import tiny_config


@st.composite
def configs(draw):
    kinds = st.sampled_from(["conv", "full_attention"])  # What a checkpoint can hold.
    kv = draw(st.integers(1, 3))
    return tiny_config(
        layer_types=tuple(draw(st.lists(kinds, min_size=1, max_size=3))),
        hidden_size=draw(st.integers(1, 7)),
        ffn_size=draw(st.integers(1, 7)),
        num_kv_heads=kv,
        num_heads=kv * draw(st.integers(1, 3)),
        head_dim=2 * draw(st.integers(1, 3)),
        conv_taps=draw(st.integers(1, 4)),
        vocab_size=draw(st.integers(8, 12)),
        conv_bias=draw(st.booleans()),
        tie_embedding=draw(st.booleans()),
    )


@given(configs())
def test_table_is_total_and_every_row_inverts_exactly(config):
    abstract = nnx.eval_shape(lambda: LFM(config, rngs=nnx.Rngs(0)))
    params = nnx.to_pure_dict(nnx.state(abstract, nnx.Param))
    ours = {tuple(key.key for key in path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    rows = tensors(config)
    assert {row.path: row.shape for row in rows} == ours
    assert len({row.name for row in rows}) == len({row.path for row in rows}) == len(rows)
    for row in rows:
        hf = np.arange(np.prod(row.hf_shape)).reshape(row.hf_shape)
        assert row.to_ours(hf).shape == row.shape
        np.testing.assert_array_equal(row.to_hf(row.to_ours(hf)), hf)
        back = np.arange(np.prod(row.shape)).reshape(row.shape)
        np.testing.assert_array_equal(row.to_ours(row.to_hf(back)), back)


@pytest.mark.parametrize("case", CASES)
def test_names_and_shapes_are_those_of_transformers(case):
    hf = Lfm2ForCausalLM(hf_config(**CASES[case]))
    config = config_from_hf(hf.config.to_dict())
    expected = {name: tuple(value.shape) for name, value in hf.state_dict().items()}
    if config.tie_embedding:
        del expected["lm_head.weight"]
    assert {row.name: row.hf_shape for row in tensors(config)} == expected


def test_layouts_hold_what_their_names_say():
    config = tiny_config(layer_types=("conv", "full_attention"), conv_bias=True)
    D, N, K, H = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
    rows = {row.name.removeprefix("model.layers."): row for row in tensors(config)}

    def pair(name):
        hf = np.random.default_rng(0).standard_normal(rows[name].hf_shape)
        return hf, rows[name].to_ours(hf)

    hf, ours = pair("0.conv.in_proj.weight")
    gates = hf.reshape(3, D, D)  # `B, C, x = in_proj(x).chunk(3)`: rows of B first.
    for gate in range(3):
        np.testing.assert_array_equal(ours[gate], gates[gate])
    hf, ours = pair("0.conv.in_proj.bias")
    np.testing.assert_array_equal(ours, np.stack(np.split(hf, 3)))
    hf, ours = pair("0.conv.conv.weight")
    np.testing.assert_array_equal(ours, hf[:, 0].T)
    for name, heads in (("q", N), ("k", K), ("v", K)):
        hf, ours = pair(f"1.self_attn.{name}_proj.weight")
        for head in range(heads):
            np.testing.assert_array_equal(ours[head], hf[head * H : (head + 1) * H])
    hf, ours = pair("1.self_attn.out_proj.weight")
    np.testing.assert_array_equal(ours.reshape(D, N * H), hf)


def test_published_shape_has_148_tensors_and_every_parameter():
    config = ModelConfig.preset("lfm2.5-350m")
    rows = tensors(config)
    assert len(rows) == 148
    assert sum(np.prod(row.hf_shape) for row in rows) == config.num_params() == 354_483_968
    assert {row.where for row in WEIGHTS} == {"model", "untied", "block", "conv", "conv_bias", "full_attention"}


@pytest.mark.parametrize("changes", [dict(post_norm=True), dict(qk_norm=False)])
def test_model_that_lfm2_cannot_express_is_refused(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        tensors(tiny_config(**changes))
