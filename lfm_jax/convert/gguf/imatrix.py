"""Files with the importance of the inputs of matrices (llama.cpp's imatrix): mean squares over a calibration text.

Formats are those of llama.cpp's tools/imatrix and common/imatrix-loader.cpp: GGUF with `NAME.in_sum2` and
`NAME.counts`, and the older .dat, which is only read.
"""

from __future__ import annotations

import dataclasses
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lfm_jax.convert.gguf.gguf_file import MAGIC, Written, open_gguf, write_gguf
from lfm_jax.problems import raise_problems

_SQUARES, _COUNTS = ".in_sum2", ".counts"
_DATASETS, _CHUNKS, _CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"


@dataclasses.dataclass(frozen=True)
class Imatrix:
    """Sums of squares of the inputs of each matrix."""

    squares: Mapping[str, np.ndarray]
    """By name of the tensor in a GGUF file: [matrices, columns]; several matrices if they are stacked, as experts."""
    counts: Mapping[str, np.ndarray]
    """How many inputs each matrix had: [matrices], or [1] for all."""
    datasets: tuple[str, ...] = ()
    """What the text was called."""
    chunks: int = 0
    chunk_size: int = 0
    """How many pieces the text had, and tokens in each."""
    path: str = ""
    """The file that it was read from."""

    def importance(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[dict[str, np.ndarray], list[str]]:
        """Returns mean squares as `quantize` takes them, for the tensors of a model, and what does not fit.

        A matrix that had no input, an expert that no token chose, weighs all columns alike, as in llama.cpp.
        """
        found, problems = {}, []
        for name in self.squares.keys() & shapes.keys():
            squares, counts = self.squares[name], self.counts[name]
            expected = shapes[name][:-2] * (len(shapes[name]) == 3) + shapes[name][-1:]
            matrices = int(np.prod(expected[:-1]))
            if squares.size != np.prod(expected) or matrices % len(counts):
                problems.append(f"imatrix {self.path}: {name} has {list(squares.shape)} inputs; expected "
                                f"{list(expected)}, those of this model")
                continue
            count = np.repeat(counts, matrices // len(counts)).astype(np.float64)[:, None]
            means = np.where(count > 0, squares.reshape(matrices, -1) / np.maximum(count, 1), 1)
            found[name] = means.astype(np.float32).reshape(expected)
        if not found and not problems:
            problems.append(f"imatrix {self.path or 'given'} has none of the tensors of this model")
        return found, problems

    def keys(self) -> dict[str, Any]:
        """Returns what llama-quantize notes of it in a file."""
        noted = {"quantize.imatrix.file": self.path, "quantize.imatrix.dataset": ", ".join(self.datasets),
                 "quantize.imatrix.entries_count": len(self.squares), "quantize.imatrix.chunks_count": self.chunks}
        return {key: value for key, value in noted.items() if value != ""}


def write_imatrix(path: str | os.PathLike, imatrix: Imatrix) -> None:
    """Writes a file that llama-quantize, and `read_imatrix`, read."""
    arrays: dict[str, np.ndarray] = {}
    for name in sorted(imatrix.squares):
        arrays[name + _SQUARES] = np.ascontiguousarray(imatrix.squares[name], np.float32)
        arrays[name + _COUNTS] = np.ascontiguousarray(imatrix.counts[name], np.float32)[:, None]
    keys = {"general.type": "imatrix", _DATASETS: list(imatrix.datasets) or ["unnamed"], _CHUNKS: imatrix.chunks,
            _CHUNK_SIZE: imatrix.chunk_size}
    tensors = {name: Written("F32", array.shape) for name, array in arrays.items()}
    data = (array.reshape(-1).view(np.uint8) for array in arrays.values())
    write_gguf(Path(path), "imatrix", keys, {}, tensors, data)


def read_imatrix(path: str | os.PathLike) -> Imatrix:
    """Reads a file of llama.cpp's tool or of `write_imatrix`.

    Raises:
      ValueError: it is neither a GGUF nor a .dat file with sums, or it is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"imatrix {path} does not exist; make one with `lfm imatrix` or llama.cpp's llama-imatrix")
    with open(path, "rb") as file:
        old = file.read(len(MAGIC)) != MAGIC
        file.seek(0)
        if old:
            return _read_dat(path, file)
    opened, problems = open_gguf(path)
    if opened is not None and not any(name.endswith(_SQUARES) for name in opened.tensors):
        problems.append("it has no sums of squares (tensors NAME.in_sum2); expected a file of `lfm imatrix` or "
                        "llama-imatrix")
    names = [] if opened is None else [name.removesuffix(_SQUARES) for name in opened.tensors
                                       if name.endswith(_SQUARES)]
    if opened is not None:
        problems += [f"{name + _COUNTS} is missing" for name in names if name + _COUNTS not in opened.tensors]
    raise_problems(f"cannot read imatrix {path}", problems)
    assert opened is not None
    squares = {name: _rows(opened.read(name + _SQUARES)) for name in names}
    counts = {name: np.rint(opened.read(name + _COUNTS)).reshape(-1) for name in names}
    return Imatrix(squares, counts, tuple(opened.keys.get(_DATASETS, ())), opened.keys.get(_CHUNKS, 0),
                   opened.keys.get(_CHUNK_SIZE, 0), str(path))


def _rows(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1, array.shape[-1])


def _read_dat(path: Path, file: BinaryIO) -> Imatrix:
    squares, counts = {}, {}
    try:
        [entries] = _ints(file, 1)
        if not 0 < entries < 2**20:
            raise ValueError("it is neither GGUF nor a .dat with entries")
        for _ in range(entries):
            [length] = _ints(file, 1)
            name = _exactly(file, length).decode()
            calls, size = _ints(file, 2)
            # What is stored are means, times the number of calls.
            squares[name] = np.frombuffer(_exactly(file, 4 * size), "<f4").reshape(1, -1)
            counts[name] = np.array([calls if calls > 0 else 1])
        rest = file.read()
    except (ValueError, struct.error) as error:
        raise ValueError(f"cannot read imatrix {path}: {error}; expected a file of `lfm imatrix` or llama-imatrix"
                         ) from None
    chunks, length = struct.unpack("<ii", rest[:8]) if len(rest) >= 8 else (0, 0)
    datasets = (rest[8 : 8 + length].decode(errors="replace"),) if length > 0 else ()
    return Imatrix(squares, counts, datasets, chunks, 0, str(path))


def _ints(file: BinaryIO, count: int) -> tuple[int, ...]:
    return struct.unpack(f"<{count}i", file.read(4 * count))


def _exactly(file: BinaryIO, size: int) -> bytes:
    if size < 0 or len(data := file.read(size)) < size:
        raise ValueError("it is truncated or damaged")
    return data
