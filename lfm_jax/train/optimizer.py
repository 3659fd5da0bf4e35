"""AdamW and Muon, and their learning-rate schedule."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers

from lfm_jax.layers import Traits
from lfm_jax.problems import raise_problems
from lfm_jax.sharding import is_sharded, spec_of

Schedule = Literal["wsd", "cosine", "constant"]
Algorithm = Literal["adamw", "muon"]

MUON_RMS = 0.2
"""Muon's updates are scaled to the size of AdamW's (arXiv 2502.16982, section 2.2), so that one peak_lr serves both."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW or Muon with warm-up, a schedule and global-norm clipping.

    Raises:
      ValueError: on construction, one message that lists every bad field.
    """

    algorithm: Algorithm = "adamw"
    """muon: Muon for matrices between activations, AdamW for embedding tables, norms, taps and vectors."""
    peak_lr: float = 3e-4
    """Learning rate after warm-up."""
    schedule: Schedule = "wsd"
    """wsd: warm-up, stable, linear decay over the last decay_steps; cosine: warm-up, then half a cosine; constant."""
    warmup_steps: int = 100
    """Optimizer steps of linear warm-up from 0."""
    warmup_fraction: float = 0.0
    """Share of the run's steps that are warm-up, where warmup_steps is 0."""
    decay_steps: int = 0
    """wsd only: steps of the final decay; 0 means a fifth of the run."""
    final_lr_fraction: float = 0.1
    """Learning rate at the end of the run, as a fraction of peak_lr (wsd and cosine)."""
    b1: float = 0.9
    """Memory of AdamW's first moment."""
    momentum: float = 0.95
    """Memory of Muon's momentum."""
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay_all: bool = False
    """Decay norms, biases, conv taps and vectors too."""
    clip_norm: float = 1.0
    """Largest global gradient norm; larger gradients are scaled down to it."""

    def __post_init__(self) -> None:
        problems = []
        for name, low, high in (("b1", 0.0, 1.0), ("b2", 0.0, 1.0), ("momentum", 0.0, 1.0)):
            if not low <= getattr(self, name) < high:
                problems.append(f"{name} is {getattr(self, name)}; it must lie in [0, 1)")
        for name in ("peak_lr", "eps", "clip_norm"):
            if not getattr(self, name) > 0:
                problems.append(f"{name} is {getattr(self, name)}; it must be positive")
        for name in ("warmup_steps", "decay_steps", "weight_decay"):
            if not getattr(self, name) >= 0:
                problems.append(f"{name} is {getattr(self, name)}; it must not be negative")
        for name in ("final_lr_fraction", "warmup_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                problems.append(f"{name} is {getattr(self, name)}; it must lie in [0, 1]")
        for name, kind in (("schedule", Schedule), ("algorithm", Algorithm)):
            if getattr(self, name) not in get_args(kind):
                problems.append(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(get_args(kind))}")
        raise_problems("OptimizerConfig is not valid", problems)


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """The learning rate as a function of the number of optimizer steps already taken.

    Args:
      steps: of the run; 0: not known yet, and the rate is the peak's.

    Raises:
      ValueError: warm-up and decay together are longer than the run.
    """
    if not steps:
        return optax.constant_schedule(config.peak_lr)
    warmup = config.warmup_steps or round(config.warmup_fraction * steps)
    final = config.peak_lr * config.final_lr_fraction
    decay = (config.decay_steps or steps // 5) if config.schedule == "wsd" else 0
    if warmup + decay > steps:
        raise ValueError(
            f"optimizer.warmup_steps {warmup} and decay_steps {decay} exceed the run's {steps} steps; lower them"
        )
    rise = optax.linear_schedule(0.0, config.peak_lr, warmup) if warmup else optax.constant_schedule(config.peak_lr)
    stable = optax.constant_schedule(config.peak_lr)
    if config.schedule == "cosine":
        fall = optax.cosine_decay_schedule(config.peak_lr, max(steps - warmup, 1), alpha=config.final_lr_fraction)
        return optax.join_schedules([rise, fall], [warmup])
    if config.schedule == "constant":
        return optax.join_schedules([rise, stable], [warmup])
    fall = optax.linear_schedule(config.peak_lr, final, max(decay, 1))
    return optax.join_schedules([rise, stable, fall], [warmup, steps - decay])


def decay_mask(params: Any, traits: Any) -> Any:
    """True for each leaf of parameters that weight decay applies to by default."""
    return _map_weights(lambda known, weight: jax.tree.map(lambda _: known.decay, weight), params, traits)


def make_optimizer(config: OptimizerConfig, steps: int, traits: Any) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW or Muon on the schedule, as one optax transformation.

    Args:
      traits: the `layers.Traits` of each parameter (`model.param_traits`, stacked where the parameters are); names that
        the parameters lack do no harm.
    """
    rate = learning_rate(config, steps)
    adamw = optax.adamw(
        rate, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay,
        mask=None if config.decay_all else partial(decay_mask, traits=traits),
    )
    if config.algorithm == "adamw":
        return optax.chain(clip_by_global_norm(config.clip_norm), adamw)
    muon = optax.contrib.muon(
        rate, beta=config.momentum, weight_decay=config.weight_decay, consistent_rms=MUON_RMS,
        muon_weight_dimension_numbers=partial(muon_dimensions, traits=traits),
    )
    labels = partial(jax.tree.map, lambda dims: "adamw" if dims is None else "muon", is_leaf=_is_dimensions)
    by_kind = optax.partition(
        {"muon": _over_auto_axes(muon), "adamw": adamw}, lambda params: labels(muon_dimensions(params, traits))
    )
    return optax.chain(clip_by_global_norm(config.clip_norm), by_kind)


def clip_by_global_norm(limit: float) -> optax.GradientTransformationExtraArgs:
    """optax's, as one product for each leaf: for its selection and division XLA keeps a second copy of the gradient.

    `update` takes the norm as `grad_norm` where it is known already.
    """

    def update(
        updates: Any, state: Any, params: Any = None, *, grad_norm: jax.Array | None = None, **extra: Any
    ) -> tuple[Any, Any]:
        del params, extra
        factor = jnp.minimum(1.0, limit / (optax.global_norm(updates) if grad_norm is None else grad_norm))
        return jax.tree.map(lambda g: (g * factor).astype(g.dtype), updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def muon_dimensions(params: Any, traits: Any) -> Any:
    """Input and output axes of each array that Muon orthogonalises, None for every other leaf.

    Leaves of a weight that is a pytree (`weight_kinds`) are no matrices between activations.
    """

    def dimensions(known: Traits, weight: Any) -> Any:
        if known.matrix is None or not jax.tree_util.all_leaves([weight]):
            return jax.tree.map(lambda _: None, weight)
        return MuonDimensionNumbers(reduction_axis=known.matrix.inputs, output_axis=known.matrix.outputs)

    return _map_weights(dimensions, params, traits)


def _map_weights(f: Callable[[Traits, Any], Any], params: Any, traits: Any) -> Any:
    """`f` of what is known of each weight and the weight, in nested dicts that may lack some of those of `traits`."""
    if isinstance(traits, Traits):
        return f(traits, params)
    return {name: _map_weights(f, weight, traits[name]) for name, weight in params.items()}


def _is_dimensions(x: Any) -> bool:
    return x is None or isinstance(x, MuonDimensionNumbers)


def _over_auto_axes(transformation: optax.GradientTransformation) -> optax.GradientTransformation:
    """The transformation with its layout inside left to the compiler: it multiplies matrices split in any way."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if not any(is_sharded(x) for x in jax.tree.leaves(updates)):
            return transformation.update(updates, state, params)
        out = jax.tree.map(spec_of, (updates, state))
        run: Any = jax.sharding.auto_axes(transformation.update, out_sharding=out)
        return run(updates, state, params)

    return optax.GradientTransformation(transformation.init, update)
