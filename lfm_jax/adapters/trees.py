"""Adapters as trees: made, put on a model's weights, merged into them, counted.

An adapter is a tree of nested dicts like a model's weights, with `{"a": [R, *I], "b": [*O, R]}` in the place of each
matrix that it adapts, float32.

Dimensions: B rows of a batch, I inputs, O outputs (each perhaps several axes), R rank, P places of adapters.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lfm_jax.adapters.config import LoRAConfig
from lfm_jax.adapters.targets import Target, modules, target_tree
from lfm_jax.adapters.weights import Adapted
from lfm_jax.config import ModelConfig
from lfm_jax.layers import Traits
from lfm_jax.model import abstract_model
from lfm_jax.problems import raise_problems
from lfm_jax.sharding import on_mesh, reshard, spec, spec_of
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


def largest_rank(config: ModelConfig, lora: LoRAConfig) -> int:
    """Returns the largest rank of an adapter's matrices; patterns may give some of them others than `lora.rank`."""
    targets = jax.tree.leaves(target_tree(config, lora), is_leaf=lambda x: isinstance(x, Target))
    return max(target.rank for target in targets)


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
    return _each(weights, lambda w: w if w.row_ids_B is None else dataclasses.replace(w, row_ids_B=row_ids_B))


def _each(weights: Tree, change: Callable[[Adapted], Adapted]) -> Tree:
    return jax.tree.map(lambda w: change(w) if isinstance(w, Adapted) else w, weights,
                        is_leaf=lambda w: isinstance(w, WeightKind))


def empty_places(config: ModelConfig, places: int, rank: int) -> Tree:
    """Makes room for adapters of up to `rank`, one after another along R, beside every matrix that can have one: zeros
    in the model's dtype."""
    every = _every(config, places * rank)
    shapes = jax.eval_shape(lambda: init_adapter(config, every, jax.random.key(0)))
    return jax.tree.map(lambda x: jnp.zeros(x.shape, config.dtype), shapes)


def with_places(config: ModelConfig, weights: Tree, places: int, rank: int) -> Tree:
    """Puts `empty_places` on weights: as `adapt_rows` of adapters 1 to P, for rows that have none. `fill_place` puts an
    adapter into one, `for_rows` says which rows have which."""
    owner_R = jnp.repeat(jnp.arange(1, places + 1, dtype=jnp.int32), rank)
    room = adapt(config, _every(config, places * rank), weights, empty_places(config, places, rank))
    return _each(room, lambda w: dataclasses.replace(w, owner_R=owner_R, row_ids_B=jnp.zeros(1, jnp.int32)))


def for_place(config: ModelConfig, lora: LoRAConfig, adapter: Tree, rank: int) -> Tree:
    """Returns an adapter as `fill_place` takes it, in the memory of the host: of every matrix, with zeros for what the
    adapter does not have, its scale in B.

    Raises:
      ValueError: its rank is larger, its arrays are not of this model, or numbers are not finite in the model's dtype;
        the message lists everything.
    """
    targets = target_tree(config, lora)
    shapes = jax.eval_shape(lambda: init_adapter(config, lora, jax.random.key(0)))
    expected = {jax.tree_util.keystr(path): x.shape for path, x in jax.tree.leaves_with_path(shapes)}
    problems = [f"{name} is {list(x.shape)}, which no target of this model is" if name not in expected
                else f"{name} is {list(x.shape)}; expected {list(expected[name])}"
                for path, x in jax.tree.leaves_with_path(adapter)
                if x.shape != expected.get(name := jax.tree_util.keystr(path))]
    if (largest := largest_rank(config, lora)) > rank:
        problems.append(f"its rank is {largest}; places are of rank {rank} (engine.adapter_rank)")
    raise_problems("the adapter does not fit", problems)
    every = jax.eval_shape(lambda: empty_places(config, 1, rank))
    room = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), every)

    def fill(target: Target, ab: Tree, own: Tree) -> None:
        ab["a"][: target.rank] = np.asarray(own["a"])
        ab["b"][..., : target.rank] = np.float32(target.scale) * np.asarray(own["b"], np.float32)

    _map(fill, _like(targets, adapter), room, adapter)
    bad = [jax.tree_util.keystr(path) for path, x in jax.tree.leaves_with_path(room)
           if not np.isfinite(x.astype(np.float32)).all()]
    # Else a row of another adapter would get 0 times infinity.
    raise_problems(f"the adapter has numbers that are not finite in {config.dtype}", bad)
    return room


def fill_place(weights: Tree, part: Tree, place: int) -> Tree:
    """Returns the weights of `with_places` with another adapter (`for_place`) in a place, from 1 to P. The arrays of
    the others are not changed, and nothing is compiled but once."""
    filled = _filled(taken(weights), part, np.int32(place))

    def of(w: Any, ab: Any) -> Any:
        if isinstance(w, Adapted):
            return dataclasses.replace(w, a_RI=ab["a"], b_OR=ab["b"])
        return {key: of(value, ab[key]) if key in ab else value for key, value in w.items()}

    return of(weights, filled)


@jax.jit
def _filled(places: Tree, part: Tree, place: jax.Array) -> Tree:
    def fill(path: Any, room: jax.Array, new: jax.Array) -> jax.Array:
        axis = 0 if path[-1].key == "a" else room.ndim - 1
        new = reshard(on_mesh(new), spec_of(room))
        return jax.lax.dynamic_update_slice_in_dim(room, new, (place - 1) * new.shape[axis], axis)

    return jax.tree.map_with_path(fill, places, part)


def rebased(weights: Tree, base: Tree) -> Tree:
    """Returns the weights of `with_places` with the same adapters beside other weights of the model."""
    if isinstance(weights, Adapted):
        return dataclasses.replace(weights, base=base)
    return {key: rebased(weights[key], w) for key, w in base.items()} if isinstance(base, dict) else base


def _every(config: ModelConfig, rank: int) -> LoRAConfig:
    return LoRAConfig(rank=rank, alpha=rank, targets=tuple(modules(config).dense))


def taken(weights: Tree) -> Tree:
    """Returns the adapter that `adapt` put on weights."""
    found: Tree = {}
    for key, w in weights.items():
        part = taken(w) if isinstance(w, dict) else {"a": w.a_RI, "b": w.b_OR} if isinstance(w, Adapted) else {}
        if part:
            found[key] = part
    return found


def digest(weights: Any | None, seed: int = 0) -> str:
    """Returns a hash of the names, shapes, dtypes and numbers of a tree of whole arrays, or what stands for random ones
    of a seed where it is None."""
    if weights is None:
        return f"random weights of seed {seed}"
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
