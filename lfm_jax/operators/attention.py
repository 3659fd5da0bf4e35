"""Grouped-query attention with normed queries and keys (`Lfm2Attention`).

Dimensions: B batch, T time, S key slots, D width, N query heads, K key/value heads, H head width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from lfm_jax import state as state_lib
from lfm_jax.config import ModelConfig
from lfm_jax.kernels.attention import attention
from lfm_jax.kernels.linear import linear
from lfm_jax.layers import RMSNorm, normal_param, rotary
from lfm_jax.state import KV


class Attention(nnx.Module):
    """Causal GQA: project, norm per head, rotate, attend, project."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        D, N, K, H = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        self.q_proj = normal_param(rngs, (N, H, D), config)
        self.k_proj = normal_param(rngs, (K, H, D), config)
        self.v_proj = normal_param(rngs, (K, H, D), config)
        self.out_proj = normal_param(rngs, (D, N, H), config)
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm = RMSNorm(H, config)
            self.k_norm = RMSNorm(H, config)
        self.theta = config.rope_theta

    def __call__(
        self,
        x_BTD: jax.Array,
        *,
        positions_BT: jax.Array,
        segment_ids_BT: jax.Array | None,
        state: KV | None,
    ) -> tuple[jax.Array, KV | None]:
        """One call for full pass, chunk and single token. Rows are aligned (`state.align`)."""
        q_BTNH = linear(x_BTD, self.q_proj[...])
        k_BTKH = linear(x_BTD, self.k_proj[...])
        v_BTKH = linear(x_BTD, self.v_proj[...])
        if self.qk_norm:
            q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
        q_BTNH = rotary(q_BTNH, positions_BT, self.theta)
        k_BTKH = rotary(k_BTKH, positions_BT, self.theta)
        if state is None:
            order_BT = jnp.broadcast_to(jnp.arange(x_BTD.shape[1], dtype=jnp.int32), x_BTD.shape[:2])
            out_BTNH = attention(
                q_BTNH, k_BTKH, v_BTKH, order_BT=order_BT,
                segment_ids_BT=segment_ids_BT, key_segment_ids_BS=segment_ids_BT,
            )
        else:
            out_BTNH, state = _attend_to_state(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, state)
        return linear(out_BTNH, self.out_proj[...], inputs=2), state


def _attend_to_state(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segment_ids_BT: jax.Array | None, state: KV
) -> tuple[jax.Array, KV]:
    """Appends this call's keys and values to the state and attends over all of its slots."""
    B, T = q_BTNH.shape[:2]
    S = state.k_BSKH.shape[1]
    row_B1 = jnp.arange(B)[:, None]
    slot_BT = state.end_B[:, None] + jnp.arange(T, dtype=jnp.int32)
    if segment_ids_BT is None:
        segment_ids_BT = jnp.ones((B, T), jnp.int32)
    real_BT = segment_ids_BT != 0
    write_BT = jnp.where(real_BT, slot_BT, S)  # Slot S does not exist: the write is dropped.
    dtype = state.k_BSKH.dtype
    k_BSKH = state.k_BSKH.at[row_B1, write_BT].set(k_BTKH.astype(dtype), mode="drop")
    v_BSKH = state.v_BSKH.at[row_B1, write_BT].set(v_BTKH.astype(dtype), mode="drop")
    slot_S = jnp.arange(S, dtype=jnp.int32)
    held_BS = (slot_S >= state.start_B[:, None]) & (slot_S < state.end_B[:, None])
    document_BS = held_BS.astype(jnp.int32).at[row_B1, write_BT].set(segment_ids_BT, mode="drop")
    out_BTNH = attention(
        q_BTNH, k_BSKH.astype(q_BTNH.dtype), v_BSKH.astype(q_BTNH.dtype), order_BT=slot_BT,
        segment_ids_BT=segment_ids_BT, key_segment_ids_BS=document_BS,
    )
    # A row that has outgrown its slots must not go on with missing keys as if nothing had happened.
    overflow_BT = real_BT & (slot_BT >= S)
    out_BTNH = jnp.where(overflow_BT[:, :, None, None], jnp.nan, out_BTNH)
    end_B = state.end_B + state_lib.lengths(segment_ids_BT)
    last_B = jnp.max(segment_ids_BT, axis=1)
    first_of_last_B = jnp.argmax(segment_ids_BT == last_B[:, None], axis=1).astype(jnp.int32)
    start_B = jnp.where(last_B > 1, state.end_B + first_of_last_B, state.start_B)
    return out_BTNH, KV(k_BSKH, v_BSKH, start_B, end_B)
