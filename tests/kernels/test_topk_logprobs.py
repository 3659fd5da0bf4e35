"""Dimensions: B batch, T time, D width, V vocabulary, K given tokens."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import rel_err
from scaled import Scaled

from lfm_jax.kernels.logprobs import token_logprobs
from lfm_jax.kernels.topk_logprobs import several_logprobs, top_tokens

B, T, D, V, K = 3, 7, 8, 29, 4


def example(K=K):
    """(hidden states, table, targets, ids, cotangents of the three results)."""
    rng = np.random.default_rng(0)
    targets = rng.integers(0, V, (B, T)).astype(np.int32)
    targets[0, 3:] = targets[2, 0] = -1
    ids = np.argsort(rng.random((B, T, V)), axis=2)[:, :, :K].astype(np.int32)
    ids[1, :, 0] = np.where((ids[1] == targets[1][:, None]).any(1), ids[1, :, 0], targets[1])  # Some are targets too.
    hidden, table, g, g_given, g_rest = (
        rng.standard_normal(shape).astype(np.float32) for shape in ((B, T, D), (V, D), (B, T), (B, T, K), (B, T))
    )
    return hidden, table, targets, ids, (g, g_given, g_rest)


def in_float64(hidden, table, targets, ids, g):
    """(the three results, gradients of their sum with the cotangents by hidden and by the table)."""
    hidden, table, *g = (np.asarray(x, np.float64) for x in (hidden, table, *g))
    logits = hidden @ table.T
    log_p = logits - np.logaddexp.reduce(logits, axis=2, keepdims=True)
    is_given = (ids[:, :, :, None] == np.arange(V)).any(2)
    rest = np.logaddexp.reduce(np.where(is_given, -np.inf, log_p), axis=2)
    kept, at = targets >= 0, np.maximum(targets, 0)[:, :, None]
    results = (np.where(kept, np.take_along_axis(log_p, at, 2)[:, :, 0], 0), np.take_along_axis(log_p, ids, 2), rest)
    by_log_p = np.zeros_like(log_p)
    for b, t in np.ndindex(B, T):
        if kept[b, t]:
            by_log_p[b, t, targets[b, t]] += g[0][b, t]
        for k, i in enumerate(ids[b, t]):
            by_log_p[b, t, i] += g[1][b, t, k]
        others = ~is_given[b, t]
        by_log_p[b, t, others] += g[2][b, t] * np.exp(log_p[b, t, others] - rest[b, t])
    d_logits = by_log_p - np.exp(log_p) * by_log_p.sum(2, keepdims=True)
    return results, d_logits @ table, np.einsum("BTV,BTD->VD", d_logits, hidden)


@functools.partial(jax.jit, static_argnames="chunk")
def both(hidden, table, targets, ids, g, chunk):
    def total(hidden, table):
        found = several_logprobs(hidden, table, targets, ids, chunk=chunk)
        return sum(jnp.sum(a * b) for a, b in zip(g, found, strict=True)), found

    (_, found), grads = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(hidden, table)
    return found, *grads


@pytest.mark.parametrize("chunk", [5, 512])
def test_equals_float64_forward_and_gradient(chunk):
    found, expected = both(*example(), chunk), in_float64(*example())
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == "float32"
        assert rel_err(ours, theirs) < 1e-5


def test_a_target_has_the_number_of_the_one_scorer():
    hidden, table, targets, ids, g = example()
    np.testing.assert_array_equal(both(hidden, table, targets, ids, g, 5)[0].target_BT,
                                  jax.jit(functools.partial(token_logprobs, chunk=5))(hidden, table, targets))


def test_the_rest_of_a_certain_place_keeps_its_digits():
    hidden, table, targets, ids, g = example(K=1)
    hidden, ids = hidden * 10, (hidden @ table.T).argmax(2)[:, :, None].astype(np.int32)
    found, expected = both(hidden, table, targets, ids, g, 5)[0], in_float64(hidden, table, targets, ids, g)[0]
    assert expected[2].min() < -30
    np.testing.assert_allclose(found.rest_BT, expected[2], rtol=1e-5)


def test_bfloat16_and_a_table_that_is_a_kind():
    hidden, table, *others = example()
    hidden = jnp.asarray(hidden, "bfloat16")
    found, d_hidden, d_table = both(hidden, Scaled(table / 2, jnp.float32(2)), *others, 5)
    expected, *grads = in_float64(hidden, jnp.asarray(table, "bfloat16"), *others)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == "float32"
        assert rel_err(ours, theirs) < 1e-5
    assert d_hidden.dtype == "bfloat16"
    assert rel_err(d_hidden, grads[0]) < 2e-2
    assert rel_err(d_table.w, 2 * grads[1]) < 2e-2


@pytest.mark.parametrize("k", [1, 6, V])
def test_top_tokens(k):
    hidden, table = example()[:2]
    table[1] = table[0]  # Of tokens that are as likely the first comes first.
    found = jax.jit(functools.partial(top_tokens, k=k, chunk=5))(hidden, table)
    logits = np.asarray(hidden, np.float64) @ np.asarray(table, np.float64).T
    log_p = logits - np.logaddexp.reduce(logits, axis=2, keepdims=True)
    ids = np.argsort(-log_p, axis=2, kind="stable")[:, :, :k]
    np.testing.assert_array_equal(found.ids_BTK, ids)
    assert found.ids_BTK.dtype == "int32"
    assert rel_err(found.logprobs_BTK, np.take_along_axis(log_p, ids, axis=2)) < 1e-6


@pytest.mark.parametrize("k", [0, V + 1])
def test_a_number_of_tokens_that_cannot_be(k):
    with pytest.raises(ValueError, match=f"k is {k}; it must be between 1 and {V}"):
        top_tokens(*example()[:2], k)


def test_logits_of_the_whole_batch_are_never_in_memory():
    B, T, D, V, K, CHUNK = 4, 512, 16, 4096, 8, 128

    def total(hidden, table, targets, ids):
        found = several_logprobs(hidden, table, targets, ids, chunk=CHUNK)
        return sum(map(jnp.sum, found))

    def step(hidden, table, targets):
        ids, _ = top_tokens(hidden, table, K, chunk=CHUNK)
        return jax.grad(total, argnums=(0, 1))(hidden, table, targets, ids)

    shapes = (((B, T, D), "float32"), ((V, D), "float32"), ((B, T), "int32"))
    program = jax.jit(step).lower(*(jax.ShapeDtypeStruct(*each) for each in shapes)).compile()
    sizes = [math.prod(map(int, dims.split(","))) for dims in re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", program.as_text())]
    assert max(sizes) <= CHUNK * V * 2  # Columns of a sort, and their places.
    assert program.memory_analysis().temp_size_in_bytes < 4 * B * T * V / 2
