"""The kinds of feed-forwards. Each is described in its file in `feed_forward/`.

Dimensions: D model width, F feed-forward width, E experts, A active experts of a token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lfm_jax.kinds.kind import ITEMSIZE, FeedForwardKind, Kept, Share, Table

if TYPE_CHECKING:
    from lfm_jax.config import ModelConfig

FEED_FORWARDS: Table[FeedForwardKind] = Table("feed-forward")


def _swiglu_matrices(c: ModelConfig) -> int:
    return 3 * c.hidden_size * c.ffn_size


def _swiglu_kept(c: ModelConfig, share: Share) -> Kept:
    D, F = c.hidden_size, c.ffn_size / share.tensor
    return Kept(2 * F, 2 * F, 4 / ITEMSIZE[c.dtype] * D + 6 * F)


FEED_FORWARDS.register(FeedForwardKind(
    name="swiglu",
    module="lfm_jax.feed_forward.swiglu:SwiGLU",
    width="ffn_size",
    params=_swiglu_matrices,
    matrices=_swiglu_matrices,
    products=_swiglu_matrices,
    kept=_swiglu_kept,
    last_product=lambda c: c.hidden_size * c.ffn_size,
    buffers={},
))

# ----------------------------------------------------------------------------------------------------------------- moe


def _moe_matrices(c: ModelConfig) -> int:
    return c.num_experts * (3 * c.hidden_size * c.expert_size + c.hidden_size)


def _moe_params(c: ModelConfig) -> int:
    return _moe_matrices(c) + (c.num_experts if c.expert_bias else 0)


def _moe_products(c: ModelConfig) -> int:
    return 3 * c.active_experts * c.hidden_size * c.expert_size + c.num_experts * c.hidden_size


def _moe_kept(c: ModelConfig, share: Share) -> Kept:
    """Counts scores, choices and weights in float32; on accelerators also the hidden layer of the sorted rows."""
    A, float32 = c.active_experts, 4 / ITEMSIZE[c.dtype]
    scores = float32 * (c.num_experts + 3 * A)
    if c.experts_impl == "blocks" or (c.experts_impl == "auto" and share.chip is None):
        return Kept(scores, scores, 2 * scores + float32 * c.hidden_size)
    F, D = c.expert_size / share.tensor, c.hidden_size
    rows = A * (3 * F + 2 * D)
    return Kept(scores + rows, scores + rows, 2 * scores + float32 * D + rows + 4 * A * F)


FEED_FORWARDS.register(FeedForwardKind(
    name="moe",
    module="lfm_jax.feed_forward.moe:MoE",
    width="expert_size",
    params=_moe_params,
    matrices=_moe_matrices,
    products=_moe_products,
    kept=_moe_kept,
    last_product=lambda c: c.active_experts * c.hidden_size * c.expert_size,
    buffers={"expert_bias": "lfm_jax.feed_forward.moe:balanced"},
))
