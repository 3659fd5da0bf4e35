"""Keys or values of a decode state in 8 bits.

Dimensions: B batch, S key slots, K key/value heads, H head width.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp

LEVELS = 127


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8Slots:
    """An array [B, S, K, H], rounded to int8 with a scale for each head of a slot, to the nearest.

    Operations on the leading axes apply to both fields alike (`jax.tree.map`).
    """

    values_BSKH: jax.Array
    scales_BSK: jax.Array
    """float32. One that is not finite says that a number was not."""

    @classmethod
    def of(cls, x_BSKH: jax.Array) -> Self:
        """Returns an array rounded."""
        x_BSKH = x_BSKH.astype(jnp.float32)
        scales_BSK = jnp.max(jnp.abs(x_BSKH), axis=-1) / LEVELS
        q_BSKH = jnp.rint(x_BSKH / jnp.where(scales_BSK == 0, 1, scales_BSK)[..., None])
        return cls(jnp.clip(q_BSKH, -LEVELS, LEVELS).astype(jnp.int8), scales_BSK)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values_BSKH.shape

    def astype(self, dtype: str | jnp.dtype) -> jax.Array:
        """Returns the array itself."""
        return (self.values_BSKH.astype(jnp.float32) * self.scales_BSK[..., None]).astype(dtype)


def rounded_like(new: jax.Array, slots: Any) -> Any:
    """Returns what is to be put into slots in their form."""
    return Int8Slots.of(new) if isinstance(slots, Int8Slots) else new.astype(slots.dtype)
