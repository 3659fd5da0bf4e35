"""The scales with which blocks of numbers are rounded: the searches of llama.cpp, for many blocks at once.

A block is a column, so that each step is a pass over contiguous memory: C values of each of N blocks. All sums are
float32, as there. Formulas: ggml/src/ggml-quants.c of llama.cpp.
"""

from __future__ import annotations

import numpy as np

TINY = np.float32(1e-15)
"""A block whose largest magnitude is smaller counts as zero (GROUP_MAX_EPS there)."""


def fit_affine(
    x_CN: np.ndarray, w_CN: np.ndarray, levels: int, start: float, step: float, steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """Fits x = scale q - offset with q in 0..levels and offset >= 0, by least squares weighted with w.

    It rounds with the range from the lowest value (or 0) to the highest split into `levels + start + step * i` parts,
    i = 0..steps, solves for scale and offset each time, and keeps the best, whose offset then is where the range begins
    (make_qkx2_quants, make_qkx3_quants).

    Returns:
      (scale_N, offset_N).
    """
    highest_N, min_N = x_CN.max(0), np.minimum(x_CN.min(0), 0)
    flat_N = highest_N == min_N  # A block of one value, not above 0, has scale 0: every q is 0.
    scale_N = (highest_N - min_N) / levels
    wx_CN = w_CN * x_CN
    sum_w_N, sum_x_N = w_CN.sum(0), wx_CN.sum(0)
    q_CN, scratch_CN = np.empty_like(x_CN), np.empty_like(x_CN)

    def split(parts: np.float32) -> None:
        np.subtract(x_CN, min_N, out=q_CN)
        np.multiply(q_CN, parts / np.where(flat_N, np.float32(np.inf), highest_N - min_N), out=q_CN)
        np.rint(q_CN, out=q_CN)
        np.clip(q_CN, 0, levels, out=q_CN)

    def error(scale_N: np.ndarray, min_N: np.ndarray) -> np.ndarray:
        np.multiply(q_CN, scale_N, out=scratch_CN)
        np.add(scratch_CN, min_N, out=scratch_CN)
        np.subtract(scratch_CN, x_CN, out=scratch_CN)
        return np.einsum("cn,cn,cn->n", w_CN, scratch_CN, scratch_CN)

    split(np.float32(levels))
    least_N = error(scale_N, min_N)
    for i in range(steps + 1):
        split(np.float32(start) + np.float32(step) * np.float32(i) + np.float32(levels))
        np.multiply(w_CN, q_CN, out=scratch_CN)
        sum_q_N = scratch_CN.sum(0)
        sum_qq_N = np.einsum("cn,cn->n", scratch_CN, q_CN)
        sum_xq_N = np.einsum("cn,cn->n", wx_CN, q_CN)
        determinant_N = sum_w_N * sum_qq_N - sum_q_N * sum_q_N
        solvable_N = determinant_N > 0
        determinant_N[~solvable_N] = 1
        tried_N = (sum_w_N * sum_xq_N - sum_x_N * sum_q_N) / determinant_N
        tried_min_N = (sum_qq_N * sum_x_N - sum_q_N * sum_xq_N) / determinant_N
        through_zero_N = solvable_N & (tried_min_N > 0)
        tried_N[through_zero_N] = sum_xq_N[through_zero_N] / sum_qq_N[through_zero_N]
        tried_min_N[through_zero_N] = 0
        error_N = error(tried_N, tried_min_N)
        better_N = solvable_N & (error_N < least_N)
        for kept_N, new_N in ((least_N, error_N), (scale_N, tried_N), (min_N, tried_min_N)):
            np.copyto(kept_N, new_N, where=better_N)
    return scale_N, -min_N


def fit_symmetric(x_CN: np.ndarray, w_CN: np.ndarray | None, levels: int) -> tuple[np.ndarray, np.ndarray]:
    """Fits x = scale q with q in -levels..levels-1, by least squares weighted with w (None: with x squared).

    It divides by the value of largest magnitude so that this becomes `-(levels + i / 10)`, i = -9..9, solves for the
    scale each time, and keeps the best (make_qx_quants with rmse_type 1).

    Returns:
      (scale_N, inverse_N): q is x * inverse, rounded and clipped; both are 0 where all values are about 0.
    """
    peak_N = np.take_along_axis(x_CN, np.abs(x_CN).argmax(0)[None], 0)[0]
    zero_N = np.abs(peak_N) < TINY
    peak_N = np.where(zero_N, np.float32(1), peak_N)
    w_CN = x_CN * x_CN if w_CN is None else w_CN
    wx_CN = w_CN * x_CN
    q_CN = np.empty_like(x_CN)
    scale_N, best_N, inverse_N = np.zeros_like(peak_N), np.full_like(peak_N, -1), -levels / peak_N
    for i in (0, *range(-9, 0), *range(1, 10)):
        tried_N = -(np.float32(levels) + np.float32(0.1) * np.float32(i)) / peak_N
        np.multiply(x_CN, tried_N, out=q_CN)
        np.rint(q_CN, out=q_CN)
        np.clip(q_CN, -levels, levels - 1, out=q_CN)
        sum_xq_N = np.einsum("cn,cn->n", wx_CN, q_CN)
        sum_qq_N = np.einsum("cn,cn,cn->n", w_CN, q_CN, q_CN)
        better_N = (sum_qq_N > 0) & (sum_xq_N * sum_xq_N > best_N * sum_qq_N)
        np.divide(sum_xq_N, sum_qq_N, out=scale_N, where=better_N)
        np.multiply(scale_N, sum_xq_N, out=best_N, where=better_N)
        np.copyto(inverse_N, tried_N, where=better_N)
    scale_N[zero_N] = 0
    inverse_N[zero_N] = 0
    return scale_N, inverse_N


def fit_positive(x_CN: np.ndarray, w_CN: np.ndarray, levels: int) -> tuple[np.ndarray, np.ndarray]:
    """Fits x >= 0 as scale q with q in 0..levels, by least squares weighted with w, then moves one q after another
    while that helps (make_qp_quants).

    Returns:
      (scale_N, q_CN).
    """
    peak_N = x_CN.max(0)
    zero_N = peak_N < TINY
    peak_N = np.where(zero_N, np.float32(1), peak_N)

    def rounded(inverse_N: np.ndarray) -> np.ndarray:
        return np.clip(np.rint(inverse_N * x_CN), 0, levels)

    inverse_N, least_N = levels / peak_N, np.full_like(peak_N, np.inf)
    for i in (0, *range(-4, 0), *range(1, 5)):
        tried_N = (np.float32(0.1) * np.float32(i) + np.float32(levels)) / peak_N
        error_N = (w_CN * (x_CN - 1 / tried_N * rounded(tried_N)) ** 2).sum(0)
        better_N = error_N < least_N
        np.copyto(least_N, error_N, where=better_N)
        np.copyto(inverse_N, tried_N, where=better_N)
    q_CN = rounded(inverse_N)
    sum_xq_N, sum_qq_N = (w_CN * x_CN * q_CN).sum(0), (w_CN * q_CN * q_CN).sum(0)
    for _ in range(5):
        for x_N, w_N, q_N in zip(x_CN, w_CN, q_CN, strict=True):
            other_xq_N, other_qq_N = sum_xq_N - w_N * x_N * q_N, sum_qq_N - w_N * q_N * q_N
            free_N = (other_xq_N > 0) & (other_qq_N > 0)
            new_N = np.minimum(np.rint(x_N * other_qq_N / np.where(free_N, other_xq_N, 1)), levels)
            xq_N, qq_N = other_xq_N + w_N * x_N * new_N, other_qq_N + w_N * new_N * new_N
            better_N = free_N & (new_N != q_N) & (xq_N * xq_N * sum_qq_N > sum_xq_N * sum_xq_N * qq_N)
            for kept_N, moved_N in ((q_N, new_N), (sum_xq_N, xq_N), (sum_qq_N, qq_N)):
                np.copyto(kept_N, moved_N, where=better_N)
    q_CN[:, zero_N] = 0
    scale_N = np.divide(sum_xq_N, sum_qq_N, out=np.zeros_like(sum_xq_N), where=sum_qq_N > 0)
    return np.where(zero_N, 0, scale_N), q_CN
