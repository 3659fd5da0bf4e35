"""Decode state: plain pytrees in, new ones out.

Semantics, the same for every operator:
  - A token of segment 0 is padding and the identity on state: it neither enters the state nor resets it.
  - What the state holds belongs to the document of the first real token of the next call. A change of
    segment id within a call starts a new document, and the state that comes out is that of the last one.
  - Storage is private to this file and the operators: others use the functions here and tree operations
    on the leading batch axis (fork, permute, select rows), all of which are plain array operations.

Dimensions: B batch, T time, S key/value slots, K key/value heads, H head width, V = W - 1 columns, D width.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lfm_jax.config import ModelConfig
from lfm_jax.sharding import spec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KV:
    """Keys (rotated) and values of one attention layer.

    Token i of the row lies in slot i modulo S; tokens [start, end), or the last S of them, are the current document.
    Full attention has a slot for every token; a window's slots are a rolling buffer.
    """

    k_BSKH: jax.Array
    v_BSKH: jax.Array
    start_B: jax.Array
    end_B: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ConvTail:
    """The last W - 1 gated inputs of the current document, oldest first, zeros before its beginning.

    There may be older ones before them, which `rollback` brings back into use.
    """

    tail_BVD: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hidden:
    """The hidden state of a linear recurrence after the last token, float32; zeros before a document begins."""

    h_BD: jax.Array


LayerState = KV | ConvTail | Hidden


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Decode state of a whole model: one entry a layer and the position that comes next in each row."""

    layers: tuple[LayerState, ...]
    position_B: jax.Array


def init_state(
    config: ModelConfig, batch: int, max_len: int, dtype: str | jnp.dtype | None = None, *, rollback: int = 0
) -> State:
    """An empty state for `batch` rows with room for `max_len` real tokens each.

    Args:
      config: the model.
      batch: rows.
      max_len: slots for keys and values; a row that outgrows them gets NaN, never a wrong number.
      dtype: of keys, values and conv tails; None means `config.dtype`. Recurrences are float32 always.
      rollback: tokens that `rollback` can take back at one time.

    Over a mesh (`jax.set_mesh`) heads and channels are split over `tensor`; every device has all rows.

    Raises:
      ValueError: batch or max_len below 1, max_len above `config.max_position`, or a rollback with recurrences, which
        keep nothing of the past.
    """
    if batch < 1 or max_len < 1:
        raise ValueError(f"batch is {batch} and max_len is {max_len}; both must be at least 1")
    if max_len > config.max_position:
        raise ValueError(f"max_len {max_len} exceeds config.max_position {config.max_position}")
    if rollback and "recurrence" in config.layer_types:
        raise ValueError("rollback needs layers that can go back, and a recurrence cannot; leave rollback at 0")
    dtype = jnp.dtype(dtype or config.dtype)

    def layer(kind: str) -> LayerState:
        if kind == "conv":
            shape = (batch, config.conv_taps - 1 + rollback, config.hidden_size)
            return ConvTail(_zeros(shape, dtype, (None, None, "channels")))
        if kind == "recurrence":
            return Hidden(_zeros((batch, config.hidden_size), jnp.float32, (None, "channels")))
        slots = max_len if kind == "full_attention" else min(max_len, config.sliding_window + rollback)
        shape = (batch, slots, config.num_kv_heads, config.head_dim)
        zero_B, axes = jnp.zeros((batch,), jnp.int32), (None, None, "kv_heads", None)
        return KV(_zeros(shape, dtype, axes), _zeros(shape, dtype, axes), zero_B, zero_B + 0)

    return State(tuple(layer(kind) for kind in config.layer_types), jnp.zeros((batch,), jnp.int32))


def _zeros(shape: tuple[int, ...], dtype: Any, axes: tuple[str | None, ...]) -> jax.Array:
    """Zeros laid out over the mesh in use, heads and channels as those of the parameters."""
    zeros, layout = jnp.zeros(shape, dtype), spec(*axes)
    return zeros if layout is None else jax.sharding.reshard(zeros, layout)


def reset(state: State, rows_B: jax.Array) -> State:
    """The state with the marked rows (bool) empty again; the others are untouched."""

    def layer(s: LayerState) -> LayerState:
        if isinstance(s, ConvTail):
            return ConvTail(jnp.where(rows_B[:, None, None], 0, s.tail_BVD))
        if isinstance(s, Hidden):
            return Hidden(jnp.where(rows_B[:, None], 0, s.h_BD))
        # A hidden key is masked before the softmax, but a hidden value meets the weight 0: NaN would survive.
        v_BSKH = jnp.where(rows_B[:, None, None, None], 0, s.v_BSKH)
        return KV(s.k_BSKH, v_BSKH, jnp.where(rows_B, 0, s.start_B), jnp.where(rows_B, 0, s.end_B))

    return State(tuple(layer(s) for s in state.layers), jnp.where(rows_B, 0, state.position_B))


def rollback(state: State, back_B: jax.Array) -> State:
    """The state without the last `back_B` tokens of each row.

    They belong to one document with what comes before them, no more than `init_state` was told, and at least as many
    tokens have come in since the last call as go back. Slots keep what was in them; no query sees it.
    """

    def layer(s: LayerState) -> LayerState:
        if isinstance(s, KV):
            return dataclasses.replace(s, end_B=s.end_B - back_B)
        assert isinstance(s, ConvTail)  # `init_state` refuses recurrences.
        index_BV = jnp.arange(s.tail_BVD.shape[1]) - back_B[:, None]
        tail_BVD = jnp.take_along_axis(s.tail_BVD, jnp.maximum(index_BV, 0)[:, :, None], axis=1)
        return ConvTail(jnp.where((index_BV >= 0)[:, :, None], tail_BVD, 0))

    return State(tuple(layer(s) for s in state.layers), state.position_B - back_B)


def snapshot(config: ModelConfig, state: State, row: jax.Array, start: jax.Array, length: int) -> State:
    """What row `row` has added with tokens [start, start + length), which must be its newest: a `State` without batch.

    Snapshots of all parts from 0 on, given to `restore` in their order, make the row anew.
    """

    def layer(kind: str, s: LayerState) -> LayerState:
        row_state = jax.tree.map(lambda x: x[row], s)
        if kind != "full_attention":
            return row_state
        assert isinstance(row_state, KV)
        k_SKH, v_SKH = (jax.lax.dynamic_slice_in_dim(x, start, length) for x in (row_state.k_BSKH, row_state.v_BSKH))
        return KV(k_SKH, v_SKH, row_state.start_B, row_state.end_B)

    layers = tuple(layer(kind, s) for kind, s in zip(config.layer_types, state.layers, strict=True))
    return State(layers, state.position_B[row])


def restore(config: ModelConfig, state: State, row: jax.Array, start: jax.Array, part: State) -> State:
    """The state with `part`, a `snapshot` of tokens from `start` on, put into row `row`; a row beyond all: nothing."""

    def put(full: jax.Array, new: jax.Array) -> jax.Array:
        return full.at[row].set(new)

    def layer(kind: str, s: LayerState, new: LayerState) -> LayerState:
        if kind != "full_attention":
            return jax.tree.map(put, s, new)
        assert isinstance(s, KV)
        assert isinstance(new, KV)
        slots = start + jnp.arange(new.k_BSKH.shape[0], dtype=jnp.int32)
        # Not dynamic_update_slice: it would move what does not fit to where it does.
        k_BSKH, v_BSKH = (
            full.at[row, slots].set(x, mode="drop")
            for full, x in ((s.k_BSKH, new.k_BSKH), (s.v_BSKH, new.v_BSKH))
        )
        return KV(k_BSKH, v_BSKH, put(s.start_B, new.start_B), put(s.end_B, new.end_B))

    layers = (layer(*x) for x in zip(config.layer_types, state.layers, part.layers, strict=True))
    return State(tuple(layers), put(state.position_B, part.position_B))


class Rows(NamedTuple):
    """Rows brought to the form that operators take: real tokens first, documents numbered 1, 2, ..."""

    gather_BT: jax.Array | None
    """Aligned index -> index in the caller's row; None where nothing moved."""
    segment_ids_BT: jax.Array
    """1, 2, ... by document, 0 for the padding at the right end."""


def align(segment_ids_BT: jax.Array, *, right_padded: bool) -> Rows:
    """Moves padding to the right end of each row and numbers the documents from 1.

    Operators then meet real tokens side by side, so that padding in any place is the identity by
    construction and none of them has to step over it.

    Args:
      segment_ids_BT: 0 for padding, any other id for a document; a new id starts a new document.
      right_padded: the caller knows that padding is at the right end already; nothing is moved.
    """
    gather_BT = None
    if not right_padded:
        gather_BT = jnp.argsort(segment_ids_BT == 0, axis=1, stable=True).astype(jnp.int32)
        segment_ids_BT = jnp.take_along_axis(segment_ids_BT, gather_BT, axis=1)
    documents_BT = jnp.cumsum(_starts(segment_ids_BT), axis=1, dtype=jnp.int32)
    return Rows(gather_BT, jnp.where(segment_ids_BT == 0, 0, documents_BT))


def count_positions(segment_ids_BT: jax.Array, first_B: jax.Array) -> jax.Array:
    """Positions within each document of aligned rows; document 1 begins at `first_B`, the others at 0."""
    index_T = jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32)
    start_BT = jax.lax.cummax(jnp.where(_starts(segment_ids_BT), index_T, 0), axis=1)
    return index_T - start_BT + jnp.where(segment_ids_BT == 1, first_B[:, None], 0)


def _starts(segment_ids_BT: jax.Array) -> jax.Array:
    """True where a new segment id begins, the first token of each row included."""
    changed_BT = segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]
    return jnp.pad(changed_BT, ((0, 0), (1, 0)), constant_values=True)


def lengths(segment_ids_BT: jax.Array) -> jax.Array:
    """Number of real tokens in each row."""
    return jnp.sum(segment_ids_BT != 0, axis=1, dtype=jnp.int32)
