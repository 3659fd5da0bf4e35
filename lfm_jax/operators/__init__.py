"""The LIV operators: one interface, `op(x_BTD, *, positions_BT, segment_ids_BT, state) -> (y_BTD, state)`."""

from lfm_jax.operators.attention import Attention
from lfm_jax.operators.short_conv import ShortConv

OPERATORS = {"conv": ShortConv, "full_attention": Attention}
"""Layer type (`ModelConfig.layer_types`) -> operator."""
