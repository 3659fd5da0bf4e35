"""Decode state: plain pytrees in, new ones out.

Semantics, the same for every operator:
  - A token of segment 0 is padding and the identity on state: it neither enters the state nor resets it.
  - What the state holds belongs to the document of the first real token of the next call. A change of
    segment id within a call starts a new document, and the state that comes out is that of the last one.
  - Storage is private to the operators, each beside its own: others use the functions here and tree operations
    on the leading batch axis (fork, permute, select rows), all of which are plain array operations.

Dimensions: B batch, T time.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp

from lfm_jax.config import ModelConfig
from lfm_jax.kinds import OPERATORS, OperatorKind
from lfm_jax.sharding import spec


class LayerState(abc.ABC):
    """Decode state of one layer, beside whose operator it stands: a frozen dataclass of arrays [B, ...], registered as
    a pytree. What has to be known of a layer to work on its state is a method here.
    """

    @classmethod
    @abc.abstractmethod
    def init(cls, config: ModelConfig, batch: int, max_len: int, dtype: jnp.dtype, rollback: int) -> Self:
        """The empty state; see `init_state`. `zeros` lays arrays out."""

    @abc.abstractmethod
    def reset(self, rows_B: jax.Array) -> Self:
        """With the marked rows empty again, whatever was in them, NaN included."""

    def rollback(self, back_B: jax.Array) -> Self:
        """Without the last `back_B` tokens; see `rollback`. Only of kinds that say they can (`rolls_back`)."""
        raise NotImplementedError(f"{type(self).__name__} cannot go back")

    @abc.abstractmethod
    def snapshot(self, row: jax.Array, start: jax.Array, length: int) -> Self:
        """What a row's tokens [start, start + length), its newest, have added, without the batch axis: `row_of` the
        state where its size does not grow with the text."""

    @abc.abstractmethod
    def restore(self, row: jax.Array, start: jax.Array, part: Self) -> Self:
        """With a snapshot of tokens from `start` on put into a row, after those before it: `with_row` where the
        snapshot is `row_of`. A row beyond all: nothing changes."""

    @abc.abstractmethod
    def at_context(self, context: int | jax.Array) -> Self:
        """As after `context` tokens of one document, hiding those that came later. What holds no counts is that
        already: a measurement does not ask what is in it."""


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
      ValueError: batch or max_len below 1, max_len above `config.max_position`, or a rollback with layers that keep
        nothing of the past.
    """
    if batch < 1 or max_len < 1:
        raise ValueError(f"batch is {batch} and max_len is {max_len}; both must be at least 1")
    if max_len > config.max_position:
        raise ValueError(f"max_len {max_len} exceeds config.max_position {config.max_position}")
    if rollback and config.cannot_roll_back:
        raise ValueError("rollback needs layers whose state can go back, and that of "
                         f"{', '.join(config.cannot_roll_back)} cannot; leave rollback at 0")
    dtype = jnp.dtype(dtype or config.dtype)
    states = {kind: _state_class(OPERATORS[kind]) for kind in dict.fromkeys(config.layer_types)}
    layers = (states[kind].init(config, batch, max_len, dtype, rollback) for kind in config.layer_types)
    return State(tuple(layers), jnp.zeros((batch,), jnp.int32))


def _state_class(kind: OperatorKind) -> type[LayerState]:
    """The class of a kind's state.

    Raises:
      TypeError: it is no `LayerState`, lacks methods, or can go back and the kind says that it cannot, or the reverse.
    """
    found = kind.find_state()
    what = f"state {found.__name__} of operator {kind.name!r}"
    if not issubclass(found, LayerState):
        raise TypeError(f"{what} is no subclass of state.LayerState")
    if found.__abstractmethods__:
        raise TypeError(f"{what} lacks {', '.join(sorted(found.__abstractmethods__))}")
    if kind.rolls_back != (found.rollback is not LayerState.rollback):
        raise TypeError(f"{what} {'lacks' if kind.rolls_back else 'has'} rollback, but the kind's rolls_back is "
                        f"{kind.rolls_back}")
    return found


def zeros(shape: tuple[int, ...], dtype: Any, axes: tuple[str | None, ...]) -> jax.Array:
    """Zeros laid out over the mesh in use, heads and channels as those of the parameters."""
    array, layout = jnp.zeros(shape, dtype), spec(*axes)
    return array if layout is None else jax.sharding.reshard(array, layout)


def row_of[S](state: S, row: jax.Array) -> S:
    """One row of a state, without the batch axis."""
    return jax.tree.map(lambda x: x[row], state)


def with_row[S](state: S, row: jax.Array, part: S) -> S:
    """The state with one row, of `row_of`, put in; a row beyond all: nothing changes."""
    return jax.tree.map(lambda x, new: x.at[row].set(new), state, part)


def reset(state: State, rows_B: jax.Array) -> State:
    """The state with the marked rows (bool) empty again; the others are untouched."""
    return State(tuple(s.reset(rows_B) for s in state.layers), jnp.where(rows_B, 0, state.position_B))


def rollback(state: State, back_B: jax.Array) -> State:
    """The state without the last `back_B` tokens of each row.

    They belong to one document with what comes before them, no more than `init_state` was told, and at least as many
    tokens have come in since the last call as go back. Slots keep what was in them; no query sees it.
    """
    return State(tuple(s.rollback(back_B) for s in state.layers), state.position_B - back_B)


def snapshot(state: State, row: jax.Array, start: jax.Array, length: int) -> State:
    """What row `row` has added with tokens [start, start + length), which must be its newest: a `State` without batch.

    Snapshots of all parts from 0 on, given to `restore` in their order, make the row anew.
    """
    return State(tuple(s.snapshot(row, start, length) for s in state.layers), state.position_B[row])


def restore(state: State, row: jax.Array, start: jax.Array, part: State) -> State:
    """The state with `part`, a `snapshot` of tokens from `start` on, put into row `row`; a row beyond all: nothing."""
    layers = (s.restore(row, start, new) for s, new in zip(state.layers, part.layers, strict=True))
    return State(tuple(layers), state.position_B.at[row].set(part.position_B))


def at_context(state: State, context: int | jax.Array) -> State:
    """The state as after `context` tokens of one document, for tokens that were put into it later: they are hidden.

    For measurements: what decoding costs after so many tokens, whatever they were.
    """
    return State(tuple(s.at_context(context) for s in state.layers), jnp.full_like(state.position_B, context))


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
