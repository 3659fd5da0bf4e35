"""The kinds of operators and feed-forwards that layers are made of: two tables that the rest of the package folds
over."""

from lfm_jax.kinds.feed_forwards import FEED_FORWARDS
from lfm_jax.kinds.kind import ITEMSIZE, FeedForwardKind, Kept, OperatorKind, Share, Table
from lfm_jax.kinds.operators import GATES, OPERATORS

__all__ = [
    "FEED_FORWARDS", "GATES", "ITEMSIZE", "OPERATORS", "FeedForwardKind", "Kept", "OperatorKind",
    "Share", "Table",
]
