"""What the synthetic tasks share: rows made from a seed and a number when they are asked for, and batches of them.

A batch is a dict of int32 arrays [B, T], as in `data/batch.py`: tokens, targets (LOSS_IGNORE but where an answer is
due), segment_ids (1 everywhere: a row is one document) and positions.

Dimensions: B rows, T time.
"""

from __future__ import annotations

import abc
import dataclasses
import zlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from lfm_jax.data.batch import Batch, Row, batches_of
from lfm_jax.problems import raise_problems

if TYPE_CHECKING:
    import grain

BLANK = 0
"""Token between those that matter; `ModelConfig.pad_id` by default."""
MIN_VOCAB = 8
"""A smaller vocabulary does not have the `bos_id` and `eos_ids` that `ModelConfig` names by default."""
NUM_ROWS = 2**31
"""Training rows of a seed before they come again: more than any run takes, and a number that fits Grain."""
PREFETCH = 2
"""Training batches made ahead, on one thread."""
_TRAIN, _HELDOUT = 0, 1
"""First word of the seed of a row, so that no training row is drawn as a held-out row is."""


class Variant(NamedTuple):
    """One kind of held-out rows: a point of a curve."""

    curve: str
    """Name of the curve, a key of `SyntheticTask.curve_axes`."""
    x: int
    """Where on its axis."""
    length: int
    """T of its rows."""
    scored: bool
    """Whether it counts in the score, which is the mean accuracy over the variants that do. They are drawn as training
    rows are; the others ask for more."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SyntheticTask(abc.ABC):
    """A task whose rows are drawn, not read: the section of a study that says all of it.

    Raises:
      ValueError: on construction, one message that lists every bad field.
    """

    section: ClassVar[str]
    """Name of the section in a study."""
    title: ClassVar[str]
    curve_axes: ClassVar[Mapping[str, str]] = {"length": "tokens of a row"}
    """By name of a curve: what its x is."""
    least: ClassVar[Mapping[str, int]]
    """Least values of the task's own whole numbers, by field."""

    length: int
    """T of training rows."""
    test_lengths: tuple[int, ...] = ()
    """Longer rows to measure too; the score leaves them out."""
    steps: int = 1000
    """Optimizer steps of a run."""
    batch_size: int = 8
    """B, rows of one optimizer step."""
    heldout_rows: int = 256
    """Rows that each point of a curve is measured on."""
    peak_lrs: tuple[float, ...] = ()
    """In place of the study's."""

    def __post_init__(self) -> None:
        problems = self._count_problems() + self._other_problems()
        if not problems:  # The rest does arithmetic on the fields.
            problems = self._length_problems() + self._misfits()
        raise_problems(f"{type(self).__name__} is not valid", problems)

    @property
    @abc.abstractmethod
    def vocab_size(self) -> int:
        """V, ids that tokens and targets are of."""

    @property
    def seq_len(self) -> int:
        """T of training rows."""
        return self.length

    @property
    @abc.abstractmethod
    def chance(self) -> float:
        """Expected accuracy of a guess that is uniform over the possible answers."""

    def variants(self) -> tuple[Variant, ...]:
        """What is measured; at least one is scored."""
        return self.length_variants(scored=True)

    def length_variants(self, *, scored: bool) -> tuple[Variant, ...]:
        """The curve over length: training length, then the longer ones.

        Args:
          scored: whether rows of training length count in the score.
        """
        lengths = (self.length, *sorted(self.test_lengths))
        return tuple(Variant("length", T, T, scored and self.length == T) for T in lengths)

    @abc.abstractmethod
    def row(self, rng: np.random.Generator, variant: Variant | None) -> tuple[np.ndarray, np.ndarray]:
        """Draws (tokens, targets), int32 [T]: targets[t] should follow tokens[t]; LOSS_IGNORE where no answer is due.

        Args:
          variant: one of `variants()`, or None for a training row.
        """

    @abc.abstractmethod
    def shortest(self) -> tuple[int, str]:
        """The shortest row that holds what a row must, and why."""

    def _other_problems(self) -> list[str]:
        """What is wrong with fields that are no whole numbers."""
        return []

    def _misfits(self) -> list[str]:
        """What of valid fields does not fit together, besides lengths."""
        return []

    def _count_problems(self) -> list[str]:
        problems = []
        common = {"length": 1, "test_lengths": 1, "steps": 1, "batch_size": 1, "heldout_rows": 1}
        for name, least in {**self.least, **common}.items():
            value, field = getattr(self, name), f"{self.section}.{name}"
            if not isinstance(value, tuple):
                if not _is_count(value, least):
                    problems.append(f"{field} is {value!r}; it must be a whole number of at least {least}")
            elif not all(_is_count(v, least) for v in value) or len(set(value)) < len(value):
                problems.append(f"{field} is {list(value)}; it must list different whole numbers of at least {least}")
        return problems

    def _length_problems(self) -> list[str]:
        problems, (least, why) = [], self.shortest()
        if self.length < least:
            problems.append(f"{self.section}.length is {self.length}; it must be at least {least}, {why}")
        shorter = [T for T in self.test_lengths if self.length >= T]
        if shorter:
            problems.append(
                f"{self.section}.test_lengths has {shorter}; they must be above {self.section}.length {self.length}"
            )
        return problems


def train_batches(task: SyntheticTask, seed: int) -> grain.DatasetIterator:
    """Endless batches of training rows, made when they are asked for.

    Row i of a seed is a function of the task, seed and i alone, on any machine, so that `get_state()` is a number and
    an iterator given it by `set_state()` goes on with exactly the batches that were to come.

    Raises:
      ValueError: a negative seed.
    """
    import grain

    if seed < 0:
        raise ValueError(f"seed is {seed}; it must not be negative")
    rows = grain.MapDataset.source(_TrainRows(task, seed))
    B = task.batch_size
    batches = rows.batch(B, drop_remainder=True, batch_fn=lambda rows: next(batches_of(rows, B)))
    endless = batches.repeat().to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=PREFETCH))
    return iter(endless)


def heldout_batches(task: SyntheticTask) -> Iterator[tuple[Variant, Batch]]:
    """Every held-out row once, variant after variant: the same for every model and seed, and drawn from seeds that no
    training row has. The last batch of a variant is filled up with rows of padding, without targets.
    """
    for variant in task.variants():
        words = (_HELDOUT, _word(type(task).__name__), _word(variant.curve), variant.x)
        rows = (_row(task, (*words, i), variant) for i in range(task.heldout_rows))
        for batch in batches_of(rows, task.batch_size):
            yield variant, batch


class _TrainRows:
    """The training rows of a seed: a Grain `RandomAccessDataSource`."""

    def __init__(self, task: SyntheticTask, seed: int):
        self._task, self._seed = task, seed
        self._words = (_TRAIN, _word(type(task).__name__))

    def __len__(self) -> int:
        return NUM_ROWS

    def __getitem__(self, index: int) -> Row:
        # The seed comes last: it may be of several words, and all before it are of one.
        return _row(self._task, (*self._words, int(index), self._seed), None)


def _word(name: str) -> int:
    """32 bits of a name, the same in every process."""
    return zlib.crc32(name.encode())


def _row(task: SyntheticTask, seed: tuple[int, ...], variant: Variant | None) -> Row:
    """A row as batches are made of them: one document, without padding."""
    tokens_T, targets_T = task.row(np.random.default_rng(seed), variant)
    positions_T = np.arange(len(tokens_T), dtype=np.int32)
    return {"tokens": tokens_T, "targets": targets_T, "segment_ids": np.ones_like(tokens_T), "positions": positions_T}


def _is_count(value: Any, least: int) -> bool:
    return type(value) is int and value >= least
