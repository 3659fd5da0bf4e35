"""Causal grouped-query attention with document boundaries.

Dimensions: B batch, T query time, S key slots, N query heads, K key/value heads, H head width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    order_BT: jax.Array,
    segment_ids_BT: jax.Array | None,
    key_segment_ids_BS: jax.Array | None,
) -> jax.Array:
    """Softmax attention, scale H ** -0.5, softmax in float32 (`jax.nn.dot_product_attention`).

    Key slot s is visible to a query when `s <= order` and both belong to the same document.

    Args:
      q_BTNH: queries; N is a multiple of K.
      k_BSKH: keys, slot s at index s.
      v_BSKH: values.
      order_BT: the slot of each query's own token.
      segment_ids_BT: document of each query, or None when every row is one document.
      key_segment_ids_BS: document of each key slot; None exactly when `segment_ids_BT` is.

    Returns:
      out_BTNH in q's dtype. A query that sees no key (padding) gets finite values that mean nothing.
    """
    slot_S = jnp.arange(k_BSKH.shape[1], dtype=jnp.int32)
    visible_BTS = slot_S[None, None, :] <= order_BT[:, :, None]
    if segment_ids_BT is not None and key_segment_ids_BS is not None:
        visible_BTS &= segment_ids_BT[:, :, None] == key_segment_ids_BS[:, None, :]
    return jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=visible_BTS[:, None], implementation="xla")
