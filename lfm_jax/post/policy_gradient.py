"""Group-relative policy optimisation: answers that were rewarded above the others of their group become likelier.

Dimensions: B answers, T time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np

Normalisation = Literal["token", "sequence", "constant"]
MAX_LOG_RATIO = 20.0
"""Logarithms of ratios are cut there, so that no exponential overflows; beyond it they carry no gradient."""
STD_FLOOR = 1e-4
"""Added to the standard deviation of a group."""


class LogProbs(NamedTuple):
    """Log-probabilities in nats of the tokens of B answers."""

    policy_BT: jax.Array
    """By the model in training."""
    behaviour_BT: jax.Array
    """By the model that sampled them, as it sampled them; carries no gradient."""
    reference_BT: jax.Array | None = None
    """By the model that the policy is kept near to; carries no gradient."""


class PolicyGradientSums(NamedTuple):
    """Sums over answers, float32 scalars. Divided by `policy_gradient_weight` those of `sums` are means."""

    total: jax.Array
    """What to differentiate."""
    sums: dict[str, jax.Array]
    """`loss`; `ratio` of policy to behaviour and `mismatch`, its |logarithm|; `clipped_low` and `clipped_high`, the
    tokens whose ratio left the bounds the way that their advantage asks for; `behaviour_kl` and, with a reference,
    `reference_kl`: estimates of KL(behaviour || policy) and KL(policy || reference). With `constant`, all but the loss
    are means over an answer."""
    largest_log_ratio: jax.Array
    """Largest |log(policy / behaviour)| of a token: a maximum, no sum."""


def policy_gradient_loss(
    logprobs: LogProbs, advantages_B: jax.Array, mask_BT: jax.Array, *, epsilon_low: float = 0.2,
    epsilon_high: float = 0.2, normalisation: Normalisation = "token", max_tokens: int | None = None,
    beta: float = 0.0,
) -> PolicyGradientSums:
    """GRPO's clipped objective (arXiv 2402.03300, equation 3), to be minimised; float32, whatever comes in.

    Of a token with ratio r = policy / behaviour and advantage A:
    `-min(r A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A) + beta k3`. An epsilon_high above epsilon_low is DAPO's
    "clip-higher" (arXiv 2503.14476, 0.28). k3 = e^d - d - 1 with d = log(reference / policy) estimates
    KL(policy || reference), without bias for tokens that the policy sampled.

    The ratio is the one of the numbers given: where engine and trainer have one set of them it is 1 in the first step
    on an answer. It is reported, and not corrected otherwise.

    Args:
      advantages_B: of each answer (`group_advantages`).
      mask_BT: not zero where a token belongs to the answer; see `complete` for answers that were cut off.
      normalisation: what `total` over `policy_gradient_weight` is. `token`: the mean over all tokens (DAPO);
        `sequence`: over answers, of the mean over the tokens of each (GRPO); `constant`: over answers, of the sum over
        the tokens of each, over `max_tokens` (Dr. GRPO, arXiv 2503.20783). Answers without tokens do not count.
      max_tokens: most tokens that an answer can have; for `constant` only.

    Raises:
      ValueError: settings that do not fit together, or a beta without reference.
    """
    _check(epsilon_low, epsilon_high, normalisation, max_tokens, beta)
    if beta and logprobs.reference_BT is None:
        raise ValueError(f"beta is {beta}, but there are no log-probabilities of a reference; set it to 0")
    counts_BT = mask_BT != 0
    ratio = _log_ratio(logprobs.policy_BT, logprobs.behaviour_BT, counts_BT)
    low, high, A_B1 = 1 - epsilon_low, 1 + epsilon_high, advantages_B.astype(jnp.float32)[:, None]
    ratio_BT = jnp.exp(ratio.cut_BT)
    loss_BT = -jnp.minimum(ratio_BT * A_B1, jnp.clip(ratio_BT, low, high) * A_B1)
    reports = {
        "ratio": ratio_BT, "mismatch": jnp.abs(ratio.whole_BT),
        "clipped_low": (ratio_BT < low) & (A_B1 < 0), "clipped_high": (ratio_BT > high) & (A_B1 > 0),
        "behaviour_kl": ratio_BT - 1 - ratio.cut_BT,
    }
    if logprobs.reference_BT is not None:
        reference_BT = -_log_ratio(logprobs.policy_BT, logprobs.reference_BT, counts_BT).cut_BT
        reports["reference_kl"] = jnp.exp(reference_BT) - reference_BT - 1
        loss_BT += beta * reports["reference_kl"]
    length_B1 = jnp.maximum(jnp.sum(counts_BT, axis=1, keepdims=True), 1)
    share_B1 = 1.0 if normalisation == "token" else 1.0 / length_B1
    sums = {name: jnp.sum(jnp.where(counts_BT, share_B1 * x_BT, 0.0)) for name, x_BT in reports.items()}
    total = jnp.sum(jnp.where(counts_BT, (1.0 / max_tokens if max_tokens else share_B1) * loss_BT, 0.0))
    return PolicyGradientSums(total, {"loss": total} | sums, jnp.max(jnp.abs(ratio.whole_BT)))


def policy_gradient_weight(mask_BT: jax.Array, *, normalisation: Normalisation = "token") -> jax.Array:
    """What the sums of `policy_gradient_loss` are to be divided by: tokens, or answers that have any."""
    counts_BT = mask_BT != 0
    return jnp.sum(counts_BT if normalisation == "token" else jnp.any(counts_BT, axis=1), dtype=jnp.float32)


def complete(mask_BT: jax.Array, truncated_B: jax.Array) -> jax.Array:
    """The mask without the answers that were cut off, whose reward says nothing about how they would have gone on
    (DAPO's overlong filtering)."""
    return jnp.where(truncated_B[:, None], jnp.zeros_like(mask_BT), mask_BT)


def group_advantages(rewards_B: Sequence[float] | np.ndarray, group: int, *, scale: bool = True) -> np.ndarray:
    """How much better each answer is than the others to its prompt, float32 [B]: `(r - mean) / (std + STD_FLOOR)`.

    Each `group` answers one after another belong together. A group whose rewards are all the same has advantages of
    exactly 0.

    Args:
      scale: divide by the standard deviation (of a sample: by `group - 1`) as GRPO does; Dr. GRPO (arXiv 2503.20783)
        does not, because it gives questions that are nearly solved, or hopeless, more weight than others.

    Raises:
      ValueError: groups of less than two, that do not divide the answers, or rewards that are not finite.
    """
    rewards_B = np.asarray(rewards_B, np.float64)
    if group < 2:
        raise ValueError(f"group is {group}; an answer is compared with others: it must be at least 2")
    if rewards_B.ndim != 1 or len(rewards_B) % group:
        raise ValueError(f"rewards of shape {rewards_B.shape} are not groups of {group}")
    if not np.all(np.isfinite(rewards_B)):
        raise ValueError(f"the reward of answer {np.argmin(np.isfinite(rewards_B))} is not finite")
    rewards = rewards_B.reshape(-1, group)
    advantages = rewards - rewards.mean(axis=1, keepdims=True)
    if scale:
        advantages /= rewards.std(axis=1, ddof=1, keepdims=True) + STD_FLOOR
    # A mean is rounded: equal rewards need not be equal to it.
    advantages[rewards.min(axis=1) == rewards.max(axis=1)] = 0.0
    return advantages.reshape(-1).astype(np.float32)


class _Ratio(NamedTuple):
    whole_BT: jax.Array
    cut_BT: jax.Array
    """Within MAX_LOG_RATIO."""


def _log_ratio(policy_BT: jax.Array, other_BT: jax.Array, counts_BT: jax.Array) -> _Ratio:
    """log(policy / other), 0 where nothing counts."""
    other_BT = jax.lax.stop_gradient(other_BT.astype(jnp.float32))
    whole_BT = jnp.where(counts_BT, policy_BT.astype(jnp.float32) - other_BT, 0.0)
    return _Ratio(whole_BT, jnp.clip(whole_BT, -MAX_LOG_RATIO, MAX_LOG_RATIO))


def _check(epsilon_low: float, epsilon_high: float, normalisation: str, max_tokens: int | None, beta: float) -> None:
    if normalisation not in get_args(Normalisation):
        raise ValueError(f"normalisation is {normalisation!r}; choose one of {', '.join(get_args(Normalisation))}")
    if not 0 < epsilon_low < 1:
        raise ValueError(f"epsilon_low is {epsilon_low}; it must be between 0 and 1")
    if not epsilon_high > 0:
        raise ValueError(f"epsilon_high is {epsilon_high}; it must be above 0")
    if not beta >= 0:
        raise ValueError(f"beta is {beta}; it must not be negative")
    if normalisation != "constant" and max_tokens is not None:
        raise ValueError(f"max_tokens is {max_tokens}, but normalisation is {normalisation}; leave it out")
    if normalisation == "constant" and (max_tokens is None or max_tokens < 1):
        raise ValueError(f"max_tokens is {max_tokens}; normalisation constant divides by it: it must be at least 1")
