"""Pairs of answers to learn from: both of a pair stand in one row, each behind the prompt, the chosen one first.

So of the segments of a row (`batch.py`) 1 and 2 are a pair, 3 and 4 the next.

Dimensions: T time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import batched, chain

import numpy as np
from tokenizers import Tokenizer

from lfm_jax.config import ModelConfig
from lfm_jax.data.config import ChatData
from lfm_jax.data.corpora.chats import ChatEncoder
from lfm_jax.data.corpora.packed import Group, PackedCorpus, shortened
from lfm_jax.data.pairs import Pair, read_pairs
from lfm_jax.data.sources import SourceFile

MOST_PAIRS = 16
"""Pairs that share a row at most."""


class PairCorpus(PackedCorpus[Pair]):
    """The pairs of `config.sources`, two pieces of a row each; what is learnt are the answers.

    A pair that is longer than a row and is cut loses ends of answers: of the longer one down to half a row, then of
    both.

    Raises:
      ValueError: see `PackedCorpus` and `ChatEncoder`.
    """

    noun = "pair"
    most = MOST_PAIRS

    def __init__(self, config: ChatData, tokenizer: Tokenizer, model: ModelConfig, template: str | None):
        self._encode = ChatEncoder(tokenizer, model, template, config.date)
        super().__init__(config, model.vocab_size)

    def read(self, files: Sequence[SourceFile], ignore: Sequence[str], problems: list[str]) -> list[Pair]:
        return read_pairs(files, ignore, problems)

    def encoded(self, lines: Sequence[Pair], problems: list[str]) -> Iterator[Group]:
        sides = self._encode(chain.from_iterable(lines), problems)
        for pair, (chosen, rejected) in zip(lines, batched(sides, 2), strict=True):
            if chosen is None or rejected is None:
                continue
            if np.array_equal(chosen.ids, rejected.ids):
                problems.append(f"{pair}: the chat template writes chosen and rejected alike; drop the line")
            else:
                yield chosen, rejected

    def cut(self, group: Group, T: int) -> Group | None:
        chosen, rejected = (len(piece.ids) - 1 for piece in group)
        first = min(chosen, max(T - rejected, T // 2))
        fitted = tuple(shortened(piece, n) for piece, n in zip(group, (first, min(rejected, T - first)), strict=True))
        useful = all(piece.learnt()[1:].any() for piece in fitted)
        return fitted if useful and not np.array_equal(fitted[0].ids, fitted[1].ids) else None
