"""Both implementations against plain float64 numpy, document by document, forward and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from helpers import documents, rel_err

from lfm_jax.kernels.causal_conv import causal_conv

D = 5
IMPLS = ("lax", "shifted")


def make(B, T, W, seed=0):
    rng = np.random.default_rng(seed)
    y, w, tail, cotangent = (rng.standard_normal(s).astype(np.float32)
                             for s in ((B, T, D), (W, D), (B, W - 1, D), (B, T, D)))
    return y, w, tail, cotangent


def segments(B, T):
    """Row 0 one document, row 1 documents of 1, 2, 3, ... tokens, row 2 a document and padding, row 3 padding."""
    steps = np.repeat(np.arange(1, T + 2), np.arange(1, T + 2))[:T]
    rows = [np.ones(T), steps, np.where(np.arange(T) < T // 2, 1, 0), np.zeros(T)]
    return np.stack(rows[:B]).astype(np.int32)


def expected(y, w, tail=None, segment_ids=None):
    """(values, mask of real tokens); the history belongs to each row's first document."""
    B, T, _ = y.shape
    W = len(w)
    tail = np.zeros((B, W - 1, D)) if tail is None else tail
    out, real = np.zeros((B, T, D)), np.zeros((B, T), bool)
    for row in range(B):
        groups = [list(range(T))] if segment_ids is None else documents(segment_ids[row])
        for i, where in enumerate(groups):
            history = tail[row] if i == 0 else np.zeros((0, D))
            z = reference.causal_conv(np.concatenate([history, y[row, where]]).astype(np.float64), w)
            out[row, where], real[row, where] = z[len(history) :], True
    return out, real


@jax.jit
def run(y, w, tail, segment_ids, weight):
    """By implementation: values and gradients of `sum(weight * z)` by y, w and tail."""
    def loss(inputs, impl):
        z = causal_conv(*inputs, segment_ids, impl=impl)
        return jnp.sum(weight * z), z

    grad = jax.grad(loss, has_aux=True)
    return {impl: grad((y, w, tail), impl) for impl in IMPLS}


@pytest.mark.parametrize(("W", "T"), [(1, 5), (2, 1), (3, 2), (3, 13), (7, 13)])
@pytest.mark.parametrize("packed", [False, True])
def test_both_implementations_equal_numpy_with_history_and_documents(W, T, packed):
    """T = 1 and T < W included. The two have one gradient, and linearity ties it to numpy."""
    y, w, tail, weight = make(4, T, W)
    segment_ids = segments(4, T) if packed else None
    out, real = expected(y, w, tail, segment_ids)
    weight = weight * real[:, :, None]
    results = run(y, w, tail, segment_ids, weight)
    for _, z in results.values():
        assert rel_err(np.asarray(z)[real], out[real]) < 1e-6
    for a, b in zip(results["lax"][0], results["shifted"][0], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    # z is linear in (y, tail) together and in w: the value is the gradient times the input.
    by_y, by_w, by_tail = results["shifted"][0]
    value, scale = np.sum(weight * out), np.sum(np.abs(weight * out))
    assert abs(np.sum(by_y * y) + np.sum(by_tail * tail) - value) < 1e-5 * scale
    assert abs(np.sum(by_w * w) - value) < 1e-5 * scale


@pytest.mark.parametrize("impl", IMPLS)
def test_no_history_is_a_history_of_zeros(impl):
    y, w, _, _ = make(3, 13, 3)
    for segment_ids in (None, segments(3, 13)):
        out, real = expected(y, w, None, segment_ids)
        z = jax.jit(causal_conv, static_argnames="impl")(y, w, None, segment_ids, impl=impl)
        assert rel_err(np.asarray(z)[real], out[real]) < 1e-6


@pytest.mark.parametrize("impl", IMPLS)
def test_gradient_is_the_numerical_one(impl):
    y, w, tail, weight = make(2, 6, 3, seed=1)
    segment_ids = np.asarray([[1, 1, 2, 2, 2, 3], [1, 1, 1, 1, 0, 0]], np.int32)
    weight *= (segment_ids != 0)[:, :, None]
    grads, _ = run(y, w, tail, segment_ids, weight)[impl]
    inputs = [x.astype(np.float64) for x in (y, w, tail)]
    rng = np.random.default_rng(0)
    for i, gradient in enumerate(grads):
        direction = rng.standard_normal(inputs[i].shape)
        values = []
        for sign in (1, -1):
            moved = list(inputs)
            moved[i] = inputs[i] + sign * 1e-4 * direction
            values.append(np.sum(weight * expected(*moved, segment_ids)[0]))
        np.testing.assert_allclose(np.sum(gradient * direction), (values[0] - values[1]) / 2e-4, rtol=1e-4)


@pytest.mark.parametrize("impl", IMPLS)
def test_no_gradient_crosses_a_document(impl):
    y, w, tail, weight = make(1, 8, 4)
    segment_ids = np.asarray([[1, 1, 1, 2, 2, 2, 2, 2]], np.int32)
    weight[:, :3] = 0
    (by_y, _, by_tail), _ = run(y, w, tail, segment_ids, weight)[impl]
    assert not by_y[:, :3].any()
    assert not by_tail.any()
    assert by_y[:, 3:].any()


def test_auto_is_one_of_them_and_bfloat16_stays_bfloat16():
    y, w, tail, _ = make(2, 9, 3)
    out, _ = expected(y, w, tail)
    assert rel_err(jax.jit(causal_conv)(y, w, tail), out) < 1e-6
    half = jax.jit(causal_conv)(y.astype(jnp.bfloat16), w.astype(jnp.bfloat16), tail)
    assert half.dtype == jnp.bfloat16
    assert rel_err(half, out) < 0.02


@pytest.mark.parametrize(
    ("change", "match"),
    [(dict(impl="fft"), "impl is 'fft'; choose one of auto, lax, shifted"),
     (dict(w_WD=np.ones((3, D + 1), np.float32)), "w_WD has shape"),
     (dict(tail_BVD=np.ones((2, 3, D), np.float32)), "tail has shape")],
)
def test_wrong_arguments_are_named(change, match):
    y, w, tail, _ = make(2, 4, 3)
    with pytest.raises(ValueError, match=match):
        causal_conv(**dict(y_BTD=y, w_WD=w, tail_BVD=tail) | change)
