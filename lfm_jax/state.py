"""Decode state: pure functions on plain pytrees.

Semantics, the same for every operator:
  - A token of segment 0 is padding and the identity on state: it neither enters the state nor resets it.
  - The state belongs to the document of the first real token of the next call. A change of segment id within a call
    starts a new document, and the new state is that of the last document.
  - The storage is private to each operator. Other code uses the functions here, and tree operations on the leading
    batch axis (fork, permute, select rows), all of which are plain array operations.

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
    """Decode state of one layer: a frozen dataclass of arrays [B, ...], registered as a pytree, in the file of its
    operator. All work on the state goes through these methods.
    """

    @classmethod
    @abc.abstractmethod
    def init(cls, config: ModelConfig, batch: int, max_len: int, dtype: jnp.dtype, rollback: int) -> Self:
        """Makes the empty state; see `init_state`. `zeros` makes arrays in the right layout."""

    @abc.abstractmethod
    def reset(self, rows_B: jax.Array) -> Self:
        """Returns the state with the marked rows empty again, whatever was in them, even NaN."""

    def rollback(self, back_B: jax.Array) -> Self:
        """Returns the state without the last `back_B` tokens; see `rollback`. Only for kinds with `rolls_back`."""
        raise NotImplementedError(f"{type(self).__name__} cannot go back")

    @abc.abstractmethod
    def snapshot(self, row: jax.Array, start: jax.Array, length: int) -> Self:
        """Returns what a row's newest tokens, [start, start + length), added to the state, without the batch axis:
        `row_of` the state if its size does not grow with the text."""

    @abc.abstractmethod
    def restore(self, row: jax.Array, start: jax.Array, part: Self) -> Self:
        """Returns the state with a snapshot of tokens from `start` on put into a row, after the snapshots before it:
        `with_row` if the snapshot is `row_of`. A row index beyond the batch changes nothing."""

    def narrowed(self) -> Self:
        """Returns the empty state with its keys and values in int8; a state without them as it is."""
        return self

    @abc.abstractmethod
    def at_context(self, context: int | jax.Array) -> Self:
        """Returns the state as after `context` tokens of one document, hiding later tokens. A state without counts is
        returned as it is: measurements do not depend on its values."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Decode state of a whole model: an entry for each layer, and the next position of each row."""

    layers: tuple[LayerState, ...]
    position_B: jax.Array


def init_state(
    config: ModelConfig, batch: int, max_len: int, dtype: str | jnp.dtype | None = None, *, rollback: int = 0,
    int8_kv: bool = False,
) -> State:
    """Makes an empty state for `batch` rows with room for `max_len` real tokens each.

    Args:
      config: the config of the model.
      batch: number of rows.
      max_len: slots for keys and values; a row that outgrows them gets NaN, never a wrong number.
      dtype: dtype of keys, values and conv tails; None means `config.dtype`. Recurrences are always float32.
      rollback: the most tokens that one `rollback` can remove.
      int8_kv: whether keys and values are rounded to int8, with a float32 scale for each head of a slot, instead.

    Over a mesh (`jax.set_mesh`) heads and channels are split over `tensor`; every device has all rows.

    Raises:
      ValueError: batch or max_len is below 1, max_len is above `config.max_position`, layers cannot go back and
        rollback is not 0, or the model is an encoder (`config.causal`), which has no decode state.
    """
    config.need_causal("a decode state")
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
    if int8_kv:
        layers = (layer.narrowed() for layer in layers)
    return State(tuple(layers), jnp.zeros((batch,), jnp.int32))


def _state_class(kind: OperatorKind) -> type[LayerState]:
    """Returns the class of a kind's state.

    Raises:
      TypeError: it is not a `LayerState`, lacks methods, or has `rollback` although the kind's `rolls_back` is False,
        or the reverse.
    """
    found = kind.find_state()
    what = f"state {found.__name__} of operator {kind.name!r}"
    if not issubclass(found, LayerState):
        raise TypeError(f"{what} is not a subclass of state.LayerState")
    if found.__abstractmethods__:
        raise TypeError(f"{what} lacks {', '.join(sorted(found.__abstractmethods__))}")
    if kind.rolls_back != (found.rollback is not LayerState.rollback):
        raise TypeError(f"{what} {'lacks' if kind.rolls_back else 'has'} rollback, but the kind's rolls_back is "
                        f"{kind.rolls_back}")
    return found


def zeros(shape: tuple[int, ...], dtype: Any, axes: tuple[str | None, ...]) -> jax.Array:
    """Makes zeros laid out over the mesh in use, with heads and channels split as those of the parameters."""
    array, layout = jnp.zeros(shape, dtype), spec(*axes)
    return array if layout is None else jax.sharding.reshard(array, layout)


def row_of[S](state: S, row: jax.Array) -> S:
    """Returns one row of a state, without the batch axis."""
    return jax.tree.map(lambda x: x[row], state)


def with_row[S](state: S, row: jax.Array, part: S) -> S:
    """Returns the state with one row replaced by that of `row_of`; a row index beyond the batch changes nothing."""
    return jax.tree.map(lambda x, new: x.at[row].set(new), state, part)


def reset(state: State, rows_B: jax.Array) -> State:
    """Returns the state with the marked rows (bool) empty again; the others do not change."""
    return State(tuple(s.reset(rows_B) for s in state.layers), jnp.where(rows_B, 0, state.position_B))


def rollback(state: State, back_B: jax.Array) -> State:
    """Returns the state without the last `back_B` tokens of each row.

    These tokens must belong to the same document as those before them, have come in since the last rollback, and be at
    most as many as `init_state` allowed. Slots keep their values, but no query sees them.
    """
    return State(tuple(s.rollback(back_B) for s in state.layers), state.position_B - back_B)


def snapshot(state: State, row: jax.Array, start: jax.Array, length: int) -> State:
    """Returns what the tokens [start, start + length) of a row, its newest, added: a `State` without the batch axis.

    Passing snapshots of all parts from 0 on to `restore`, in order, rebuilds the row.
    """
    return State(tuple(s.snapshot(row, start, length) for s in state.layers), state.position_B[row])


def restore(state: State, row: jax.Array, start: jax.Array, part: State) -> State:
    """Returns the state with `part`, a `snapshot` of tokens from `start` on, put into a row; a row index beyond the
    batch changes nothing."""
    layers = (s.restore(row, start, new) for s, new in zip(state.layers, part.layers, strict=True))
    return State(tuple(layers), state.position_B.at[row].set(part.position_B))


def at_context(state: State, context: int | jax.Array) -> State:
    """Returns the state as after `context` tokens of one document; later tokens in it are hidden.

    This is for measurements of decoding after that many tokens, whatever they are.
    """
    return State(tuple(s.at_context(context) for s in state.layers), jnp.full_like(state.position_B, context))


class Rows(NamedTuple):
    """Rows in the form that operators take: real tokens first, documents numbered 1, 2, ..."""

    gather_BT: jax.Array | None
    """Aligned index -> index in the caller's row; None if nothing moved."""
    segment_ids_BT: jax.Array
    """1, 2, ... by document, 0 for the padding at the right end."""


def align(segment_ids_BT: jax.Array, *, right_padded: bool) -> Rows:
    """Moves padding to the right end of each row and numbers the documents from 1.

    Operators then see real tokens side by side, so that padding in any place is the identity by
    construction and no operator has to skip it.

    Args:
      segment_ids_BT: 0 for padding, any other id for a document; a new id starts a new document.
      right_padded: whether padding is known to be at the right end already; nothing is moved then.
    """
    gather_BT = None
    if not right_padded:
        gather_BT = jnp.argsort(segment_ids_BT == 0, axis=1, stable=True).astype(jnp.int32)
        segment_ids_BT = jnp.take_along_axis(segment_ids_BT, gather_BT, axis=1)
    documents_BT = jnp.cumsum(_starts(segment_ids_BT), axis=1, dtype=jnp.int32)
    return Rows(gather_BT, jnp.where(segment_ids_BT == 0, 0, documents_BT))


def count_positions(segment_ids_BT: jax.Array, first_B: jax.Array) -> jax.Array:
    """Returns positions within each document of aligned rows; document 1 begins at `first_B`, the others at 0."""
    index_T = jnp.arange(segment_ids_BT.shape[1], dtype=jnp.int32)
    start_BT = jax.lax.cummax(jnp.where(_starts(segment_ids_BT), index_T, 0), axis=1)
    return index_T - start_BT + jnp.where(segment_ids_BT == 1, first_B[:, None], 0)


def _starts(segment_ids_BT: jax.Array) -> jax.Array:
    """Returns True where a new segment id begins, including the first token of each row."""
    changed_BT = segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]
    return jnp.pad(changed_BT, ((0, 0), (1, 0)), constant_values=True)


def lengths(segment_ids_BT: jax.Array) -> jax.Array:
    """Returns the number of real tokens of each row."""
    return jnp.sum(segment_ids_BT != 0, axis=1, dtype=jnp.int32)
