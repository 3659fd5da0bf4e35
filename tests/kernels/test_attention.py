"""Attention against plain float64 numpy, document by document; no gradient crosses a border."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from helpers import documents, rel_err

from lfm_jax.kernels.attention import attention

H = 6


def make(B, T, S, N, K, seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((B, T, N, H), (B, S, K, H), (B, S, K, H))
    return tuple(rng.standard_normal(s).astype(np.float32) for s in shapes)


def order(B, T, first=0):
    return np.arange(first, first + T, dtype=np.int32)[None].repeat(B, 0)


run = jax.jit(lambda q, k, v, order, seg, key_seg: attention(
    q, k, v, order_BT=order, segment_ids_BT=seg, key_segment_ids_BS=key_seg))


@pytest.mark.parametrize(("N", "K"), [(4, 2), (3, 3), (4, 1)])
@pytest.mark.parametrize("T", [1, 11])
def test_every_document_attends_to_its_own_past(N, K, T):
    q, k, v = make(3, T, T, N, K)
    ids = np.asarray([[1] * 11, [1, 1, 1, 1, 2, 3, 3, 3, 3, 0, 0], [2, 2, 2, 2, 2, 2, 2, 1, 1, 1, 1]], np.int32)[:, :T]
    packed = np.asarray(run(q, k, v, order(3, T), ids, ids))
    plain = np.asarray(run(q, k, v, order(3, T), None, None))
    for row in range(3):
        rows = [x[row].astype(np.float64) for x in (q, k, v)]
        assert rel_err(plain[row], reference.attention(*rows)) < 1e-5
        for where in documents(ids[row]):
            assert rel_err(packed[row, where], reference.attention(*(x[where] for x in rows))) < 1e-5
    assert np.isfinite(packed).all()


def test_slots_after_the_query_and_of_other_documents_are_invisible():
    """A cache of ten slots, the query's own at 6: only its document's slots up to 6 count, whatever lies elsewhere."""
    q, k, v = make(1, 1, 10, 4, 2)
    key_ids = np.asarray([[0, 0, 1, 1, 2, 1, 1, 1, 0, 0]], np.int32)
    seen = [2, 3, 5, 6]
    out = np.asarray(run(q, k, v, order(1, 1, 6), np.ones((1, 1), np.int32), key_ids))
    k2, v2 = k.copy(), v.copy()
    hidden = [i for i in range(10) if i not in seen]
    k2[:, hidden], v2[:, hidden] = 1e4, -1e4
    np.testing.assert_array_equal(run(q, k2, v2, order(1, 1, 6), np.ones((1, 1), np.int32), key_ids), out)
    q64 = np.concatenate([np.zeros((3, 4, H)), q[0]]).astype(np.float64)
    expected = reference.attention(q64, k[0, seen].astype(np.float64), v[0, seen].astype(np.float64))[-1]
    assert rel_err(out[0, 0], expected) < 1e-5


def test_gradient_is_the_numerical_one_and_stays_inside_the_document():
    q, k, v = make(1, 7, 7, 2, 1, seed=3)
    ids = np.asarray([[1, 1, 1, 2, 2, 2, 2]], np.int32)
    weight = np.random.default_rng(4).standard_normal(q.shape).astype(np.float32)
    weight[:, :3] = 0

    def loss(q, k, v):
        return jnp.sum(weight * attention(q, k, v, order_BT=order(1, 7), segment_ids_BT=ids, key_segment_ids_BS=ids))

    grads = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)
    inputs = [x[0, 3:].astype(np.float64) for x in (q, k, v)]
    rng = np.random.default_rng(0)
    for i, gradient in enumerate(grads):
        assert not np.asarray(gradient)[:, :3].any()
        direction = rng.standard_normal(inputs[i].shape)
        values = []
        for sign in (1, -1):
            moved = list(inputs)
            moved[i] = inputs[i] + sign * 1e-5 * direction
            values.append(np.sum(weight[0, 3:] * reference.attention(*moved)))
        np.testing.assert_allclose(np.sum(gradient[0, 3:] * direction), (values[0] - values[1]) / 2e-5, rtol=1e-4)


def test_softmax_is_float32_in_bfloat16():
    """Scores of 60 differ by less than a bfloat16 step of 0.25; a bfloat16 softmax could not tell them apart."""
    q = np.full((1, 2, 1, 4), 5.5, np.float32)
    k = np.stack([np.full((1, 4), 5.5), np.full((1, 4), 5.53125)])[None].astype(np.float32)
    v = np.asarray([0.0, 1.0], np.float32)[None, :, None, None].repeat(4, -1)
    half = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
    out = run(*half, order(1, 2), None, None)
    assert out.dtype == jnp.bfloat16
    exact = reference.attention(q[0].astype(float), k[0].astype(float), v[0].astype(float))
    np.testing.assert_allclose(np.asarray(out[0], np.float32), exact, atol=0.01)
