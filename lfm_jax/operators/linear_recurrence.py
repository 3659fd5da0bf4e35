"""Diagonal linear recurrences in the double-gated LIV frame: the infinite-memory sibling of the short convolution.

`(B, C, x) = in_proj(u)`; `h_t = a_t * h_{t-1} + b_t` with a and b made from (B, x); `y = out_proj(C * h)`. It takes the
place of `ShortConv` with as many parameters: 4 D^2 and, like three taps, 3 D more.

Every form has 0 <= a <= 1 by construction and keeps a and h in float32, since a near 1 is what a long memory is.
At the start a channel's share of the past that survives one token, a, is drawn from [0.9, 0.999] as in Griffin: time
constants of 10 to 1,000 tokens.

Dimensions: B batch, T time, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from lfm_jax import state as state_lib
from lfm_jax.config import ModelConfig
from lfm_jax.kernels.linear import linear
from lfm_jax.kernels.sharded import linear_scan
from lfm_jax.layers import OUT_IN, normal_param, param
from lfm_jax.state import LayerState

SLOWEST, FASTEST = 0.999, 0.9
"""Range of the initial decay a of a channel."""
CHANNELS = ("channels",)
"""Logical axes of a cell's vectors."""
RGLRU_SHARPNESS = 8.0
"""c in Griffin's `a = sigmoid(Lambda) ** (c r)`."""


class Cell(Protocol):
    """A parametrisation: coefficients of the recurrence from the input gate's stream and the input's, in float32."""

    def __call__(self, gate_BTD: jax.Array, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]: ...


class RGLRU(nnx.Module):
    """Real-gated linear recurrent unit (Griffin, arXiv 2402.19427, section 2.4).

    `r = sigmoid(w x + bias)`, `i = sigmoid(B)`, `a = exp(-c softplus(rate) r)` with c = 8, `b = sqrt(1 - a^2) i x`.
    Griffin's gates are block-diagonal in x; here the recurrence gate's blocks are single channels and the input gate is
    the frame's own full matrix. The paper writes sigmoid(Lambda) ** (c r), the same with rate = -Lambda. Its special
    case for a document's first token (no square root) is left out.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        D = config.hidden_size
        decay_D = _initial_decay(rngs, D)
        rate_D = _inverse_softplus(-jnp.log(decay_D) / RGLRU_SHARPNESS)
        self.rate = param(rate_D, CHANNELS, config, decay=False, matrix=None)
        self.gate_scale = param(jax.random.normal(rngs.params(), (D,)), CHANNELS, config, decay=False, matrix=None)
        self.gate_bias = param(jnp.zeros((D,)), CHANNELS, config, decay=False, matrix=None)

    def __call__(self, gate_BTD: jax.Array, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
        r_BTD = jax.nn.sigmoid(_float32(self.gate_scale) * x_BTD + _float32(self.gate_bias))
        log_a_BTD = -RGLRU_SHARPNESS * jax.nn.softplus(_float32(self.rate)) * r_BTD
        return jnp.exp(log_a_BTD), _unit_variance(log_a_BTD) * jax.nn.sigmoid(gate_BTD) * x_BTD


class Liquid(nnx.Module):
    """Liquid time-constant neuron, solved in closed form over one token.

    `dh/dt = -(1/tau + f) h + f A` (Liquid Time-Constant Networks, arXiv 2006.04439, eq. 1) with conductance
    `f = softplus(B + bias)` and target A = x constant over a token of unit length has the exact solution
    `a = exp(-(1/tau + f))`, `b = (1 - a) f / (1/tau + f) x`: an input-dependent time constant, and no ODE solver, as in
    closed-form continuous-time networks (arXiv 2106.13898) and, with a linear state, Liquid-S4 (arXiv 2209.12951).
    `rate = log(1/tau)`. A leaky average of 1,000 tokens is small, so each channel has a `gain`, at the start what gives
    white noise its variance back. The recurrence itself does not see h in f, which is what keeps it a scan.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        decay_D = _initial_decay(rngs, config.hidden_size)
        share_D = -jnp.log(decay_D) / 2  # Leak and conductance begin equal.
        self.rate = param(jnp.log(share_D), CHANNELS, config, decay=False, matrix=None)
        self.gate_bias = param(_inverse_softplus(share_D), CHANNELS, config, decay=False, matrix=None)
        self.gain = param(2 * jnp.sqrt((1 + decay_D) / (1 - decay_D)), CHANNELS, config, decay=False, matrix=None)

    def __call__(self, gate_BTD: jax.Array, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
        f_BTD = jax.nn.softplus(gate_BTD + _float32(self.gate_bias))
        total_BTD = jnp.exp(_float32(self.rate)) + f_BTD
        b_BTD = -jnp.expm1(-total_BTD) * f_BTD / total_BTD * _float32(self.gain) * x_BTD
        return jnp.exp(-total_BTD), b_BTD


class LTI(nnx.Module):
    """A fixed decay a channel, the control: linear and time-invariant but for the gates.

    `a = exp(-exp(rate))`, `b = sqrt(1 - a^2) B x`: the diagonal, real case of S5 (arXiv 2208.04933), its input scaled
    as in LRU (arXiv 2303.06349). The gate is linear, as the short convolution's.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        decay_D = _initial_decay(rngs, config.hidden_size)
        self.rate = param(jnp.log(-jnp.log(decay_D)), CHANNELS, config, decay=False, matrix=None)

    def __call__(self, gate_BTD: jax.Array, x_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
        log_a_D = -jnp.exp(_float32(self.rate))
        return jnp.broadcast_to(jnp.exp(log_a_D), x_BTD.shape), _unit_variance(log_a_D) * gate_BTD * x_BTD


CELLS: dict[str, Callable[..., Cell]] = {"rglru": RGLRU, "liquid": Liquid, "lti": LTI}
"""`ModelConfig.recurrence` -> parametrisation."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hidden(LayerState):
    """The hidden state after the last token, float32; zeros before a document begins. It cannot go back."""

    h_BD: jax.Array

    @classmethod
    def init(cls, config: ModelConfig, batch: int, max_len: int, dtype: jnp.dtype, rollback: int) -> Hidden:
        return cls(state_lib.zeros((batch, config.hidden_size), jnp.float32, (None, "channels")))

    def reset(self, rows_B: jax.Array) -> Hidden:
        return Hidden(jnp.where(rows_B[:, None], 0, self.h_BD))

    def snapshot(self, row: jax.Array, start: jax.Array, length: int) -> Hidden:
        return state_lib.row_of(self, row)

    def restore(self, row: jax.Array, start: jax.Array, part: Hidden) -> Hidden:
        return state_lib.with_row(self, row, part)

    def at_context(self, context: int | jax.Array) -> Hidden:
        return self


class LinearRecurrence(nnx.Module):
    """Two gates around a diagonal linear recurrence."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        D = config.hidden_size
        self.in_proj = normal_param(
            rngs, (3, D, D), (None, "channels", "width"), config, decay=True, matrix=OUT_IN, fan_in=D
        )
        self.cell = CELLS[config.recurrence](config, rngs=rngs)
        self.out_proj = normal_param(
            rngs, (D, D), ("width", "channels"), config, decay=True, matrix=OUT_IN, fan_in=D, residual=True
        )
        self.impl = config.scan_impl

    def __call__(
        self,
        x_BTD: jax.Array,
        *,
        positions_BT: jax.Array,
        segment_ids_BT: jax.Array | None,
        state: Hidden | None,
    ) -> tuple[jax.Array, Hidden | None]:
        """One call for full pass, chunk and single token. Rows are aligned (`state.align`)."""
        del positions_BT  # A recurrence knows order, not position.
        streams_BTCD = linear(x_BTD, self.in_proj[...])
        gate_BTD, c_BTD, input_BTD = (streams_BTCD[:, :, i] for i in range(3))
        a_BTD, b_BTD = self.cell(gate_BTD.astype(jnp.float32), input_BTD.astype(jnp.float32))
        h0_BD = None if state is None else state.h_BD
        h_BTD, last_BD = linear_scan(a_BTD, b_BTD, h0_BD, segment_ids_BT, impl=self.impl)
        out_BTD = linear(c_BTD * h_BTD.astype(x_BTD.dtype), self.out_proj[...])
        return out_BTD, None if state is None else Hidden(last_BD)


def _initial_decay(rngs: nnx.Rngs, D: int) -> jax.Array:
    return jax.random.uniform(rngs.params(), (D,), minval=FASTEST, maxval=SLOWEST)


def _inverse_softplus(y: jax.Array) -> jax.Array:
    return jnp.log(jnp.expm1(y))


def _float32(param: nnx.Param) -> jax.Array:
    return param[...].astype(jnp.float32)


def _unit_variance(log_a: jax.Array) -> jax.Array:
    """`sqrt(1 - a^2)`, which keeps the variance of white noise; floored, or its slope at a = 1 would be infinite."""
    return jnp.sqrt(jnp.maximum(-jnp.expm1(2 * log_a), 1e-6))
