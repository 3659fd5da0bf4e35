"""Next-token cross-entropy that never holds the logits of a whole batch.

Dimensions: B batch, T time, D width, V vocabulary (of one device where it is split), M = B * T tokens, C tokens of one
chunk.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from lfm_jax.data.batch import LOSS_IGNORE
from lfm_jax.sharding import FSDP, axis_names, is_sharded, over_mesh, spec_of, whole
from lfm_jax.weight_kinds import WeightKind


class Loss(NamedTuple):
    """Sums over the targets that count."""

    total: jax.Array
    """What to differentiate: nll plus the z-loss; float32 scalar."""
    nll: jax.Array
    """Negative log-likelihood in nats, float32 scalar; carries no gradient."""
    count: jax.Array
    """Targets that count, int32 scalar."""


def cross_entropy(
    hidden_BTD: jax.Array, table_VD: jax.Array | WeightKind, targets_BT: jax.Array, *, chunk: int = 512,
    z_loss: float = 0.0,
) -> Loss:
    """Summed negative log-likelihood in nats and the number of targets that count.

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
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; it must be at least 1 token")
    if z_loss < 0:
        raise ValueError(f"z_loss is {z_loss}; it must not be negative")
    if isinstance(table_VD, WeightKind):
        table_VD = table_VD.astype(hidden_BTD.dtype)
    if is_sharded(hidden_BTD):
        table_VD = whole(table_VD.astype(hidden_BTD.dtype), FSDP)
        (b, t, _), v = spec_of(hidden_BTD), spec_of(table_VD)[0]
        tokens, vocab = axis_names((b, t)), axis_names(v)

        def shard(hidden_BTD: jax.Array, table_VD: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, ...]:
            sums = _sums(hidden_BTD, table_VD, targets_BT, _How(chunk, z_loss, vocab[0] if vocab else None))
            return *jax.lax.psum(sums, tokens + vocab), jax.lax.psum(_count(targets_BT), tokens)

        args = dict(hidden_BTD=hidden_BTD, table_VD=table_VD, targets_BT=targets_BT)
        specs = dict(hidden_BTD=P(b, t, None), table_VD=P(v, None), targets_BT=P(b, t))
        return Loss(*over_mesh(shard, args, specs, (P(), P(), P())))
    return Loss(*_sums(hidden_BTD, table_VD, targets_BT, _How(chunk, z_loss, None)), _count(targets_BT))


class _How(NamedTuple):
    """What of the arguments is not an array."""

    chunk: int
    z_loss: float
    vocab: str | None
    """The mesh axis that the vocabulary is split over."""


def _count(targets_BT: jax.Array) -> jax.Array:
    return jnp.sum(targets_BT != LOSS_IGNORE, dtype=jnp.int32)


def _sums(hidden_BTD: jax.Array, table_VD: jax.Array, targets_BT: jax.Array, how: _How) -> tuple[jax.Array, jax.Array]:
    """(total, nll) of this device; with the vocabulary split, of this device's part of it."""
    D = hidden_BTD.shape[-1]
    hidden_MD, targets_M = hidden_BTD.reshape(-1, D), targets_BT.reshape(-1)
    chunk = min(how.chunk, targets_M.shape[0])
    short = -targets_M.shape[0] % chunk
    hidden_MD = jnp.pad(hidden_MD, ((0, short), (0, 0)))
    targets_M = jnp.pad(targets_M, (0, short), constant_values=LOSS_IGNORE)
    return _summed_loss(hidden_MD, table_VD, targets_M, how._replace(chunk=chunk))


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
def _summed_loss(
    hidden_MD: jax.Array, table_VD: jax.Array, targets_M: jax.Array, how: _How
) -> tuple[jax.Array, jax.Array]:
    def step(sums: jax.Array, inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        hidden_CD, targets_C = inputs
        return sums + _chunk_loss(hidden_CD, table, targets_C, how)[0], None

    table = table_VD.astype(hidden_MD.dtype)
    sums, _ = jax.lax.scan(step, jnp.zeros((2,), jnp.float32), _split(hidden_MD, targets_M, how.chunk))
    return sums[0], sums[1]


def _summed_loss_fwd(hidden_MD: jax.Array, table_VD: jax.Array, targets_M: jax.Array, how: _How) -> tuple[Any, Any]:
    table = table_VD.astype(hidden_MD.dtype)

    def step(carry: tuple, inputs: tuple[jax.Array, jax.Array]) -> tuple[tuple, jax.Array]:
        sums, d_table_VD = carry
        hidden_CD, targets_C = inputs
        chunk_sums, d_logits_CV = _chunk_loss(hidden_CD, table, targets_C, how)
        d_logits_CV = d_logits_CV.astype(hidden_CD.dtype)
        d_hidden_CD = d_logits_CV @ table
        d_table_VD += jnp.einsum("CV,CD->VD", d_logits_CV, hidden_CD, preferred_element_type=jnp.float32)
        return (sums + chunk_sums, d_table_VD), d_hidden_CD

    start = (jnp.zeros((2,), jnp.float32), jnp.zeros(table_VD.shape, jnp.float32))
    (sums, d_table_VD), d_hidden = jax.lax.scan(step, start, _split(hidden_MD, targets_M, how.chunk))
    return (sums[0], sums[1]), (d_hidden.reshape(hidden_MD.shape), d_table_VD.astype(table_VD.dtype))


def _summed_loss_bwd(
    how: _How, gradients: tuple[jax.Array, jax.Array], g: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, None]:
    del how
    d_hidden_MD, d_table_VD = gradients
    g_total, _ = g
    return (g_total * d_hidden_MD).astype(d_hidden_MD.dtype), (g_total * d_table_VD).astype(d_table_VD.dtype), None


_summed_loss.defvjp(_summed_loss_fwd, _summed_loss_bwd)


def _split(hidden_MD: jax.Array, targets_M: jax.Array, chunk: int) -> tuple[jax.Array, jax.Array]:
    return hidden_MD.reshape(-1, chunk, hidden_MD.shape[-1]), targets_M.reshape(-1, chunk)


def _chunk_loss(
    hidden_CD: jax.Array, table_VD: jax.Array, targets_C: jax.Array, how: _How
) -> tuple[jax.Array, jax.Array]:
    """[total, nll] of a chunk and the gradient of the total by this device's logits.

    With the vocabulary split, the devices' sums add up to those of the chunk: each counts its own targets, the first
    one the normaliser.
    """
    logits_CV = jnp.einsum("CD,VD->CV", hidden_CD, table_VD, preferred_element_type=jnp.float32)
    log_z_C1 = jax.nn.logsumexp(logits_CV, axis=-1, keepdims=True)
    ids_V, first = jnp.arange(logits_CV.shape[-1]), 1.0
    if how.vocab is not None:
        largest_C1 = jax.lax.pmax(log_z_C1, how.vocab)
        log_z_C1 = largest_C1 + jnp.log(jax.lax.psum(jnp.exp(log_z_C1 - largest_C1), how.vocab))
        ids_V += jax.lax.axis_index(how.vocab) * ids_V.shape[0]
        first = jnp.where(jax.lax.axis_index(how.vocab) == 0, 1.0, 0.0)
    # An iota comparison instead of a gather: it fuses, and it works with the vocabulary split.
    hit_CV = ids_V == targets_C[:, None]
    picked_C = jnp.sum(jnp.where(hit_CV, logits_CV, 0.0), axis=-1)
    kept_C, log_z_C = targets_C != LOSS_IGNORE, log_z_C1[:, 0]
    nll = jnp.sum(jnp.where(kept_C, first * log_z_C - picked_C, 0.0))
    total, slope_C1 = nll, 1.0
    if how.z_loss:
        total = nll + how.z_loss * first * jnp.sum(jnp.where(kept_C, log_z_C**2, 0.0))
        slope_C1 = 1.0 + 2 * how.z_loss * log_z_C1
    d_logits_CV = jnp.where(kept_C[:, None], slope_C1 * jnp.exp(logits_CV - log_z_C1) - hit_CV, 0.0)
    return jnp.stack([total, nll]), d_logits_CV
