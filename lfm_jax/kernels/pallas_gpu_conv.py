"""Gated causal convolution for Hopper GPUs, forward and backward in one kernel each. Not yet run on a GPU.

No step waits for another one, so time is cut over programs as well as batch and channels, CHUNKS chunks to a program.
Each long operand crosses device memory once: the V rows that a chunk reads beyond its own come from L2, where its
neighbour left them. By ptxas' schedule a row of 128 channels (W = 3, both gates, bfloat16) takes 40 cycles forward and
60 backward; an H200's memory, at 4.3 TB/s, brings one every 55 and 98 cycles to each SM.

Dimensions: B batch, T time, D channels, W taps, V = W - 1 columns of history, C channels of a program, R rows of a
chunk, X = W + 1 sums (taps and bias), K chunks, L tokens of reach that go with a chunk.
"""

from __future__ import annotations

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
    y_BTD, w_WD, tail_BVD, reach_BT, gate_in_BTD, gate_out_BTD, bias_D = inputs
    (B, T, D), V = y_BTD.shape, w_WD.shape[0] - 1
    gradient = dz_BTD is not None
    long = {"y": y_BTD, "gate_in": gate_in_BTD, "gate_out": gate_out_BTD, "dz": dz_BTD}
    long = {name: pad(x, 8) for name, x in long.items() if x is not None}
    C, R = CHANNELS, COLUMN_BYTES // max(x.dtype.itemsize for x in long.values())
    chunks = pl.cdiv(T, R)
    parts, tiles = pl.cdiv(chunks, CHUNKS), pl.cdiv(D, C)
    steps = pl.cdiv(chunks, parts)

    short = {"w": pad(w_WD.astype(jnp.float32), C)}
    if V:
        short["tail"] = pad(tail_BVD.astype(jnp.float32), C)
    if bias_D is not None:
        short["bias"] = pad(bias_D.astype(jnp.float32), C)
    L = pl.cdiv(R + V, 32) * 32
    if V and reach_BT is not None:
        token_KL = R * jnp.arange(parts * steps)[:, None] + jnp.arange(L)
        short["reach"] = jnp.take(reach_BT, token_KL, axis=1, mode="fill", fill_value=0)

    if gradient:
        outs = {f"d{name}": jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in long.items() if name != "dz"}
        outs["sums"] = jax.ShapeDtypeStruct((B, parts, V + 2, tiles * C), jnp.float32)
    else:
        outs = {"z": jax.ShapeDtypeStruct(long["y"].shape, y_BTD.dtype)}
    streams = [name for name in outs if name != "sums"]

    # Mosaic would find this layout, the only one that fits, by itself; told, it lowers the gradient many times faster.
    layout = plgpu.Layout.WG_STRIDED((C,), vec_size=1)

    def program(place, refs):
        batch, part, tile = place
        channels = pl.ds(tile * C, C)

        def load(ref):
            return plgpu.load(ref, layout=layout).astype(jnp.float32)

        taps = [load(refs["w"].at[v, channels]) for v in range(V + 1)]
        tail = [load(refs["tail"].at[batch, v, channels]) for v in range(V)]
        bias_C = 0.0 if bias_D is None else load(refs["bias"].at[channels])

        def start(step):
            return (part * steps + step) * R

        def window(name, first, rows):
            return Window(refs[name], (rows, C), lambda step: (batch, pl.ds(first(step), rows), channels))

        def read(blocks, name, row) -> Any:
            return load(blocks[name].at[row]) if name in blocks else 1.0

        def documents(blocks, first, rows):
            """keep(i, j, term): what tap j gives to row first + i, nothing if it reaches into another document."""
            if "reach" not in blocks:
                return lambda i, j, term_C: term_C
            reach = [plgpu.layout_cast(jnp.full((C,), blocks["reach"][first + i]), layout) for i in range(rows)]
            inside = [[reach_C >= j for j in range(V + 1)] for reach_C in reach]
            return lambda i, j, term_C: jnp.where(inside[i][j], term_C, 0.0) if j else term_C

        def convolve(keep, i, u) -> Any:
            """c of row i of a group; u begins V rows before the group."""
            return sum((keep(i, j, taps[V - j] * u[V + i - j]) for j in range(V + 1)), start=bias_C)

        def begin(step, blocks):
            """(u of the V rows before the chunk; where in the blocks of y and gate_in its own rows begin)."""
            u = [read(blocks, "y", v) * read(blocks, "gate_in", v) for v in range(V)]
            first_C = jnp.full((C,), start(step)) == 0  # Nothing before it: its blocks begin with itself.
            return [jnp.where(first_C, tail[v], u[v]) for v in range(V)], jnp.where(start(step) == 0, 0, V)

        def forward(step, blocks, carry):
            history, offset = begin(step, blocks)

            def group(index, history):
                rows = [index * GROUP + i for i in range(GROUP)]
                u = [read(blocks, "y", offset + row) * read(blocks, "gate_in", offset + row) for row in rows]
                gate_out = [read(blocks, "gate_out", row) for row in rows]
                keep = documents(blocks, index * GROUP, GROUP)
                u = [*history, *u]
                z = [gate_out[i] * convolve(keep, i, u) for i in range(GROUP)]
                for row, z_C in zip(rows, z, strict=True):
                    blocks["z"][row] = z_C.astype(y_BTD.dtype)
                return u[GROUP:]

            lax.fori_loop(0, R // GROUP, group, history)
            return carry

        def backward(step, blocks, sums):
            history, offset = begin(step, blocks)

            def group(index, carry):
                history, sums = carry
                rows = [index * GROUP + i for i in range(GROUP)]
                y = [read(blocks, "y", offset + row) for row in rows]
                gate_in = [read(blocks, "gate_in", offset + row) for row in rows]
                gate_out = [read(blocks, "gate_out", index * GROUP + i) for i in range(GROUP + V)]
                dz = [read(blocks, "dz", index * GROUP + i) for i in range(GROUP + V)]
                keep = documents(blocks, index * GROUP, GROUP + V)
                u = [*history, *(a_C * b_C for a_C, b_C in zip(y, gate_in, strict=True))]
                dc = [a_C * b_C for a_C, b_C in zip(gate_out, dz, strict=True)]
                results = []
                for i in range(GROUP):
                    du_C: Any = sum(keep(i + j, j, taps[V - j] * dc[i + j]) for j in range(V + 1))
                    results.append({"dy": gate_in[i] * du_C, "dgate_in": y[i] * du_C})
                    if "dgate_out" in blocks:
                        results[i]["dgate_out"] = dz[i] * convolve(keep, i, u)
                    terms = [keep(i, V - v, dc[i] * u[i + v]) for v in range(V + 1)]
                    sums = [sum_C + term_C for sum_C, term_C in zip(sums, [*terms, dc[i]], strict=True)]
                for row, result in zip(rows, results, strict=True):
                    for name in streams:
                        blocks[name][row] = result[name].astype(outs[name].dtype)
                return u[GROUP:], sums

            return lax.fori_loop(0, R // GROUP, group, (history, sums))[1]

        def before(step):
            return jnp.maximum(start(step) - V, 0)

        behind = V if gradient else 0
        rows = {"y": (before, R + V), "gate_in": (before, R + V), "gate_out": (start, R + behind), "dz": (start, R + V)}
        ins = {name: window(name, *rows[name]) for name in long}
        if "reach" in short:
            ins["reach"] = Window(refs["reach"], (L,), lambda step: (batch, part * steps + step, pl.ds(0, L)))
        zero_C = plgpu.layout_cast(jnp.zeros((C,), jnp.float32), layout)
        body = backward if gradient else forward
        out_windows = {name: window(name, start, R) for name in streams}
        sums = stream(body, [zero_C] * (V + 2) if gradient else [], steps, slots=SLOTS, ins=ins, outs=out_windows)
        for x, sum_C in enumerate(sums):
            refs["sums"][batch, part, x, channels] = sum_C

    name = "gated_conv_gradient" if gradient else "gated_conv"
    results = launch(program, name, (B, parts, tiles), long | short, outs, interpret)
    return {name: x if name == "sums" else x[..., :D] for name, x in results.items()}
