"""Every implementation of attention against float64 numpy, forward and all gradients; blockwise at 32,768 tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference as plain
from helpers import batches, documents, long, rel_err
from hypothesis import given
from hypothesis import strategies as st
from tpu_aot import TOPOLOGIES, compile_for, requires_libtpu

from lfm_jax.kernels import reference
from lfm_jax.kernels.attention import attention

EVERYWHERE = ("xla", "direct", "blockwise")
"""What runs on any platform and takes any order."""
B, T, H = 2, 301, 8
"""Two blocks of `blockwise`, an odd number of tokens that fills neither them nor the lanes of a TPU."""


def make(B, T, S, N, K, H=H, seed=0):
    """q, k, v and a cotangent, standard normal."""
    rng = np.random.default_rng(seed)
    shapes = ((B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H))
    return tuple(rng.standard_normal(s, np.float32) for s in shapes)


def order(B, T, first=0):
    return np.arange(first, first + T, dtype=np.int32)[None].repeat(B, 0)


def expected(q, k, v, cotangent, **options):
    """Output and gradients by q, k and v of `sum(cotangent * out)` in float64."""
    out, gradients = reference.attention(q, k, v, **options)
    return out, *gradients(cotangent).values()


@functools.partial(jax.jit, static_argnames=("window", "impl"))
def run(q, k, v, cotangent, *, impl="auto", **options):
    """As `expected`."""
    attend = functools.partial(attention, impl=impl, interpret=impl == "splash", **options)
    out, pull = jax.vjp(attend, q, k, v)
    return out, *pull(cotangent.astype(out.dtype))


def assert_exact(actual, wanted):
    for a, b in zip(actual, wanted, strict=True):
        assert np.abs(np.asarray(a) - b).max() <= 2e-5 * (np.abs(b).max() or 1)


def documents_of(ids, key_ids=None):
    return dict(segment_ids_BT=ids, key_segment_ids_BS=ids if key_ids is None else key_ids)


def packed(B, T):
    """Row 0 one document, row 1 three and padding."""
    ids = np.ones((B, T), np.int32)
    ids[1] = np.repeat([1, 2, 3, 0], [T // 3, 1, T // 2, T - T // 3 - 1 - T // 2])
    return ids


@pytest.mark.parametrize("impl", [*EVERYWHERE, "splash"])
@pytest.mark.parametrize(("N", "K", "window"), [(4, 2, None), (4, 2, 100), (3, 3, 3), (4, 1, 1)])
def test_equals_float64_forward_and_gradient(N, K, window, impl):
    data = make(B, T, T, N, K)
    for ids in (np.ones((B, T), np.int32), packed(B, T)):
        options = documents_of(ids) | dict(window=window)
        assert_exact(run(*data, impl=impl, **options), expected(*data, **options))


@pytest.mark.parametrize("impl", [*EVERYWHERE, "splash", "auto"])
@pytest.mark.parametrize("T", [1, 11])
def test_short_rows_without_ids(T, impl):
    data = make(3, T, T, 4, 2)
    assert_exact(run(*data, impl=impl), expected(*data))


@given(ids=batches(B, T))
def test_documents_anywhere(ids):
    data = make(B, T, T, 4, 2, seed=1)
    for window in (None, 100):
        options = documents_of(ids) | dict(window=window)
        wanted = expected(*data, **options)
        for impl in ("blockwise", "splash"):
            assert_exact(run(*data, impl=impl, **options), wanted)


@pytest.mark.parametrize("impl", EVERYWHERE)
@pytest.mark.parametrize("T", [1, 270])
def test_a_cache_with_empty_slots(T, impl):
    """Two rows of 700 slots, filled to 150 and 30 before this call: slots after its tokens hold none."""
    S, first = 700, np.asarray([[150], [30]])
    data = make(2, T, S, 4, 2, seed=2)
    key_ids = (order(2, S) < first + T).astype(np.int32)
    key_ids[1, :20] = 0  # An earlier document.
    options = documents_of(np.ones((2, T), np.int32), key_ids) | dict(order_BT=first + order(1, T))
    assert_exact(run(*data, impl=impl, **options), expected(*data, **options))


@given(seed=st.integers(0, 99), window=st.sampled_from([None, 40]))
def test_a_rolling_buffer_and_keys_in_any_order(seed, window):
    """Row 0: token i in slot i modulo S, the oldest in the middle, some empty (negative). Row 1: a permutation."""
    rng = np.random.default_rng(seed)
    T, S = 40, 300
    data = make(2, T, S, 4, 2, seed=seed)
    end = rng.integers(T, 3 * S)
    held = end - 1 - (end - 1 - np.arange(S)) % S
    key_order = np.stack([held, rng.permutation(S)]).astype(np.int32)
    orders = np.stack([np.arange(end - T, end), rng.permutation(S)[:T]]).astype(np.int32)
    options = documents_of(np.ones((2, T), np.int32), (key_order >= 0).astype(np.int32))
    options |= dict(order_BT=orders, key_order_BS=key_order, window=window)
    wanted = expected(*data, **options)
    for impl in EVERYWHERE:
        assert_exact(run(*data, impl=impl, **options), wanted)


@pytest.mark.parametrize("impl", EVERYWHERE)
def test_a_query_that_sees_no_key_is_finite_and_moves_no_other(impl):
    """From `blockwise` it is zero and passes no gradient on, in a block with others or alone in it."""
    data = make(1, 40, 20, 4, 2)
    options = dict(order_BT=order(1, 40), key_order_BS=order(1, 20, first=10))
    result, wanted = run(*data, impl=impl, **options), expected(*data, **options)
    assert all(np.isfinite(x).all() for x in result)
    assert rel_err(result[0][:, 10:], wanted[0][:, 10:]) < 2e-5
    if impl == "blockwise":
        assert_exact(result, wanted)
        nobody = run(*data, impl=impl, **options | dict(order_BT=order(1, 40, first=-40)))
        assert not any(np.asarray(x).any() for x in nobody)


def test_blockwise_never_meets_a_block_that_no_query_sees():
    """A value that is not a number would spread even by the weight 0; blocks of it behind a window, in another
    document and in the future leave output and gradients as they are."""
    T, window = 1024, 100
    data = make(1, T, T, 2, 1)
    ids = np.repeat([1, 2], T // 2)[None].astype(np.int32)
    for options in (dict(window=window), documents_of(ids)):
        q, k, v, cotangent = data
        clean = run(*data, impl="blockwise", **options)
        v = v.copy()
        v[:, : T // 4] = np.nan
        cotangent = cotangent.copy()
        cotangent[:, : 3 * T // 4] = 0
        spoilt = run(q, k, v, cotangent, impl="blockwise", **options)
        np.testing.assert_array_equal(spoilt[0][:, 3 * T // 4 :], clean[0][:, 3 * T // 4 :])
        for x in spoilt[1:]:
            assert np.isfinite(x[:, T // 2 :]).all()
    future = data[2].copy()
    future[:, T // 2 :] = np.nan
    out = run(*data[:2], future, data[3], impl="blockwise")[0]
    assert np.isfinite(out[:, : T // 2]).all()
    assert np.isnan(out[:, T // 2 :]).all()


@pytest.mark.parametrize("case", ["window", long("causal"), long("documents")])
def test_blockwise_at_32768_tokens(case):
    """Queries are sampled: the cotangent is zero elsewhere, so that these few decide all of the gradients.

    In `make test-long` rows in which a query sees most of the keys.
    """
    T, window = 32768, 1000 if case == "window" else None
    q, k, v, cotangent = make(1, T, T, 2, 1)
    ids = np.ones((1, T), np.int32)
    if case == "documents":
        ids = np.searchsorted([5000, 5001, 17000, 30000], np.arange(T), side="right").astype(np.int32)[None]
    sample = np.sort(np.random.default_rng(0).choice(T, 40, replace=False)).astype(np.int32)
    wanted = expected(q[:, sample], k, v, cotangent[:, sample], **documents_of(ids[:, sample], ids),
                      order_BT=sample[None], window=window)
    if case == "causal":  # The gradient would take half a minute more.
        out = jax.jit(functools.partial(attention, impl="blockwise"))(q, k, v)
        assert rel_err(out[:, sample], wanted[0]) < 2e-5
        return
    only = np.zeros_like(cotangent)
    only[:, sample] = cotangent[:, sample]
    result = [np.asarray(x) for x in run(q, k, v, only, impl="blockwise", window=window, **documents_of(ids))]
    assert_exact((result[0][:, sample], result[1][:, sample], *result[2:]), wanted)
    assert not np.delete(result[1], sample, axis=1).any()


def temp_bytes(f, *shapes, **options):
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(functools.partial(f, **options)).lower(*shapes).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("impl", ["blockwise", "auto"])
def test_at_32768_tokens_memory_stays_under_four_copies_of_q_k_and_v(impl):
    """The scores alone would be 16 GiB."""
    shapes = [(1, 32768, n, 64) for n in (4, 2, 2)]
    copy = 4 * sum(np.prod(shape) for shape in shapes)
    assert temp_bytes(attention, *shapes, impl=impl) < 4 * copy
    assert temp_bytes(run, *shapes, shapes[0], impl=impl) < 4 * copy


def test_decoding_does_not_copy_keys_and_values():
    """One query to 4096 slots; products with heads first would copy both."""
    q, k = (8, 1, 16, 64), (8, 4096, 8, 64)
    copy = 4 * np.prod(k)
    assert temp_bytes(attention, q, k, k) < copy / 4
    assert temp_bytes(attention, q, k, k, impl="xla") > copy


@pytest.mark.parametrize("impl", [*EVERYWHERE, "splash"])
def test_bfloat16_is_close_and_stays_bfloat16(impl):
    half = [jnp.asarray(x, jnp.bfloat16) for x in make(B, 40, 40, 4, 2)]
    wanted = expected(*(np.asarray(x) for x in half))
    for a, b in zip(run(*half, impl=impl), wanted, strict=True):
        assert a.dtype == jnp.bfloat16
        assert rel_err(a, b) < 0.01


@pytest.mark.parametrize("impl", [*EVERYWHERE, "splash"])
def test_softmax_is_float32_in_bfloat16(impl):
    """Scores of 60 differ by less than a bfloat16 step of 0.25; a bfloat16 softmax could not tell them apart."""
    q = np.full((1, 2, 1, 4), 5.5, np.float32)
    k = np.stack([np.full((1, 4), 5.5), np.full((1, 4), 5.53125)])[None].astype(np.float32)
    v = np.asarray([0.0, 1.0], np.float32)[None, :, None, None].repeat(4, -1)
    half = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v, q)]
    out = run(*half, impl=impl)[0]
    exact = plain.attention(q[0].astype(float), k[0].astype(float), v[0].astype(float))
    np.testing.assert_allclose(np.asarray(out[0], np.float32), exact, atol=0.01)


def test_the_reference_is_a_plain_loop_and_its_gradient_the_numerical_one():
    T = 12
    data = [x.astype(np.float64) for x in make(1, T, T, 4, 2)]
    ids = np.repeat([1, 2, 0], [5, 4, 3])[None]
    out, *grads = expected(*data, **documents_of(ids))
    for where in documents(ids[0]):
        np.testing.assert_allclose(out[0, where], plain.attention(*(x[0, where] for x in data[:3])), atol=1e-12)
    rng = np.random.default_rng(0)
    for i, gradient in enumerate(grads):
        direction = rng.standard_normal(gradient.shape)
        values = []
        for sign in (1, -1):
            moved = list(data)
            moved[i] = data[i] + sign * 1e-5 * direction
            values.append(np.sum(data[3] * expected(*moved, **documents_of(ids))[0]))
        np.testing.assert_allclose(np.sum(gradient * direction), (values[0] - values[1]) / 2e-5, rtol=1e-6)


@requires_libtpu
@pytest.mark.parametrize(("chip", "dtype", "window"), [
    ("v5e", jnp.bfloat16, None), ("v5p", jnp.bfloat16, 256), ("v6e", jnp.float32, 256)])
def test_splash_compiles_for_tpu(chip, dtype, window):
    """Heads of LFM2: a width of 64, half of the lanes. Three kernels: forward, gradient by q, gradient by k and v."""
    q, k = (jax.ShapeDtypeStruct((2, 4000, n, 64), dtype) for n in (16, 8))
    ids = jax.ShapeDtypeStruct((2, 4000), jnp.int32)

    def train(q, k, v, cotangent, ids):
        out, pull = jax.vjp(functools.partial(attention, impl="splash", window=window, **documents_of(ids)), q, k, v)
        return out, pull(cotangent)

    with jax.default_matmul_precision("default"):  # Mosaic multiplies bfloat16 in one way only.
        compiled = compile_for(TOPOLOGIES[chip], train, q, k, k, q, ids)
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 3


def call(**changes):
    q, k, v, _ = make(2, 8, 8, 4, 2)
    return attention(**dict(q_BTNH=q, k_BSKH=k, v_BSKH=v) | changes)


IDS = documents_of(np.ones((2, 8), np.int32))
HALF = {name: jnp.ones((2, 8, n, H), jnp.bfloat16) for name, n in (("q_BTNH", 4), ("k_BSKH", 2), ("v_BSKH", 2))}
LONGER = {name: jnp.ones((2, 9, 2, H)) for name in ("k_BSKH", "v_BSKH")}
SEVEN = dict(q_BTNH=HALF["q_BTNH"][:, :7])
ODD = {name: x[..., :6] for name, x in HALF.items()}


@pytest.mark.parametrize(("changes", "match"), [
    (dict(impl="flash"), "impl is 'flash'; choose one of auto, xla, direct, blockwise, splash, cudnn"),
    (dict(impl="xla", interpret=True), "interpret=True is for impl='splash'"),
    (dict(k_BSKH=np.ones((2, 8, 3, H), np.float32)), r"k_BSKH has shape .* a divisor of 4"),
    (dict(k_BSKH=np.ones((1, 8, 2, H), np.float32)), "k_BSKH has shape"),
    (dict(k_BSKH=np.ones((2, 8, H), np.float32)), "must have 4 axes"),
    (dict(v_BSKH=np.ones((2, 9, 2, H), np.float32)), "v_BSKH has shape"),
    (dict(v_BSKH=jnp.ones((2, 8, 2, H), jnp.bfloat16)), "cast them to one dtype"),
    (dict(order_BT=order(2, 7)), "order_BT has shape"),
    (dict(key_order_BS=order(1, 8)), "key_order_BS has shape"),
    (dict(IDS, key_segment_ids_BS=None), "give both or neither"),
    (dict(window=0), "window is 0"),
    (dict(impl="splash", order_BT=order(2, 8)), "self-attention of whole rows only"),
    (dict(impl="splash", key_order_BS=order(2, 8)), "self-attention of whole rows only"),
    (dict(LONGER, impl="splash"), "T = 8, S = 9"),
    (dict(HALF | SEVEN, impl="cudnn"), "takes even numbers of queries and of key slots, not 7 and 8"),
    (dict(impl="cudnn"), "bfloat16 or float16, not float32"),
    (dict(ODD, impl="cudnn"), "head widths that are multiples of 8 up to 128, not 6"),
    (dict(HALF, impl="cudnn"), "needs an NVIDIA GPU of Ampere or later; this is cpu"),
])
def test_what_cannot_be_done_is_refused(changes, match):
    with pytest.raises(ValueError, match=match):
        call(**changes)
