"""Which matrices of a model get an adapter: names of `transformers`' modules, and paths of our weights."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax

from lfm_jax.adapters.config import LIQUID, LoRAConfig
from lfm_jax.config import ModelConfig
from lfm_jax.convert.families import families_of
from lfm_jax.convert.weights import LeafPath, groups
from lfm_jax.layers import Traits
from lfm_jax.model import param_traits
from lfm_jax.problems import raise_problems
from lfm_jax.stacking import stack_layers


@dataclasses.dataclass(frozen=True)
class Target:
    """A matrix with an adapter, or those of some stacked layers. It is a leaf of trees."""

    rank: int
    scale: float
    traits: Traits
    """Those of the matrix."""
    numbers: tuple[int, ...]
    """Its number among all targets, from which its random numbers follow; of stacked layers one for each."""


class Modules(NamedTuple):
    """What of a model can be named."""

    dense: dict[str, LeafPath]
    """Matrices between activations, by their names in `transformers`, or our own where no model there is like it."""
    experts: frozenset[str]
    """Names of what holds the matrices of experts, which have no adapters."""


def modules(config: ModelConfig) -> Modules:
    """Returns what of a model can be named by targets."""
    traits = _traits(config)
    family = next(iter(families_of(config)), None)
    tables = [] if family is None else [groups(family.in_memory, config), groups(family.weights, config)]
    dense = {group.names[0].removesuffix(".weight"): group.paths[0] for group in (tables[0] if tables else [])
             if len(group.paths) == 1 and _is_dense(traits[group.paths[0]])}
    if not tables:
        dense = {_dotted(path): path for path, found in traits.items() if _is_dense(found)}
    experts = {_dotted(path) for path, found in traits.items() if "experts" in found.axes}
    experts |= {name.removesuffix(".weight") for table in tables for group in table for name in group.names
                if "experts" in traits[group.paths[0]].axes}
    return Modules(dense, frozenset(experts))


def ends_with(name: str, target: str) -> bool:
    """Whether a target names a module, as PEFT has it: its whole name, or its end from a dot on."""
    return name == target or name.endswith(f".{target}")


def named_targets(config: ModelConfig, lora: LoRAConfig) -> dict[str, LeafPath]:
    """Returns the matrices that have an adapter, by their names in `transformers`, in the order of a file.

    Raises:
      ValueError: targets that name nothing, or experts; the message lists them all, and what there is.
    """
    found = modules(config)

    def named_by(target: str) -> set[str]:
        return {name for name, path in found.dense.items()
                if ends_with(name, target) or ends_with(_dotted(path), target)}

    problems, chosen = [], set()
    some = lora.targets == LIQUID and any(map(named_by, LIQUID))
    for target in lora.targets:
        named = named_by(target)
        chosen |= named
        if named or some:
            continue
        if any(ends_with(name, target) or f".{target}." in f".{name}." for name in found.experts):
            problems.append(f"{target!r} names matrices of experts, which have no adapters; leave it out")
        else:
            problems.append(f"{target!r} names no matrix of the model")
    there = sorted({name.rpartition(".")[2] for name in found.dense})
    raise_problems(f"lora.targets do not fit the model; there are {', '.join(there)}, and longer ends of names such as "
                   f"{next(reversed(found.dense), 'none')}", problems)
    return {name: path for name, path in found.dense.items() if name in chosen}


def target_tree(config: ModelConfig, lora: LoRAConfig, *, stacked: bool = False) -> Any:
    """Returns nested dicts with a `Target` at each matrix that has an adapter; as a step holds them if `stacked`.

    Raises:
      ValueError: as `named_targets`, or layers that are stacked together would have different adapters.
    """
    traits = _traits(config)
    tree: dict[Any, Any] = {}
    for number, (name, path) in enumerate(named_targets(config, lora).items()):
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = Target(lora.rank_of(name), lora.scale_of(name), traits[path], (number,))
    if not stacked:
        return tree
    full = jax.tree.map(lambda _: False, param_traits(config))  # So that layers differ in their leaves alone.
    return _pruned(stack_layers(_over(full, tree), config, _together))


def _together(*layers: Target | bool) -> Target | bool:
    kinds = {(layer.rank, layer.scale) if isinstance(layer, Target) else layer for layer in layers}
    if len(kinds) > 1:
        raise ValueError("lora treats layers differently that model.scan_layers stacks; name whole kinds of modules in "
                         "targets and patterns, or set model.scan_layers to false")
    targets = [layer for layer in layers if isinstance(layer, Target)]
    if not targets:
        return False
    traits = dataclasses.replace(targets[0].traits, axes=(None, *targets[0].traits.axes))
    numbers = tuple(number for target in targets for number in target.numbers)
    return dataclasses.replace(targets[0], traits=traits, numbers=numbers)


def _over(full: Any, tree: Any) -> Any:
    if not isinstance(full, dict):
        return tree
    return {key: _over(value, tree[key]) if key in tree else value for key, value in full.items()}


def _pruned(tree: Any) -> Any:
    kept = {key: _pruned(value) if isinstance(value, dict) else value for key, value in tree.items()}
    return {key: value for key, value in kept.items() if value not in (False, {})}


def _traits(config: ModelConfig) -> dict[LeafPath, Traits]:
    found = jax.tree.leaves_with_path(param_traits(config))
    return {tuple(entry.key for entry in path): traits for path, traits in found}


def _is_dense(traits: Traits) -> bool:
    return traits.matrix is not None and "experts" not in traits.axes


def _dotted(path: LeafPath) -> str:
    return ".".join(map(str, path))
