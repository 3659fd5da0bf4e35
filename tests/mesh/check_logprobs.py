"""Log-probabilities of tokens over meshes, and a model whose weights are pytrees, equal one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import rel_err, tokens_like
from jax.sharding import PartitionSpec as P
from meshes import mesh_of
from scaled import dense, scaled

from lfm_jax.kernels.logprobs import token_logprobs, token_scores
from lfm_jax.kernels.topk_logprobs import top_tokens
from lfm_jax.model import param_axes
from lfm_jax.post.distillation import distillation_loss
from lfm_jax.sharding import shardings, spec
from lfm_jax.testing import tiny_model

B, T, D, V = 4, 12, 16, 32


def example():
    rng = np.random.default_rng(0)
    targets = np.where(rng.random((B, T)) < 0.2, -1, tokens_like((B, T), 0, high=V)).astype(np.int32)
    hidden, table, g = (rng.standard_normal(shape).astype(np.float32) for shape in ((B, T, D), (V, D), (B, T)))
    table[1::2] = table[::2]  # Of tokens that are as likely the first is told, wherever it is.
    return hidden, table, targets, g


@jax.jit
def scores_and_gradients(hidden, table, targets, g):
    def total(hidden, table):
        scores = token_scores(hidden, table, targets, chunk=5)
        return jnp.sum(g * scores.logprob_BT), scores

    (_, scores), grads = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(hidden, table)
    return *scores, *grads


@functools.cache
def on_one_device():
    return scores_and_gradients(*example())


@pytest.mark.parametrize("sizes", [dict(data=2, tensor=2, context=2), dict(fsdp=2, tensor=4)], ids=str)
def test_scores_and_gradients(sizes):
    with jax.set_mesh(mesh_of(**sizes)):
        layouts = (spec("batch", "time", None), spec("vocab", "width"), spec("batch", "time"), spec("batch", "time"))
        found = scores_and_gradients(*map(jax.device_put, example(), layouts))
        assert found[0].sharding.spec == layouts[3]
    expected = on_one_device()
    np.testing.assert_array_equal(found[1], expected[1])
    for ours, theirs in zip(found, expected, strict=True):
        assert rel_err(ours, theirs) < 1e-6


@functools.partial(jax.jit, static_argnames="k")
def distilled(hidden, table, targets, k):
    """Of a teacher's k best tokens, the student being next to it: (tokens, sums of the loss, gradients)."""
    teacher = top_tokens(hidden, table, k, chunk=5)

    def total(hidden, table):
        found = distillation_loss(hidden, table, teacher, targets, targets >= 0, temperature=2.0,
                                  cross_entropy_weight=0.5, chunk=5)
        return found.total, found.sums

    (_, sums), grads = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(0.7 * hidden, table)
    return *teacher, sums, *grads


def test_distillation():
    k = 10  # Of the vocabulary each device has 8 tokens.
    hidden, table, targets, _ = example()
    with jax.set_mesh(mesh_of(tensor=4, context=2)):
        layouts = (spec("batch", "time", None), spec("vocab", "width"), spec("batch", "time"))
        found = distilled(*map(jax.device_put, (hidden, table, targets), layouts), k)
    expected = distilled(hidden, table, targets, k)
    np.testing.assert_array_equal(found[0], expected[0])
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_model_of_weight_kinds():
    model = tiny_model(layer_types=("conv",), vocab_size=96)
    graphdef, params = nnx.split(model, nnx.Param)
    params = scaled(nnx.to_pure_dict(params))
    tokens, targets = tokens_like((4, 16), 0, high=96), tokens_like((4, 16), 1, high=96)

    @jax.jit
    @jax.value_and_grad
    def loss(params, tokens, targets):
        model = nnx.merge(graphdef, params)
        hidden, _ = model.hidden(tokens, None, None)
        return -jnp.mean(token_logprobs(hidden, model.head_VD, targets, chunk=8))

    expected, by_array = loss(dense(params), tokens, targets)
    with jax.set_mesh(mesh_of(fsdp=2, tensor=2, context=2)):
        layouts = shardings(params, param_axes(model.config))
        assert layouts["embed"].w.spec == P("tensor", "fsdp")
        assert layouts["embed"].s.spec == P()
        placed = (jax.device_put(x, spec("batch", "time")) for x in (tokens, targets))
        found, grads = loss(jax.device_put(params, layouts), *placed)
    assert rel_err(found, expected) < 1e-5
    _, pull = jax.vjp(dense, params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), grads, pull(by_array)[0])
