"""The implementations in plain JAX against float64 numpy, token by token: forward and every gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import long, rel_err
from hypothesis import given
from hypothesis import strategies as st

from lfm_jax.kernels import linear_scan as module
from lfm_jax.kernels import reference
from lfm_jax.kernels.linear_scan import linear_scan

IMPLS = ("sequential", "associative", "chunked")
NAMES = ("a_BTD", "b_BTD", "h0_BD")
SHAPES = [(2, 1, 5), (3, 83, 5), long((3, 7, 3)), long((2, 16, 4))]
each_impl = pytest.mark.parametrize("impl", IMPLS)


def arrays(B, T, D, seed=0):
    """a, b, h0 and cotangents of h and last. Some a exactly 0, some next to it, most next to 1."""
    rng = np.random.default_rng(seed)
    a = rng.choice([0.0, 1e-30, 1e-4, 0.5, 0.9999, 1.0], (B, T, D), p=[0.01, 0.01, 0.01, 0.17, 0.6, 0.2])
    b, h0, dh, dlast = (rng.standard_normal(s) for s in ((B, T, D), (B, D), (B, T, D), (B, D)))
    return tuple(x.astype(np.float32) for x in (a, b, h0, dh, dlast))


def documents(B, T, seed=0):
    """Aligned rows: row 0 documents of a few tokens each, row 1 two and padding, row 2 nothing but padding."""
    rng = np.random.default_rng(seed)
    many = np.repeat(np.arange(T) % 2 + 1, rng.integers(1, 6, T))[:T]
    few = np.repeat([4, 9, 0], [T // 3, T // 4, T - T // 3 - T // 4])
    return np.stack([many, few, np.zeros(T)][:B]).astype(np.int32)


@functools.partial(jax.jit, static_argnames="impl")
def values_and_gradients(a, b, h0, dh, dlast, ids, impl):
    values, pull = jax.vjp(lambda a, b, h0: linear_scan(a, b, h0, ids, impl=impl), a, b, h0)
    return values, pull((dh, dlast))


forward = jax.jit(linear_scan, static_argnames="impl")


def assert_is_reference(args, ids, impl):
    """To 2e-5 of each array's largest value. Padding gets no cotangent, and h means nothing there."""
    a, b, h0, dh, dlast = args
    real = np.ones(b.shape[:2], bool) if ids is None else ids != 0
    dh = np.where(real[:, :, None], dh, 0)
    (h, last), gradients = reference.linear_scan(a, b, h0, ids)
    expected = gradients(dh, dlast)
    (my_h, my_last), mine = values_and_gradients(a, b, h0, dh, dlast, ids, impl)
    pairs = dict(h=(np.asarray(my_h)[real], h[real]), last=(my_last, last))
    pairs |= {name: (x, expected[name]) for name, x in zip(NAMES, mine, strict=True)}
    for name, (x, y) in pairs.items():
        assert np.abs(x - y).max(initial=0) <= 2e-5 * np.abs(y).max(initial=0), name


@each_impl
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_equal_numpy(shape, packed, impl):
    """One token, and chunks with a rest; in `make test-long` less than a chunk, and whole chunks."""
    assert_is_reference(arrays(*shape), documents(*shape[:2]) if packed else None, impl)


@pytest.mark.parametrize("impl", ["chunked", long("sequential"), long("associative")])
def test_32768_tokens(impl):
    """Two levels of chunks. Products of a underflow, or their rounding adds up if the same 0.9999 is in all of them.

    In `make test-long` what only short rows or other devices take.
    """
    B, T, D = 2, 32768, 3
    a, *rest = arrays(B, T, D)
    a[:, :, 0], a[:, :, 1] = 0.9999, 0.5
    ids = documents(B, T)
    ids[1] = 1
    assert_is_reference((a, *rest), ids, impl)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cpu_loop", [0, 2])
def test_chunks_of_chunks(monkeypatch, cpu_loop, reverse):
    """With no loop at all (as on GPU and TPU), and with one over the topmost summaries."""
    monkeypatch.setattr(module, "CPU_LOOP", cpu_loop)
    for T in (64, 8 * 8 * 3 + 8 * 5 + 7):
        a, b, h0, _, _ = arrays(2, T, 3)
        flip = (lambda x: x[:, ::-1]) if reverse else (lambda x: x)
        (expected, expected_last), _ = reference.linear_scan(flip(a), flip(b), h0)
        h, last = jax.jit(functools.partial(module.IMPLS["chunked"], reverse=reverse, interpret=False))(a, b, h0)
        assert rel_err(flip(h), expected) < 2e-5
        assert rel_err(last, expected_last) < 2e-5


@each_impl
@pytest.mark.parametrize("reverse", [False, True])
def test_right_after_a_far_larger_past_is_forgotten(impl, reverse):
    """What a small a leaves of it must keep its digits: errors count against the values after, not the past."""
    B, T, D = 1, 8 * 16, 64
    rng = np.random.default_rng(0)
    a = rng.choice([0.9, 0.999, 0.5], (B, T, D)).astype(np.float32)
    b = rng.standard_normal((B, T, D)).astype(np.float32)
    b[:, : T // 2] *= 1e4
    a[:, T // 2] = 1e-5
    flip = (lambda x: x[:, ::-1]) if reverse else (lambda x: x)
    h0 = np.zeros((B, D), np.float32)
    (expected, _), _ = reference.linear_scan(a, b, h0)
    scan = jax.jit(functools.partial(module.IMPLS[impl], reverse=reverse, interpret=False))
    h, _ = scan(flip(a), flip(b), h0)
    assert rel_err(flip(np.asarray(h))[:, T // 2 :], expected[:, T // 2 :]) < 2e-6


@each_impl
def test_raw_scans_run_backwards_and_keep_the_dtype_of_b(impl):
    a, b, h0, _, _ = arrays(2, 21, 3)
    (expected, expected_last), _ = reference.linear_scan(a[:, ::-1], b[:, ::-1], h0)
    scan = jax.jit(functools.partial(module.IMPLS[impl], reverse=True, interpret=False))
    h, last = scan(a, b, h0)
    assert rel_err(h[:, ::-1], expected) < 2e-5
    assert rel_err(last, expected_last) < 2e-5
    h, last = scan(a, b.astype(jnp.bfloat16), h0)
    assert (h.dtype, last.dtype) == (jnp.bfloat16, jnp.float32)


T_DRAWN = 27


@st.composite
def aligned_rows(draw):
    """Any lengths of documents, neighbours with different ids, then padding."""
    lengths = draw(st.lists(st.integers(1, T_DRAWN), max_size=6))
    ids = np.repeat(np.arange(len(lengths)) % 2 + 1, lengths)[:T_DRAWN]
    return np.pad(ids, (0, T_DRAWN - len(ids)))


@given(rows=st.lists(aligned_rows(), min_size=2, max_size=2), seed=st.integers(0, 2**16))
def test_any_layout_of_documents(rows, seed):
    ids = np.stack(rows).astype(np.int32)
    for impl in IMPLS:
        assert_is_reference(arrays(2, T_DRAWN, 4, seed), ids, impl)


@given(layout=aligned_rows(), cut=st.sampled_from([1, 11]))
def test_in_two_pieces_is_in_one(layout, cut):
    """The second piece starts from the last state of the first, unless a document starts with it."""
    ids = np.stack([layout, np.ones(T_DRAWN)]).astype(np.int32)
    a, b, h0, dh, dlast = arrays(2, T_DRAWN, 4)
    for impl in IMPLS:
        (h, last), _ = values_and_gradients(a, b, h0, dh, dlast, ids, impl)
        first, state = forward(a[:, :cut], b[:, :cut], h0, ids[:, :cut], impl=impl)
        starts = (ids[:, cut] != ids[:, cut - 1]) & (ids[:, cut] != 0)
        state = np.where(starts[:, None], 0, state)
        second, end = forward(a[:, cut:], b[:, cut:], state, ids[:, cut:], impl=impl)
        real = ids != 0
        np.testing.assert_allclose(np.concatenate([first, second], 1)[real], np.asarray(h)[real], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(end, last, rtol=1e-5, atol=1e-5)


@each_impl
def test_no_state_and_no_documents_are_zeros_and_one_document(impl):
    a, b, h0, _, _ = arrays(2, 19, 3)
    plain = forward(a, b, impl=impl)
    for mine, theirs in zip(plain, forward(a, b, 0 * h0, np.full((2, 19), 3, np.int32), impl=impl), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-6, atol=1e-6)


@each_impl
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nothing_of_a_document_reaches_another_even_if_it_is_nan(impl, bad):
    """Forward the next one, backward the one before; and padding reaches nobody."""
    ids = np.asarray([[1] * 5 + [2] * 9 + [3] * 13 + [0] * 4], np.int32)
    a, b, h0, dh, dlast = arrays(1, 31, 3)
    dh[ids == 0] = 0
    good_values, good = values_and_gradients(a, b, h0, dh, dlast, ids, impl)
    for poisoned in (2, 0):
        where = (ids == poisoned)[:, :, None]
        a2, b2 = np.where(where, bad, a), np.where(where, bad, b)
        dh2 = np.where(where, np.nan, dh)
        values, mine = values_and_gradients(a2, b2, h0, dh2, dlast, ids, impl)
        others = (ids != poisoned) & (ids != 0)
        np.testing.assert_array_equal(values[0][others], good_values[0][others])
        np.testing.assert_array_equal(values[1], good_values[1])
        np.testing.assert_array_equal(mine[2], good[2])
        for x, y in zip(mine[:2], good[:2], strict=True):
            np.testing.assert_array_equal(x[others], y[others])
            assert not np.asarray(x)[ids == 0].any()


@each_impl
def test_a_of_zero_forgets_nan(impl):
    a, b, h0, _, _ = arrays(1, 30, 2)
    a[:, 11], b[:, 3] = 0, np.nan
    h, last = forward(a, b, h0, impl=impl)
    assert np.isnan(h[:, 3:11]).any()
    assert np.isfinite(h[:, 11:]).all()
    assert np.isfinite(last).all()


@each_impl
def test_bfloat16_in_and_out_is_float32_inside(impl):
    """Adding 1 to 256 rounds back to 256 in bfloat16."""
    ones = jnp.ones((1, 300, 2), jnp.bfloat16)
    h, last = forward(ones, ones, impl=impl)
    assert (h.dtype, last.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_array_equal(last, 300)
    args = [jnp.asarray(x, jnp.bfloat16) for x in arrays(2, 40, 3)]
    args[2], args[4] = args[2].astype(jnp.float32), args[4].astype(jnp.float32)
    ids = documents(2, 40)
    (_, mine), wide = (values_and_gradients(*xs, ids, impl) for xs in (args, [x.astype(jnp.float32) for x in args]))
    assert [x.dtype for x in mine] == [jnp.bfloat16, jnp.bfloat16, jnp.float32]
    for x, y in zip(mine, wide[1], strict=True):
        assert rel_err(np.asarray(x, np.float32), np.asarray(y)) < 0.02


@each_impl
def test_the_derivative_keeps_a_and_h_alone(impl):
    a, b, h0, _, _ = arrays(2, 24, 3)
    for ids in (None, documents(2, 24)):
        (h, _), pull = jax.vjp(lambda a, b, h0, ids=ids: linear_scan(a, b, h0, ids, impl=impl), a, b, h0)
        kept = [x for x in jax.tree.leaves(pull) if np.size(x) > 2 * 24]
        assert len(kept) == 2
        for x in kept:
            assert any(np.array_equal(x, y) for y in (a, h))


@pytest.mark.parametrize("packed", [False, True])
def test_long_rows_want_little_memory_beside_inputs_and_outputs(packed):
    """With 32,765 tokens, which is no multiple of anything: in copies of b, forward and with the gradient."""
    B, T, D = 1, 32765, 1024
    array, state = jax.ShapeDtypeStruct((B, T, D), np.float32), jax.ShapeDtypeStruct((B, D), np.float32)
    ids = jax.ShapeDtypeStruct((B, T), np.int32) if packed else None

    def gradient(a, b, h0, ids, dh, dlast):
        values, pull = jax.vjp(lambda a, b, h0: linear_scan(a, b, h0, ids), a, b, h0)
        return values, pull((dh, dlast))

    inputs = (array, array, state, ids)
    for fn, args in ((linear_scan, inputs), (gradient, (*inputs, array, state))):
        memory = jax.jit(fn).lower(*args).compile().memory_analysis()
        assert memory.temp_size_in_bytes < 0.6 * 4 * B * T * D


@pytest.mark.parametrize(("T", "impl"), [(1, "sequential"), (1023, "sequential"), (1024, "chunked"), (4096, "chunked")])
def test_auto_on_a_cpu_loops_over_few_tokens_and_takes_chunks_of_many(T, impl):
    array = jax.ShapeDtypeStruct((1, T, 1024), np.float32)
    lowered = [jax.jit(functools.partial(linear_scan, impl=name)).lower(array, array) for name in ("auto", impl)]
    assert lowered[0].as_text() == lowered[1].as_text()


@pytest.mark.parametrize(
    ("change", "match"),
    [(dict(impl="fft"), "impl is 'fft'; choose one of auto, sequential, associative, chunked, pallas_tpu, pallas_gpu"),
     (dict(interpret=True, impl="chunked"), "interpret is for pallas_tpu and pallas_gpu; leave it out"),
     (dict(a_BTD=np.ones((2, 4, 1), np.float32)), "a_BTD has shape"),
     (dict(h0_BD=np.ones((2, 4), np.float32)), "h0_BD has shape"),
     (dict(segment_ids_BT=np.ones((2, 3), np.int32)), "segment_ids_BT has shape"),
     (dict(a_BTD=np.ones((2, 0, 3)), b_BTD=np.ones((2, 0, 3))), "at least one token"),
     (dict(axis="context"), "axis is 'context', which is no mesh axis here")],
)
def test_wrong_arguments_are_named(change, match):
    a, b, _, _, _ = arrays(2, 4, 3)
    with pytest.raises(ValueError, match=match):
        linear_scan(**dict(a_BTD=a, b_BTD=b) | change)
