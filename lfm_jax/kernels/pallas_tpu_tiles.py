"""What the Pallas kernels for TPU share: how a [B, T, D] array is cut into tiles, and the walk over them.

A vector register of a TPU holds 8 sublanes x 128 lanes. Channels lie along the lanes and time along the sublanes.

Dimensions: B batch, T time, D channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

SUBLANES, LANES = 8, 128
PACKED = 2 * SUBLANES  # Rows of a bfloat16 register.
MAX_ROWS, MAX_WIDTH = 1024, 512  # Of a tile: time and channels. Tests make them smaller.
MIN_ROWS = SUBLANES * PACKED  # The scan cuts a tile into 8 stretches; one number a token fills the lanes once.
BLOCK_BYTES = 8 << 20  # Of all blocks of a kernel, two copies each. Scratch comes on top; a v5e grants 16 MiB unasked.

Refs = Mapping[str, Any]
Inputs = dict[str, tuple[jax.Array | None, pl.BlockSpec]]
Outputs = dict[str, tuple[tuple[int, ...], Any, pl.BlockSpec] | None]


def check_dtypes(**arrays: jax.Array | None) -> None:
    for name, x in arrays.items():
        if x is not None and x.dtype not in (jnp.float32, jnp.bfloat16):
            raise ValueError(f"{name} is {x.dtype}; pallas_tpu takes float32 or bfloat16; cast it or choose another")


def itemsize(*arrays: jax.Array | None) -> int:
    return sum(x.dtype.itemsize for x in arrays if x is not None)


def tile_shape(T: int, D: int, itemsize: int) -> tuple[int, int]:
    """Rows (time) and width (channels) of a tile, where one element of all blocks together takes `itemsize` bytes."""
    width = LANES * pl.cdiv(pl.cdiv(D, LANES), pl.cdiv(D, MAX_WIDTH))
    rows = MAX_ROWS
    # What a tile has past the end is work without use: an eighth of it all at most.
    while rows > MIN_ROWS and (2 * rows * width * itemsize > BLOCK_BYTES or -T % rows > T // 8):
        rows //= 2
    return rows, width


def call(
    kernel: Callable[[Refs], None],
    grid: tuple[int, ...],
    name: str,
    interpret: bool,
    *,
    inputs: Inputs,
    outputs: Outputs,
    scratch: dict[str, Any],
    flops: int,
) -> dict[str, Any]:
    """`kernel(refs by name)` over the grid; what is None is left out, and stays None among the results.

    XLA schedules around the call by what we say it costs: `flops`, and every input and output once.
    """
    arrays = {key: array for key, (array, _) in inputs.items() if array is not None}
    wanted = {key: output for key, output in outputs.items() if output is not None}
    names = [*arrays, *wanted, *scratch]
    moved = sum(x.nbytes for x in {id(x): x for x in arrays.values()}.values())  # One may come in several cuts.
    moved += sum(math.prod(shape) * jnp.dtype(dtype).itemsize for shape, dtype, _ in wanted.values())
    results = pl.pallas_call(
        lambda *refs: kernel(dict(zip(names, refs, strict=True))),
        grid=grid,
        in_specs=[inputs[key][1] for key in arrays],
        out_specs=[spec for _, _, spec in wanted.values()],
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype, _ in wanted.values()],
        scratch_shapes=list(scratch.values()),
        cost_estimate=pl.CostEstimate(flops=flops, bytes_accessed=moved, transcendentals=0),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        interpret=interpret,
        name=name,
    )(*arrays.values())
    return dict.fromkeys(outputs) | dict(zip(wanted, results, strict=True))
