"""Finds, checks, reads and writes the safetensors of a Hugging Face directory, tensor by tensor.

Nothing here holds more than one tensor in memory. The safetensors library reads, and opens the file again for each
tensor, so that the mapped pages of one do not stay. It cannot write without holding a whole file, so the writer is
ours: 8 bytes of header length, a JSON header, the raw tensors (safetensors format, version 0.3+).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from lfm_jax.config import ITEMSIZE
from lfm_jax.convert.sources import Source, Spec

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
TAGS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""Our dtype names -> those in a safetensors header."""
_NAMES = {tag: name for name, tag in TAGS.items()}


# -------------------------------------------------------------------- reading


def file_problem(directory: Path, name: str) -> str | None:
    """Returns what is wrong with a file of the directory, None if it exists and does not lead out of it.

    A symbolic link may lead elsewhere in the directory or, as in a Hugging Face cache
    (`snapshots/REVISION/x -> ../../blobs/HASH`), to the `blobs` beside its `snapshots`; nowhere else.
    """
    path, root = directory / name, directory.resolve()
    if not path.exists():
        return f"{name} is missing"
    target = path.resolve()
    if not any(target.is_relative_to(allowed) for allowed in (root, root.parent.parent / "blobs")):
        return f"{name} leaves the directory: it leads to {target}; put the file itself there"
    return None if target.is_file() else f"{name} is not a file"


def read_json(directory: Path, name: str) -> tuple[dict[str, Any], list[str]]:
    """Reads a JSON object; returns it, empty if there are problems, and the problems."""
    problem = file_problem(directory, name)
    if problem is not None:
        return {}, [problem]
    try:
        value = json.loads((directory / name).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as e:
        return {}, [f"{name} is not valid JSON: {e}"]
    return (value, []) if isinstance(value, dict) else ({}, [f"{name} holds a {type(value).__name__}, not an object"])


def read_tensors(directory: Path, name: str) -> tuple[dict[str, np.ndarray], list[str]]:
    """Reads all tensors of a small file; returns them, none if there are problems, and the problems."""
    problem = file_problem(directory, name)
    if problem is not None:
        return {}, [problem]
    try:
        with safe_open(directory / name, framework="np") as opened:
            return {tensor: opened.get_tensor(tensor) for tensor in opened.keys()}, []  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as e:
        return {}, [f"{name} is truncated, damaged or not readable ({e}); fetch it again"]


def open_directory(directory: Path) -> tuple[Source, list[str]]:
    """Opens the weights of a directory, `model.safetensors` or the shards of its index; returns them and all problems.

    It reads only headers; the library checks the length of each file against its header.
    """
    weight_map: dict[str, str] | None = None
    problems: list[str] = []
    indexed: set[str] = set()
    files = [SINGLE]  # If both exist, `transformers` reads this one; so do we.
    if not os.path.lexists(directory / SINGLE):
        if not os.path.lexists(directory / INDEX):
            return Source({}, _absent), [_no_weights(directory)]
        weight_map, indexed, problems = _read_index(directory)
        files = sorted(set(weight_map.values()))
    specs: dict[str, Spec] = {}
    paths: dict[str, Path] = {}
    for file in files:
        problem = file_problem(directory, file)
        if problem is not None:
            problems.append(problem if weight_map is None else f"{INDEX} names {file}: {problem}")
            continue
        try:
            found = dict(_header(directory / file))
        except (SafetensorError, OSError) as e:
            problems.append(f"{file} is truncated, damaged or not readable ({e}); fetch it again")
            continue
        if weight_map is not None:
            named = {tensor for tensor, shard in weight_map.items() if shard == file}
            problems += [f"{INDEX} maps {tensor} to {file}, which does not have it"
                         for tensor in sorted(named - found.keys())]
            problems += [f"unexpected: {tensor} in {file}, which {INDEX} does not list"
                         for tensor in sorted(found.keys() - named)]
            found = {tensor: spec for tensor, spec in found.items() if tensor in named}
        specs |= found
        paths |= dict.fromkeys(found, directory / file)

    def read(tensor: str) -> np.ndarray:
        with safe_open(paths[tensor], framework="np") as opened:
            return opened.get_tensor(tensor)

    return Source(specs, read, lost=frozenset(indexed - specs.keys())), problems


def _absent(tensor: str) -> np.ndarray:
    raise KeyError(tensor)


def _header(path: Path) -> Iterator[tuple[str, Spec]]:
    with safe_open(path, framework="np") as opened:
        for tensor in opened.keys():  # noqa: SIM118 (not a dict)
            part = opened.get_slice(tensor)
            tag = part.get_dtype()
            yield tensor, Spec(tuple(part.get_shape()), _NAMES.get(tag, tag))


def _read_index(directory: Path) -> tuple[dict[str, str], set[str], list[str]]:
    """Returns tensor -> file for the valid entries, the names of all entries, and problems."""
    index, problems = read_json(directory, INDEX)
    if problems:
        return {}, set(), problems
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        return {}, set(), [f"{INDEX} has no weight_map of tensor name to file name"]
    good: dict[str, str] = {}
    for tensor, file in weight_map.items():
        if not isinstance(file, str):
            wrong = "expected a file name"
        elif file != Path(file).name or "\\" in file or "\0" in file:
            wrong = "which leaves the directory; expected a plain file name"
        elif not file.endswith(".safetensors"):
            wrong = "only .safetensors files are read"
        else:
            good[tensor] = file
            continue
        problems.append(f"{INDEX} maps {tensor} to {file!r}; {wrong}")
    return good, set(weight_map), problems


def _no_weights(directory: Path) -> str:
    entries = sorted(entry.name for entry in directory.iterdir())
    pickles = [entry for entry in entries if entry.endswith(PICKLES)]
    if pickles:
        return (f"{', '.join(pickles)}: pickle files are not read, because opening one runs the code in it; convert to "
                "safetensors where you trust it (save_pretrained in transformers does)")
    shards = [entry for entry in entries if entry.endswith(".safetensors")]
    if shards:
        return f"neither {SINGLE} nor {INDEX} is there, but {', '.join(shards)}; fetch the index too"
    return f"neither {SINGLE} nor {INDEX} is there"


# -------------------------------------------------------------------- writing


def write(
    directory: Path, specs: Mapping[str, Spec], arrays: Iterable[tuple[str, np.ndarray]], max_shard_bytes: int
) -> None:
    """Writes `model.safetensors`, or numbered shards and their index if one file would be too large.

    Args:
      directory: an existing directory.
      specs: every tensor by name, in the order of the file; dtypes are those of `TAGS`.
      arrays: (name, array) in the same order; consumed one at a time.
      max_shard_bytes: the most bytes of a shard, which always has at least one tensor.

    Raises:
      ValueError: `arrays` differs from `specs`.
    """
    shards: list[dict[str, Spec]] = [{}]
    filled = 0
    for name, spec in specs.items():
        if shards[-1] and filled + _size(spec) > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = spec
        filled += _size(spec)
    count = len(shards)
    files = [SINGLE] if count == 1 else [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    source = iter(arrays)
    for file, shard in zip(files, shards, strict=True):
        _write_file(directory / file, shard, source)
    if next(source, None) is not None:
        raise ValueError(f"more tensors than the {len(specs)} announced")
    if count > 1:
        index = {
            "metadata": {"total_size": sum(map(_size, specs.values()))},
            "weight_map": {name: file for file, shard in zip(files, shards, strict=True) for name in shard},
        }
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _size(spec: Spec) -> int:
    return math.prod(spec.shape) * ITEMSIZE[spec.dtype]


def _write_file(path: Path, shard: Mapping[str, Spec], arrays: Iterator[tuple[str, np.ndarray]]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # Older `transformers` refuses a file without it.
    offset = 0
    for name, spec in shard.items():
        end = offset + _size(spec)
        header[name] = {"dtype": TAGS[spec.dtype], "shape": list(spec.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # Tensors then start at a multiple of 8 bytes.
    with path.open("xb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name, spec in shard.items():
            given, array = next(arrays, (None, None))
            if array is None or given != name or (array.shape, array.dtype.name) != spec:
                raise ValueError(f"expected {name} {spec.dtype}{list(spec.shape)}, was given {given} "
                                 f"{getattr(array, 'dtype', None)}{list(getattr(array, 'shape', ()))}")
            out.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
