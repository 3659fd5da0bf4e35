"""TrainState: all that a training step changes, how it is laid out over a mesh, and which part of it is frozen."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lfm_jax.config import ModelConfig
from lfm_jax.kinds import FEED_FORWARDS
from lfm_jax.model import LFM, abstract_model, param_axes
from lfm_jax.sharding import shardings, spec
from lfm_jax.stacking import stack_layers, unstack_layers


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Guard:
    """What the guard of the step remembers."""

    mean_norm: jax.Array
    """Running mean of the gradient norms of updates that were made, float32; its memory is `step.GUARD_MEMORY`."""
    made: jax.Array
    """Updates made, int32."""
    in_row: jax.Array
    """Updates skipped since the last one made, int32."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that an optimizer step changes, and the weights that it does not.

    Trees of weights are plain nested dicts. With `ModelConfig.scan_layers` repeated layers are stacked, in `opt_state`
    too (`stacking.py`); `unstacked` gives the form of checkpoints.
    """

    params: Any
    """Trainable weights: some of the model's, or an adapter (`adapters.trees`)."""
    frozen: Any
    """The model's others, with an adapter all of them: without gradient and moments. Only buffers change
    (`kinds.FeedForwardKind.buffers`), and none beside an adapter."""
    opt_state: Any
    step: jax.Array
    """Batches seen, int32."""
    guard: Guard
    others: Any = dataclasses.field(default_factory=dict)
    """Weights of other models that the objective looks at, by name; they never change."""

    @property
    def weights(self) -> Any:
        """All weights of the model, trainable and frozen; `Training.model_of` joins an adapter and its model."""
        return merged(self.params, self.frozen)


def merged(params: Any, frozen: Any) -> Any:
    """Joins the trainable and the frozen weights of a model into one tree."""
    if not (isinstance(params, dict) and isinstance(frozen, dict)):
        raise ValueError("a weight is both trainable and frozen")
    both = {name: merged(params[name], frozen[name]) for name in params.keys() & frozen.keys()}
    return params if not frozen else params | frozen | both


def divided(weights: Any, mask: Any) -> tuple[Any, Any]:
    """Splits a tree of weights into (trainable, frozen); `mask` has True at frozen weights and False at others."""
    if mask is True or mask is False:
        return ({}, weights) if mask else (weights, {})
    return _sorted_out({name: divided(weights[name], mask[name]) for name in weights})


def without(tree: Any, mask: Any) -> Any:
    """A tree without what stands in the place of True in a mask, which has all of its names."""
    if not isinstance(mask, dict):
        return {} if mask else tree
    kept = {name: without(value, mask[name]) for name, value in tree.items()}
    return {name: value for name, value in kept.items() if not isinstance(value, dict) or value}


def parted(weights: Any, params: Any, frozen: Any) -> tuple[Any, Any]:
    """Splits weights into two trees with the names of `params` and of `frozen`; the inverse of `merged`."""
    if not (isinstance(weights, dict) and isinstance(frozen, dict) and isinstance(params, dict)):
        return (weights, {}) if isinstance(frozen, dict) else ({}, weights)
    return _sorted_out({
        name: parted(weights[name], params.get(name, {}), frozen.get(name, {})) for name in weights
    })


def _sorted_out(parts: dict[Any, tuple[Any, Any]]) -> tuple[Any, Any]:
    """Two dicts of the first and the second of each pair, without those that are empty dicts."""
    first, second = ({name: pair[i] for name, pair in parts.items() if not isinstance(pair[i], dict) or pair[i]}
                     for i in (0, 1))
    return first, second


def frozen_mask(config: ModelConfig, freeze: Sequence[str]) -> Any:
    """True at each weight that is frozen: a tree like the weights that a training step holds, or False for none.

    Buffers always are (`kinds.FeedForwardKind.buffers`).

    Args:
      freeze: shell patterns over the dotted names of weights, such as `embed` or `blocks.*.operator.*`.

    Raises:
      ValueError: patterns name no weight, every weight is frozen, or layers that `scan_layers` stacks differ.
    """
    buffers = {f"blocks.{i}.feed_forward.{name}" for i, layer in enumerate(config.layers)
               for name in FEED_FORWARDS[layer.feed_forward].buffers}
    if not freeze and not buffers:
        return False
    _, weights = abstract_model(config)
    names = [name for name, _ in named(weights)]
    unknown = [f"{pattern!r} (the nearest is {difflib.get_close_matches(pattern, names, n=1, cutoff=0)[0]!r})"
               for pattern in freeze if not any(fnmatchcase(name, pattern) for name in names)]
    if unknown:
        raise ValueError(f"freeze has patterns that name no weight of the model: {', '.join(unknown)}")
    chosen = {name for name in names if name in buffers or any(fnmatchcase(name, pattern) for pattern in freeze)}
    if len(chosen) == len(names):
        raise ValueError(f"freeze {list(freeze)} leaves nothing to train; name fewer weights")
    mask = _map_named(lambda name: name in chosen, weights)
    return stack_layers(mask, config, _alike) if config.scan_layers else mask


def named(weights: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """(dotted name, weight) of a tree of weights: nested dicts."""
    if not isinstance(weights, dict):
        return [(prefix, weights)]
    return [pair for key, value in weights.items() for pair in named(value, f"{prefix}.{key}" if prefix else f"{key}")]


def _map_named(f: Callable[[str], bool], weights: Any, prefix: str = "") -> Any:
    if not isinstance(weights, dict):
        return f(prefix)
    return {key: _map_named(f, value, f"{prefix}.{key}" if prefix else f"{key}") for key, value in weights.items()}


def _alike(*layers: bool) -> bool:
    if len(set(layers)) > 1:
        raise ValueError("freeze treats layers differently that model.scan_layers stacks; name whole kinds of weights "
                         "(blocks.*.feed_forward.*), or set model.scan_layers to false")
    return layers[0]


def new_state(params: Any, frozen: Any, optimizer: optax.GradientTransformation, others: Any = None) -> TrainState:
    """A fresh state around weights as a step holds them: optimizer moments at zero, step 0."""
    zero = jnp.zeros((), jnp.int32)
    guard = Guard(jnp.zeros((), jnp.float32), zero, zero + 0)
    return TrainState(params, frozen, optimizer.init(params), zero + 0, guard, others or {})


@dataclasses.dataclass(frozen=True)
class Held:
    """The models that a step holds, and how it holds their weights."""

    model: ModelConfig
    """The model that is trained."""
    others: Mapping[str, ModelConfig] = dataclasses.field(default_factory=dict)
    """Frozen ones beside it, by name."""
    form: Callable[[Any], Any] = lambda weights: weights
    """The trained model's weights, unstacked -> the form in which they are held, such as a narrow one; it can be traced
    too."""


Make = Callable[[Any, Any], Any]
"""(weights, {name: weights of another model}), as a step holds them, arrays or traced -> what is made of them."""


def abstract(held: Held, make: Make) -> Any:
    """Shapes, dtypes and, over the mesh in use, layouts of what is made of weights, without making an array.

    Raises:
      ValueError: weights that do not divide over the mesh, all in one message.
    """

    def weights(config: ModelConfig, form: Callable[[Any], Any]) -> Any:
        def as_held(weights: Any) -> Any:
            return stack_layers(form(weights), config) if config.scan_layers else form(weights)

        shapes = jax.eval_shape(as_held, abstract_model(config)[1])
        if spec() is None:
            return shapes
        return jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes,
            shardings(shapes, param_axes(config, stacked=config.scan_layers)),
        )

    others = {name: weights(config, lambda w: w) for name, config in held.others.items()}
    made = jax.eval_shape(make, weights(held.model, held.form), others)
    if spec() is None:
        return made
    mesh = jax.sharding.get_mesh()

    def leaf(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:  # What eval_shape says lies on the abstract mesh.
        layout = P() if x.sharding is None else x.sharding.spec
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, layout))

    return jax.tree.map(leaf, made)


def of_random(held: Held, make: Make, seed: int) -> Any:
    """What is made of random weights, where it lies over the mesh in use; the same numbers on any mesh."""

    def weights(config: ModelConfig, form: Callable[[Any], Any]) -> Any:
        made = form(nnx.to_pure_dict(nnx.split(LFM(config, rngs=nnx.Rngs(seed)), nnx.Param)[1]))
        return stack_layers(made, config) if config.scan_layers else made

    def init() -> Any:
        return make(weights(held.model, held.form),
                    {name: weights(config, lambda w: w) for name, config in held.others.items()})

    if spec() is None:
        return jax.jit(init)()
    # Inside, the compiler lays out: each device makes its own part of each matrix only.
    layout = jax.tree.map(lambda x: x.sharding.spec, abstract(held, make))
    return jax.jit(jax.sharding.auto_axes(init, out_sharding=layout))()


def of_given(held: Held, make: Make, weights: Any, others: Mapping[str, Any]) -> Any:
    """What is made of given weights (whole arrays, unstacked), laid out over the mesh in use."""
    configs = {"": held.model, **held.others}
    given = {"": held.form(weights), **others}
    if spec() is not None:
        given = {name: jax.device_put(w, shardings(w, param_axes(configs[name]))) for name, w in given.items()}

    def init(given: Any) -> Any:
        parts = {name: stack_layers(w, configs[name]) if configs[name].scan_layers else w for name, w in given.items()}
        return make(parts.pop(""), parts)

    layout = jax.tree.map(lambda x: x.sharding, abstract(held, make))
    return jax.jit(init, out_shardings=layout)(given)


def unstacked(state: TrainState, config: ModelConfig) -> TrainState:
    """The state as checkpoints hold it: every layer's arrays by themselves; shapes or arrays. See `restacked`.

    Of stacked layers these are copies, on the device until they are saved.
    """
    return _convert(unstack_layers, state, config)


def restacked(state: TrainState, config: ModelConfig) -> TrainState:
    """The state as a training step holds it, of what `unstacked` gave."""
    return _convert(stack_layers, state, config)


def _convert(convert: Callable[[Any, ModelConfig], Any], state: TrainState, config: ModelConfig) -> TrainState:
    if not config.scan_layers:
        return state
    if all(isinstance(x, jax.Array) for x in jax.tree.leaves(state)):
        return _compiled(convert, config)(state)
    mesh = jax.sharding.get_mesh()
    shapes = jax.eval_shape(lambda state: convert(state, config), state)
    if spec() is None:
        return shapes
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, x.sharding.spec)), shapes
    )


@lru_cache
def _compiled(
    convert: Callable[[Any, ModelConfig], Any], config: ModelConfig
) -> Callable[[TrainState], TrainState]:
    """One function for all checkpoints of a run, so that it is compiled once."""
    return jax.jit(lambda state: convert(state, config))
