"""The training step: a pure function from (state, batch) to (state, metrics), jitted once with donation.

Dimensions: A micro-batches, B rows, T time, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from lfm_jax.sharding import is_sharded
from lfm_jax.train.loss import LOSS_IGNORE, cross_entropy

Batch = Mapping[str, jax.Array]
"""tokens, targets, segment_ids and positions, each int32 [B, T]; padding at the right end of a row."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that an optimizer step changes. `params` is a plain nested dict, unstacked by layer."""

    params: Any
    opt_state: Any
    step: jax.Array


def init_train_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """A fresh state around `params`: optimizer moments at zero, step 0."""
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))


def batch_loss(graphdef: nnx.GraphDef, params: Any, batch: Batch, loss_chunk: int) -> tuple[jax.Array, jax.Array]:
    """Summed loss in nats over a batch and the number of targets it counts."""
    model = nnx.merge(graphdef, params)
    hidden_BTD, _ = model(batch["tokens"], batch["positions"], batch["segment_ids"], logits=None, padding="right")
    with jax.named_scope("loss"):
        return cross_entropy(hidden_BTD, model.head_VD, batch["targets"], chunk=loss_chunk)


def train_step(
    graphdef: nnx.GraphDef, optimizer: optax.GradientTransformation, state: TrainState, batch: Batch,
    *, micro_batches: int, loss_chunk: int,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer step on the mean loss over all targets of the batch.

    The batch is cut into `micro_batches` of equal rows. Each part's summed loss is divided by the number of
    targets of the whole batch, so how many parts there are changes memory and rounding only.

    Raises:
      ValueError: several micro-batches over a mesh.

    Returns:
      The new state, and float32 scalars: loss (nats per target), grad_norm (before clipping), targets.
    """
    count = jnp.sum(batch["targets"] != LOSS_IGNORE, dtype=jnp.float32)
    scale = 1.0 / jnp.maximum(count, 1.0)
    grad_fn = jax.value_and_grad(lambda params, part: scale * batch_loss(graphdef, params, part, loss_chunk)[0])
    if micro_batches == 1:
        loss, grads = grad_fn(state.params, batch)
    elif is_sharded(batch["tokens"]):
        raise ValueError(f"micro_batches is {micro_batches}; over a mesh only 1 works so far")
    else:
        parts = jax.tree.map(lambda x: x.reshape(micro_batches, -1, *x.shape[1:]), dict(batch))

        def add(carry: Any, part: Batch) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, carry, grad_fn(state.params, part)), None

        # Sums in float32, whatever the parameters are kept in.
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (jnp.float32(0), state.params))
        (loss, grads), _ = jax.lax.scan(add, zeros, parts)
    with jax.named_scope("optimizer"):
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
    metrics = {"loss": loss, "grad_norm": optax.global_norm(grads), "targets": count}
    return TrainState(params, opt_state, state.step + 1), metrics


def compile_train_step(
    graphdef: nnx.GraphDef, optimizer: optax.GradientTransformation, *, micro_batches: int = 1, loss_chunk: int = 512
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """`train_step` jitted over (state, batch), the old state donated."""

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        return train_step(graphdef, optimizer, state, batch, micro_batches=micro_batches, loss_chunk=loss_chunk)

    return jax.jit(step, donate_argnums=0)


def compile_eval_step(
    graphdef: nnx.GraphDef, *, loss_chunk: int = 512
) -> Callable[[Any, Batch], tuple[jax.Array, jax.Array]]:
    """`batch_loss` jitted over (params, batch)."""
    return jax.jit(lambda params, batch: batch_loss(graphdef, params, batch, loss_chunk))
