"""Answers of a model in training as the rows of a batch, and GRPO's objective over them. It needs no tokenizer.

Dimensions: B answers of an optimizer step, one a row; T time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from lfm_jax.data.batch import FILL, LOSS_IGNORE, Batch
from lfm_jax.kernels.logprobs import token_logprobs
from lfm_jax.model import LFM
from lfm_jax.post.policy_gradient import LogProbs, Normalisation, policy_gradient_loss, policy_gradient_weight
from lfm_jax.train.objective import BatchArray, DeviceBatch, OverTargets, Terms
from lfm_jax.train.step import BASE


class Answer(NamedTuple):
    """An answer, ready to be learnt from; lists and numbers, fit for JSON."""

    ids: list[int]
    """Those of the prompt and its own."""
    prompt: int
    """How many are the prompt's."""
    logprobs: list[float]
    """That its tokens were sampled with."""
    advantage: float
    learnt: bool
    """False where it was cut off and shall not count."""


def rows_of(answers: Sequence[Answer], T: int) -> Batch:
    """The arrays of `grpo.PolicyGradient`: one answer a row, with its prompt; padding at the right end."""
    B = len(answers)
    batch = {name: np.full((B, T), FILL.get(name, 0), np.int32) for name in ("tokens", "targets", "segment_ids")}
    behaviour_BT = np.zeros((B, T), np.float32)
    for b, answer in enumerate(answers):
        end = len(answer.ids) - 1
        batch["tokens"][b, :end], batch["segment_ids"][b, :end] = answer.ids[:-1], 1
        if answer.learnt:
            batch["targets"][b, answer.prompt - 1 : end] = answer.ids[answer.prompt :]
            behaviour_BT[b, answer.prompt - 1 : end] = answer.logprobs
    advantages_B = np.array([answer.advantage for answer in answers], np.float32)
    return batch | {"behaviour": behaviour_BT, "advantages": advantages_B}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyGradient(OverTargets):
    """GRPO's clipped objective (`policy_gradient_loss`) over answers, one a row, padding at the right end.

    `mismatch/mean` and `mismatch/max` are of |log(policy / behaviour)|. In the first step on a rollout that is how far
    engine and trainer are apart; in later ones it has the change of the policy in it.
    """

    temperature: float = 1.0
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    normalisation: Normalisation = "token"
    max_tokens: int | None = None
    """Most tokens of an answer; for `constant` only."""
    beta: float = 0.0
    loss_chunk: int = 512

    @property
    def others(self) -> tuple[str, ...]:
        return (BASE,) if self.beta else ()

    @property
    def arrays(self) -> dict[str, BatchArray]:
        """Those of packed rows, with targets in the answer alone; the log-probability that each target was sampled
        with, float32 [B, T]; and advantages, float32 [B]."""
        rows = {name: BatchArray() for name in ("tokens", "targets", "segment_ids")}
        return rows | {"behaviour": BatchArray(dtype="float32"), "advantages": BatchArray(("batch",), "float32")}

    def weight(self, batch: DeviceBatch) -> jax.Array:
        return policy_gradient_weight(batch["targets"] != LOSS_IGNORE, normalisation=self.normalisation)

    def __call__(self, model: LFM, batch: DeviceBatch, others: Mapping[str, LFM] | None = None) -> Terms:
        model.config.need_causal("policy gradients")
        hidden_BTD, aux = model.hidden(batch["tokens"], None, batch["segment_ids"])
        policy_BT = self._logprobs(model, hidden_BTD, batch)
        reference_BT = None
        if self.beta:
            assert others is not None  # An objective with `others` gets them.
            hidden_BTD, _ = others[BASE].hidden(batch["tokens"], None, batch["segment_ids"])
            reference_BT = self._logprobs(others[BASE], hidden_BTD, batch)
        found = policy_gradient_loss(
            LogProbs(policy_BT, batch["behaviour"], reference_BT), batch["advantages"],
            batch["targets"] != LOSS_IGNORE, epsilon_low=self.epsilon_low, epsilon_high=self.epsilon_high,
            normalisation=self.normalisation, max_tokens=self.max_tokens, beta=self.beta,
        )
        sums = dict(found.sums)
        sums["mismatch/mean"] = sums.pop("mismatch")
        return Terms(found.total, sums, aux, {"mismatch/max": found.largest_log_ratio})

    def _logprobs(self, model: LFM, hidden_BTD: jax.Array, batch: DeviceBatch) -> jax.Array:
        with jax.named_scope("loss"):
            return token_logprobs(
                hidden_BTD, model.head_VD, batch["targets"], chunk=self.loss_chunk, temperature=self.temperature
            )
