"""Depthwise convolution over time between two gates, centred on each token: the convolution of an encoder.

`z_t = gate_out_t * (sum_k w[k] * u_{t + k - W // 2} + bias)`, `u = gate_in * y`, k = 0 .. W-1: cross-correlation, as
`torch.nn.Conv1d` with W // 2 zeros on both sides and, where W is even, without its last output. A tap that would reach
into another document contributes nothing.

Dimensions: B batch, T time, D channels, W taps.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def centred_conv(
    y_BTD: jax.Array,
    w_WD: jax.Array,
    segment_ids_BT: jax.Array | None = None,
    *,
    gate_in_BTD: jax.Array | None = None,
    gate_out_BTD: jax.Array | None = None,
    bias_D: jax.Array | None = None,
) -> jax.Array:
    """Gated depthwise convolution of y along time, centred. Sums run in float32 at least, whatever the dtypes.

    Args:
      y_BTD: input.
      w_WD: taps, earliest token first.
      segment_ids_BT: document of each token, another one after each border; 0 is padding. None means one document per
        row.
      gate_in_BTD: multiplies y before the convolution; None leaves it out.
      gate_out_BTD: multiplies the result; None leaves it out.
      bias_D: added to the convolution, before `gate_out`; None leaves it out.

    Returns:
      z_BTD, in y's dtype. At padding its values mean nothing.
    """
    T, W = y_BTD.shape[1], w_WD.shape[0]
    left, right = W // 2, (W - 1) // 2
    dtype = jnp.promote_types(y_BTD.dtype, jnp.float32)
    u_BTD = y_BTD.astype(dtype)
    if gate_in_BTD is not None:
        u_BTD *= gate_in_BTD
    u_BSD = jnp.pad(u_BTD, ((0, 0), (left, right), (0, 0)))
    z_BTD = jnp.zeros(y_BTD.shape, dtype)
    for k in range(W):
        term_BTD = w_WD[k].astype(dtype) * u_BSD[:, k : k + T]
        if segment_ids_BT is not None:
            ids_BS = jnp.pad(segment_ids_BT, ((0, 0), (left, right)))
            term_BTD = jnp.where((ids_BS[:, k : k + T] == segment_ids_BT)[:, :, None], term_BTD, 0)
        z_BTD += term_BTD
    if bias_D is not None:
        z_BTD += bias_D
    if gate_out_BTD is not None:
        z_BTD *= gate_out_BTD
    return z_BTD.astype(y_BTD.dtype)
