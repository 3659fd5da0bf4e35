"""One packed row as a record: token ids with the lengths of their pieces, and which of them are learnt.

A record is little-endian, one after another:

  number of pieces   uint32
  number of borders  uint32   in format 2 only
  pairs of a piece   uint32   for each piece
  borders            uint32   in format 2 only: where in the row learning begins, ends, begins, ...
  ids                uint16 or uint32, one for the whole dataset: of all pieces one after another

A piece of n pairs (input, target) has n + 1 ids: its inputs are all but the last, its targets all but the first. In
format 1, which is that of text, every target is learnt. In format 2 a target is where an odd number of borders stand
at or before its place in the row; the borders rise, and none at all means that nothing is learnt.

Dimensions: T time (tokens of a row).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lfm_jax.data.batch import LOSS_IGNORE
from lfm_jax.data.encoding import Tokens

TEXT_FORMAT, SPANS_FORMAT = 1, 2
FORMATS = (TEXT_FORMAT, SPANS_FORMAT)

_COUNT = np.dtype("<u4")


class StoredRow(NamedTuple):
    """What a record holds."""

    lengths: np.ndarray
    """Pairs of each piece."""
    ids: np.ndarray
    """Of all pieces one after another: one more for each piece than it has pairs."""
    learnt: np.ndarray | None
    """Of each pair, whether its target is learnt. None: all are."""


@dataclasses.dataclass(frozen=True)
class RowCodec:
    """The records of one dataset."""

    format: int
    dtype: np.dtype
    """Of the ids, little-endian."""

    def encode(self, pieces: Sequence[Tokens]) -> bytes:
        """A record of pieces, each of at least two ids in the dataset's type. The first id of a piece is no target.

        Raises:
          ValueError: pieces with spans in a format without.
        """
        lengths = [len(ids) - 1 for ids, _ in pieces]
        header = [len(pieces), *lengths]
        if self.format == SPANS_FORMAT:
            learnt = np.concatenate([piece.learnt()[1:] for piece in pieces])
            borders = np.flatnonzero(np.diff(learnt, prepend=False, append=False)).tolist()
            header = [len(pieces), len(borders), *lengths, *borders]
        elif any(spans is not None for _, spans in pieces):
            raise ValueError(f"records of format {self.format} hold no spans; write format {SPANS_FORMAT}")
        return np.array(header, _COUNT).tobytes() + np.concatenate([ids for ids, _ in pieces]).tobytes()

    def split(self, record: bytes) -> StoredRow:
        """What a record holds, read without a copy where that can be.

        Raises:
          ValueError: the bytes are not a record of this format and type.
        """
        counts = 2 if self.format == SPANS_FORMAT else 1
        known = len(record) >= counts * _COUNT.itemsize
        pieces, *borders = np.frombuffer(record, _COUNT, counts).tolist() if known else [0]
        size = counts + pieces + sum(borders)
        start = _COUNT.itemsize * size
        if not pieces or start > len(record) or (len(record) - start) % self.dtype.itemsize:
            raise ValueError(f"{len(record)} bytes are not a packed row of {self.dtype} in format {self.format}")
        header = np.frombuffer(record, _COUNT, size).astype(np.int64)
        lengths = header[counts : counts + pieces]
        total = int(lengths.sum())
        ids = np.frombuffer(record, self.dtype, offset=start)
        if len(ids) != total + pieces:
            raise ValueError(f"{len(record)} bytes hold {len(ids)} ids, but the row names {total + pieces}")
        if not borders:
            return StoredRow(lengths, ids, None)
        edges = header[counts + pieces :]
        if len(edges) % 2 or np.any(np.diff(edges, prepend=-1, append=total + 1) < 1):
            raise ValueError(f"the borders {edges.tolist()} of what is learnt do not fit a row of {total} tokens")
        return StoredRow(lengths, ids, np.searchsorted(edges, np.arange(total), side="right") % 2 == 1)

    def decode(self, record: bytes, T: int) -> dict[str, np.ndarray]:
        """A record as a row of a batch (`batch.py`), int32 [T] each.

        Raises:
          ValueError: see `split`, or the row has more than T tokens.
        """
        lengths, ids, learnt = self.split(record)
        total = len(ids) - len(lengths)
        if total > T:
            raise ValueError(f"a row of {total} tokens is longer than seq_len {T}")
        time = np.arange(total, dtype=np.int32)
        piece = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
        starts = (np.cumsum(lengths) - lengths).astype(np.int32)
        inputs = time + piece  # Each piece before takes one id more than it has inputs.
        row = {key: np.zeros(T, np.int32) for key in ("tokens", "targets", "segment_ids", "positions")}
        row["tokens"][:total] = ids[inputs]
        row["targets"][:total] = ids[inputs + 1]
        row["targets"][total:] = LOSS_IGNORE
        if learnt is not None:
            row["targets"][:total][~learnt] = LOSS_IGNORE
        row["segment_ids"][:total] = piece + 1
        row["positions"][:total] = time - starts[piece]
        return row
