"""Training checkpoints: the one place that touches Orbax (v1 API).

A checkpoint holds parameters and optimizer state as arrays, and the data iterator's state and the
resolved config as JSON metadata. It becomes visible by a rename, so a kill leaves the one before.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import logging
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint.experimental.v1 as ocp

from lfm_jax.train import processes
from lfm_jax.train.state import TrainState, merged, parted

CHECKPOINTS = "checkpoints"
"""Name of the checkpoint directory inside a run directory."""
DIGEST = "begun_with"
"""The key beside a run's config with a hash of the weights that it began with, if checkpoints do not hold them."""
DAMAGED = "damaged"
"""Name of the directory inside a run directory that checkpoints which could not be read are moved to."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint that was read whole."""

    step: int
    state: TrainState
    data: Any
    """State of the data iterator."""
    damaged: dict[int, str]
    """Later checkpoints that could not be read, and why."""


class CheckpointManager:
    """Saves and restores `TrainState` with data-iterator state and config; keeps the latest few.

    With many processes each writes and reads its own part, and all make the same calls.

    Args:
      run_dir: the run's directory; checkpoints lie in its `checkpoints` folder, one per step.
      keep: how many of the latest checkpoints to keep; None deletes nothing (for reading).
    """

    def __init__(self, run_dir: Path, *, keep: int | None):
        for name in ("absl", "asyncio"):  # Orbax logs pages about every failure, and raises it too.
            logging.getLogger(name).setLevel(logging.CRITICAL)
        policies: Any = ocp.training.preservation_policies
        self._run_dir = run_dir.resolve()
        self._checkpointer = ocp.training.Checkpointer(
            str(self._run_dir / CHECKPOINTS),
            preservation_policy=policies.PreserveAll() if keep is None else policies.LatestN(keep),
            cleanup_tmp_directories=keep is not None,
        )
        manager = self._checkpointer._manager
        # Orbax asks JAX on every save whether all shall stop, naming the saved step, though the answer counts the
        # calls of the loop: it would set that count back, and a stop could be missed.
        manager.reached_preemption = lambda step: False
        # Of many processes one whose writing failed waits for the others before Orbax tells it, and they never come.
        self._error: Exception | None = None
        manager._wait_for_checkpointers = self._noting(manager._wait_for_checkpointers)
        self._saving: Any = None
        self._saving_step = 0

    def steps(self) -> list[int]:
        """Steps with a checkpoint, the latest first."""
        return sorted((found.step for found in self._checkpointer.checkpoints), reverse=True)

    def latest_step(self) -> int | None:
        return max(self.steps(), default=None)

    def save(self, step: int, state: TrainState, data_state: Any, config: dict[str, Any]) -> None:
        """Starts an asynchronous save; blocks only for the copy from the device, and for a save under way.

        `data_state` must survive JSON. A step that is saved already is left alone.

        Raises:
          OSError: this save or the one before it failed.
        """
        if self.latest_step() != step:
            self.wait()
            try:
                self._saving = self._checkpointer.save_checkpointables_async(
                    step,
                    _checkpointables(state),
                    force=True,
                    custom_metadata={"data": json.loads(json.dumps(data_state)), "config": config},
                )
            except Exception as error:
                self._error = error
                raise self._failure(step, error) from error
            self._saving_step = step

    def check(self) -> None:
        """Raises OSError if the save under way has failed; returns at once."""
        self._settle(timeout=0)

    def wait(self) -> None:
        """Waits for the save under way; raises OSError if it failed."""
        self._settle(timeout=None)

    def _settle(self, timeout: float | None) -> None:
        while self._saving is not None:
            try:
                if self._error is not None:
                    raise self._error
                self._saving.result(timeout=0.1 if timeout is None else timeout)
                self._saving = None
            except TimeoutError:
                if timeout is not None:
                    return
            except Exception as error:
                self._saving, self._error = None, error
                raise self._failure(self._saving_step, error) from error

    def _noting(self, wait: Callable[[], None]) -> Callable[[], None]:
        def wait_and_note() -> None:
            try:
                wait()
            except Exception as error:
                self._error = error
                raise

        return wait_and_note

    def _failure(self, step: int, error: Exception) -> Exception:
        """The error to raise for a save that failed."""
        if processes.device_failed(error):  # Not the disk.
            return error
        folder = self._run_dir / CHECKPOINTS
        good = sorted((int(path.name) for path in folder.iterdir() if path.name.isdigit()), reverse=True)
        free = shutil.disk_usage(folder).free
        return OSError(
            f"the checkpoint of step {step} could not be written to {folder} ({free / 1e9:.1f} GB free there): "
            f"{_reason(error)}; "
            + (f"the checkpoint of step {good[0]} is intact" if good else "there is no earlier one")
            + "; make room, then start the same command again"
        )

    def restore(self, abstract: TrainState, step: int | None = None) -> tuple[TrainState, Any]:
        """The state and data-iterator state of `step` (None: the latest), shaped and laid out like `abstract`."""
        step = self._resolve(step)
        loaded = self._load(step, jax.tree.map(_abstract, _checkpointables(abstract)))
        params, frozen = parted(loaded["params"], abstract.params, abstract.frozen)
        return type(abstract)(params=params, frozen=frozen, **loaded["optimizer"]), self.metadata(step)["data"]

    def restore_latest(self, abstract: TrainState) -> Restored:
        """The latest checkpoint that all processes can read whole; nothing on disk is changed.

        Raises:
          ValueError: there is none; the message says for each what is wrong with it.
        """
        damaged: dict[int, str] = {}
        for step in self.steps():
            reason, state, data = "another process cannot read it", None, None
            with _quiet():
                for _ in range(2):  # A shared disk may fail once.
                    try:
                        state, data = self.restore(abstract, step)
                        break
                    except jax.errors.JaxRuntimeError:  # No memory, or no way to the others: not the checkpoint.
                        raise
                    except Exception as error:  # Orbax, TensorStore and JSON each raise their own.
                        reason = _reason(error)
            if processes.all_agree(state is not None) and state is not None:
                return Restored(step, state, data, damaged)
            damaged[step] = reason
        lines = "".join(f"\n  - step {step}: {reason}" for step, reason in damaged.items())
        raise ValueError(f"no checkpoint in {self._run_dir / CHECKPOINTS} can be read:{lines or ' there is none'}")

    def set_aside(self, step: int) -> Path:
        """Moves a checkpoint to the run's `damaged` folder, so that it can be looked at; returns where it lies now."""
        target = self._run_dir / DAMAGED / f"{step}"
        if processes.is_main():
            n = 1
            while target.exists():
                n += 1
                target = self._run_dir / DAMAGED / f"{step}-{n}"
            target.parent.mkdir(exist_ok=True)
            os.rename(self._run_dir / CHECKPOINTS / str(step), target)
        processes.barrier("set_aside")
        self._checkpointer.reload()
        return target

    def restore_params(self, abstract_params: Any, step: int | None = None) -> Any:
        """Only the parameters of `step` (None: the latest), shaped and laid out like `abstract_params`."""
        return self._load(self._resolve(step), {"params": jax.tree.map(_abstract, abstract_params)})["params"]

    def metadata(self, step: int | None = None) -> dict[str, Any]:
        """What was saved beside the arrays: `config` and `data`."""
        saved: Any = self._checkpointer.checkpointables_metadata(self._resolve(step)).custom_metadata
        return saved

    def latest_config(self) -> dict[str, Any] | None:
        """The config of the latest checkpoint whose metadata can be read; None without one."""
        for step in self.steps():
            # Orbax and JSON each raise their own; `restore_latest` says what is wrong.
            with _quiet(), suppress(Exception):
                return self.metadata(step)["config"]
        return None

    def close(self) -> None:
        """Waits for a save under way and lets go of the directory; raises OSError if the save failed."""
        try:
            self.wait()
        finally:
            if not (self._error and jax.process_count() > 1):  # Else it would wait for the others.
                with suppress(Exception):  # It raises again what failed, which is told already.
                    self._checkpointer.close()

    def _resolve(self, step: int | None) -> int:
        step = self.latest_step() if step is None else step
        if step is None:
            raise ValueError(f"there is no checkpoint in {self._run_dir / CHECKPOINTS}")
        return step

    def _load(self, step: int, target: dict[str, Any]) -> dict[str, Any]:
        # Each process reads by itself, without Orbax's barriers, at which the others would wait for one that failed.
        me = jax.process_index()
        alone = ocp.Context()
        alone.multiprocessing.primary_host, alone.multiprocessing.active_processes = me, {me}
        with alone:
            return ocp.load_checkpointables(str(self._run_dir / CHECKPOINTS / str(step)), target)


def has_checkpoint(run_dir: Path) -> bool:
    """Returns whether there is a finished checkpoint, without opening any."""
    return any(path.name.isdigit() for path in (run_dir / CHECKPOINTS).glob("*"))


def _checkpointables(state: TrainState) -> dict[str, Any]:
    """All weights by themselves, trained or not, so that they load alone."""
    fields = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
    if fields.pop("others"):
        raise ValueError("other models are not saved; make them again (Training.stored)")
    return {"params": merged(fields.pop("params"), fields.pop("frozen")), "optimizer": fields}


def _reason(error: BaseException) -> str:
    """The first line of what began a chain of errors."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__ or error
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:300]}" if text else type(error).__name__


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the pages that are written about a checkpoint that cannot be read, besides what is raised."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda unraisable: None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            yield
            gc.collect()  # What was left unfinished complains when it goes.
    finally:
        sys.unraisablehook = hook


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    """Shape, dtype and layout; an array without one goes to this process's first device."""
    sharding = getattr(x, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
