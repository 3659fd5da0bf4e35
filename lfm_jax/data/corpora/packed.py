"""Lines of files that are packed whole into rows: what corpora of chats and of pairs share.

Everything is read, checked and packed when a corpus is opened, so that a bad line ends a run before it begins. What
shares a row is fixed by the seed; the order of the rows is new in each epoch.

Dimensions: B rows of a batch, T time.
"""

from __future__ import annotations

import abc
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import batched
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from lfm_jax.data.batch import Batch, Row, batches_of
from lfm_jax.data.chats import OPENERS
from lfm_jax.data.config import ChatData
from lfm_jax.data.corpora.corpus import check_rows
from lfm_jax.data.encoding import Tokens
from lfm_jax.data.filling import fill_rows
from lfm_jax.data.heldout import is_heldout
from lfm_jax.data.records import SPANS_FORMAT, RowCodec
from lfm_jax.data.sources import SourceFile, find_files
from lfm_jax.problems import raise_problems

if TYPE_CHECKING:
    import grain

Group = tuple[Tokens, ...]
"""What one line becomes: pieces that stand beside each other in a row."""
Beside = Callable[[int, Row], Row]
"""(number of a row, the row) -> further arrays of it."""


class Line(Protocol):
    """What a line of a file holds. As a text it is its file and line."""

    @property
    def text(self) -> str:
        """What decides whether it is held out."""
        ...


class PackedRows(Sequence[Row]):
    """Rows in memory, as records; what became of the lines.

    Attributes:
      learnt: of each row, how many targets are learnt.
    """

    def __init__(self, noun: str, lines: int, groups: Iterable[tuple[Group, Group | None]], codec: RowCodec,
                 config: ChatData, most: int | None):
        """
        Args:
          groups: each whole and as it fits into a row, or None where it is dropped.
          most: groups in a row at most; None: any number.
        """
        self._noun, self._lines, self._codec, self._T = noun, lines, codec, config.seq_len
        self._cut, self._dropped = 0, 0
        kept = []
        for whole, fitted in groups:
            self._dropped += fitted is None
            if fitted is not None:
                self._cut += _pairs(fitted) < _pairs(whole)
                kept.append(tuple(piece._replace(ids=piece.ids.astype(codec.dtype)) for piece in fitted))
        self._tokens = sum(map(_pairs, kept))
        learnt = [sum(int(piece.learnt()[1:].sum()) for piece in group) for group in kept]
        filled = fill_rows(list(map(_pairs, kept)), self._T, config.seed)
        # Rows begin with the longest groups; readers shuffle them.
        rows = [part for row in filled for part in batched(row, most or len(row))]
        self._records = [codec.encode([piece for i in row for piece in kept[i]]) for row in rows]
        self.learnt = np.array([sum(learnt[i] for i in row) for row in rows], np.int64)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: Any) -> Any:
        """A row (`batch.py`)."""
        return self._codec.decode(self._records[index], self._T)

    def digest(self) -> str:
        """A fingerprint of all rows."""
        digest = hashlib.blake2b(digest_size=16)
        for record in self._records:
            digest.update(hashlib.blake2b(record, digest_size=16).digest())
        return digest.hexdigest()

    def __str__(self) -> str:
        full = f", rows {self._tokens / (len(self) * self._T):.0%} full" if len(self) else ""
        over = "".join(f", {count:,} longer than {self._T:,} tokens {what}"
                       for count, what in ((self._cut, "cut"), (self._dropped, "dropped")) if count)
        return (f"{self._lines:,} {self._noun}s{over}, {self._tokens:,} tokens, {self.learnt.sum():,} of them learnt"
                f"{full}")


class PackedCorpus[L: Line](abc.ABC):
    """The lines of `config.sources`; as a `Corpus`, but that what is held out is measured otherwise than by the byte.

    Attributes:
      train_rows, heldout_rows: all rows, in the order in which they are numbered.

    Raises:
      ValueError: on construction: one message that lists every file and line that cannot be used, or nothing is left to
        learn from or to hold out.
    """

    noun: ClassVar[str]
    """What a line is called."""
    most: ClassVar[int | None] = None
    """Lines that share a row at most. None: any number."""

    def __init__(self, config: ChatData, vocab_size: int):
        self._config = config
        problems: list[str] = []
        lines = self._split(problems)
        codec = RowCodec(SPANS_FORMAT, np.dtype("<u2" if vocab_size <= 2**16 else "<u4"))
        self.train_rows, self.heldout_rows = (
            PackedRows(self.noun, len(some), ((group, self._fitted(group)) for group in self.encoded(some, problems)),
                       codec, config, self.most)
            for some in lines
        )
        raise_problems(f"{self.noun}s cannot be used", problems)
        for some, rows, name in zip(lines, (self.train_rows, self.heldout_rows), ("sources", "heldout"), strict=True):
            if some and not rows:
                raise ValueError(f"{name}: every {self.noun} is longer than seq_len {config.seq_len}; raise seq_len, "
                                 "or set too_long to cut")

    @abc.abstractmethod
    def read(self, files: Sequence[SourceFile], ignore: Sequence[str], problems: list[str]) -> list[L]:
        """All lines of some files; `problems` gets a line for each that cannot be used."""

    @abc.abstractmethod
    def encoded(self, lines: Sequence[L], problems: list[str]) -> Iterator[Group]:
        """The tokens of lines; `problems` gets a line for each that cannot be used, which is passed over."""

    @abc.abstractmethod
    def cut(self, group: Group, T: int) -> Group | None:
        """A group of at most T pairs (input, target) that is left of a longer one; None if nothing of use is."""

    def _fitted(self, group: Group) -> Group | None:
        if _pairs(group) <= self._config.seq_len:
            return group
        return self.cut(group, self._config.seq_len) if self._config.too_long == "cut" else None

    @property
    def batch_size(self) -> int:
        return self._config.batch_size

    @property
    def rows(self) -> int:
        """Training rows of one epoch."""
        return len(self.train_rows)

    def steps(self, epochs: float) -> int:
        """Batches of so many epochs; the last one goes on into the next epoch."""
        return math.ceil(epochs * self.rows / self.batch_size)

    def __str__(self) -> str:
        parts = [f"{self.train_rows}, {self.rows:,} rows an epoch"]
        return "; held out: ".join(parts + ([str(self.heldout_rows)] if self.heldout_rows else []))

    def train_batches(self, rows: np.ndarray | None = None, beside: Beside | None = None) -> grain.DatasetIterator:
        """Endless batches; see `Corpus.train_batches`."""
        config = self._config
        check_rows(rows, config.batch_size)
        import grain

        from lfm_jax.data.guarded import GuardedIterator
        from lfm_jax.data.shards import batches

        # Grain shuffles epoch e with seed + e, so seeds as close as 0 and 1 would share their orders.
        order_seed = int(np.random.SeedSequence(config.seed).generate_state(1)[0])
        source = grain.MapDataset.source(_Joined(self.train_rows, beside))
        found = batches(source.shuffle(seed=order_seed).repeat(), config.batch_size, rows, config.prefetch)
        fingerprint = f"{self.train_rows.digest()}-{config.seq_len}-{config.batch_size}-{config.seed}"
        return GuardedIterator(found, fingerprint)

    def heldout_batches(self, beside: Beside | None = None) -> Iterator[Batch]:
        """One pass over what is held out, always in the same batches; none where nothing is."""
        return batches_of(_Joined(self.heldout_rows, beside), self._config.batch_size)

    def _split(self, problems: list[str]) -> tuple[list[L], list[L]]:
        """(training lines, held-out lines)."""
        config, nouns = self._config, f"{self.noun}s"
        found = find_files(config.sources, suffixes=tuple(OPENERS))
        sides: tuple[list[L], list[L]] = [], []
        if config.heldout:
            held = find_files(config.heldout, suffixes=tuple(OPENERS))
            paths = {file.path for file in held}
            files = [file for file in found if file.path not in paths]
            if not files:
                raise ValueError(
                    f"heldout {list(config.heldout)} takes every file of sources; name fewer, or add sources")
            sides = self.read(files, config.ignore, problems), self.read(held, config.ignore, problems)
        else:
            for line in self.read(found, config.ignore, problems):
                sides[is_heldout(line.text, config.heldout_fraction)].append(line)
        raise_problems(f"{nouns} cannot be used", problems)
        if not sides[0]:
            raise ValueError(f"sources {list(config.sources)}: no {self.noun} is left to learn from; name files with "
                             f"{nouns}")
        if not sides[1] and (config.heldout or config.heldout_fraction > 0):
            raise ValueError(
                f"heldout: no {self.noun} in {list(config.heldout)}" if config.heldout else
                f"heldout_fraction {config.heldout_fraction} of {len(sides[0])} {nouns} leaves none held out; name "
                "files in `heldout`, raise heldout_fraction, or set it to 0 to hold out none")
        return sides


class _Joined(Sequence[Row]):
    """Rows with what stands beside them."""

    def __init__(self, rows: PackedRows, beside: Beside | None):
        self._rows, self._beside = rows, beside

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        row = self._rows[index]
        return row if self._beside is None else {**row, **self._beside(int(index), row)}


def shortened(tokens: Tokens, pairs: int) -> Tokens:
    """The first pairs (input, target) of a piece."""
    assert tokens.spans is not None
    return Tokens(tokens.ids[: pairs + 1], np.clip(tokens.spans, 0, pairs + 1))


def _pairs(group: Group) -> int:
    return sum(len(piece.ids) - 1 for piece in group)
