"""Answers of a model that outlive the process: a line of a file each, written as they come."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np
from flax import nnx

from lfm_jax.files import locked
from lfm_jax.model import LFM
from lfm_jax.recipe import to_plain


def model_hash(model: LFM) -> str:
    """Returns the SHA-256 of a model: its config, and the names, forms and values of its parameters."""
    digest = hashlib.sha256(json.dumps(to_plain(model.config), sort_keys=True).encode())
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    # How narrow weights are multiplied is no value: int8 and w8a8 differ in the structure alone.
    digest.update(str(jax.tree.structure(params)).encode())
    for path, value in sorted(jax.tree_util.tree_leaves_with_path(params), key=lambda leaf: str(leaf[0])):
        array = np.asarray(value)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


class Answers:
    """Answers by request; `keep_answers` opens the file that holds them."""

    def __init__(self, file: BinaryIO, of: Mapping[str, Any], known: dict[str, Any]):
        self._file, self._known = file, known
        self._begin = hashlib.sha256(json.dumps(of, sort_keys=True).encode())

    def _key(self, request: Any) -> str:
        digest = self._begin.copy()
        digest.update(json.dumps(request, sort_keys=True).encode())
        return digest.hexdigest()[:32]

    def get(self, request: Any) -> Any:
        """Returns the answer to a request, plain data like the request; None: there is none yet."""
        return self._known.get(self._key(request))

    def add(self, request: Any, answer: Any) -> None:
        """Keeps an answer, plain data and not None; it is in the file, not in a buffer, when this returns."""
        key = self._key(request)
        if key not in self._known:
            self._known[key] = answer
            self._file.write(json.dumps({"key": key, "answer": answer}, ensure_ascii=False).encode() + b"\n")
            self._file.flush()


@contextmanager
def keep_answers(path: Path, of: Mapping[str, Any], also: Iterable[Path] = ()) -> Iterator[Answers]:
    """Opens a file of answers, made if it is not there, for one process at a time.

    Args:
      also: further files whose answers are known too, as far as they go now; other processes may be at work on them.
      of: what the answers depend on beside the request, plain data: the model, settings. A file may hold answers of
        several; one finds its own.

    Raises:
      ValueError: another process has the file open, or it is not a file of answers.
    """
    path.touch()
    with locked(path, f"another process is at work on {path}; wait for it, or name another directory"):
        known, size = _read(path)
        os.truncate(path, size)  # A last line that a killed process wrote in part is cut off.
        for other in also:
            known |= _read(other)[0]
        with path.open("ab") as file:
            yield Answers(file, of, known)


def _read(path: Path) -> tuple[dict[str, Any], int]:
    """Returns the answers of a file by key, and the size of its whole lines."""
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    known = {}
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            row = json.loads(line)
            known[row["key"]] = row["answer"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}, line {number}, is not an answer of lfm eval; move the file away") from None
    return known, len(whole)
