"""cuDNN's flash attention for NVIDIA GPUs, with documents and with any mask.

Dimensions: B batch, T query time, S key slots, N query heads, K key/value heads, H head width, X blocks of C tokens,
R runs that start in a block.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lfm_jax.kernels.blockwise_attention import Place, blockwise_attention, visible
from lfm_jax.sharding import HOPPER, nvidia_capability

SHORT = 512
"""Tokens of a document below which all documents go together."""
SHORT_RUNS = 8
"""How many of those may start in a block as long as the longest of them."""
MASK_BYTES = 2**31
"""Bytes of a mask, 2 * B * T * S, above which `blockwise` takes what would need one."""


def attend_rows(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, ids_BT: jax.Array | None, key_ids_BT: jax.Array | None,
    window: int | None, causal: bool, sequences: bool = True,
) -> jax.Array:
    """Self-attention of whole rows; see `attention.attention`.

    Documents are sequences of their own to cuDNN, and what no token sees takes no time, where each document (and each
    stretch of padding) is one run of tokens and short ones are not crowded (`levels`), as in packed training data.
    Other rows, and GPUs before Hopper, get a mask. Which of the two a batch takes is decided on the device.

    Args:
      sequences: False: documents get a mask in any case.
    """
    if ids_BT is None or key_ids_BT is None:
        # Its left window leaves the query's own token out.
        return jax.nn.dot_product_attention(
            q_BTNH, k_BTKH, v_BTKH, is_causal=causal, local_window_size=None if window is None else (window - 1, 0),
            implementation="cudnn",
        )
    arrays = q_BTNH, k_BTKH, v_BTKH, ids_BT, key_ids_BT
    # Its derivative makes everything again: a branch that is not taken keeps its memory too.
    by_mask = jax.checkpoint(functools.partial(_by_mask, window=window, causal=causal))
    # Where a sequence begins is told in numbers of q, by int32.
    sizes = levels(ids_BT.shape[1]) if q_BTNH.size < 2**31 else []
    if nvidia_capability() < HOPPER or not sizes or not sequences:
        return by_mask(*arrays)
    level_BT, fits = run_levels(ids_BT, sizes)
    by_runs = functools.partial(_by_runs, level_BT=level_BT, sizes=sizes, window=window, causal=causal)
    return lax.cond(fits & jnp.all(ids_BT == key_ids_BT), by_runs, by_mask, *arrays)


def attend_masked(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, visible_BTS: jax.Array, causal: bool = False
) -> jax.Array:
    """Any mask, added to the scores: 2 * B * T * S bytes. T and S are even.

    Args:
      causal: the mask hides every later key, as cuDNN may know.
    """
    return jax.nn.dot_product_attention(
        q_BTNH, k_BSKH, v_BSKH, mask=visible_BTS[:, None], is_causal=causal, implementation="cudnn"
    )


def _by_mask(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, ids_BT: jax.Array, key_ids_BT: jax.Array, *,
    window: int | None, causal: bool,
) -> jax.Array:
    B, T = ids_BT.shape
    order_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32) if causal else jnp.int32(0), (B, T))
    query_BT, key_BT = Place(order_BT, ids_BT), Place(order_BT, key_ids_BT)
    if T % 2 or 2 * B * T * T > MASK_BYTES:  # With a mask cuDNN's derivative takes even numbers of tokens only.
        return blockwise_attention(q_BTNH, k_BTKH, v_BTKH, query_BT, key_BT, window)
    return attend_masked(q_BTNH, k_BTKH, v_BTKH, visible(query_BT, key_BT, window), causal)


# ----------------------------------------------------------------------------------------------- documents as sequences
#
# For the derivative cuDNN takes memory of (most sequences) x (longest sequence) x N H numbers in float32, twice: with
# 64 documents in each of 8 rows of 4,096 tokens 17 GB. But few documents can be long. So documents of similar length
# go together: to those of up to C tokens the batch is shown as rows of C tokens, in each of which few can start.


def levels(T: int) -> list[tuple[int, int]]:
    """(C, R) for each group of lengths, the longest first: documents of up to C tokens, of which R start in C tokens.

    The documents of a group are longer than the next one's C, which is a quarter: at most 4 start in C tokens. Only
    the last group's number is a condition. Empty where T cannot be divided so.
    """
    found = []
    C = T
    while C > SHORT:
        found.append((C, 4))
        if C % 8:
            return []
        C //= 4
    return [*found, (C, SHORT_RUNS)] if C > 1 else []


def run_levels(ids_BT: jax.Array, sizes: list[tuple[int, int]]) -> tuple[jax.Array, jax.Array]:
    """The level of each token's run, int32 [B, T], and whether runs are documents and no block is crowded, bool []."""
    B, T = ids_BT.shape
    starts_BT, length_BT = _starts(ids_BT), _lengths(ids_BT)
    before_BT = jnp.pad(lax.cummax(ids_BT, axis=1), ((0, 0), (1, 0)))[:, :-1]
    whole = jnp.all(~starts_BT | (ids_BT == 0) | (ids_BT > before_BT))
    level_BT = sum((length_BT <= C).astype(jnp.int32) for C, _ in sizes[1:]) + jnp.zeros((B, T), jnp.int32)
    C, R = sizes[-1]
    crowd = jnp.sum((starts_BT & (level_BT == len(sizes) - 1)).reshape(-1, C), axis=1)
    return level_BT, whole & jnp.all(crowd <= R)


def _starts(ids_BT: jax.Array) -> jax.Array:
    return jnp.pad(ids_BT[:, 1:] != ids_BT[:, :-1], ((0, 0), (1, 0)), constant_values=True)


def _lengths(ids_BT: jax.Array) -> jax.Array:
    """Of each token's run."""
    T = ids_BT.shape[1]
    starts_BT, at_T = _starts(ids_BT), jnp.arange(T, dtype=jnp.int32)
    first_BT = lax.cummax(jnp.where(starts_BT, at_T, 0), axis=1)
    later_BT = jnp.pad(jnp.where(starts_BT, at_T, T)[:, 1:], ((0, 0), (0, 1)), constant_values=T)
    return lax.cummin(later_BT, axis=1, reverse=True) - first_BT


def sequences(starts_XC: jax.Array, length_XC: jax.Array, R: int) -> tuple[jax.Array, jax.Array]:
    """Where the runs that start in each of X blocks begin there, and their lengths: int32 [X, R + 1] and [X, R], -1
    where there is no further one."""
    C = starts_XC.shape[1]
    at_XR = jax.vmap(lambda starts_C: jnp.nonzero(starts_C, size=R, fill_value=C)[0])(starts_XC).astype(jnp.int32)
    length_XR = jnp.take_along_axis(length_XC, jnp.minimum(at_XR, C - 1), axis=1)
    none_XR = at_XR == C
    return jnp.pad(jnp.where(none_XR, -1, at_XR), ((0, 0), (0, 1)), constant_values=-1), jnp.where(
        none_XR, -1, length_XR)


def _by_runs(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, ids_BT: jax.Array, _: jax.Array, *, level_BT: jax.Array,
    sizes: list[tuple[int, int]], window: int | None, causal: bool,
) -> jax.Array:
    starts_BT, length_BT = _starts(ids_BT), _lengths(ids_BT)
    out_BTNH = jnp.zeros_like(q_BTNH)
    for level, (C, R) in enumerate(sizes):
        mine_BT = level_BT == level
        start_XR, length_XR = sequences((starts_BT & mine_BT).reshape(-1, C), length_BT.reshape(-1, C), R)
        # A block is where a run starts; it may end behind it, and cuDNN goes by addresses.
        q_XCNH, k_XCKH, v_XCKH = (
            _keep_gradient(x, mine_BT).reshape(-1, C, *x.shape[2:]) for x in (q_BTNH, k_BTKH, v_BTKH)
        )
        out_XCNH = _sequences_attention(q_XCNH, k_XCKH, v_XCKH, start_XR, length_XR, window, causal)
        # What is in no sequence is not written.
        out_BTNH = jnp.where(mine_BT[:, :, None, None], out_XCNH.reshape(q_BTNH.shape), out_BTNH)
    return out_BTNH


def _sequences_attention(
    q_XCNH: jax.Array, k_XCKH: jax.Array, v_XCKH: jax.Array, start_XR: jax.Array, length_XR: jax.Array,
    window: int | None, causal: bool,
) -> jax.Array:
    # `jax.nn` has no argument for sequences within a row; this function of JAX itself has.
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    attend: Callable[..., Any] = dot_product_attention  # Without `use_fp8` it returns the output alone.
    return attend(
        q_XCNH, k_XCKH, v_XCKH, q_seqlen=length_XR, kv_seqlen=length_XR, q_offsets=start_XR, kv_offsets=start_XR,
        scale=q_XCNH.shape[-1] ** -0.5, mask_type=MaskType.PADDING_CAUSAL if causal else MaskType.PADDING,
        sliding_window_length=window,
    )


@jax.custom_vjp
def _keep_gradient(x_BTNH: jax.Array, mine_BT: jax.Array) -> jax.Array:
    """x; its gradient is 0 where `mine_BT` is False, where cuDNN writes none."""
    return x_BTNH


def _keep_gradient_forward(x_BTNH: jax.Array, mine_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    return x_BTNH, mine_BT


def _keep_gradient_backward(mine_BT: jax.Array, dx_BTNH: jax.Array) -> tuple[jax.Array, None]:
    return jnp.where(mine_BT[:, :, None, None], dx_BTNH, 0), None


_keep_gradient.defvjp(_keep_gradient_forward, _keep_gradient_backward)
