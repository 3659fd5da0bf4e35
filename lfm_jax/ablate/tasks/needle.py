"""Needles in a haystack: key-value pairs anywhere in random filler, all keys asked at the end.

After the passkey retrieval of Mohtashami and Jaggi 2023, "Landmark Attention", arXiv 2305.16300, with several needles.

    x z y k1 v1 x x z k3 v3 y x k2 v2 z k2 k1 k3
                                        v2 v1 v3        <- targets

Dimensions: T time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from lfm_jax.ablate.tasks.synthetic import MIN_VOCAB, SyntheticTask, Variant
from lfm_jax.data.batch import LOSS_IGNORE

TENTHS = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needle(SyntheticTask):
    """Needles, each a key and its value, in a haystack of random filler; then every key once, in random order.

    The keys are asked one right after another; their values do not follow in the input. Values are drawn with
    repetition, so that chance is 1 / num_values.

    Beside the accuracy by length there is that by depth: where in the haystack the needle stood, in tenths from its
    beginning, in the longest rows that are measured. There one needle stands in that tenth, and only it has a target.
    """

    section: ClassVar[str] = "needle"
    title: ClassVar[str] = "Needles in a haystack"
    curve_axes: ClassVar[Mapping[str, str]] = {
        "length": "tokens of a row", "depth": "depth of the needle, in tenths of the haystack",
    }
    least: ClassVar[Mapping[str, int]] = {"needles": 1, "num_keys": 1, "num_values": 2, "fillers": 1}

    needles: int = 4
    """Needles of a row."""
    length: int = 96
    """T of training rows."""
    test_lengths: tuple[int, ...] = (192, 384)
    depth: bool = True
    """Whether accuracy by depth is measured: ten times heldout_rows more of the longest rows."""
    num_keys: int = 8
    """Different keys."""
    num_values: int = 8
    """Different values."""
    fillers: int = 8
    """Different tokens of the haystack; neither keys nor values."""
    steps: int = 500
    heldout_rows: int = 64

    def shortest(self) -> tuple[int, str]:
        # Ten more places than needles, so that each tenth of the haystack has one.
        why = f"for {self.needles} needles (needle.needles), as many questions and some haystack"
        return 3 * self.needles + 2 * TENTHS, why

    def _other_problems(self) -> list[str]:
        return [] if isinstance(self.depth, bool) else [f"needle.depth is {self.depth!r}; it must be true or false"]

    def _misfits(self) -> list[str]:
        if self.needles <= self.num_keys:
            return []
        return [f"needle.num_keys is {self.num_keys}; {self.needles} needles (needle.needles) need as many different "
                "keys"]

    @property
    def vocab_size(self) -> int:
        return max(MIN_VOCAB, 1 + self.num_keys + self.num_values + self.fillers)

    @property
    def chance(self) -> float:
        return 1 / self.num_values

    def variants(self) -> tuple[Variant, ...]:
        longest = max((self.length, *self.test_lengths))
        depths = range(1, TENTHS + 1) if self.depth else ()
        return (
            *self.length_variants(scored=True),
            *(Variant("depth", tenth, longest, False) for tenth in depths),
        )

    def row(self, rng: np.random.Generator, variant: Variant | None) -> tuple[np.ndarray, np.ndarray]:
        T = variant.length if variant else self.length
        n, hay = self.needles, T - self.needles
        keys = 1 + rng.permutation(self.num_keys)[:n]
        values = 1 + self.num_keys + rng.integers(self.num_values, size=n)
        tokens_T = 1 + self.num_keys + self.num_values + rng.integers(self.fillers, size=T, dtype=np.int32)
        tenth = variant.x if variant and variant.curve == "depth" else None
        places = _places(rng, hay, n, tenth)
        tokens_T[places], tokens_T[places + 1] = keys, values
        order = rng.permutation(n)
        targets_T = np.full(T, LOSS_IGNORE, np.int32)
        tokens_T[hay:], targets_T[hay:] = keys[order], values[order]
        if tenth is not None:
            targets_T[hay:][order != 0] = LOSS_IGNORE  # Needle 0 is the one at that depth.
        return tokens_T, targets_T


def _places(rng: np.random.Generator, hay: int, needles: int, tenth: int | None) -> np.ndarray:
    """Where the needles begin, [needles]; the first one in a tenth (1 .. 10) of the haystack, if one is given."""
    cells = hay // 2  # Of two tokens each, so that needles never overlap.
    free = rng.permutation(cells)
    if tenth is not None:
        first = rng.integers((tenth - 1) * cells // TENTHS, tenth * cells // TENTHS)
        free = np.concatenate([[first], free[free != first]])
    shift = rng.integers(hay - 2 * cells + 1)  # The odd token of the haystack stands at either end.
    return shift + 2 * free[:needles]
