"""Reading built datasets: a mixture of rows in one global order, whoever reads it.

Row g of a mixture is a function of the seed and g alone: each dataset is shuffled as a whole, anew each epoch, and
the weights say whose turn it is. Batch b has rows b * B to b * B + B - 1. A process reads the rows of a batch that it
needs and no others, and the position in the data is one integer, the same for all processes.

Dimensions: B rows of a batch, T time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from grain.sources import ArrayRecordDataSource

from lfm_jax.data.manifest import Manifest, Split


class Records(ArrayRecordDataSource):
    """The records of a split in the order of its shards, with errors that name the file.

    Raises:
      ValueError: on construction and on reading: a shard is missing or damaged.
    """

    def __init__(self, manifest: Manifest, split: Split):
        manifest.check_files()
        self._manifest = manifest
        # Given its count, a shard is opened only when a row of it is read.
        super().__init__([f"{manifest.directory / shard.name}[0:{shard.rows}]" for shard in manifest.of(split)])

    def __getitem__(self, record_key: Any) -> bytes:
        try:
            return super().__getitem__(record_key)
        except Exception as error:  # ArrayRecord raises what its C++ status maps to.
            shard, place = self._reader_idx_and_position(record_key)
            raise ValueError(
                f"{self._read_instructions[shard].filename}: row {place} cannot be read "
                f"({str(error).splitlines()[0]}); `lfm data show {self._manifest.directory} --verify` reports what "
                "is damaged, then copy it again or build again"
            ) from None


def rows_of(manifest: Manifest, split: Split) -> grain.MapDataset | None:
    """The rows of a split, decoded, in stored order; None where it has none."""
    if not manifest.counts(split).rows:
        return None
    codec, T = manifest.codec, manifest.seq_len
    return grain.MapDataset.source(Records(manifest, split)).map(lambda record: codec.decode(record, T))


@dataclasses.dataclass(frozen=True)
class Part:
    """A dataset in a mixture."""

    manifest: Manifest
    weight: float
    epochs: int | None
    """Most passes over it; None: any number."""


def mix(parts: Sequence[Part], seed: int) -> grain.MapDataset:
    """The training rows of a mixture: as long as its epoch limits allow with the weights kept, or endless."""
    datasets = []
    for i, part in enumerate(parts):
        # Grain shuffles epoch e with seed + e, so seeds as close as 0 and 1 would share their orders.
        order = int(np.random.SeedSequence([seed, i]).generate_state(1)[0])
        rows = rows_of(part.manifest, "train")
        assert rows is not None, "a build without training rows is refused"
        datasets.append(rows.shuffle(seed=order).repeat(part.epochs))
    return datasets[0] if len(datasets) == 1 else grain.MapDataset.mix(datasets, [part.weight for part in parts])


def num_rows(rows: grain.MapDataset) -> int | None:
    """Length of a mixture; None: endless."""
    return None if len(rows) >= sys.maxsize // 2 else len(rows)


def fingerprint(parts: Sequence[Part], seed: int) -> str:
    """Of everything that decides which row comes when."""
    total = sum(part.weight for part in parts)
    text = " ".join([str(seed), *(f"{part.manifest.fingerprint()} {part.weight / total:.9f}" for part in parts)])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class _RowsOfBatches(grain.MapDataset):
    """A view in which `ElasticIterator`'s shard 0 of B / n meets the n given rows of each batch of B."""

    def __init__(self, parent: grain.MapDataset, batch_size: int, rows: np.ndarray):
        super().__init__(parent)
        self._batch_size, self._rows = batch_size, [int(row) for row in rows]

    def __len__(self) -> int:
        return len(self._parent)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        batch, place = divmod(index, self._batch_size)
        return self._parent[batch * self._batch_size + self._rows[place * len(self._rows) // self._batch_size]]


def batches(
    rows: grain.MapDataset, batch_size: int, mine: np.ndarray | None, prefetch: int
) -> grain.DatasetIterator:
    """The given rows of each batch of B, as arrays [len(mine), T], read ahead on threads.

    Its state is the number of rows, of all processes, that were given out.

    Args:
      mine: sorted places in a batch; None: all. Their number must divide B.
      prefetch: batches to read ahead, each on a thread of its own.
    """
    mine = np.arange(batch_size) if mine is None else mine
    usable = num_rows(rows)
    view = _RowsOfBatches(rows, batch_size, mine)
    if usable is not None:
        view = view[: usable // batch_size * batch_size]
    elastic = grain.experimental.ElasticIterator(
        view,
        batch_size,
        grain.sharding.ShardOptions(shard_index=0, shard_count=batch_size // len(mine)),
        read_options=grain.ReadOptions(num_threads=prefetch, prefetch_buffer_size=prefetch),
    )
    return iter(elastic)


def heldout_rows(manifests: Sequence[Manifest]) -> Iterator[dict[str, np.ndarray]]:
    """The held-out rows of several datasets, one dataset after another, in stored order."""
    for manifest in manifests:
        rows = rows_of(manifest, "heldout")
        if rows is not None:
            yield from rows.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
