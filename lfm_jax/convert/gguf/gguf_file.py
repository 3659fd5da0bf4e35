"""Reads and writes GGUF files: keys, and tensors one at a time. The `gguf` library knows the format of the headers.

Files are written once, tensor by tensor, and read without mapping them, so that no more than a tensor is in memory.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lfm_jax.convert.sources import Source, Spec
from lfm_jax.files import whole
from lfm_jax.quant import dequantize, gguf_library, type_size
from lfm_jax.quant.block_types import PLAIN

MAGIC = b"GGUF"


class Stored(NamedTuple):
    """Where a tensor lies in a file."""

    type: str
    shape: tuple[int, ...]
    """As in NumPy: rows last."""
    offset: int
    nbytes: int


@dataclasses.dataclass(frozen=True)
class GgufFile:
    """A GGUF file whose header has been read."""

    path: Path
    keys: Mapping[str, Any]
    """Numbers, strings, booleans and lists of them by key."""
    types: Mapping[str, Any]
    """The types of a key's value: (type,), or (array, type of its elements)."""
    tensors: Mapping[str, Stored]

    def raw(self, name: str) -> np.ndarray:
        """Returns the bytes of a tensor."""
        found = self.tensors[name]
        return np.fromfile(self.path, np.uint8, found.nbytes, offset=found.offset)

    def read(self, name: str) -> np.ndarray:
        """Returns the numbers of a tensor: float32, or float16 or bfloat16 where they are stored as such."""
        found = self.tensors[name]
        if found.type in PLAIN:
            return self.raw(name).view(PLAIN[found.type]).reshape(found.shape)
        return dequantize(self.raw(name), found.type, found.shape)

    def source(self) -> Source:
        """Returns the tensors with the dtypes that `read` gives."""
        specs = {name: Spec(found.shape, PLAIN.get(found.type, np.dtype(np.float32)).name)
                 for name, found in self.tensors.items()}
        return Source(specs, self.read)


def open_gguf(path: Path) -> tuple[GgufFile | None, list[str]]:
    """Reads the header of a file; returns it, or None and what is wrong."""
    try:
        gguf_library()
        stat = path.stat()
    except ImportError as error:
        return None, [str(error)]
    except OSError as error:
        return None, [f"it cannot be read: {error.strerror}"]
    opened, problems = _opened(path.resolve(), stat.st_size, stat.st_mtime_ns)
    return opened, [*problems]


@functools.lru_cache(maxsize=1)  # What a verb asks one after the other: the library takes seconds for a vocabulary.
def _opened(path: Path, size: int, changed: int) -> tuple[GgufFile | None, list[str]]:
    del size, changed  # Part of the cache's key: the file may be another one since.
    gguf = gguf_library()
    try:
        with open(path, "rb") as file:
            magic = file.read(len(MAGIC))
        if magic != MAGIC:
            return None, ["it does not begin as a GGUF file does; fetch it again"]
        reader = gguf.GGUFReader(path)
        keys = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
        types = {name: tuple(reader.fields[name].types) for name in keys}
        tensors = {
            tensor.name: Stored(tensor.tensor_type.name, tuple(reversed(tensor.shape.tolist())),
                                int(tensor.data_offset), int(tensor.n_bytes))
            for tensor in reader.tensors
        }
    except OSError as error:
        return None, [f"it cannot be read: {error.strerror or error}"]
    except Exception as error:  # Whatever the library raises at bytes that are not those of a file.
        return None, [f"it is truncated or damaged ({error}); fetch it again"]
    if reader.byte_order != "I":
        return None, ["it is for machines of another byte order"]
    return GgufFile(path, keys, types, tensors), [
        f"wrong type: {name} is {found.type}, whose numbers cannot be read"
        for name, found in tensors.items() if not _readable(found.type)
    ]


def _readable(type: str) -> bool:
    if type in PLAIN:
        return True
    try:
        size = type_size(type)
        dequantize(bytes(size.bytes), type, (1, size.elements))
    except (ValueError, NotImplementedError, KeyError):
        return False
    return size.elements > 1


class Written(NamedTuple):
    """The header of a tensor to be written."""

    type: str
    shape: tuple[int, ...]


def write_gguf(
    path: Path, arch: str, keys: Mapping[str, Any], types: Mapping[str, Any], tensors: Mapping[str, Written],
    data: Iterable[np.ndarray],
) -> None:
    """Writes a file, whole or not at all.

    Args:
      keys: all but `general.architecture`; integers become uint32, floats float32, lists int32, float32 or strings.
      types: the types of keys that are others than these, as in `GgufFile`.
      tensors: every tensor, in the order of the file.
      data: the bytes of each, as `quantize` makes them, consumed one at a time.
    """
    gguf = gguf_library()
    kinds = gguf.GGUFValueType
    with whole(path) as file:
        writer = gguf.GGUFWriter(file.name, arch)  # It opens the file by its name; `file` is only synced.
        try:
            for key, value in keys.items():
                if key in types:
                    first, *of_elements = types[key]
                    if first != kinds.ARRAY or value:  # The library cannot write an empty list.
                        writer.add_key_value(key, value, first, *of_elements)
                elif isinstance(value, list):
                    writer.add_array(key, value)
                else:
                    of_scalars = {bool: kinds.BOOL, int: kinds.UINT32, float: kinds.FLOAT32, str: kinds.STRING}
                    writer.add_key_value(key, value, of_scalars[type(value)])
            for name, tensor in tensors.items():
                size = type_size(tensor.type)
                rows = (*tensor.shape[:-1], size.row_bytes(tensor.shape[-1]))
                number = gguf.GGMLQuantizationType[tensor.type]
                writer.add_tensor_info(name, rows, np.dtype(np.uint8), math.prod(rows), number)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for _, array in zip(tensors, data, strict=True):
                writer.write_tensor_data(array)
        finally:
            writer.close()
