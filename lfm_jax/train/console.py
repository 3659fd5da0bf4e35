"""What a person sees while a run goes: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import sys
from types import TracebackType

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lfm_jax.units import clock

_SMOOTHING = 0.9
"""Weight of the past in the running means of loss and speed."""


class Console:
    """Progress of a run of `steps` optimizer steps: step, loss, tokens/s, time left.

    Args:
      steps: steps in all.
      log_every: steps between lines where standard error is not a terminal.
      quiet: show nothing, in all processes of a run but one; the clock goes on.
    """

    def __init__(self, steps: int, *, log_every: int, quiet: bool = False):
        self._steps, self._log_every = steps, log_every
        self._rich = RichConsole(stderr=True, quiet=quiet)
        self._live = sys.stderr.isatty() and not quiet
        self._progress = Progress(
            TextColumn("[bold]train"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(), console=self._rich, disable=not self._live,
        )
        self._task = self._progress.add_task("train", total=steps, text="compiling ...")
        self._loss: float | None = None
        self._seconds_per_step: float | None = None
        self._clock: float | None = None

    def expect(self, steps: int) -> None:
        """Sets the number of steps, once it is known."""
        self._steps = steps
        self._progress.update(self._task, total=steps)

    def __enter__(self) -> Console:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def note(self, text: str) -> None:
        """A line that stays."""
        self._rich.print(text, highlight=False, markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """A line that stays and stands out."""
        self._rich.print(f"warning: {text}", style="bold yellow", highlight=False, markup=False, soft_wrap=True)

    def restart_clock(self) -> None:
        """Leaves what happened since the last step (compilation, evaluation) out of the next step's time."""
        self._clock = None

    def step(self, step: int, loss: float, tokens: int, ended: float) -> float | None:
        """Shows a step that ended at a time in seconds. Returns its tokens/s, None behind `restart_clock`."""
        seconds = None if self._clock is None else max(ended - self._clock, 1e-9)
        self._clock = ended
        if math.isfinite(loss):  # One that is not would never leave the mean again.
            self._loss = loss if self._loss is None else _SMOOTHING * self._loss + (1 - _SMOOTHING) * loss
        if seconds is not None:
            past = seconds if self._seconds_per_step is None else self._seconds_per_step
            self._seconds_per_step = _SMOOTHING * past + (1 - _SMOOTHING) * seconds
        speed = None if seconds is None else tokens / seconds
        text = f"loss {math.nan if self._loss is None else self._loss:.4f}"
        if speed is not None and self._seconds_per_step is not None:
            left = (self._steps - step) * self._seconds_per_step
            text += f"  {tokens / self._seconds_per_step:,.0f} tokens/s  {clock(left)} left"
        self._progress.update(self._task, completed=step, text=text)
        if not self._live and (step % self._log_every == 0 or step == self._steps):
            self.note(f"step {step}/{self._steps}  {text}")
        return speed
