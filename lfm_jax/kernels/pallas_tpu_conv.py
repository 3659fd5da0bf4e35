"""The gated short convolution for TPU in Pallas (Mosaic TPU), forward and gradient one pass each.

Dimensions: B batch, T time, D channels, W taps, V = W - 1; R rows and L lanes of a tile.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lfm_jax.kernels.pallas_tpu_tiles import (
    LANES,
    PACKED,
    SUBLANES,
    Inputs,
    Refs,
    call,
    check_dtypes,
    itemsize,
    tile_shape,
)

_STRIP = 64  # Rows at a time: enough independent work to hide latency, few enough to stay in registers.
_HALO = SUBLANES  # Rows kept of the neighbouring tile: the reach of the taps, rounded up.


def gated_conv(
    y_BTD: jax.Array,
    w_WD: jax.Array,
    tail_BVD: jax.Array,
    reach_BT: jax.Array | None,
    gate_in_BTD: jax.Array | None,
    gate_out_BTD: jax.Array | None,
    bias_D: jax.Array | None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """`gate_out * (conv(gate_in * y) + bias)`, causal and depthwise, in one pass; its gradient in another.

    The gradient recomputes `gate_in * y` and the convolution, so nothing but the inputs is kept for it.

    Args:
      y_BTD: input; float32 or bfloat16, as the gates.
      w_WD: taps, oldest first; at most 9.
      tail_BVD: the W - 1 columns of `gate_in * y` before the first, oldest first.
      reach_BT: int32, how many of the last W - 1 columns belong to each token's document; None means all.
      gate_in_BTD, gate_out_BTD, bias_D: None is left out.
      interpret: run the kernels in plain JAX on any platform, for tests.

    Returns:
      z_BTD in y's dtype.

    Raises:
      ValueError: a dtype that is neither float32 nor bfloat16, or too many taps.
    """
    check_dtypes(y_BTD=y_BTD, gate_in_BTD=gate_in_BTD, gate_out_BTD=gate_out_BTD)
    if w_WD.shape[0] > _HALO + 1:
        raise ValueError(f"w_WD has {w_WD.shape[0]} taps; pallas_tpu takes at most {_HALO + 1}, choose another impl")
    args = _ConvArgs(y_BTD, w_WD, tail_BVD, reach_BT, gate_in_BTD, gate_out_BTD, bias_D)
    return _gated_conv(args, interpret)


class _ConvArgs(NamedTuple):
    y_BTD: jax.Array
    w_WD: jax.Array
    tail_BVD: jax.Array
    reach_BT: jax.Array | None
    gate_in_BTD: jax.Array | None
    gate_out_BTD: jax.Array | None
    bias_D: jax.Array | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gated_conv(args: _ConvArgs, interpret: bool) -> jax.Array:
    y_BTD = args.y_BTD
    B, T, D = y_BTD.shape
    rows, width = tile_shape(T, D, itemsize(y_BTD, args.gate_in_BTD, args.gate_out_BTD, y_BTD))
    block = pl.BlockSpec((None, rows, width), lambda b, d, t: (b, t, d))
    return call(
        functools.partial(_conv_kernel, W=args.w_WD.shape[0]), (B, pl.cdiv(D, width), pl.cdiv(T, rows)), "gated_conv",
        interpret, inputs=_conv_inputs(args, block, rows, width), outputs=dict(z=(y_BTD.shape, y_BTD.dtype, block)),
        scratch=_conv_scratch(args, rows, width), flops=(2 * args.w_WD.shape[0] + 2) * y_BTD.size,
    )["z"]  # fmt: skip


def _conv_inputs(args: _ConvArgs, block: pl.BlockSpec, rows: int, width: int) -> Inputs:
    """Taps come with the bias as one more row, the history filled up to `_HALO` rows."""
    W, D = args.w_WD.shape
    bias_1D = jnp.zeros((1, D), jnp.float32) if args.bias_D is None else args.bias_D[None].astype(jnp.float32)
    taps_RD = jnp.concatenate([args.w_WD.astype(jnp.float32), bias_1D])
    tail_BHD = jnp.pad(args.tail_BVD.astype(jnp.float32), ((0, 0), (_HALO - (W - 1), 0), (0, 0)))
    return dict(
        y=(args.y_BTD, block),
        gate_in=(args.gate_in_BTD, block),
        gate_out=(args.gate_out_BTD, block),
        taps=(taps_RD, pl.BlockSpec((W + 1, width), lambda b, d, t: (0, d))),
        tail=(tail_BHD, pl.BlockSpec((None, _HALO, width), lambda b, d, t: (b, 0, d))),
        reach=_of_tokens(args.reach_BT, rows),
    )


def _of_tokens(x_BT: jax.Array | None, rows: int) -> tuple[jax.Array | None, pl.BlockSpec]:
    return None if x_BT is None else x_BT[:, None], pl.BlockSpec((None, 1, rows), lambda b, d, t: (b, 0, t))


def _conv_scratch(args: _ConvArgs, rows: int, width: int) -> dict[str, Any]:
    """`x`: the convolution's input, `gate_in * y`, under the last `_HALO` rows of the tile before."""
    scratch = dict(x=pltpu.VMEM((width // LANES, _HALO + rows, LANES), jnp.float32))
    return scratch if args.reach_BT is None else scratch | dict(reach_RL=pltpu.VMEM((rows, LANES), jnp.int32))


def _start_tile(refs: Refs) -> None:
    """The history into `x` where a row starts; what comes one token a lane (reach, ahead) down the sublanes."""

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        for j in range(refs["x"].shape[0]):
            refs["x"][j, :_HALO, :] = refs["tail"][:, j * LANES : (j + 1) * LANES]

    for name in sorted({"reach", "ahead"} & refs.keys()):
        refs[f"{name}_RL"][...] = jnp.broadcast_to(refs[name][...], (LANES, refs[name].shape[1])).T


def _conv_kernel(refs: Refs, *, W: int) -> None:
    y, x, z = refs["y"], refs["x"], refs["z"]
    rows, width = y.shape
    _start_tile(refs)

    @pl.loop(0, width // LANES)
    def _(j: jax.Array) -> None:
        lanes = _lanes(j)
        taps_RL = refs["taps"][:, lanes]

        @pl.loop(0, rows // _STRIP)
        def _(i: jax.Array) -> None:
            strip = pl.ds(pl.multiple_of(i * _STRIP, _STRIP), _STRIP)
            x[j, _shifted(strip, _HALO), :] = _read(y, strip, lanes, refs.get("gate_in"))
            z_RL = jnp.broadcast_to(taps_RL[W:], (_STRIP, LANES))
            for k in range(W):
                z_RL += taps_RL[W - 1 - k : W - k] * _reached(x, j, strip, _HALO - k, refs.get("reach_RL"), k)
            if "gate_out" in refs:
                z_RL *= _read(refs["gate_out"], strip, lanes)
            z[strip, lanes] = z_RL.astype(z.dtype)

        x[j, :_HALO, :] = x[j, rows:, :]


def _lanes(j: jax.Array) -> Any:
    return pl.ds(pl.multiple_of(j * LANES, LANES), LANES)


def _shifted(strip: Any, n: int) -> Any:
    return pl.ds(strip.start + n, strip.size)


def _read(ref: Any, rows: Any, lanes: Any, gate: Any = None) -> jax.Array:
    x_RL = ref[rows, lanes].astype(jnp.float32)
    return x_RL if gate is None else x_RL * gate[rows, lanes].astype(jnp.float32)


def _reached(x: Any, j: jax.Array, strip: Any, shift: int, reach_RL: Any, k: int) -> jax.Array:
    """The rows of x that tap k sees, k rows away; zero where they belong to another document."""
    x_RL = x[j, _shifted(strip, shift), :]
    return x_RL if reach_RL is None or k == 0 else jnp.where(reach_RL[strip, :] >= k, x_RL, 0.0)


def _gated_conv_forward(args: _ConvArgs, interpret: bool) -> tuple[jax.Array, _ConvArgs]:
    return _gated_conv(args, interpret), args


def _gated_conv_backward(interpret: bool, args: _ConvArgs, dz_BTD: jax.Array) -> tuple[_ConvArgs]:
    y_BTD, w_WD, tail_BVD, reach_BT, gate_in_BTD, gate_out_BTD, bias_D = args
    B, T, D = y_BTD.shape
    W = w_WD.shape[0]
    rows, width = tile_shape(T, D, 2 * itemsize(y_BTD, gate_in_BTD, gate_out_BTD) + dz_BTD.dtype.itemsize)
    block = pl.BlockSpec((None, rows, width), lambda b, d, t: (b, t, d))
    after = pl.BlockSpec(
        (None, PACKED, width), lambda b, d, t: (b, jnp.minimum((t + 1) * (rows // PACKED), (T - 1) // PACKED), d)
    )
    scratch = _conv_scratch(args, rows, width)
    scratch["dx"] = pltpu.VMEM((width // LANES, rows + _HALO, LANES), jnp.float32)
    if reach_BT is not None:
        scratch["ahead_RL"] = scratch["reach_RL"]
    gradients = call(
        functools.partial(_conv_gradient_kernel, W=W, T=T), (B, pl.cdiv(D, width), pl.cdiv(T, rows)),
        "gated_conv_gradient", interpret,
        inputs=_conv_inputs(args, block, rows, width) | dict(
            dz=(dz_BTD, block), dz_after=(dz_BTD, after), gate_out_after=(gate_out_BTD, after),
            ahead=_of_tokens(None if reach_BT is None else _ahead(reach_BT, W), rows),
        ),
        outputs=dict(
            dtaps=((B, W + 1, D), jnp.float32, pl.BlockSpec((None, W + 1, width), lambda b, d, t: (b, 0, d))),
            **{name: None if x is None else (x.shape, x.dtype, block)
               for name, x in (("dy", y_BTD), ("dgate_in", gate_in_BTD), ("dgate_out", gate_out_BTD))},
        ),
        scratch=scratch, flops=(6 * W + 6) * y_BTD.size,
    )  # fmt: skip
    dtaps_RD = gradients["dtaps"].sum(0)
    return (
        _ConvArgs(
            y_BTD=gradients["dy"],
            w_WD=dtaps_RD[:W].astype(w_WD.dtype),
            tail_BVD=_tail_gradient(args, dz_BTD).astype(tail_BVD.dtype),
            reach_BT=None,
            gate_in_BTD=gradients["dgate_in"],
            gate_out_BTD=gradients["dgate_out"],
            bias_D=None if bias_D is None else dtaps_RD[W].astype(bias_D.dtype),
        ),
    )


_gated_conv.defvjp(_gated_conv_forward, _gated_conv_backward)


def _ahead(reach_BT: jax.Array, W: int) -> jax.Array:
    """How many of the next W - 1 tokens reach back to each token."""
    T = reach_BT.shape[1]
    padded_BS = jnp.pad(reach_BT, ((0, 0), (0, W)))
    ahead_BT = jnp.zeros_like(reach_BT)
    for k in range(1, W):
        ahead_BT += padded_BS[:, k : k + T] >= k
    return ahead_BT


def _tail_gradient(args: _ConvArgs, dz_BTD: jax.Array) -> jax.Array:
    """Token t sees column t + k of the history through tap k; only the first W - 1 tokens see any."""
    V = args.w_WD.shape[0] - 1
    dx_BVD = dz_BTD[:, :V].astype(jnp.float32)
    if args.gate_out_BTD is not None:
        dx_BVD *= args.gate_out_BTD[:, :V]
    dtail_BVD = jnp.zeros(args.tail_BVD.shape, jnp.float32)
    for k in range(V):
        seen_BUD = dx_BVD[:, : V - k] * args.w_WD[k]
        if args.reach_BT is not None:
            seen_BUD = jnp.where(args.reach_BT[:, : V - k, None] >= V - k, seen_BUD, 0)
        dtail_BVD += jnp.pad(seen_BUD, ((0, 0), (k, V - k - seen_BUD.shape[1]), (0, 0)))
    return dtail_BVD


def _conv_gradient_kernel(refs: Refs, *, W: int, T: int) -> None:
    """`dx` is what comes back through the output gate, over the first `_HALO` rows of the next tile's."""
    dz, y, x, dx = refs["dz"], refs["y"], refs["x"], refs["dx"]
    gate_in, gate_out = refs.get("gate_in"), refs.get("gate_out")
    rows, width = y.shape
    _start_tile(refs)
    start = pl.program_id(2) * rows

    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        refs["dtaps"][...] = jnp.zeros(refs["dtaps"].shape, jnp.float32)

    def real(x_RL: jax.Array, first: jax.Array) -> jax.Array:
        """Rows past the end hold anything, NaN too; they must not reach a sum over time."""
        return jnp.where(first + lax.broadcasted_iota(jnp.int32, x_RL.shape, 0) < T, x_RL, 0.0)

    @pl.loop(0, width // LANES)
    def _(j: jax.Array) -> None:
        lanes = _lanes(j)
        taps_RL = refs["taps"][:, lanes]

        def through_output_gate(i: jax.Array, sums: list[jax.Array]) -> list[jax.Array]:
            strip = pl.ds(pl.multiple_of(i * _STRIP, _STRIP), _STRIP)
            x_RL, dx_RL = _read(y, strip, lanes, gate_in), _read(dz, strip, lanes, gate_out)
            if T % rows:
                x_RL, dx_RL = real(x_RL, start + strip.start), real(dx_RL, start + strip.start)
            x[j, _shifted(strip, _HALO), :], dx[j, strip, :] = x_RL, dx_RL
            z_RL = jnp.broadcast_to(taps_RL[W:], x_RL.shape)
            for k in range(W):
                x_RL = _reached(x, j, strip, _HALO - k, refs.get("reach_RL"), k)
                z_RL += taps_RL[W - 1 - k : W - k] * x_RL
                sums[W - 1 - k] += _fold(dx_RL * x_RL)
            sums[W] += _fold(dx_RL)
            if gate_out is not None:
                dgate_out = refs["dgate_out"]
                dgate_out[strip, lanes] = (_read(dz, strip, lanes) * z_RL).astype(dgate_out.dtype)
            return sums

        zero_8L = jnp.zeros((SUBLANES, LANES), jnp.float32)
        sums = lax.fori_loop(0, rows // _STRIP, through_output_gate, [zero_8L for _ in range(W + 1)])
        for k, sum_8L in enumerate(sums):
            refs["dtaps"][k : k + 1, lanes] += sum_8L.sum(0, keepdims=True)
        x[j, :_HALO, :] = x[j, rows:, :]
        after_RL = _read(refs["dz_after"], slice(None), lanes, refs.get("gate_out_after"))
        dx[j, rows:, :] = real(after_RL, start + rows)[:_HALO]

        @pl.loop(0, rows // _STRIP)
        def _(i: jax.Array) -> None:
            strip = pl.ds(pl.multiple_of(i * _STRIP, _STRIP), _STRIP)
            du_RL = jnp.zeros((_STRIP, LANES), jnp.float32)
            for k in range(W):
                du_RL += taps_RL[W - 1 - k : W - k] * _reached(dx, j, strip, k, refs.get("ahead_RL"), k)
            if gate_in is not None:
                refs["dgate_in"][strip, lanes] = (du_RL * _read(y, strip, lanes)).astype(refs["dgate_in"].dtype)
                du_RL *= _read(gate_in, strip, lanes)
            refs["dy"][strip, lanes] = du_RL.astype(refs["dy"].dtype)


def _fold(x_RL: jax.Array) -> jax.Array:
    """Sum down to one register; the eight sublanes are added once at the end."""
    return x_RL.reshape(-1, SUBLANES, LANES).sum(0)
