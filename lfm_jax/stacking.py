"""Repeated layers stacked: parameters as a training step with `ModelConfig.scan_layers` holds them.

A pattern is runs of a repeated unit (`config.repeated_units`). In a stacked tree the layers of a run that stand at the
same place of the unit share one entry of `blocks`, their arrays stacked along a new first axis; a run that is not
repeated stays as it is. LFM2-350M, `(c c a) x 3, (c a) x 3, (c) x 1`, has 6 entries instead of 16, and its optimizer
that many fewer arrays. Checkpoints hold trees unstacked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lfm_jax.config import Layer, ModelConfig, repeated_units


class RepeatedUnit(NamedTuple):
    """A run of repeated layers, by its entries in the stacked `blocks`."""

    first: int
    length: int
    """Layers of the unit, and entries."""
    repeats: int


def runs(config: ModelConfig) -> list[RepeatedUnit]:
    """The runs of a model's stacked form, first to last."""
    found, first = [], 0
    for unit, repeats in repeated_units(config.layers):
        found.append(RepeatedUnit(first, len(unit), repeats))
        first += len(unit)
    return found


def unit_layers(config: ModelConfig) -> tuple[Layer, ...]:
    """What each entry of the stacked `blocks` is made of."""
    return tuple(layer for unit, _ in repeated_units(config.layers) for layer in unit)


def stack_layers(tree: Any, config: ModelConfig, stack: Callable[..., Any] = lambda *x: jnp.stack(x)) -> Any:
    """A tree that holds dicts of parameters (such as an optimizer's state) with their layers stacked.

    Args:
      tree: any pytree whose parameter dicts have `blocks` by the number of the layer.
      stack: makes one leaf of those of a run, for leaves that are not arrays.
    """

    def params(node: dict[str, Any]) -> dict[str, Any]:
        blocks, layer = {}, 0
        for run in runs(config):
            for i in range(run.length):
                same = [node["blocks"][layer + i + run.length * r] for r in range(run.repeats)]
                blocks[run.first + i] = same[0] if run.repeats == 1 else jax.tree.map(stack, *same)
            layer += run.length * run.repeats
        return node | {"blocks": blocks}

    return _map_params(params, tree)


def unstack_layers(tree: Any, config: ModelConfig, pick: Callable[[Any, int], Any] = lambda x, i: x[i]) -> Any:
    """What `stack_layers` was given; `pick` takes one layer's leaf out of a stacked one."""

    def params(node: dict[str, Any]) -> dict[str, Any]:
        blocks, layer = {}, 0
        for run in runs(config):
            for i in range(run.length):
                entry = node["blocks"][run.first + i]
                for r in range(run.repeats):
                    one = entry if run.repeats == 1 else jax.tree.map(lambda x, r=r: pick(x, r), entry)
                    blocks[layer + i + run.length * r] = one
            layer += run.length * run.repeats
        return node | {"blocks": dict(sorted(blocks.items()))}

    return _map_params(params, tree)


def _map_params(f: Callable[[dict[str, Any]], dict[str, Any]], tree: Any) -> Any:
    def is_params(node: Any) -> bool:
        return isinstance(node, dict) and "blocks" in node

    return jax.tree.map(lambda node: f(node) if is_params(node) else node, tree, is_leaf=is_params)
