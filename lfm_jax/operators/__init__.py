"""The LIV operators, one file each, one interface."""

from collections.abc import Callable
from typing import Any, Protocol

import jax

from lfm_jax.operators.attention import Attention, SlidingAttention
from lfm_jax.operators.linear_recurrence import LinearRecurrence
from lfm_jax.operators.short_conv import ShortConv


class Operator(Protocol):
    """What every operator is: one call for full pass, chunk and single token, on aligned rows (`state.align`)."""

    def __call__(
        self, x_BTD: jax.Array, *, positions_BT: jax.Array, segment_ids_BT: jax.Array | None, state: Any
    ) -> tuple[jax.Array, Any]: ...


OPERATORS: dict[str, Callable[..., Operator]] = {
    "conv": ShortConv,
    "recurrence": LinearRecurrence,
    "sliding_attention": SlidingAttention,
    "full_attention": Attention,
}
"""Layer type (`ModelConfig.layer_types`) -> operator."""
