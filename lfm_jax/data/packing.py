"""Documents to packed rows while a run reads them: tokens, pieces no longer than a row, best-fit packing.

There are two packers, since they see other things and their rows must not change. This one is Grain's: pieces come
without end, rows are filled as they come, PACKING_ROWS of them open at a time, and its place among them can be saved.
The one of a build (`filling.py`) sees all pieces of a block at once, and so leaves next to nothing empty.

Importing this loads Grain, which is slow; `corpora/text.py` does so only when batches are asked for.

Dimensions: T time (tokens of a row).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from itertools import batched

import grain
import numpy as np
from tokenizers import Tokenizer

from lfm_jax.data.batch import LOSS_IGNORE
from lfm_jax.data.encoding import BATCH_DOCUMENTS, DocumentEncoder, cuts

PACKING_ROWS = 128
"""Rows open at a time: more waste less padding, but resuming packs up to this many rows again."""


class Pieces:
    """Documents as tokens, cut into pieces of at most T predictions: a Grain `RandomAccessDataSource`.

    What a document and a piece are: see `encoding.py`. All tokens are held in memory, in 2 bytes each (4 for a
    vocabulary beyond 65,536), which makes the order of pieces free: rows mix all documents, however long one is.

    Args:
      documents: texts, iterated once. The names of special tokens in them are text like any other.
      T: the longest piece.
    """

    def __init__(self, documents: Iterable[str], tokenizer: Tokenizer, T: int, *, bos_id: int, eos_id: int):
        encode = DocumentEncoder(tokenizer, bos_id=bos_id, eos_id=eos_id)
        chunks = [np.zeros(0, encode.dtype)]
        starts, stops, base = [], [], 0
        for texts in batched(documents, BATCH_DOCUMENTS):
            for ids in encode(texts):
                first, last = cuts(len(ids), T)
                starts.append(base + first)
                stops.append(base + last)
                chunks.append(ids)
                base += len(ids)
        self._ids = np.concatenate(chunks)
        self._starts, self._stops = (np.concatenate([np.zeros(0, np.int64), *x]) for x in (starts, stops))

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        start, stop = self._starts[index], self._stops[index]
        pairs = self._ids[start : stop + 1].astype(np.int32)
        return {"tokens": pairs[:-1], "targets": pairs[1:]}

    def digest(self) -> str:
        """A fingerprint of every token and every cut."""
        digest = hashlib.blake2b(self._ids, digest_size=16)
        digest.update(self._starts)
        return digest.hexdigest()


def pack(pieces: grain.MapDataset, T: int, *, shuffle_seed: int | None) -> grain.IterDataset:
    """Rows of T tokens, each with whole pieces from its left end and padding at its right end.

    The keys are those of a batch (`batch.py`). Rows come in the packer's order, or
    shuffled PACKING_ROWS at a time by a seed.
    """
    rows = grain.experimental.BestFitPackIterDataset(
        # No reading threads: the pieces are in memory.
        pieces.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)),
        length_struct={"tokens": T, "targets": T},
        padding_struct={"tokens": 0, "targets": LOSS_IGNORE},
        num_packing_bins=PACKING_ROWS,
        shuffle_bins=shuffle_seed is not None,
        seed=shuffle_seed or 0,
    )
    return rows.map(
        lambda row: {
            "tokens": row["tokens"],
            "targets": row["targets"],
            "segment_ids": row["tokens_segment_ids"],
            "positions": row["tokens_positions"],
        }
    )
