"""How the processes of a run come about, and what their exit codes mean.

On a cluster every process is started from outside and finds the others through `jax.distributed`. To try a run of many
processes on one machine, `start` starts them here and watches over them. Nothing in this file computes.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import IO, Literal

from lfm_jax.files import say
from lfm_jax.problems import raise_problems
from lfm_jax.train.children import Children

STOPPED = 130
"""Exit code of a run that was asked to stop (SIGTERM, SIGINT): a checkpoint is saved, the same command resumes."""
LOST = 75
"""Exit code of `start` when a process was lost (EX_TEMPFAIL): the others are stopped, the same command resumes."""
FAILED = 2
"""Exit code of a run that cannot go on by itself: a message says what to mend."""

GRACE_SECONDS = 10.0
"""How long the others have, after a process is lost, to end by themselves before they are killed."""
_BEREFT = (LOST, -signal.SIGABRT)
"""How a process ends that found another one gone: by our own code, or aborted by JAX."""
_FOR_A_PERSON = (1, FAILED)
"""Exit codes after which the same command does not help."""
_LAST_LINES = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launch:
    """How the processes of a run come about; no part of its recipe.

    Raises:
      ValueError: on construction, one message that lists every bad field.
    """

    processes: int = 1
    """Start this many processes on this machine, on its CPU, to try a run of many."""
    devices_per_process: int = 0
    """CPU devices that each process pretends to have, to try a mesh. 0: as many as JAX finds."""
    distributed: Literal["auto"] | None = None
    """auto: this is one of many processes that Slurm, GKE, Cloud TPU or Open MPI started."""
    coordinator: str | None = None
    """Where nothing is detected: HOST:PORT on which process 0 listens, with num_processes and process_id."""
    num_processes: int | None = None
    """How many processes the run has in all; with coordinator."""
    process_id: int | None = None
    """Which of them this is, from 0; with coordinator."""

    def __post_init__(self) -> None:
        problems = []
        if self.processes < 1:
            problems.append(f"processes is {self.processes}; it must be at least 1")
        if self.devices_per_process < 0:
            problems.append(f"devices_per_process is {self.devices_per_process}; it must not be negative")
        if self.processes > 1 and self.many:
            problems.append("processes starts a run here, distributed and coordinator join one; give one of them")
        if self.distributed and self.coordinator:
            problems.append("distributed detects the coordinator; give one of the two")
        explicit = (self.coordinator, self.num_processes, self.process_id)
        if any(value is not None for value in explicit) and None in explicit:
            problems.append("coordinator, num_processes and process_id go together; give all three or none")
        raise_problems("the launch flags are not valid", problems)

    @property
    def many(self) -> bool:
        """Whether this process is one of many."""
        return self.distributed is not None or self.coordinator is not None


def start(command: Sequence[str], launch: Launch) -> int:
    """Runs `command` in `launch.processes` processes on this machine, and returns the exit code of the whole.

    Every process gets `--processes 1 --coordinator ... --num-processes ... --process-id ...` behind the command, and
    sees CPU devices only. Their output goes to standard error, each line after its process's number. SIGTERM and SIGINT
    are passed on as a request to stop; a second one kills. When a process is lost, the others are killed
    GRACE_SECONDS later, for without it they can only wait.

    Returns:
      0: all ended; STOPPED: all stopped on request; LOST: one was lost; else the code of the first that failed.
    """
    with Children() as children:
        crew = _Crew(children)
        crew.start(command, launch.processes)
        return crew.wait()


class _Crew:
    """The processes that `start` started, which are lost together."""

    def __init__(self, children: Children) -> None:
        self._children = children
        self._ended: queue.Queue[tuple[int, int]] = queue.Queue()
        self._tails: list[collections.deque[str]] = []
        self._readers: list[threading.Thread] = []

    def start(self, command: Sequence[str], count: int) -> None:
        """Starts `count` processes; fewer if a stop is asked for meanwhile."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._tails = [collections.deque[str](maxlen=_LAST_LINES) for _ in range(count)]
        for i in range(count):
            flags = ["--processes", "1", "--coordinator", f"127.0.0.1:{port}", "--num-processes", str(count),
                     "--process-id", str(i)]
            process = self._children.start(
                [*command, *flags], env=os.environ | {"JAX_PLATFORMS": "cpu"}, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, text=True, errors="replace",
            )
            if process is None:
                return
            assert process.stdout is not None
            reader = threading.Thread(target=self._read, args=(i, process.stdout), daemon=True)
            waiter = threading.Thread(target=lambda i=i, p=process: self._ended.put((i, p.wait())), daemon=True)
            self._readers.append(reader)
            reader.start()
            waiter.start()

    def wait(self) -> int:
        """Until all have ended; the exit code of the whole."""
        running, deadline, stopped = len(self._children.processes), float("inf"), self._children.stopping
        lost: tuple[int, int] | None = None  # The first that did not end well, of those that say why if there are any.
        told = False
        while running:
            try:
                i, code = self._ended.get(timeout=max(0.0, min(deadline - time.monotonic(), 1.0)))
            except queue.Empty:
                if time.monotonic() >= deadline:
                    if lost is not None and not told:
                        # The others gave up on one that has not ended.
                        silent = [i for i, process in enumerate(self._children.processes) if process.poll() is None]
                        self._report(*((silent[0], None) if silent else lost), running)
                        told = True
                    self._children.kill()
                    deadline = float("inf")
                continue
            running -= 1
            asked = self._children.stopping and (code == -signal.SIGTERM or i in self._children.killed)
            if code == STOPPED or asked:
                stopped = True
            if code in (0, STOPPED):
                continue
            deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
            # A process that ends because another is gone can be seen before that one.
            says_why = code not in _BEREFT
            if not asked and not told and (lost is None or (lost[1] in _BEREFT and says_why)):
                lost = (i, code)
                if says_why:
                    self._report(i, code, running)
                    told = True
        if lost is None:
            return STOPPED if stopped else 0
        if not told:
            self._report(*lost, 0)
        return lost[1] if lost[1] in _FOR_A_PERSON else LOST

    def _read(self, i: int, stream: IO[str]) -> None:
        for line in stream:
            self._tails[i].append(line)
            sys.stderr.write(f"[{i}] {line}")
            sys.stderr.flush()

    def _report(self, i: int, code: int | None, running: int) -> None:
        """Says which process was lost and how; code None: it does not answer."""
        if code is None:
            how = "it does not answer"
        else:
            self._readers[i].join(timeout=1.0)  # So that its last lines are in.
            how = f"killed by signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"exit code {code}"
        lines = "".join(f"\n    {line.rstrip()}" for line in self._tails[i])
        say(f"process {i} of {len(self._children.processes)} was lost: {how}; its last lines:{lines or ' none'}")
        if running:
            say(f"ending the {running} that are left, within {GRACE_SECONDS:.0f} s")
        if code not in _FOR_A_PERSON:
            say("the same command resumes from the latest checkpoint")
