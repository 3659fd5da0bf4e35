"""`lfm bench kernels`: the implementations of a kernel beside one another, which is how defaults are chosen.

Dimensions: B batch, T time, D channels, W taps, M rows, I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from lfm_jax.bench.timing import conditions, interleave
from lfm_jax.kernels.causal_conv import causal_conv
from lfm_jax.kernels.linear import linear

CONV_SHAPES = ((1, 256, 1024, 3), (1, 2048, 1024, 3), (4, 512, 1024, 3), (1, 512, 1024, 7))
LINEAR_ROWS = (1, 2, 8, 16, 64, 256, 512)
LINEAR_WEIGHTS = 12
"""Weight matrices of 4608 x 1024 that a timed call goes through: more bytes than a cache holds."""


def bench_kernels(*, repeats: int = 5) -> str:
    """Times every implementation in float32 on the default device; a Markdown report."""
    head = f"{conditions('jax', 'jaxlib')}, {jax.default_backend()}; float32, medians of {repeats}."
    return "\n\n".join([head, _conv_table(repeats), _linear_table(repeats)])


def _conv_table(repeats: int) -> str:
    impls = ("lax", "shifted")
    lines = [f"| causal_conv: B, T, D, W | pass | {' | '.join(impls)} | lax / shifted |", "|---|---|---|---|---|"]
    for B, T, D, W in CONV_SHAPES:
        keys = jax.random.split(jax.random.key(0), 2)
        y_BTD, w_WD = jax.random.normal(keys[0], (B, T, D)), jax.random.normal(keys[1], (W, D))
        for name in ("forward", "forward + gradient"):
            times = interleave([_conv_task(impl, name, y_BTD, w_WD) for impl in impls], repeats)
            cells = " | ".join(f"{t * 1e3:.2f} ms" for t in times)
            lines.append(f"| {B}, {T}, {D}, {W} | {name} | {cells} | {times[0] / times[1]:.0f}x |")
    return "\n".join(lines)


def _conv_task(impl: str, name: str, y_BTD: jax.Array, w_WD: jax.Array) -> Callable[[], object]:
    conv = partial(causal_conv, impl=impl)
    if name == "forward":
        call = jax.jit(conv)
    else:
        call = jax.jit(jax.value_and_grad(lambda y, w: jnp.sum(jnp.sin(conv(y, w))), argnums=(0, 1)))
    return lambda: jax.block_until_ready(call(y_BTD, w_WD))


def _linear_table(repeats: int) -> str:
    impls = ("dot", "left")
    inputs, outputs = 1024, 4608
    keys = jax.random.split(jax.random.key(0), LINEAR_WEIGHTS)
    weights = [jax.random.normal(key, (outputs, inputs)) for key in keys]
    lines = [f"| linear: M rows, {inputs} -> {outputs} | {' | '.join(impls)} | dot / left | left, GB/s of weights |",
             "|---|---|---|---|---|"]
    for M in LINEAR_ROWS:
        x_MI = jax.random.normal(jax.random.key(1), (M, inputs))
        times = interleave([_linear_task(impl, x_MI, weights) for impl in impls], repeats)
        times = [t / LINEAR_WEIGHTS for t in times]
        cells = " | ".join(f"{t * 1e3:.2f} ms" for t in times)
        lines.append(f"| {M} | {cells} | {times[0] / times[1]:.2f}x | {4e-9 * inputs * outputs / times[1]:.1f} |")
    return "\n".join(lines)


def _linear_task(impl: str, x_MI: jax.Array, weights: list[jax.Array]) -> Callable[[], object]:
    @jax.jit
    def call(x_MI: jax.Array, weights: list[jax.Array]) -> jax.Array:
        for w_OI in weights:  # Each product waits for the one before, as layers do.
            x_MI = jnp.tanh(linear(x_MI, w_OI, impl=impl))[:, : x_MI.shape[1]]
        return x_MI

    return lambda: call(x_MI, weights).block_until_ready()
