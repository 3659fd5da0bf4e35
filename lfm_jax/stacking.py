"""Stacks the parameters of repeated layers, for training steps with `ModelConfig.scan_layers`.

A pattern consists of runs of a repeated unit (`config.repeated_units`). In a stacked tree the layers of a run at the
same position of the unit share one entry of `blocks`, with their arrays stacked along a new first axis; a run that is
not repeated stays as it is. LFM2-350M, `(c c a) x 3, (c a) x 3, (c) x 1`, has 6 entries instead of 16, and its
optimizer has fewer arrays in proportion. Trees in checkpoints are not stacked.
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
    """The number of layers of the unit, which is that of its entries."""
    repeats: int


def runs(config: ModelConfig) -> list[RepeatedUnit]:
    """Returns the runs of a model's stacked form, first to last."""
    found, first = [], 0
    for unit, repeats in repeated_units(config.layers):
        found.append(RepeatedUnit(first, len(unit), repeats))
        first += len(unit)
    return found


def unit_layers(config: ModelConfig) -> tuple[Layer, ...]:
    """Returns the kinds of each entry of the stacked `blocks`."""
    return tuple(layer for unit, _ in repeated_units(config.layers) for layer in unit)


def stack_layers(tree: Any, config: ModelConfig, stack: Callable[..., Any] = lambda *x: jnp.stack(x)) -> Any:
    """Stacks the layers in all dicts of parameters of a tree, such as an optimizer's state.

    Args:
      tree: any pytree whose parameter dicts have `blocks` by the number of the layer. Layers may be missing, all that
        share an entry together: those without a trained weight, or without a frozen one.
      stack: makes one leaf of those of a run, for leaves that are not arrays.
    """

    def stacked(blocks: dict[int, Any]) -> dict[int, Any]:
        return {
            entry: blocks[layers[0]] if len(layers) == 1 else jax.tree.map(stack, *(blocks[i] for i in layers))
            for entry, layers in enumerate(sharing(config)) if layers[0] in blocks
        }

    return _map_blocks(stacked, tree)


def unstack_layers(tree: Any, config: ModelConfig, pick: Callable[[Any, int], Any] = lambda x, i: x[i]) -> Any:
    """Inverts `stack_layers`; `pick` takes the leaf of one layer from a stacked leaf."""

    def unstacked(blocks: dict[int, Any]) -> dict[int, Any]:
        found = {
            i: blocks[entry] if len(layers) == 1 else jax.tree.map(lambda x, r=r: pick(x, r), blocks[entry])
            for entry, layers in enumerate(sharing(config)) if entry in blocks
            for r, i in enumerate(layers)
        }
        return dict(sorted(found.items()))

    return _map_blocks(unstacked, tree)


def sharing(config: ModelConfig) -> list[range]:
    """The layers that share each entry of the stacked `blocks`."""
    found, first = [], 0
    for unit, repeats in repeated_units(config.layers):
        stop = first + len(unit) * repeats
        found += [range(first + i, stop, len(unit)) for i in range(len(unit))]
        first = stop
    return found


def _map_blocks(f: Callable[[dict[int, Any]], dict[int, Any]], tree: Any) -> Any:
    def is_params(node: Any) -> bool:
        return isinstance(node, dict) and "blocks" in node

    return jax.tree.map(
        lambda node: node | {"blocks": f(node["blocks"])} if is_params(node) else node, tree, is_leaf=is_params
    )
