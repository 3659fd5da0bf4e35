"""How a parameter is made, RMSNorm and rotary embedding: the parts every block shares.

Dimensions: B batch, T time, D model width, N heads, H head width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from lfm_jax.config import ModelConfig

Axes = tuple[str | None, ...]
"""Logical axes of a parameter, one a dimension (`sharding.LOGICAL_AXES`)."""


def param(w: jax.Array, axes: Axes, config: ModelConfig) -> nnx.Param:
    """A parameter in `param_dtype`, with its logical axes as metadata (read by `model.param_axes`)."""
    return nnx.Param(w.astype(config.param_dtype), axes=axes)


def normal_param(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: Axes, config: ModelConfig, *, fan_in: int | None = None,
    residual: bool = False,
) -> nnx.Param:
    """A matrix drawn from a normal distribution (`ModelConfig.init`).

    Args:
      fan_in: terms in the sum that makes one output; None where there is no sum (an embedding table).
      residual: the matrix writes to the residual stream, one of 2 L that do.
    """
    std = config.init_std
    if config.init == "scaled" and fan_in is not None:
        std = fan_in**-0.5 / ((2 * config.num_layers) ** 0.5 if residual else 1.0)
    return param(std * jax.random.normal(rngs.params(), shape, jnp.float32), axes, config)


def zeros_param(shape: tuple[int, ...], axes: Axes, config: ModelConfig) -> nnx.Param:
    return param(jnp.zeros(shape), axes, config)


class RMSNorm(nnx.Module):
    """`w * x / rms(x)` over the last axis; the variance in float32, the product in x's dtype (`Lfm2RMSNorm`)."""

    def __init__(self, size: int, config: ModelConfig):
        self.weight = param(jnp.ones((size,)), (None,), config)
        self.eps = config.norm_eps

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return normed.astype(x.dtype) * self.weight[...].astype(x.dtype)


def rotary(x_BTNH: jax.Array, positions_BT: jax.Array, theta: float) -> jax.Array:
    """Half-split (NeoX) rotary embedding over the whole head, angles and rotation in float32.

    Element i of the first half and element i of the second half are one pair, turned by
    `position * theta ** (-2 i / H)`.
    """
    half = x_BTNH.shape[-1] // 2
    frequency_H = 1.0 / theta ** (jnp.arange(half, dtype=jnp.float32) / half)
    angle_BT1H = positions_BT[:, :, None, None].astype(jnp.float32) * frequency_H
    cos, sin = jnp.cos(angle_BT1H), jnp.sin(angle_BT1H)
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BTNH.dtype)
