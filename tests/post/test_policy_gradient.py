"""Dimensions: B answers, T time."""

import functools

import formula
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import rel_err

from lfm_jax.post.policy_gradient import (
    LogProbs,
    complete,
    group_advantages,
    policy_gradient_loss,
    policy_gradient_weight,
)

# By trl 1.16.0, torch 2.14.1, in float64: `GRPOTrainer._compute_loss` in evaluation, with a stand-in for self whose
# `_get_per_token_logps_and_entropies` gives the policy of `formula.rollouts`; epsilons 0.2 and 0.28, loss types dapo,
# grpo and dr_grpo (max_completion_length 10). By beta: the loss, sums of the gradient's absolute values by rows.
TRL = {
    ("token", 0.0): (-0.4643662494541043, [0.34376008, 0.10935977, 0.07077503, 0.07780909]),
    ("token", 0.04): (-0.46314452643460313, [0.34604165, 0.10842866, 0.0717698, 0.07821123]),
    ("sequence", 0.0): (0.08060455679062345, [0.19643433, 0.14581303, 0.05662002, 0.31123636]),
    ("sequence", 0.04): (0.08182085680673781, [0.19773808, 0.14457154, 0.05741584, 0.31284492]),
    ("constant", 0.0): (-0.18574649978164173, [0.13750403, 0.04374391, 0.02831001, 0.03112364]),
    ("constant", 0.04): (-0.18525781057384125, [0.13841666, 0.04337146, 0.02870792, 0.03128449]),
}
TRL_REPORTS = {"reference_kl": 0.03054307548752952, "clipped_low": 0.0625, "clipped_high": 0.25}
"""Means over tokens."""


def rollouts(dtype="float32"):
    policy, behaviour, reference, mask, advantages = (np.asarray(x, dtype) for x in formula.rollouts())
    return LogProbs(policy, behaviour, reference), advantages, mask


def longest(normalisation):
    return 10 if normalisation == "constant" else None


@functools.partial(jax.jit, static_argnames=("normalisation", "beta"))
def ours(logprobs, advantages, mask, normalisation="token", beta=0.0):
    """(means, largest log ratio, gradient of the mean by the policy)."""
    weight = policy_gradient_weight(mask, normalisation=normalisation)

    def mean(policy):
        found = policy_gradient_loss(
            logprobs._replace(policy_BT=policy), advantages, mask, epsilon_low=0.2, epsilon_high=0.28,
            normalisation=normalisation, max_tokens=longest(normalisation), beta=beta,
        )
        return found.total / weight, found

    (_, found), grad = jax.value_and_grad(mean, has_aux=True)(logprobs.policy_BT)
    return {name: x / weight for name, x in found.sums.items()}, found.largest_log_ratio, grad


def plain(policy, normalisation, beta):
    """The mean loss in float64, token by token."""
    _, behaviour, reference, mask, advantages = formula.rollouts()
    sums, lengths = np.zeros(formula.B), mask.sum(1)
    for b, t in np.argwhere(mask):
        r, A = np.exp(policy[b, t] - behaviour[b, t]), advantages[b]
        d = reference[b, t] - policy[b, t]
        bounded = min(max(r, 0.8), 1.28)
        sums[b] += beta * (np.exp(d) - d - 1) - min(r * A, bounded * A)
    return {"token": sums.sum() / lengths.sum(), "sequence": (sums / lengths).mean(),
            "constant": sums.mean() / 10}[normalisation]


@pytest.mark.parametrize(("normalisation", "beta"), TRL)
def test_equals_float64_and_trl(normalisation, beta):
    means, _, grad = ours(*rollouts(), normalisation=normalisation, beta=beta)
    policy = formula.rollouts()[0]
    assert rel_err(means["loss"], plain(policy, normalisation, beta)) < 1e-5
    assert rel_err(grad, formula.gradient(lambda x: plain(x, normalisation, beta), policy)) < 1e-5
    loss, by_row = TRL[normalisation, beta]
    assert rel_err(means["loss"], loss) < 1e-5
    assert rel_err(np.abs(grad).sum(1), by_row) < 1e-5
    if normalisation == "token":
        np.testing.assert_allclose(*([x[name] for name in TRL_REPORTS] for x in (means, TRL_REPORTS)), atol=1e-6)


@pytest.mark.parametrize("normalisation", ["token", "sequence"])
def test_reports(normalisation):
    means, largest, _ = ours(*rollouts(), normalisation=normalisation)
    policy, behaviour, _, mask, _ = formula.rollouts()
    log_ratio = policy - behaviour
    weights = mask / mask.sum() if normalisation == "token" else mask / mask.sum(1, keepdims=True) / formula.B
    assert rel_err(means["ratio"], (weights * np.exp(log_ratio)).sum()) < 1e-5
    assert rel_err(means["behaviour_kl"], (weights * (np.exp(log_ratio) - 1 - log_ratio)).sum()) < 1e-5
    assert rel_err(largest, np.abs(mask * log_ratio).max()) < 1e-6


def test_where_sampler_and_trainer_agree_it_is_the_plain_policy_gradient():
    logprobs, advantages, mask = rollouts()
    means, largest, grad = ours(logprobs._replace(behaviour_BT=logprobs.policy_BT), advantages, mask)
    assert largest == 0
    assert (means["ratio"], means["behaviour_kl"], means["clipped_low"], means["clipped_high"]) == (1, 0, 0, 0)
    assert rel_err(grad, -mask * advantages[:, None] / mask.sum()) < 1e-6


@pytest.mark.parametrize("normalisation", ["token", "sequence", "constant"])
def test_answers_cut_off_and_what_is_masked_count_nothing(normalisation):
    logprobs, advantages, mask = rollouts()
    rest = complete(mask, np.array([False, True, False, False]))
    spoilt = LogProbs(*(np.where(rest == 0, np.float32(np.nan), x) for x in logprobs))
    means, largest, grad = ours(spoilt, advantages, rest, normalisation=normalisation, beta=0.04)
    three = [np.delete(x, 1, axis=0) for x in (*logprobs, advantages, mask)]
    expected, largest_of_three, grad_of_three = ours(
        LogProbs(*three[:3]), *three[3:], normalisation=normalisation, beta=0.04
    )
    assert means.keys() == expected.keys()
    np.testing.assert_allclose([means[name] for name in means], [expected[name] for name in means], rtol=1e-5)
    assert largest == largest_of_three
    np.testing.assert_allclose(np.delete(grad, 1, axis=0), grad_of_three, rtol=1e-5, atol=1e-8)
    assert not np.any(grad[1])


def test_a_ratio_beyond_all_bounds_makes_no_infinity():
    logprobs, advantages, mask = rollouts()
    far = logprobs._replace(behaviour_BT=logprobs.policy_BT - 200, reference_BT=logprobs.policy_BT + 200)
    means, largest, grad = ours(far, advantages, mask, beta=0.04)
    assert np.all(np.isfinite(grad))
    assert np.isfinite(means["loss"])
    np.testing.assert_allclose(largest, 200, rtol=1e-5)


def test_bfloat16_is_worked_with_in_float32():
    narrow = rollouts(jnp.bfloat16)
    wide = jax.tree.map(lambda x: x.astype("float32"), narrow)
    (means, _, _), (expected, _, _) = ours(*narrow), ours(*wide)
    assert {x.dtype.name for x in means.values()} == {"float32"}
    np.testing.assert_allclose([means[name] for name in means], [expected[name] for name in means], rtol=1e-6)


def test_no_tokens_at_all():
    logprobs, advantages, mask = rollouts()
    found = jax.jit(policy_gradient_loss)(logprobs, advantages, 0 * mask)
    assert found.total == 0
    assert policy_gradient_weight(0 * mask) == 0


def test_group_advantages():
    rewards = [1, 0, 0, 1, 0.5, 2, 0.25, 0.25]
    first, second = np.array([0.5, -0.5, -0.5, 0.5]), np.array([-0.25, 1.25, -0.5, -0.5])
    found = group_advantages(rewards, 4)
    assert found.dtype == "float32"
    expected = np.concatenate([x / (np.sqrt((x**2).sum() / 3) + 1e-4) for x in (first, second)])
    assert rel_err(found, expected) < 1e-6
    assert rel_err(group_advantages(rewards, 4, scale=False), np.concatenate([first, second])) < 1e-6


@pytest.mark.parametrize("scale", [True, False])
def test_a_group_of_one_reward_has_no_advantages(scale):
    """0.1 summed three times over 3 is not 0.1."""
    found = group_advantages([0.1, 0.1, 0.1, 0, 1, 0], 3, scale=scale)
    assert np.mean([0.1, 0.1, 0.1]) != 0.1
    np.testing.assert_array_equal(found[:3], 0)
    assert np.all(found[3:] != 0)


@pytest.mark.parametrize(("rewards", "group", "message"), [
    ([1, 2], 1, "group is 1"), ([1, 2, 3], 2, r"shape \(3,\) are not groups of 2"),
    ([1, 2, float("nan"), 1], 2, "reward of answer 2 is not finite"),
])
def test_bad_rewards_are_refused(rewards, group, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(rewards, group)


@pytest.mark.parametrize(("settings", "message"), [
    (dict(normalisation="batch"), "'batch'; choose one of token, sequence, constant"),
    (dict(epsilon_low=1.0), "epsilon_low is 1.0"), (dict(epsilon_high=0.0), "epsilon_high is 0.0"),
    (dict(beta=-1.0), "beta is -1.0"), (dict(max_tokens=9), "normalisation is token; leave it out"),
    (dict(normalisation="constant"), "max_tokens is None"),
])
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        policy_gradient_loss(*rollouts(), **settings)


def test_a_penalty_without_reference_is_refused():
    logprobs, advantages, mask = rollouts()
    with pytest.raises(ValueError, match="no log-probabilities of a reference"):
        policy_gradient_loss(logprobs._replace(reference_BT=None), advantages, mask, beta=0.1)
