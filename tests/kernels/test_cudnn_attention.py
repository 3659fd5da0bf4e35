"""Attention by cuDNN: what it is asked for, with a stand-in that goes by addresses as it does, and its lowering for
CUDA. `lfm selfcheck` compares cuDNN itself with float64 on a GPU.

Dimensions: B batch, T time, N query heads, K key/value heads, H head width, X blocks of C tokens, R runs.
"""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from jax import ShapeDtypeStruct as Shape
from jax._src.cudnn import fused_attention_stablehlo

from lfm_jax.kernels import attention, cudnn_attention
from lfm_jax.kernels.cudnn_attention import attend_rows, levels, run_levels
from lfm_jax.sharding import AMPERE, HOPPER

T, N, K, H = 64, 2, 1, 4


@jax.custom_vjp
def written(q, k, v, seen, covered):
    """What no sequence covers is not written, in the result and in the gradient: NaN here."""
    return jnp.where(covered, by_xla(q, k, v, seen), jnp.nan)


def by_xla(q, k, v, seen):
    # Of a query that sees nothing every weight would be NaN.
    seen |= ~seen.any(-1, keepdims=True)
    return jax.nn.dot_product_attention(q[None], k[None], v[None], mask=seen[None, None], implementation="xla")[0]


def written_backward(args, dout):
    q, k, v, seen, covered = args
    _, pull = jax.vjp(lambda *qkv: by_xla(*qkv, seen), q, k, v)
    return *(jnp.where(covered, x, jnp.nan) for x in pull(jnp.where(covered, dout, 0))), None, None


written.defvjp(lambda *args: (written(*args), args), written_backward)


def sequences_attention(q_XCNH, k_XCKH, v_XCKH, start_XR, length_XR, window, causal):
    """A block's sequences begin in it and may end behind it."""
    X, C, *_ = q_XCNH.shape
    starts = jnp.where(start_XR < 0, X * C, start_XR + C * jnp.arange(X)[:, None])[:, :-1].reshape(-1)
    lengths = jnp.maximum(length_XR, 0).reshape(-1)
    at = jnp.arange(X * C)
    inside = (at[:, None] >= starts) & (at[:, None] < starts + lengths)
    sequence = jnp.where(inside.any(1), inside.argmax(1), -1)
    seen = sequence[:, None] == sequence
    if causal:
        seen &= at <= at[:, None]
    if window is not None:
        seen &= at > at[:, None] - window
    q, k, v = (x.reshape(X * C, *x.shape[2:]) for x in (q_XCNH, k_XCKH, v_XCKH))
    return written(q, k, v, seen, (sequence >= 0)[:, None, None]).reshape(q_XCNH.shape)


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    """Blocks of 64, 16 and 4 tokens; masks through XLA."""
    xla = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention",
                        lambda *args, **options: xla(*args, **options | {"implementation": "xla"}))
    monkeypatch.setattr(cudnn_attention, "_sequences_attention", sequences_attention)
    monkeypatch.setattr(cudnn_attention, "nvidia_capability", lambda: HOPPER)
    monkeypatch.setattr(cudnn_attention, "SHORT", 4)
    monkeypatch.setattr(cudnn_attention, "SHORT_RUNS", 2)


def ids_of(lengths, padding):
    """Rows of documents; a negative length is padding of that many tokens."""
    row = [document for document, n in enumerate(lengths, 1) for document in [0 if n < 0 else document] * abs(n)]
    row = (row + [len(lengths) + 1] * T)[: T - padding] + [0] * padding
    return np.array([row], np.int32)


rows = st.builds(ids_of, st.lists(st.integers(-20, 60).filter(bool), max_size=20), st.integers(0, 20))


def inputs(B, dtype=np.float32):
    rng = np.random.default_rng(0)
    return [rng.standard_normal((B, T, n, H)).astype(dtype) for n in (N, K, K, N)]


@partial(jax.jit, static_argnames=("attend", "window", "causal"))
def solve(attend, ids_BT, key_ids_BT, window, causal):
    """The output and the gradients by q, k and v, 0 at padding."""
    q, k, v, dout = inputs(len(ids_BT))
    real = (ids_BT != 0)[:, :, None, None]
    out, pull = jax.vjp(lambda *qkv: attend(*qkv, ids_BT, key_ids_BT, window, causal), q, k, v)
    return [jnp.where(real, x, 0) for x in (out, *pull(jnp.where(real, dout, 0)))]


def plain(q, k, v, ids_BT, key_ids_BT, window, causal):
    return attention.attention(q, k, v, segment_ids_BT=ids_BT, key_segment_ids_BS=key_ids_BT, window=window,
                               causal=causal, impl="blockwise")


def assert_equal(ids_BT, key_ids_BT, window=None, causal=True):
    found, expected = (solve(attend, ids_BT, key_ids_BT, window, causal) for attend in (attend_rows, plain))
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5)


def fit(ids_BT):
    return bool(run_levels(jnp.asarray(ids_BT), levels(T))[1])


@pytest.mark.parametrize(("window", "causal"), [(None, True), (5, True), (None, False)])
@given(rows, rows)
@example(ids_of([64], 0), ids_of([1] * 64, 0))
@example(ids_of([16, 16, 16, 15], 1), ids_of([-3, 17, 4, 40], 0))
def test_equals_plain_attention(window, causal, first, second):
    ids_BT = np.concatenate([first, second])
    assert_equal(ids_BT, ids_BT, window, causal)


@pytest.mark.parametrize(("ids_T", "fits"), [
    (np.repeat([1, 2], [60, 4]), True), (np.repeat([0, 1, 0, 2, 0], [10, 20, 2, 30, 2]), True),
    (np.repeat([2, 7, 9], [20, 24, 20]), True),
    (np.repeat([1, 2, 3, 4], [61, 1, 1, 1]), False),  # Three start in the last four tokens.
    (np.repeat([1, 0, 1], [20, 20, 24]), False), (np.repeat([2, 1], [20, 44]), False),  # Not one run, or not in order.
], ids=["two", "padding between", "any ids", "crowded", "in two runs", "falling"])
def test_only_packed_rows_are_sequences(ids_T, fits):
    ids_BT = ids_T[None].astype(np.int32)
    assert fit(ids_BT) == fits
    assert_equal(ids_BT, ids_BT)


def test_layers_that_are_scanned_and_computed_again():
    """The choice is made inside of a loop, and its derivative makes both branches again."""
    fitting, crowded = ids_of([20, 30], 4), ids_of([1] * 30, 4)

    def layers(attend, q, k, v, ids_BT, key_ids_BT, window, causal):
        layer = jax.checkpoint(lambda x, _: (x + attend(x, k, v, ids_BT, key_ids_BT, window, causal), None))
        return jax.lax.scan(layer, q, None, length=3)[0]

    for ids_BT in (fitting, crowded):
        found, expected = (
            solve(partial(layers, attend), ids_BT, ids_BT, None, True) for attend in (attend_rows, plain)
        )
        for x, y in zip(found, expected, strict=True):
            np.testing.assert_allclose(x, y, atol=5e-5)


def test_queries_and_keys_of_other_documents_take_a_mask():
    ids_BT = ids_of([30, 34], 0)
    assert_equal(ids_BT, np.where(np.arange(T) % 7 == 0, 0, ids_BT), causal=False)


@given(rows)
def test_few_documents_of_a_level_start_in_a_block(ids_BT):
    """So that what cuDNN is told beforehand, at most R of at most C tokens, holds."""
    level_BT = np.asarray(run_levels(jnp.asarray(ids_BT), levels(T))[0])
    starts_BT = np.diff(ids_BT, axis=1, prepend=-1) != 0
    for level, (C, R) in enumerate(levels(T)):
        mine_BT = level_BT == level
        lengths = np.diff(np.flatnonzero(np.diff(ids_BT[0], prepend=-1, append=-1)))
        levels_of = level_BT[0][np.flatnonzero(starts_BT[0])]
        assert (lengths[levels_of == level] <= C).all()
        if level < len(levels(T)) - 1 or fit(ids_BT):
            assert ((starts_BT & mine_BT).reshape(-1, C).sum(axis=1) <= R).all()


@pytest.mark.parametrize("tokens", [2048, 4096, 32_768])
def test_memory_for_the_derivative_is_that_of_few_copies(monkeypatch, tokens):
    """cuDNN takes sequences x longest x N H numbers twice: at most 8 times the tokens here."""
    monkeypatch.undo()
    assert all(R * C <= 8 * C and tokens % C == 0 for C, R in levels(tokens))
    assert levels(tokens)[0][0] == tokens
    assert levels(tokens)[-1][0] <= 512


def test_what_it_is_on_cuda(monkeypatch):
    """One form for the sequences of each level, one with a mask; JAX's function within it is not public."""
    monkeypatch.undo()
    monkeypatch.setattr(cudnn_attention, "nvidia_capability", lambda: HOPPER)
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91300)
    monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(fused_attention_stablehlo, "is_cuda_compute_capability_equal", lambda _: False)

    def train(q, k, v, ids_BT):
        loss = lambda q, k, v: jnp.sum(attend_rows(q, k, v, ids_BT, ids_BT, None, True).astype(jnp.float32))  # noqa: E731
        return jax.grad(loss, argnums=(0, 1, 2))(q, k, v)

    q, k = (Shape((2, 4096, n, 64), jnp.bfloat16) for n in (16, 8))
    lowered = jax.jit(train).trace(q, k, k, Shape((2, 4096), jnp.int32)).lower(lowering_platforms=("cuda",)).as_text()
    calls = [(name, int(runs)) for name, runs in re.findall(
        r"@__cudnn\$(\w+)\(.*?max_seg_per_batch\\22: (\d+)", lowered)]
    assert [call for call in calls if call[0] == "fmhaSoftmaxBackward"] == [
        ("fmhaSoftmaxBackward", R) for _, R in reversed(levels(4096))]
    assert ("fmhaScaleBiasSoftmaxBackward", 1) in calls


@pytest.mark.parametrize(("capability", "B", "T", "sequences"), [
    (HOPPER, 2, 64, 1), (AMPERE, 2, 64, 0), (HOPPER, 2, 63, 0), (HOPPER, 2**21, 64, 0),
])
def test_old_gpus_rows_that_do_not_divide_and_too_many_take_a_mask(monkeypatch, capability, B, T, sequences):
    """Too many: of 2^31 numbers of q an int32 cannot tell where a sequence begins."""
    monkeypatch.setattr(cudnn_attention, "nvidia_capability", lambda: capability)
    q, k = (Shape((B, T, n, 8), jnp.float32) for n in (2, 1))
    ids = Shape((B, T), jnp.int32)
    jaxpr = str(jax.make_jaxpr(partial(attend_rows, window=None, causal=True))(q, k, k, ids, ids))
    assert ("cond[" in jaxpr) == bool(sequences)
