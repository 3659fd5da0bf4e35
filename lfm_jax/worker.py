"""Processes that answer lines of JSON, for what may end them or never come back: checkers and patterns of strangers."""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
import threading
import weakref
from collections.abc import Sequence
from typing import Any, BinaryIO


class TooSlowError(Exception):
    """An answer took more time than it may; the process was killed."""


class EndedError(Exception):
    """The process ended by itself.

    Attributes:
      status: its exit status.
      said: what it said last; after a traceback, its exception.
    """

    def __init__(self, status: int, said: str):
        super().__init__(f"ended with status {status} ({said})")
        self.status, self.said = status, said


class Worker:
    """A process that writes a line of JSON once it is ready, and then one for each that it reads.

    It lives as long as this object; where it was killed or ended, the next request starts another.

    Attributes:
      ready: what it wrote first.

    Raises:
      EndedError: on construction: it ended before it was ready.
    """

    def __init__(self, command: Sequence[str]):
        self._command = list(command)
        self._begin()

    def ask(self, request: Any, seconds: float) -> Any:
        """The answer to a request; both are plain data.

        Raises:
          TooSlowError: it takes more than so many seconds by the clock.
          EndedError: the process ended.
          TypeError, ValueError, RecursionError: the request is no JSON.
        """
        line = json.dumps(request).encode() + b"\n"
        if not self._end.alive:
            self._begin()
        process, slow = self._process, threading.Event()

        def kill() -> None:
            slow.set()
            process.kill()

        timer = threading.Timer(seconds, kill)
        timer.daemon = True
        timer.start()
        try:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(line)
                process.stdin.flush()
            answer = self._answer()
        except BaseException:
            self._end()  # Its answer would be taken for that to the next request.
            raise
        finally:
            timer.cancel()
            timer.join()
        if answer is None and not slow.is_set():
            raise self._ended()
        if slow.is_set():
            self._end()
        if answer is None:
            raise TooSlowError(f"took more than {seconds:g} s")
        return answer

    def _begin(self) -> None:
        errors = tempfile.TemporaryFile()  # noqa: SIM115  (`_end` closes it)
        process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors)
        self._process, self._errors = process, errors
        self._end = weakref.finalize(self, _end, process, errors)
        ready = self._answer()
        if ready is None:
            raise self._ended()
        self.ready = ready

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        return json.loads(line) if line.endswith(b"\n") else None

    def _ended(self) -> EndedError:
        error = EndedError(self._process.wait(), last_line(self._errors))
        self._end()
        return error


def last_line(errors: BinaryIO) -> str:
    """What a process said last; after a traceback, its exception."""
    errors.seek(0)
    said = errors.read().decode(errors="replace").strip().splitlines()
    return said[-1] if said else "it said nothing"


def _end(process: subprocess.Popen[bytes], errors: BinaryIO) -> None:
    process.kill()  # It may be at work for ever.
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):  # What was written last, to a process that had ended.
                pipe.close()
    process.wait()
    errors.close()
