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

from lfm_jax.ablate.tasks.synthetic import (
    BLANK,
    MIN_VOCAB,
    Variant,
    count_problems,
    length_problems,
    length_variants,
)
from lfm_jax.data.sources import raise_problems
from lfm_jax.train.loss import LOSS_IGNORE


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectiveCopying:
    """Symbols at random places among noise, then a marker for each, to be answered with the symbols in order.

    As in the paper, the noise is one token, the markers are all alike, and the answers are not in the input.

    Raises:
      ValueError: on construction, one message that lists every bad field.
    """

    title: ClassVar[str] = "Selective copying"
    curve_axes: ClassVar[Mapping[str, str]] = {"length": "tokens of a row"}

    symbols: int = 4
    """Symbols to copy."""
    alphabet: int = 8
    """Different symbols, drawn with repetition."""
    length: int = 48
    """T of training rows, the markers at their end included."""
    test_lengths: tuple[int, ...] = ()
    """Longer rows to measure too, with as many symbols; the score leaves them out."""
    steps: int = 1000
    """Optimizer steps of a run."""
    batch_size: int = 8
    """B, rows of one optimizer step."""
    heldout_rows: int = 256
    """Rows that each length is measured on."""

    def __post_init__(self) -> None:
        problems = count_problems(self, "copying", {"symbols": 1, "alphabet": 2, "length": 1})
        if not problems:
            why = f"for {self.symbols} symbols (copying.symbols) and as many markers"
            problems = length_problems("copying", self.length, self.test_lengths, 2 * self.symbols, why)
        raise_problems("SelectiveCopying is not valid", problems)

    @property
    def vocab_size(self) -> int:
        return max(MIN_VOCAB, 2 + self.alphabet)

    @property
    def seq_len(self) -> int:
        return self.length

    @property
    def chance(self) -> float:
        return 1 / self.alphabet

    def variants(self) -> tuple[Variant, ...]:
        return length_variants(self.length, self.test_lengths, scored=True)

    def row(self, rng: np.random.Generator, variant: Variant | None) -> tuple[np.ndarray, np.ndarray]:
        T = variant.length if variant else self.length
        noise = T - self.symbols
        tokens_T, targets_T = np.full(T, BLANK, np.int32), np.full(T, LOSS_IGNORE, np.int32)
        symbols = 1 + rng.integers(self.alphabet, size=self.symbols)
        tokens_T[np.sort(rng.permutation(noise)[: self.symbols])] = symbols
        tokens_T[noise:], targets_T[noise:] = 1 + self.alphabet, symbols
        return tokens_T, targets_T
