"""Preference optimisation: of two answers the chosen one shall become likelier, beside a reference model.

Dimensions: B pairs, T time.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

PreferenceKind = Literal["sigmoid", "ipo", "sigmoid_norm"]


class Answers(NamedTuple):
    """One side of B pairs."""

    policy_BT: jax.Array
    """Log-probability of each token by the model in training, in nats (`kernels.logprobs.token_logprobs`)."""
    reference_BT: jax.Array
    """The same by the reference; carries no gradient."""
    mask_BT: jax.Array
    """Not zero where a token belongs to the answer."""


class PreferenceSums(NamedTuple):
    """Sums over pairs, float32 scalars."""

    total: jax.Array
    """What to differentiate."""
    sums: dict[str, jax.Array]
    """`loss`; the rewards of `preference_loss`, `chosen_reward` and `rejected_reward`, and their difference,
    `reward_margin`; `accuracy`, the pairs whose chosen answer has the larger reward."""


def preference_loss(
    chosen: Answers, rejected: Answers, *, kind: PreferenceKind = "sigmoid", beta: float = 0.1,
    label_smoothing: float = 0.0, weight_B: jax.Array | None = None,
) -> PreferenceSums:
    """The loss of direct preference optimisation, summed over pairs; float32, whatever comes in.

    An answer's reward is `beta * log(policy / reference)`: in `sigmoid` of the whole answer, in the others the mean
    over its tokens, so that a long answer has no larger reward than a short one. With the margin m between the rewards:

    - `sigmoid` (DPO, arXiv 2305.18290, equation 7): `-log sigmoid(m)`.
    - `sigmoid_norm`: the same of rewards by token, which LFM2 was trained with (arXiv 2511.23404).
    - `ipo` (arXiv 2310.12036, equation 17): `(m / beta - 1 / (2 beta))^2`; its authors take means over tokens, and
      their tau is beta.

    Args:
      label_smoothing: share of pairs that are taken to be the wrong way round (conservative DPO,
        https://ericmitchell.ai/cdpo.pdf): `-(1 - s) log sigmoid(m) - s log sigmoid(-m)`.
      weight_B: what each pair weighs, in all sums; 1 if left out.

    Raises:
      ValueError: an unknown kind, a beta that is not positive, label_smoothing outside [0, 0.5) or with `ipo`.
    """
    _check(kind, beta, label_smoothing)
    weight_B = jnp.ones(len(chosen.mask_BT), jnp.float32) if weight_B is None else weight_B.astype(jnp.float32)
    by_token = kind != "sigmoid"
    chosen_B, rejected_B = beta * _log_ratio(chosen, by_token), beta * _log_ratio(rejected, by_token)
    margin_B = chosen_B - rejected_B
    if kind == "ipo":
        loss_B = ((margin_B - 0.5) / beta) ** 2
    else:
        right_B, wrong_B = jax.nn.log_sigmoid(margin_B), jax.nn.log_sigmoid(-margin_B)
        loss_B = -(1 - label_smoothing) * right_B - label_smoothing * wrong_B
    reports = {"loss": loss_B, "reward_margin": margin_B, "accuracy": margin_B > 0, "chosen_reward": chosen_B,
               "rejected_reward": rejected_B}
    sums = {name: jnp.sum(weight_B * x_B) for name, x_B in reports.items()}
    return PreferenceSums(sums["loss"], sums)


def _log_ratio(answers: Answers, by_token: bool) -> jax.Array:
    """[B], `log(policy / reference)` of each answer; of no tokens it is 0."""
    counts_BT = answers.mask_BT != 0
    policy_BT, reference_BT = (x.astype(jnp.float32) for x in (answers.policy_BT, answers.reference_BT))
    ratio_B = jnp.sum(jnp.where(counts_BT, policy_BT - jax.lax.stop_gradient(reference_BT), 0.0), axis=1)
    return ratio_B / jnp.maximum(jnp.sum(counts_BT, axis=1), 1) if by_token else ratio_B


def _check(kind: str, beta: float, label_smoothing: float) -> None:
    if kind not in get_args(PreferenceKind):
        raise ValueError(f"the preference loss is {kind!r}; choose one of {', '.join(get_args(PreferenceKind))}")
    if not beta > 0:
        raise ValueError(f"beta is {beta}; it must be above 0")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing is {label_smoothing}; it must be at least 0 and below 0.5")
    if label_smoothing and kind == "ipo":
        raise ValueError(f"label_smoothing is {label_smoothing}; ipo has none: set it to 0, or take sigmoid")
