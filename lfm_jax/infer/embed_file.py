"""`lfm embed`: the vectors of a file of texts, in a file of numpy or of JSON lines.

N texts, D numbers of a vector.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from lfm_jax.files import say, whole
from lfm_jax.infer.embed import MAX_TOKENS, Encoder, Kind

AT_A_TIME = 4096
"""Texts that are read, sorted by length and written together."""
TELL_SECONDS = 10
"""How often the progress is said."""
TARGETS = (".npy", ".jsonl")


def embed_file(
    open_encoder: Callable[[], Encoder], source: Path, target: Path, *, kind: Kind = "document",
    max_tokens: int = MAX_TOKENS, dimensions: int | None = None,
) -> int:
    """Writes the vectors of the texts of a file, in their order. What can be refused is so before a model is opened.

    Args:
      open_encoder: opens the model.
      source: a text for each line, as it is; in a `.jsonl` file a JSON string, or an object with a `text`. It is read
        twice.
      target: a new file, written whole or not at all: `.npy`, float32 [N, D]; or `.jsonl`, lines
        `{"index": 0, "embedding": [...]}`.
      kind, max_tokens, dimensions: as for `lfm_jax.embed`.

    Returns:
      N.

    Raises:
      ValueError: a source that cannot be read twice, has no texts or changes meanwhile, a line that holds none, a
        target that is there, of another kind or in no directory, or see `lfm_jax.embed`.
    """
    if target.suffix not in TARGETS:
        raise ValueError(f"target {target} must end in {' or '.join(TARGETS)}, which says how vectors are written")
    if os.path.lexists(target):
        raise ValueError(f"target {target} is there already; name a new file")
    if not target.parent.is_dir():
        raise ValueError(f"target {target} is in no directory; make {target.parent} first")
    if source.exists() and not source.is_file():
        raise ValueError(f"source {source} is no regular file; write the texts into one, because it is read twice")
    N = sum(1 for _ in _texts(source))
    if not N:
        raise ValueError(f"source {source} has no texts; write one for each line")
    encoder = open_encoder()
    encoder.check_dimensions(dimensions)
    D = dimensions or encoder.model.config.hidden_size
    write = _write_numpy if target.suffix == ".npy" else _write_lines
    began, told, texts = time.monotonic(), time.monotonic(), _texts(source)
    with whole(target) as file:
        for start in range(0, N, AT_A_TIME):
            some = list(itertools.islice(texts, min(AT_A_TIME, N - start)))
            if len(some) < min(AT_A_TIME, N - start):
                raise ValueError(f"source {source} had {N} texts and has fewer now; leave it as it is meanwhile")
            write(file, encoder.embed(some, kind, max_tokens, dimensions), start, (N, D))
            if time.monotonic() - told > TELL_SECONDS:
                told, done = time.monotonic(), start + len(some)
                say(f"{done} of {N} texts, {done / (told - began):.1f} a second")
    return N


def _texts(source: Path) -> Iterator[str]:
    """Yields the text of each line, which ends at b"\\n" and nowhere else."""
    try:
        with source.open("rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8").removesuffix("\n").removesuffix("\r")
                    yield _text(text) if source.suffix == ".jsonl" else text
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"line {number} of {source} holds no text: {error}") from None
    except OSError as error:
        raise ValueError(f"source {source} cannot be read: {error.strerror}") from None


def _text(line: str) -> str:
    value = json.loads(line)
    text = value.get("text") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise ValueError(f'it is {line:.60}; expected a JSON string, or an object with a "text"')
    text.encode()  # Half of a surrogate pair is no text, and has to be named with its line.
    return text


def _write_numpy(file: BinaryIO, vectors_ND: np.ndarray, start: int, shape: tuple[int, int]) -> None:
    if start == 0:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
    file.write(vectors_ND.astype("<f4").tobytes())


def _write_lines(file: BinaryIO, vectors_ND: np.ndarray, start: int, shape: tuple[int, int]) -> None:
    del shape
    for i, vector_D in enumerate(vectors_ND, start):
        file.write(json.dumps({"index": i, "embedding": vector_D.tolist()}).encode() + b"\n")
