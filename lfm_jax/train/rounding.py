"""Training that knows how its weights will be rounded (`ModelConfig.quantize`): every step computes with the weights as
a file of that type holds them, or `lfm.quantize` makes them, and the gradient goes to the weights themselves.

Types of GGUF files round each tensor as `quant.mix` says; the names of tensors, and the layouts in which their rows
make blocks, are those of the file (`convert.gguf.archs`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec as P

from lfm_jax.config import ModelConfig
from lfm_jax.convert.gguf.archs import arch_of
from lfm_jax.convert.weights import Group, LeafPath, groups, leaf
from lfm_jax.layers import Matrix
from lfm_jax.model import param_traits
from lfm_jax.quant.mixes import MIXES, mix
from lfm_jax.quant.model import FORMS, keeper, narrow_matrix, narrowed
from lfm_jax.quant.rounding import ON_DEVICE, passed_through, straight_through
from lfm_jax.sharding import is_sharded, reshard, spec_of
from lfm_jax.stacking import stack_layers, unstack_layers

NARROW = {form: parts for form, parts in FORMS.items() if parts[0] != "w8a8"}  # That rounds activations too.


class _Rule(NamedTuple):
    """What is rounded together: a tensor of a file, or one weight."""

    paths: tuple[LeafPath, ...]
    round: Callable[[list[Any]], list[Any]]


def problems(config: ModelConfig) -> list[str]:
    """Returns why a model cannot be trained with its `quantize`."""
    name = config.quantize
    if name in NARROW:
        try:
            keeper(config, name)
        except ValueError as error:
            return [f"model.quantize: {error}"]
        return []
    if name in MIXES:
        found = [f"model.quantize {name}: {why}" for why in arch_of(config)[1]]
        if config.param_dtype != "float32":
            found.append(f"model.param_dtype is {config.param_dtype}, which does not hold numbers of {name}; set it to "
                         "float32 (model.dtype may be narrower)")
        return found
    if not name:
        return []
    return [f"model.quantize is {name!r}; choose one of {', '.join([*MIXES, *NARROW])}"]


def rounded_weights(config: ModelConfig, weights: Any) -> Any:
    """Rounds a tree of weights by `config.quantize`; its derivative is that of no rounding.

    Args:
      weights: as a step holds them (stacked if `config.scan_layers`), over a mesh or not.
    """
    if not config.quantize:
        return weights
    tree = unstack_layers(weights, config) if config.scan_layers else weights
    made: dict[LeafPath, jax.Array] = {}
    for rule in _rules(config):
        given: list[Any] = [leaf(tree, path) for path in rule.paths]
        # Rows that are split have no whole blocks.
        found = rule.round([reshard(w, P()) for w in given])
        made |= {path: reshard(new, spec_of(old)) if is_sharded(old) else new
                 for path, old, new in zip(rule.paths, given, found, strict=True)}
    tree = _replaced(tree, made)
    return stack_layers(tree, config) if config.scan_layers else tree


def is_fixed(config: ModelConfig) -> bool:
    """Whether rounding rounded weights again leaves them as they are."""
    return config.quantize not in MIXES or set(_types(config).values()) <= {*ON_DEVICE}


@functools.cache
def _rules(config: ModelConfig) -> list[_Rule]:
    if config.quantize not in MIXES:
        return [_Rule((path,), functools.partial(_narrowed, matrix, *NARROW[config.quantize]))
                for path, matrix in _matrices(config).items() if matrix is not None]
    types = _types(config)
    return [_Rule(group.paths, functools.partial(_as_tensors, group, types[group.names[0]]))
            for group in groups(arch_of(config)[0].weights, config) if types[group.names[0]] != "F32"]


@functools.cache
def _types(config: ModelConfig) -> dict[str, str]:
    arch, _ = arch_of(config)
    shapes = {name: group.tensor.shape for group in groups(arch.weights, config) for name in group.names}
    return mix(config.quantize, shapes, arch=arch.name)


def _as_tensors(group: Group, type: str, leaves: list[Any]) -> list[Any]:
    tensors: list[Any] = group.to_tensors(leaves)  # Layouts are for arrays of either library.
    rounded: list[Any] = [straight_through(x, type) for x in tensors]
    return group.to_leaves(rounded)


def _matrices(config: ModelConfig) -> dict[LeafPath, Matrix | None]:
    traits = jax.tree.leaves_with_path(param_traits(config))
    return {tuple(entry.key for entry in path): narrow_matrix(found) for path, found in traits}


def _narrowed(matrix: Matrix, kind: str, group: int | None, leaves: list[jax.Array]) -> list[jax.Array]:
    return [passed_through(w, narrowed(jax.lax.stop_gradient(w), matrix, kind, group)[0].astype(w.dtype))
            for w in leaves]


def _replaced(tree: Mapping[Any, Any], made: Mapping[LeafPath, jax.Array], at: LeafPath = ()) -> dict[Any, Any]:
    return {key: _replaced(value, made, (*at, key)) if isinstance(value, Mapping) else made.get((*at, key), value)
            for key, value in tree.items()}
