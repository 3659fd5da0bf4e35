"""Dimensions: B batch, T time, D width, V vocabulary, K tokens of the teacher."""

import functools

import formula
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import rel_err

from lfm_jax.kernels.topk_logprobs import TopTokens, top_tokens
from lfm_jax.post.distillation import distillation_loss

B, T, D, V, K = 2, 5, 4, 11, 3


def example(K=K):
    """(student's hidden states and head, the teacher's best tokens, targets, mask)."""
    rng = np.random.default_rng(0)
    hidden, head, teacher_logits = (rng.standard_normal(shape) for shape in ((B, T, D), (V, D), (B, T, V)))
    log_p = 2 * teacher_logits - np.logaddexp.reduce(2 * teacher_logits, axis=2, keepdims=True)
    ids = np.argsort(-log_p, axis=2)[:, :, :K].astype(np.int32)
    targets, mask = rng.integers(0, V, (B, T)).astype(np.int32), np.ones((B, T), np.int32)
    targets[0, 1], mask[0, 3:], mask[1, 0] = -1, 0, 0
    return hidden, head, TopTokens(ids, np.take_along_axis(log_p, ids, axis=2)), targets, mask


def plain(hidden, head, teacher, targets, mask, tau, weight):
    """{name: sum}, in float64, place by place."""
    sums = dict.fromkeys(("loss", "kl_mass", "kl_top", "cross_entropy"), 0.0)
    for b, t in np.argwhere(mask):
        logits = head @ hidden[b, t]
        q = np.exp(logits) / np.exp(logits).sum()
        ids, p = teacher.ids_BTK[b, t], np.exp(teacher.logprobs_BTK[b, t])
        P, Q = p.sum(), q[ids].sum()
        rest = 0 if len(ids) == V else (1 - P) * np.log((1 - P) / (1 - Q))
        p_tau, q_tau = (x ** (1 / tau) / (x ** (1 / tau)).sum() for x in (p, q[ids]))
        sums["kl_mass"] += P * np.log(P / Q) + rest
        sums["kl_top"] += P * (p_tau * np.log(p_tau / q_tau)).sum()
        sums["cross_entropy"] -= np.log(q[targets[b, t]]) if targets[b, t] >= 0 else 0
    return sums | {"loss": sums["kl_mass"] + sums["kl_top"] + weight * sums["cross_entropy"]}


@functools.partial(jax.jit, static_argnames=("temperature", "cross_entropy_weight"))
def ours(hidden, head, teacher, targets, mask, **settings):
    def total(hidden, head):
        found = distillation_loss(hidden, head, teacher, targets, mask, chunk=4, **settings)
        return found.total, found.sums

    (_, sums), grads = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(hidden, head)
    return sums, *grads


def in_float32(hidden, head, teacher, targets, mask, dtype="float32"):
    as_is = TopTokens(teacher.ids_BTK, teacher.logprobs_BTK.astype("float32"))
    return jnp.asarray(hidden, dtype), np.asarray(head, "float32"), as_is, targets, mask


@pytest.mark.parametrize(("tau", "weight"), [(1.0, 0.0), (2.5, 0.3)])
def test_equals_float64_forward_and_gradient(tau, weight):
    hidden, head, *others = example()
    sums, *grads = ours(*in_float32(*example()), temperature=tau, cross_entropy_weight=weight)
    for name, expected in plain(hidden, head, *others, tau, weight).items():
        assert rel_err(sums[name], expected) < 1e-5
    by_hidden = formula.gradient(lambda x: plain(x, head, *others, tau, weight)["loss"], hidden)
    by_head = formula.gradient(lambda x: plain(hidden, x, *others, tau, weight)["loss"], head)
    assert rel_err(grads[0], by_hidden) < 1e-5
    assert rel_err(grads[1], by_head) < 1e-5


def test_of_all_tokens_it_is_the_plain_divergence():
    hidden, head, teacher, targets, mask = example(K=V)
    sums, *grads = ours(*in_float32(hidden, head, teacher, targets, mask), temperature=1.0)

    def divergence(hidden):
        logits = hidden @ head.T
        log_q = np.take_along_axis(logits - np.logaddexp.reduce(logits, axis=2, keepdims=True), teacher.ids_BTK, axis=2)
        return (np.exp(teacher.logprobs_BTK) * (teacher.logprobs_BTK - log_q)).sum(2)[mask != 0].sum()

    assert rel_err(sums["loss"], divergence(hidden)) < 1e-5
    assert sums["kl_mass"] == 0
    assert rel_err(grads[0], formula.gradient(divergence, hidden)) < 1e-5


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
    hidden, head, _, targets, mask = in_float32(*example())
    sums, *grads = ours(hidden, head, jax.jit(top_tokens, static_argnums=2)(hidden, head, K), targets, mask)
    np.testing.assert_allclose([sums["kl_mass"], sums["kl_top"]], 0, atol=1e-5)
    assert all(np.abs(grad).max() < 1e-5 for grad in grads)


def test_bfloat16():
    hidden, head, teacher, targets, mask = in_float32(*example(), dtype="bfloat16")
    narrow = teacher._replace(logprobs_BTK=jnp.asarray(teacher.logprobs_BTK, "bfloat16"))
    as_used = TopTokens(teacher.ids_BTK, np.asarray(narrow.logprobs_BTK, np.float64))
    sums, *grads = ours(hidden, head, narrow, targets, mask, temperature=2.0, cross_entropy_weight=0.5)
    wide = [np.asarray(jnp.asarray(x, "bfloat16"), np.float64) for x in (hidden, head)]
    for name, expected in plain(*wide, as_used, targets, mask, 2.0, 0.5).items():
        assert sums[name].dtype == "float32"
        assert rel_err(sums[name], expected) < 1e-4
    assert [grad.dtype.name for grad in grads] == ["bfloat16", "float32"]
    by_hidden = formula.gradient(lambda x: plain(x, wide[1], as_used, targets, mask, 2.0, 0.5)["loss"], wide[0])
    assert rel_err(grads[0], by_hidden) < 2e-2


def test_what_does_not_count_may_be_anything():
    """Not even minus infinity or NaN of the teacher reaches the gradient; one token without chance is no fault."""
    hidden, head, teacher, targets, mask = in_float32(*example(K=V))
    spoilt = np.where(mask[:, :, None] == 0, np.float32(np.nan), teacher.logprobs_BTK)
    spoilt[1, 2, V - 1] = -np.inf
    sums, *grads = ours(hidden, head, teacher._replace(logprobs_BTK=spoilt), targets, mask, temperature=1.0)
    assert np.isfinite(sums["loss"])
    assert np.all(np.isfinite(grads[0]))
    np.testing.assert_array_equal(np.any(grads[0], axis=2), mask != 0)


@pytest.mark.parametrize(("settings", "message"), [
    (dict(temperature=0.0), "temperature is 0.0"), (dict(cross_entropy_weight=-1.0), "cross_entropy_weight is -1.0"),
    (dict(chunk=0), "chunk is 0"),
])
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        distillation_loss(*in_float32(*example()), **settings)
