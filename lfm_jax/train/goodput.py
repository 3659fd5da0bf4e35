"""Goodput: where a run's wall-clock time goes, kept across its restarts.

Every moment since the run's first start has one label, so the labels always add up to the wall time:

- `step`: a device works on a training step whose result the run has kept.
- `lost`: it worked on a step that a kill or a rollback undid, so that it was done again.
- `compile`, `data`, `checkpoint`, `eval`: the host does that, and no step runs on the device meanwhile. Waiting for
  data while the device is busy costs nothing and counts as `step`.
- `restart`: the run was not running, or restored its state.
- `other`: the rest.

`goodput = step / wall`.
"""

from __future__ import annotations

import json
import queue
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, get_args

from lfm_jax.files import write_whole

LEDGER = "goodput.json"
Label = Literal["step", "lost", "compile", "data", "checkpoint", "eval", "restart", "other"]
LABELS: tuple[Label, ...] = get_args(Label)

_WRITE_EVERY = 10.0
"""Seconds between writes. What a kill leaves unwritten is found again as `restart`."""
_MARKS = 100
"""Checkpoints whose step time is remembered; more than a run keeps."""


_Result = tuple[Any, Future[float]]
"""What a step will make, and what is told when it is there."""


class Ledger:
    """Charges wall time to labels: `with ledger("data"): batch = next(data)`.

    Inside another `with` the inner label counts. A step that was dispatched and runs on while the host does something
    else is told with `running(metrics["loss"])`.

    Args:
      run_dir: where `goodput.json` is kept, replaced whole every few seconds; None keeps nothing (processes but the
        first).
      resume_step: the step that this start resumes from, 0 for a start from nothing. Step time behind it is lost.
      now: seconds since the epoch; for tests.
    """

    def __init__(self, run_dir: Path | None, *, resume_step: int, now: Callable[[], float] | None = None):
        self._now = now or _steady_clock()
        self._path = None if run_dir is None else Path(run_dir) / LEDGER
        self._lock = threading.RLock()
        self._stack: list[Label] = []
        self._busy = 0
        self._results: queue.SimpleQueue[_Result | None] | None = None
        self._since, self._written = self._now(), float("-inf")
        self._seconds: dict[str, float] = dict.fromkeys(LABELS, 0.0)
        self._marks: dict[int, float] = {}
        self._first_start, self._starts = self._since, 0
        self._restore()
        self._starts += 1
        self._taken = dict(self._seconds)
        self.undo(resume_step)

    @contextmanager
    def __call__(self, label: Label) -> Iterator[None]:
        """Charges the time inside to `label`, whatever way it is left."""
        if label not in LABELS:
            raise ValueError(f"label is {label!r}; choose one of {', '.join(LABELS)}")
        with self._lock:
            self._charge()
            self._stack.append(label)
        try:
            yield
        finally:
            with self._lock:
                self._charge()
                self._stack.pop()
            self._write(at_most_every=_WRITE_EVERY)

    def running(self, result: Any) -> Future[float]:
        """From now until `result` (a `jax.Array` that a dispatched step will make) is ready, time counts as `step`.

        Returns:
          The time, in seconds, at which it was ready: when a step ended, however late its numbers are read.
        """
        done: Future[float] = Future()
        with self._lock:
            self._charge()
            self._busy += 1
            if self._results is None:
                self._results = queue.SimpleQueue()
                threading.Thread(target=self._wait, args=(self._results,), daemon=True, name="goodput").start()
            self._results.put((result, done))
        return done

    def saved(self, step: int) -> None:
        """A checkpoint holds everything up to `step`: no kill can undo that any more."""
        with self._lock:
            self._charge()
            self._marks[step] = self._seconds["step"]
            for old in sorted(self._marks)[:-_MARKS]:
                del self._marks[old]
        self._write()

    def undo(self, step: int) -> None:
        """The run goes on from `step`: the step time behind it is lost. For a rollback within one process."""
        with self._lock:
            self._charge()
            kept = self._marks.get(max((s for s in self._marks if s <= step), default=-1), 0.0)
            self._seconds["lost"] += self._seconds["step"] - kept
            self._seconds["step"] = kept
            self._taken["step"] = min(self._taken["step"], kept)
            self._marks = {s: seconds for s, seconds in self._marks.items() if s <= step}
        self._write()

    def take(self, label: Label) -> float:
        """Seconds charged to `label` since the last time it was asked; for a record of each step."""
        with self._lock:
            self._charge()
            seconds = self._seconds[label] - self._taken[label]
            self._taken[label] = self._seconds[label]
        return seconds

    @property
    def goodput(self) -> float:
        """`step` over the wall time since the first start, 0 to 1."""
        return self.summary()["goodput"]

    def summary(self) -> dict[str, Any]:
        """goodput, wall_seconds since the first start, starts, and the seconds of each label, which add up to wall."""
        with self._lock:
            self._charge()
            wall = self._since - self._first_start
            return {
                "goodput": self._seconds["step"] / wall if wall > 0 else 0.0,
                "wall_seconds": wall,
                "starts": self._starts,
                "seconds": dict(self._seconds),
            }

    def close(self) -> None:
        """Writes the ledger a last time, and ends the thread that waits for results once it has seen all of them."""
        with self._lock:
            if self._results is not None:
                self._results.put(None)
                self._results = None
        self._write()

    def _charge(self) -> None:
        """Gives the time since the last change to the label that was on."""
        now = self._now()
        label = "step" if self._busy else self._stack[-1] if self._stack else "other"
        self._seconds[label] += now - self._since
        self._since = now

    def _wait(self, results: queue.SimpleQueue[_Result | None]) -> None:
        while (given := results.get()) is not None:
            result, done = given
            del given
            with suppress(Exception):  # The loop meets the same failure where it reads the result.
                result.block_until_ready()
            del result
            with self._lock:
                self._charge()
                self._busy -= 1
                done.set_result(self._since)

    def _restore(self) -> None:
        if self._path is None or not self._path.exists():
            return
        try:
            saved = json.loads(self._path.read_text())
            seconds: dict[str, float] = {label: float(saved["seconds"][label]) for label in LABELS}
            marks = {int(step): float(value) for step, value in saved["marks"].items()}
            self._first_start, self._starts = float(saved["first_start"]), int(saved["starts"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            warnings.warn(f"{self._path} cannot be read ({error!r}); goodput is counted anew from here", stacklevel=3)
            return
        self._seconds, self._marks = seconds, marks
        # Whatever has no label yet is the time between the last write and now.
        self._seconds["restart"] += self._since - self._first_start - sum(seconds.values())

    def _write(self, *, at_most_every: float = 0.0) -> None:
        if self._path is None or self._since - self._written < at_most_every:
            return
        with self._lock:
            self._charge()
            self._written = self._since
            content = {"first_start": self._first_start, "starts": self._starts, "seconds": self._seconds,
                       "marks": self._marks}
            try:
                write_whole(self._path, json.dumps(content, indent=1))
            except OSError as error:  # A run is worth more than its ledger.
                warnings.warn(f"{self._path} cannot be written ({error}); goodput is not kept on", stacklevel=3)
                self._path = None


def describe(summary: dict[str, Any]) -> str:
    """One line for a person: `goodput 91.2 % of 1:02:03: step 91.2 %, compile 5.0 %, ...`, largest first."""
    wall = summary["wall_seconds"]
    if wall <= 0:
        return "goodput: no time has passed"
    shares = sorted(((seconds / wall, label) for label, seconds in summary["seconds"].items()), reverse=True)
    parts = ", ".join(f"{label} {share:.1%}" for share, label in shares if share >= 0.0005)
    minutes, seconds = divmod(round(wall), 60)
    hours, minutes = divmod(minutes, 60)
    text = f"goodput {summary['goodput']:.1%} of {hours}:{minutes:02}:{seconds:02}"
    return f"{text} since the first of {summary['starts']} starts: {parts}".replace("%", " %")


def _steady_clock() -> Callable[[], float]:
    """Seconds since the epoch that never run backwards within a process."""
    offset = time.time() - time.monotonic()
    return lambda: offset + time.monotonic()
