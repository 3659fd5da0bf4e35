"""The loop around a step, for whatever is trained: resume, step, look, evaluate, save, go back, stop.

There is one loop. A training run (`runner.py`) and a trial of an ablation study (`ablate/run.py`) give it their parts.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from lfm_jax.data.config import DataUsedUp
from lfm_jax.train.checkpoint import CheckpointManager, Restored
from lfm_jax.train.goodput import Label
from lfm_jax.train.objective import Metrics
from lfm_jax.train.step import GuardConfig

Values = Mapping[str, Any]


class DivergedError(ValueError):
    """Updates were skipped again and again, and going back does not help."""


class Data(Protocol):
    """Batches of this process's rows, whose place can be saved."""

    def __next__(self) -> Any: ...

    def get_state(self) -> Any:
        """Plain data, fit for JSON."""
        ...

    def set_state(self, state: Any) -> None: ...


@runtime_checkable
class Experience(Protocol):
    """Batches that the model in training makes: each is made by the state that it is then given to."""

    def next_for(self, state: Any) -> tuple[Any, Values]:
        """A batch, and what is reported of it beside the metrics of its step. What it takes of the state is given
        away with the step."""
        ...

    def get_state(self) -> Any:
        """As for `Data`."""
        ...

    def set_state(self, state: Any) -> None: ...


def next_batch(data: Data | Experience, state: Any) -> tuple[Any, Values]:
    """The next batch, for a state, and what is reported of it."""
    return data.next_for(state) if isinstance(data, Experience) else (next(data), {})


class Stop(Protocol):
    """Whether to stop now, between two steps."""

    def due(self) -> bool: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
    """What the driver works with. It does not look into states, batches or weights."""

    step: Callable[[Any, Any], tuple[Any, Metrics]]
    """(state, batch) -> (state, metrics) with loss, grad_norm, skipped and skipped_in_row, perhaps of several runs side
    by side."""
    data: Data | Experience
    place: Callable[[Any], Any]
    """A batch of `data` as the step takes it."""
    fresh: Callable[[], Any]
    """A new state; this or `remade` is called, once."""
    abstract: Callable[[], Any]
    """Shapes and layouts of a state as checkpoints hold it."""
    pack: Callable[[Any], Any] = lambda state: state
    """A state as checkpoints hold it."""
    unpack: Callable[[Any, Any], Any] = lambda state, kept: state
    """(what `pack` gave, the rest) -> a state."""
    kept: Callable[[Any], Any] = lambda state: None
    """The rest of a state, which never changes in a run."""
    remade: Callable[[], Any] = lambda: None
    """The rest when a run resumes."""
    evaluate: Callable[[Any], Values | None] | None = None
    """What is measured of a state; None: nothing is."""
    tasks: Callable[[Any], Values] | None = None
    """What else is, at its own pace."""
    manager: CheckpointManager
    config: dict[str, Any]
    """What is saved beside the arrays."""
    guard: GuardConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pace:
    """When something happens."""

    steps: int
    eval_every: int = 0
    """Steps between evaluations; the last step has one always. 0: only there."""
    tasks_every: int = 0
    """Likewise for `Parts.tasks`."""
    checkpoint_every: int = 0
    """Steps between checkpoints. 0: by steps none."""
    checkpoint_seconds: float = math.inf
    """Seconds between checkpoints."""
    save_last: bool = True
    """Save when all steps are done."""


class Watch:
    """Receives the driver's events. This base class ignores them; subclasses override what they need."""

    def note(self, text: str) -> None:
        """A line for a person."""

    def warn(self, text: str) -> None:
        """A line that stands out."""

    def doing(self, label: Label) -> AbstractContextManager[None]:
        """Around work of the host."""
        del label
        return nullcontext()

    def dispatching(self, step: int) -> AbstractContextManager[None]:
        """Around the dispatch of a step."""
        del step
        return nullcontext()

    def dispatched(self, step: int, metrics: Metrics) -> Future[float] | None:
        """The device has begun with a step. What is returned comes back in `finished`."""
        del step, metrics
        return None

    def finished(self, step: int, metrics: Metrics, ended: Future[float] | None) -> Values:
        """A step is done; returns its numbers on the host."""
        del step, ended
        return jax.device_get(dict(metrics))

    def evaluated(self, step: int, record: Values) -> None:
        """The state after `step` was measured."""

    def saved(self, step: int, seconds: float) -> None:
        """A checkpoint was begun, which held up the loop for so long."""

    def rolled_back(self, step: int, state: Any, came_from: int, rollbacks: int) -> None:
        """The run goes on from `step` again, with the state that it had there."""


class Driver:
    """One run.

    `start` resumes it or begins it; `run` goes on to its end or to a stop.

    Attributes:
      state: after `step` steps.
    """

    def __init__(self, parts: Parts, pace: Pace):
        self.parts, self.pace = parts, pace
        self.state: Any = None
        self.step = self.saved_at = 0
        self._watch = Watch()
        self._pending: list[tuple[int, Metrics, Future[float] | None]] = []
        self._skipped_in_row = self._rollbacks = 0
        self._save_due = False
        self._saved_time = time.monotonic()

    def start(self, watch: Watch) -> Restored | None:
        """Goes on from the latest checkpoint that can be read, which is returned, or begins.

        Raises:
          ValueError: there are checkpoints and none can be read, or they belong to other data.
        """
        self._watch = watch
        if not self.parts.manager.steps():
            self.state = self.parts.fresh()
            return None
        found = self.parts.manager.restore_latest(self.parts.abstract())
        self.parts.data.set_state(found.data)
        self._go_to(found, self.parts.remade())
        return found

    def run(self, stop: Stop, watch: Watch) -> Values | None:
        """Steps to the end, where the last evaluation is returned, or until `stop` is due: None.

        Raises:
          DivergedError: see `_roll_back`.
          DataUsedUp: the data does not last, since rollbacks passed over some; what is done is saved.
        """
        self._watch, pace, record = watch, self.pace, None
        while self.step < pace.steps and not stop.due():
            try:
                self._dispatch()
            except DataUsedUp:  # By rollbacks, which pass over data that was counted on.
                self._stop()
                raise
            last = self.step == pace.steps
            evaluate = self.parts.evaluate and (last or _every(pace.eval_every, self.step))
            tasks = self.parts.tasks if last or _every(pace.tasks_every, self.step) else None
            self._save_due |= (last and pace.save_last) or _every(pace.checkpoint_every, self.step)
            self._save_due |= time.monotonic() - self._saved_time > pace.checkpoint_seconds
            # The step before is fetched only now, so that the device never waits for the host.
            if self._fetch(0 if last or evaluate or tasks or self._save_due else 1):
                continue
            if evaluate:
                record = self.evaluate()
                if record is not None:
                    watch.evaluated(self.step, record)
            if tasks:
                with watch.doing("eval"):
                    found = tasks(self.state)
                watch.evaluated(self.step, found)
            # While updates are being skipped none is saved: each checkpoint is one to go back to.
            if self._save_due and (last or not self._skipped_in_row):
                self._save()
            self.parts.manager.check()
        if self.step < pace.steps:
            self._stop()
            return None
        return record

    def evaluate(self) -> Values | None:
        """What is measured of the state now."""
        if self.parts.evaluate is None:
            return None
        with self._watch.doing("eval"):
            return self.parts.evaluate(self.state)

    def _go_to(self, found: Restored, kept: Any) -> None:
        """Goes on from a checkpoint; later ones that cannot be read are put aside."""
        self.state = self.parts.unpack(found.state, kept)
        self.step = self.saved_at = found.step
        for step, reason in found.damaged.items():
            path = self.parts.manager.set_aside(step)
            self._watch.warn(f"the checkpoint of step {step} cannot be read and now lies in {path}: {reason}")

    def _dispatch(self) -> None:
        """Hands the next step to the device."""
        with self._watch.doing("data"):
            made, reports = next_batch(self.parts.data, self.state)
            batch = self.parts.place(made)
        with self._watch.dispatching(self.step + 1):
            self.state, metrics = self.parts.step(self.state, batch)
        self.step += 1
        metrics = {**metrics, **reports}
        self._pending.append((self.step, metrics, self._watch.dispatched(self.step, metrics)))

    def _fetch(self, keep: int) -> bool:
        """Looks at all finished steps but the last `keep`. True if the run went back to a checkpoint."""
        while len(self._pending) > keep:
            step, metrics, ended = self._pending.pop(0)
            values = self._watch.finished(step, metrics, ended)
            self._skipped_in_row = int(np.max(values["skipped_in_row"]))
            if self._skipped_in_row >= self.parts.guard.max_in_row:
                self._roll_back(step, values)
                return True
        return False

    def _roll_back(self, step: int, values: Values) -> None:
        """Goes back to the last checkpoint and on with new data: that behind what led here is passed over.

        It is the same after a kill: what is replayed from the checkpoint comes to the same end.

        Raises:
          DivergedError: there is no checkpoint, or no new one was reached since too many rollbacks.
        """
        limit, manager = self.parts.guard.max_rollbacks, self.parts.manager
        loss, norm = (np.array2string(np.asarray(values[name]), precision=4) for name in ("loss", "grad_norm"))
        what = (f"{self._skipped_in_row} updates in a row were skipped up to step {step} (loss {loss}, gradient norm "
                f"{norm})")
        mend = "lower optimizer.peak_lr, mend the data, or raise guard.spike if the gradients are sound"
        manager.wait()
        latest = manager.latest_step()
        if not limit:
            raise DivergedError(f"{what}; {mend}")
        if latest is None:
            raise DivergedError(f"{what}, and there is no checkpoint to go back to; {mend}, then start again")
        if self._rollbacks == limit:
            raise DivergedError(
                f"{what}, after {limit} rollbacks to the checkpoint of step {latest}; {mend}, then start the same "
                "command again, which resumes from there"
            )
        self._rollbacks += 1
        self._pending.clear()
        kept, self.state = self.parts.kept(self.state), None  # Its memory is needed.
        with self._watch.doing("restart"):
            self._go_to(manager.restore_latest(self.parts.abstract()), kept)
        self._skipped_in_row, self._save_due = 0, False
        self._watch.rolled_back(self.step, self.state, step, self._rollbacks)
        self._watch.warn(f"{what}: back to the checkpoint of step {self.step}; the data behind it is passed over")

    def _stop(self) -> None:
        """Saves what is done."""
        while self._pending:
            step, metrics, ended = self._pending.pop(0)
            self._skipped_in_row = int(np.max(self._watch.finished(step, metrics, ended)["skipped_in_row"]))
        if self._skipped_in_row:
            self._watch.note(f"stopped while updates were skipped; the checkpoint of step {self.saved_at} stands")
            return
        if self.step != self.saved_at:
            self._save()
        self._watch.note(f"stopped at step {self.step}; the same command resumes from there")

    def _save(self) -> None:
        began = time.monotonic()
        with self._watch.doing("checkpoint"):
            parts = self.parts
            parts.manager.save(self.step, parts.pack(self.state), parts.data.get_state(), parts.config)
        self._saved_time = time.monotonic()
        self.saved_at, self._save_due, self._rollbacks = self.step, False, 0
        self._watch.saved(self.step, self._saved_time - began)


def _every(interval: int, step: int) -> bool:
    return bool(interval) and step % interval == 0
