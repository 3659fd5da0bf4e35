"""The product of sorted rows with the matrix of each row's group, for Hopper GPUs: JAX's own kernels in Pallas' Mosaic
GPU dialect, and the derivative by them.

Where XLA has no such product on a GPU, `jax.lax.ragged_dot` multiplies every row with every matrix.

Dimensions: R rows, E groups, I inputs, O outputs.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

import jax
import jax.numpy as jnp

BLOCK = 128
"""Rows and columns of a block of the result; I and O are multiples of it."""
DEPTH = 64
"""Inputs that a block takes at a time."""
STEPS = 4
"""Of those, how many are under way."""


def grouped_product(rows_RI: jax.Array, w_EIO: jax.Array, size_E: jax.Array) -> jax.Array:
    """Computes `rows[r] @ w[e]`, e the group of row r, in the rows' dtype, added up in float32.

    Differentiable in rows and w.

    Args:
      rows_RI: bfloat16 or float16, sorted by group.
      w_EIO: of the same dtype.
      size_E: int32, rows of each group. Rows beyond all groups mean nothing, in the result and in what its derivative
        gives, and may be NaN there.

    Raises:
      ValueError: another dtype, or I or O that is no multiple of BLOCK.
    """
    if rows_RI.dtype not in (jnp.bfloat16, jnp.float16) or w_EIO.dtype != rows_RI.dtype:
        raise ValueError(f"rows are {rows_RI.dtype} and matrices {w_EIO.dtype}; impl='pallas_gpu' takes one half-"
                         "precision dtype: cast, or choose another impl")
    if w_EIO.shape[1] % BLOCK or w_EIO.shape[2] % BLOCK:
        raise ValueError(f"the matrices have shape {w_EIO.shape[1:]}; impl='pallas_gpu' takes multiples of {BLOCK}: "
                         "choose another impl")
    return _product(rows_RI, w_EIO, size_E)


@jax.custom_vjp
def _product(rows_RI: jax.Array, w_EIO: jax.Array, size_E: jax.Array) -> jax.Array:
    return _by_matrices(rows_RI, w_EIO, size_E, transposed=False)


def _forward(*args: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _product(*args), args


def _backward(kept: tuple[jax.Array, ...], dy_RO: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    rows_RI, w_EIO, size_E = kept
    # The kernel multiplies what is not of a group with 0, which NaN survives.
    in_group_R1 = (jnp.arange(len(rows_RI)) < jnp.sum(size_E))[:, None]
    dy_RO = jnp.where(in_group_R1, dy_RO, 0)
    rows_RI = jnp.where(in_group_R1, rows_RI, 0)
    drows_RI = _by_matrices(dy_RO, w_EIO, size_E, transposed=True)
    dw_EIO = _kernel("transposed_ragged_dot")(
        _whole_blocks(rows_RI), _whole_blocks(dy_RO), group_sizes=size_E, **_blocks(dy_RO.shape[1])
    )
    return drows_RI, dw_EIO, None


_product.defvjp(_forward, _backward)


def _by_matrices(rows_RI: jax.Array, w: jax.Array, size_E: jax.Array, *, transposed: bool) -> jax.Array:
    outputs = w.shape[1 if transposed else 2]
    result = _kernel("ragged_dot")(
        _whole_blocks(rows_RI), w, group_sizes=size_E, transpose_rhs=transposed, **_blocks(outputs)
    )
    return result[: len(rows_RI)]


def _whole_blocks(rows_RI: jax.Array) -> jax.Array:
    return jnp.pad(rows_RI, ((0, -len(rows_RI) % BLOCK), (0, 0)))


def _blocks(outputs: int) -> dict[str, int]:
    """How the kernels cut their work; measured on an H200 (docs/measurements/kernels.md)."""
    return dict(block_m=BLOCK, block_n=BLOCK, block_k=DEPTH, max_concurrent_steps=STEPS,
                grid_block_n=math.gcd(outputs // BLOCK, 4))


def _kernel(name: str) -> Any:
    # Pallas is slow to import.
    return getattr(importlib.import_module(f"jax.experimental.pallas.ops.gpu.{name}_mgpu"), name)
