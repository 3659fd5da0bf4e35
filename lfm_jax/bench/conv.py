"""`lfm bench conv`: the implementations of the causal convolution beside one another.

Dimensions: B batch, T time, D channels, W taps.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from lfm_jax.bench.timing import conditions, interleave
from lfm_jax.kernels.causal_conv import causal_conv

IMPLS = ("lax", "shifted")


def bench_conv(*, repeats: int = 5, shapes: tuple[tuple[int, int, int, int], ...] = ((1, 256, 1024, 3),
               (1, 2048, 1024, 3), (4, 512, 1024, 3), (1, 512, 1024, 7))) -> str:
    """Forward, and forward with gradients, of each implementation in float32; a Markdown report."""
    lines = [
        f"{conditions('jax', 'jaxlib')}, {jax.default_backend()}; medians of {repeats}.\n",
        f"| B, T, D, W | pass | {' | '.join(IMPLS)} | lax / shifted |",
        "|---|---|" + "---|" * (len(IMPLS) + 1),
    ]
    for B, T, D, W in shapes:
        keys = jax.random.split(jax.random.key(0), 2)
        y_BTD, w_WD = jax.random.normal(keys[0], (B, T, D)), jax.random.normal(keys[1], (W, D))
        for name in ("forward", "forward + gradient"):
            tasks = [_task(impl, name, y_BTD, w_WD) for impl in IMPLS]
            times = interleave(tasks, repeats)
            cells = " | ".join(f"{t * 1e3:.2f} ms" for t in times)
            lines.append(f"| {B}, {T}, {D}, {W} | {name} | {cells} | {times[0] / times[1]:.0f}x |")
    return "\n".join(lines)


def _task(impl: str, name: str, y_BTD: jax.Array, w_WD: jax.Array) -> Callable[[], object]:
    conv = partial(causal_conv, impl=impl)
    if name == "forward":
        call = jax.jit(conv)
    else:
        call = jax.jit(jax.value_and_grad(lambda y, w: jnp.sum(jnp.sin(conv(y, w))), argnums=(0, 1)))
    return lambda: jax.block_until_ready(call(y_BTD, w_WD))
