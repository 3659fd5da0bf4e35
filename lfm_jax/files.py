"""Locks and whole writes of files that several processes share, and messages on standard error."""

from __future__ import annotations

import fcntl
import os
import sys
import uuid
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def locked(path: Path, otherwise: str) -> Iterator[None]:
    """Holds an exclusive lock on a path until the block ends or the process dies.

    Raises:
      ValueError: another process holds it; the message is `otherwise`.
    """
    handle = os.open(path, os.O_RDONLY)
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
    """Writes a small file whole or not at all; `by_many` as in `whole`."""
    with whole(path, by_many=by_many) as file:
        file.write(text.encode())


@contextmanager
def whole(path: Path, *, by_many: bool = False) -> Generator[BinaryIO]:
    """Opens a file that takes its name when the block ends well, and is removed if it does not.

    Args:
      by_many: several processes may write it at once, and the last one wins. A process that is killed then leaves a
        partial file behind.
    """
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}.partial" if by_many else f"{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def say(text: str, *, who: str = "lfm") -> None:
    """Prints one message on standard error and flushes it."""
    print(f"{who}: {text}", file=sys.stderr, flush=True)
