"""Every plain-JAX implementation against float64 numpy: gates, bias, history, documents, forward and gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference as network_reference
from helpers import documents, long, rel_err
from hypothesis import given
from hypothesis import strategies as st

from lfm_jax.kernels import reference, shifted_conv
from lfm_jax.kernels.causal_conv import causal_conv

D = 5
IMPLS = ("lax", "shifted", "associative")
ARRAYS = ("y_BTD", "w_WD", "tail_BVD", "gate_in_BTD", "gate_out_BTD", "bias_D")
BOUND = 2e-5


def make(B, T, W, D=D, seed=0, leave_out=()):
    """(arrays by argument name, cotangent of z)."""
    rng = np.random.default_rng(seed)
    shapes = [(B, T, D), (W, D), (B, W - 1, D), (B, T, D), (B, T, D), (D,)]
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in zip(ARRAYS, shapes, strict=True)}
    return {k: v for k, v in arrays.items() if k not in leave_out}, rng.standard_normal((B, T, D)).astype(np.float32)


def segments(B, T):
    """Row 0 one document, row 1 documents of 1, 2, 3, ... tokens, row 2 a document and padding, row 3 padding."""
    steps = np.repeat(np.arange(1, T + 2), np.arange(1, T + 2))[:T]
    rows = [np.ones(T), steps, np.where(np.arange(T) < T // 2, 1, 0), np.zeros(T)]
    return np.stack(rows[:B]).astype(np.int32)


@functools.partial(jax.jit, static_argnames="impl")
def run(arrays, segment_ids, dz, impl="auto"):
    """z and the gradient of `sum(dz * z)` by every array."""
    z, vjp = jax.vjp(lambda arrays: causal_conv(**arrays, segment_ids_BT=segment_ids, impl=impl), arrays)
    return z, vjp(dz)[0]


def check(arrays, segment_ids, dz, impls=IMPLS):
    """Outputs at padding mean nothing: there the cotangent is zero, and the values are not compared."""
    real = np.ones(dz.shape[:2], bool) if segment_ids is None else segment_ids != 0
    dz = dz * real[:, :, None]
    expected, gradients = reference.causal_conv(**arrays, segment_ids_BT=segment_ids)
    by = gradients(dz)
    for impl in impls:
        z, grads = run(arrays, segment_ids, dz, impl)
        if real.any():
            assert rel_err(np.asarray(z)[real], expected[real]) < BOUND, impl
        for name in arrays:
            scale = np.abs(by[name]).max(initial=0)
            assert np.abs(grads[name] - by[name]).max(initial=0) <= BOUND * scale, (impl, name)


@pytest.mark.parametrize("segment_ids", [None, segments(4, 13)], ids=["one document", "packed"])
def test_the_numpy_reference_is_the_convolution_document_by_document(segment_ids):
    arrays, _ = make(4, 13, 3)
    y, w, tail, gate_in, gate_out, bias = (arrays[name].astype(np.float64) for name in ARRAYS)
    z, _ = reference.causal_conv(**arrays, segment_ids_BT=segment_ids)
    for row in range(4):
        groups = [list(range(13))] if segment_ids is None else documents(segment_ids[row])
        for i, where in enumerate(groups):
            history = tail[row] if i == 0 else np.zeros((0, D))
            u = np.concatenate([history, gate_in[row, where] * y[row, where]])
            conv = network_reference.causal_conv(u, w)[len(history) :]
            np.testing.assert_allclose(z[row, where], gate_out[row, where] * (conv + bias), atol=1e-12)


def test_the_numpy_gradient_is_the_difference_quotient():
    arrays, dz = make(2, 6, 3, seed=1)
    segment_ids = np.asarray([[1, 1, 2, 2, 2, 3], [1, 1, 1, 1, 0, 0]], np.int32)
    arrays = {name: x.astype(np.float64) for name, x in arrays.items()}
    by = reference.causal_conv(**arrays, segment_ids_BT=segment_ids)[1](dz)
    rng = np.random.default_rng(0)
    for name, x in arrays.items():
        direction = rng.standard_normal(x.shape)
        plus, minus = (
            np.sum(dz * reference.causal_conv(**arrays | {name: x + step * direction}, segment_ids_BT=segment_ids)[0])
            for step in (1e-3, -1e-3)
        )
        np.testing.assert_allclose(np.sum(by[name] * direction), (plus - minus) / 2e-3, rtol=1e-8)


@pytest.mark.parametrize(("W", "T"), [(1, 5), (2, 1), (3, 2), (4, 13), (7, 4), (7, 13)])
@pytest.mark.parametrize("packed", [False, True], ids=["one document", "packed"])
def test_all_taps_and_lengths_equal_numpy_forward_and_gradient(W, T, packed):
    """T = 1, T < W and idle rows included."""
    arrays, dz = make(4, T, W)
    check(arrays, segments(4, T) if packed else None, dz)


@pytest.mark.parametrize(
    "leave_out",
    [("gate_in_BTD",), ("gate_out_BTD",), ("bias_D",), ("gate_in_BTD", "gate_out_BTD", "bias_D")],
    ids=["output gate", "input gate", "no bias", "plain"],
)
def test_gates_and_bias_are_each_optional(leave_out):
    arrays, dz = make(4, 13, 3, leave_out=leave_out)
    check(arrays, segments(4, 13), dz)


@pytest.mark.parametrize("impl", IMPLS)
def test_no_history_is_a_history_of_zeros(impl):
    arrays, dz = make(3, 13, 3, leave_out=("tail_BVD",))
    zeros = arrays | {"tail_BVD": np.zeros((3, 2, D), np.float32)}
    segment_ids = segments(3, 13)
    (z, by), (z0, by0) = run(arrays, segment_ids, dz, impl), run(zeros, segment_ids, dz, impl)
    np.testing.assert_array_equal(z, z0)
    assert all(np.array_equal(by[name], by0[name]) for name in by)


DOCUMENTS = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 2)), min_size=1, max_size=40)


@given(st.lists(DOCUMENTS, min_size=3, max_size=3), st.integers(0, 9))
def test_any_layout_of_documents_equals_numpy(rows, seed):
    """Documents of any lengths and neighbouring ids that differ, padding at the right end only."""
    T = 150  # More than two blocks of the sums over time.
    segment_ids = np.zeros((3, T), np.int32)
    for b, runs in enumerate(rows):
        ids, lengths = np.cumsum([step for _, step in runs]), [length for length, _ in runs]
        row = np.repeat(ids, lengths)[:T]
        segment_ids[b, : len(row)] = row
    arrays, dz = make(3, T, 4, seed=seed)
    check(arrays, segment_ids, dz, ("shifted", "associative"))


@pytest.mark.parametrize(("T", "W"), [(shifted_conv.BLOCK * 2 + 2, 3), (shifted_conv.BLOCK * 3 + 5, 1), (200, 7)])
def test_sums_over_blocks_of_time_leave_out_no_row(T, W):
    """The first length is the shortest that goes by blocks, without a rest; the others leave one."""
    arrays, dz = make(2, T, W, D=130)
    check(arrays, None, dz, ("shifted",))
    # A change of one row shows in the gradients, each row alone: sums of ones count the rows.
    ones = {name: np.ones_like(x) for name, x in arrays.items()}
    by = run(ones, None, np.ones_like(dz), "shifted")[1]
    assert (np.asarray(by["w_WD"]) == 2 * T).all()
    assert (np.asarray(by["bias_D"]) == 2 * T).all()


@pytest.mark.parametrize("impl", ["shifted", long("lax")])
def test_accuracy_holds_at_32768_tokens(impl):
    """In `make test-long` that of XLA's own convolution too."""
    T = 32768
    arrays, dz = make(1, T, 3, D=3)
    segment_ids = np.sort(np.random.default_rng(2).integers(1, 40, (1, T)), axis=1).astype(np.int32)
    check(arrays, segment_ids, dz, (impl,))
    # Summands of one sign are the hard case for sums of float32.
    arrays = {name: np.abs(x) for name, x in arrays.items()}
    check(arrays, None, np.abs(dz), (impl,))


@pytest.mark.parametrize("impl", IMPLS)
def test_documents_neither_see_nor_move_one_another(impl):
    """What a document holds, NaN included, reaches no value and no gradient of another one."""
    arrays, dz = make(1, 8, 4)
    segment_ids = np.asarray([[1, 1, 1, 2, 2, 2, 2, 2]], np.int32)
    z, _ = run(arrays, segment_ids, dz, impl)
    for name in ("y_BTD", "gate_in_BTD", "gate_out_BTD"):
        broken = arrays | {name: arrays[name].copy()}
        broken[name][:, :3] = np.nan
        np.testing.assert_array_equal(run(broken, segment_ids, dz, impl)[0][:, 3:], z[:, 3:])
    z_bad, by = run(arrays | {"tail_BVD": np.full((1, 3, D), np.nan, np.float32)}, segment_ids, dz, impl)
    np.testing.assert_array_equal(z_bad[:, 3:], z[:, 3:])

    dz_second = dz.copy()
    dz_second[:, :3] = 0
    _, by = run(arrays, segment_ids, dz_second, impl)
    for name in ("y_BTD", "gate_in_BTD", "gate_out_BTD"):
        assert not by[name][:, :3].any(), name
        assert by[name][:, 3:].any(), name
    assert not by["tail_BVD"].any()

    dz_broken = dz.copy()
    dz_broken[:, 3:] = np.nan  # The second document's gradient stays in it: exact zeros would not show this.
    _, by = run(arrays, segment_ids, dz_broken, impl)
    for name in ("y_BTD", "gate_in_BTD", "gate_out_BTD"):
        assert np.isfinite(by[name][:, :3]).all(), name


def test_auto_is_shifted_on_cpu():
    arrays, dz = make(2, 9, 3)
    z, by = run(arrays, None, dz)
    z_shifted, by_shifted = run(arrays, None, dz, "shifted")
    np.testing.assert_array_equal(z, z_shifted)
    assert all(np.array_equal(by[name], by_shifted[name]) for name in by)


@pytest.mark.parametrize("impl", IMPLS)
def test_bfloat16_is_rounded_once_and_summed_in_float32(impl):
    """Each result is what float32 gives on the same inputs, rounded; sums kept in bfloat16 would be far off."""
    arrays, dz = make(2, 300, 3)
    halves = {name: jnp.asarray(x, jnp.bfloat16) for name, x in arrays.items()}
    z, by = run(halves, None, jnp.asarray(dz, jnp.bfloat16), impl)
    wide = {name: np.asarray(x, np.float32) for name, x in halves.items()}
    expected, gradients = reference.causal_conv(**wide)
    expected_by = gradients(np.asarray(jnp.asarray(dz, jnp.bfloat16), np.float32))
    assert z.dtype == jnp.bfloat16
    assert rel_err(np.asarray(z, np.float32), expected) < 4e-3
    for name, x in by.items():
        assert x.dtype == jnp.bfloat16
        assert rel_err(np.asarray(x, np.float32), expected_by[name]) < 4e-3, name


def test_each_gradient_has_the_dtype_of_its_argument():
    arrays, dz = make(2, 9, 3)
    arrays = {name: jnp.asarray(x, jnp.bfloat16 if x.ndim == 3 else jnp.float32) for name, x in arrays.items()}
    z, by = run(arrays, None, jnp.asarray(dz, jnp.bfloat16), "shifted")
    assert z.dtype == jnp.bfloat16
    assert {name: x.dtype for name, x in by.items()} == {name: x.dtype for name, x in arrays.items()}


@pytest.mark.parametrize("packed", [False, True])
def test_shifted_takes_next_to_no_memory_of_its_own(packed):
    """Temporary bytes beside one copy of y: padding, products and shifted copies are never written."""
    B, T, D, W = 1, 4096, 128, 3
    arrays, dz = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, make(B, T, W, D)))
    segment_ids = jax.ShapeDtypeStruct((B, T), jnp.int32) if packed else None
    forward = jax.jit(lambda arrays, ids: causal_conv(**arrays, segment_ids_BT=ids, impl="shifted"))
    copy = 4 * B * T * D
    for compiled in (forward.lower(arrays, segment_ids), run.lower(arrays, segment_ids, dz, "shifted")):
        assert compiled.compile().memory_analysis().temp_size_in_bytes < 0.25 * copy


def test_shifted_keeps_only_its_inputs_for_the_backward_pass():
    arrays, _ = make(1, 300, 3)
    _, vjp = jax.vjp(lambda arrays: causal_conv(**arrays, impl="shifted"), arrays)
    kept = sum(np.asarray(x).nbytes for x in jax.tree.leaves(vjp))
    assert kept <= sum(x.nbytes for x in arrays.values())


def test_pallas_kernels_get_what_the_others_get():
    """The kernels themselves are tested in test_pallas_*.py."""
    arrays, _ = make(2, 9, 3)
    for impl in ("pallas_tpu", "pallas_gpu"):
        z = jax.jit(functools.partial(causal_conv, segment_ids_BT=segments(2, 9), impl=impl, interpret=True))(**arrays)
        assert rel_err(z, causal_conv(**arrays, segment_ids_BT=segments(2, 9), impl="shifted")) < BOUND


@pytest.mark.parametrize(
    ("change", "match"),
    [(dict(impl="fft"), "impl is 'fft'; choose one of auto, lax, shifted, associative, pallas_tpu, pallas_gpu"),
     (dict(interpret=True, impl="shifted"), "interpret is for pallas_tpu and pallas_gpu"),
     (dict(w_WD=np.ones((3, D + 1), np.float32)), "w_WD has shape"),
     (dict(w_WD=np.ones((0, D), np.float32)), "w_WD has shape"),
     (dict(tail_BVD=np.ones((2, 3, D), np.float32)), "tail has shape"),
     (dict(gate_in_BTD=np.ones((2, 4, 1), np.float32)), "gate_in_BTD has shape"),
     (dict(gate_out_BTD=np.ones((4, D), np.float32)), "gate_out_BTD has shape"),
     (dict(bias_D=np.ones((1, D), np.float32)), "bias_D has shape"),
     (dict(segment_ids_BT=np.ones((2, 3), np.int32)), "segment_ids_BT has shape")],
)
def test_wrong_arguments_are_named(change, match):
    arrays, _ = make(2, 4, 3)
    with pytest.raises(ValueError, match=match):
        causal_conv(**arrays | change)
