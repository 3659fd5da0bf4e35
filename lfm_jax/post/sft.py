"""Supervised fine-tuning: next-token prediction of what the assistant wrote in chats."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lfm_jax.data.corpora.chats import ChatCorpus
from lfm_jax.post.tuning import CorpusTuning
from lfm_jax.pretrain.objective import NextToken

if TYPE_CHECKING:
    from lfm_jax.post.config import TuneConfig


def sft_objective(config: TuneConfig) -> NextToken:
    """The mean over learnt tokens; all others have no target."""
    return NextToken(loss_chunk=config.loss_chunk)


class SFT(CorpusTuning):
    """Chats, and a loss on the assistant's tokens of them.

    Raises:
      ValueError: on construction: see `CorpusTuning` and `ChatCorpus`.
    """

    def open_corpus(self) -> ChatCorpus:
        return ChatCorpus(self._config.data, self.tokenizer, self._config.model, self.template)

    def measured(self, sums: Mapping[str, float], weight: float, *, all_batches: bool) -> tuple[dict[str, float], str]:
        """Held-out loss in nats per learnt token."""
        loss = sums["loss"] / weight
        return {"heldout_loss": loss}, f"held-out loss {loss:.4f} nats/learnt token"
