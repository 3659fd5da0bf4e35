"""What a batch is: named arrays whose first axis is its rows, and the values that stand where there is nothing.

Dimensions: B rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import batched

import numpy as np

Batch = dict[str, np.ndarray]
Row = Mapping[str, np.ndarray]

LOSS_IGNORE = -1
"""Target that carries no loss: padding, or a token whose successor is not in the row."""

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
