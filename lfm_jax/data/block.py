"""One block of a build: some stretches of the sources become one shard of training rows and one of held-out rows.

What a block becomes depends on nothing but its stretches and the settings, so blocks can be built in any order, by
any process, and again after a kill. A block is done once its record, `block-00000.json`, is there.

Importing this must stay cheap: every worker process does.

Dimensions: T time (tokens of a row).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from lfm_jax.data.encoding import DocumentEncoder, Tokens
from lfm_jax.data.filling import fill_rows
from lfm_jax.data.heldout import is_heldout
from lfm_jax.data.manifest import BUILD_DIR, SPLITS, Counts, Shard, Split, counts_from_plain, file_digest
from lfm_jax.data.records import TEXT_FORMAT, RowCodec
from lfm_jax.data.sources import Stretch, read_stretch
from lfm_jax.files import write_whole
from lfm_jax.problems import raise_problems
from lfm_jax.text.tokenizer import load_tokenizer

BATCH_BYTES = 2**20
"""Text encoded at a time: many documents, so that cores share them, and few enough to hold their encodings."""
WRITER_OPTIONS = "group_size:1"
"""One row is read at a time. Rows are compressed (zstd), about 10 us each to undo."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What every block of a build shares."""

    directory: Path
    seq_len: int
    bos_id: int
    eos_id: int
    seed: int
    heldout_fraction: float
    text_field: str
    skip_unreadable: bool
    blocks: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Block:
    """The record of a block that is done."""

    shards: tuple[Shard, ...]
    train: Counts
    heldout: Counts
    unreadable: int
    source_bytes: int
    source_digest: str
    """Of the documents as stored."""


def record_path(directory: Path, number: int) -> Path:
    return directory / BUILD_DIR / f"block-{number:05}.json"


def load_block(directory: Path, number: int) -> Block | None:
    """The record of a block; None if it is not done."""
    try:
        plain = json.loads(record_path(directory, number).read_text())
    except FileNotFoundError:
        return None
    train, heldout = (counts_from_plain(plain.pop(split)) for split in SPLITS)
    shards = tuple(Shard(**shard) for shard in plain.pop("shards"))
    return Block(**plain, train=train, heldout=heldout, shards=shards)


def build_block(
    settings: Settings, number: int, stretches: Sequence[Stretch], advance: Callable[[int], None]
) -> Block:
    """Reads, encodes, packs and writes a block.

    Args:
      advance: called with the number of source bytes read since its last call.

    Raises:
      ValueError: documents cannot be read, unless they are to be skipped, or a source is gone.
    """
    encode = _encoder(settings.directory / BUILD_DIR, settings.bos_id, settings.eos_id)
    problems: list[str] = []
    digest = hashlib.blake2b(digest_size=16)
    halves = {split: _Half(settings, number, split, encode.dtype) for split in SPLITS}
    source_bytes = 0
    for documents in _batches(stretches, settings.text_field, problems):
        for (raw, text), ids in zip(documents, encode([text for _, text in documents]), strict=True):
            digest.update(hashlib.blake2b(raw).digest())
            halves["heldout" if is_heldout(text, settings.heldout_fraction) else "train"].add(text, ids)
        size = sum(len(raw) for raw, _ in documents)
        source_bytes += size
        advance(size)
    if not settings.skip_unreadable:
        raise_problems("documents cannot be read (mend them, or leave them out with --skip-unreadable True)", problems)
    written = {split: half.write() for split, half in halves.items()}
    block = Block(
        shards=tuple(shard for shard, _ in written.values() if shard),
        train=written["train"][1],
        heldout=written["heldout"][1],
        unreadable=len(problems),
        source_bytes=source_bytes,
        source_digest=digest.hexdigest(),
    )
    write_whole(record_path(settings.directory, number), json.dumps(dataclasses.asdict(block)))
    return block


@lru_cache(maxsize=1)
def _encoder(directory: Path, bos_id: int, eos_id: int) -> DocumentEncoder:
    return DocumentEncoder(load_tokenizer(directory), bos_id=bos_id, eos_id=eos_id)


def _batches(
    stretches: Sequence[Stretch], text_field: str, problems: list[str]
) -> Iterator[list[tuple[bytes, str]]]:
    batch: list[tuple[bytes, str]] = []
    size = 0
    for stretch in stretches:
        try:
            for document in read_stretch(stretch, text_field, problems):
                batch.append(document)
                size += len(document[0])
                if size >= BATCH_BYTES:
                    yield batch
                    batch, size = [], 0
        except OSError as error:
            raise ValueError(f"{stretch.path}: {error.strerror}; it was there when the build began") from None
    if batch:
        yield batch


class _Half:
    """The documents of a block on one side of the held-out split."""

    def __init__(self, settings: Settings, number: int, split: Split, dtype: np.dtype):
        self._settings, self._number, self._split = settings, number, split
        self._chunks = [np.zeros(0, dtype)]
        self._text_bytes = 0

    def add(self, text: str, ids: np.ndarray) -> None:
        self._text_bytes += len(text.encode())
        self._chunks.append(ids)

    def write(self) -> tuple[Shard | None, Counts]:
        """Packs the documents and writes them; no shard where there are none."""
        documents = self._chunks[1:]
        if not documents:
            return None, Counts()
        settings = self._settings
        pieces = [piece for ids in documents for piece in Tokens(ids).pieces(settings.seq_len)]
        lengths = [len(piece.ids) - 1 for piece in pieces]
        seed = np.random.SeedSequence([settings.seed, self._number]).generate_state(1)[0]
        rows = fill_rows(lengths, settings.seq_len, int(seed))
        codec = RowCodec(TEXT_FORMAT, self._chunks[0].dtype)
        shard = self._write(codec.encode([pieces[i] for i in row]) for row in rows)
        counts = Counts(
            documents=len(documents),
            text_bytes=self._text_bytes,
            tokens=sum(lengths),
            pieces=len(pieces),
            rows=len(rows),
            document_lengths=_histogram([len(ids) - 1 for ids in documents]),
            piece_lengths=_histogram(lengths),
        )
        return dataclasses.replace(shard, rows=len(rows)), counts

    def _write(self, records: Iterator[bytes]) -> Shard:
        from array_record.python import array_record_module

        directory = self._settings.directory
        name = f"{self._split}-{self._number:05}-of-{self._settings.blocks:05}.arrayrecord"
        partial = directory / BUILD_DIR / f"{name}.{os.getpid()}"
        writer = array_record_module.ArrayRecordWriter(str(partial), WRITER_OPTIONS)
        for record in records:
            writer.write(record)
        writer.close()
        with open(partial, "rb") as handle:
            os.fsync(handle.fileno())
        shard = Shard(name=name, split=self._split, rows=0, bytes=partial.stat().st_size, digest=file_digest(partial))
        os.replace(partial, directory / name)
        return shard


def _histogram(lengths: Sequence[int]) -> tuple[int, ...]:
    """How many lengths have 0, 1, 2, ... bits."""
    bits = np.array([n.bit_length() for n in lengths])
    return tuple(np.bincount(bits).tolist())
