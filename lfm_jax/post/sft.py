"""Supervised fine-tuning: next-token prediction of what the assistant wrote in chats."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from lfm_jax.data.corpora.chats import ChatCorpus
from lfm_jax.post.tuning import Tuning
from lfm_jax.pretrain.objective import NextToken
from lfm_jax.train.driver import Data

if TYPE_CHECKING:
    from lfm_jax.post.config import TuneConfig


def sft_objective(config: TuneConfig) -> NextToken:
    """The mean over learnt tokens; all others have no target."""
    return NextToken(loss_chunk=config.loss_chunk)


class SFT(Tuning):
    """Chats, and a loss on the assistant's tokens of them.

    Raises:
      ValueError: on construction: see `Tuning` and `ChatCorpus`.
    """

    def __init__(self, config: TuneConfig):
        super().__init__(config)
        self._corpus = ChatCorpus(config.data, self.tokenizer, config.model, self.template)

    def steps(self) -> int:
        return self._corpus.steps(self._config.epochs)

    def __str__(self) -> str:
        return str(self._corpus)

    def train_data(self, rows: np.ndarray | None) -> Data:
        return self._corpus.train_batches(rows)

    def check_lasts(self, steps: int) -> None:
        """They are read again and again."""

    def heldout(self) -> Iterable[Mapping[str, np.ndarray]]:
        return self._corpus.heldout_batches()

    def measured(self, sums: Mapping[str, float], weight: float, *, all_batches: bool) -> tuple[dict[str, float], str]:
        """Held-out loss in nats per learnt token."""
        loss = sums["loss"] / weight
        return {"heldout_loss": loss}, f"held-out loss {loss:.4f} nats/learnt token"
