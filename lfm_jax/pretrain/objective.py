"""Next-token prediction."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import optax

from lfm_jax.config import ModelConfig
from lfm_jax.model import LFM
from lfm_jax.train.loss import cross_entropy
from lfm_jax.train.objective import DeviceBatch, OverTargets, Terms
from lfm_jax.train.step import Training


@dataclasses.dataclass(frozen=True, kw_only=True)
class NextToken(OverTargets):
    """Mean negative log-likelihood, in nats, of the targets that are not LOSS_IGNORE.

    Padding stands at the right end of a row. `segment_ids` may be None: one document a row, no padding.
    """

    loss_chunk: int = 512
    """Tokens whose logits are in memory at one time."""
    z_loss: float = 0.0
    """Weight of the penalty on the softmax's normaliser (`loss.cross_entropy`)."""

    def __call__(self, model: LFM, batch: DeviceBatch) -> Terms:
        model.config.need_causal("next-token prediction")
        hidden_BTD, aux = model.hidden(batch["tokens"], batch["positions"], batch["segment_ids"])
        with jax.named_scope("loss"):
            loss = cross_entropy(
                hidden_BTD, model.head_VD, batch["targets"], chunk=self.loss_chunk, z_loss=self.z_loss
            )
        return Terms(loss.total, {"loss": loss.nll}, aux)


def next_token_training(
    model: ModelConfig, optimizer: optax.GradientTransformation, *, loss_chunk: int = 512, z_loss: float = 0.0,
    **settings: Any,
) -> Training:
    """A `Training` of this objective; `settings` are its other fields."""
    objective = NextToken(loss_chunk=loss_chunk, z_loss=z_loss)
    return Training(model=model, objective=objective, optimizer=optimizer, **settings)
