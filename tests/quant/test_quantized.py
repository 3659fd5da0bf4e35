"""Weights in 8 and 4 bits: how they are rounded, that products are those of the widened weights, what is kept."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import rel_err, tokens_like

import lfm_jax as lfm
from lfm_jax.engine.config import EngineConfig
from lfm_jax.engine.placement import memory_needed
from lfm_jax.kernels.linear import linear, lookup
from lfm_jax.kernels.logprobs import token_logprobs
from lfm_jax.layers import HEADS_IN, IN_OUT, OUT_HEADS, OUT_IN
from lfm_jax.model import abstract_model, param_traits
from lfm_jax.quant.model import FORMS as FORMS_BY_NAME
from lfm_jax.quant.model import narrow_matrix, narrowed
from lfm_jax.quant.weights import LEVELS
from lfm_jax.stacking import stack_layers
from lfm_jax.testing import tiny_config, tiny_model
from lfm_jax.train.checkpoint import CheckpointManager
from lfm_jax.train.state import new_state
from lfm_jax.weight_kinds import WeightKind

EVERY_MATRIX = dict(
    layer_types=("recurrence", "conv", "sliding_attention", "full_attention"), sliding_window=5, tie_embedding=False,
    ffn_types=("swiglu", "moe", "swiglu", "moe"), num_experts=4, active_experts=2, expert_size=32, ffn_size=64,
    attention_gate=True, conv_bias=True,
)
FORMS = [("int8", None), ("int8", 32), ("int4", None), ("int4", 32)]
MATRICES = {"out, in": ((24, 64), OUT_IN), "streams": ((3, 16, 64), OUT_IN), "heads, in": ((4, 8, 64), HEADS_IN),
            "out, heads": ((24, 4, 16), OUT_HEADS), "experts": ((3, 64, 16), IN_OUT)}


def drawn(shape, dtype="float32", seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def array(w):
    return w.astype(w.dtype) if isinstance(w, WeightKind) else w


def params_of(model):
    graphdef, state = nnx.split(model, nnx.Param)
    return graphdef, nnx.to_pure_dict(state)


@functools.cache
def made(kind, group, **changes):
    return lfm.quantize(tiny_model(**(changes or EVERY_MATRIX)), kind, group)


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("kind", "group"), FORMS)
def test_values_are_rounded_by_half_a_step_at_most(kind, group, dtype, name):
    shape, matrix = MATRICES[name]
    w = drawn(shape, dtype).at[0].set(0)
    w = w.at[1, 0, ...].set(w[1, 0] * 1e4)  # One that is huge, or some: others next to them become 0, and are bounded.
    narrow, finite = narrowed(w, matrix, kind, group)
    assert bool(finite)
    assert (narrow.shape, narrow.dtype, narrow.ndim) == (w.shape, w.dtype, w.ndim)
    assert narrow.values.dtype == kind
    assert int(jnp.max(jnp.abs(narrow.values.astype("int32")))) == LEVELS[kind]
    step = dataclasses.replace(narrow, values=jnp.ones_like(narrow.values)).astype("float32")
    error = np.abs(np.asarray(narrow.astype("float32")) - np.asarray(w, np.float32))
    assert np.all(error <= 0.5001 * np.asarray(step))
    assert not np.any(np.asarray(narrow.astype(dtype))[0])
    peak = np.abs(np.asarray(w, np.float32)).max()
    assert np.asarray(step).max() * LEVELS[kind] <= peak * 1.01, "no step is larger than it need be"


@pytest.mark.parametrize("rows", [(), (1,), (2, 5)], ids=str)
@pytest.mark.parametrize("name", [name for name in MATRICES if name != "experts"])
@pytest.mark.parametrize(("kind", "group"), FORMS)
def test_products_and_their_gradients_are_those_of_the_widened_weights(kind, group, name, rows):
    shape, matrix = MATRICES[name]
    narrow, _ = narrowed(drawn(shape), matrix, kind, group)
    inputs = len(matrix.inputs)
    x = drawn((*rows, *shape[-inputs:]), seed=1)
    product, pull = jax.vjp(lambda x: linear(x, narrow, inputs=inputs), x)
    expected, pull_expected = jax.vjp(lambda x: linear(x, narrow.astype("float32"), inputs=inputs), x)
    assert rel_err(product, expected) < 1e-6
    dy = drawn(product.shape, seed=2)
    assert rel_err(*pull(dy), *pull_expected(dy)) < 1e-6
    assert linear(x.astype("bfloat16"), narrow, inputs=inputs, dtype="float32").dtype == "float32"
    if not rows:
        with pytest.raises(ValueError, match="not its last"):
            linear(drawn((16,)), narrowed(drawn((3, 64, 16)), IN_OUT, kind, group)[0])


@pytest.mark.parametrize(("kind", "group"), [*FORMS, ("w8a8", None)])
def test_rows_of_a_table_and_items_of_experts(kind, group):
    table, _ = narrowed(drawn((40, 64)), OUT_IN, kind, group)
    for ids in (np.array([[3, 39, 0], [3, 1, 2]]), np.array([[39]])):
        np.testing.assert_array_equal(lookup(ids, table, "float32"), table.astype("float32")[ids])
    experts, _ = narrowed(drawn((3, 64, 16)), IN_OUT, kind, group)
    np.testing.assert_array_equal(experts.item(jnp.int32(2), jnp.float32), experts.astype("float32")[2])


@pytest.mark.parametrize(("kind", "group"), [("int8", None), ("int4", 32)])
def test_logits_log_probabilities_and_gradient_by_activations(kind, group):
    graphdef, params = params_of(made(kind, group))
    arrays = jax.tree.map(array, params, is_leaf=lambda w: isinstance(w, WeightKind))
    tokens = tokens_like((2, 9), 0)

    @jax.jit
    def run(params):
        model = nnx.merge(graphdef, params)
        first, state = model(tokens[:, :8], state=model.init_state(2, 16), logits=None)
        hidden = jnp.concatenate([first, model(tokens[:, 8:], state=state, logits=None)[0]], axis=1)

        def score(hidden):
            return token_logprobs(hidden, model.head_VD, tokens, chunk=8).sum()

        block = model.blocks[1].feed_forward  # A mixture, which has a derivative of its own.
        _, pull = jax.vjp(lambda x: block(x, segment_ids_BT=None)[0], hidden)
        return model.project(hidden), *jax.value_and_grad(score)(hidden), *pull(jnp.ones_like(hidden))

    for ours, theirs in zip(run(params), run(arrays), strict=True):
        assert rel_err(ours, theirs) < 1e-5


def test_matrices_and_tables_become_narrow_and_nothing_else():
    _, before = params_of(tiny_model(**EVERY_MATRIX))
    _, after = params_of(made("int4", 32))
    kept = {".".join(str(key.key) for key in path): isinstance(w, WeightKind) for path, w in jax.tree.leaves_with_path(
        after, is_leaf=lambda w: isinstance(w, WeightKind))}
    shapes = {".".join(str(key.key) for key in path): w.shape for path, w in jax.tree.leaves_with_path(before)}
    assert kept == {name: len(shape) > 1 and not name.endswith(("operator.conv", "router", "bias"))
                    for name, shape in shapes.items()}
    assert kept["embed"]
    assert kept["head"]


def test_memory_is_counted_as_a_device_holds_it():
    config = EngineConfig(slots=((1, 64),))
    for kind, group in (*FORMS, ("w8a8", None)):
        model = made(kind, group)
        _, params = params_of(model)
        held = sum(x.on_device_size_in_bytes() for x in jax.tree.leaves(params))
        assert memory_needed(config, model.config, params)["parameters"] == held
    large = lfm.ModelConfig.preset("lfm2.5-350m").replace(param_dtype="bfloat16", dtype="bfloat16")
    _, shapes = abstract_model(large)
    needed = {None: memory_needed(config, large, shapes)["parameters"]}
    for form in (("int8", None), ("int4", 32)):
        narrow = jax.eval_shape(functools.partial(narrow_params, form=form, config=large), shapes)
        needed[form] = memory_needed(config, large, narrow)["parameters"]
    assert 1.98 < needed[None] / needed["int8", None] < 2
    assert 3.5 < needed[None] / needed["int4", 32] < 16 / 4.5


def narrow_params(params, form, config):
    """As `quantize_params`, without looking at values."""
    matrices = jax.tree.map(lambda traits: (narrow_matrix(traits),), param_traits(config))
    return jax.tree.map(lambda w, matrix: narrowed(w, *matrix, *form)[0] if matrix[0] else w, params, matrices)


def test_what_cannot_be_quantised():
    model = tiny_model()
    for args, message in [(("int3",), "kind is 'int3'; choose one of int8, int4, w8a8"),
                          (("int8", 64), "group is 64; of int8 it is one of None, 32, 128"),
                          (("w8a8", 32), "group is 32; of w8a8 it is one of None"),
                          (("int4", 32), r"blocks.0.feed_forward.w2 has 48 inputs, which groups of 32 do not divide")]:
        with pytest.raises(ValueError, match=message):
            lfm.quantize(model, *args)
    with pytest.raises(ValueError, match="w1 is quantised already"):
        lfm.quantize(lfm.quantize(model, "int8"), "int8")
    for bad in (np.nan, np.inf):
        model.blocks[1].operator.k_proj[...] = model.blocks[1].operator.k_proj[...].at[0, 0, 0].set(bad)
        with pytest.raises(ValueError, match=r"blocks.1.operator.k_proj has values that are not finite"):
            lfm.quantize(model, "w8a8")


def test_the_model_that_is_given_stays_as_it_was():
    model = tiny_model()
    before = jax.tree.map(np.array, params_of(model)[1])
    lfm.quantize(model, "int8")
    jax.tree.map(np.testing.assert_array_equal, params_of(model)[1], before)


@pytest.mark.parametrize(("kind", "group"), [("int4", 32), ("w8a8", None)])
def test_stacked_layers_checkpoints_and_files(kind, group, tmp_path):
    changes = dict(layer_types=("conv", "full_attention") * 2, ffn_size=64)
    config, (graphdef, params) = tiny_config(**changes), params_of(made(kind, group, **changes))
    stacked_graphdef, _ = abstract_model(config, stacked=True)
    stacked = stack_layers(params, config)
    tokens = tokens_like((2, 9), 0)
    run = jax.jit(lambda graphdef, params: nnx.merge(graphdef, params)(tokens)[0], static_argnums=0)
    # What is rounded differently in one layer may be rounded to another integer in the next.
    bound = 2e-2 if kind == "w8a8" else 1e-5
    assert rel_err(run(stacked_graphdef, stacked), run(graphdef, params)) < bound

    manager = CheckpointManager(tmp_path / "run", keep=1)
    manager.save(1, new_state(params, {}, optax.sgd(0.1)), {}, {})
    manager.close()
    reader = CheckpointManager(tmp_path / "run", keep=None)
    restored = reader.restore_params(jax.eval_shape(lambda: params))
    reader.close()
    jax.tree.map(np.testing.assert_array_equal, restored, params)

    lfm.save_hf(nnx.merge(graphdef, params), tmp_path / "hf")
    _, widened = params_of(lfm.load(tmp_path / "hf")[0])
    jax.tree.map(lambda w, x: np.testing.assert_array_equal(array(w), x), params, widened,
                 is_leaf=lambda w: isinstance(w, WeightKind))


def test_integers_are_multiplied_exactly_and_each_row_by_itself():
    w, _ = narrowed(drawn((24, 4, 16)), OUT_HEADS, "w8a8", None)
    x = drawn((5, 4, 16), seed=1)
    scale_M = np.abs(np.asarray(x)).max(axis=(1, 2)) / 127
    q = np.rint(np.asarray(x) / scale_M[:, None, None]).astype(np.int64)
    expected = q.reshape(5, 64) @ np.asarray(w.values, np.int64).T * (scale_M[:, None] * np.asarray(w.scales))
    run = jax.jit(lambda x: linear(x, w, inputs=2))
    assert rel_err(run(x), expected) < 1e-6
    assert 1e-4 < rel_err(run(x), linear(x, w.astype("float32"), inputs=2)) < 1e-2
    for i in range(5):
        np.testing.assert_array_equal(run(x[i : i + 1])[0], run(x)[i])
    np.testing.assert_array_equal(run(jnp.zeros_like(x)), 0)
    spoilt = run(x.at[2, 1, 3].set(jnp.nan))
    assert np.isnan(spoilt[2]).all()
    np.testing.assert_array_equal(spoilt[:2], run(x)[:2])
    _, pull = jax.vjp(run, x)
    _, pull_expected = jax.vjp(lambda x: linear(x, w.astype("float32"), inputs=2), x)
    dy = drawn((5, 24), seed=3)
    assert rel_err(*pull(dy), *pull_expected(dy)) < 1e-6


@pytest.mark.parametrize("form", ["int4:32", "w8a8"])
def test_a_directory_becomes_narrow_as_it_is_read(form, tmp_path):
    model = tiny_model(ffn_size=64)
    lfm.save_hf(model, tmp_path / "hf")
    kind, group = FORMS_BY_NAME[form]
    ours, theirs = (params_of(made) for made in (lfm.load(tmp_path / "hf", quantize=form)[0],
                                                 lfm.quantize(model, kind, group)))
    jax.tree.map(np.testing.assert_array_equal, ours[1], theirs[1])
    with pytest.raises(ValueError, match="quantize is 'int2'; choose one of int8, int8:32"):
        lfm.load(tmp_path / "hf", quantize="int2")
