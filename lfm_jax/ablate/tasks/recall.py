"""Multi-query associative recall (MQAR), Arora et al. 2023, "Zoology", arXiv 2312.04927.

    k1 v1 k2 v2 k3 v3 . . . . k2 . . k1 . . . . . k3 . .
                              v2     v1           v3        <- targets

Dimensions: T time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import lru_cache
from typing import ClassVar

import numpy as np

from lfm_jax.ablate.tasks.synthetic import BLANK, MIN_VOCAB, SyntheticTask, Variant
from lfm_jax.data.batch import LOSS_IGNORE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mqar(SyntheticTask):
    """Pairs of key and value, then each key once more in random order, to be answered with its value.

    As in the paper but for three things: a query may stand at any place of the rest and not at every second only, which
    key is asked at which place is random, and values are drawn with repetition, so that chance is 1 / num_values
    exactly. The value does not follow its query in the input; between queries there are blanks.

    A model that knows which values the row has, and not which key each belongs to, answers with the commonest: 0.41
    with 4 pairs of 8 values, 0.32 with 8, more than 1 / pairs since values repeat. A stack of L convolutions of W taps
    sees 1 + L (W - 1) tokens; if that is no more than `gap` + 1, no query sees a value and it stays at chance.
    """

    section: ClassVar[str] = "mqar"
    title: ClassVar[str] = "Multi-query associative recall"
    curve_axes: ClassVar[Mapping[str, str]] = {"pairs": "pairs in a row", "length": "tokens of a row"}
    least: ClassVar[Mapping[str, int]] = {"pairs": 1, "gap": 0, "num_keys": 1, "num_values": 2}

    pairs: tuple[int, ...] = (4, 8)
    """Numbers of pairs; each training row draws one, and each is measured."""
    length: int = 56
    """T of training rows."""
    gap: int = 0
    """Blanks between the last pair and the first place of a query: every query is more than `gap` tokens behind its
    value. 16 convolutions of 3 taps do not reach over 32."""
    power: float = 0.01
    """A query stands at the n-th place after the gap with a chance in proportion to n ** (power - 1), places drawn
    without repetition. 1: any place alike; 0.01 (as in the paper's code): near ones far more often."""
    num_keys: int = 8
    """Different keys."""
    num_values: int = 8
    """Different values."""

    def shortest(self) -> tuple[int, str]:
        n = max(self.pairs)
        return 3 * n + self.gap, f"for {n} pairs (mqar.pairs), {self.gap} blanks (mqar.gap) and {n} queries"

    def _other_problems(self) -> list[str]:
        problems = []
        if not (isinstance(self.power, (int, float)) and 0 < self.power <= 1):
            problems.append(f"mqar.power is {self.power!r}; it must lie above 0 and be at most 1")
        if self.pairs == ():
            problems.append("mqar.pairs is empty; name at least one number of pairs")
        return problems

    def _misfits(self) -> list[str]:
        n = max(self.pairs)
        if n <= self.num_keys:
            return []
        return [f"mqar.num_keys is {self.num_keys}; {n} pairs (mqar.pairs) need as many different keys"]

    @property
    def vocab_size(self) -> int:
        return max(MIN_VOCAB, 1 + self.num_keys + self.num_values)

    @property
    def chance(self) -> float:
        return 1 / self.num_values

    def variants(self) -> tuple[Variant, ...]:
        pairs = tuple(Variant("pairs", n, self.length, True) for n in self.pairs)
        # Without longer rows the second curve would be one point of the first.
        return pairs + (self.length_variants(scored=False) if self.test_lengths else ())

    def row(self, rng: np.random.Generator, variant: Variant | None) -> tuple[np.ndarray, np.ndarray]:
        T = variant.length if variant else self.length
        if variant is None:
            n = self.pairs[rng.integers(len(self.pairs))]
        else:
            n = variant.x if variant.curve == "pairs" else max(self.pairs)
        keys = 1 + rng.permutation(self.num_keys)[:n]
        values = 1 + self.num_keys + rng.integers(self.num_values, size=n)
        tokens_T, targets_T = np.full(T, BLANK, np.int32), np.full(T, LOSS_IGNORE, np.int32)
        tokens_T[0 : 2 * n : 2], tokens_T[1 : 2 * n : 2] = keys, values
        first = 2 * n + self.gap
        # The first n arrivals of Poisson processes with these waits: weighted drawing without repetition.
        arrivals = rng.standard_exponential(T - first) * _waits(T - first, self.power)
        places = first + rng.permutation(np.argpartition(arrivals, n - 1)[:n])
        tokens_T[places], targets_T[places] = keys, values
        return tokens_T, targets_T


@lru_cache(maxsize=64)
def _waits(places: int, power: float) -> np.ndarray:
    """Inverse chances of the places, up to a factor."""
    return np.arange(1, places + 1) ** (1 - power)
