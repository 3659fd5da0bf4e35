"""Log-probabilities of several given tokens at each place, and of all others together; and the likeliest tokens.

Like `kernels.logprobs`, whose chunks these are: logits exist for one chunk of tokens at a time, forward and backward.

Dimensions: B batch, T time, D width, V vocabulary (of one device where it is split), K given tokens, X chunks of C
places each.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from lfm_jax.kernels.logprobs import CHUNK, Chunk, as_used, chunk_gradients, on_mesh, score_chunk, split
from lfm_jax.sharding import is_sharded, over_mesh
from lfm_jax.weight_kinds import WeightKind, pull_back


class Several(NamedTuple):
    """What is known of each place, in nats, float32."""

    target_BT: jax.Array
    """The log-probability of its target; 0 where there is none."""
    given_BTK: jax.Array
    """Those of its given tokens."""
    rest_BT: jax.Array
    """That of all other tokens together, made from their own logits: near certainty it is no difference of two large
    numbers. Minus infinity where all of the vocabulary is given."""


class TopTokens(NamedTuple):
    """The likeliest tokens of each place, the likeliest first."""

    ids_BTK: jax.Array
    """int32."""
    logprobs_BTK: jax.Array
    """In nats, float32."""


def several_logprobs(
    hidden_BTD: jax.Array, table_VD: jax.Array | WeightKind, targets_BT: jax.Array, ids_BTK: jax.Array, *,
    chunk: int = CHUNK,
) -> Several:
    """Log-probabilities of a target and of K given tokens at each place, and of all tokens that are not given.

    As in `token_logprobs` the largest array is [chunk, V] float32, and the derivative makes the logits of a chunk
    again, once for all that is asked of them; over a mesh, tokens and vocabulary may be split.

    Args:
      hidden_BTD: normed hidden states.
      table_VD: output matrix, one row a token id; multiplied in the dtype of hidden.
      targets_BT: token ids, int32; negative where there is no target.
      ids_BTK: token ids, int32, those of a place distinct from each other.
      chunk: places per chunk.

    Raises:
      ValueError: chunk below 1.
    """

    def score(
        hidden_BTD: jax.Array, table_VD: jax.Array | WeightKind, targets_BT: jax.Array, ids_BTK: jax.Array,
        vocab: str | None = None,
    ) -> tuple[jax.Array, ...]:
        hidden_XCD, targets_XC = split(hidden_BTD, targets_BT, chunk)
        shares = _several(hidden_XCD, table_VD, targets_XC, _chunks(ids_BTK, targets_XC.shape), vocab)
        shares = [_places(x, targets_BT.shape) for x in shares]
        return tuple(shares if vocab is None else jax.lax.psum(shares, vocab))

    if not is_sharded(hidden_BTD):
        return Several(*score(hidden_BTD, table_VD, targets_BT, ids_BTK))
    args, specs, (_, vocab) = on_mesh(hidden_BTD, table_VD, targets_BT)
    b, t = specs["targets_BT"]
    args, specs = args | {"ids_BTK": ids_BTK}, specs | {"ids_BTK": P(b, t, None)}
    return Several(*over_mesh(partial(score, vocab=vocab), args, specs, (P(b, t), P(b, t, None), P(b, t))))


def top_tokens(
    hidden_BTD: jax.Array, table_VD: jax.Array | WeightKind, k: int, *, chunk: int = CHUNK
) -> TopTokens:
    """The k likeliest tokens of each place and their log-probabilities; carries no gradient.

    Of tokens that are as likely the one with the smaller id comes first. The largest array is [chunk, V] float32; over
    a mesh, tokens and vocabulary may be split.

    Raises:
      ValueError: chunk below 1, or k below 1 or above the size of the vocabulary.
    """
    if not 1 <= k <= table_VD.shape[0]:
        raise ValueError(f"k is {k}; it must be between 1 and {table_VD.shape[0]}, the tokens of the vocabulary")

    def search(
        hidden_BTD: jax.Array, table_VD: jax.Array | WeightKind, targets_BT: jax.Array, vocab: str | None = None
    ) -> tuple[jax.Array, jax.Array]:
        hidden_XCD, targets_XC = split(hidden_BTD, targets_BT, chunk)
        table = as_used(table_VD, hidden_XCD.dtype)
        best = partial(_best, k=k, vocab=vocab)
        found = jax.lax.map(lambda chunk: best(score_chunk(chunk[0], table, chunk[1], vocab)), (hidden_XCD, targets_XC))
        ids_BTK, logprobs_BTK = (_places(x, targets_BT.shape) for x in found)
        return ids_BTK, logprobs_BTK

    hidden_BTD, table_VD = jax.lax.stop_gradient((hidden_BTD, table_VD))
    targets_BT = jnp.zeros_like(hidden_BTD[:, :, 0], jnp.int32)
    if not is_sharded(hidden_BTD):
        return TopTokens(*search(hidden_BTD, table_VD, targets_BT))
    args, specs, (_, vocab) = on_mesh(hidden_BTD, table_VD, targets_BT)
    out = P(*specs["targets_BT"], None)
    return TopTokens(*over_mesh(partial(search, vocab=vocab), args, specs, (out, out)))


def _best(found: Chunk, *, k: int, vocab: str | None) -> tuple[jax.Array, jax.Array]:
    """(ids, log-probabilities), [C, k]. With the vocabulary split, each device brings its own best."""
    logits_CK, ids_CK = jax.lax.top_k(found.logits_CV, min(k, found.logits_CV.shape[1]))
    ids_CK = ids_CK + found.first_id
    if vocab is not None:
        logits_CK, ids_CK = (jax.lax.all_gather(x, vocab, axis=1, tiled=True) for x in (logits_CK, ids_CK))
        logits_CK, at_CK = jax.lax.top_k(logits_CK, k)
        ids_CK = jnp.take_along_axis(ids_CK, at_CK, axis=1)
    return ids_CK.astype(jnp.int32), logits_CK - found.base_C1 - found.log_sum_C1


def _chunks(ids_BTK: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """As `split` does with targets, [X, C, K]."""
    ids_MK = ids_BTK.reshape(-1, ids_BTK.shape[-1])
    return jnp.pad(ids_MK, ((0, shape[0] * shape[1] - len(ids_MK)), (0, 0))).reshape(*shape, -1)


def _places(x_XC: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Numbers of each place, [X, C, ...], as [B, T, ...]."""
    x_M = x_XC.reshape(-1, *x_XC.shape[2:])
    return x_M[: shape[0] * shape[1]].reshape(*shape, *x_M.shape[1:])


# -------------------------------------------------------------------- with a derivative


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _several(
    hidden_XCD: jax.Array, table_VD: jax.Array | WeightKind, targets_XC: jax.Array, ids_XCK: jax.Array,
    vocab: str | None,
) -> tuple[jax.Array, ...]:
    """The fields of `Several` by chunks; with the vocabulary split, this device's share of them."""

    def step(_: None, inputs: tuple[jax.Array, ...]) -> tuple[None, tuple[jax.Array, ...]]:
        hidden_CD, targets_C, ids_CK = inputs
        found = score_chunk(hidden_CD, table, targets_C, vocab)
        given = _given(found, ids_CK, vocab)
        shifted_CV, log_sum_C1 = found.logits_CV - found.base_C1, found.first * found.log_sum_C1
        target_C = jnp.sum(jnp.where(found.hit_CV, shifted_CV, 0.0), axis=-1) - log_sum_C1[:, 0]
        shifted_CK = jnp.take_along_axis(shifted_CV, given.columns_CK, axis=1)
        given_CK = jnp.where(given.here_CK, shifted_CK, 0.0) - log_sum_C1
        rest_C = jnp.where(found.first > 0, given.rest_C1[:, 0] - found.log_sum_C1[:, 0], 0.0)
        return None, (jnp.where(found.kept_C, target_C, 0.0), given_CK, rest_C)

    table = as_used(table_VD, hidden_XCD.dtype)
    return jax.lax.scan(step, None, (hidden_XCD, targets_XC, ids_XCK))[1]


class _Given(NamedTuple):
    """Where the given tokens of a chunk stand, and what the others come to."""

    columns_CK: jax.Array
    """Their columns on this device; column 0 where another device has them."""
    here_CK: jax.Array
    """bool, whether this device has them."""
    is_rest_CV: jax.Array
    """bool, the columns of the other tokens."""
    rest_C1: jax.Array
    """log of the sum of `exp(logit - base)` over the other tokens of all devices."""


def _given(found: Chunk, ids_CK: jax.Array, vocab: str | None) -> _Given:
    C, V = found.logits_CV.shape
    columns_CK = ids_CK - found.first_id
    here_CK = (columns_CK >= 0) & (columns_CK < V)
    dropped_CK = jnp.where(here_CK, columns_CK, V)
    is_rest_CV = jnp.ones((C, V), bool).at[jnp.arange(C)[:, None], dropped_CK].set(False, mode="drop")
    rest_CV = jnp.where(is_rest_CV, found.logits_CV - found.base_C1, -jnp.inf)
    rest_C1 = jax.nn.logsumexp(rest_CV, axis=-1, keepdims=True)
    if vocab is not None:
        rest_C1 = jax.nn.logsumexp(jax.lax.all_gather(rest_C1, vocab, axis=1, tiled=True), axis=1, keepdims=True)
    return _Given(jnp.where(here_CK, columns_CK, 0), here_CK, is_rest_CV, rest_C1)


def _several_fwd(
    hidden_XCD: jax.Array, table_VD: jax.Array | WeightKind, targets_XC: jax.Array, ids_XCK: jax.Array,
    vocab: str | None,
) -> tuple[Any, Any]:
    return _several(hidden_XCD, table_VD, targets_XC, ids_XCK, vocab), (hidden_XCD, table_VD, targets_XC, ids_XCK)


def _several_bwd(vocab: str | None, kept: tuple[Any, ...], g: tuple[jax.Array, ...]) -> tuple[Any, ...]:
    hidden_XCD, table_VD, targets_XC, ids_XCK = kept
    table, array_VD = as_used(table_VD, hidden_XCD.dtype), table_VD.astype(hidden_XCD.dtype)

    def step(d_table_VD: jax.Array, inputs: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
        hidden_CD, targets_C, ids_CK, g = inputs
        found = score_chunk(hidden_CD, table, targets_C, vocab)
        d_logits_CV = _logits_gradient(found, _given(found, ids_CK, vocab), *g)
        d_hidden_CD, more_VD = chunk_gradients(d_logits_CV, hidden_CD, array_VD)
        return d_table_VD + more_VD, d_hidden_CD

    start = jnp.zeros(table_VD.shape, jnp.float32)
    d_table_VD, d_hidden_XCD = jax.lax.scan(step, start, (hidden_XCD, targets_XC, ids_XCK, g))
    return d_hidden_XCD, pull_back(table_VD, d_table_VD.astype(table_VD.dtype)), None, None


def _logits_gradient(
    found: Chunk, given: _Given, g_target_C: jax.Array, g_given_CK: jax.Array, g_rest_C: jax.Array
) -> jax.Array:
    """By this device's logits, [C, V]: what each asks for itself, less its probability of all that is asked for."""
    shifted_CV = found.logits_CV - found.base_C1
    g_target_C1, g_rest_C1 = jnp.where(found.kept_C, g_target_C, 0.0)[:, None], g_rest_C[:, None]
    among_rest_CV = jnp.where(given.is_rest_CV, jnp.exp(shifted_CV - given.rest_C1), 0.0)
    asked_C1 = g_target_C1 + jnp.sum(g_given_CK, axis=1, keepdims=True) + g_rest_C1
    d_logits_CV = (
        g_target_C1 * found.hit_CV + g_rest_C1 * among_rest_CV - asked_C1 * jnp.exp(shifted_CV - found.log_sum_C1)
    )
    rows_C1 = jnp.arange(len(shifted_CV))[:, None]
    return d_logits_CV.at[rows_C1, given.columns_CK].add(jnp.where(given.here_CK, g_given_CK, 0.0))


_several.defvjp(_several_fwd, _several_bwd)
