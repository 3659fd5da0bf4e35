"""Gated causal convolution for Hopper GPUs, forward and backward in one kernel each.

docs/measurements/kernels.md has its times.

No step waits for another one, so time is cut over programs as well as batch and channels, CHUNKS chunks to a program.
Each long operand crosses device memory once: the V rows that a chunk reads beyond its own come from L2, where its
neighbour left them. By ptxas' schedule a row of 128 channels (W = 3, both gates, bfloat16) takes 40 cycles forward and
60 backward; an H200's memory, at 4.3 TB/s, brings one every 55 and 98 cycles to each SM.

Dimensions: B batch, T time, D channels, W taps, V = W - 1 columns of history, C channels of a program, R rows of a
chunk, X = W + 1 sums (taps and bias), K chunks, L tokens of reach that go with a chunk.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from lfm_jax.kernels.pallas_gpu_stream import Window, check_dtypes, launch, pad, stream

CHANNELS, CHUNKS, SLOTS = 128, 16, 3
COLUMN_BYTES = 64
"""Of a chunk, a channel: R is 32 in bfloat16, 16 in float32."""
GROUP = 8
"""Rows that are first all read, then computed, then all written: their reads are under way together."""
MAX_TAPS = 9
"""With more, three slots would not fit into shared memory in float32."""


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
    """`gate_out * (conv(gate_in * y) + bias)` in float32, differentiable by all floating-point arguments.

    Nothing but the arguments is kept for the gradient, which forms `gate_in * y` and the convolution again.

    Args:
      y_BTD: bfloat16 or float32, as the gates.
      w_WD: taps, oldest first.
      tail_BVD: the V = W - 1 columns of `gate_in * y` before y.
      reach_BT: int32, how many of the V columns before a token belong to its document; None means all of them.
      gate_in_BTD: None leaves it out.
      gate_out_BTD: None leaves it out.
      bias_D: None leaves it out.
      interpret: on CPU, operation by operation: slow, for tests.

    Returns:
      z_BTD in y's dtype.

    Raises:
      ValueError: another dtype, or more than MAX_TAPS taps.
    """
    check_dtypes(y_BTD=y_BTD, gate_in_BTD=gate_in_BTD, gate_out_BTD=gate_out_BTD)
    if w_WD.shape[0] > MAX_TAPS:
        raise ValueError(f"w_WD has {w_WD.shape[0]} taps; pallas_gpu takes up to {MAX_TAPS}: choose another impl")
    return _gated_conv(interpret, y_BTD, w_WD, tail_BVD, reach_BT, gate_in_BTD, gate_out_BTD, bias_D)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gated_conv(interpret, *inputs):
    return _conv(inputs, None, interpret)["z"]


def _gated_conv_fwd(interpret, *inputs):
    return _gated_conv(interpret, *inputs), inputs


def _gated_conv_bwd(interpret, inputs, dz_BTD):
    _, w_WD, tail_BVD, reach_BT, _, gate_out_BTD, bias_D = inputs
    W, D = w_WD.shape
    out = _conv(inputs, dz_BTD, interpret)
    sums_XD = jnp.sum(out["sums"], axis=(0, 1))[:, :D]
    dbias_D = None if bias_D is None else sums_XD[W].astype(bias_D.dtype)
    # Only the first V tokens reach the history.
    dc_BVD = dz_BTD[:, : W - 1].astype(jnp.float32)
    if gate_out_BTD is not None:
        dc_BVD = dc_BVD * gate_out_BTD[:, : W - 1]
    dtail_BVD = jnp.zeros(tail_BVD.shape, jnp.float32)
    for t in range(dc_BVD.shape[1]):
        for j in range(t + 1, W):  # Tap j of token t falls on column W - 1 + t - j.
            term_BD = w_WD[W - 1 - j] * dc_BVD[:, t]
            if reach_BT is not None:
                term_BD = jnp.where(reach_BT[:, t, None] >= j, term_BD, 0)
            dtail_BVD = dtail_BVD.at[:, W - 1 + t - j].add(term_BD)
    dw_WD, dtail_BVD = sums_XD[:W].astype(w_WD.dtype), dtail_BVD.astype(tail_BVD.dtype)
    return out["dy"], dw_WD, dtail_BVD, None, out.get("dgate_in"), out.get("dgate_out"), dbias_D


_gated_conv.defvjp(_gated_conv_fwd, _gated_conv_bwd)


@functools.partial(jax.jit, static_argnames="interpret")  # The layers of a model share one lowering, of seconds.
def _conv(inputs: tuple, dz_BTD: jax.Array | None, interpret: bool) -> dict[str, jax.Array]:
    """The convolution, `z`; or, given dz, its gradient `dy`, `dgate_in`, `dgate_out` and `sums`: dw, dbias by program.

    `u = gate_in * y` with the history before it, `c = conv(u) + bias`, `z = gate_out * c`. For the gradient, with
    `dc = gate_out * dz`: `dgate_out = c * dz`, `du_s = sum_j w[V-j] dc_{s+j}`, `dgate_in = y * du`,
    `dy = gate_in * du`, `dw[V-j] = sum_t dc_t u_{t-j}`, `dbias = sum_t dc_t`. So a chunk needs V rows of u from before
    it and, for the gradient, V rows of dc from behind it: of those operands the copy engine brings R + V rows.
    """
    y_BTD = inputs[0]
    cut = _cut(inputs, dz_BTD)
    name = "gated_conv" if dz_BTD is None else "gated_conv_gradient"
    results = launch(
        lambda place, refs: _Program(cut, place, refs).run(), name, (y_BTD.shape[0], cut.parts, cut.tiles),
        cut.long | cut.short, cut.outs, interpret,
    )
    return {name: x if name == "sums" else x[..., : y_BTD.shape[2]] for name, x in results.items()}


@dataclasses.dataclass(frozen=True)
class _Cut:
    """How a call is cut into programs, and what goes in and out of them.

    A program takes C channels of one row of the batch through `steps` chunks of R tokens, one after another.
    """

    V: int
    R: int
    parts: int
    """Programs along time."""
    tiles: int
    """Programs along channels."""
    steps: int
    long: dict[str, jax.Array]
    """[B, T, D] operands, by name."""
    short: dict[str, jax.Array]
    """The others."""
    outs: dict[str, jax.ShapeDtypeStruct]

    @property
    def gradient(self) -> bool:
        return "dz" in self.long

    @property
    def streams(self) -> list[str]:
        """Results that are written chunk by chunk."""
        return [name for name in self.outs if name != "sums"]


def _cut(inputs: tuple, dz_BTD: jax.Array | None) -> _Cut:
    y_BTD, w_WD, tail_BVD, reach_BT, gate_in_BTD, gate_out_BTD, bias_D = inputs
    (B, T, D), V = y_BTD.shape, w_WD.shape[0] - 1
    operands = {"y": y_BTD, "gate_in": gate_in_BTD, "gate_out": gate_out_BTD, "dz": dz_BTD}
    long = {name: pad(x, 8) for name, x in operands.items() if x is not None}
    C, R = CHANNELS, COLUMN_BYTES // max(x.dtype.itemsize for x in long.values())
    chunks = pl.cdiv(T, R)
    parts, tiles = pl.cdiv(chunks, CHUNKS), pl.cdiv(D, C)
    steps = pl.cdiv(chunks, parts)

    short = {"w": pad(w_WD.astype(jnp.float32), C)}
    if V:
        short["tail"] = pad(tail_BVD.astype(jnp.float32), C)
    if bias_D is not None:
        short["bias"] = pad(bias_D.astype(jnp.float32), C)
    if V and reach_BT is not None:
        token_KL = R * jnp.arange(parts * steps)[:, None] + jnp.arange(_reach_length(R, V))
        short["reach"] = jnp.take(reach_BT, token_KL, axis=1, mode="fill", fill_value=0)

    if dz_BTD is None:
        outs = {"z": jax.ShapeDtypeStruct(long["y"].shape, y_BTD.dtype)}
    else:
        outs = {f"d{name}": jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in long.items() if name != "dz"}
        outs["sums"] = jax.ShapeDtypeStruct((B, parts, V + 2, tiles * C), jnp.float32)
    return _Cut(V, R, parts, tiles, steps, long, short, outs)


def _reach_length(R: int, V: int) -> int:
    return pl.cdiv(R + V, 32) * 32


# Mosaic would find this layout, the only one that fits, by itself; told, it lowers the gradient many times faster.
LAYOUT = plgpu.Layout.WG_STRIDED((CHANNELS,), vec_size=1)


class _Program:
    """One program of the kernel, at its place in the grid."""

    def __init__(self, cut: _Cut, place: tuple, refs: dict[str, Any]):
        self.cut, self.refs = cut, refs
        self.batch, self.part, tile = place
        self.channels = pl.ds(tile * CHANNELS, CHANNELS)
        V = cut.V
        self.taps = [_load(refs["w"].at[v, self.channels]) for v in range(V + 1)]
        self.tail = [_load(refs["tail"].at[self.batch, v, self.channels]) for v in range(V)]
        self.bias_C: Any = _load(refs["bias"].at[self.channels]) if "bias" in refs else 0.0

    def run(self) -> None:
        """All chunks of this program, operands and results streamed past."""
        cut, V, R = self.cut, self.cut.V, self.cut.R
        behind = V if cut.gradient else 0
        rows = {"y": (self._before, R + V), "gate_in": (self._before, R + V), "gate_out": (self._start, R + behind),
                "dz": (self._start, R + V)}
        ins = {name: self._window(name, *rows[name]) for name in cut.long}
        if "reach" in cut.short:
            L = _reach_length(R, V)
            ins["reach"] = Window(
                self.refs["reach"], (L,), lambda step: (self.batch, self.part * cut.steps + step, pl.ds(0, L))
            )
        outs = {name: self._window(name, self._start, R) for name in cut.streams}
        zero_C = plgpu.layout_cast(jnp.zeros((CHANNELS,), jnp.float32), LAYOUT)
        body = self._backward if cut.gradient else self._forward
        sums = stream(body, [zero_C] * (V + 2) if cut.gradient else [], cut.steps, slots=SLOTS, ins=ins, outs=outs)
        for x, sum_C in enumerate(sums):
            self.refs["sums"][self.batch, self.part, x, self.channels] = sum_C

    def _start(self, step):
        """The first token of a chunk."""
        return (self.part * self.cut.steps + step) * self.cut.R

    def _before(self, step):
        return jnp.maximum(self._start(step) - self.cut.V, 0)

    def _window(self, name, first, rows):
        return Window(
            self.refs[name], (rows, CHANNELS), lambda step: (self.batch, pl.ds(first(step), rows), self.channels)
        )

    def _convolve(self, keep, i, u) -> Any:
        """c of row i of a group; u begins V rows before the group."""
        V = self.cut.V
        return sum((keep(i, j, self.taps[V - j] * u[V + i - j]) for j in range(V + 1)), start=self.bias_C)

    def _documents(self, blocks, first, rows):
        """keep(i, j, term): what tap j gives to row first + i, nothing if it reaches into another document."""
        if "reach" not in blocks:
            return lambda i, j, term_C: term_C
        reach = [plgpu.layout_cast(jnp.full((CHANNELS,), blocks["reach"][first + i]), LAYOUT) for i in range(rows)]
        inside = [[reach_C >= j for j in range(self.cut.V + 1)] for reach_C in reach]
        return lambda i, j, term_C: jnp.where(inside[i][j], term_C, 0.0) if j else term_C

    def _begin(self, step, blocks):
        """(u of the V rows before the chunk; where in the blocks of y and gate_in its own rows begin)."""
        V, start = self.cut.V, self._start(step)
        u = [_read(blocks, "y", v) * _read(blocks, "gate_in", v) for v in range(V)]
        first_C = jnp.full((CHANNELS,), start) == 0  # Nothing before it: its blocks begin with itself.
        return [jnp.where(first_C, self.tail[v], u[v]) for v in range(V)], jnp.where(start == 0, 0, V)

    def _forward(self, step, blocks, carry):
        history, offset = self._begin(step, blocks)

        def group(index, history):
            rows = [index * GROUP + i for i in range(GROUP)]
            u = [_read(blocks, "y", offset + row) * _read(blocks, "gate_in", offset + row) for row in rows]
            gate_out = [_read(blocks, "gate_out", row) for row in rows]
            keep = self._documents(blocks, index * GROUP, GROUP)
            u = [*history, *u]
            z = [gate_out[i] * self._convolve(keep, i, u) for i in range(GROUP)]
            for row, z_C in zip(rows, z, strict=True):
                blocks["z"][row] = z_C.astype(self.cut.outs["z"].dtype)
            return u[GROUP:]

        lax.fori_loop(0, self.cut.R // GROUP, group, history)
        return carry

    def _backward(self, step, blocks, sums):
        V, (history, offset) = self.cut.V, self._begin(step, blocks)

        def group(index, carry):
            history, sums = carry
            rows = [index * GROUP + i for i in range(GROUP)]
            y = [_read(blocks, "y", offset + row) for row in rows]
            gate_in = [_read(blocks, "gate_in", offset + row) for row in rows]
            gate_out = [_read(blocks, "gate_out", index * GROUP + i) for i in range(GROUP + V)]
            dz = [_read(blocks, "dz", index * GROUP + i) for i in range(GROUP + V)]
            keep = self._documents(blocks, index * GROUP, GROUP + V)
            u = [*history, *(a_C * b_C for a_C, b_C in zip(y, gate_in, strict=True))]
            dc = [a_C * b_C for a_C, b_C in zip(gate_out, dz, strict=True)]
            results = []
            for i in range(GROUP):
                du_C: Any = sum(keep(i + j, j, self.taps[V - j] * dc[i + j]) for j in range(V + 1))
                results.append({"dy": gate_in[i] * du_C, "dgate_in": y[i] * du_C})
                if "dgate_out" in blocks:
                    results[i]["dgate_out"] = dz[i] * self._convolve(keep, i, u)
                terms = [keep(i, V - v, dc[i] * u[i + v]) for v in range(V + 1)]
                sums = [sum_C + term_C for sum_C, term_C in zip(sums, [*terms, dc[i]], strict=True)]
            for row, result in zip(rows, results, strict=True):
                for name in self.cut.streams:
                    blocks[name][row] = result[name].astype(self.cut.outs[name].dtype)
            return u[GROUP:], sums

        return lax.fori_loop(0, self.cut.R // GROUP, group, (history, sums))[1]


def _load(ref) -> Any:
    return plgpu.load(ref, layout=LAYOUT).astype(jnp.float32)


def _read(blocks, name, row) -> Any:
    """A row of a block; 1 where there is no such operand."""
    return _load(blocks[name].at[row]) if name in blocks else 1.0
