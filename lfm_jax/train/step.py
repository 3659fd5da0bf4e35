"""The training step: a pure function from (state, batch) to (state, metrics), jitted once with donation.

Over a mesh (`jax.set_mesh`) the same function runs: weights and optimizer state are laid out by
`Training.abstract_state`, batches as their objective declares them.

Dimensions: A micro-batches, B rows, T time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lfm_jax.config import ModelConfig
from lfm_jax.kinds import FEED_FORWARDS
from lfm_jax.model import LFM, Aux, abstract_model
from lfm_jax.problems import raise_problems
from lfm_jax.sharding import is_sharded, spec, spec_of
from lfm_jax.stacking import sharing, unit_layers
from lfm_jax.train import state as states
from lfm_jax.train.objective import DeviceBatch, Metrics, Objective
from lfm_jax.train.rounding import rounded_weights
from lfm_jax.train.state import Guard, TrainState

GUARD_MEMORY = 0.98
"""Weight of the past in `Guard.mean_norm`: about 50 updates."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """Which updates are skipped, on the device, and when the run goes back to a checkpoint.

    Raises:
      ValueError: on construction, one message that lists every bad field.
    """

    spike: float = 10.0
    """An update is skipped when its gradient norm is over this many times the running mean. 0: never for that. One that
    is not finite is skipped always."""
    after: int = 100
    """Updates before the running mean is trusted."""
    max_in_row: int = 8
    """Updates skipped one after another until the run goes back to its last checkpoint and passes over their data."""
    max_rollbacks: int = 3
    """Times that a run may go back before it stops with an error."""

    def __post_init__(self) -> None:
        problems = [
            f"guard.{name} is {getattr(self, name)}; it must be at least {least}"
            for name, least in (("after", 1), ("max_in_row", 1), ("max_rollbacks", 0)) if getattr(self, name) < least
        ]
        if self.spike != 0 and not self.spike > 1:
            problems.append(f"guard.spike is {self.spike}; it must be above 1, or 0 for never")
        raise_problems("GuardConfig is not valid", problems)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """What is trained and how: enough to make its state, compile its step and plan it.

    Raises:
      ValueError: while it is used: `freeze` does not fit the model.
    """

    model: ModelConfig
    objective: Objective
    optimizer: optax.GradientTransformation
    micro_batches: int = 1
    guard: GuardConfig = GuardConfig()
    freeze: tuple[str, ...] = ()
    """Shell patterns over names of weights that are not trained (`state.frozen_mask`)."""

    # ---------------------------------------------------------------- state

    @cached_property
    def mask(self) -> Any:
        """True at each frozen weight."""
        return states.frozen_mask(self.model, self.freeze)

    def new_state(self, weights: Any) -> TrainState:
        """A fresh state around weights as a step holds them (`ModelConfig.scan_layers`: stacked)."""
        return states.new_state(weights, self.mask, self.optimizer)

    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and layouts over the mesh in use; see `state.abstract_state`."""
        return states.abstract_state(self.model, self.mask, self.optimizer)

    def random_state(self, seed: int) -> TrainState:
        """A fresh state with random weights, laid out over the mesh in use."""
        return states.random_state(self.model, self.mask, self.optimizer, seed)

    def placed_state(self, weights: Any) -> TrainState:
        """A fresh state around given weights (whole arrays, unstacked), laid out over the mesh in use."""
        return states.placed_state(weights, self.model, self.mask, self.optimizer)

    def abstract_batch(self, B: int, T: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes, dtypes and layouts of a batch over the mesh in use."""
        mesh = jax.sharding.get_mesh()

        def layout(logical: tuple[str | None, ...]) -> NamedSharding | None:
            return None if mesh.empty else NamedSharding(mesh, spec(*logical) or P())

        return {
            name: jax.ShapeDtypeStruct(array.shape(B, T), array.dtype, sharding=layout(array.logical))
            for name, array in self.objective.arrays.items()
        }

    # ---------------------------------------------------------------- programs

    def step(self, state: TrainState, batch: DeviceBatch) -> tuple[TrainState, Metrics]:
        """`train_step` of this training."""
        return train_step(self, state, batch)

    def compiled_step(self) -> Callable[[TrainState, DeviceBatch], tuple[TrainState, Metrics]]:
        """The step jitted, the old state donated."""
        return jax.jit(self.step, donate_argnums=0)

    def evaluate(self, weights: tuple[Any, Any], batch: DeviceBatch) -> tuple[Metrics, jax.Array]:
        """(sums, weight) of the objective over a batch; `weights` are the (params, frozen) of a state."""
        terms = self.objective(self.model_of(*weights), batch)
        return terms.sums, self.objective.weight(batch)

    def compiled_evaluate(self) -> Callable[[tuple[Any, Any], DeviceBatch], tuple[Metrics, jax.Array]]:
        return jax.jit(self.evaluate)

    def model_of(self, params: Any, frozen: Any) -> LFM:
        """The model that a step computes with (`ModelConfig.quantize`)."""
        return nnx.merge(self.graphdef, rounded_weights(self.model, states.merged(params, frozen)))

    @cached_property
    def graphdef(self) -> nnx.GraphDef:
        """Of the model as a step holds it."""
        return abstract_model(self.model, stacked=self.model.scan_layers)[0]


def train_step(training: Training, state: TrainState, batch: DeviceBatch) -> tuple[TrainState, Metrics]:
    """One optimizer step on the mean of the objective over the batch.

    The batch is cut into `micro_batches` of equal rows (row r belongs to part r modulo micro_batches, so that over a
    mesh no row moves). Each part's sum is divided by the weight of the whole batch, so how many parts there are changes
    memory and rounding only. Frozen weights are not differentiated.

    An update whose gradient is not finite, or far larger than usual (`GuardConfig.spike`), is not made: parameters and
    optimizer stay as they are, to the bit, and only `step` and `guard` go on.

    Returns:
      The new state, and float32 scalars: the means (`loss` among them) and the largest numbers that the objective
      reports, grad_norm (before
      clipping), weight, tokens (that are no padding), skipped (1 if the update was not made), skipped_in_row,
      `grad_norm/KIND` by kind of operator, feed_forward, norm and table, `act_norm/KIND`, the root mean square of what
      each kind adds to the residual stream, and what feed-forwards report (`model.Aux`), as means over tokens: of one
      number a token `KIND/NAME`, the mean over layers, and `KIND/NAME/LAYER`; of several numbers a token the largest
      and the least mean, `KIND/NAME/largest/LAYER` and `KIND/NAME/least/LAYER`.
    """
    objective, guard, micro_batches = training.objective, training.guard, training.micro_batches
    weight = objective.weight(batch)
    scale = jnp.where(weight > 0, 1.0 / jnp.where(weight > 0, weight, 1.0), 0.0)

    tokens = jnp.asarray(objective.real_tokens(batch), jnp.float32)

    def scaled(params: Any, part: DeviceBatch) -> tuple[jax.Array, tuple[Metrics, Aux, Metrics]]:
        terms = objective(training.model_of(params, state.frozen), part)
        total, of_layers = scale * terms.total, terms.aux.loss
        if of_layers is not None:
            total += of_layers / jnp.maximum(tokens, 1.0)
        return total, ({name: scale * x for name, x in terms.sums.items()}, terms.aux, dict(terms.largest))

    grad_fn = jax.grad(scaled, has_aux=True)
    if micro_batches == 1:
        grads, (means, aux, largest) = grad_fn(state.params, batch)
    else:

        def add(carry: Any, part: DeviceBatch) -> tuple[Any, None]:
            (sums, largest), (grads, (means, aux, others)) = carry, grad_fn(state.params, part)
            sums = jax.tree.map(jnp.add, sums, (grads, means, aux))
            return (sums, jax.tree.map(jnp.maximum, largest, others)), None

        parts = jax.tree.map(lambda x: _split_rows(x, micro_batches), dict(batch))
        *sums, largest = jax.eval_shape(grad_fn, state.params, jax.tree.map(lambda x: x[0], parts))[1]
        # Sums in float32, whatever the parameters are kept in.
        zeros = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), (state.params, *sums))
        least = jax.tree.map(lambda x: jnp.full_like(x, -jnp.inf), largest)
        ((grads, means, aux), largest), _ = jax.lax.scan(add, (zeros, least), parts)
    squares = _squares_by_kind(training.model, grads)
    norm = jnp.sqrt(sum(squares.values()))
    grads = jax.tree.map(lambda grad, w: grad.astype(w.dtype), grads, state.params)
    ok = jnp.isfinite(norm) & jnp.isfinite(means["loss"])
    if guard.spike:
        ok &= (state.guard.made < guard.after) | (norm <= guard.spike * state.guard.mean_norm)
    params, opt_state = _updated(training.optimizer, ok, norm, grads, state)
    made, in_row = state.guard.made + ok, jnp.where(ok, 0, state.guard.in_row + 1)
    # The mean of the first updates is a plain one.
    memory = jnp.minimum(GUARD_MEMORY, 1 - 1 / jnp.maximum(made, 1).astype(jnp.float32))
    mean_norm = jnp.where(ok, memory * state.guard.mean_norm + (1 - memory) * norm, state.guard.mean_norm)
    metrics = means | largest | {
        "grad_norm": norm, "weight": weight, "tokens": tokens, "skipped": 1.0 - ok,
        "skipped_in_row": in_row.astype(jnp.float32),
    }
    metrics |= {f"grad_norm/{kind}": jnp.sqrt(square) for kind, square in squares.items()}
    metrics |= {f"act_norm/{kind}": jnp.sqrt(square / jnp.maximum(tokens, 1.0)) for kind, square in aux.squares.items()}
    reports = {name: x / jnp.maximum(tokens, 1.0) for name, x in aux.reports.items()}
    metrics |= _of_reports(training.model, reports)
    new = dataclasses.replace(
        state, params=params, frozen=_with_rules(training.model, state.frozen, reports, ok), opt_state=opt_state,
        step=state.step + 1, guard=Guard(mean_norm, made, in_row),
    )
    return new, metrics


def _of_reports(config: ModelConfig, reports: Metrics) -> Metrics:
    """Metrics of reports, which are means over tokens with a row for each layer of their kind."""
    found: Metrics = {}
    for name, x in reports.items():
        kind = name.partition("/")[0]
        layers = [i for i, layer in enumerate(config.layers) if layer.feed_forward == kind]
        if x.ndim == 1:
            found[name] = jnp.mean(x)
            found |= {f"{name}/{i}": x[row] for row, i in enumerate(layers)}
        else:
            for row, i in enumerate(layers):
                found |= {f"{name}/largest/{i}": jnp.max(x[row]), f"{name}/least/{i}": jnp.min(x[row])}
    return found


def _with_rules(config: ModelConfig, frozen: Any, reports: Metrics, ok: jax.Array) -> Any:
    """The frozen weights, with every buffer as its rule leaves it if the update is made."""
    kinds = [layer.feed_forward for layer in config.layers]
    shared = sharing(config) if config.scan_layers else [range(i, i + 1) for i in range(config.num_layers)]
    for entry, layers in enumerate(shared):
        row = FEED_FORWARDS[kinds[layers[0]]]
        held = frozen.get("blocks", {}).get(entry, {}).get("feed_forward", {})
        of_layers = [{name.removeprefix(f"{row.name}/"): x[kinds[:i].count(row.name)] for name, x in reports.items()
                      if name.startswith(f"{row.name}/")} for i in layers]
        ruled = {}
        for name in row.buffers.keys() & held.keys():
            rule, old = row.find_rule(name), held[name]
            parts = [old] if len(layers) == 1 else list(old)
            new = [rule(part, own, config) for part, own in zip(parts, of_layers, strict=True)]
            ruled[name] = jnp.where(ok, new[0] if len(layers) == 1 else jnp.stack(new), old)
        if ruled:
            block = frozen["blocks"][entry] | {"feed_forward": held | ruled}
            frozen = frozen | {"blocks": frozen["blocks"] | {entry: block}}
    return frozen


def _updated(
    optimizer: optax.GradientTransformation, ok: jax.Array, norm: jax.Array, grads: Any, state: TrainState
) -> tuple[Any, Any]:
    """(parameters, optimizer state) after the update, or as they were where it is not `ok`."""
    with jax.named_scope("optimizer"):

        def update(grads: Any, opt_state: Any, params: Any) -> tuple[Any, Any]:
            updates, opt_state = optax.with_extra_args_support(optimizer).update(
                grads, opt_state, params, grad_norm=norm  # For clipping, which would find it again.
            )
            return optax.apply_updates(params, updates), opt_state

        # A branch, not a selection of each leaf, for which XLA copies the old moments.
        return jax.lax.cond(
            ok, update, lambda grads, opt_state, params: (params, opt_state), grads, state.opt_state, state.params
        )


def _split_rows(x: jax.Array, parts: int) -> jax.Array:
    """[A, B / A, ...]: row r goes to part r modulo A, so that every device keeps its own rows."""
    B, *rest = x.shape
    out_sharding = None
    if is_sharded(x):
        b, *others = spec_of(x)
        out_sharding = P(b, None, *others)
    return jnp.swapaxes(jax.lax.reshape(x, (B // parts, parts, *rest), out_sharding=out_sharding), 0, 1)


def _squares_by_kind(config: ModelConfig, grads: Any) -> Metrics:
    """Sums of squares of a gradient by kind of operator, feed_forward, norm and table; together those of all of it."""
    layers = unit_layers(config) if config.scan_layers else config.layers
    squares: Metrics = {}
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        name, *rest = (entry.key for entry in path if hasattr(entry, "key"))
        kind = name if name != "blocks" else layers[rest[0]].operator if rest[1] == "operator" else rest[1]
        kind = "table" if kind in ("embed", "head") else "norm" if kind.endswith("norm") else kind
        squares[kind] = squares.get(kind, 0.0) + jnp.sum(jnp.square(grad.astype(jnp.float32)))
    return squares
