"""Linear recurrence and gated convolution for Hopper GPUs (sm_90a), in Pallas' Mosaic GPU dialect.

Values and gradients are tested in interpret mode on CPU, which also looks for races. docs/measurements/kernels.md has
times on an H100. No `auto` chooses these kernels: `lfm selfcheck` has not been run there.

The frame is `pallas_gpu_stream`, the convolution `pallas_gpu_conv`, the scan is here. How fast it should be on an H200
(132 SMs, 4.3 TB/s for a copy) at B = 8, T = 4096, D = 1024 in bfloat16:
  - 4.3 TB/s at 1 us of latency is 4.3 MB on the way, 33 kB an SM; four slots of 16 kB keep 48 to 64 kB on the way.
  - There are B x D = 8192 chains, which a thread each would spread over 64 SMs only. Blocks of 64 channels make 128
    programs, each channel worked by two threads: lanes are not what is short.
  - By ptxas' schedule a step takes 14 cycles (one predicated multiply-add of latency; loads, conversions and
    stores fill the rest) and a chunk 250 more: 42 us for 4096 steps. Moving 3 x 67 MB at 4.3 TB/s takes 47 us.
  - So cutting time over programs as well (two passes, or a look-back) could win nothing here: it would read a and b
    twice or wait for other programs. With fewer chains the scan takes the same 42 us and the chip is not full.

Dimensions: B batch, T time, D channels, C channels of a program, R rows of a chunk.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lfm_jax.kernels.pallas_gpu_conv import gated_conv
from lfm_jax.kernels.pallas_gpu_stream import Window, check_dtypes, launch, pad, stream

__all__ = ["gated_conv", "scan"]

CHANNELS, ROWS, SLOTS = 64, 64, 4
GROUP = 32
"""Rows that are first all read, then computed, then all written: their reads are under way together."""


@functools.partial(jax.jit, static_argnames=("reverse", "interpret"))  # The layers of a model share one lowering.
def scan(
    a_BTD: jax.Array, b_BTD: jax.Array, h0_BD: jax.Array, *, reverse: bool, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """`h_t = a_t * h_{t-1} + b_t` in float32; no derivative.

    Args:
      a_BTD: bfloat16 or float32. Exactly 0 forgets the past whatever it is, NaN included.
      b_BTD: bfloat16 or float32, not necessarily as a.
      h0_BD: the state before the first step.
      reverse: from T - 1 down to 0, `h_t = a_t * h_{t+1} + b_t`.
      interpret: on CPU, operation by operation: slow, for tests.

    Returns:
      (h_BTD in b's dtype, the last state computed, [B, D] float32).

    Raises:
      ValueError: another dtype, or a and b of different shapes.
    """
    check_dtypes(a_BTD=a_BTD, b_BTD=b_BTD)
    if a_BTD.shape != b_BTD.shape:
        raise ValueError(f"a_BTD has shape {a_BTD.shape}; expected that of b_BTD, {b_BTD.shape}")
    B, T, D = b_BTD.shape
    C, R = CHANNELS, ROWS
    chunks, tiles = pl.cdiv(T, R), pl.cdiv(D, C)
    # 64 channels over 4 warps of 32 lanes: two warps hold a row, the other two do the same work again.
    layout = plgpu.Layout.TILED(
        plgpu.Tiling(((C,), (C // 2,), (1,))), warp_dims=(-3, plgpu.Replicated(2)), lane_dims=(-2,), vector_dim=-1
    )

    def load(ref):
        # `optimized` insists on a plan free of bank conflicts, which is for shared memory only; rows have none anyway.
        return plgpu.load(ref, layout=layout, optimized=False).astype(jnp.float32)

    def program(place, refs):
        batch, tile = place
        channels = pl.ds(tile * C, C)

        def start(step):
            return (chunks - 1 - step if reverse else step) * R

        def chunk(step, blocks, h_C):
            def group(index, h_C):
                rows = [index * GROUP + i for i in range(GROUP)]
                if reverse:
                    rows = [R - 1 - row for row in rows]
                inputs = [(load(blocks["a"].at[row]), load(blocks["b"].at[row])) for row in rows]
                states = []
                for row, (a_C, b_C) in zip(rows, inputs, strict=True):
                    if T % R:  # Rows beyond T are the identity.
                        real_C = jnp.full((C,), start(step) + row) < T
                        a_C, b_C = jnp.where(real_C, a_C, 1.0), jnp.where(real_C, b_C, 0.0)
                    h_C = jnp.where(a_C == 0, b_C, a_C * h_C + b_C)
                    states.append(h_C)
                for row, state_C in zip(rows, states, strict=True):
                    blocks["h"][row] = state_C.astype(b_BTD.dtype)
                return h_C

            return lax.fori_loop(0, R // GROUP, group, h_C)

        def window(name):
            return Window(refs[name], (R, C), lambda step: (batch, pl.ds(start(step), R), channels))

        h0_C = load(refs["h0"].at[batch, channels])
        ins, outs = {"a": window("a"), "b": window("b")}, {"h": window("h")}
        refs["last"][batch, channels] = stream(chunk, h0_C, chunks, slots=SLOTS, ins=ins, outs=outs)

    args = {"a": pad(a_BTD, 8), "b": pad(b_BTD, 8), "h0": pad(h0_BD.astype(jnp.float32), C)}
    outs = {
        "h": jax.ShapeDtypeStruct(args["b"].shape, b_BTD.dtype),
        "last": jax.ShapeDtypeStruct((B, tiles * C), jnp.float32),
    }
    results = launch(program, "linear_scan", (B, tiles), args, outs, interpret)
    return results["h"][..., :D], results["last"][:, :D]
