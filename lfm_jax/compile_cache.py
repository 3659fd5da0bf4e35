"""Compiled programs on disk, so that the second start of a verb does not compile.

The `lfm` verbs keep what they compile in one directory: `compiled` below `$LFM_CACHE_DIR`, or else below
`$XDG_CACHE_HOME/lfm_jax`, or else `~/.cache/lfm_jax`. `LFM_CACHE_DIR=` (empty) switches this off. Whoever has set JAX's
own `jax_compilation_cache_dir` (environment variable JAX_COMPILATION_CACHE_DIR) keeps it, with JAX's other settings.
JAX does the work: the name of a program's file covers its code, shapes, device, versions and XLA's flags, and when the
directory is full, the program least recently used goes first.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import filelock

from lfm_jax.files import say

VARIABLE = "LFM_CACHE_DIR"
MAX_BYTES = 2**30
"""What the directory may hold."""
_LOCK = ".lockfile"
"""The file that JAX locks while it reads and writes a directory of limited size."""
_LOCK_SECONDS = 10


def root() -> Path | None:
    """Where the verbs keep what lasts between their starts; None where that is switched off, or there is no home."""
    if (given := os.environ.get(VARIABLE)) is not None:
        return Path(given) if given else None
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lfm_jax"
    except RuntimeError:
        return None


def directory() -> Path | None:
    """Where the verbs keep compiled programs, or None."""
    return None if (place := root()) is None else place / "compiled"


def enable() -> None:
    """Has JAX keep what this process compiles from now on, unless it has been told where already.

    A directory that cannot be used is reported on stderr, and nothing is kept.
    """
    import jax

    path = directory()
    if jax.config.jax_compilation_cache_dir is not None or path is None:
        return
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(path):  # As JAX will at each program.
            pass
    except (OSError, NotImplementedError) as error:
        say(f"compiled programs are not kept, since {path} cannot be used ({error}); name another directory in "
            f"{VARIABLE}, or set it to nothing")
        return
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # Small programs are many.


def usage(path: Path) -> tuple[int, int]:
    """(programs, bytes) in a cache directory."""
    files = list(_files(path))
    return sum(file.name.endswith("-cache") for file in files), sum(file.stat().st_size for file in files)


def clear(path: Path) -> None:
    """Removes everything in a cache directory; processes that use it compile again.

    Raises:
      OSError: a file cannot be removed, or another process holds the directory for too long.
    """
    if path.is_dir():
        with _locked(path):
            for file in _files(path):
                file.unlink(missing_ok=True)


def _files(path: Path) -> Iterator[Path]:
    return (file for file in path.rglob("*") if file.is_file() and file.name != _LOCK)


def _locked(path: Path) -> filelock.AcquireReturnProxy:
    return filelock.FileLock(path / _LOCK).acquire(timeout=_LOCK_SECONDS)
