"""The kinds of operators. Each is described in its file in `operators/`.

Dimensions: D model width, N query heads, K key/value heads, H head width, W conv taps, T tokens of a document.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lfm_jax.kinds.kind import ITEMSIZE, Kept, OperatorKind, Share, Table

if TYPE_CHECKING:
    from lfm_jax.config import ModelConfig

OPERATORS: Table[OperatorKind] = Table("operator")

# ---------------------------------------------------------------------------------------------------------------- conv

GATES: dict[str, int] = {"none": 0, "input": 1, "output": 1, "both": 2}
"""The number of gates around the convolution by `conv_gates`; in_proj makes a stream for each, and one for the
input."""


def _conv_matrices(c: ModelConfig) -> int:
    return (2 + GATES[c.conv_gates]) * c.hidden_size**2


def _conv_params(c: ModelConfig) -> int:
    D, biases = c.hidden_size, 3 + GATES[c.conv_gates]  # Of each stream, the taps and the output.
    return _conv_matrices(c) + D * c.conv_taps + (biases * D if c.conv_bias else 0)


def _conv_kept(c: ModelConfig, share: Share) -> Kept:
    D, streams = c.hidden_size, (1 + GATES[c.conv_gates]) * c.hidden_size / share.tensor
    return Kept(streams, streams + D / share.tensor, streams + D + _float32(c) * D)


OPERATORS.register(OperatorKind(
    name="conv",
    module="lfm_jax.operators.short_conv:ShortConv",
    params=_conv_params,
    matrices=_conv_matrices,
    products=_conv_matrices,
    kept=_conv_kept,
    mixing=lambda c, T: c.hidden_size * c.conv_taps,
    traded=lambda c: 0.0,
    state="lfm_jax.operators.short_conv:ConvTail",
    state_bytes=lambda c, T, item: (c.conv_taps - 1) * c.hidden_size * item,
    rolls_back=True,
    letter="c",
    forms={"conv": {}},
))

# ----------------------------------------------------------------------------------------------------------- attention


def _attention_matrices(c: ModelConfig) -> int:
    gate = c.num_heads * c.hidden_size if c.attention_gate else 0
    return 2 * c.hidden_size * c.head_dim * (c.num_heads + c.num_kv_heads) + gate


def _attention_params(c: ModelConfig) -> int:
    return _attention_matrices(c) + (2 * c.head_dim if c.qk_norm else 0)


def _attention_mixing(c: ModelConfig, T: int, reach: int) -> float:
    # Mean of min(t + 1, reach) over t = 0 .. T - 1; an encoder sees all of a document.
    keys = reach - reach * (reach - 1) / (2 * T) if c.causal else T
    return 2 * c.num_heads * c.head_dim * keys


def _attention_kept(c: ModelConfig, share: Share, scores: float) -> Kept:
    D, N, K = c.hidden_size, c.num_heads, c.num_kv_heads
    H = math.ceil(c.head_dim / share.lanes) * share.lanes / share.tensor
    gates = N / share.tensor if c.attention_gate else 0
    streams = (N + 2 * K) * H + gates
    return Kept(
        streams, streams + gates + (3 * N + K) * H + scores,
        # With gates, heads before and after them.
        2 * gates + (5 if gates else 4) * N * H + 3 * K * H + _float32(c) * (D + (N + K) * H) + scores,
    )


def _scores(c: ModelConfig, share: Share) -> float:
    """Returns the elements of `dtype` per token that attention keeps of its scores (`kernels/attention.py`)."""
    from lfm_jax.kernels.attention import CPU_SCORES, SCORE_BYTES

    held = c.num_heads / share.tensor * share.seq_len
    if c.attention_impl == "auto":
        flash = share.chip is None and share.seq_len**2 >= CPU_SCORES
        flash |= 4 * share.tokens * held > SCORE_BYTES
        # On a GPU cuDNN, which keeps no scores.
        gpu = share.chip is not None and not share.chip.torus_dims
        flash |= gpu and c.dtype in ("bfloat16", "float16") and c.head_dim % 8 == 0 and c.head_dim <= 128
    else:
        flash = c.attention_impl != "xla"
    return 0.0 if flash else held * (_float32(c) + 1)


def _attention_traded(c: ModelConfig) -> float:
    """Counts queries, keys, values and results, which are split over heads instead of time meanwhile."""
    return 2 * c.head_dim * (c.num_heads + c.num_kv_heads)


def _kv_bytes(c: ModelConfig, slots: int, item: int) -> int:
    return 2 * slots * c.num_kv_heads * c.head_dim * item + 2 * 4  # And two counts.


OPERATORS.register(OperatorKind(
    name="full_attention",
    module="lfm_jax.operators.attention:Attention",
    params=_attention_params,
    matrices=_attention_matrices,
    products=_attention_matrices,
    kept=lambda c, share: _attention_kept(c, share, _scores(c, share)),
    mixing=lambda c, T: _attention_mixing(c, T, T),
    traded=_attention_traded,
    state="lfm_jax.operators.attention:KV",
    state_bytes=_kv_bytes,
    rolls_back=True,
    letter="a",
    forms={},
))
OPERATORS.register(OperatorKind(
    name="sliding_attention",
    module="lfm_jax.operators.attention:SlidingAttention",
    params=_attention_params,
    matrices=_attention_matrices,
    products=_attention_matrices,
    kept=lambda c, share: _attention_kept(c, share, 0.0),
    mixing=lambda c, T: _attention_mixing(c, T, min(T, c.sliding_window)),
    traded=_attention_traded,
    state="lfm_jax.operators.attention:RollingKV",
    state_bytes=lambda c, T, item: _kv_bytes(c, min(T, c.sliding_window), item),
    rolls_back=True,
    letter="s",
    forms={"sliding_attention": {}},
))

# ---------------------------------------------------------------------------------------------------------- recurrence

RECURRENCE_VECTORS: dict[str, int] = {"rglru": 3, "liquid": 3, "lti": 1}
"""Parameters per channel of each form of the recurrence, besides its matrices."""


def _recurrence_matrices(c: ModelConfig) -> int:
    return 4 * c.hidden_size**2


def _recurrence_kept(c: ModelConfig, share: Share) -> Kept:
    D, float32 = c.hidden_size, _float32(c)
    streams = 3 * D / share.tensor
    return Kept(streams, streams + 4 * float32 * D / share.tensor, streams + 14 * float32 * D)


OPERATORS.register(OperatorKind(
    name="recurrence",
    module="lfm_jax.operators.linear_recurrence:LinearRecurrence",
    params=lambda c: _recurrence_matrices(c) + RECURRENCE_VECTORS[c.recurrence] * c.hidden_size,
    matrices=_recurrence_matrices,
    products=_recurrence_matrices,
    kept=_recurrence_kept,
    mixing=lambda c, T: c.hidden_size,
    traded=lambda c: 0.0,
    state="lfm_jax.operators.linear_recurrence:Hidden",
    state_bytes=lambda c, T, item: 4 * c.hidden_size,
    rolls_back=False,
    letter="r",
    forms={form: {"recurrence": form} for form in RECURRENCE_VECTORS},
))


def _float32(c: ModelConfig) -> float:
    """Returns the elements of `dtype` that take as many bytes as one of float32."""
    return 4 / ITEMSIZE[c.dtype]
