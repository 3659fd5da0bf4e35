"""Files to documents: finding them, reading documents by index."""

from __future__ import annotations

import codecs
import fnmatch
import glob
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lfm_jax.problems import raise_problems

TEXT_SUFFIXES = (".txt", ".md", ".py")
"""Files that are one document each."""
JSONL_SUFFIX = ".jsonl"
"""Files with one document per line: a JSON object with the text under one of its keys."""
SUFFIXES = (*TEXT_SUFFIXES, JSONL_SUFFIX)


class SourceFile(NamedTuple):
    """A file of documents."""

    path: Path
    """Absolute and resolved: what tells two files apart."""
    name: str
    """Path relative to the directory, or to the fixed part of the glob, that found the file, with `/`."""


def find_files(
    patterns: Iterable[str], exclude: Sequence[str] = (), suffixes: Sequence[str] = SUFFIXES
) -> list[SourceFile]:
    """The source files that the patterns name, each once, sorted by name.

    A pattern is a file, a directory (every source file below it; hidden files and directories are passed
    over) or a glob (`*`, `?`, `[...]`, and `**` for any depth). Files of other types are passed over unless
    a pattern names one itself.

    Args:
      exclude: shell patterns of what to leave out, matched against `SourceFile.name`, each of its parts and
        each directory above it: `tests` leaves out every file and directory of that name, `lib/old` one.
      suffixes: the types of files, as names end.

    Raises:
      ValueError: one message that lists every pattern that matches nothing and every file of unknown type.
    """
    found: dict[Path, SourceFile] = {}
    problems = []
    for pattern in patterns:
        expanded = os.path.expanduser(pattern)
        if os.path.isfile(expanded) and not _is_of(expanded, suffixes):
            problems.append(f"{pattern}: type not known; expected one of {', '.join(suffixes)} (rename or convert it)")
            continue
        matches = list(_matches(expanded, exclude, suffixes))
        if not matches:
            reason = "it" if os.path.exists(expanded) or glob.has_magic(expanded) else "there is no such file; it"
            problems.append(
                f"{pattern}: {reason} matches no {', '.join(suffixes)} file"
                + (f" outside exclude {list(exclude)}" if exclude else "")
            )
        for match in matches:
            found.setdefault(match.path, match)
    raise_problems("source files cannot be used", problems)
    return sorted(found.values(), key=lambda file: (file.name, file.path))


def _is_of(path: str, suffixes: Sequence[str]) -> bool:
    return path.lower().endswith(tuple(suffixes))


def _matches(pattern: str, exclude: Sequence[str], suffixes: Sequence[str]) -> Iterator[SourceFile]:
    if os.path.isdir(pattern):
        root, paths = pattern, _walk(pattern, exclude)
    elif os.path.isfile(pattern):
        root, paths = os.path.dirname(pattern), [pattern]
    else:
        fixed = re.split(r"[*?[]", pattern, maxsplit=1)[0]
        root, paths = os.path.dirname(fixed), glob.glob(pattern, recursive=True)
    for path in paths:
        name = Path(os.path.relpath(path, root or ".")).as_posix()
        if _is_of(path, suffixes) and os.path.isfile(path) and not _excluded(name, exclude):
            yield SourceFile(Path(path).resolve(), name)


def _walk(root: str, exclude: Sequence[str]) -> Iterator[str]:
    for directory, subdirectories, files in os.walk(root):
        inside = Path(directory).relative_to(root)
        subdirectories[:] = [
            d for d in subdirectories if not d.startswith(".") and not _excluded((inside / d).as_posix(), exclude)
        ]
        yield from (os.path.join(directory, f) for f in files if not f.startswith("."))


def contains(source: str, path: str | Path, exclude: Sequence[str] = ()) -> bool:
    """Whether files below `path` would be found by the directory `source`."""
    root, inside = Path(source).expanduser().resolve(), Path(path).resolve()
    return root.is_dir() and inside.is_relative_to(root) and not _excluded(inside.relative_to(root).as_posix(), exclude)


def _excluded(name: str, exclude: Sequence[str]) -> bool:
    parts = name.split("/")
    candidates = {*parts, *("/".join(parts[:n]) for n in range(1, len(parts) + 1))}
    return any(fnmatch.fnmatchcase(candidate, pattern) for pattern in exclude for candidate in candidates)


class Documents:
    """The documents of some files by index, read when asked for: a Grain `RandomAccessDataSource` of str.

    Text files are one document, JSONL files one per line. Empty documents are left out. Every byte is
    read and checked once at construction; in memory stay 24 bytes a document. The text comes exactly as
    stored, line ends included; only a byte-order mark at the start of a file is no part of it.

    Args:
      files: in the order of the documents.
      text_field: key of the text in a JSONL object.

    Raises:
      ValueError: one message that lists the files and lines that cannot be read as UTF-8 or as JSON objects
        with a string under `text_field`.
    """

    def __init__(self, files: Sequence[SourceFile], text_field: str = "text"):
        self.files = list(files)
        self.text_field = text_field
        spans: list[tuple[int, int, int]] = []
        problems: list[str] = []
        self.num_bytes = 0
        """UTF-8 bytes of the text of all documents together."""
        for number, file in enumerate(self.files):
            try:
                for offset, raw in _raw_documents(file.path):
                    try:
                        size = len(_text(file.path, raw, text_field).encode())
                    except ValueError as error:
                        problems.append(_explain(file.path, offset, raw, error, text_field))
                        continue
                    if size:
                        self.num_bytes += size
                        spans.append((number, offset, len(raw)))
            except OSError as error:
                problems.append(f"{file.path}: {error.strerror}; make it readable or exclude it")
        raise_problems("documents cannot be read", problems)
        self._spans = np.array(spans, np.int64).reshape(-1, 3)

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> str:
        number, offset, length = self._spans[index].tolist()
        path = self.files[number].path
        with open(path, "rb") as handle:
            handle.seek(offset)
            return _text(path, handle.read(length), self.text_field)

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))

    def __repr__(self) -> str:
        return f"Documents({len(self)} documents in {len(self.files)} files, {self.num_bytes} bytes)"


class Stretch(NamedTuple):
    """Part of a source file: the documents that begin at bytes `start` to `stop` - 1."""

    path: Path
    start: int
    stop: int


def stretches(path: Path, size: int, longest: int) -> list[Stretch]:
    """A file of `size` bytes in stretches of at most `longest` bytes; a file that is one document in one."""
    if path.suffix.lower() != JSONL_SUFFIX:
        return [Stretch(path, 0, size)]
    return [Stretch(path, start, min(start + longest, size)) for start in range(0, size, longest)]


def read_stretch(stretch: Stretch, text_field: str, problems: list[str]) -> Iterator[tuple[bytes, str]]:
    """(bytes as stored, text) of each document of a stretch that is not empty, in turn.

    Args:
      problems: gets a line for each document that cannot be read; it is passed over.

    Raises:
      OSError: the file cannot be opened or read.
    """
    for offset, raw in _raw_documents(stretch.path, stretch.start, stretch.stop):
        try:
            text = _text(stretch.path, raw, text_field)
            text.encode()
        except ValueError as error:
            problems.append(_explain(stretch.path, offset, raw, error, text_field))
            continue
        if text:
            yield raw, text


_JSON_TYPES = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", list: "an array",
               dict: "an object"}


def _text(path: Path, raw: bytes, text_field: str) -> str:
    text = raw.decode()
    if path.suffix.lower() != JSONL_SUFFIX:
        return text
    value = json.loads(text)
    if not isinstance(value, dict) or not isinstance(value.get(text_field), str):
        if not isinstance(value, dict):
            found = "it is not an object"
        elif text_field in value:
            found = f"that is {_JSON_TYPES[type(value[text_field])]}"
        else:
            found = f"its keys are {', '.join(map(repr, value))}"
        raise ValueError(f"expected a JSON object with a string under {text_field!r}, but {found}")
    return value[text_field]


def _raw_documents(path: Path, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, bytes]]:
    """(byte offset, bytes) of each document of a file that begins from start up to stop, still encoded.

    A byte-order mark at the start of the file is left out: the first document then begins at byte 3.
    """
    with open(path, "rb") as handle:
        mark = len(codecs.BOM_UTF8) if handle.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8 else 0
        if path.suffix.lower() != JSONL_SUFFIX:
            handle.seek(mark)
            yield mark, handle.read()
            return
        handle.seek(0)
        if start:
            # A line belongs to where it begins: pass over one that began before.
            handle.seek(start - 1)
            handle.readline()
        offset = handle.tell()
        for raw in handle:
            if stop is not None and offset >= stop:
                return
            skipped = mark if offset == 0 else 0
            if raw[skipped:].strip():
                yield offset + skipped, raw[skipped:]
            offset += len(raw)


def _line_of(path: Path, offset: int) -> int:
    """Number of the line that begins at a byte of a file."""
    line = 1
    with open(path, "rb") as handle:
        while offset > 0 and (chunk := handle.read(min(offset, 2**20))):
            line += chunk.count(b"\n")
            offset -= len(chunk)
    return line


def _explain(path: Path, offset: int, raw: bytes, error: ValueError, text_field: str) -> str:
    line = _line_of(path, offset)
    if isinstance(error, UnicodeDecodeError):
        line += raw.count(b"\n", 0, error.start)
        reason = f"not UTF-8 (byte {raw[error.start]:#04x}); convert the file with iconv or exclude it"
    elif isinstance(error, UnicodeEncodeError):
        reason = f"{text_field!r} holds half a surrogate pair, which is not text; mend or drop the line"
    elif isinstance(error, json.JSONDecodeError):
        reason = f"not JSON ({error.msg}, column {error.colno}); put one whole object on each line"
    else:
        reason = f"{error}; mend the line or set text_field"
    return f"{path}, line {line}: {reason}"
