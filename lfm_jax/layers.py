"""RMSNorm, rotary embedding, SwiGLU: the parts every block shares.

Dimensions: B batch, T time, D model width, F feed-forward width, N heads, H head width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from lfm_jax.config import ModelConfig
from lfm_jax.kernels.linear import linear


def normal_param(rngs: nnx.Rngs, shape: tuple[int, ...], config: ModelConfig) -> nnx.Param:
    """A matrix drawn from N(0, init_std), as `Lfm2PreTrainedModel` initialises every weight."""
    w = config.init_std * jax.random.normal(rngs.params(), shape, jnp.float32)
    return nnx.Param(w.astype(config.param_dtype))


def zeros_param(shape: tuple[int, ...], config: ModelConfig) -> nnx.Param:
    return nnx.Param(jnp.zeros(shape, config.param_dtype))


class RMSNorm(nnx.Module):
    """`w * x / rms(x)` over the last axis; the variance in float32, the product in x's dtype (`Lfm2RMSNorm`)."""

    def __init__(self, size: int, config: ModelConfig):
        self.weight = nnx.Param(jnp.ones((size,), config.param_dtype))
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


class SwiGLU(nnx.Module):
    """`w2(silu(w1 x) * w3 x)`, no bias: w1 is the gate, w3 up, w2 down (`Lfm2MLP`)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        D, F = config.hidden_size, config.ffn_size
        self.w1 = normal_param(rngs, (F, D), config)
        self.w3 = normal_param(rngs, (F, D), config)
        self.w2 = normal_param(rngs, (D, F), config)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        gate_BTF, up_BTF = linear(x_BTD, self.w1[...]), linear(x_BTD, self.w3[...])
        return linear(jax.nn.silu(gate_BTF) * up_BTF, self.w2[...])
