"""The linear scan for TPU in Pallas (Mosaic TPU); the gated convolution is in `pallas_tpu_conv`.

Both walk a grid of (row, channel tile, time tile), time innermost and in order, while Pallas copies the next tiles in
and the last ones out. Every input and output of size BTD moves once; what must pass from one time tile to the next (a
state, the last columns, the sums of the tap gradients) stays on the chip. Arithmetic is float32 whatever the inputs'
dtypes. Time and channels that do not fill their tiles are masked, not padded.

Dimensions: B batch, T time, D channels; 8 stretches of a time tile on the sublanes, L lanes, R rows.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lfm_jax.kernels.pallas_tpu_conv import gated_conv
from lfm_jax.kernels.pallas_tpu_tiles import LANES, PACKED, SUBLANES, Refs, call, check_dtypes, itemsize, tile_shape

__all__ = ["gated_conv", "scan"]

_UNROLL = 8  # Steps in one turn of the inner loops.

_Map = tuple[jax.Array, jax.Array]  # `state -> product * state + state0`, as (product, state0).


def scan(
    a_BTD: jax.Array, b_BTD: jax.Array, h0_BD: jax.Array, *, reverse: bool, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """`h_t = a_t * h_{t-1} + b_t`, without a derivative of its own.

    A step in time uses one row of a register, so eight stretches of a tile are walked abreast, one a sublane: once to
    learn what each stretch does to a state that comes in (its product of `a`, its last state from zero), then, the
    eight joined in three steps, once more from the right states.

    Args:
      a_BTD, b_BTD: float32 or bfloat16, each its own. `a == 0` forgets the past, non-finite values included.
      h0_BD: the state before the first step, float32.
      reverse: run from T - 1 to 0, `h_t = a_t * h_{t+1} + b_t`.
      interpret: run the kernel in plain JAX on any platform, for tests.

    Returns:
      h_BTD in b's dtype and the last state in float32 (at index 0 if reversed).

    Raises:
      ValueError: a dtype that is neither float32 nor bfloat16.
    """
    check_dtypes(a_BTD=a_BTD, b_BTD=b_BTD)
    B, T, D = b_BTD.shape
    rows, width = tile_shape(T, D, itemsize(a_BTD, b_BTD, b_BTD))
    tiles = pl.cdiv(T, rows)
    block = pl.BlockSpec((None, rows, width), lambda b, d, t: (b, tiles - 1 - t if reverse else t, d))
    state = pl.BlockSpec((None, 1, width), lambda b, d, t: (b, 0, d))
    scratch = pltpu.VMEM((width // LANES, SUBLANES * _pitch(rows), LANES), jnp.float32)
    results = call(
        functools.partial(_scan_kernel, T=T, reverse=reverse), (B, pl.cdiv(D, width), tiles), "linear_scan", interpret,
        inputs=dict(a=(a_BTD, block), b=(b_BTD, block), h0=(h0_BD[:, None].astype(jnp.float32), state)),
        outputs=dict(h=((B, T, D), b_BTD.dtype, block), last=((B, 1, D), jnp.float32, state)),
        scratch=dict(a32=scratch, b32=scratch), flops=5 * b_BTD.size,
    )  # fmt: skip
    return results["h"], results["last"][:, 0]


def _pitch(rows: int) -> int:
    """Rows between two stretches in scratch: odd, so that eight loads with this stride hit eight memory banks."""
    return rows // SUBLANES + 1


def _scan_kernel(refs: Refs, *, T: int, reverse: bool) -> None:
    a, b, h, last, a32, b32 = (refs[name] for name in ("a", "b", "h", "last", "a32", "b32"))
    rows, width = a.shape
    steps, pitch = rows // SUBLANES, _pitch(rows)
    groups = [(a32.at[j], b32.at[j], slice(j * LANES, (j + 1) * LANES)) for j in range(width // LANES)]
    t = pl.program_id(2)

    @pl.when(t == 0)
    def _() -> None:
        last[...] = refs["h0"][...]  # `last` stays on the chip from one time tile to the next: it is the carry.

    start = rows * (pl.num_programs(2) - 1 - t if reverse else t)

    @pl.loop(0, steps // PACKED)
    def _(i: jax.Array) -> None:
        """Spread the tile in float32, its stretches `pitch` rows apart."""
        row = pl.multiple_of(i * PACKED, PACKED)
        for k in range(SUBLANES):
            source, target = pl.ds(k * steps + row, PACKED), pl.ds(k * pitch + row, PACKED)
            for a32_j, b32_j, lanes in groups:
                a_RL, b_RL = a[source, lanes].astype(jnp.float32), b[source, lanes].astype(jnp.float32)
                if T % rows:  # What lies past the end must leave the state as it is.
                    real_RL = start + k * steps + row + lax.broadcasted_iota(jnp.int32, a_RL.shape, 0) < T
                    a_RL, b_RL = jnp.where(real_RL, a_RL, 1.0), jnp.where(real_RL, b_RL, 0.0)
                a32_j[target, :], b32_j[target, :] = a_RL, b_RL

    def at(i: jax.Array, u: int) -> Any:
        """Row i * UNROLL + u of every stretch, in the order of the run."""
        if reverse:
            i, u = steps // _UNROLL - 1 - i, _UNROLL - 1 - u
        return pl.ds(i * _UNROLL + u, SUBLANES, stride=pitch)

    def summarise(i: jax.Array, stretches: list[_Map]) -> list[_Map]:
        for u in range(_UNROLL):
            for j, (a32_j, b32_j, _) in enumerate(groups):
                stretches[j] = _join(stretches[j], a32_j[at(i, u), :], b32_j[at(i, u), :])
        return stretches

    nothing = (jnp.ones((SUBLANES, LANES), jnp.float32), jnp.zeros((SUBLANES, LANES), jnp.float32))
    stretches = lax.fori_loop(0, steps // _UNROLL, summarise, [nothing for _ in groups])

    order = lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 0)
    order = SUBLANES - 1 - order if reverse else order

    def before(x_8L: jax.Array, n: int) -> jax.Array:
        """What the stretch n places earlier has."""
        return pltpu.roll(x_8L, SUBLANES - n if reverse else n, axis=0)

    states = []
    for (product, state), (_, _, lanes) in zip(stretches, groups, strict=True):
        for n in (1, 2, 4):
            joined = _join((before(product, n), before(state, n)), product, state)
            product, state = (jnp.where(order >= n, *x) for x in zip(joined, (product, state), strict=True))
        carry_1L = last[:, lanes]
        state = _follow(carry_1L, product, state)
        states.append(jnp.where(order == 0, carry_1L, before(state, 1)))
        last[:, lanes] = state[:1] if reverse else state[-1:]

    def run(i: jax.Array, states: list[jax.Array]) -> list[jax.Array]:
        for u in range(_UNROLL):
            for j, (a32_j, b32_j, _) in enumerate(groups):
                a_8L, b_8L = a32_j[at(i, u), :], b32_j[at(i, u), :]
                states[j] = _follow(states[j], a_8L, b_8L)
                b32_j[at(i, u), :] = states[j]
        return states

    lax.fori_loop(0, steps // _UNROLL, run, states)

    @pl.loop(0, steps // PACKED)
    def _(i: jax.Array) -> None:
        row = pl.multiple_of(i * PACKED, PACKED)
        for k in range(SUBLANES):
            for _, b32_j, lanes in groups:
                h[pl.ds(k * steps + row, PACKED), lanes] = b32_j[pl.ds(k * pitch + row, PACKED), :].astype(h.dtype)


def _follow(state: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """The next state; `a == 0` lets nothing of the old one through, not even NaN."""
    return jnp.where(a == 0, b, a * state + b)


def _join(first: _Map, a: jax.Array, b: jax.Array) -> _Map:
    """The map `state -> a * state + b` after another one."""
    product, state = first
    return jnp.where(a == 0, 0.0, a * product), _follow(state, a, b)
