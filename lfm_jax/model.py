"""The network: embed -> blocks -> norm -> head. One class for every LFM2-family model.

Dimensions: B batch, T time, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from lfm_jax import state as state_lib
from lfm_jax.config import ModelConfig
from lfm_jax.kernels.linear import linear
from lfm_jax.layers import RMSNorm, SwiGLU, normal_param
from lfm_jax.operators import OPERATORS
from lfm_jax.sharding import is_sharded, parts, reshard, spec_of
from lfm_jax.state import LayerState, State

Logits = Literal["all", "last"]
Padding = Literal["any", "right"]


class Block(nnx.Module):
    """Pre-norm residual block: `x += operator(norm(x)); x += feed_forward(norm(x))` (`Lfm2DecoderLayer`)."""

    def __init__(self, kind: str, config: ModelConfig, *, rngs: nnx.Rngs):
        D = config.hidden_size
        self.operator_norm = RMSNorm(D, config)
        self.operator = OPERATORS[kind](config, rngs=rngs)
        self.ffn_norm = RMSNorm(D, config)
        self.feed_forward = SwiGLU(config, rngs=rngs)
        self.post_norm = config.post_norm
        if config.post_norm:
            self.post_operator_norm = RMSNorm(D, config)
            self.post_ffn_norm = RMSNorm(D, config)

    def __call__(
        self, x_BTD: jax.Array, *, positions_BT: jax.Array, segment_ids_BT: jax.Array | None, state: LayerState | None,
        only_B1: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerState | None]:
        """`only_B1` drops all but one token a row once the operator has seen them all: [B, 1, D] comes out."""
        with jax.named_scope("operator"):
            y_BTD, state = self.operator(
                self.operator_norm(x_BTD), positions_BT=positions_BT, segment_ids_BT=segment_ids_BT, state=state
            )
            x_BTD += self.post_operator_norm(y_BTD) if self.post_norm else y_BTD
            if only_B1 is not None:
                x_BTD = jnp.take_along_axis(x_BTD, only_B1[:, :, None], axis=1)
        with jax.named_scope("feed_forward"):
            y_BTD = self.feed_forward(self.ffn_norm(x_BTD))
            x_BTD += self.post_ffn_norm(y_BTD) if self.post_norm else y_BTD
        return x_BTD, state


def abstract_model(config: ModelConfig) -> tuple[nnx.GraphDef, Any]:
    """(graphdef, parameters as a plain dict of shapes and dtypes) of a model, without making any array."""
    graphdef, params = nnx.split(nnx.eval_shape(lambda: LFM(config, rngs=nnx.Rngs(0))), nnx.Param)
    return graphdef, nnx.to_pure_dict(params)


class _Aligned(NamedTuple):
    """Rows as the operators take them (`state.align`)."""

    tokens_BT: jax.Array
    positions_BT: jax.Array
    segment_ids_BT: jax.Array | None
    gather_BT: jax.Array | None
    """Aligned index -> index in the caller's row; None where nothing moved."""
    length_B: jax.Array
    """Real tokens."""


def _aligned(
    tokens_BT: jax.Array, positions_BT: jax.Array | None, segment_ids_BT: jax.Array | None, first_B: jax.Array,
    padding: str,
) -> _Aligned:
    """Brings padding to the right end and counts documents and positions, in the caller's layout over a mesh."""
    B, T = tokens_BT.shape
    split = spec_of(tokens_BT)
    if parts(tokens_BT, 1) == 1:  # An axis of one device in the type would still be in the way of a gather.
        split = P(split[0], None)
        tokens_BT = reshard(tokens_BT, split)
        positions_BT = None if positions_BT is None else reshard(positions_BT, split)
    if segment_ids_BT is None:
        positions_BT = first_B[:, None] + jnp.arange(T, dtype=jnp.int32) if positions_BT is None else positions_BT
        return _Aligned(tokens_BT, reshard(positions_BT, split), None, None, jnp.full((B,), T, jnp.int32))
    # Documents are counted along whole rows; ids are small beside what a layer computes of them.
    gather_BT, ids_BT = state_lib.align(reshard(segment_ids_BT, P(split[0], None)), right_padded=padding == "right")
    if gather_BT is not None:
        tokens_BT = jnp.take_along_axis(tokens_BT, gather_BT, axis=1)
        positions_BT = None if positions_BT is None else jnp.take_along_axis(positions_BT, gather_BT, axis=1)
    if positions_BT is None:
        positions_BT = state_lib.count_positions(ids_BT, first_B)
    length_B = state_lib.lengths(ids_BT)
    return _Aligned(tokens_BT, reshard(positions_BT, split), reshard(ids_BT, split), gather_BT, length_B)


class LFM(nnx.Module):
    """An LFM2-family language model.

    Args:
      config: shape and numerics.
      rngs: streams for initialisation; nothing of it is kept.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed = normal_param(rngs, (config.vocab_size, config.hidden_size), config)
        self.blocks = nnx.List([Block(kind, config, rngs=rngs) for kind in config.layer_types])
        self.norm = RMSNorm(config.hidden_size, config)
        if not config.tie_embedding:
            self.head = normal_param(rngs, (config.vocab_size, config.hidden_size), config)

    @property
    def head_VD(self) -> jax.Array:
        """The output matrix: the embedding table, unless the head is untied."""
        return self.embed[...] if self.config.tie_embedding else self.head[...]

    def init_state(self, batch: int, max_len: int, dtype: str | jnp.dtype | None = None) -> State:
        """An empty decode state; see `lfm_jax.state.init_state`."""
        return state_lib.init_state(self.config, batch, max_len, dtype)

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        segment_ids_BT: jax.Array | None = None,
        state: State | None = None,
        logits: Logits | None = "all",
        *,
        padding: Padding = "any",
    ) -> tuple[jax.Array, State | None]:
        """Runs the model on whole rows, on a chunk that continues `state`, or on one token a row.

        Args:
          tokens_BT: token ids, int32.
          positions_BT: rotary positions. None counts within each document; the first document goes on
            from the state.
          segment_ids_BT: 0 for padding, another id for each document; a change of id starts a new
            document. None means one document a row, no padding.
          state: from `init_state` or an earlier call; None for a pass that keeps no state.
          logits: `all` for [B, T, V], `last` for [B, 1, V] at each row's last real token, None for the
            normed hidden states [B, T, D].
          padding: `any` lets padding stand anywhere. `right` promises that it stands at the right end of
            every row, and saves the gather that brings it there.

        Over a mesh of explicit axes (`jax.set_mesh`) rows may be split over devices, without a state, and time over the
        axis `context`: then padding must be promised to be at the right, and logits are `all` or None. Parameters are
        whole on every device.

        Returns:
          (logits or hidden states, new state or None). Values at padding mean nothing. A row that
          outgrows the state's slots gives NaN.

        Raises:
          ValueError: shapes or options that do not fit together.
        """
        self._check(tokens_BT, positions_BT, segment_ids_BT, state, logits, padding)
        first_B = jnp.zeros((tokens_BT.shape[0],), jnp.int32) if state is None else state.position_B
        tokens_BT, positions_BT, segment_ids_BT, gather_BT, length_B = _aligned(
            tokens_BT, positions_BT, segment_ids_BT, first_B, padding
        )

        with jax.named_scope("embed"):
            out_sharding = P(*spec_of(tokens_BT), None) if is_sharded(tokens_BT) else None
            x_BTD = self.embed[...].astype(self.config.dtype).at[tokens_BT].get(out_sharding=out_sharding)
        last_B1 = jnp.maximum(length_B - 1, 0)[:, None]
        layer_states: list[LayerState] = []
        for i, block in enumerate(self.blocks):
            with jax.named_scope(f"layer_{i}"):
                x_BTD, layer_state = block(
                    x_BTD, positions_BT=positions_BT, segment_ids_BT=segment_ids_BT,
                    state=None if state is None else state.layers[i],
                    only_B1=last_B1 if logits == "last" and i == self.config.num_layers - 1 else None,
                )
            if layer_state is not None:
                layer_states.append(layer_state)
        if gather_BT is not None and logits != "last":
            x_BTD = jnp.take_along_axis(x_BTD, jnp.argsort(gather_BT, axis=1)[:, :, None], axis=1)
        x_BTD = self.norm(x_BTD)

        new_state = None
        if state is not None:
            after_B = jnp.take_along_axis(positions_BT, last_B1, axis=1)[:, 0] + 1
            new_state = State(tuple(layer_states), jnp.where(length_B > 0, after_B, state.position_B))
        return (x_BTD if logits is None else self.project(x_BTD)), new_state

    def project(self, x_BTD: jax.Array) -> jax.Array:
        """Logits of normed hidden states, accumulated and returned in `config.logits_dtype`."""
        with jax.named_scope("head"):
            return linear(x_BTD, self.head_VD, dtype=self.config.logits_dtype)

    def _check(
        self, tokens_BT: jax.Array, positions_BT: jax.Array | None, segment_ids_BT: jax.Array | None,
        state: State | None, logits: str | None, padding: str,
    ) -> None:
        if tokens_BT.ndim != 2 or not jnp.issubdtype(tokens_BT.dtype, jnp.integer) or tokens_BT.size == 0:
            raise ValueError(
                f"tokens_BT is {tokens_BT.dtype}{list(tokens_BT.shape)}; expected integers of shape [batch, time], "
                "neither of them 0"
            )
        for name, array in (("positions_BT", positions_BT), ("segment_ids_BT", segment_ids_BT)):
            if array is not None and array.shape != tokens_BT.shape:
                raise ValueError(f"{name} has shape {array.shape}; expected that of tokens_BT, {tokens_BT.shape}")
        if logits not in ("all", "last", None):
            raise ValueError(f"logits is {logits!r}; choose 'all', 'last' or None for hidden states")
        if padding not in ("any", "right"):
            raise ValueError(f"padding is {padding!r}; choose 'any' or 'right'")
        if parts(tokens_BT, 1) > 1 and (state is not None or logits == "last" or (
            segment_ids_BT is not None and padding != "right"
        )):
            raise ValueError("tokens_BT is split along time; that goes without a state, with logits 'all' or None, and "
                             "with padding='right' if there are segment ids")
        if parts(tokens_BT, 0) > 1 and state is not None:
            raise ValueError("tokens_BT is split over devices; with a decode state give every device all rows")
        if state is None:
            return
        if len(state.layers) != self.config.num_layers:
            raise ValueError(f"state has {len(state.layers)} layers; the model has {self.config.num_layers}")
        if state.position_B.shape[0] != tokens_BT.shape[0]:
            raise ValueError(f"state holds {state.position_B.shape[0]} rows; tokens_BT has {tokens_BT.shape[0]}")
