"""Makers of parameters, RMSNorm and rotary embedding: the parts that all blocks share.

Dimensions: B batch, T time, D model width, N heads, H head width.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lfm_jax.config import ModelConfig

Axes = tuple[str | None, ...]
"""Logical axes of a parameter, one for each dimension (`sharding.LOGICAL_AXES`)."""


class Matrix(NamedTuple):
    """The axes that make a parameter a matrix, counted from its last. Axes before them count matrices, as the streams
    of an in_proj and stacked layers do."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


OUT_IN = Matrix(inputs=(-1,), outputs=(-2,))
IN_OUT = Matrix(inputs=(-2,), outputs=(-1,))
HEADS_IN = Matrix(inputs=(-1,), outputs=(-3, -2))
OUT_HEADS = Matrix(inputs=(-2, -1), outputs=(-3,))


@dataclasses.dataclass(frozen=True)
class Traits:
    """Properties of a parameter besides its values, stored as `traits` in its metadata."""

    axes: Axes
    decay: bool
    """Whether weight decay applies to it by default: to matrices and tables, not to norms, taps, biases and vectors."""
    matrix: Matrix | None
    """The matrix between activations that Muon orthogonalises; None leaves the parameter to AdamW."""


def param(w: jax.Array, axes: Axes, config: ModelConfig, *, decay: bool, matrix: Matrix | None) -> nnx.Param:
    """Makes a parameter in `param_dtype`, with its `Traits` as metadata (read by `model.param_traits`)."""
    return nnx.Param(w.astype(config.param_dtype), traits=Traits(axes, decay, matrix))


def buffer(w: jax.Array, axes: Axes) -> nnx.Param:
    """Makes a weight without a gradient, float32 whatever `param_dtype` is (`kinds.FeedForwardKind.buffers`)."""
    return nnx.Param(w.astype(jnp.float32), traits=Traits(axes, decay=False, matrix=None))


def normal_param(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: Axes, config: ModelConfig, *, decay: bool, matrix: Matrix | None,
    fan_in: int | None = None, residual: bool = False,
) -> nnx.Param:
    """Makes a parameter drawn from a normal distribution (`ModelConfig.init`).

    Args:
      decay, matrix: see `Traits`.
      fan_in: number of terms in the sum of one output; None if there is no sum (an embedding table).
      residual: whether the matrix writes to the residual stream, as 2 L matrices do.
    """
    std = config.init_std
    if config.init == "scaled" and fan_in is not None:
        std = fan_in**-0.5 / ((2 * config.num_layers) ** 0.5 if residual else 1.0)
    w = std * jax.random.normal(rngs.params(), shape, jnp.float32)
    return param(w, axes, config, decay=decay, matrix=matrix)


class RMSNorm(nnx.Module):
    """`w * x / rms(x)` over the last axis; the variance in float32, the product in x's dtype (`Lfm2RMSNorm`)."""

    def __init__(self, size: int, config: ModelConfig):
        self.weight = param(jnp.ones((size,)), (None,), config, decay=False, matrix=None)
        self.eps = config.norm_eps

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return normed.astype(x.dtype) * self.weight[...].astype(x.dtype)


def rotary(x_BTNH: jax.Array, positions_BT: jax.Array, theta: float, fraction: float = 1.0) -> jax.Array:
    """Applies half-split (NeoX) rotary embedding to heads, with angles and rotation in float32.

    Element i of the first half and element i of the second half are a pair, which is rotated by
    `position * theta ** (-2 i / H)`. With a `fraction`, only so many of the H / 2 pairs turn (rounded down), the first
    and fastest ones, as fast as in a whole head (`proportional` in `transformers`).
    """
    half = x_BTNH.shape[-1] // 2
    frequency_H = 1.0 / theta ** (jnp.arange(half, dtype=jnp.float32) / half)
    turning = int(fraction * x_BTNH.shape[-1] // 2)
    if turning < half:
        frequency_H = jnp.where(jnp.arange(half) < turning, frequency_H, 0.0)
    angle_BT1H = positions_BT[:, :, None, None].astype(jnp.float32) * frequency_H
    cos, sin = jnp.cos(angle_BT1H), jnp.sin(angle_BT1H)
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BTNH.dtype)
