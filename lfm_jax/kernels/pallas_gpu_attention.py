"""Attention of one query a row to a decode state, for NVIDIA GPUs: "split-K" flash decoding in Pallas' Triton dialect.

A step of decoding reads every key and value in use once and does next to nothing with them, so memory is all that
counts. Plain XLA copies keys and values first to bring heads before slots, and reads all slots, used or not. Here a
program takes one key/value head of one row where it lies, and only the slots between the first and the last one that
are seen. With few rows several programs share a row's slots, and their sums are put together afterwards.

JAX calls this dialect deprecated; without it the kernel wants a port to Mosaic GPU, as its neighbours are written.

Dimensions: B batch, S key slots, N query heads, K key/value heads, G = N / K, H head width, M = G filled up to what a
matrix unit takes, Y slots of a block, J parts that a row's slots are split into.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

BLOCK = 64
"""Slots that a program meets at one time."""
WARPS, STAGES = 4, 3
PROGRAMS = 1024
"""Programs that are worth having: a few for each of the 132 multiprocessors of a Hopper chip."""
LEAST_ROWS = 16
"""Rows of the smallest product of matrices."""
LOWEST = float(jnp.finfo(jnp.float32).min)


@functools.partial(jax.jit, static_argnames=("block", "programs", "interpret"))
def attend_slots(
    q_BNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, first_B: jax.Array, stop_B: jax.Array, *,
    block: int = BLOCK, programs: int = PROGRAMS, interpret: bool = False,
) -> jax.Array:
    """Softmax attention to the slots [first, stop) of each row, scale H ** -0.5, softmax in float32; no derivative.

    Args:
      q_BNH: queries; N is a multiple of K, H is 16, 32, 64 or 128.
      k_BSKH, v_BSKH: of q's dtype. Nothing else is read than the blocks that hold the slots; values there must be
        finite.
      first_B, stop_B: int32.
      block, programs: of the kernel; only its speed depends on them.
      interpret: on any platform, for tests.

    Returns:
      out_BNH in q's dtype; zeros where no slot is seen.
    """
    B, N, H = q_BNH.shape
    S, K = k_BSKH.shape[1:3]
    G = N // K
    M = max(LEAST_ROWS, 1 << (G - 1).bit_length())
    blocks = pl.cdiv(S, block)
    each = pl.cdiv(blocks, min(blocks, max(1, programs // (B * K))))
    J = pl.cdiv(blocks, each)

    whole = pl.BlockSpec((None, S, None, H), lambda b, k, j: (b, 0, k, 0))
    a_row = pl.BlockSpec((None,), lambda b, k, j: (b,))
    sums = pl.BlockSpec((None, None, None, M), lambda b, k, j: (b, k, j, 0))
    out_BKJGH, total_BKJG, peak_BKJG = pl.pallas_call(
        functools.partial(_kernel, slots=S, rows=G, block=block, each=each, scale=H**-0.5),
        grid=(B, K, J),
        in_specs=[pl.BlockSpec((None, None, M, H), lambda b, k, j: (b, k, 0, 0)), whole, whole, a_row, a_row],
        out_specs=[pl.BlockSpec((None, None, None, M, H), lambda b, k, j: (b, k, j, 0, 0)), sums, sums],
        out_shape=[
            jax.ShapeDtypeStruct((B, K, J, G, H), q_BNH.dtype if J == 1 else jnp.float32),
            jax.ShapeDtypeStruct((B, K, J, G), jnp.float32),
            jax.ShapeDtypeStruct((B, K, J, G), jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=WARPS, num_stages=STAGES),
        interpret=interpret,
        name="attend_slots",
    )(q_BNH.reshape(B, K, G, H), k_BSKH, v_BSKH, first_B, stop_B)
    if J == 1:
        return out_BKJGH.reshape(B, N, H)
    share_BKJG = total_BKJG * jnp.exp(peak_BKJG - jnp.max(peak_BKJG, axis=2, keepdims=True))
    share_BKJG /= jnp.maximum(jnp.sum(share_BKJG, axis=2, keepdims=True), jnp.finfo(jnp.float32).tiny)
    return jnp.sum(out_BKJGH * share_BKJG[..., None], axis=2).reshape(B, N, H).astype(q_BNH.dtype)


def _kernel(
    q_MH: Any, k_SH: Any, v_SH: Any, first: Any, stop: Any, out_MH: Any, total_M: Any, peak_M: Any, *,
    slots: int, rows: int, block: int, each: int, scale: float,
) -> None:
    """One part of a row's slots for one head: the mean of their values, the sum of their weights and its exponent."""
    M, H = q_MH.shape
    # A row that has outgrown its slots gets NaN from the caller, and must not read on.
    j, first, stop = pl.program_id(2), first[()], jnp.minimum(stop[()], slots)
    real_M = jnp.arange(M) < rows
    q = plgpu.load(q_MH.at[pl.ds(0, M), :], mask=real_M[:, None], other=0.0)
    exact = q.dtype == jnp.float32

    def meet(i: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        peak, total, out = carry
        slot_Y = i * block + jnp.arange(block)
        there = None if slots % block == 0 else (slot_Y < slots)[:, None]
        k, v = (plgpu.load(x.at[pl.ds(i * block, block), :], mask=there, other=None if there is None else 0.0)
                for x in (k_SH, v_SH))
        seen = ((slot_Y >= first) & (slot_Y < stop))[None]
        scores = jnp.where(seen, _dot(q, k.T, exact) * scale, LOWEST)
        higher = jnp.maximum(peak, jnp.max(scores, axis=1))
        shrink = jnp.exp(peak - higher)
        weight = jnp.where(seen, jnp.exp(scores - higher[:, None]), 0.0)
        new = _dot(weight.astype(v.dtype), v, exact)
        return higher, total * shrink + jnp.sum(weight, axis=1), out * shrink[:, None] + new

    begin = jnp.maximum(first // block, j * each)
    end = jnp.minimum(pl.cdiv(stop, block), (j + 1) * each)
    start = (jnp.full((M,), LOWEST, jnp.float32), jnp.zeros((M,), jnp.float32), jnp.zeros((M, H), jnp.float32))
    peak, total, out = lax.fori_loop(begin, end, meet, start)
    mean = out / jnp.where(total == 0, 1.0, total)[:, None]
    plgpu.store(out_MH.at[pl.ds(0, M), :], mean.astype(out_MH.dtype), mask=real_M[:, None])
    plgpu.store(total_M.at[pl.ds(0, M)], total, mask=real_M)
    plgpu.store(peak_M.at[pl.ds(0, M)], peak, mask=real_M)


def _dot(x: jax.Array, y: jax.Array, exact: bool) -> jax.Array:
    """Sums in float32; `exact`, of float32 itself and not of what is left of it in tf32."""
    return jnp.dot(x, y, preferred_element_type=jnp.float32, precision=lax.Precision.HIGHEST if exact else None)
