"""Files that several processes share, and the one way to speak on standard error."""

from __future__ import annotations

import fcntl
import os
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(directory: Path, otherwise: str) -> Iterator[None]:
    """Keeps every other process that asks for the same out of a directory, until this one lets go or ends, however.

    Raises:
      ValueError: another one is at it; says `otherwise`.
    """
    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(otherwise) from None
        except OSError:  # A file system without locks.
            pass
        yield
    finally:
        os.close(handle)


def write_whole(path: Path, text: str, *, by_many: bool = False) -> None:
    """Writes a small file whole or not at all.

    Args:
      by_many: several processes may write it at once, and the last one wins. A kill then leaves a file beside it that
        nobody takes up again.
    """
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.partial" if by_many else f"{path.name}.partial")
    with open(partial, "w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(partial, path)


def say(text: str, *, who: str = "lfm") -> None:
    """One message on standard error, at once."""
    print(f"{who}: {text}", file=sys.stderr, flush=True)
