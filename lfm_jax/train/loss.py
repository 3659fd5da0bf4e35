"""Next-token cross-entropy that never holds the logits of a whole batch.

Dimensions: B batch, T time, D width, V vocabulary (of one device where it is split), X chunks of C tokens each.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from lfm_jax.kernels.logprobs import CHUNK, as_used, chunk_gradients, on_mesh, score_chunk, split
from lfm_jax.sharding import axis_names, is_sharded, over_mesh
from lfm_jax.weight_kinds import WeightKind, pull_back


class Loss(NamedTuple):
    """Sums over the targets that count."""

    total: jax.Array
    """What to differentiate: nll plus the z-loss; float32 scalar."""
    nll: jax.Array
    """Negative log-likelihood in nats, float32 scalar; carries no gradient."""


def cross_entropy(
    hidden_BTD: jax.Array, table_VD: jax.Array | WeightKind, targets_BT: jax.Array, *, chunk: int = CHUNK,
    z_loss: float = 0.0,
) -> Loss:
    """Negative log-likelihood in nats, summed over the targets that count.

    Works on `chunk` tokens at a time on each device, so the largest array is [chunk, V] float32. Under
    differentiation the gradients of a chunk are made while its logits are at hand and the logits are
    dropped: three matrix products a chunk, as many as with all logits kept.

    Over a mesh every device works on its own tokens, and on its own part of the vocabulary where that is split
    (`tensor`): of the logits only two numbers a token are exchanged, and the gradient of hidden is summed.

    Args:
      hidden_BTD: normed hidden states.
      table_VD: output matrix, one row a token id; cast to the dtype of hidden for the products.
      targets_BT: id of the next token, or LOSS_IGNORE.
      chunk: tokens per chunk.
      z_loss: weight of the penalty `log(Z)^2`, which keeps the softmax's normaliser Z near 1 (PaLM, arXiv 2204.02311,
        section 5, uses 1e-4).

    Raises:
      ValueError: chunk below 1, or a negative z_loss.
    """
    if z_loss < 0:
        raise ValueError(f"z_loss is {z_loss}; it must not be negative")

    def sums(
        hidden_BTD: jax.Array, table_VD: jax.Array | WeightKind, targets_BT: jax.Array, vocab: str | None = None
    ) -> tuple[jax.Array, jax.Array]:
        hidden_XCD, targets_XC = split(hidden_BTD, targets_BT, chunk)
        return _summed_loss(hidden_XCD, table_VD, targets_XC, _How(z_loss, vocab))

    if not is_sharded(hidden_BTD):
        return Loss(*sums(hidden_BTD, table_VD, targets_BT))
    args, specs, (tokens, vocab) = on_mesh(hidden_BTD, table_VD, targets_BT)

    def shard(**args: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.lax.psum(sums(**args, vocab=vocab), tokens + axis_names(vocab))

    return Loss(*over_mesh(shard, args, specs, (P(), P())))


class _How(NamedTuple):
    """What of the arguments is not an array."""

    z_loss: float
    vocab: str | None
    """The mesh axis that the vocabulary is split over."""


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _summed_loss(
    hidden_XCD: jax.Array, table_VD: jax.Array | WeightKind, targets_XC: jax.Array, how: _How
) -> tuple[jax.Array, jax.Array]:
    """(total, nll) of this device; with the vocabulary split, of this device's part of it."""

    def step(sums: jax.Array, inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        hidden_CD, targets_C = inputs
        return sums + _chunk_loss(hidden_CD, table, targets_C, how)[0], None

    table = as_used(table_VD, hidden_XCD.dtype)
    sums, _ = jax.lax.scan(step, jnp.zeros((2,), jnp.float32), (hidden_XCD, targets_XC))
    return sums[0], sums[1]


def _summed_loss_fwd(
    hidden_XCD: jax.Array, table_VD: jax.Array | WeightKind, targets_XC: jax.Array, how: _How
) -> tuple[Any, Any]:
    table, array_VD = as_used(table_VD, hidden_XCD.dtype), table_VD.astype(hidden_XCD.dtype)

    def step(carry: tuple, inputs: tuple[jax.Array, jax.Array]) -> tuple[tuple, jax.Array]:
        sums, d_table_VD = carry
        hidden_CD, targets_C = inputs
        chunk_sums, d_logits_CV = _chunk_loss(hidden_CD, table, targets_C, how)
        d_hidden_CD, more_VD = chunk_gradients(d_logits_CV, hidden_CD, array_VD)
        return (sums + chunk_sums, d_table_VD + more_VD), d_hidden_CD

    start = (jnp.zeros((2,), jnp.float32), jnp.zeros(table_VD.shape, jnp.float32))
    (sums, d_table_VD), d_hidden_XCD = jax.lax.scan(step, start, (hidden_XCD, targets_XC))
    return (sums[0], sums[1]), (d_hidden_XCD, d_table_VD.astype(table_VD.dtype), table_VD)


def _summed_loss_bwd(
    how: _How, kept: tuple[jax.Array, jax.Array, Any], g: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, Any, None]:
    del how
    d_hidden_XCD, d_table_VD, table_VD = kept
    g_total, _ = g
    d_hidden_XCD, d_table_VD = ((g_total * x).astype(x.dtype) for x in (d_hidden_XCD, d_table_VD))
    return d_hidden_XCD, pull_back(table_VD, d_table_VD), None


_summed_loss.defvjp(_summed_loss_fwd, _summed_loss_bwd)


def _chunk_loss(
    hidden_CD: jax.Array, table_VD: jax.Array | WeightKind, targets_C: jax.Array, how: _How
) -> tuple[jax.Array, jax.Array]:
    """[total, nll] of a chunk and the gradient of the total by this device's logits.

    With the vocabulary split, the devices' sums add up to those of the chunk: each counts its own targets, the first
    one the normaliser.
    """
    found = score_chunk(hidden_CD, table_VD, targets_C, how.vocab)
    log_z_C1 = found.base_C1 + found.log_sum_C1
    picked_C = jnp.sum(jnp.where(found.hit_CV, found.logits_CV, 0.0), axis=-1)
    log_z_C = log_z_C1[:, 0]
    nll = jnp.sum(jnp.where(found.kept_C, found.first * log_z_C - picked_C, 0.0))
    total, slope_C1 = nll, 1.0
    if how.z_loss:
        total = nll + how.z_loss * found.first * jnp.sum(jnp.where(found.kept_C, log_z_C**2, 0.0))
        slope_C1 = 1.0 + 2 * how.z_loss * log_z_C1
    p_CV = jnp.exp(found.logits_CV - log_z_C1)
    d_logits_CV = jnp.where(found.kept_C[:, None], slope_C1 * p_CV - found.hit_CV, 0.0)
    return jnp.stack([total, nll]), d_logits_CV
