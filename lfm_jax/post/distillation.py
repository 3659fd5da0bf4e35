"""Distillation from a teacher of whose distribution the K likeliest tokens of each place are kept.

`kernels.topk_logprobs.top_tokens` makes them, of any model with the student's vocabulary.

Dimensions: B batch, T time, D width of the student, V vocabulary, K tokens of the teacher.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import xlogy

from lfm_jax.kernels.logprobs import CHUNK
from lfm_jax.kernels.topk_logprobs import Several, TopTokens, several_logprobs
from lfm_jax.weight_kinds import WeightKind


class DistillationSums(NamedTuple):
    """Sums over places, float32 scalars."""

    total: jax.Array
    """What to differentiate."""
    sums: dict[str, jax.Array]
    """`loss`, and what it is made of: `kl_mass`, `kl_top` and `cross_entropy` (unweighted), in nats."""


def distillation_loss(
    hidden_BTD: jax.Array, head_VD: jax.Array | WeightKind, teacher: TopTokens, targets_BT: jax.Array,
    mask_BT: jax.Array, *, temperature: float = 1.0, cross_entropy_weight: float = 0.0, chunk: int = CHUNK,
) -> DistillationSums:
    """LFM2's tempered, decoupled top-K objective (arXiv 2511.23404), summed over places.

    With P and Q the teacher's and the student's mass on the teacher's K tokens:

        KL(P || Q)  +  P KL_tau(p(.|K) || q(.|K))  +  weight * cross-entropy of the target

    The first term, between "one of the K" and "any other" (`kl_mass`), is not tempered; the second (`kl_top`) is
    between the distributions within the K, their logarithms divided by the temperature tau. At tau = 1 the two are the
    KL divergence of distributions that know all other tokens as one, and with K = V the divergence of the whole ones.

    The student's logits exist for one chunk of places at a time, forward and backward (`several_logprobs`); over a
    mesh, places and vocabulary may be split.

    Args:
      hidden_BTD: the student's normed hidden states.
      head_VD: its output matrix.
      teacher: distinct tokens and their log-probabilities by the teacher, untempered, of whatever float type.
      targets_BT: ids of the next tokens; negative where there is none, which has no cross-entropy.
      mask_BT: not zero at the places that count.
      chunk: places per chunk.

    Raises:
      ValueError: a temperature that is not positive, a negative weight, chunk below 1.
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be above 0")
    if not cross_entropy_weight >= 0:
        raise ValueError(f"cross_entropy_weight is {cross_entropy_weight}; it must not be negative")
    counts_BT = mask_BT != 0
    # Where nothing counts may stand anything, and 0 times anything need not be 0.
    teacher_BTK = jnp.where(counts_BT[:, :, None], teacher.logprobs_BTK.astype(jnp.float32), 0.0)
    student = several_logprobs(hidden_BTD, head_VD, targets_BT, teacher.ids_BTK, chunk=chunk)
    mass_BT, top_BT = _divergences(
        jax.lax.stop_gradient(teacher_BTK), student, temperature, is_all=teacher_BTK.shape[2] == head_VD.shape[0]
    )
    loss_BT = mass_BT + top_BT - cross_entropy_weight * student.target_BT
    reports = {"loss": loss_BT, "kl_mass": mass_BT, "kl_top": top_BT, "cross_entropy": -student.target_BT}
    sums = {name: jnp.sum(jnp.where(counts_BT, x_BT, 0.0)) for name, x_BT in reports.items()}
    return DistillationSums(sums["loss"], sums)


def _divergences(
    teacher_BTK: jax.Array, student: Several, temperature: float, *, is_all: bool
) -> tuple[jax.Array, jax.Array]:
    """(KL(P || Q), P KL_tau(p(.|K) || q(.|K))), [B, T]; `is_all` where the K are the vocabulary."""
    # What was rounded may come to a little more than 1.
    log_mass_BT = jnp.minimum(jax.nn.logsumexp(teacher_BTK, axis=2), 0.0)
    mass_BT, rest_BT = jnp.exp(log_mass_BT), -jnp.expm1(log_mass_BT)
    if is_all:
        kl_mass_BT = jnp.zeros_like(mass_BT)
    else:
        kl_mass_BT = mass_BT * (log_mass_BT - jax.nn.logsumexp(student.given_BTK, axis=2))
        kl_mass_BT += xlogy(rest_BT, rest_BT) - rest_BT * student.rest_BT
    log_q_BTK = jax.nn.log_softmax(student.given_BTK / temperature, axis=2)
    p_BTK = jax.nn.softmax(teacher_BTK / temperature, axis=2)
    return kl_mass_BT, mass_BT * jnp.sum(xlogy(p_BTK, p_BTK) - p_BTK * log_q_BTK, axis=2)
