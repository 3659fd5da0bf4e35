"""Attention block by block with an online softmax: no array grows with T * S.

FlashAttention-2 (Dao 2023, https://arxiv.org/abs/2307.08691) in plain JAX, so that it runs on any platform. Blocks of
queries meet blocks of keys; maximum, sum and output of the softmax are corrected as each block of keys arrives. The
derivative keeps the output and the log-sum-exp of each query and computes the scores anew. Pairs of blocks in which no
query sees any key are left out: which, is decided from the data, row by row.

Dimensions: B batch, T query time, S key slots, N query heads, K key/value heads, G = N / K, H head width,
I query blocks, J key blocks, P queries of a block, X = G * P, Y keys of a block.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

BLOCK = 256
"""Largest number of queries, and of keys, of a block."""
NEVER = 2**30
"""The order of keys that only fill up a block: no query sees them."""


class Place(NamedTuple):
    """What decides who sees whom: order and document of each token, [..., tokens]; one document where None."""

    order: jax.Array
    segment_ids: jax.Array | None


Kept = tuple[jax.Array, jax.Array, jax.Array, Place, Place, jax.Array, jax.Array]
"""q, k, v, their places, output and log-sum-exp."""


def visible(query: Place, key: Place, window: int | None) -> jax.Array:
    """[..., queries, keys], True where the query sees the key; see `attention`."""
    order, key_order = query.order[..., :, None], key.order[..., None, :]
    seen = key_order <= order
    if window is not None:
        seen &= key_order > order - window
    if query.segment_ids is not None and key.segment_ids is not None:
        seen &= query.segment_ids[..., :, None] == key.segment_ids[..., None, :]
    return seen


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def blockwise_attention(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, query_BT: Place, key_BS: Place, window: int | None
) -> jax.Array:
    """Softmax attention as `attention` defines it, in memory of the order of q, k and v.

    Products take the inputs' dtype and are added up in float32; the softmax is float32.

    Args:
      q_BTNH: queries; N is a multiple of K.
      k_BSKH: keys, of q's dtype.
      v_BSKH: values, of q's dtype.
      query_BT: order, below 2 ** 30 in size, and documents of the queries.
      key_BS: the same of the keys.
      window: how far back a query sees, its own token included; None for no limit.

    Returns:
      out_BTNH in q's dtype; zero for a query that sees no key.
    """
    return _forward(q_BTNH, k_BSKH, v_BSKH, query_BT, key_BS, window)[0]


def _forward(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, query_BT: Place, key_BS: Place, window: int | None
) -> tuple[jax.Array, jax.Array]:
    """The output and, by block of queries, the log-sum-exp of the scores."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    queries, keys = _query_blocks(query_BT), _key_blocks(key_BS)
    k_BJKYH, v_BJKYH = _split_keys(k_BSKH), _split_keys(v_BSKH)

    def block(x: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
        q_KXH, query_P, b, partners_J, count = x

        def meet(n: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            peak_KX, total_KX, out_KXH = carry
            j = partners_J[n]
            scores_KXY = _scores(q_KXH, k_BJKYH[b, j], query_P, _at(keys, (b, j)), window)
            higher_KX = jnp.maximum(peak_KX, scores_KXY.max(axis=2))
            shrink_KX = jnp.exp(peak_KX - higher_KX)
            weight_KXY = jnp.exp(scores_KXY - higher_KX[:, :, None])
            total_KX = total_KX * shrink_KX + weight_KXY.sum(axis=2)
            part_KXH = _dot("KXY,KYH->KXH", weight_KXY.astype(q_KXH.dtype), v_BJKYH[b, j])
            return higher_KX, total_KX, out_KXH * shrink_KX[:, :, None] + part_KXH

        # The peak starts finite and invisible scores are -inf: where no key is seen, weights are 0 and never NaN.
        start_KX = jnp.full(q_KXH.shape[:2], jnp.finfo(jnp.float32).min)
        zero_KXH = jnp.zeros(q_KXH.shape, jnp.float32)
        peak_KX, total_KX, out_KXH = lax.fori_loop(0, count, meet, (start_KX, jnp.zeros_like(start_KX), zero_KXH))
        total_KX = jnp.where(total_KX == 0, 1, total_KX)
        return (out_KXH / total_KX[:, :, None]).astype(q_BTNH.dtype), peak_KX + jnp.log(total_KX)

    blocks = (_split_queries(q_BTNH, K), *_flat((queries, *_rows_and_partners(queries, keys, window))))
    out, lse = lax.map(block, blocks)
    return _join_queries(out, (B, T, N, H)), lse


def _forward_and_keep(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, query_BT: Place, key_BS: Place, window: int | None
) -> tuple[jax.Array, Kept]:
    out_BTNH, lse = _forward(q_BTNH, k_BSKH, v_BSKH, query_BT, key_BS, window)
    return out_BTNH, (q_BTNH, k_BSKH, v_BSKH, query_BT, key_BS, out_BTNH, lse)


def _backward(
    window: int | None, kept: Kept, dout_BTNH: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None, None]:
    q_BTNH, k_BSKH, v_BSKH, query_BT, key_BS, out_BTNH, lse = kept
    K, H, dtype = *k_BSKH.shape[2:], q_BTNH.dtype
    queries, keys = _query_blocks(query_BT), _key_blocks(key_BS)
    k_BJKYH, v_BJKYH = _split_keys(k_BSKH), _split_keys(v_BSKH)
    mean_BTN1 = jnp.sum(dout_BTNH.astype(jnp.float32) * out_BTNH.astype(jnp.float32), axis=-1, keepdims=True)

    def block(sums: tuple[jax.Array, ...], x: tuple[Any, ...]) -> tuple[tuple[jax.Array, ...], jax.Array]:
        q_KXH, dout_KXH, mean_KX1, lse_KX, query_P, b, partners_J, count = x

        def meet(n: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            dq_KXH, dk_BJKYH, dv_BJKYH = carry
            j = partners_J[n]
            k_KYH, v_KYH = k_BJKYH[b, j], v_BJKYH[b, j]
            scores_KXY = _scores(q_KXH, k_KYH, query_P, _at(keys, (b, j)), window)
            weight_KXY = jnp.exp(scores_KXY - lse_KX[:, :, None])
            dweight_KXY = _dot("KXH,KYH->KXY", dout_KXH, v_KYH)
            dscores_KXY = (weight_KXY * (dweight_KXY - mean_KX1)).astype(dtype)
            dq_KXH += _dot("KXY,KYH->KXH", dscores_KXY, k_KYH)
            dk_BJKYH = dk_BJKYH.at[b, j].add(_dot("KXY,KXH->KYH", dscores_KXY, q_KXH))
            dv_BJKYH = dv_BJKYH.at[b, j].add(_dot("KXY,KXH->KYH", weight_KXY.astype(dtype), dout_KXH))
            return dq_KXH, dk_BJKYH, dv_BJKYH

        dq_KXH, *more = lax.fori_loop(0, count, meet, (jnp.zeros(q_KXH.shape, jnp.float32), *sums))
        return tuple(more), (dq_KXH * H**-0.5).astype(dtype)

    blocks = (
        *(_split_queries(x, K) for x in (q_BTNH, dout_BTNH, mean_BTN1)), lse,
        *_flat((queries, *_rows_and_partners(queries, keys, window))),
    )
    zero_BJKYH = jnp.zeros(k_BJKYH.shape, jnp.float32)
    (dk_BJKYH, dv_BJKYH), dq = lax.scan(block, (zero_BJKYH, zero_BJKYH), blocks)
    dk_BSKH = _join_keys((dk_BJKYH * H**-0.5).astype(dtype), k_BSKH.shape)
    return _join_queries(dq, q_BTNH.shape), dk_BSKH, _join_keys(dv_BJKYH.astype(dtype), v_BSKH.shape), None, None


blockwise_attention.defvjp(_forward_and_keep, _backward)


def _dot(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, x, y, preferred_element_type=jnp.float32)


def _scores(q_KXH: jax.Array, k_KYH: jax.Array, query_P: Place, key_Y: Place, window: int | None) -> jax.Array:
    """Scaled scores [K, X, Y]; -inf where the key is not visible."""
    K, X, H = q_KXH.shape
    seen_PY = visible(query_P, key_Y, window)
    scores_KGPY = _dot("KXH,KYH->KXY", q_KXH, k_KYH).reshape(K, -1, *seen_PY.shape) * H**-0.5
    return jnp.where(seen_PY, scores_KGPY, -jnp.inf).reshape(K, X, -1)


def _rows_and_partners(query_BIP: Place, key_BJY: Place, window: int | None) -> tuple[jax.Array, ...]:
    """For each block of queries its row [B, I], the key blocks it may see, foremost in [B, I, J], and their number.

    Decided by the ranges of order and segment id in each block, so a block may be met in vain but never missed.
    """

    def ranges(query_BIP: jax.Array, key_BJY: jax.Array) -> tuple[jax.Array, ...]:
        q_BI1, k_B1J = query_BIP[:, :, None], key_BJY[:, None]
        return q_BI1.min(-1), q_BI1.max(-1), k_B1J.min(-1), k_B1J.max(-1)

    q_min, q_max, k_min, k_max = ranges(query_BIP.order, key_BJY.order)
    may_BIJ = k_min <= q_max
    if window is not None:
        may_BIJ &= k_max > q_min - window
    if query_BIP.segment_ids is not None and key_BJY.segment_ids is not None:
        q_min, q_max, k_min, k_max = ranges(query_BIP.segment_ids, key_BJY.segment_ids)
        may_BIJ &= (k_min <= q_max) & (q_min <= k_max)
    row_BI = jnp.broadcast_to(jnp.arange(may_BIJ.shape[0])[:, None], may_BIJ.shape[:2])
    return row_BI, jnp.argsort(~may_BIJ, axis=-1, stable=True), may_BIJ.sum(-1)


def _block_size(length: int) -> int:
    """Blocks of equal size, a multiple of 16 no greater than BLOCK, that fill up little."""
    blocks = -(-length // BLOCK)
    return 16 * -(-length // (16 * blocks))


def _split(x_BT: jax.Array, **pad: Any) -> jax.Array:
    """[B, T, ...] -> [B, blocks, tokens of a block, ...]."""
    B, T = x_BT.shape[:2]
    P = _block_size(T)
    padding = [(0, 0), (0, -T % P)] + [(0, 0)] * (x_BT.ndim - 2)
    return jnp.pad(x_BT, padding, **pad).reshape(B, -1, P, *x_BT.shape[2:])


def _query_blocks(query_BT: Place) -> Place:
    return jax.tree.map(partial(_split, mode="edge"), query_BT)


def _key_blocks(key_BS: Place) -> Place:
    segment_ids = None if key_BS.segment_ids is None else _split(key_BS.segment_ids, mode="edge")
    return Place(_split(key_BS.order, constant_values=NEVER), segment_ids)


def _split_queries(x_BTNH: jax.Array, K: int) -> jax.Array:
    """[B, T, N, H] -> [B * I, K, X, H]: the query heads of one key head are rows of one product."""
    x_BIPNH = _split(x_BTNH)
    *_, P, N, H = x_BIPNH.shape
    return x_BIPNH.reshape(-1, P, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(-1, K, N // K * P, H)


def _join_queries(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    B, T, N, H = shape
    K, P = x.shape[1], _block_size(T)
    x_BTNH = x.reshape(-1, K, N // K, P, H).transpose(0, 3, 1, 2, 4).reshape(B, -1, N, H)
    return x_BTNH[:, :T]


def _split_keys(x_BSKH: jax.Array) -> jax.Array:
    return _split(x_BSKH).swapaxes(2, 3)


def _join_keys(x_BJKYH: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    B, S, K, H = shape
    return x_BJKYH.swapaxes(2, 3).reshape(B, -1, K, H)[:, :S]


def _flat(tree: Any) -> Any:
    """[B, I, ...] -> [B * I, ...]."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)


def _at(place: Place, index: tuple[Any, ...]) -> Place:
    return jax.tree.map(lambda x: x[index], place)
