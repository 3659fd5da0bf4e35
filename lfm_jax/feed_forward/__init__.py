"""The feed-forwards of a block, one file each, one interface; `kinds.FEED_FORWARDS` is their table."""

from typing import Protocol

import jax

from lfm_jax.config import ModelConfig


class FeedForward(Protocol):
    """What every feed-forward is: it works on each token by itself."""

    def __call__(
        self, x_BTD: jax.Array, *, segment_ids_BT: jax.Array | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Computes what is added to the residual stream.

        Args:
          x_BTD: the normed stream. A call that keeps one token a row has T = 1.
          segment_ids_BT: 0 for padding, whose output means nothing and which need not be worked on.

        Returns:
          (y_BTD, reports): by name a value for each token, float32 [B, T] or [B, T, ...]. The one called `loss` is
          added to what a training step minimises, its mean over real tokens, summed over layers; the others have no
          gradient (`model.Aux`).
        """
        ...


class Rule(Protocol):
    """How a training step changes a buffer: a weight that has no gradient (`kinds.FeedForwardKind.buffers`)."""

    def __call__(self, buffer: jax.Array, reports: dict[str, jax.Array], config: ModelConfig) -> jax.Array:
        """Returns the buffer of one layer after a step.

        Args:
          reports: what the layer's feed-forward reported, by its own names, as means over the real tokens of the batch.
        """
        ...
