"""The double-gated short convolution, the LIV block of LFM2 (`Lfm2ShortConv`).

`(B, C, h) = in_proj(x)`; `z = causal_conv(B * h)`; `y = out_proj(C * z)`. No activation, no inner norm. For ablations
`ModelConfig.conv_gates` leaves out B, C or both, and with them their part of in_proj.

Dimensions: B batch, T time, D width, W taps, V = W - 1 columns, or more where the state can be rolled back.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from lfm_jax import state as state_lib
from lfm_jax.config import ModelConfig
from lfm_jax.kernels.linear import linear
from lfm_jax.kernels.sharded import causal_conv, centred_conv
from lfm_jax.kinds import GATES
from lfm_jax.layers import OUT_IN, normal_param, param
from lfm_jax.state import LayerState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ConvTail(LayerState):
    """The last W - 1 gated inputs of the current document, oldest first, zeros before its beginning.

    There may be older ones before them, which `rollback` brings back into use.
    """

    tail_BVD: jax.Array

    @classmethod
    def init(cls, config: ModelConfig, batch: int, max_len: int, dtype: jnp.dtype, rollback: int) -> ConvTail:
        shape = (batch, config.conv_taps - 1 + rollback, config.hidden_size)
        return cls(state_lib.zeros(shape, dtype, (None, None, "channels")))

    def reset(self, rows_B: jax.Array) -> ConvTail:
        return ConvTail(jnp.where(rows_B[:, None, None], 0, self.tail_BVD))

    def rollback(self, back_B: jax.Array) -> ConvTail:
        index_BV = jnp.arange(self.tail_BVD.shape[1]) - back_B[:, None]
        tail_BVD = jnp.take_along_axis(self.tail_BVD, jnp.maximum(index_BV, 0)[:, :, None], axis=1)
        return ConvTail(jnp.where((index_BV >= 0)[:, :, None], tail_BVD, 0))

    def snapshot(self, row: jax.Array, start: jax.Array, length: int) -> ConvTail:
        return state_lib.row_of(self, row)

    def restore(self, row: jax.Array, start: jax.Array, part: ConvTail) -> ConvTail:
        return state_lib.with_row(self, row, part)

    def at_context(self, context: int | jax.Array) -> ConvTail:
        return self


class ShortConv(nnx.Module):
    """Up to two gates around a depthwise convolution of W taps, causal or (in an encoder) centred on each token."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        D, W = config.hidden_size, config.conv_taps
        self.gates = config.conv_gates
        streams = 1 + GATES[self.gates]
        # [3, D, D], not [3 D, D]: a tensor-parallel split of the output channels then needs no collective.
        self.in_proj = normal_param(
            rngs, (streams, D, D), (None, "channels", "width"), config, decay=True, matrix=OUT_IN, fan_in=D
        )
        self.conv = normal_param(rngs, (W, D), (None, "channels"), config, decay=False, matrix=None, fan_in=W)
        self.out_proj = normal_param(
            rngs, (D, D), ("width", "channels"), config, decay=True, matrix=OUT_IN, fan_in=D, residual=True
        )
        if config.conv_bias:
            self.in_bias = param(jnp.zeros((streams, D)), (None, "channels"), config, decay=False, matrix=None)
            self.conv_bias = param(jnp.zeros((D,)), ("channels",), config, decay=False, matrix=None)
            self.out_bias = param(jnp.zeros((D,)), (None,), config, decay=False, matrix=None)
        self.bias = config.conv_bias
        self.causal, self.impl = config.causal, config.conv_impl

    def __call__(
        self,
        x_BTD: jax.Array,
        *,
        positions_BT: jax.Array,
        segment_ids_BT: jax.Array | None,
        state: ConvTail | None,
    ) -> tuple[jax.Array, ConvTail | None]:
        """One call for full pass, chunk and single token. Rows are aligned (`state.align`)."""
        del positions_BT  # A convolution knows distance, not position.
        dtype = x_BTD.dtype
        streams_BTCD = linear(x_BTD, self.in_proj[...])
        if self.bias:
            streams_BTCD += self.in_bias[...].astype(dtype)
        b_BTD = streams_BTCD[:, :, 0] if self.gates in ("input", "both") else None
        c_BTD = streams_BTCD[:, :, -2] if self.gates in ("output", "both") else None
        h_BTD = streams_BTCD[:, :, -1]
        tail_BVD = None if state is None else state.tail_BVD
        w_WD, bias_D = self.conv[...].astype(dtype), self.conv_bias[...].astype(dtype) if self.bias else None
        gates = dict(gate_in_BTD=b_BTD, gate_out_BTD=c_BTD)
        if self.causal:
            # Older columns, if any, are there for rollback.
            newest_BVD = None if tail_BVD is None else tail_BVD[:, tail_BVD.shape[1] - w_WD.shape[0] + 1 :]
            z_BTD = causal_conv(h_BTD, w_WD, newest_BVD, segment_ids_BT, bias_D=bias_D, impl=self.impl, **gates)
        else:
            document_BT = None if segment_ids_BT is None else jnp.abs(segment_ids_BT)
            z_BTD = centred_conv(h_BTD, w_WD, document_BT, bias_D=bias_D, **gates)
        out_BTD = linear(z_BTD, self.out_proj[...])
        if self.bias:
            out_BTD += self.out_bias[...].astype(dtype)
        if tail_BVD is None:
            return out_BTD, None
        return out_BTD, ConvTail(_new_tail(tail_BVD, h_BTD if b_BTD is None else b_BTD * h_BTD, segment_ids_BT))


def _new_tail(tail_BVD: jax.Array, y_BTD: jax.Array, segment_ids_BT: jax.Array | None) -> jax.Array:
    """The last V real columns of tail and y together, zeros where they belong to an earlier document."""
    V = tail_BVD.shape[1]
    padded_BSD = jnp.concatenate([tail_BVD, y_BTD.astype(tail_BVD.dtype)], axis=1)
    if segment_ids_BT is None:
        return padded_BSD[:, padded_BSD.shape[1] - V :]
    if y_BTD.shape[1] == 1:  # A step of decoding: a token of the tail's document, or padding.
        return jnp.where((segment_ids_BT != 0)[:, :, None], padded_BSD[:, 1:], tail_BVD)
    length_B = state_lib.lengths(segment_ids_BT)
    index_BV = length_B[:, None] + jnp.arange(V, dtype=jnp.int32)
    column_BVD = jnp.take_along_axis(padded_BSD, index_BV[:, :, None], axis=1)
    # The tail belongs to document 1, so the documents of all columns are 1, ..., 1, segment ids.
    documents_BS = jnp.concatenate([jnp.ones(tail_BVD.shape[:2], jnp.int32), segment_ids_BT], axis=1)
    document_BV = jnp.take_along_axis(documents_BS, index_BV, axis=1)
    last_B1 = jnp.maximum(jnp.max(segment_ids_BT, axis=1), 1)[:, None]
    return jnp.where((document_BV == last_B1)[:, :, None], column_BVD, 0)
