"""How many kernels one step of decoding is, read from the program that the engine runs."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from lfm_jax.engine.config import EngineConfig
from lfm_jax.engine.placement import joined_weights, joins
from lfm_jax.engine.slots import programs, slot_shapes
from lfm_jax.engine.variants import Variant, lower
from lfm_jax.model import LFM
from lfm_jax.plan.hlo import Module

FREE = frozenset({"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "optimization-barrier",
                  "opt-barrier"})
"""Opcodes that run nothing."""


def decode_kernels(model: LFM, *, rows: int = 1, length: int = 1024, **changes: Any) -> int:
    """Counts the operations of one greedy step of the engine, compiled for the default device: fusions, products,
    copies and calls of the loop over steps. A loop within a step counts once, and a conditional with all of its
    branches. On a GPU nearly each of them is a launch.

    Args:
      rows: slots, all of which are in the dispatch.
      length: tokens of a slot.
      changes: other fields of `EngineConfig`, such as joined.
    """
    config = EngineConfig(slots=((rows, length),), **changes)
    [shape] = slot_shapes(config, model.config)
    graphdef, state = nnx.split(model, nnx.Param)
    params = nnx.to_pure_dict(state)
    if config.joined:
        params = joined_weights(params, joins(model))
    variant = Variant("decode", rows, plain=True)
    lowered = lower(programs(graphdef, shape), variant, params, jax.eval_shape(shape.init), shape)
    return kernels_of_loop(lowered.compile().as_text() or "")


def kernels_of_loop(text: str) -> int:
    """Counts what runs in one turn of the largest loop of an optimised HLO module."""
    module = Module(text)
    loops = [i for computation in module.computations.values() for i in computation.values() if i.opcode == "while"]
    bodies = [body for loop in loops if (body := loop.called("body"))]
    return max(sum(i.opcode not in FREE for _, i, _ in module.walk(body, 1.0)) for body in bodies)
