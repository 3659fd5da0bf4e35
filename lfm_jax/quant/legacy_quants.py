"""Q4_0, Q4_1, Q5_0 and Q5_1 with importance weights: blocks of 32 with float16 scales of their own.

Value = d * (q - 8) or d * (q - 16) for Q4_0 and Q5_0, d * q + m for Q4_1 and Q5_1 (quantize_row_q4_0_impl and its
siblings in ggml/src/ggml-quants.c of llama.cpp). Without weights, and back to numbers, the `gguf` library does it.

R rows, X columns, C values of a block, N blocks.
"""

from __future__ import annotations

import numpy as np

from lfm_jax.quant.scales import fit_affine, fit_symmetric

BLOCK = 32

Q4_0 = np.dtype([("d", "<f2"), ("qs", "u1", 16)])
Q4_1 = np.dtype([("d", "<f2"), ("m", "<f2"), ("qs", "u1", 16)])
Q5_0 = np.dtype([("d", "<f2"), ("qh", "<u4"), ("qs", "u1", 16)])
Q5_1 = np.dtype([("d", "<f2"), ("m", "<f2"), ("qh", "<u4"), ("qs", "u1", 16)])


def encode_weighted(x_RX: np.ndarray, w_RX: np.ndarray, layout: np.dtype) -> np.ndarray:
    """Quantises whole rows with importance weights of the same shape to N = R X / 32 records of the layout."""
    names = layout.names or ()
    bits = 5 if "qh" in names else 4
    variance_R1 = np.square(x_RX).mean(1, keepdims=True)
    weight_RX = w_RX * np.sqrt(variance_R1 + np.square(x_RX))
    x_CN, weight_CN = (np.ascontiguousarray(y.reshape(-1, BLOCK).T) for y in (x_RX, weight_RX))
    records = np.empty(x_CN.shape[1], layout)
    if "m" in names:
        levels = 2**bits - 1
        records["d"], offset_N = scale_N, _ = fit_affine(x_CN, weight_CN, levels, -0.9, 0.05, 36)
        records["m"] = -offset_N
        divisor_N = np.where(scale_N == 0, np.float32(np.inf), scale_N)
        q_CN = np.clip(np.rint((x_CN + offset_N) / divisor_N), 0, levels)
    else:
        half = 2 ** (bits - 1)
        records["d"], inverse_N = fit_symmetric(x_CN, weight_CN, half)
        q_CN = np.clip(np.rint(x_CN * inverse_N), -half, half - 1) + half
    q_NC = np.ascontiguousarray(q_CN.astype(np.uint8).T)
    records["qs"] = q_NC[:, :16] & 15 | (q_NC[:, 16:] & 15) << 4
    if bits == 5:
        records["qh"] = np.packbits(q_NC >> 4, axis=1, bitorder="little").view("<u4")[:, 0]
    return records
