"""Causal depthwise convolution over time with document boundaries and carried history.

`z_t = sum_j w[W-1-j] * y_{t-j}`, j = 0 .. W-1: cross-correlation with the newest tap last, as
`torch.nn.Conv1d` in `Lfm2ShortConv`. A tap that would reach into another document contributes nothing.

Dimensions: B batch, T time, D channels, W taps.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def causal_conv(
    y_BTD: jax.Array,
    w_WD: jax.Array,
    tail_BVD: jax.Array | None = None,
    segment_ids_BT: jax.Array | None = None,
    *,
    impl: str = "auto",
) -> jax.Array:
    """Depthwise causal convolution of y along time.

    Args:
      y_BTD: input.
      w_WD: taps, oldest first, same dtype as y.
      tail_BVD: the W - 1 columns before y, oldest first; zeros where there is no history. They belong to
        the document of each row's first token. None means no history.
      segment_ids_BT: document of each token; ids differ between neighbouring documents. A row's padding
        stands at its right end (see `state.align`). None means one document per row.
      impl: `lax` (`lax.conv_general_dilated`, the reference), `shifted` (W multiply-adds that XLA fuses), or
        `auto`: `shifted` on CPU, where docs/benchmarks.md measures it many times faster, `lax` elsewhere
        until a benchmark on that platform is committed.

    Returns:
      z_BTD, in y's dtype. At padding its values mean nothing.

    Raises:
      ValueError: an unknown impl or shapes that do not fit together.
    """
    B, _, D = y_BTD.shape
    W = w_WD.shape[0]
    if w_WD.shape != (W, D):
        raise ValueError(f"w_WD has shape {w_WD.shape}; expected (taps, {D}) to match y_BTD {y_BTD.shape}")
    if tail_BVD is None:
        tail_BVD = jnp.zeros((B, W - 1, D), y_BTD.dtype)
    if tail_BVD.shape != (B, W - 1, D):
        raise ValueError(f"tail has shape {tail_BVD.shape}; expected {(B, W - 1, D)}: the W - 1 columns before y")
    if impl == "auto":
        impl = "shifted" if jax.default_backend() == "cpu" else "lax"
    if impl not in _IMPLS:
        raise ValueError(f"impl is {impl!r}; choose one of auto, {', '.join(_IMPLS)}")
    padded_BSD = jnp.concatenate([tail_BVD.astype(y_BTD.dtype), y_BTD], axis=1)
    return _IMPLS[impl](padded_BSD, w_WD, segment_ids_BT)


def _distance_to_start(segment_ids_BT: jax.Array, W: int) -> jax.Array:
    """How many of the last W - 1 tokens belong to each token's document; W - 1 where history may reach in."""
    T = segment_ids_BT.shape[1]
    first_B1 = segment_ids_BT[:, :1]
    padded_BS = jnp.concatenate([jnp.broadcast_to(first_B1, (first_B1.shape[0], W - 1)), segment_ids_BT], axis=1)
    reach_BT = jnp.zeros(segment_ids_BT.shape, jnp.int32)
    same_BT = jnp.ones(segment_ids_BT.shape, bool)
    for j in range(1, W):
        same_BT &= padded_BS[:, W - 1 - j : W - 1 - j + T] == segment_ids_BT
        reach_BT += same_BT
    return reach_BT


def _shifted(padded_BSD: jax.Array, w_WD: jax.Array, segment_ids_BT: jax.Array | None) -> jax.Array:
    W = w_WD.shape[0]
    T = padded_BSD.shape[1] - (W - 1)
    z_BTD = padded_BSD[:, W - 1 :] * w_WD[W - 1]
    reach_BT = None if segment_ids_BT is None else _distance_to_start(segment_ids_BT, W)
    for j in range(1, W):
        term_BTD = padded_BSD[:, W - 1 - j : W - 1 - j + T] * w_WD[W - 1 - j]
        if reach_BT is not None:
            term_BTD = jnp.where((reach_BT >= j)[:, :, None], term_BTD, 0)
        z_BTD += term_BTD
    return z_BTD


def _lax(padded_BSD: jax.Array, w_WD: jax.Array, segment_ids_BT: jax.Array | None) -> jax.Array:
    """One plain convolution; with documents, one per reach, so that no tap crosses a border."""
    W, D = w_WD.shape

    def conv(taps_WD: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(
            padded_BSD, taps_WD[:, None, :], window_strides=(1,), padding="VALID",
            dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=D,
        )

    if segment_ids_BT is None:
        return conv(w_WD)
    reach_BT1 = _distance_to_start(segment_ids_BT, W)[:, :, None]
    newest_first_W1 = jnp.arange(W)[::-1, None]
    z_BTD = jnp.zeros_like(padded_BSD[:, W - 1 :])
    for reach in range(W):
        z_BTD = jnp.where(reach_BT1 == reach, conv(jnp.where(newest_first_W1 <= reach, w_WD, 0)), z_BTD)
    return z_BTD


_IMPLS = {"lax": _lax, "shifted": _shifted}
