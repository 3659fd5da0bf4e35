"""Which pieces share a row of a build: best fit over all pieces of a block at once (`packing.py` packs as a run reads).

Dimensions: T time (tokens of a row).
"""

from __future__ import annotations

import random
from collections.abc import Sequence

TRIES = 8
"""Fillings tried for a row before the fullest is taken; the first that leaves nothing over ends the search."""


def fill_rows(lengths: Sequence[int], T: int, seed: int) -> list[list[int]]:
    """Shares pieces out over rows of T tokens, each piece in one row; the rows as lists of indices into `lengths`.

    A row begins with the longest piece left, so that none is left that goes with nothing. Pieces drawn at random
    follow, until one that is left fits the rest exactly or the next does not fit; then come those that fit best.
    Random draws mix the pieces and, unlike best fit of one piece after another, do not leave the same gap in every
    row where lengths are alike. The result depends on the arguments only.

    Args:
      lengths: of the pieces, from 1 to T.
    """
    pool = _Pool(lengths, seed)
    rows = []
    while (first := pool.best_fit(T, 0)) is not None:
        pool.take([first])
        fullest: list[int] = []
        least = T + 1
        for _ in range(TRIES):
            pieces, over = _try(pool, lengths, T - lengths[first])
            if over < least:
                fullest, least = pieces, over
            if over == 0:
                break
        pool.take(fullest)
        rows.append([first, *fullest])
    return rows


def _try(pool: _Pool, lengths: Sequence[int], left: int) -> tuple[list[int], int]:
    """Pieces for a gap of `left` tokens, and how many stay empty."""
    pieces: list[int] = []
    drawing = True
    while left and (piece := pool.best_fit(left, len(pieces))) is not None:
        if drawing and lengths[piece] < left:
            drawn = pool.draw(len(pieces))
            drawing = lengths[drawn] <= left
            piece = drawn if drawing else piece
        pool.reserve(piece, len(pieces))
        pieces.append(piece)
        left -= lengths[piece]
    return pieces, left


class _Pool:
    """Pieces not yet in a row, to be drawn at random or found by length. Those being tried stand last in the order."""

    def __init__(self, lengths: Sequence[int], seed: int):
        self._lengths = lengths
        self._random = random.Random(seed)
        self._order = list(range(len(lengths)))
        self._random.shuffle(self._order)
        self._place = [0] * len(lengths)
        # Dicts as sets that keep their order.
        self._of_length: list[dict[int, None]] = [{} for _ in range(max(lengths, default=0) + 1)]
        for place, piece in enumerate(self._order):
            self._place[piece] = place
            self._of_length[lengths[piece]][piece] = None
        self._mask = sum(1 << n for n, pieces in enumerate(self._of_length) if pieces)
        """Bit n is set where a piece of length n is left."""

    def best_fit(self, left: int, tried: int) -> int | None:
        """The longest piece of at most `left` tokens, but for the `tried` last ones; None if there is none."""
        end = len(self._order) - tried
        mask = self._mask & ((2 << left) - 1)
        while mask:
            n = mask.bit_length() - 1
            for piece in self._of_length[n]:
                if self._place[piece] < end:
                    return piece
            mask ^= 1 << n
        return None

    def draw(self, tried: int) -> int:
        """A random piece, but for the `tried` last ones."""
        return self._order[int(self._random.random() * (len(self._order) - tried))]

    def reserve(self, piece: int, tried: int) -> None:
        """Moves a piece to just before the `tried` last ones."""
        self._swap(self._place[piece], len(self._order) - tried - 1)

    def take(self, pieces: Sequence[int]) -> None:
        """Removes pieces for good."""
        for piece in pieces:
            self._swap(self._place[piece], len(self._order) - 1)
            self._order.pop()
            n = self._lengths[piece]
            del self._of_length[n][piece]
            if not self._of_length[n]:
                self._mask ^= 1 << n

    def _swap(self, a: int, b: int) -> None:
        order, place = self._order, self._place
        order[a], order[b] = order[b], order[a]
        place[order[a]], place[order[b]] = a, b
