"""Next-token cross-entropy that never holds the logits of a whole batch.

Dimensions: B batch, T time, D width, V vocabulary, M = B * T tokens, C tokens of one chunk.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from lfm_jax.sharding import axis_names, is_sharded, over_mesh, spec_of

LOSS_IGNORE = -1
"""Target that carries no loss: padding, or a token whose successor is not in the row."""


def cross_entropy(
    hidden_BTD: jax.Array, table_VD: jax.Array, targets_BT: jax.Array, *, chunk: int = 512
) -> tuple[jax.Array, jax.Array]:
    """Summed negative log-likelihood in nats and the number of targets that count.

    Works on `chunk` tokens at a time on each device, so the largest array is [chunk, V] float32. Under
    differentiation the gradients of a chunk are made while its logits are at hand and the logits are
    dropped: three matrix products a chunk, as many as with all logits kept.

    Args:
      hidden_BTD: normed hidden states.
      table_VD: output matrix, one row a token id; cast to the dtype of hidden for the products.
      targets_BT: id of the next token, or LOSS_IGNORE.
      chunk: tokens per chunk.

    Returns:
      (sum of losses, float32 scalar; count of targets, int32 scalar).

    Raises:
      ValueError: chunk below 1.
    """
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; it must be at least 1 token")
    if is_sharded(hidden_BTD):
        b, t, _ = spec_of(hidden_BTD)

        def shard(**args: jax.Array) -> tuple[jax.Array, jax.Array]:
            return jax.lax.psum(cross_entropy(**args, chunk=chunk), axis_names((b, t)))

        args = dict(hidden_BTD=hidden_BTD, table_VD=table_VD, targets_BT=targets_BT)
        specs = dict(hidden_BTD=P(b, t, None), table_VD=P(), targets_BT=P(b, t))
        return over_mesh(shard, args, specs, (P(), P()))
    D = hidden_BTD.shape[-1]
    hidden_MD, targets_M = hidden_BTD.reshape(-1, D), targets_BT.reshape(-1)
    chunk = min(chunk, targets_M.shape[0])
    short = -targets_M.shape[0] % chunk
    hidden_MD = jnp.pad(hidden_MD, ((0, short), (0, 0)))
    targets_M = jnp.pad(targets_M, (0, short), constant_values=LOSS_IGNORE)
    loss = _summed_loss(hidden_MD, table_VD, targets_M, chunk)
    return loss, jnp.sum(targets_BT != LOSS_IGNORE, dtype=jnp.int32)


def reference_cross_entropy(
    hidden_BTD: jax.Array, table_VD: jax.Array, targets_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """What `cross_entropy` computes, with all logits in memory: the reference for its test."""
    logits_BTV = jnp.einsum(
        "BTD,VD->BTV", hidden_BTD, table_VD.astype(hidden_BTD.dtype), preferred_element_type=jnp.float32
    )
    log_p_BTV = jax.nn.log_softmax(logits_BTV, axis=-1)
    kept_BT = targets_BT != LOSS_IGNORE
    picked_BT = jnp.take_along_axis(log_p_BTV, jnp.maximum(targets_BT, 0)[:, :, None], axis=-1)[:, :, 0]
    return -jnp.sum(jnp.where(kept_BT, picked_BT, 0.0)), jnp.sum(kept_BT, dtype=jnp.int32)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _summed_loss(hidden_MD: jax.Array, table_VD: jax.Array, targets_M: jax.Array, chunk: int) -> jax.Array:
    def step(total: jax.Array, inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        hidden_CD, targets_C = inputs
        loss, _ = _chunk_loss(hidden_CD, table, targets_C)
        return total + loss, None

    table = table_VD.astype(hidden_MD.dtype)
    total, _ = jax.lax.scan(step, jnp.zeros((), jnp.float32), _split(hidden_MD, targets_M, chunk))
    return total


def _summed_loss_fwd(
    hidden_MD: jax.Array, table_VD: jax.Array, targets_M: jax.Array, chunk: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    table = table_VD.astype(hidden_MD.dtype)

    def step(carry: tuple, inputs: tuple[jax.Array, jax.Array]) -> tuple[tuple, jax.Array]:
        total, d_table_VD = carry
        hidden_CD, targets_C = inputs
        loss, d_logits_CV = _chunk_loss(hidden_CD, table, targets_C)
        d_logits_CV = d_logits_CV.astype(hidden_CD.dtype)
        d_hidden_CD = d_logits_CV @ table
        d_table_VD += jnp.einsum("CV,CD->VD", d_logits_CV, hidden_CD, preferred_element_type=jnp.float32)
        return (total + loss, d_table_VD), d_hidden_CD

    start = (jnp.zeros((), jnp.float32), jnp.zeros(table_VD.shape, jnp.float32))
    (total, d_table_VD), d_hidden = jax.lax.scan(step, start, _split(hidden_MD, targets_M, chunk))
    return total, (d_hidden.reshape(hidden_MD.shape), d_table_VD.astype(table_VD.dtype))


def _summed_loss_bwd(
    chunk: int, gradients: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
    del chunk
    d_hidden_MD, d_table_VD = gradients
    return (g * d_hidden_MD).astype(d_hidden_MD.dtype), (g * d_table_VD).astype(d_table_VD.dtype), None


_summed_loss.defvjp(_summed_loss_fwd, _summed_loss_bwd)


def _split(hidden_MD: jax.Array, targets_M: jax.Array, chunk: int) -> tuple[jax.Array, jax.Array]:
    return hidden_MD.reshape(-1, chunk, hidden_MD.shape[-1]), targets_M.reshape(-1, chunk)


def _chunk_loss(hidden_CD: jax.Array, table_VD: jax.Array, targets_C: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Summed loss of a chunk and its gradient by the logits, softmax minus one-hot."""
    logits_CV = jnp.einsum("CD,VD->CV", hidden_CD, table_VD, preferred_element_type=jnp.float32)
    log_z_C1 = jax.nn.logsumexp(logits_CV, axis=-1, keepdims=True)
    # An iota comparison instead of a gather: it fuses, and it still works with V sharded.
    hit_CV = jnp.arange(logits_CV.shape[-1]) == targets_C[:, None]
    picked_C = jnp.sum(jnp.where(hit_CV, logits_CV, 0.0), axis=-1)
    kept_C = targets_C != LOSS_IGNORE
    loss = jnp.sum(jnp.where(kept_C, log_z_C1[:, 0] - picked_C, 0.0))
    d_logits_CV = jnp.where(kept_C[:, None], jnp.exp(logits_CV - log_z_C1) - hit_CV, 0.0)
    return loss, d_logits_CV
