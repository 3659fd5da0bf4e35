"""The training step: a pure function from (state, batch) to (state, metrics), jitted once with donation.

Over a mesh (`jax.set_mesh`) the same function runs: parameters and optimizer state are laid out by
`abstract_train_state`, batches as `sharding.spec("batch", "time")` says.

Dimensions: A micro-batches, B rows, T time, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lfm_jax.config import ModelConfig
from lfm_jax.data.batch import LOSS_IGNORE
from lfm_jax.model import LFM, abstract_model, param_axes
from lfm_jax.sharding import is_sharded, shardings, spec, spec_of
from lfm_jax.stacking import stack_layers, unstack_layers
from lfm_jax.train.loss import Loss, cross_entropy

Batch = Mapping[str, Any]
"""tokens, targets, segment_ids and positions, each int32 [B, T]; padding at the right end of a row. segment_ids may be
None: one document a row, no padding."""
Metrics = dict[str, jax.Array]


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
        if problems:
            raise ValueError("GuardConfig is not valid:\n" + "\n".join(f"  - {p}" for p in problems))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Guard:
    """What the guard remembers."""

    mean_norm: jax.Array
    """Running mean of the gradient norms of updates that were made, float32; its memory is `GUARD_MEMORY`."""
    made: jax.Array
    """Updates made, int32."""
    in_row: jax.Array
    """Updates skipped since the last one made, int32."""


GUARD_MEMORY = 0.98
"""Weight of the past in `Guard.mean_norm`: about 50 updates."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that an optimizer step changes.

    `params` is a plain nested dict. With `ModelConfig.scan_layers` repeated layers are stacked, in `opt_state` too
    (`stacking.py`); `unstacked` gives the form of checkpoints.
    """

    params: Any
    opt_state: Any
    step: jax.Array
    """Batches seen, int32."""
    guard: Guard


def init_train_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """A fresh state around `params`: optimizer moments at zero, step 0."""
    zero = jnp.zeros((), jnp.int32)
    guard = Guard(jnp.zeros((), jnp.float32), zero, zero + 0)
    return TrainState(params, optimizer.init(params), zero + 0, guard)


def abstract_train_state(config: ModelConfig, optimizer: optax.GradientTransformation) -> TrainState:
    """Shapes, dtypes and, over the mesh in use, layouts of a whole state, without making an array.

    Raises:
      ValueError: parameters that do not divide over the mesh, all in one message.
    """
    _, params = abstract_model(config, stacked=config.scan_layers)
    if spec() is None:
        return jax.eval_shape(lambda params: init_train_state(params, optimizer), params)
    mesh = jax.sharding.get_mesh()
    params = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), params,
        shardings(params, param_axes(config, stacked=config.scan_layers)),
    )
    state = jax.eval_shape(lambda params: init_train_state(params, optimizer), params)

    def leaf(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:  # What eval_shape says lies on the abstract mesh.
        layout = P() if x.sharding is None else x.sharding.spec
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, layout))

    return jax.tree.map(leaf, state)


def random_train_state(config: ModelConfig, optimizer: optax.GradientTransformation, seed: int) -> TrainState:
    """A fresh state with random parameters, made where it lies over the mesh in use; the same numbers on any mesh."""

    def init() -> TrainState:
        params = nnx.to_pure_dict(nnx.split(LFM(config, rngs=nnx.Rngs(seed)), nnx.Param)[1])
        return init_train_state(stack_layers(params, config) if config.scan_layers else params, optimizer)

    if spec() is None:
        return jax.jit(init)()
    # Inside, the compiler lays out: each device makes its own part of each matrix only.
    layout = jax.tree.map(lambda x: x.sharding.spec, abstract_train_state(config, optimizer))
    return jax.jit(jax.sharding.auto_axes(init, out_sharding=layout))()


def place_train_state(params: Any, config: ModelConfig, optimizer: optax.GradientTransformation) -> TrainState:
    """A fresh state around given parameters (whole arrays, unstacked), laid out over the mesh in use."""
    if spec() is not None:
        params = jax.device_put(params, shardings(params, param_axes(config)))

    def init(params: Any) -> TrainState:
        return init_train_state(stack_layers(params, config) if config.scan_layers else params, optimizer)

    layout = jax.tree.map(lambda x: x.sharding, abstract_train_state(config, optimizer))
    return jax.jit(init, out_shardings=layout)(params)


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


def batch_loss(
    graphdef: nnx.GraphDef, params: Any, batch: Batch, loss_chunk: int, z_loss: float = 0.0
) -> tuple[Loss, Metrics]:
    """Summed loss over a batch, and the squares of `LFM.hidden`."""
    model = nnx.merge(graphdef, params)
    hidden_BTD, squares = model.hidden(batch["tokens"], batch["positions"], batch["segment_ids"])
    with jax.named_scope("loss"):
        loss = cross_entropy(hidden_BTD, model.head_VD, batch["targets"], chunk=loss_chunk, z_loss=z_loss)
    return loss, squares


def train_step(
    graphdef: nnx.GraphDef, optimizer: optax.GradientTransformation, state: TrainState, batch: Batch,
    *, micro_batches: int, loss_chunk: int, z_loss: float, guard: GuardConfig,
) -> tuple[TrainState, Metrics]:
    """One optimizer step on the mean loss over all targets of the batch.

    The batch is cut into `micro_batches` of equal rows (row r belongs to part r modulo micro_batches, so that over a
    mesh no row moves). Each part's summed loss is divided by the number of targets of the whole batch, so how many
    parts there are changes memory and rounding only.

    An update whose gradient is not finite, or far larger than usual (`GuardConfig.spike`), is not made: parameters and
    optimizer stay as they are, to the bit, and only `step` and `guard` go on.

    Returns:
      The new state, and float32 scalars: loss (nats per target), grad_norm (before clipping), targets, skipped (1 if
      the update was not made), skipped_in_row, `grad_norm/KIND` by kind of operator, feed_forward, norm and table, and
      `act_norm/KIND`, the root mean square of what each kind adds to the residual stream (`LFM.hidden`).
    """
    count = jnp.sum(batch["targets"] != LOSS_IGNORE, dtype=jnp.float32)
    scale = 1.0 / jnp.maximum(count, 1.0)

    def scaled_loss(params: Any, part: Batch) -> tuple[jax.Array, tuple[jax.Array, Metrics]]:
        loss, squares = batch_loss(graphdef, params, part, loss_chunk, z_loss)
        return scale * loss.total, (scale * loss.nll, squares)

    grad_fn = jax.grad(scaled_loss, has_aux=True)
    if micro_batches == 1:
        grads, (loss, act_squares) = grad_fn(state.params, batch)
    else:

        def add(carry: Any, part: Batch) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, carry, grad_fn(state.params, part)), None

        parts = jax.tree.map(lambda x: _split_rows(x, micro_batches), dict(batch))
        sums = jax.eval_shape(grad_fn, state.params, jax.tree.map(lambda x: x[0], parts))[1]
        # Sums in float32, whatever the parameters are kept in.
        zeros = jax.tree.map(lambda x: jnp.zeros_like(x, jnp.float32), (state.params, sums))
        (grads, (loss, act_squares)), _ = jax.lax.scan(add, zeros, parts)
    squares = _squares_by_kind(nnx.merge(graphdef, grads), grads)
    norm = jnp.sqrt(sum(squares.values()))
    grads = jax.tree.map(lambda grad, w: grad.astype(w.dtype), grads, state.params)
    ok = jnp.isfinite(norm) & jnp.isfinite(loss)
    if guard.spike:
        ok &= (state.guard.made < guard.after) | (norm <= guard.spike * state.guard.mean_norm)
    with jax.named_scope("optimizer"):

        def update(grads: Any, opt_state: Any, params: Any) -> tuple[Any, Any]:
            updates, opt_state = optax.with_extra_args_support(optimizer).update(
                grads, opt_state, params, grad_norm=norm  # For clipping, which would find it again.
            )
            return optax.apply_updates(params, updates), opt_state

        # A branch, not a selection of each leaf, for which XLA copies the old moments.
        params, opt_state = jax.lax.cond(
            ok, update, lambda grads, opt_state, params: (params, opt_state), grads, state.opt_state, state.params
        )
    made, in_row = state.guard.made + ok, jnp.where(ok, 0, state.guard.in_row + 1)
    # The mean of the first updates is a plain one.
    memory = jnp.minimum(GUARD_MEMORY, 1 - 1 / jnp.maximum(made, 1).astype(jnp.float32))
    mean_norm = jnp.where(ok, memory * state.guard.mean_norm + (1 - memory) * norm, state.guard.mean_norm)
    metrics = {
        "loss": loss, "grad_norm": norm, "targets": count, "skipped": 1.0 - ok,
        "skipped_in_row": in_row.astype(jnp.float32),
    }
    ids = batch["segment_ids"]
    tokens = batch["tokens"].size if ids is None else jnp.maximum(jnp.sum(ids != 0, dtype=jnp.float32), 1.0)
    metrics |= {f"grad_norm/{kind}": jnp.sqrt(square) for kind, square in squares.items()}
    metrics |= {f"act_norm/{kind}": jnp.sqrt(square / tokens) for kind, square in act_squares.items()}
    return TrainState(params, opt_state, state.step + 1, Guard(mean_norm, made, in_row)), metrics


def _split_rows(x_BT: jax.Array, parts: int) -> jax.Array:
    """[A, B / A, T]: row r goes to part r modulo A, so that every device keeps its own rows."""
    B, T = x_BT.shape
    out_sharding = None
    if is_sharded(x_BT):
        b, t = spec_of(x_BT)
        out_sharding = P(b, None, t)
    return jnp.swapaxes(jax.lax.reshape(x_BT, (B // parts, parts, T), out_sharding=out_sharding), 0, 1)


def _squares_by_kind(model: LFM, grads: Any) -> Metrics:
    """Sums of squares of a gradient by kind of operator, feed_forward, norm and table; together those of all of it."""
    squares: Metrics = {}
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        name, *rest = (entry.key for entry in path)
        kind = name if name != "blocks" else model.blocks[rest[0]].kind if rest[1] == "operator" else rest[1]
        kind = "table" if kind in ("embed", "head") else "norm" if kind.endswith("norm") else kind
        squares[kind] = squares.get(kind, 0.0) + jnp.sum(jnp.square(grad.astype(jnp.float32)))
    return squares


def compile_train_step(
    config: ModelConfig, optimizer: optax.GradientTransformation, *, micro_batches: int = 1, loss_chunk: int = 512,
    z_loss: float = 0.0, guard: GuardConfig = GuardConfig(),
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """`train_step` jitted over (state, batch), the old state donated."""
    graphdef, _ = abstract_model(config, stacked=config.scan_layers)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        return train_step(
            graphdef, optimizer, state, batch,
            micro_batches=micro_batches, loss_chunk=loss_chunk, z_loss=z_loss, guard=guard,
        )

    return jax.jit(step, donate_argnums=0)


def compile_eval_step(
    config: ModelConfig, *, loss_chunk: int = 512
) -> Callable[[Any, Batch], tuple[jax.Array, jax.Array]]:
    """Over (params of a `TrainState`, batch): the summed loss in nats and the number of targets it counts."""
    graphdef, _ = abstract_model(config, stacked=config.scan_layers)

    def step(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        loss, _ = batch_loss(graphdef, params, batch, loss_chunk)
        return loss.nll, loss.count

    return jax.jit(step)
