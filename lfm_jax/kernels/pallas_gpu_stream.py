"""What the Hopper kernels share: chunks of time streamed through shared memory by the copy engine (TMA).

A program owns C channels of one batch row. Its one warpgroup walks down the rows (time steps) of a chunk, one channel
of a row to a thread, in float32 registers, while the copy engine fills a ring of input slots and empties a ring of two
output slots. What the copy engine reads beyond an array is 0, what it writes there is dropped: T needs no padding, D
only up to a multiple of 8 (rows are multiples of 16 bytes; another D costs a copy of each long operand).

Written for Pallas' Mosaic GPU dialect, whose reference is `jax.experimental.pallas.mosaic_gpu`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


class Window(NamedTuple):
    """What the copy engine moves at a step: the part of `ref` at `index(step)`, which has this shape."""

    ref: Any
    shape: tuple[int, ...]
    index: Callable[[Any], tuple]


def stream(
    body: Callable[[Any, dict[str, Any], Any], Any],
    carry: Any,
    steps: int,
    *,
    slots: int,
    ins: dict[str, Window],
    outs: dict[str, Window],
) -> Any:
    """Runs `carry = body(step, blocks, carry)` over the steps of a program and returns the last carry.

    `blocks` holds the windows of the step in shared memory, under their names. Up to `slots` steps of inputs are on
    the way or in use at a time; the size of a window is a multiple of 128 bytes.

    Why it is in order: `ready` counts the loads of a slot. `commit_smem` is a barrier of the warpgroup and a fence
    towards the copy engine: behind it every thread has read the input slot, so it may be filled again, and written the
    output slot, so it may be sent. An output slot is written again when the stores of two steps before have read it.
    """
    slots = min(slots, steps)

    def run(in_slots, out_slots, ready):
        def fetch(step):
            slot = lax.rem(step, jnp.int32(slots))
            for name, window in ins.items():
                source = window.ref.at[window.index(step)]
                plgpu.copy_gmem_to_smem(source, in_slots[name].at[slot], ready.at[slot])

        def advance(step, carry):
            in_slot, out_slot = lax.rem(step, jnp.int32(slots)), lax.rem(step, jnp.int32(2))
            plgpu.barrier_wait(ready.at[in_slot])
            plgpu.wait_smem_to_gmem(len(outs), wait_read_only=True)
            blocks = {name: ref.at[in_slot] for name, ref in in_slots.items()}
            blocks |= {name: ref.at[out_slot] for name, ref in out_slots.items()}
            carry = body(step, blocks, carry)
            plgpu.commit_smem()
            for name, window in outs.items():
                plgpu.copy_smem_to_gmem(blocks[name], window.ref.at[window.index(step)])

            @pl.when(step + slots < steps)
            def _():
                fetch(step + slots)

            return carry

        for step in range(slots):
            fetch(jnp.int32(step))
        result = lax.fori_loop(0, steps, advance, carry)
        plgpu.wait_smem_to_gmem(0)
        return result

    def ring(count, windows):
        return {name: plgpu.SMEM((count, *window.shape), window.ref.dtype) for name, window in windows.items()}

    ready = plgpu.Barrier(num_arrivals=len(ins), num_barriers=slots)
    return pl.run_scoped(run, ring(slots, ins), ring(2, outs), ready)


def launch(
    program: Callable[[tuple, dict[str, Any]], None],
    name: str,
    grid: tuple[int, ...],
    args: dict[str, jax.Array],
    outs: dict[str, jax.ShapeDtypeStruct],
    interpret: bool,
) -> dict[str, jax.Array]:
    """Runs `program(place, refs)` all over the grid: `place` is where it stands, `refs` are args and outs by name.

    In interpret mode a race between the warpgroup and the copy engine is an error.

    Raises:
      ValueError: interpret mode on a jax that does not offer it.
    """
    if interpret and not hasattr(plgpu, "InterpretGPUParams"):
        raise ValueError(f"interpret=True of pallas_gpu needs jax 0.11.2 or later; this is {jax.__version__}")
    axes = tuple(f"{name}_{i}" for i in range(len(grid)))

    def kernel(*refs):
        program(tuple(lax.axis_index(axis) for axis in axes), dict(zip((*args, *outs), refs, strict=True)))

    results = plgpu.kernel(
        kernel, out_type=tuple(outs.values()), grid=grid, grid_names=axes, kernel_name=name,
        # Otherwise every store to shared memory stands between two barriers. No thread reads there what it wrote.
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=plgpu.InterpretGPUParams(detect_races=True) if interpret else None,
    )(*args.values())
    return dict(zip(outs, results, strict=True))


def pad(x: jax.Array, multiple: int) -> jax.Array:
    """x with zeros at the end of its last axis."""
    extra = -x.shape[-1] % multiple
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, extra)]) if extra else x


def check_dtypes(**arrays: jax.Array | None) -> None:
    """Raises ValueError unless all are bfloat16 or float32."""
    for name, x in arrays.items():
        if x is not None and x.dtype not in (jnp.bfloat16, jnp.float32):
            raise ValueError(f"{name} is {x.dtype}; pallas_gpu takes bfloat16 or float32: cast, or choose another impl")
