"""SwiGLU, the dense feed-forward of LFM2 (`Lfm2MLP`).

Dimensions: B batch, T time, D model width, F feed-forward width.
"""

from __future__ import annotations

import jax
from flax import nnx

from lfm_jax.config import ModelConfig
from lfm_jax.kernels.linear import linear, linears
from lfm_jax.layers import OUT_IN, normal_param


class SwiGLU(nnx.Module):
    """`w2(silu(w1 x) * w3 x)`, no bias: w1 is the gate, w3 up, w2 down."""

    together = ("w1", "w3")
    """Weights that meet the same input through `linears`."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        D, F = config.hidden_size, config.ffn_size
        self.outputs = (F, F)
        self.w1 = normal_param(rngs, (F, D), ("ffn", "width"), config, decay=True, matrix=OUT_IN, fan_in=D)
        self.w3 = normal_param(rngs, (F, D), ("ffn", "width"), config, decay=True, matrix=OUT_IN, fan_in=D)
        self.w2 = normal_param(
            rngs, (D, F), ("width", "ffn"), config, decay=True, matrix=OUT_IN, fan_in=F, residual=True
        )

    def __call__(
        self, x_BTD: jax.Array, *, segment_ids_BT: jax.Array | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        del segment_ids_BT  # Padding costs no more than finding it.
        gate_BTF, up_BTF = linears(x_BTD, (self.w1[...], self.w3[...]), self.outputs)
        return linear(jax.nn.silu(gate_BTF) * up_BTF, self.w2[...]), {}
