"""Dimensions: B pairs, T time."""

import functools

import formula
import jax
import numpy as np
import pytest
from helpers import rel_err

from lfm_jax.post.preferences import Answers, preference_loss

# By trl 1.16.0, torch 2.14.1, in float64: `DPOTrainer._compute_loss` with a stand-in for self whose model gives
# `formula.pair`; beta, then the loss, and sums of the gradient's absolute values by rows, chosen ones first. The loss
# is a mean over pairs there.
TRL = {
    "sigmoid": (0.1, 0.6917634098184342, [0.09004205, 0.03870062, 0.06212962, 0.01170514,
                                          0.0257263, 0.07740125, 0.06212962, 0.04682055]),
    "ipo": (0.1, 24.22911398604368, [2.39663744, 2.67883626, 2.48814758, 2.26234412] * 2),
    "sigmoid_norm": (2.0, 0.6544026263782649, [0.19904256, 0.33579057, 0.2440749, 0.13937972] * 2),
}
TRL_REWARDS = {"chosen_reward": -0.07344299825264701, "rejected_reward": -0.07769975242157755, "accuracy": 0.5,
               "reward_margin": 0.0042567541689305585}
"""Of `sigmoid`, beta 0.1."""


def pairs(dtype="float32"):
    return [Answers(*(np.asarray(x, dtype) for x in formula.pair(side))) for side in ("chosen", "rejected")]


@functools.partial(jax.jit, static_argnames=("kind", "beta", "label_smoothing"))
def by_policies(sides, weight_B=None, **settings):
    """(sums, gradients of the total by the log-probabilities of the chosen and of the rejected answers)."""

    def total(policies):
        replaced = (side._replace(policy_BT=x) for side, x in zip(sides, policies, strict=True))
        found = preference_loss(*replaced, weight_B=weight_B, **settings)
        return found.total, found.sums

    (_, sums), grads = jax.value_and_grad(total, has_aux=True)([side.policy_BT for side in sides])
    return sums, grads


def plain(policies, kind, beta, smoothing):
    """The loss in float64, pair by pair."""
    total = 0.0
    for i in range(formula.B):
        rewards = []
        for policy, side in zip(policies, ("chosen", "rejected"), strict=True):
            n = formula.LENGTHS[side][i]
            ratio = policy[i, :n].sum() - formula.pair(side)[1][i, :n].sum()
            rewards.append(ratio / (1 if kind == "sigmoid" else n))
        difference = rewards[0] - rewards[1]
        if kind == "ipo":
            total += (difference - 1 / (2 * beta)) ** 2
        else:
            right = 1 / (1 + np.exp(-beta * difference))
            total -= (1 - smoothing) * np.log(right) + smoothing * np.log(1 - right)
    return total


@pytest.mark.parametrize(("kind", "beta", "smoothing"), [
    ("sigmoid", 0.1, 0.0), ("sigmoid", 0.7, 0.2), ("ipo", 0.1, 0.0), ("sigmoid_norm", 2.0, 0.0),
    ("sigmoid_norm", 5.0, 0.1),
])
def test_equals_float64_forward_and_gradient(kind, beta, smoothing):
    sums, grads = by_policies(pairs(), kind=kind, beta=beta, label_smoothing=smoothing)
    policies = [formula.pair(side)[0] for side in ("chosen", "rejected")]
    assert rel_err(sums["loss"], plain(policies, kind, beta, smoothing)) < 1e-5
    chosen = formula.gradient(lambda x: plain([x, policies[1]], kind, beta, smoothing), policies[0])
    rejected = formula.gradient(lambda x: plain([policies[0], x], kind, beta, smoothing), policies[1])
    assert rel_err(grads[0], chosen) < 1e-5
    assert rel_err(grads[1], rejected) < 1e-5


@pytest.mark.parametrize("kind", TRL)
def test_equals_trl(kind):
    beta, loss, by_row = TRL[kind]
    sums, grads = by_policies(pairs(), kind=kind, beta=beta)
    assert rel_err(sums["loss"] / formula.B, loss) < 1e-5
    assert rel_err(np.concatenate([np.abs(g).sum(1) for g in grads]) / formula.B, by_row) < 1e-5
    if kind == "sigmoid":
        found = {name: sums[name] / formula.B for name in TRL_REWARDS}
        np.testing.assert_allclose(*([x[name] for name in TRL_REWARDS] for x in (found, TRL_REWARDS)), atol=1e-6)


def test_an_answer_twice_as_long_has_the_same_reward_by_token():
    """The rewards reported are those that the loss compares."""
    twice = [Answers(*(np.concatenate([x, x], axis=1) for x in side)) for side in pairs()]
    for kind, factor in (("sigmoid", 2), ("sigmoid_norm", 1), ("ipo", 1)):
        once, both = (by_policies(sides, kind=kind)[0] for sides in (pairs(), twice))
        assert rel_err(both["chosen_reward"], factor * once["chosen_reward"]) < 1e-5


def test_of_equal_models_no_pair_is_right():
    sides = [side._replace(policy_BT=side.reference_BT) for side in pairs()]
    sums, _ = by_policies(sides)
    assert rel_err(sums["loss"], formula.B * np.log(2)) < 1e-6
    assert sums["accuracy"] == 0
    assert sums["reward_margin"] == 0


def test_bfloat16_is_summed_in_float32():
    narrow = pairs(jax.numpy.bfloat16)
    wide = [Answers(*(x.astype("float32") for x in side)) for side in narrow]
    (found, _), (expected, _) = by_policies(narrow), by_policies(wide)
    assert {x.dtype.name for x in jax.tree.leaves(found)} == {"float32"}
    np.testing.assert_array_equal(jax.tree.leaves(found), jax.tree.leaves(expected))


def test_weights_of_pairs_and_what_is_masked():
    """A pair of weight 0 counts nothing, nor does what stands outside a mask, not even NaN."""
    weight = np.asarray([1, 0, 2, 1], np.float32)
    spoilt = [side._replace(policy_BT=np.where(side.mask_BT > 0, side.policy_BT, np.nan)) for side in pairs()]
    sums, grads = by_policies(spoilt, weight_B=weight)
    rows = [by_policies(pairs(), weight_B=one)[0] for one in np.eye(4, dtype=np.float32)]
    for name in sums:
        assert rel_err(sums[name], rows[0][name] + 2 * rows[2][name] + rows[3][name]) < 1e-5
    for side, grad in zip(pairs(), grads, strict=True):
        np.testing.assert_array_equal(grad != 0, (side.mask_BT > 0) & (weight[:, None] > 0))


def test_a_pair_without_tokens_is_no_fault():
    empty = [side._replace(mask_BT=np.zeros_like(side.mask_BT)) for side in pairs()]
    sums, grads = by_policies(empty, kind="sigmoid_norm")
    assert np.isfinite(sums["loss"])
    assert not np.any(grads)


@pytest.mark.parametrize(("settings", "message"), [
    (dict(kind="hinge"), "'hinge'; choose one of sigmoid, ipo, sigmoid_norm"), (dict(beta=0.0), "beta is 0.0"),
    (dict(label_smoothing=0.5), "below 0.5"), (dict(label_smoothing=0.1, kind="ipo"), "ipo has none"),
])
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        preference_loss(*pairs(), **settings)
