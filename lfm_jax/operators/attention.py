"""Grouped-query attention with normed queries and keys, over all of a document or a window of it (`Lfm2Attention`), and
perhaps a gate on each head (`Lfm3Attention`).

Dimensions: B batch, T time, S key slots, D width, N query heads, K key/value heads, H head width.
"""

from __future__ import annotations

import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
from flax import nnx

from lfm_jax import state as state_lib
from lfm_jax.config import ModelConfig
from lfm_jax.kernels.int8_slots import Int8Slots, rounded_like
from lfm_jax.kernels.linear import linear, linears
from lfm_jax.kernels.sharded import attention, decode_attention
from lfm_jax.layers import HEADS_IN, OUT_HEADS, OUT_IN, RMSNorm, normal_param, rotary
from lfm_jax.state import LayerState

AXES = (None, None, "kv_heads", None)
"""Logical axes of keys and values."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KV(LayerState):
    """Keys (rotated) and values of one layer, with a slot for every token.

    Token i of the row lies in slot i; tokens [start, end) are the current document.
    """

    k_BSKH: jax.Array | Int8Slots
    v_BSKH: jax.Array | Int8Slots
    start_B: jax.Array
    end_B: jax.Array

    @classmethod
    def init(cls, config: ModelConfig, batch: int, max_len: int, dtype: jnp.dtype, rollback: int) -> Self:
        shape, zero_B = (batch, max_len, config.num_kv_heads, config.head_dim), jnp.zeros((batch,), jnp.int32)
        return cls(state_lib.zeros(shape, dtype, AXES), state_lib.zeros(shape, dtype, AXES), zero_B, zero_B + 0)

    def narrowed(self) -> Self:
        def empty() -> Int8Slots:
            shape = self.k_BSKH.shape
            return Int8Slots(state_lib.zeros(shape, jnp.int8, AXES), state_lib.zeros(shape[:3], "float32", AXES[:3]))

        return dataclasses.replace(self, k_BSKH=empty(), v_BSKH=empty())

    def reset(self, rows_B: jax.Array) -> Self:
        # A hidden key is masked before the softmax, but a hidden value meets the weight 0: NaN would survive.
        v_BSKH = jax.tree.map(lambda x: jnp.where(jnp.expand_dims(rows_B, range(1, x.ndim)), 0, x), self.v_BSKH)
        start_B, end_B = jnp.where(rows_B, 0, self.start_B), jnp.where(rows_B, 0, self.end_B)
        return dataclasses.replace(self, v_BSKH=v_BSKH, start_B=start_B, end_B=end_B)

    def rollback(self, back_B: jax.Array) -> Self:
        return dataclasses.replace(self, end_B=self.end_B - back_B)

    def snapshot(self, row: jax.Array, start: jax.Array, length: int) -> Self:
        part = state_lib.row_of(self, row)
        k_SKH, v_SKH = jax.tree.map(
            lambda x: jax.lax.dynamic_slice_in_dim(x, start, length), (part.k_BSKH, part.v_BSKH)
        )
        return dataclasses.replace(part, k_BSKH=k_SKH, v_BSKH=v_SKH)

    def restore(self, row: jax.Array, start: jax.Array, part: Self) -> Self:
        slots = start + jnp.arange(part.k_BSKH.shape[0], dtype=jnp.int32)
        # Not dynamic_update_slice: it would move what does not fit to where it does.
        k_BSKH, v_BSKH = jax.tree.map(
            lambda full, x: full.at[row, slots].set(x, mode="drop"), (self.k_BSKH, self.v_BSKH),
            (part.k_BSKH, part.v_BSKH),
        )
        start_B, end_B = self.start_B.at[row].set(part.start_B), self.end_B.at[row].set(part.end_B)
        return dataclasses.replace(self, k_BSKH=k_BSKH, v_BSKH=v_BSKH, start_B=start_B, end_B=end_B)

    def at_context(self, context: int | jax.Array) -> Self:
        return dataclasses.replace(
            self, start_B=jnp.zeros_like(self.start_B), end_B=jnp.full_like(self.end_B, context)
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RollingKV(KV):
    """Keys and values of a window, in a rolling buffer.

    Token i of the row lies in slot i modulo S; the last S of tokens [start, end) are there.
    """

    @classmethod
    def init(cls, config: ModelConfig, batch: int, max_len: int, dtype: jnp.dtype, rollback: int) -> Self:
        return super().init(config, batch, min(max_len, config.sliding_window + rollback), dtype, rollback)

    def snapshot(self, row: jax.Array, start: jax.Array, length: int) -> Self:
        return state_lib.row_of(self, row)

    def restore(self, row: jax.Array, start: jax.Array, part: Self) -> Self:
        return state_lib.with_row(self, row, part)


class Attention(nnx.Module):
    """GQA, causal or over whole documents: project, norm per head, rotate, attend, gate per head, project."""

    together = ("q_proj", "k_proj", "v_proj")
    """Weights that meet the same input through `linears`."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        D, N, K, H = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        self.q_proj = normal_param(
            rngs, (N, H, D), ("heads", None, "width"), config, decay=True, matrix=HEADS_IN, fan_in=D
        )
        self.k_proj = normal_param(
            rngs, (K, H, D), ("kv_heads", None, "width"), config, decay=True, matrix=HEADS_IN, fan_in=D
        )
        self.v_proj = normal_param(
            rngs, (K, H, D), ("kv_heads", None, "width"), config, decay=True, matrix=HEADS_IN, fan_in=D
        )
        self.out_proj = normal_param(
            rngs, (D, N, H), ("width", "heads", None), config, decay=True, matrix=OUT_HEADS, fan_in=N * H, residual=True
        )
        self.gated = config.attention_gate
        if config.attention_gate:
            self.gate = normal_param(rngs, (N, D), ("heads", "width"), config, decay=True, matrix=OUT_IN, fan_in=D)
        self.outputs = (N, K, K)
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm = RMSNorm(H, config)
            self.k_norm = RMSNorm(H, config)
        self.theta, self.fraction = config.rope_theta, config.rope_fraction
        self.window: int | None = None
        self.causal, self.impl = config.causal, config.attention_impl

    def __call__(
        self,
        x_BTD: jax.Array,
        *,
        positions_BT: jax.Array,
        segment_ids_BT: jax.Array | None,
        state: KV | None,
    ) -> tuple[jax.Array, KV | None]:
        """One call for full pass, chunk and single token. Rows are aligned (`state.align`)."""
        weights = self.q_proj[...], self.k_proj[...], self.v_proj[...]
        q_BTNH, k_BTKH, v_BTKH = linears(x_BTD, weights, self.outputs)
        if self.qk_norm:
            q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
        q_BTNH = rotary(q_BTNH, positions_BT, self.theta, self.fraction)
        k_BTKH = rotary(k_BTKH, positions_BT, self.theta, self.fraction)
        if state is None:
            key_segment_ids_BT = segment_ids_BT
            if not self.causal and segment_ids_BT is not None:  # Of a token of -d only the query belongs to d.
                segment_ids_BT, key_segment_ids_BT = jnp.abs(segment_ids_BT), jnp.maximum(segment_ids_BT, 0)
            out_BTNH = attention(
                q_BTNH, k_BTKH, v_BTKH, segment_ids_BT=segment_ids_BT, key_segment_ids_BS=key_segment_ids_BT,
                window=self.window, causal=self.causal, impl=self.impl,
            )
        else:
            out_BTNH, state = _attend_to_state(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, state, self.window)
        if self.gated:
            # Not `left`: a CPU's exponential over [N, rows] rounds the last rows unlike the others.
            out_BTNH *= jax.nn.sigmoid(linear(x_BTD, self.gate[...], impl="dot"))[:, :, :, None]
        return linear(out_BTNH, self.out_proj[...], inputs=2), state


class SlidingAttention(Attention):
    """Attention to the last `config.sliding_window` tokens of the document, the query's own included."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.theta, self.fraction = config.sliding_rope_theta or config.rope_theta, 1.0
        self.window = config.sliding_window


def _attend_to_state(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segment_ids_BT: jax.Array | None, state: KV,
    window: int | None,
) -> tuple[jax.Array, KV]:
    """Attends over the state and this call's own tokens, and puts these into the state."""
    B, T = q_BTNH.shape[:2]
    S = state.k_BSKH.shape[1]
    if segment_ids_BT is None:
        segment_ids_BT = jnp.ones((B, T), jnp.int32)
    real_BT, end_B = segment_ids_BT != 0, state.end_B + state_lib.lengths(segment_ids_BT)
    rolling = window is not None and window <= S
    if T == 1 and not rolling:
        return _attend_one(q_BTNH, k_BTKH, v_BTKH, real_BT[:, 0], state, end_B)
    index_BT = state.end_B[:, None] + jnp.arange(T, dtype=jnp.int32)
    held_BS = _held(state.end_B, S)
    document_BS = (held_BS >= state.start_B[:, None]).astype(jnp.int32)
    # Slot S does not exist: writes there and beyond are dropped.
    write_BT = jnp.where(real_BT, index_BT, S)
    if rolling:  # Of the tokens that share a slot the last one stays.
        write_BT = jnp.where(real_BT & (index_BT >= end_B[:, None] - S), index_BT % S, S)

    def put[X](slots: X, new: X) -> X:
        return jax.tree.map(
            lambda slots, new: slots.at[jnp.arange(B)[:, None], write_BT].set(new, mode="drop"), slots, new
        )

    k_new, v_new = rounded_like(k_BTKH, state.k_BSKH), rounded_like(v_BTKH, state.v_BSKH)
    k_BSKH, v_BSKH = put(state.k_BSKH, k_new), put(state.v_BSKH, v_new)
    kept = dataclasses.replace(state, k_BSKH=k_BSKH, v_BSKH=v_BSKH, end_B=end_B)
    if not rolling or T == 1:  # No token that a query still sees has been overwritten.
        keys = (kept.k_BSKH, kept.v_BSKH, put(held_BS, index_BT), put(document_BS, segment_ids_BT))
    else:
        keys = jax.tree.map(
            lambda old, new: jnp.concatenate([old, new], axis=1),
            (state.k_BSKH, state.v_BSKH, held_BS, document_BS), (k_new, v_new, index_BT, segment_ids_BT),
        )
    k_BSKH, v_BSKH, order_BS, document_BS = keys
    out_BTNH = attention(
        q_BTNH, k_BSKH.astype(q_BTNH.dtype), v_BSKH.astype(q_BTNH.dtype), order_BT=index_BT, key_order_BS=order_BS,
        segment_ids_BT=segment_ids_BT, key_segment_ids_BS=document_BS, window=window,
    )
    if not rolling:
        # A row that has outgrown its slots must not go on with missing keys as if nothing had happened.
        overflow_BT = real_BT & (index_BT >= S)
        out_BTNH = jnp.where(overflow_BT[:, :, None, None], jnp.nan, out_BTNH)
    last_B = jnp.max(segment_ids_BT, axis=1)
    first_of_last_B = jnp.argmax(segment_ids_BT == last_B[:, None], axis=1).astype(jnp.int32)
    start_B = jnp.where(last_B > 1, state.end_B + first_of_last_B, state.start_B)
    return out_BTNH, dataclasses.replace(kept, start_B=start_B)


def _attend_one(
    q_B1NH: jax.Array, k_B1KH: jax.Array, v_B1KH: jax.Array, real_B: jax.Array, state: KV, end_B: jax.Array
) -> tuple[jax.Array, KV]:
    """`_attend_to_state` of one token a row, which continues the row's document or is padding, and of all slots."""
    B, S = state.k_BSKH.shape[:2]
    row_B, slot_B = jnp.arange(B, dtype=jnp.int32), jnp.where(real_B, state.end_B, S)

    def put(slots: jax.Array, new: jax.Array) -> jax.Array:
        # That rows differ and rise lets a GPU write without looking out for others.
        return slots.at[row_B, slot_B].set(new[:, 0], mode="drop", unique_indices=True, indices_are_sorted=True)

    new = rounded_like(k_B1KH, state.k_BSKH), rounded_like(v_B1KH, state.v_BSKH)
    k_BSKH, v_BSKH = jax.tree.map(put, (state.k_BSKH, state.v_BSKH), new)
    stop_B = jnp.where(real_B, end_B, state.start_B)  # A row that idles sees nothing, which takes no time.
    k, v = (x if isinstance(x, Int8Slots) else x.astype(q_B1NH.dtype) for x in (k_BSKH, v_BSKH))
    out_B1NH = decode_attention(q_B1NH, k, v, state.start_B, stop_B)
    overflow_B = real_B & (state.end_B >= S)
    out_B1NH = jnp.where(overflow_B[:, None, None, None], jnp.nan, out_B1NH)
    return out_B1NH, dataclasses.replace(state, k_BSKH=k_BSKH, v_BSKH=v_BSKH, end_B=end_B)


def _held(end_B: jax.Array, S: int) -> jax.Array:
    """The token in each slot when tokens [0, end) have been put in slots modulo S; -1 or less where there is none."""
    newest_B1 = end_B[:, None] - 1
    return newest_B1 - (newest_B1 - jnp.arange(S, dtype=jnp.int32)) % S
