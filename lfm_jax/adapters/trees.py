"""Adapters as trees: made, put on a model's weights, merged into them, counted.

An adapter is a tree of nested dicts like a model's weights, with `{"a": [R, *I], "b": [*O, R]}` in the place of each
matrix that it adapts, float32.

Dimensions: B rows of a batch, I inputs, O outputs (each perhaps several axes), R rank.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lfm_jax.adapters.config import LoRAConfig
from lfm_jax.adapters.targets import Target, target_tree
from lfm_jax.adapters.weights import Adapted
from lfm_jax.config import ModelConfig
from lfm_jax.layers import Traits
from lfm_jax.model import abstract_model
from lfm_jax.sharding import reshard, spec
from lfm_jax.stacking import stack_layers
from lfm_jax.weight_kinds import WeightKind

Tree = dict[Any, Any]


def init_adapter(config: ModelConfig, lora: LoRAConfig, key: jax.Array, *, stacked: bool = False) -> Tree:
    """Makes an adapter that changes nothing yet: A uniform in +-1 / sqrt(inputs), as PEFT's, and B zero.

    Args:
      stacked: as a step holds it with `scan_layers`; the numbers are the same.

    Raises:
      ValueError: the targets do not fit the model (`targets.target_tree`).
    """
    if not lora.rank:
        raise ValueError("lora.rank is 0, which is no adapter; it must be at least 1")
    _, weights = abstract_model(config)

    def make(target: Target, w: jax.ShapeDtypeStruct) -> Tree:
        inputs = _inputs(target)
        into, out = w.shape[w.ndim - inputs :], w.shape[: w.ndim - inputs]
        bound = float(np.prod(into)) ** -0.5
        a_RI = jax.random.uniform(
            jax.random.fold_in(key, target.numbers[0]), (target.rank, *into), jnp.float32, -bound, bound)
        return {"a": a_RI, "b": jnp.zeros((*out, target.rank), jnp.float32)}

    made = _map(make, target_tree(config, lora), weights)
    if not stacked:
        return _laid_out(made, adapter_traits(config, lora))
    traits = adapter_traits(config, lora, stacked=True)  # First: layers may not go together.
    return _laid_out(stack_layers(made, config), traits)


def _laid_out(adapter: Tree, traits: Tree) -> Tree:
    """The adapter as it lies over the mesh in use."""
    def leaf(x: jax.Array, known: Traits) -> jax.Array:
        layout = spec(*known.axes)
        return x if layout is None else reshard(x, layout)

    return jax.tree.map(leaf, adapter, traits)


def adapter_traits(config: ModelConfig, lora: LoRAConfig, *, stacked: bool = False) -> Tree:
    """Returns the `layers.Traits` of each array of an adapter: they decay as matrices do, and are AdamW's."""

    def of(target: Target) -> Tree:
        axes, inputs = target.traits.axes, _inputs(target)
        lead, names = ((None,), axes[1:]) if stacked and len(target.numbers) > 1 else ((), axes)
        into, out = names[len(names) - inputs :], names[: len(names) - inputs]
        return {"a": Traits((*lead, None, *into), True, None), "b": Traits((*lead, *out, None), True, None)}

    return _map(of, target_tree(config, lora, stacked=stacked))


def num_adapter_params(config: ModelConfig, lora: LoRAConfig) -> int:
    """Returns the number of parameters of an adapter."""
    made = jax.eval_shape(lambda: init_adapter(config, lora, jax.random.key(0)))
    return sum(x.size for x in jax.tree.leaves(made))


def adapt(
    config: ModelConfig, lora: LoRAConfig, weights: Tree, adapter: Tree, *, key: jax.Array | None = None,
    stacked: bool = False,
) -> Tree:
    """Puts an adapter on weights; returns a tree with `Adapted` in the place of each matrix that it adapts.

    Args:
      weights: arrays, narrow or not; they are not copied.
      adapter: of these targets, or of some of them.
      key: of the inputs that `lora.dropout` drops; None drops none.
      stacked: whether both are stacked (`scan_layers`).
    """
    key = key if lora.dropout else None

    def put(target: Target, w: Any, ab: Tree) -> Adapted:
        keys = None
        if key is not None:
            keys = jnp.stack([jax.random.fold_in(key, number) for number in target.numbers])
            keys = keys if stacked and len(target.numbers) > 1 else keys[0]
        return Adapted(w, ab["a"], ab["b"], target.scale, lora.dropout, keys)

    return _replaced(weights, adapter, target_tree(config, lora, stacked=stacked), put)


def merge(config: ModelConfig, lora: LoRAConfig, weights: Tree, adapter: Tree) -> Tree:
    """Adds an adapter to weights, in float32; returns plain arrays in their dtypes, where it adapts them.

    Narrow weights become arrays. Trees are not stacked.
    """

    def put(target: Target, w: Any, ab: Tree) -> jax.Array:
        base = w if isinstance(w, WeightKind) else jnp.asarray(w)
        return Adapted(base, jnp.asarray(ab["a"]), jnp.asarray(ab["b"]), target.scale).astype(w.dtype)

    return _replaced(weights, adapter, target_tree(config, lora), put)


def adapt_rows(
    config: ModelConfig, weights: Tree, adapters: Sequence[tuple[LoRAConfig, Tree]], row_ids_B: jax.Array
) -> Tree:
    """Puts several adapters on weights, of which each row of a batch has one or none.

    Args:
      adapters: adapter number 1, number 2, ...; they may differ in targets and ranks.
      row_ids_B: int32, the number of each row's adapter; 0 or less for none.

    Returns:
      The tree of weights; `for_rows` changes its row_ids_B.
    """
    trees = [(_map(lambda target, ab: (target, ab), _like(target_tree(config, lora), adapter), adapter))
             for lora, adapter in adapters]

    def walk(w: Any, parts: list[tuple[int, Any]]) -> Any:
        if not parts:
            return w
        if isinstance(w, dict):
            return {name: walk(value, [(i, part[name]) for i, part in parts if name in part])
                    for name, value in w.items()}
        a_RI = jnp.concatenate([ab["a"] for _, (_, ab) in parts])
        b_OR = jnp.concatenate([target.scale * ab["b"] for _, (target, ab) in parts], axis=-1)
        owner_R = jnp.concatenate([jnp.full((len(ab["a"]),), i, jnp.int32) for i, (_, ab) in parts])
        return Adapted(w, a_RI, b_OR, owner_R=owner_R, row_ids_B=row_ids_B)

    return walk(weights, list(enumerate(trees, 1)))


def for_rows(weights: Tree, row_ids_B: jax.Array) -> Tree:
    """Returns the weights of `adapt_rows` for other rows."""
    def of(w: Any) -> Any:
        several = isinstance(w, Adapted) and w.row_ids_B is not None
        return dataclasses.replace(w, row_ids_B=row_ids_B) if several else w

    return jax.tree.map(of, weights, is_leaf=lambda w: isinstance(w, WeightKind))


def taken(weights: Tree) -> Tree:
    """Returns the adapter that `adapt` put on weights."""
    found: Tree = {}
    for key, w in weights.items():
        part = taken(w) if isinstance(w, dict) else {"a": w.a_RI, "b": w.b_OR} if isinstance(w, Adapted) else {}
        if part:
            found[key] = part
    return found


def digest(weights: Any) -> str:
    """Returns a hash of the names, shapes, dtypes and numbers of a tree of whole arrays."""
    found = hashlib.sha256()
    for path, w in jax.tree.leaves_with_path(weights):
        array = np.ascontiguousarray(w)
        found.update(f"{jax.tree_util.keystr(path)} {array.dtype.name}{array.shape}\n".encode())
        found.update(array.reshape(-1).view(np.uint8).data)
    return found.hexdigest()


def _inputs(target: Target) -> int:
    assert target.traits.matrix is not None  # Else it were no target.
    return len(target.traits.matrix.inputs)


def _map(f: Any, targets: Any, *trees: Any) -> Any:
    """`f` of each target and what the other trees have in its place."""
    if isinstance(targets, Target):
        return f(targets, *trees)
    return {key: _map(f, value, *(tree[key] for tree in trees)) for key, value in targets.items()}


def _like(targets: Any, adapter: Any) -> Any:
    """The targets that the adapter has."""
    if isinstance(targets, Target):
        return targets
    return {key: _like(targets[key], value) for key, value in adapter.items()}


def _replaced(weights: Tree, adapter: Tree, targets: Any, put: Any) -> Any:
    """The weights with `put(target, weight, {"a", "b"})` in the place of what the adapter has."""
    if isinstance(targets, Target):
        return put(targets, weights, adapter)
    return {key: _replaced(w, adapter[key], targets[key], put) if key in adapter else w for key, w in weights.items()}
