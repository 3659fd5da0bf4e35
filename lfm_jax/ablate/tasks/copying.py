"""Selective copying, Gu and Dao 2023, "Mamba", arXiv 2312.00752, section 4.1.1.

    . . c . . . a . b . . c . | | | |
                              c a b c        <- targets

Dimensions: T time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from lfm_jax.ablate.tasks.synthetic import BLANK, MIN_VOCAB, SyntheticTask, Variant
from lfm_jax.data.batch import LOSS_IGNORE


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectiveCopying(SyntheticTask):
    """Symbols at random places among noise, then a marker for each, to be answered with the symbols in order.

    As in the paper, the noise is one token, the markers are all alike, and the answers are not in the input.
    """

    section: ClassVar[str] = "copying"
    title: ClassVar[str] = "Selective copying"
    least: ClassVar[Mapping[str, int]] = {"symbols": 1, "alphabet": 2}

    symbols: int = 4
    """Symbols to copy."""
    alphabet: int = 8
    """Different symbols, drawn with repetition."""
    length: int = 48
    """T of training rows, the markers at their end included."""

    def shortest(self) -> tuple[int, str]:
        return 2 * self.symbols, f"for {self.symbols} symbols (copying.symbols) and as many markers"

    @property
    def vocab_size(self) -> int:
        return max(MIN_VOCAB, 2 + self.alphabet)

    @property
    def chance(self) -> float:
        return 1 / self.alphabet

    def row(self, rng: np.random.Generator, variant: Variant | None) -> tuple[np.ndarray, np.ndarray]:
        T = variant.length if variant else self.length
        noise = T - self.symbols
        tokens_T, targets_T = np.full(T, BLANK, np.int32), np.full(T, LOSS_IGNORE, np.int32)
        symbols = 1 + rng.integers(self.alphabet, size=self.symbols)
        tokens_T[np.sort(rng.permutation(noise)[: self.symbols])] = symbols
        tokens_T[noise:], targets_T[noise:] = 1 + self.alphabet, symbols
        return tokens_T, targets_T
