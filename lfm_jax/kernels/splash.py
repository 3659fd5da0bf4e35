"""Causal self-attention by JAX's Pallas kernel for TPU (`jax.experimental.pallas.ops.tpu.splash_attention`).

Dimensions: B batch, T time, N query heads, K key/value heads, H head width.
"""

from __future__ import annotations

from typing import cast

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

LANES = 128
BLOCK = 512
"""Queries, and keys, of a block where T allows."""


def splash_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array | None,
    key_segment_ids_BT: jax.Array | None,
    window: int | None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Softmax attention of each token to itself and the tokens before it, as `attention` defines it.

    Rows are filled up to whole blocks at their right end, where no real token looks. On a TPU bfloat16 does not compile
    under `jax_default_matmul_precision=highest`: Mosaic refuses it.

    Args:
      q_BTNH: queries; N is a multiple of K.
      k_BTKH: keys, of q's dtype.
      v_BTKH: values, of q's dtype.
      segment_ids_BT: document of each token; None for one document a row.
      key_segment_ids_BT: the same ids (over a mesh they come as two arrays); None exactly when `segment_ids_BT` is.
      window: how far back a token sees, itself included; None for no limit.
      interpret: run the kernel without a TPU, slowly.

    Returns:
      out_BTNH in q's dtype.
    """
    _, T, N, H = q_BTNH.shape
    fill = -T % (BLOCK if T > BLOCK else LANES)

    def heads_first(x_BTNH: jax.Array) -> jax.Array:
        return jnp.pad(x_BTNH, ((0, 0), (0, fill), (0, 0), (0, 0))).swapaxes(1, 2)

    q_BNTH = heads_first((q_BTNH.astype(jnp.float32) * H**-0.5).astype(q_BTNH.dtype))
    ids_BT = None
    if segment_ids_BT is not None and key_segment_ids_BT is not None:
        fill_ids = ((0, 0), (0, fill))
        ids_BT = kernel.SegmentIds(*(jnp.pad(ids, fill_ids) for ids in (segment_ids_BT, key_segment_ids_BT)))
    attend = jax.vmap(_kernel(T + fill, N, window, interpret))
    out_BNTH = cast(jax.Array, attend(q_BNTH, heads_first(k_BTKH), heads_first(v_BTKH), ids_BT))
    return out_BNTH.swapaxes(1, 2)[:, :T]


def _kernel(T: int, N: int, window: int | None, interpret: bool) -> kernel.SplashAttentionKernel:
    shape, block = (T, T), min(T, BLOCK)
    mask = masks.CausalMask(shape) if window is None else masks.LocalMask(shape, (window - 1, 0), offset=0)
    blocks = kernel.BlockSizes(
        block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block, block_kv_dq=block
    )
    return kernel.make_splash_mha(
        masks.MultiHeadMask([mask] * N), block_sizes=blocks, head_shards=1, q_seq_shards=1, interpret=interpret
    )
