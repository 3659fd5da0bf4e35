"""Dimensions: B batch, T time, D width, V vocabulary."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import rel_err
from scaled import Scaled

from lfm_jax.kernels.linear import linear
from lfm_jax.kernels.logprobs import token_logprobs, token_scores
from lfm_jax.weight_kinds import WeightKind


def example(B=3, T=7, D=8, V=29):
    rng = np.random.default_rng(0)
    targets = rng.integers(0, V, (B, T)).astype(np.int32)
    targets[0, 3:] = targets[2, 0] = -1
    g = rng.standard_normal((B, T)).astype(np.float32)
    return rng.standard_normal((B, T, D)).astype(np.float32), rng.standard_normal((V, D)).astype(np.float32), targets, g


def in_float64(hidden_BTD, table_VD, targets_BT, g_BT):
    """(log-probabilities, likeliest tokens, gradients of `sum(g * log-probabilities)` by hidden and by the table)."""
    hidden_BTD, table_VD, g_BT = (np.asarray(x, np.float64) for x in (hidden_BTD, table_VD, g_BT))
    logits_BTV = hidden_BTD @ table_VD.T
    log_p_BTV = logits_BTV - np.logaddexp.reduce(logits_BTV, axis=2, keepdims=True)
    kept_BT, hit_BTV = targets_BT >= 0, np.arange(len(table_VD)) == targets_BT[:, :, None]
    logprobs_BT = np.where(kept_BT, np.sum(hit_BTV * log_p_BTV, axis=2), 0)
    d_logits_BTV = (g_BT * kept_BT)[:, :, None] * (hit_BTV - np.exp(log_p_BTV))
    d_table_VD = np.einsum("BTV,BTD->VD", d_logits_BTV, hidden_BTD)
    return logprobs_BT, logits_BTV.argmax(axis=2), d_logits_BTV @ table_VD, d_table_VD


def both(chunk, **options):
    """Jitted: log-probabilities and likeliest tokens; gradients of `sum(g * log-probabilities)`."""

    @jax.jit
    def run(hidden, table, targets, g):
        def total(hidden, table):
            scores = token_scores(hidden, table, targets, chunk=chunk, **options)
            return jnp.sum(g * scores.logprob_BT), scores

        (_, scores), grads = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(hidden, table)
        return *scores, *grads

    return run


@pytest.mark.parametrize("chunk", [1, 5, 512])
def test_equals_float64_forward_and_gradient(chunk):
    found, expected = both(chunk)(*example()), in_float64(*example())
    for ours, theirs in zip(found, expected, strict=True):
        assert rel_err(ours, theirs) < 1e-6
    targets = example()[2]
    assert found[0].dtype == "float32"
    assert not np.any(np.asarray(found[0])[targets < 0])
    assert not np.any(np.asarray(found[2])[targets < 0])


def test_a_temperature_divides_the_logits():
    hidden, table, targets, g = example()
    found = both(5, temperature=0.7)(hidden, table, targets, g)
    logprobs, likeliest, d_hidden, d_scaled = in_float64(hidden, table / 0.7, targets, g)
    for ours, theirs in zip(found, (logprobs, likeliest, d_hidden, d_scaled / 0.7), strict=True):
        assert rel_err(ours, theirs) < 1e-6
    with pytest.raises(ValueError, match="temperature is 0"):
        token_logprobs(hidden, table, targets, temperature=0)


def test_large_logits_lose_nothing():
    """A log-probability near 0 is not the difference of two large numbers."""
    hidden, table, targets, g = example(T=2)
    hidden = hidden * 1000
    likeliest_BT = in_float64(hidden, table, targets, g)[1]
    np.testing.assert_array_equal(token_scores(hidden, table, targets).likeliest_BT, likeliest_BT)
    certain = token_logprobs(hidden, table, likeliest_BT)
    np.testing.assert_allclose(certain, in_float64(hidden, table, likeliest_BT, g)[0], atol=1e-6)


def test_bfloat16_products_are_summed_in_float32():
    hidden, table, targets, g = example()
    hidden = jnp.asarray(hidden, "bfloat16")
    found = both(4)(hidden, table, targets, g)
    as_used = jnp.asarray(table, "bfloat16")
    expected = in_float64(hidden, as_used, targets, g)
    assert [x.dtype.name for x in found] == ["float32", "int32", "bfloat16", "float32"]
    assert rel_err(found[0], expected[0]) < 1e-6
    assert rel_err(found[2], expected[2]) < 2e-2
    assert rel_err(found[3], expected[3]) < 1e-2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Narrow(WeightKind):
    """Integers and a scale for each row."""

    values: jax.Array
    scale_O: jax.Array

    @property
    def shape(self):
        return self.values.shape

    @property
    def dtype(self):
        return self.scale_O.dtype

    def astype(self, dtype):
        return (self.values * self.scale_O[:, None]).astype(dtype)

    def linear(self, x, **how):
        return (linear(x, self.values, **how) * self.scale_O).astype(how["dtype"])

    def lookup(self, ids_BT, dtype):
        return (self.values[ids_BT] * self.scale_O[ids_BT][:, :, None]).astype(dtype)


def test_a_table_of_narrow_numbers():
    hidden, table, targets, g = example()
    scale = np.abs(table).max(axis=1) / 127
    narrow = Narrow(jnp.asarray(np.round(table / scale[:, None]), "int8"), jnp.asarray(scale))

    @jax.jit
    def run(hidden, scale):
        def total(hidden, scale):
            logprobs = token_logprobs(hidden, Narrow(narrow.values, scale), targets, chunk=4)
            return jnp.sum(g * logprobs), logprobs

        (_, logprobs), grads = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(hidden, scale)
        return logprobs, *grads

    logprobs, d_hidden, d_scale = run(hidden, narrow.scale_O)
    expected = in_float64(hidden, narrow.astype("float32"), targets, g)
    for ours, theirs in ((logprobs, expected[0]), (d_hidden, expected[2]),
                         (d_scale, np.sum(expected[3] * np.asarray(narrow.values), axis=1))):
        assert rel_err(ours, theirs) < 1e-6


def test_a_table_that_is_a_kind_is_differentiated_by_its_fields():
    hidden, table, targets, g = example()
    found = both(4)(hidden, Scaled(table / 2, jnp.float32(2)), targets, g)
    expected = in_float64(hidden, table, targets, g)
    assert rel_err(found[0], expected[0]) < 1e-6
    assert rel_err(found[2], expected[2]) < 1e-6
    assert rel_err(found[3].w, 2 * expected[3]) < 1e-6
    np.testing.assert_allclose(found[3].s, np.sum(expected[3] * table / 2), rtol=1e-5)


B, T, D, V, CHUNK = 4, 512, 16, 4096, 128


def compiled(f):
    """A function of hidden states, table, targets and cotangents of every token."""
    shapes = (((B, T, D), "float32"), ((V, D), "float32"), ((B, T), "int32"), ((B, T), "float32"))
    return jax.jit(f).lower(*(jax.ShapeDtypeStruct(*each) for each in shapes)).compile()


def total(hidden, table, targets, g):
    return jnp.sum(g * token_logprobs(hidden, table, targets, chunk=CHUNK))


@pytest.mark.parametrize("f", [total, jax.grad(total, argnums=(0, 1))], ids=["forward", "gradient"])
def test_logits_of_the_whole_batch_are_never_in_memory(f):
    program = compiled(f)
    sizes = [math.prod(map(int, dims.split(","))) for dims in re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", program.as_text())]
    assert max(sizes) == max(B * T * D, CHUNK * V)
    assert program.memory_analysis().temp_size_in_bytes < 4 * B * T * V / 4


def test_what_is_not_asked_for_is_not_computed():
    """A table that is not trained has no gradient; where nobody asks for the likeliest token, none is sought."""

    def products(program):  # The body of a scan is counted once, and a product is most of it.
        return int(program.cost_analysis()["flops"] / (2 * CHUNK * V * D))

    programs = [compiled(f) for f in (total, jax.grad(total), jax.grad(total, argnums=(0, 1)))]
    assert [products(program) for program in programs] == [1, 2, 3]
    programs.append(compiled(lambda hidden, table, targets, g: token_scores(hidden, table, targets, chunk=CHUNK)))
    # Of the likeliest token a reduction gives logit and id together.
    sought = [re.search(r"= \(f32\S*, s32\S*\) reduce\(", program.as_text()) is not None for program in programs]
    assert sought == [False, False, False, True]


def test_chunk_below_one_is_refused():
    with pytest.raises(ValueError, match="chunk is 0"):
        token_logprobs(*example()[:3], chunk=0)
