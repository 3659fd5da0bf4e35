"""The types of tensors in GGUF files: rows of numbers to rows of blocks and back.

A type is named as in the file: F32, Q8_0, Q4_K. Rows are the last axis; each is quantised by itself, in whole blocks.
K-quants, and importance weights, are ours; the other types are those of the `gguf` library, which `pip install
'lfm_jax[gguf]'` brings.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import NamedTuple

import ml_dtypes
import numpy as np

from lfm_jax.quant import k_quants, legacy_quants

PLAIN = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
"""Types that are numbers one by one."""
BLOCKS: dict[str, tuple[int, np.dtype]] = {
    "Q8_0": (32, np.dtype([("d", "<f2"), ("qs", "i1", 32)])),
    "Q4_0": (legacy_quants.BLOCK, legacy_quants.Q4_0),
    "Q4_1": (legacy_quants.BLOCK, legacy_quants.Q4_1),
    "Q5_0": (legacy_quants.BLOCK, legacy_quants.Q5_0),
    "Q5_1": (legacy_quants.BLOCK, legacy_quants.Q5_1),
    "Q4_K": (k_quants.SUPER, k_quants.Q4_K),
    "Q5_K": (k_quants.SUPER, k_quants.Q5_K),
    "Q6_K": (k_quants.SUPER, k_quants.Q6_K),
}
"""Types of blocks that `quantize` makes: how many numbers a block has, and its bytes."""
_SCALED = {"Q6_K": 16}
"""How many numbers share a scale where it is not 32."""
_CHUNK = 2**17
"""How many numbers a thread takes at a time; about ten float32 arrays of that size are its temporaries."""


class TypeSize(NamedTuple):
    elements: int
    """Numbers in a block, of which a row must have a whole number of blocks; 1 for plain types."""
    bytes: int
    """Bytes of a block."""

    def row_bytes(self, columns: int) -> int:
        return columns // self.elements * self.bytes


def type_size(type: str) -> TypeSize:
    """Returns the size of the blocks of a type.

    Raises:
      ValueError: neither `quantize` nor the gguf library knows the type.
    """
    if type in PLAIN:
        return TypeSize(1, PLAIN[type].itemsize)
    if type in BLOCKS:
        elements, layout = BLOCKS[type]
        return TypeSize(elements, layout.itemsize)
    gguf = gguf_library()
    if type not in gguf.GGMLQuantizationType.__members__:
        raise ValueError(f"{type!r} is no type of GGUF tensors; `quantize` knows {', '.join([*PLAIN, *BLOCKS])}")
    return TypeSize(*gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type]])


def quantize(
    array: np.ndarray, type: str, importance: np.ndarray | None = None, *, name: str = "the array"
) -> np.ndarray:
    """Quantises the rows of a tensor as llama.cpp does, on all cores.

    Args:
      array: any floating dtype, [..., columns]; made float32 piece by piece.
      type: one of PLAIN and BLOCKS.
      importance: how much an error in each column counts, [columns], or [E, columns] for stacked matrices
        [E, rows, columns]: the mean square of a product's inputs (llama.cpp's imatrix). Only ratios within a row
        matter. Where a block has none, it is taken as equal and very small; llama.cpp loses such blocks. Plain types
        and Q8_0 ignore it.
      name: what errors call the tensor.

    Returns:
      uint8 [..., bytes of a row].

    Raises:
      ValueError: unknown type, rows that are not whole blocks, numbers that are not finite or too large for the type,
        importance of another shape, negative or not finite.
    """
    if type not in PLAIN and type not in BLOCKS:
        raise ValueError(f"{name}: cannot write the type {type!r}; take one of {', '.join([*PLAIN, *BLOCKS])}")
    size = type_size(type)
    if array.ndim == 0 or array.shape[-1] % size.elements:
        raise ValueError(f"{name}: {type} needs rows of a multiple of {size.elements} numbers, not "
                         f"{list(array.shape)}; take a type with smaller blocks, as `mix` does")
    *leading, columns = array.shape
    rows = array.reshape(math.prod(leading), columns)
    out = np.empty((len(rows), size.row_bytes(columns)), np.uint8)
    if importance is not None:
        importance = _checked_importance(importance, array.shape, min(_SCALED.get(type, 32), size.elements), name)
    per_matrix = array.shape[-2] if array.ndim == 3 else max(1, len(rows))
    encode = _encoder(type)

    def convert(part: slice) -> None:
        x_RX = np.ascontiguousarray(rows[part], np.float32)
        if not np.isfinite(x_RX).all():
            raise ValueError(f"{name} has NaN or infinite numbers; {type} cannot hold them")
        w_RX = None if importance is None else importance[np.arange(part.start, part.stop) // per_matrix]
        with np.errstate(over="ignore", invalid="ignore"):  # What overflows is told below.
            records = encode(x_RX, w_RX)
        if not all(np.isfinite(field).all() for field in _fields(records)):
            raise ValueError(f"{name} has numbers too large for {type}: {np.abs(x_RX).max():.3g}; check its weights")
        out[part] = np.ascontiguousarray(records).view(np.uint8).reshape(len(x_RX), -1)

    _in_parts(convert, *rows.shape)
    return out.reshape(*leading, out.shape[1])


def dequantize(data: bytes | memoryview | np.ndarray, type: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns the numbers of a tensor of any type that the gguf library reads, float32 of the shape given.

    Raises:
      ValueError: unknown type, rows that are not whole blocks, data of another length.
    """
    size = type_size(type)
    *leading, columns = shape
    if columns % size.elements:
        raise ValueError(f"{type} has rows of a multiple of {size.elements} numbers, not {list(shape)}")
    raw = np.frombuffer(data, np.uint8) if not isinstance(data, np.ndarray) else data.reshape(-1).view(np.uint8)
    expected = math.prod(leading) * size.row_bytes(columns)
    if raw.size != expected:
        raise ValueError(f"{type} {list(shape)} has {expected:,} bytes, not {raw.size:,}")
    rows = raw.reshape(math.prod(leading), size.row_bytes(columns))
    out = np.empty((len(rows), columns), np.float32)
    decode = _decoder(type)

    def convert(part: slice) -> None:
        out[part] = decode(rows[part]).reshape(-1, columns)

    _in_parts(convert, *out.shape)
    return out.reshape(shape)


def _checked_importance(importance: np.ndarray, shape: tuple[int, ...], scaled: int, name: str) -> np.ndarray:
    """Returns float32 [matrices, columns], above 0 somewhere in each `scaled` columns, which share a scale."""
    expected = shape[:-2] * (len(shape) == 3) + shape[-1:]
    if importance.shape != expected:
        raise ValueError(f"{name}: importance {list(importance.shape)} for {list(shape)}; expected {list(expected)}")
    weights = np.array(importance, np.float32).reshape(math.prod(expected[:-1]), shape[-1])
    if not np.isfinite(weights).all() or (weights < 0).any():
        raise ValueError(f"{name}: importance must be finite and not negative; collect it again")
    # By a power of two to between 1/2 and 1: neither a sum nor a product with squares leaves float32.
    largest, power = np.frexp(weights.max(1, initial=0))
    weights = np.ldexp(weights, -power[:, None])
    small = np.where(largest > 0, np.float32(1e-6) * largest, np.float32(1))
    blocks = weights.reshape(len(weights), weights.shape[1] // scaled, scaled)
    np.copyto(blocks, small[:, None, None], where=(blocks == 0).all(2, keepdims=True))
    return weights


def _fields(records: np.ndarray) -> list[np.ndarray]:
    return [records[key] for key in records.dtype.names] if records.dtype.names else [records]


def _in_parts(convert: Callable[[slice], None], rows: int, columns: int) -> None:
    step = max(1, _CHUNK // max(1, columns))
    parts = [slice(i, min(i + step, rows)) for i in range(0, rows, step)]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for _ in pool.map(convert, parts):
            pass


# -------------------------------------------------------------------- how each type is made and read


def _encoder(type: str) -> Callable[[np.ndarray, np.ndarray | None], np.ndarray]:
    """Returns what makes numbers or records of float32 rows [R, columns] and their importance, or None."""
    if type in PLAIN:
        return lambda x_RX, w_RX: x_RX.astype(PLAIN[type])
    layout = BLOCKS[type][1]
    if type.endswith("_K"):
        encode = k_quants.encode_symmetric if type == "Q6_K" else functools.partial(
            k_quants.encode_affine, layout=layout)
        return lambda x_RX, w_RX: encode(_supers(x_RX), None if w_RX is None else _supers(w_RX))
    gguf = gguf_library()

    def blocks(x_RX: np.ndarray, w_RX: np.ndarray | None) -> np.ndarray:
        if w_RX is None or type == "Q8_0":
            return gguf.quants.quantize(x_RX, gguf.GGMLQuantizationType[type]).view(layout)
        return legacy_quants.encode_weighted(x_RX, w_RX, layout)

    return blocks


def _decoder(type: str) -> Callable[[np.ndarray], np.ndarray]:
    """Returns what makes float32 numbers of uint8 rows [R, bytes]."""
    if type in PLAIN:
        return lambda rows: np.ascontiguousarray(rows).view(PLAIN[type]).astype(np.float32)
    if type in ("Q4_K", "Q5_K", "Q6_K"):
        decode = k_quants.decode_symmetric if type == "Q6_K" else k_quants.decode_affine
        return lambda rows: decode(np.ascontiguousarray(rows).reshape(-1).view(BLOCKS[type][1]))
    gguf = gguf_library()
    return lambda rows: gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[type])


def _supers(x_RX: np.ndarray) -> np.ndarray:
    return x_RX.reshape(-1, k_quants.SUPER)


def gguf_library() -> ModuleType:
    """Imports the library, or raises ImportError that says how to get it."""
    try:
        import gguf
    except ImportError as error:
        raise ImportError(f"GGUF needs the gguf library: pip install 'lfm_jax[gguf]' ({error})") from None
    return gguf
