"""Q4_K, Q5_K and Q6_K: super-blocks of 256 values, whose sub-blocks have small scales with a common float16 factor.

Value = factor * scale * q for Q6_K, minus a second such product, the sub-block's offset, for Q4_K and Q5_K. Layouts are
those of ggml/src/ggml-common.h of llama.cpp, rounding that of quantize_row_q4_K_ref and its siblings, and of
quantize_row_q4_K_impl and its siblings where there are weights. So are the numbers that come out, but for the order of
sums in float32.

P super-blocks, S sub-blocks of each, C values of a sub-block, N = P S sub-blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lfm_jax.quant.scales import TINY, fit_affine, fit_positive, fit_symmetric

SUPER = 256

Q4_K = np.dtype([("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qs", "u1", (4, 32))])
Q5_K = np.dtype([("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qh", "u1", 32), ("qs", "u1", (4, 32))])
Q6_K = np.dtype([("ql", "u1", (2, 2, 32)), ("qh", "u1", (2, 32)), ("scales", "i1", 16), ("d", "<f2")])


class _Search(NamedTuple):
    """Arguments of `fit_affine`."""

    start: float
    step: float
    steps: int


_UNWEIGHTED = {15: _Search(-1, 0.1, 20), 31: _Search(-0.5, 0.1, 15)}
_WEIGHTED = _Search(-0.9, 0.05, 36)
_TWO_BITS = np.arange(0, 8, 2, dtype=np.uint8)


def _columns(x: np.ndarray, size: int) -> np.ndarray:
    """Returns each `size` successive values as a column."""
    return np.ascontiguousarray(x.reshape(-1, size).T)


def _divided(x_CN: np.ndarray, divisor_PS: np.ndarray, low: int, high: int) -> np.ndarray:
    """Returns x / divisor, rounded and clipped to low..high; 0 where the divisor is 0."""
    divisor_N = divisor_PS.reshape(-1)
    return np.clip(np.rint(x_CN / np.where(divisor_N == 0, np.inf, divisor_N).astype(np.float32)), low, high)


# -------------------------------------------------------------------- Q4_K and Q5_K


def encode_affine(x_PX: np.ndarray, w_PX: np.ndarray | None, layout: np.dtype) -> np.ndarray:
    """Quantises super-blocks [P, 256] with importance weights of the same shape, or none, to P records of Q4_K or Q5_K.
    """
    levels = 31 if layout == Q5_K else 15
    x_CN = _columns(x_PX, 32)
    if w_PX is None:
        weight_CN = np.sqrt(np.square(x_CN).sum(0) / 32) + np.abs(x_CN)
        scale_N, offset_N = fit_affine(x_CN, weight_CN, levels, *_UNWEIGHTED[levels])
        d_P, scales_PS = _by_largest(scale_N.reshape(-1, 8))
        dmin_P, offsets_PS = _by_largest(offset_N.reshape(-1, 8))
    else:
        variance_P = 2 * np.square(x_PX).sum(1) / SUPER
        weight_CN = _columns(w_PX * np.sqrt(variance_P[:, None] + np.square(x_PX)), 32)
        scale_N, offset_N = fit_affine(x_CN, weight_CN, levels, *_WEIGHTED)
        weight_SP = _columns(weight_CN.sum(0), 8)
        d_P, scales_SP = fit_positive(_columns(scale_N, 8), weight_SP, 63)
        dmin_P, offsets_SP = fit_positive(_columns(offset_N, 8), weight_SP, 63)
        scales_PS, offsets_PS = scales_SP.T, offsets_SP.T
    records = np.empty(len(x_PX), layout)
    records["d"], records["dmin"] = d_P, dmin_P
    records["scales"] = _pack_scales(scales_PS.astype(np.uint8), offsets_PS.astype(np.uint8))
    d_PS = records["d"].astype(np.float32)[:, None] * scales_PS
    offset_PS = records["dmin"].astype(np.float32)[:, None] * offsets_PS
    q_CN = _divided(x_CN + offset_PS.reshape(-1), d_PS, 0, levels).astype(np.uint8)
    q_P42C = q_CN.T.reshape(-1, 4, 2, 32)
    low_P42C = q_P42C & 15
    records["qs"] = low_P42C[:, :, 0] | low_P42C[:, :, 1] << 4
    if layout == Q5_K:
        bits = np.arange(8, dtype=np.uint8)[:, None]
        records["qh"] = np.bitwise_or.reduce((q_P42C >> 4).reshape(-1, 8, 32) << bits, axis=1)
    return records


def decode_affine(records: np.ndarray) -> np.ndarray:
    """Returns the values [P, 256] of records of Q4_K or Q5_K."""
    scales_PS, offsets_PS = _unpack_scales(records["scales"])
    d_PS = records["d"].astype(np.float32)[:, None] * scales_PS.astype(np.float32)
    offset_PS = records["dmin"].astype(np.float32)[:, None] * offsets_PS.astype(np.float32)
    q_PSC = np.stack([records["qs"] & 15, records["qs"] >> 4], axis=2).reshape(-1, 8, 32)
    if records.dtype == Q5_K:
        bits = np.arange(8, dtype=np.uint8)[:, None]
        q_PSC |= (records["qh"][:, None] >> bits & 1) << 4
    return (d_PS[..., None] * q_PSC.astype(np.float32) - offset_PS[..., None]).reshape(-1, SUPER)


def _by_largest(x_PS: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns a factor for each row and q in 0..63, the largest of which is 63: x = factor * q."""
    largest_P = np.maximum(x_PS.max(1), 0)
    inverse_P = 63 / np.where(largest_P > 0, largest_P, np.float32(np.inf))
    return largest_P / 63, np.clip(np.rint(inverse_P[:, None] * x_PS), 0, 63)


def _pack_scales(scales_PS: np.ndarray, offsets_PS: np.ndarray) -> np.ndarray:
    """Packs 8 scales and 8 offsets of 6 bits into 12 bytes; the upper bits of the last four fill up the first eight."""
    first = [x[:, :4] | x[:, 4:] >> 4 << 6 for x in (scales_PS, offsets_PS)]
    return np.concatenate([*first, scales_PS[:, 4:] & 15 | (offsets_PS[:, 4:] & 15) << 4], axis=1)


def _unpack_scales(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scales, offsets, low = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    return (np.concatenate([scales & 63, low & 15 | scales >> 6 << 4], axis=1),
            np.concatenate([offsets & 63, low >> 4 | offsets >> 6 << 4], axis=1))


# -------------------------------------------------------------------- Q6_K


def encode_symmetric(x_PX: np.ndarray, w_PX: np.ndarray | None) -> np.ndarray:
    """Quantises super-blocks [P, 256] with importance weights of the same shape, or none, to P records of Q6_K."""
    x_CN = _columns(x_PX, 16)
    scale_N, _ = fit_symmetric(x_CN, None if w_PX is None else _columns(w_PX, 16), 32)
    scale_PS = scale_N.reshape(-1, 16)
    largest_P = np.take_along_axis(scale_PS, np.abs(scale_PS).argmax(1)[:, None], 1)[:, 0]
    zero_P = np.abs(largest_P) < TINY
    inverse_P = -128 / np.where(zero_P, np.float32(1), largest_P)
    records = np.empty(len(x_PX), Q6_K)
    records["d"] = 1 / inverse_P
    scales_PS = np.minimum(np.rint(inverse_P[:, None] * scale_PS), 127)
    records["scales"] = scales_PS
    d_PS = records["d"].astype(np.float32)[:, None] * scales_PS
    q_CN = (_divided(x_CN, d_PS, -32, 31) + 32).astype(np.uint8)
    q_P24X = q_CN.T.reshape(-1, 2, 4, 32)
    low_P24X = q_P24X & 15
    records["ql"] = low_P24X[:, :, :2] | low_P24X[:, :, 2:] << 4
    records["qh"] = np.bitwise_or.reduce(q_P24X >> 4 << _TWO_BITS[:, None], axis=2)
    records[zero_P] = np.zeros((), Q6_K)
    return records


def decode_symmetric(records: np.ndarray) -> np.ndarray:
    """Returns the values [P, 256] of records of Q6_K."""
    d_PS = records["d"].astype(np.float32)[:, None] * records["scales"].astype(np.float32)
    low_P24X = np.concatenate([records["ql"] & 15, records["ql"] >> 4], axis=2)
    high_P24X = records["qh"][:, :, None] >> _TWO_BITS[:, None] & 3
    q_PSC = (low_P24X | high_P24X << 4).astype(np.int8).reshape(-1, 16, 16) - np.int8(32)
    return (d_PS[..., None] * q_PSC.astype(np.float32)).reshape(-1, SUPER)
