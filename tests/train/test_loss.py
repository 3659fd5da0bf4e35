"""Dimensions: B batch, T time, D width, V vocabulary."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import reference_cross_entropy

from lfm_jax.data.batch import LOSS_IGNORE
from lfm_jax.train.loss import cross_entropy


def example(B=3, T=7, D=8, V=29, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (B, T, D), dtype)
    table = jax.random.normal(keys[1], (V, D))
    targets = jax.random.randint(keys[2], (B, T), 0, V).at[0, 3:].set(LOSS_IGNORE).at[2, 0].set(LOSS_IGNORE)
    return hidden, table, targets


@pytest.mark.parametrize("chunk", [1, 4, 5, 21, 512])
def test_equals_reference_forward_and_gradient(chunk):
    hidden, table, targets = example()

    def with_gradients(f):
        return jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(hidden, table)

    ours, ours_grads = with_gradients(lambda h, t: cross_entropy(h, t, targets, chunk=chunk).total)
    want, want_grads = with_gradients(lambda h, t: reference_cross_entropy(h, t, targets))
    np.testing.assert_allclose(ours, want, rtol=1e-6)
    for a, b in zip(ours_grads, want_grads, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6 * float(jnp.abs(b).max()))
    plain, nll = cross_entropy(hidden, table, targets, chunk=chunk)
    np.testing.assert_allclose(plain, want, rtol=1e-6)
    assert nll == plain


@pytest.mark.parametrize("chunk", [4, 512])
def test_z_loss_is_the_square_of_the_normaliser(chunk):
    hidden, table, targets = example()

    def reference(h, t):
        log_z = jax.nn.logsumexp(h @ t.T, axis=-1)
        return reference_cross_entropy(h, t, targets) + 0.3 * jnp.sum(jnp.where(targets == LOSS_IGNORE, 0, log_z**2))

    def ours(h, t):
        return cross_entropy(h, t, targets, chunk=chunk, z_loss=0.3).total

    (a, ours_grads), (b, want) = (jax.value_and_grad(f, argnums=(0, 1))(hidden, table) for f in (ours, reference))
    np.testing.assert_allclose(a, b, rtol=1e-6)
    for x, y in zip(ours_grads, want, strict=True):
        np.testing.assert_allclose(x, y, atol=2e-6 * float(jnp.abs(y).max()))
    with_z, plain = (cross_entropy(hidden, table, targets, z_loss=z).nll for z in (0.3, 0.0))
    np.testing.assert_allclose(with_z, plain, rtol=1e-6)
    with pytest.raises(ValueError, match="z_loss is -1"):
        cross_entropy(hidden, table, targets, z_loss=-1)


def test_ignored_targets_have_no_gradient():
    hidden, table, targets = example()
    grad = jax.grad(lambda h: cross_entropy(h, table, targets, chunk=4)[0])(hidden)
    assert not np.any(np.asarray(grad)[np.asarray(targets) == LOSS_IGNORE])
    assert np.all(np.any(np.asarray(grad)[np.asarray(targets) != LOSS_IGNORE], axis=-1))


def test_a_batch_without_targets_is_zero_not_nan():
    hidden, table, targets = example()
    loss, grads = jax.value_and_grad(lambda h: cross_entropy(h, table, jnp.full_like(targets, LOSS_IGNORE))[0])(hidden)
    assert float(loss) == 0.0
    assert not np.any(grads)


def test_logits_of_the_whole_batch_are_never_in_memory():
    B, T, D, V, chunk = 4, 512, 16, 4096, 128
    shapes = [jax.ShapeDtypeStruct(s, d) for s, d in (((B, T, D), "float32"), ((V, D), "float32"), ((B, T), "int32"))]

    def temp_bytes(f):
        return jax.jit(jax.grad(f, argnums=(0, 1))).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    whole = B * T * V * 4
    assert temp_bytes(lambda h, t, y: cross_entropy(h, t, y, chunk=chunk).total) < whole / 2
    assert temp_bytes(reference_cross_entropy) >= whole


def test_chunk_below_one_is_refused():
    with pytest.raises(ValueError, match="chunk is 0"):
        cross_entropy(*example(), chunk=0)
