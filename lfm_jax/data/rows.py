"""One packed row as a record: token ids with the lengths of its pieces.

A record is little-endian: the number of pieces (uint32), the pairs of each piece (uint32), then the ids of all pieces
one after another (uint16 or uint32, one for the whole dataset). A piece of n pairs has n + 1 ids: its inputs are all
but the last, its targets all but the first. `shards.decode_row` makes a row of a batch of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_COUNT = np.dtype("<u4")


def encode_row(pieces: Sequence[np.ndarray]) -> bytes:
    """A record of pieces, each an array of its ids (at least two) in the dataset's type."""
    header = np.array([len(pieces), *(len(ids) - 1 for ids in pieces)], _COUNT)
    return header.tobytes() + np.concatenate(pieces).tobytes()


def split_row(record: bytes, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """(pairs of each piece, ids of all pieces one after another) of a record.

    Raises:
      ValueError: the bytes are not a record of that type.
    """
    count = int(np.frombuffer(record, _COUNT, 1)[0]) if len(record) >= _COUNT.itemsize else 0
    start = _COUNT.itemsize * (1 + count)
    if not count or start > len(record) or (len(record) - start) % dtype.itemsize:
        raise ValueError(f"{len(record)} bytes are not a packed row of {dtype}")
    lengths = np.frombuffer(record, _COUNT, count, _COUNT.itemsize).astype(np.int64)
    ids = np.frombuffer(record, dtype, offset=start)
    if len(ids) != lengths.sum() + count:
        raise ValueError(f"{len(record)} bytes hold {len(ids)} ids, but the row names {lengths.sum() + count}")
    return lengths, ids
