"""Log-probabilities of given tokens, by a model's hidden states and output matrix: the one scorer.

Logits exist for one chunk of tokens at a time, forward and backward.

Dimensions: B batch, T time, D width, V vocabulary (of one device where it is split), M = B * T tokens, X chunks of C
tokens each.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from lfm_jax.kernels.linear import linear
from lfm_jax.sharding import FSDP, axis_names, is_sharded, over_mesh, spec_of, whole
from lfm_jax.weight_kinds import WeightKind, pull_back

CHUNK = 512
"""Tokens of a chunk, on each device."""


class Scores(NamedTuple):
    """What is known of each target."""

    logprob_BT: jax.Array
    """Its log-probability in nats, float32; 0 where there is no target."""
    likeliest_BT: jax.Array
    """The token with the largest logit at its place, the first of several, int32; carries no gradient."""


def token_logprobs(
    hidden_BTD: jax.Array, table_VD: jax.Array | WeightKind, targets_BT: jax.Array, *, chunk: int = CHUNK,
    temperature: float = 1.0,
) -> jax.Array:
    """Log-probability of each target, in nats, float32 [B, T]; 0 where the target is negative (`LOSS_IGNORE`).

    Works on `chunk` tokens at a time on each device, so the largest array is [chunk, V] float32. The derivative takes a
    cotangent for each target and makes the logits of a chunk again: four matrix products, where `train.loss` has three
    for a sum of all targets alike.

    Over a mesh every device works on its own tokens, and on its own part of the vocabulary where that is split
    (`tensor`): of the logits a few numbers a token are exchanged, and the gradient of hidden is summed.

    Args:
      hidden_BTD: normed hidden states.
      table_VD: output matrix, one row a token id; multiplied in the dtype of hidden.
      targets_BT: token ids, int32.
      chunk: tokens per chunk.
      temperature: divides the logits, as in sampling.

    Raises:
      ValueError: chunk below 1, or a temperature that is not above 0.
    """
    return token_scores(hidden_BTD, table_VD, targets_BT, chunk=chunk, temperature=temperature).logprob_BT


def token_scores(
    hidden_BTD: jax.Array, table_VD: jax.Array | WeightKind, targets_BT: jax.Array, *, chunk: int = CHUNK,
    temperature: float = 1.0,
) -> Scores:
    """`token_logprobs`, and the likeliest token beside each target."""
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be above 0")

    def score(
        hidden_BTD: jax.Array, table_VD: jax.Array | WeightKind, targets_BT: jax.Array, vocab: str | None = None
    ) -> tuple[jax.Array, jax.Array]:
        hidden_XCD, targets_XC = split(hidden_BTD, targets_BT, chunk)
        found = _scores(hidden_XCD, table_VD, targets_XC, _How(vocab, temperature))
        share_BT, likeliest_BT = (x.reshape(-1)[: targets_BT.size].reshape(targets_BT.shape) for x in found)
        return share_BT if vocab is None else jax.lax.psum(share_BT, vocab), likeliest_BT

    if not is_sharded(hidden_BTD):
        return Scores(*score(hidden_BTD, table_VD, targets_BT))
    args, specs, (_, vocab) = on_mesh(hidden_BTD, table_VD, targets_BT)
    out = specs["targets_BT"]
    return Scores(*over_mesh(partial(score, vocab=vocab), args, specs, (out, out)))


# -------------------------------------------------------------------- what `train.loss` shares


class Chunk(NamedTuple):
    """The logits of a chunk, on one device, and their normaliser: log Z = base + log_sum, over all devices."""

    logits_CV: jax.Array
    hit_CV: jax.Array
    """bool, where the target is."""
    kept_C: jax.Array
    """bool, whether there is one."""
    base_C1: jax.Array
    log_sum_C1: jax.Array
    first_id: jax.Array | int
    """Token id of the first column."""
    first: jax.Array | float
    """1 on the first of the devices that share the vocabulary, 0 on the others: what only one of them is to count."""


def score_chunk(
    hidden_CD: jax.Array, table_VD: jax.Array | WeightKind, targets_C: jax.Array, vocab: str | None,
    temperature: float = 1.0,
) -> Chunk:
    """Logits over the temperature, and normaliser; `vocab` is the mesh axis that the vocabulary is split over."""
    logits_CV = linear(hidden_CD, table_VD, dtype="float32", impl="dot")
    if temperature != 1:
        logits_CV = logits_CV / temperature
    base_C1 = jnp.max(logits_CV, axis=-1, keepdims=True)
    log_sum_C1 = jnp.log(jnp.sum(jnp.exp(logits_CV - base_C1), axis=-1, keepdims=True))
    ids_V, first_id, first = jnp.arange(logits_CV.shape[-1]), 0, 1.0
    if vocab is not None:
        log_z_C1 = base_C1 + log_sum_C1
        base_C1 = jax.lax.pmax(log_z_C1, vocab)
        log_sum_C1 = jnp.log(jax.lax.psum(jnp.exp(log_z_C1 - base_C1), vocab))
        first_id = jax.lax.axis_index(vocab) * ids_V.shape[0]
        first = jnp.where(jax.lax.axis_index(vocab) == 0, 1.0, 0.0)
    # An iota comparison instead of a gather: it fuses, and it works with the vocabulary split.
    hit_CV = first_id + ids_V == targets_C[:, None]
    return Chunk(logits_CV, hit_CV, targets_C >= 0, base_C1, log_sum_C1, first_id, first)


def chunk_gradients(
    d_logits_CV: jax.Array, hidden_CD: jax.Array, table_VD: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Gradients by hidden, in its dtype, and by the table, in float32."""
    d_logits_CV = d_logits_CV.astype(hidden_CD.dtype)
    d_table_VD = jnp.einsum("CV,CD->VD", d_logits_CV, hidden_CD, preferred_element_type=jnp.float32)
    return d_logits_CV @ table_VD, d_table_VD


def split(hidden_BTD: jax.Array, targets_BT: jax.Array, chunk: int) -> tuple[jax.Array, jax.Array]:
    """(hidden_XCD, targets_XC): all tokens in chunks of at most `chunk`, the last one filled up without targets.

    Raises:
      ValueError: chunk below 1.
    """
    if chunk < 1:
        raise ValueError(f"chunk is {chunk}; it must be at least 1 token")
    chunk = min(chunk, targets_BT.size)
    short = -targets_BT.size % chunk
    hidden_MD = jnp.pad(hidden_BTD.reshape(-1, hidden_BTD.shape[-1]), ((0, short), (0, 0)))
    targets_M = jnp.pad(targets_BT.reshape(-1), (0, short), constant_values=-1)
    return hidden_MD.reshape(-1, chunk, hidden_MD.shape[-1]), targets_M.reshape(-1, chunk)


def on_mesh(
    hidden_BTD: jax.Array, table_VD: jax.Array | WeightKind, targets_BT: jax.Array
) -> tuple[dict[str, jax.Array], dict[str, P], tuple[tuple[str, ...], str | None]]:
    """For `over_mesh`: arguments, their layouts, and the mesh axes that split (tokens, vocabulary).

    A `WeightKind` is turned into its array first, because its fields may be split in other ways.
    """
    table_VD = whole(table_VD.astype(hidden_BTD.dtype), FSDP)
    (b, t, _), v = spec_of(hidden_BTD), spec_of(table_VD)[0]
    args = dict(hidden_BTD=hidden_BTD, table_VD=table_VD, targets_BT=targets_BT)
    specs = dict(hidden_BTD=P(b, t, None), table_VD=P(v, None), targets_BT=P(b, t))
    vocab = axis_names(v)
    return args, specs, (axis_names((b, t)), vocab[0] if vocab else None)


# -------------------------------------------------------------------- with a derivative


class _How(NamedTuple):
    """What of the arguments is not an array."""

    vocab: str | None
    """The mesh axis that the vocabulary is split over."""
    temperature: float


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _scores(
    hidden_XCD: jax.Array, table_VD: jax.Array | WeightKind, targets_XC: jax.Array, how: _How
) -> tuple[jax.Array, jax.Array]:
    """(log-probability, likeliest token), [X, C]; with the vocabulary split, this device's share of the former."""

    def step(_: None, inputs: tuple[jax.Array, jax.Array]) -> tuple[None, tuple[jax.Array, jax.Array]]:
        hidden_CD, targets_C = inputs
        found = score_chunk(hidden_CD, table, targets_C, *how)
        shifted_CV = found.logits_CV - found.base_C1
        share_C = jnp.sum(jnp.where(found.hit_CV, shifted_CV, 0.0), axis=-1) - found.first * found.log_sum_C1[:, 0]
        return None, (jnp.where(found.kept_C, share_C, 0.0), _likeliest(found, how.vocab))

    table = as_used(table_VD, hidden_XCD.dtype)
    return jax.lax.scan(step, None, (hidden_XCD, targets_XC))[1]


def as_used(table_VD: jax.Array | WeightKind, dtype: jnp.dtype) -> jax.Array | WeightKind:
    """The table in the dtype of products, once for all chunks; a kind as it is."""
    return table_VD if isinstance(table_VD, WeightKind) else table_VD.astype(dtype)


def _likeliest(found: Chunk, vocab: str | None) -> jax.Array:
    id_C = jnp.argmax(found.logits_CV, axis=-1).astype(jnp.int32) + found.first_id
    if vocab is None:
        return id_C
    largest_C = jnp.max(found.logits_CV, axis=-1)
    best_C = largest_C == jax.lax.pmax(largest_C, vocab)
    return jax.lax.pmin(jnp.where(best_C, id_C, jnp.iinfo(jnp.int32).max), vocab)


def _scores_fwd(
    hidden_XCD: jax.Array, table_VD: jax.Array | WeightKind, targets_XC: jax.Array, how: _How
) -> tuple[Any, Any]:
    return _scores(hidden_XCD, table_VD, targets_XC, how), (hidden_XCD, table_VD, targets_XC)


def _scores_bwd(how: _How, kept: tuple[Any, ...], g: tuple[jax.Array, Any]) -> tuple[jax.Array, Any, None]:
    hidden_XCD, table_VD, targets_XC = kept
    table, array_VD = as_used(table_VD, hidden_XCD.dtype), table_VD.astype(hidden_XCD.dtype)

    def step(d_table_VD: jax.Array, inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        hidden_CD, targets_C, g_C = inputs
        found = score_chunk(hidden_CD, table, targets_C, *how)
        p_CV = jnp.exp(found.logits_CV - found.base_C1 - found.log_sum_C1)
        g_C = jnp.where(found.kept_C, g_C / how.temperature, 0.0)
        d_logits_CV = g_C[:, None] * (found.hit_CV - p_CV)
        d_hidden_CD, more_VD = chunk_gradients(d_logits_CV, hidden_CD, array_VD)
        return d_table_VD + more_VD, d_hidden_CD

    start = jnp.zeros(table_VD.shape, jnp.float32)
    d_table_VD, d_hidden_XCD = jax.lax.scan(step, start, (hidden_XCD, targets_XC, g[0]))
    return d_hidden_XCD, pull_back(table_VD, d_table_VD.astype(table_VD.dtype)), None


_scores.defvjp(_scores_fwd, _scores_bwd)
