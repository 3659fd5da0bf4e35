"""What a built dataset says about itself: manifest.json beside its shards, and whether the two agree."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lfm_jax.data.records import FORMATS, RowCodec
from lfm_jax.problems import raise_problems

MANIFEST_FILE = "manifest.json"
BUILD_DIR = ".build"
"""What a build keeps of its work until it is done."""

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "heldout")


@dataclasses.dataclass(frozen=True)
class Shard:
    """One ArrayRecord file of rows."""

    name: str
    split: Split
    rows: int
    bytes: int
    digest: str
    """Of the whole file: `file_digest`."""


@dataclasses.dataclass(frozen=True)
class Counts:
    """What a split, or a part of one, holds."""

    documents: int = 0
    text_bytes: int = 0
    """UTF-8 bytes of the text that is learnt."""
    tokens: int = 0
    """Targets, learnt or not: the tokens of the documents, their eos included."""
    pieces: int = 0
    rows: int = 0
    document_lengths: tuple[int, ...] = ()
    """Documents by length: entry i counts those of 2^(i-1) up to 2^i - 1 tokens."""
    piece_lengths: tuple[int, ...] = ()
    """Pieces likewise."""

    def __add__(self, other: Counts) -> Counts:
        def add(a: Any, b: Any) -> Any:
            if not isinstance(a, tuple):
                return a + b
            size = max(len(a), len(b))
            return tuple(sum(pair) for pair in zip(*(x + (0,) * (size - len(x)) for x in (a, b)), strict=True))

        mine, its = dataclasses.astuple(self), dataclasses.astuple(other)
        return Counts(*(add(a, b) for a, b in zip(mine, its, strict=True)))

    def efficiency(self, seq_len: int) -> float:
        """Share of the places in all rows that hold a token; 0 where there are no rows."""
        return self.tokens / (self.rows * seq_len) if self.rows else 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """A built dataset. `directory` is where it was found and no part of it."""

    format: int
    """Of the records (`records.py`)."""
    seq_len: int
    dtype: str
    """NumPy name of the type of the ids: uint16 or uint32."""
    vocab_size: int
    tokenizer: str
    """`encoding.tokenizer_digest` of the tokenizer.json beside the shards."""
    bos_id: int
    eos_id: int
    seed: int
    block_bytes: int
    heldout_fraction: float
    heldout_rule: str
    sources: dict[str, Any]
    """What was built from: patterns, files, bytes, and fingerprints of names with sizes and of the content."""
    unreadable: int
    """Documents left out because they could not be read."""
    train: Counts
    heldout: Counts
    shards: tuple[Shard, ...]
    directory: Path = Path()

    @property
    def codec(self) -> RowCodec:
        """What reads and writes the records."""
        return RowCodec(self.format, np.dtype(self.dtype).newbyteorder("<"))

    def counts(self, split: Split) -> Counts:
        return self.train if split == "train" else self.heldout

    def of(self, split: Split) -> list[Shard]:
        """The shards of a split in the order of their rows."""
        return [shard for shard in self.shards if shard.split == split]

    def fingerprint(self) -> str:
        """Of every training row and its place."""
        digest = hashlib.blake2b(f"{self.format} {self.seq_len} {self.dtype}".encode(), digest_size=16)
        for shard in self.of("train"):
            digest.update(shard.digest.encode())
        return digest.hexdigest()

    def to_json(self) -> str:
        plain = dataclasses.asdict(self)
        del plain["directory"]
        return json.dumps(plain, indent=1) + "\n"

    def check_files(self, *, content: bool = False) -> None:
        """Compares the shards with what is written about them.

        Args:
          content: also read every byte.

        Raises:
          ValueError: one message that lists every shard that is missing, of another size, or of other content.
        """
        problems = []
        for shard in self.shards:
            path = self.directory / shard.name
            if not path.is_file():
                problems.append(f"{path} is missing")
            elif (size := path.stat().st_size) != shard.bytes:
                problems.append(f"{path} has {size} bytes, expected {shard.bytes}")
            elif content and file_digest(path) != shard.digest:
                problems.append(f"{path} has other content than was built (checksum)")
        raise_problems(
            f"dataset {self.directory} is damaged (copy the files again, or delete the directory and build again)",
            problems,
        )


def load_manifest(directory: str | Path) -> Manifest:
    """The manifest of a built dataset.

    Raises:
      ValueError: no finished dataset there, or a manifest that cannot be read or is of another format.
    """
    directory = Path(directory)
    path = directory / MANIFEST_FILE
    if not path.is_file():
        reason = (
            "its build has not finished; the same `lfm data build` goes on with it"
            if (directory / BUILD_DIR).is_dir() else f"it has no {MANIFEST_FILE}; make one with `lfm data build`"
        )
        raise ValueError(f"{directory} is not a built dataset: {reason}")
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        if plain["format"] not in FORMATS:
            known = " and ".join(map(str, FORMATS))
            raise ValueError(f"it has format {plain['format']!r}, and this version reads formats {known}")
        shards = tuple(Shard(**shard) for shard in plain.pop("shards"))
        train, heldout = (counts_from_plain(plain.pop(split)) for split in SPLITS)
        return Manifest(**plain, train=train, heldout=heldout, shards=shards, directory=directory)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); restore it, or build the dataset again") from None


def counts_from_plain(plain: dict[str, Any]) -> Counts:
    fields: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in plain.items()}
    return Counts(**fields)


def file_digest(path: Path) -> str:
    """A fingerprint of a file's bytes."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
