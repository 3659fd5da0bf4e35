"""The kinds of feed-forwards. Each is described in its file in `feed_forward/`.

Dimensions: D model width, F feed-forward width.
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
    params=_swiglu_matrices,
    matrices=_swiglu_matrices,
    products=_swiglu_matrices,
    kept=_swiglu_kept,
    last_product=lambda c: c.hidden_size * c.ffn_size,
))
