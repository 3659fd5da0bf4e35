"""What a batch is: named arrays whose first axis is its rows, and the values that stand where there is nothing.

A batch of packed rows holds int32 arrays [B, T]:

  tokens       inputs; 0 at padding
  targets      the next token of the same document, or LOSS_IGNORE where that is not learnt and at padding
  segment_ids  1, 2, ... for the pieces of a row from left to right; 0 at padding, which is at the right end
  positions    0, 1, ... within each piece; 0 at padding

Dimensions: B rows, T time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import batched

import numpy as np

Batch = dict[str, np.ndarray]
Row = Mapping[str, np.ndarray]

LOSS_IGNORE = -1
"""Target that carries no loss: at padding, or where the next token is not learnt."""

FILL = {"targets": LOSS_IGNORE}
"""What an array holds at padding, where that is not 0."""


def batches_of(rows: Iterable[Row], B: int) -> Iterator[Batch]:
    """Batches of B rows; the last one is filled up with rows of padding."""
    for some in batched(rows, B):
        yield {
            name: np.pad(
                np.stack([row[name] for row in some]), ((0, B - len(some)), *[(0, 0)] * some[0][name].ndim),
                constant_values=FILL.get(name, 0),
            )
            for name in some[0]
        }
