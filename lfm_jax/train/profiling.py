"""An xprof trace of some steps of a run: `lfm train RECIPE --profile 10-12`.

The trace lies in `run_dir/profile`, for `xprof RUN_DIR/profile` or TensorBoard's profile plugin. Its operations carry
the named scopes of the step: `layer_0`, `operator`, `feed_forward`, `loss`, `optimizer`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

PROFILE = "profile"
"""Name of the trace's directory inside a run directory."""


def parse_profile(text: str, steps: int) -> range:
    """The steps that `10-12`, `steps=10-12` or `10` names, counted from 1, both ends included.

    Raises:
      ValueError: no such form, an empty range, or steps that a run of `steps` steps does not have.
    """
    match = re.fullmatch(r"(?:steps=)?(\d+)(?:-(\d+))?", text.strip())
    if match is None:
        raise ValueError(f"profile is {text!r}; give the steps to trace, for example 10-12")
    first, last = int(match[1]), int(match[2] or match[1])
    if first < 1 or last < first:
        raise ValueError(f"profile is {text!r}; steps count from 1 and the first must not be behind the last")
    if last > steps:
        raise ValueError(f"profile is {text!r}, but the run has {steps} steps; name steps within it")
    return range(first, last + 1)


class Profiler:
    """Traces the given steps of a loop.

    ```
    profiler = Profiler(parse_profile("10-12", steps), run_dir)
    with profiler.step(n):
        state, metrics = train_step(state, batch)
    profiler.after(n, metrics)
    ```

    Args:
      steps: steps to trace; None traces nothing. A resumed run traces those that are still to come.
      run_dir: the run's directory.
    """

    def __init__(self, steps: range | None, run_dir: Path):
        self._steps = steps or range(0)
        self.path = Path(run_dir) / PROFILE
        self._tracing = False

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around the dispatch of step `number`; begins the trace at the first step to be traced."""
        if number not in self._steps:
            yield
            return
        if not self._tracing:
            jax.profiler.start_trace(self.path)
            self._tracing = True
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield

    def after(self, number: int, result: Any) -> bool:
        """Ends the trace behind its last step, when the device has made `result`. True if it did."""
        if not self._tracing or number < self._steps[-1]:
            return False
        jax.block_until_ready(result)
        self.close()
        return True

    def close(self) -> None:
        """Ends a trace that is still going on, as when a run is stopped."""
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
