"""What a frozen model says of every row that a run learns from: made once, before the run, and kept in files.

A directory has a manifest and, for each field and each SHARD_ROWS rows, a file `NAME-00000.npy` of the values at the
targets that are learnt, one row after another. Files are written whole, so what is interrupted goes on where it was;
the manifest says when all are there.

Dimensions: B rows of a batch, T time.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
import optax

from lfm_jax.adapters.trees import digest
from lfm_jax.data.batch import LOSS_IGNORE, Batch, Row, batches_of
from lfm_jax.data.corpora.packed import PackedRows
from lfm_jax.files import locked, say, whole, write_whole
from lfm_jax.model import LFM
from lfm_jax.pretrain.objective import NextToken
from lfm_jax.problems import raise_problems
from lfm_jax.train import processes
from lfm_jax.train.objective import DeviceBatch
from lfm_jax.train.run_dir import differences
from lfm_jax.train.step import Training

SHARD_ROWS = 256
MANIFEST, COMPLETE = "manifest.json", "complete"
SECONDS = 10
"""Between lines that say how far it is."""


class Field(NamedTuple):
    """What is kept for each learnt target."""

    shape: tuple[int, ...]
    dtype: str
    """In the files. Batches have int32 or float32."""


class Speaker(Protocol):
    """A frozen model, and what it says."""

    digest: str
    """Of its weights."""

    def __call__(self, batch: Batch) -> Mapping[str, np.ndarray]:
        """The fields, [B, T, ...] each."""
        ...


class Frozen:
    """A `Speaker`.

    Args:
      training: whose model it is, as in its first step.
      weights: of that model, whole arrays.
      says: (model, batch of rows) -> the fields.
    """

    def __init__(
        self, training: Training, weights: Any, says: Callable[[LFM, DeviceBatch], Mapping[str, jax.Array]], B: int,
        T: int,
    ):
        self.digest = digest(weights)
        objective = NextToken()
        training = dataclasses.replace(training, objective=objective, optimizer=optax.identity())
        self._training, self._weights = training, weights
        self._place = processes.BatchPlacer(objective.arrays, B, T)
        self._program: Any = processes.compiled_together(
            jax.jit(lambda held, batch: dict(says(training.model_of(*held), batch))))

    @cached_property
    def _held(self) -> tuple[Any, Any]:
        """On devices once something is asked: often only the digest is."""
        state, self._weights = self._training.placed_state(self._weights), None
        return state.params, state.frozen

    def __call__(self, batch: Batch) -> Mapping[str, np.ndarray]:
        found = self._program(self._held, self._place(self._place.local(batch)))
        return {name: processes.gathered(x) for name, x in found.items()}


class Stored:
    """The files of a directory, complete."""

    def __init__(self, directory: Path, rows: PackedRows, fields: Mapping[str, Field]):
        self._directory, self._fields = directory, dict(fields)
        self._offsets = np.concatenate([[0], np.cumsum(rows.learnt)])

    def beside(self, index: int, row: Row) -> Row:
        """The fields of a row, [T, ...] each; 0 where no target is learnt."""
        shard = index // SHARD_ROWS
        start, stop = self._offsets[index : index + 2] - self._offsets[shard * SHARD_ROWS]
        learnt = row["targets"] != LOSS_IGNORE
        made = {}
        for name, field in self._fields.items():
            values = np.zeros((len(learnt), *field.shape), "int32" if np.dtype(field.dtype).kind in "iu" else "float32")
            values[learnt] = self._file(name, shard)[start:stop]
            made[name] = values
        return made

    def __str__(self) -> str:
        return f"{self._directory}: {', '.join(self._fields)}"

    def missing(self) -> list[int]:
        """Shards that are not there yet.

        Raises:
          ValueError: one that is there is damaged.
        """
        shards = range(-(-(len(self._offsets) - 1) // SHARD_ROWS))
        return [shard for shard in shards if not all(self._is_there(name, shard) for name in self._fields)]

    def write(self, shard: int, values: Mapping[str, np.ndarray]) -> None:
        for name, x in values.items():
            with whole(self._path(name, shard)) as file:
                np.save(file, x.astype(self._fields[name].dtype))

    def _is_there(self, name: str, shard: int) -> bool:
        path, field = self._path(name, shard), self._fields[name]
        if not path.exists():
            return False
        first, last = shard * SHARD_ROWS, min((shard + 1) * SHARD_ROWS, len(self._offsets) - 1)
        shape = (self._offsets[last] - self._offsets[first], *field.shape)
        try:
            found = self._file(name, shard)
            damaged = found.shape != shape or found.dtype != field.dtype
        except (OSError, ValueError, EOFError):
            damaged = True
        if damaged:
            raise ValueError(f"{path} is damaged; delete it, and the same command makes it again")
        return True

    def _file(self, name: str, shard: int) -> np.ndarray:
        # Not kept open: there may be more shards than files that a process may hold.
        first, last = self._offsets[[shard * SHARD_ROWS, min((shard + 1) * SHARD_ROWS, len(self._offsets) - 1)]]
        return np.load(self._path(name, shard), mmap_mode="r" if last > first else None)  # Empty ones cannot be mapped.

    def _path(self, name: str, shard: int) -> Path:
        return self._directory / f"{name}-{shard:05d}.npy"


def stored(
    directory: Path, rows: PackedRows, fields: Mapping[str, Field], *, B: int, T: int, about: Mapping[str, Any],
    speaker: Callable[[], Speaker], resuming: bool = False,
) -> Stored:
    """Opens what is kept of rows, and makes what is missing of it, over the mesh in use; call it in every process.

    Args:
      about: what else must be as it was when the directory was begun, as plain data.
      speaker: where nothing is missing only its digest is looked at, and that too is left out if it raises ValueError,
        since its weights may be gone by then.
      resuming: what is complete is taken without a look at the speaker: the run has begun with it.

    Raises:
      ValueError: the directory is of other rows, other fields or other weights, or damaged.
    """
    wanted = {"rows": rows.digest(), "seq_len": T, "shard_rows": SHARD_ROWS,
              "fields": {name: [list(field.shape), field.dtype] for name, field in fields.items()}, **about}
    found = _manifest(directory)
    raise_problems(f"{directory} was made of something else; restore it, or delete the directory, which is then made "
                   "anew", differences(found, wanted))
    kept = Stored(directory, rows, fields)
    missing = kept.missing()
    if not missing and resuming:
        return kept
    try:
        model = speaker()
    except ValueError:
        if not missing:
            return kept
        raise
    if found and found["weights"] != model.digest:
        raise ValueError(f"{directory} was begun with other weights; restore them, or delete the directory, which is "
                         "then made anew")
    if not missing and found.get(COMPLETE):
        return kept
    main = processes.is_main()
    if main:
        directory.mkdir(parents=True, exist_ok=True)
    busy = f"another process writes {directory}; wait for it"
    with locked(directory, busy) if main else nullcontext():
        manifest = {**wanted, "weights": model.digest}
        _write_manifest(directory, manifest | {COMPLETE: False})
        _make(kept, missing, rows, model, B)
        _write_manifest(directory, manifest | {COMPLETE: True})
    processes.barrier(str(directory))
    return kept


def is_complete(directory: Path) -> bool:
    """Whether a directory was made to its end.

    Raises:
      ValueError: its manifest is damaged.
    """
    return _manifest(directory).get(COMPLETE, False)


def _make(kept: Stored, missing: list[int], rows: PackedRows, model: Speaker, B: int) -> None:
    main, said = processes.is_main(), time.monotonic()
    for done, shard in enumerate(missing):
        if main and (not done or time.monotonic() - said > SECONDS):
            said = time.monotonic()
            say(f"{kept}: {done * SHARD_ROWS:,} of {min(len(missing) * SHARD_ROWS, len(rows)):,} rows")
        parts = []
        first = shard * SHARD_ROWS
        for batch in batches_of((rows[i] for i in range(first, min(first + SHARD_ROWS, len(rows)))), B):
            learnt = batch["targets"] != LOSS_IGNORE
            parts.append({name: x[learnt] for name, x in model(batch).items()})
        if main:
            kept.write(shard, {name: np.concatenate([part[name] for part in parts]) for name in parts[0]})


def _write_manifest(directory: Path, content: Mapping[str, Any]) -> None:
    if processes.is_main():
        write_whole(directory / MANIFEST, json.dumps(content, indent=1))


def _manifest(directory: Path) -> dict[str, Any]:
    try:
        return json.loads((directory / MANIFEST).read_text())
    except FileNotFoundError:
        return {}
    except ValueError:
        raise ValueError(f"{directory / MANIFEST} is damaged; delete the directory, which is then made anew") from None
