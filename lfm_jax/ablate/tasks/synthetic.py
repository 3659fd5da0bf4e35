"""What the synthetic tasks share: rows made from a seed and a number when they are asked for, and batches of them.

A batch is a dict of int32 arrays [B, T], as in `data/pipeline.py`: tokens, targets (LOSS_IGNORE but where an answer is
due), segment_ids (1 everywhere: a row is one document) and positions.

Dimensions: B rows, T time.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import numpy as np

from lfm_jax.data.pipeline import Batch
from lfm_jax.train.loss import LOSS_IGNORE

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


class SyntheticTask(Protocol):
    """A task whose rows are drawn, not read: a frozen dataclass, the section of a study that says all of it."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    title: ClassVar[str]
    curve_axes: ClassVar[Mapping[str, str]]
    """By name of a curve: what its x is."""

    @property
    def steps(self) -> int:
        """Optimizer steps of a run."""
        ...

    @property
    def batch_size(self) -> int:
        """B, rows of one optimizer step."""
        ...

    @property
    def heldout_rows(self) -> int:
        """Rows that each variant is measured on."""
        ...

    @property
    def vocab_size(self) -> int:
        """V, ids that tokens and targets are of."""
        ...

    @property
    def seq_len(self) -> int:
        """T of training rows."""
        ...

    @property
    def chance(self) -> float:
        """Expected accuracy of a guess that is uniform over the possible answers."""
        ...

    def variants(self) -> tuple[Variant, ...]:
        """What is measured; at least one is scored."""
        ...

    def row(self, rng: np.random.Generator, variant: Variant | None) -> tuple[np.ndarray, np.ndarray]:
        """Draws (tokens, targets), int32 [T]: targets[t] should follow tokens[t]; LOSS_IGNORE where no answer is due.

        Args:
          variant: one of `variants()`, or None for a training row.
        """
        ...


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
    batches = rows.batch(task.batch_size, drop_remainder=True, batch_fn=lambda rows: _batch(rows, task.batch_size))
    endless = batches.repeat().to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=PREFETCH))
    return iter(endless)


def heldout_batches(task: SyntheticTask) -> Iterator[tuple[Variant, Batch]]:
    """Every held-out row once, variant after variant: the same for every model and seed, and drawn from seeds that no
    training row has. The last batch of a variant is filled up with rows of padding, without targets.
    """
    for variant in task.variants():
        words = (_HELDOUT, _word(type(task).__name__), _word(variant.curve), variant.x)
        for start in range(0, task.heldout_rows, task.batch_size):
            numbers = range(start, min(start + task.batch_size, task.heldout_rows))
            rows = [task.row(np.random.default_rng((*words, i)), variant) for i in numbers]
            yield variant, _batch(rows, task.batch_size)


class _TrainRows:
    """The training rows of a seed: a Grain `RandomAccessDataSource`."""

    def __init__(self, task: SyntheticTask, seed: int):
        self._task, self._seed = task, seed
        self._words = (_TRAIN, _word(type(task).__name__))

    def __len__(self) -> int:
        return NUM_ROWS

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        # The seed comes last: it may be of several words, and all before it are of one.
        return self._task.row(np.random.default_rng((*self._words, int(index), self._seed)), None)


def _word(name: str) -> int:
    """32 bits of a name, the same in every process."""
    return zlib.crc32(name.encode())


def _batch(rows: Sequence[tuple[np.ndarray, np.ndarray]], batch_size: int) -> Batch:
    """Rows as a batch of B, those that are missing padded."""
    tokens_BT, targets_BT = (np.stack(column) for column in zip(*rows, strict=True))
    short, T = batch_size - len(rows), tokens_BT.shape[1]
    segment_ids_BT = np.ones_like(tokens_BT)
    positions_BT = np.broadcast_to(np.arange(T, dtype=np.int32), tokens_BT.shape)
    whole = {"tokens": tokens_BT, "targets": targets_BT, "segment_ids": segment_ids_BT, "positions": positions_BT}
    if not short:
        return whole | {"positions": positions_BT.copy()}
    fill = {"targets": LOSS_IGNORE}
    return {key: np.pad(x, ((0, short), (0, 0)), constant_values=fill.get(key, 0)) for key, x in whole.items()}


# ---------------------------------------------------------------- checks of fields


def count_problems(task: SyntheticTask, section: str, counts: Mapping[str, int]) -> list[str]:
    """What is wrong with fields that are whole numbers, or tuples of them.

    Args:
      section: where the task's fields are in a study.
      counts: least value by name; `steps`, `batch_size`, `heldout_rows` and `test_lengths` are checked always.
    """
    problems = []
    for name, least in {**counts, "test_lengths": 1, "steps": 1, "batch_size": 1, "heldout_rows": 1}.items():
        value = getattr(task, name)
        if not isinstance(value, tuple):
            if not _is_count(value, least):
                problems.append(f"{section}.{name} is {value!r}; it must be a whole number of at least {least}")
        elif not all(_is_count(v, least) for v in value) or len(set(value)) < len(value):
            problems.append(
                f"{section}.{name} is {list(value)}; it must list different whole numbers of at least {least}"
            )
    return problems


def length_problems(section: str, length: int, test_lengths: Sequence[int], least: int, why: str) -> list[str]:
    """What is wrong with the lengths of rows, themselves valid counts.

    Args:
      least: the shortest row that holds what a row must, and `why` that is so.
    """
    problems = []
    if length < least:
        problems.append(f"{section}.length is {length}; it must be at least {least}, {why}")
    shorter = [T for T in test_lengths if length >= T]
    if shorter:
        problems.append(f"{section}.test_lengths has {shorter}; they must be above {section}.length {length}")
    return problems


def length_variants(length: int, test_lengths: Sequence[int], *, scored: bool) -> tuple[Variant, ...]:
    """The curve over length: training length, then the longer ones.

    Args:
      scored: whether rows of training length count in the score.
    """
    return tuple(Variant("length", T, T, scored and length == T) for T in (length, *sorted(test_lengths)))


def _is_count(value: Any, least: int) -> bool:
    return type(value) is int and value >= least
