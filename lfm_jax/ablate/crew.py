"""The processes of a study on one machine, and what stops them: signals and the end of the time granted."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from lfm_jax.train.children import Children
from lfm_jax.train.launch import STOPPED


class StopOrDeadline:
    """SIGINT, SIGTERM or the end of the time granted (`time.monotonic()`); a second signal acts as usual."""

    def __init__(self, until: float):
        from lfm_jax.train import processes

        self._signals = processes.StopRequest()
        self._until = until

    def __enter__(self) -> StopOrDeadline:
        self._signals.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._signals.__exit__(*exception)

    def due(self) -> bool:
        return self._signals.due() or self.left() <= 0

    def left(self) -> float:
        """Seconds of the time granted."""
        return self._until - time.monotonic()


def run_crew(processes: int, args: Sequence[str]) -> int:
    """The study in several processes here, each on its share of the cores; the worst of their statuses."""
    if not args:
        raise ValueError("processes above 1 starts `lfm ablate`: give its arguments too, the study's file first")
    cores = sorted(os.sched_getaffinity(0))
    with Children() as children:
        for i in range(processes):
            command = [sys.executable, "-m", "lfm_jax.cli", "ablate", *args, "--processes", str(processes),
                       "--index", f"{i}/{processes}"]
            child = children.start(command)
            if child is None:
                break
            with suppress(ProcessLookupError):  # Long before it makes threads.
                os.sched_setaffinity(child.pid, set(cores[i::processes]) or set(cores))
        statuses = [child.wait() for child in children.processes]
    if children.stopping:
        return STOPPED
    broken = [f"{i} (exit code {status})" for i, status in enumerate(statuses) if status not in (0, STOPPED)]
    if broken:
        raise ValueError(f"process {', '.join(broken)} ended before its work was done; its messages stand above, and "
                         "the same command goes on")
    return max(statuses)
