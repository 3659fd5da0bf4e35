"""Weights as they will be once they are rounded to a type of blocks, for training that knows of it.

Dimensions: R rows, X columns, N blocks, C numbers of a block.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from lfm_jax.quant.block_types import PLAIN, dequantize, quantize

ON_DEVICE = ("Q4_0", "Q8_0", *PLAIN)
"""Types that `rounded` makes on the device, whose results are fixed points."""
BLOCK = 32
"""Numbers that share a scale in Q4_0 and Q8_0."""


def rounded(w: jax.Array, type: str) -> jax.Array:
    """Computes `dequantize(quantize(w))` of a type of `block_types`, in float32; no derivative.

    Q4_0, Q8_0 and plain types are rounded on the device. Their results are fixed points of the rounding: quantising
    one gives it back. Other types are rounded on the host by the very code that writes files, which is slow on an
    accelerator.

    Args:
      w: [..., columns], columns whole blocks.
      type: one of `block_types.PLAIN` and `BLOCKS`.
    """
    w = w.astype(jnp.float32)
    if type in PLAIN:
        return w.astype(PLAIN[type]).astype(jnp.float32)
    if type in ("Q4_0", "Q8_0"):
        blocks = w.reshape(*w.shape[:-1], -1, BLOCK)
        return (_q4_0 if type == "Q4_0" else _q8_0)(blocks).reshape(w.shape)
    return jax.pure_callback(lambda x: _on_host(x, type), jax.ShapeDtypeStruct(w.shape, jnp.float32), w)


def straight_through(w: jax.Array, type: str) -> jax.Array:
    """`rounded`, in w's dtype, with the derivative of w itself."""
    return passed_through(w, rounded(jax.lax.stop_gradient(w), type).astype(w.dtype))


@jax.custom_vjp
def passed_through(w: jax.Array, rounded_w: jax.Array) -> jax.Array:
    """Returns `rounded_w`, with the derivative of w (the straight-through estimator, Bengio et al. 2013, arXiv
    1308.3432)."""
    return rounded_w


passed_through.defvjp(lambda w, rounded_w: (rounded_w, None), lambda _, dw: (dw, None))


def _on_host(x: np.ndarray, type: str) -> np.ndarray:
    x = np.asarray(x)
    return dequantize(quantize(x, type), type, x.shape)


def _half(d: jax.Array) -> jax.Array:
    """As a file holds a scale."""
    return d.astype(jnp.float16).astype(jnp.float32)


def _inverse(d: jax.Array) -> jax.Array:
    return jnp.where(d == 0, 0, 1 / jnp.where(d == 0, 1, d))


def _q4_0(x_NC: jax.Array) -> jax.Array:
    """What is largest in magnitude becomes -8."""
    at_N1 = jnp.argmax(jnp.abs(x_NC), axis=-1, keepdims=True)
    d_N1 = jnp.take_along_axis(x_NC, at_N1, axis=-1) / -8
    q_NC = jnp.clip(jnp.trunc(x_NC * _inverse(d_N1) + 8.5), 0, 15) - 8
    return _half(d_N1) * q_NC


def _q8_0(x_NC: jax.Array) -> jax.Array:
    d_N1 = jnp.max(jnp.abs(x_NC), axis=-1, keepdims=True) / 127
    scaled_NC = x_NC * _inverse(d_N1)
    # Halves go away from zero.
    return _half(d_N1) * jnp.sign(scaled_NC) * jnp.floor(jnp.abs(scaled_NC) + 0.5)
