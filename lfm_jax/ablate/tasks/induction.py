"""Induction heads, Olsson et al. 2022, arXiv 2209.11895: what followed this token when it last came?

    c a d b c a d b c a
            a d b c a d        <- targets

Dimensions: T time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from lfm_jax.ablate.tasks.synthetic import MIN_VOCAB, SyntheticTask, Variant
from lfm_jax.data.batch import LOSS_IGNORE


@dataclasses.dataclass(frozen=True, kw_only=True)
class InductionHeads(SyntheticTask):
    """Different symbols in random order, repeated until the row is full; answers are due from the second round on.

    How many there are in a round, the period, is drawn for each row, so that the answer does not stand a fixed number
    of tokens back. In longer rows periods are longer in proportion, though no longer than the alphabet has symbols.

    Chance is a guess among all symbols. Symbols that came just now do not come next, so that any model that learns is
    above it, unlike one beyond its reach in recall.
    """

    section: ClassVar[str] = "induction"
    title: ClassVar[str] = "Induction heads"
    least: ClassVar[Mapping[str, int]] = {"min_period": 1, "max_period": 1, "alphabet": 2}

    min_period: int = 8
    """Shortest period of training rows."""
    max_period: int = 16
    """Longest period of training rows."""
    alphabet: int = 16
    """Different symbols."""
    length: int = 48
    """T of training rows."""
    steps: int = 800

    def shortest(self) -> tuple[int, str]:
        return self.max_period + 1, f"for one round of {self.max_period} symbols (induction.max_period) and an answer"

    def _misfits(self) -> list[str]:
        problems = []
        if self.min_period > self.max_period:
            problems.append(f"induction.min_period is {self.min_period}; lower it to max_period {self.max_period}")
        if self.max_period > self.alphabet:
            problems.append(f"induction.max_period is {self.max_period}; a round has different symbols, of "
                            f"{self.alphabet} (induction.alphabet): lower it, or raise alphabet")
        return problems

    @property
    def vocab_size(self) -> int:
        return max(MIN_VOCAB, 1 + self.alphabet)

    @property
    def chance(self) -> float:
        return 1 / self.alphabet

    def row(self, rng: np.random.Generator, variant: Variant | None) -> tuple[np.ndarray, np.ndarray]:
        T = variant.length if variant else self.length
        low, high = (min(self.alphabet, period * T // self.length) for period in (self.min_period, self.max_period))
        period = int(rng.integers(low, high + 1))
        symbols = 1 + rng.permutation(self.alphabet)[:period]
        stream = np.resize(symbols, T + 1).astype(np.int32)
        targets_T = stream[1:].copy()
        targets_T[:period] = LOSS_IGNORE
        return stream[:-1], targets_T
