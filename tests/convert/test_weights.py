"""The weight table: total, named as `transformers` names it, and exactly invertible row by row."""

import math

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from oracle import CASES, hf_config, hf_model, in_files

from lfm_jax import LFM, ModelConfig
from lfm_jax.convert.families import config_from_hf, family_of
from lfm_jax.convert.families.lfm2 import LFM2
from lfm_jax.convert.hf import tensors
from lfm_jax.convert.weights import Weight, groups, misfits
from lfm_jax.model import abstract_model
from lfm_jax.testing import tiny_config


@st.composite
def configs(draw):
    kinds = st.sampled_from(["conv", "full_attention", "sliding_attention"])  # What a checkpoint can hold.
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
        post_norm=draw(st.booleans()),
        attention_gate=draw(st.booleans()),
    )


def counting(side):
    """As many arrays as there are on that side, each element another number."""
    count = side.count or 1
    return list(np.arange(count * math.prod(side.shape)).reshape(count, *side.shape))


def check_inverse(row):
    """Both ways, from either end, every element comes back to its place and no shape is another."""
    for arrays, there, back, side in ((counting(row.tensor), row.to_leaves, row.to_tensors, row.leaf),
                                      (counting(row.leaf), row.to_tensors, row.to_leaves, row.tensor)):
        moved = there(iter(arrays))
        assert [array.shape for array in moved] == [side.shape] * (side.count or 1)
        assert len(np.unique(np.concatenate(moved, axis=None))) == sum(array.size for array in arrays)
        np.testing.assert_array_equal(np.stack(back(iter(moved))), np.stack(arrays))


@given(configs())
def test_table_is_total_and_every_row_inverts_exactly(config):
    abstract = nnx.eval_shape(lambda: LFM(config, rngs=nnx.Rngs(0)))
    params = nnx.to_pure_dict(nnx.state(abstract, nnx.Param))
    ours = {tuple(key.key for key in path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    rows = groups(family_of(config).weights, config)
    assert {path: row.leaf.shape for row in rows for path in row.paths} == ours
    assert len({row.names for row in rows}) == len({row.paths for row in rows}) == len(rows)
    assert misfits(rows, params) == []
    for row in rows:
        check_inverse(row)


@pytest.mark.parametrize("case", CASES)
def test_names_and_shapes_are_those_of_transformers(case):
    hf = hf_model(hf_config(**CASES[case]))
    config = config_from_hf(hf.config.to_dict())
    expected = {name: tuple(value.shape) for name, value in in_files(hf).items()}
    if config.tie_embedding:
        del expected["lm_head.weight"]
    assert tensors(config) == expected


def test_layouts_hold_what_their_names_say():
    config = tiny_config(layer_types=("conv", "full_attention"), conv_bias=True)
    D, N, K, H = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
    rows = {name.removeprefix("model.layers."): row for row in groups(LFM2.weights, config) for name in row.names}

    def pair(name):
        hf = np.random.default_rng(0).standard_normal(rows[name].tensor.shape)
        [ours] = rows[name].to_leaves([hf])
        return hf, ours

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
    shapes = tensors(config)
    assert len(shapes) == 148
    assert sum(map(math.prod, shapes.values())) == config.num_params() == 354_483_968
    assert {row.where for row in LFM2.weights} == {"model", "block", "conv", "full_attention", "swiglu"}


def test_model_that_no_family_can_express_is_refused():
    with pytest.raises(ValueError, match="qk_norm"):
        tensors(tiny_config(qk_norm=False))


# -------------------------------------------------------------------- rows of several tensors or leaves

CONFIG = tiny_config(num_kv_heads=2, conv_taps=4)


def one(*row):
    [group] = groups([Weight(*row)], CONFIG)
    return group


def test_a_tensor_for_each_head_makes_one_leaf():
    row = one("model", "heads.{K}.k", "k", "{K} D H -> K H D")
    assert row.names == ("heads.0.k", "heads.1.k")
    given = counting(row.tensor)
    [leaf] = row.to_leaves(iter(given))
    for head, array in enumerate(given):
        np.testing.assert_array_equal(leaf[head], array.T)
    check_inverse(row)


def test_one_tensor_makes_several_leaves():
    row = one("model", "gate_up", ("a.w1", "a.w3"), "(P F) D -> {P} D F")
    assert row.paths == (("a", "w1"), ("a", "w3"))
    [given] = counting(row.tensor)
    w1, w3 = row.to_leaves([given])
    F = CONFIG.ffn_size
    np.testing.assert_array_equal(w1, given[:F].T)
    np.testing.assert_array_equal(w3, given[F:].T)
    check_inverse(row)


def test_several_tensors_make_several_leaves():
    row = one("model", "in.{W}", ("b", "c", "h"), "{W} C D -> {C} D W")
    assert len(row.names) == 4
    given = counting(row.tensor)
    for i, leaf in enumerate(row.to_leaves(iter(given))):
        np.testing.assert_array_equal(leaf, np.stack([array[i] for array in given], axis=-1))
    check_inverse(row)


def test_axes_within_one_of_the_files_axes_are_permuted():
    row = one("model", "q", "q", "(N H W) D -> N (W H) D")
    [given] = counting(row.tensor)
    [leaf] = row.to_leaves([given])
    N, H, W, D = CONFIG.num_heads, CONFIG.head_dim, CONFIG.conv_taps, CONFIG.hidden_size
    np.testing.assert_array_equal(leaf, given.reshape(N, H, W, D).swapaxes(1, 2).reshape(N, W * H, D))
    check_inverse(row)


def test_several_tensors_are_read_one_at_a_time_into_their_leaf():
    """The stream is not asked for the next tensor before the last has been copied, so that one can be held."""
    row, shown = one("model", "k.{W}", "k", "{W} D H -> W D H"), []

    def stream():
        buffer = np.empty(row.tensor.shape)
        for i in range(CONFIG.conv_taps):
            shown.append(i)
            buffer[...] = i
            yield buffer

    [leaf] = row.to_leaves(stream())
    assert shown == list(range(CONFIG.conv_taps))
    np.testing.assert_array_equal(leaf[:, 0, 0], shown)


def test_a_single_tensor_is_viewed_not_copied():
    row = one("model", "conv", "conv", "D 1 W -> W D")
    [given] = counting(row.tensor)
    [leaf] = row.to_leaves([given])
    assert np.shares_memory(leaf, given)


@pytest.mark.parametrize("layout", ["1 D -> D", "D -> 1 D", "1 1 D -> D 1", "(1 D) F -> 1 F D"])
def test_an_axis_of_one_may_come_first(layout):
    row = one("model", "a", "b", layout)
    given = np.arange(math.prod(row.tensor.shape)).reshape(row.tensor.shape)
    [leaf] = row.to_leaves([given])
    np.testing.assert_array_equal(leaf.squeeze(), given.squeeze().T if "F" in layout else given.squeeze())
    assert (1 in row.tensor.shape, 1 in row.leaf.shape) == (layout.startswith("1"), "1" in layout.split(" -> ")[1])
    check_inverse(row)


@pytest.mark.parametrize(("names", "paths", "layout"), [
    ("a", "b", "D F"), ("a", "b", "D F -> D"), ("a", "b", "D D -> D D"), ("a", "b", "{K} D -> K D"),
    ("a.{K}", "b", "K D -> K D"), (("a", "b"), "c", "(P D) F -> P D F"), ("a", ("b", "c"), "P D -> P D"),
    ("a.{K}", "b", "D {K} -> K D"), (("a", "b"), "c", "1 D -> D"), ("a", "b", "{1} D -> D"),
    ("a", ("b", "c"), "D -> {1} D"),
])
def test_a_row_that_contradicts_itself_is_refused(names, paths, layout):
    with pytest.raises(ValueError, match="layout"):
        Weight("model", names, paths, layout)


def test_a_table_that_does_not_make_the_model_is_named_leaf_by_leaf():
    _, params = abstract_model(CONFIG)
    rows = [row for row in LFM2.weights if row.names != "model.embedding_norm.weight"]
    rows += [Weight("model", "x", "other", "D -> D")]
    rows = [Weight(row.where, row.names, row.paths, "F V -> V F") if row.paths == "embed" else row for row in rows]
    assert misfits(groups(rows, CONFIG), params) == [
        "no tensor has the parameter norm.weight",
        "a tensor is for the parameter other, which is not there",
        "the parameter embed is [97, 32], but made from tensors [97, 48]",
    ]
