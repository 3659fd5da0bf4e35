"""Compares narrow weights, and keys and values in int8, with full precision on the device at hand.

    python experiments/narrow_steps.py [--forms int8 int4:32 w8a8] [--dtype float32] [--times 9]

First the error of a product of normally distributed inputs and weights: its root mean square over that of the product.
Then times: a step of decoding of the 350M shape with random weights at 1 to 16 rows after 256 tokens, a prompt of 256
tokens, and a step after 1,900 tokens with either kind of keys and values. What is compared runs in turns, in random
order, in one process; printed are medians of the first and ratios to them. Takes a few minutes and 5 GiB.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lfm_jax.config import ModelConfig
from lfm_jax.kernels.int8_slots import Int8Slots
from lfm_jax.kernels.linear import linear
from lfm_jax.layers import OUT_IN
from lfm_jax.model import abstract_model
from lfm_jax.quant.model import FORMS, narrowed, quantize_params
from lfm_jax.state import at_context, init_state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forms", nargs="+", choices=list(FORMS), default=["int8", "int4:32", "w8a8"])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--times", type=int, default=9)
    args = parser.parse_args()
    print_errors()
    config = ModelConfig.preset("lfm2.5-350m").replace(dtype=args.dtype, param_dtype=args.dtype)
    graphdef, shapes = abstract_model(config)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(0.02 * rng.standard_normal(x.shape, np.float32), x.dtype), shapes)
    trees = {args.dtype: params} | {form: quantize_params(copied(params), config, form) for form in args.forms}

    def step(params: Any, tokens_B1: jax.Array, state: Any) -> Any:
        logits_B1V, state = nnx.merge(graphdef, params)(tokens_B1, state=state, logits="last")
        return jnp.argmax(logits_B1V[:, 0], axis=-1), state

    def prompt(params: Any, tokens_BT: jax.Array) -> jax.Array:
        return nnx.merge(graphdef, params)(tokens_BT, logits="last")[0]

    for rows in (1, 2, 8, 16):
        state = at_context(init_state(config, rows, 320), 256)
        inputs = {name: (tree, jnp.ones((rows, 1), jnp.int32), state) for name, tree in trees.items()}
        compare(f"step of {rows} rows", step, inputs, args.times)
    inputs = {name: (tree, jnp.ones((1, 256), jnp.int32)) for name, tree in trees.items()}
    compare("prompt of 256 tokens", prompt, inputs, args.times)
    for rows in (1, 16):
        states = {kv: at_context(init_state(config, rows, 2048, int8_kv=kv == "int8 keys and values"), 1900)
                  for kv in (args.dtype, "int8 keys and values")}
        inputs = {kv: (params, jnp.ones((rows, 1), jnp.int32), state) for kv, state in states.items()}
        compare(f"step of {rows} rows after 1,900 tokens", step, inputs, args.times)


def print_errors() -> None:
    rng = np.random.default_rng(0)
    w_OI, x_MI = (jnp.asarray(rng.standard_normal((n, 1024)), jnp.float32) for n in (1024, 256))
    exact = linear(x_MI, w_OI)
    for form, (kind, group) in FORMS.items():
        error = linear(x_MI, narrowed(w_OI, OUT_IN, kind, group)[0]) - exact
        print(f"{form}: {100 * jnp.sqrt(jnp.mean(error**2) / jnp.mean(exact**2)):.1f} %")
    x_BSKH = jnp.asarray(rng.standard_normal((4, 64, 8, 64)), jnp.float32)
    error = Int8Slots.of(x_BSKH).astype("float32") - x_BSKH
    print(f"keys and values: {100 * jnp.sqrt(jnp.mean(error**2) / jnp.mean(x_BSKH**2)):.1f} %")


def copied(tree: Any) -> Any:
    return {key: copied(value) for key, value in tree.items()} if isinstance(tree, dict) else tree


def compare(what: str, fn: Callable[..., Any], inputs: Mapping[str, tuple[Any, ...]], times: int) -> None:
    programs = {name: jax.jit(fn).lower(*given).compile() for name, given in inputs.items()}
    taken: dict[str, list[float]] = {name: [] for name in programs}
    for n in range(times + 1):  # The first of each is not counted.
        for name in random.sample(list(programs), len(programs)):
            began = time.perf_counter()
            jax.block_until_ready(programs[name](*inputs[name]))
            if n:
                taken[name].append(time.perf_counter() - began)
    first, *others = ((name, statistics.median(seconds)) for name, seconds in taken.items())
    ratios = ", ".join(f"{name} {seconds / first[1]:.2f}" for name, seconds in others)
    print(f"{what}: {first[0]} {first[1] * 1e3:.0f} ms; {ratios}", flush=True)


if __name__ == "__main__":
    main()
