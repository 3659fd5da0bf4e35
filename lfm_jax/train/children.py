"""Processes that this one starts: none outlives it, and a signal to it asks all of them to stop."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable, Sequence
from typing import Any

from lfm_jax.files import say


class Children:
    """The processes started here, as a context.

    Inside it, the first SIGINT or SIGTERM is passed on as SIGTERM, a request to stop; a second one kills. Whatever
    still runs when the context ends is killed.
    """

    def __init__(self) -> None:
        self.stopping = False
        """A stop was asked for."""
        self.killed: set[int] = set()
        """Indices of the processes that were killed from here."""
        self.processes: list[subprocess.Popen[Any]] = []
        self._previous: dict[int, Callable[..., Any] | int | None] = {}

    def __enter__(self) -> Children:
        # Before the first process starts, so that none is left behind whatever comes when.
        self._previous = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def start(self, command: Sequence[str], **options: Any) -> subprocess.Popen[Any] | None:
        """Starts one process, with the options of `subprocess.Popen`; None, and no process, after a request to stop."""
        if self.stopping:
            return None
        # A session of its own: Ctrl-C reaches this process only, which passes it on.
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, **options)
        self.processes.append(process)
        if self.stopping:  # Asked for between the start and the list.
            process.terminate()
        return process

    def kill(self) -> None:
        """Kills the processes that still run."""
        for i, process in enumerate(self.processes):
            if process.poll() is None:
                self.killed.add(i)
                process.kill()

    def _on_signal(self, number: int, frame: object) -> None:
        del frame
        if self.stopping:
            self.kill()
            return
        self.stopping = True
        say(f"{signal.Signals(number).name}: asking {len(self.processes)} processes to stop")
        for process in self.processes:
            if process.poll() is None:
                process.terminate()
