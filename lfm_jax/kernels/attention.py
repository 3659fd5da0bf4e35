"""Grouped-query attention, causal or over whole documents, with documents, windows and key slots in any order.

Dimensions: B batch, T query time, S key slots, N query heads, K key/value heads, G = N / K, H head width.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lfm_jax.kernels import cudnn_attention
from lfm_jax.kernels.blockwise_attention import Place, blockwise_attention, visible
from lfm_jax.kernels.int8_slots import Int8Slots
from lfm_jax.sharding import AMPERE, nvidia_capability, platform

IMPLS = ("xla", "direct", "blockwise", "splash", "cudnn")
SCORE_BYTES = 2**30
"""Bytes of float32 scores, 4 * B * N * T * S, above which `auto` never takes `xla`, which holds two or three such."""
CPU_QUERIES, CPU_SCORES = 32, 2**16
"""T and T * S from which `blockwise` is the faster one on a CPU (docs/measurements/kernels.md)."""

MASKED_PAIRS = 2**20
"""B * T * S from which cuDNN with a mask over key slots beats `xla` on an H200 (docs/measurements/kernels.md)."""
DECODE_IMPLS = ("xla", "direct", "pallas_gpu")
"""Of `decode_attention`."""
DIRECT_KEYS = 64
"""Key slots that `direct` meets at one time."""


def attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    order_BT: jax.Array | None = None,
    key_order_BS: jax.Array | None = None,
    segment_ids_BT: jax.Array | None = None,
    key_segment_ids_BS: jax.Array | None = None,
    window: int | None = None,
    causal: bool = True,
    impl: str = "auto",
    interpret: bool = False,
) -> jax.Array:
    """Softmax attention, scale H ** -0.5, softmax in float32.

    A key is visible to a query when `key_order <= order`, `order - key_order < window` and both belong to the same
    document; without `causal`, when both belong to the same document. The value of a key that is not visible meets the
    weight 0: it must be finite.

    Args:
      q_BTNH: queries; N is a multiple of K.
      k_BSKH: keys, of q's dtype.
      v_BSKH: values, of q's dtype.
      order_BT: int32 below 2 ** 30 in size, place of each query in its row; None for 0 .. T - 1.
      key_order_BS: the same of each key; None for 0 .. S - 1. An empty slot is one that no query sees by its order or
        its document.
      segment_ids_BT: document of each query, or None when every row is one document.
      key_segment_ids_BS: document of each key; None exactly when `segment_ids_BT` is.
      window: how many tokens back a query sees, its own included; None for no limit.
      causal: whether order matters; without it, orders and window are None, and `splash` cannot.
      impl: the implementation.
        - `xla`: `jax.nn.dot_product_attention`, the reference, with all scores in memory.
        - `direct`: for one query per row, as in decoding. Keys and values are read once where they lie, while the
          products of `xla` need them with heads first, copied on a CPU at each call. It goes by blocks of DIRECT_KEYS
          slots and stops at the last one that is seen. A key that is not finite in one head spoils all heads of the
          rows that see it.
        - `blockwise`: online softmax over blocks (`blockwise_attention`); memory of the order of q, k and v.
        - `splash`: JAX's Pallas kernel for TPU; whole rows only: T = S, both orders None.
        - `cudnn`: cuDNN's flash attention for NVIDIA GPUs in half precision (`cudnn_attention`). With documents in
          whole rows it computes what is seen; otherwise it takes a mask, 2 * B * T * S bytes.
        - `auto`: `cudnn` where it applies, over key slots from MASKED_PAIRS to a mask of MASK_BYTES. Elsewhere
          `blockwise` where the scores would exceed SCORE_BYTES, and below that `xla`, but on CPU `direct` for one query
          and `blockwise` for long rows (docs/measurements/kernels.md). Never `splash` before a benchmark on a TPU is
          committed.
      interpret: run `splash` without a TPU, slowly.

    Returns:
      out_BTNH in q's dtype. A query that sees no key gets finite values that mean nothing and, from `blockwise`, passes
      no gradient on.

    Raises:
      ValueError: shapes or dtypes that do not fit together, an unknown impl, or one that cannot do what is asked.
    """
    _check(q_BTNH, k_BSKH, v_BSKH, order_BT, key_order_BS, segment_ids_BT, key_segment_ids_BS, window)
    if not causal and any(x is not None for x in (order_BT, key_order_BS, window)):
        raise ValueError("causal=False has no order: leave order_BT, key_order_BS and window out")
    sequences = impl != "auto" or (causal and window is None)  # The others have not run on a GPU as sequences.
    whole = order_BT is None and key_order_BS is None and q_BTNH.shape[1] == k_BSKH.shape[1]
    if impl == "auto":
        impl = _choose_any(q_BTNH, k_BSKH, whole)
    if impl not in IMPLS:
        raise ValueError(f"impl is {impl!r}; choose one of auto, {', '.join(IMPLS)}")
    if interpret and impl != "splash":
        raise ValueError(f"interpret=True is for impl='splash'; {impl} has nothing to interpret")
    ids = segment_ids_BT, key_segment_ids_BS
    if impl == "splash":
        return _splash(q_BTNH, k_BSKH, v_BSKH, ids, window, causal, whole, interpret)
    if impl == "cudnn":
        if lacks := _what_cudnn_lacks(q_BTNH, k_BSKH, whole):
            raise ValueError(f"impl='cudnn' {lacks}; use impl='blockwise'")
        if whole:
            return cudnn_attention.attend_rows(q_BTNH, k_BSKH, v_BSKH, *ids, window, causal, sequences)
    query_BT = Place(_order(order_BT, q_BTNH, causal), segment_ids_BT)
    key_BS = Place(_order(key_order_BS, k_BSKH, causal), key_segment_ids_BS)
    return _by_places(impl, q_BTNH, k_BSKH, v_BSKH, query_BT, key_BS, window)


def _by_places(
    impl: str, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, query_BT: Place, key_BS: Place,
    window: int | None,
) -> jax.Array:
    """By the implementations that take any order of queries and keys."""
    if impl == "blockwise":
        return blockwise_attention(q_BTNH, k_BSKH, v_BSKH, query_BT, key_BS, window)
    visible_BTS = visible(query_BT, key_BS, window)
    if impl == "cudnn":
        return cudnn_attention.attend_masked(q_BTNH, k_BSKH, v_BSKH, visible_BTS)
    if impl == "direct":
        ids_BT = query_BT.segment_ids
        # What padding sees, above all in a row that idles, is no reason to go further.
        real_BTS = visible_BTS if ids_BT is None else visible_BTS & (ids_BT[:, :, None] != 0)
        return _direct(q_BTNH, k_BSKH, v_BSKH, visible_BTS, jnp.any(real_BTS, axis=(0, 1)))
    return jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=visible_BTS[:, None], implementation="xla")


def decode_attention(
    q_BTNH: jax.Array, k_BSKH: jax.Array | Int8Slots, v_BSKH: jax.Array | Int8Slots, first_B: jax.Array,
    stop_B: jax.Array, *, impl: str = "auto", interpret: bool = False,
) -> jax.Array:
    """A step of decoding: one query a row, T = 1, that sees the key slots [first, stop) of its row.

    Args:
      q_BTNH, k_BSKH, v_BSKH: as in `attention`; or keys and values in int8, which `direct` widens block by block, and
        which the others widen whole in q's dtype before they begin.
      first_B: int32.
      stop_B: int32; a row that idles costs least where it is `first` and nothing is seen.
      impl: the implementation.
        - `xla`, `direct`: as in `attention`.
        - `pallas_gpu`: keys and values in use are read once where they lie, by a kernel for NVIDIA GPUs from Ampere on;
          half precision, head widths 16, 32, 64 and 128. Its derivative goes through sums in plain JAX.
        - `auto`: `pallas_gpu` where it applies, `direct` on a CPU, else `xla`, or `blockwise` where the scores would
          exceed SCORE_BYTES. docs/measurements/kernels.md has the times.
      interpret: run `pallas_gpu` without a GPU, slowly.

    Returns:
      out_BTNH in q's dtype; finite values that mean nothing in a row that sees nothing.

    Raises:
      ValueError: more than one query a row, an unknown impl, or one that cannot do what is asked.
    """
    narrow = (k_BSKH, v_BSKH) if isinstance(k_BSKH, Int8Slots) else None
    # What is not used of this in a compiled program is not computed.
    k_BSKH = k_BSKH.astype(q_BTNH.dtype) if isinstance(k_BSKH, Int8Slots) else k_BSKH
    v_BSKH = v_BSKH.astype(q_BTNH.dtype) if isinstance(v_BSKH, Int8Slots) else v_BSKH
    _check(q_BTNH, k_BSKH, v_BSKH, None, None, None, None, None)
    B, T, _, H = q_BTNH.shape
    S = k_BSKH.shape[1]
    if T != 1 or first_B.shape != (B,) or stop_B.shape != (B,):
        raise ValueError(f"q_BTNH {q_BTNH.shape}, first_B {first_B.shape}, stop_B {stop_B.shape}: expected one query a "
                         f"row and a place for each of {B} rows")
    visible_BTS = _stretch(first_B, stop_B, S)
    half, heads = q_BTNH.dtype in (jnp.bfloat16, jnp.float16), H in (16, 32, 64, 128)
    if impl == "auto":
        impl = "pallas_gpu" if nvidia_capability() >= AMPERE and half and heads else _choose(q_BTNH.shape, S)
    elif impl not in DECODE_IMPLS:
        raise ValueError(f"impl is {impl!r}; choose one of auto, {', '.join(DECODE_IMPLS)}")
    if interpret and impl != "pallas_gpu":
        raise ValueError(f"interpret=True is for impl='pallas_gpu'; {impl} has nothing to interpret")
    if narrow is not None and impl == "direct" and S > DIRECT_KEYS:
        return _by_blocks(q_BTNH, *narrow, visible_BTS, jnp.any(visible_BTS, axis=(0, 1)))
    if impl == "pallas_gpu":
        if not heads or not (half or interpret) or not (platform() == "gpu" or interpret):
            raise ValueError("impl='pallas_gpu' needs a GPU, half precision and heads of 16, 32, 64 or 128; here "
                             f"{platform()}, {q_BTNH.dtype}, {H}; use impl='xla'")
        return _by_kernel(interpret, q_BTNH, k_BSKH, v_BSKH, first_B, stop_B)
    if impl == "blockwise":
        query, key = Place(jnp.zeros((B, 1), jnp.int32), None), Place(jnp.where(visible_BTS[:, 0], 0, 1), None)
        return blockwise_attention(q_BTNH, k_BSKH, v_BSKH, query, key, None)
    if impl == "direct":
        return _direct(q_BTNH, k_BSKH, v_BSKH, visible_BTS, jnp.any(visible_BTS, axis=(0, 1)))
    return jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=visible_BTS[:, None], implementation="xla")


def _stretch(first_B: jax.Array, stop_B: jax.Array, S: int) -> jax.Array:
    """visible_BTS of one query a row that sees the slots [first, stop)."""
    slot_S = jnp.arange(S, dtype=jnp.int32)
    return ((slot_S >= first_B[:, None]) & (slot_S < stop_B[:, None]))[:, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _by_kernel(interpret: bool, q_BTNH: jax.Array, *args: jax.Array) -> jax.Array:
    from lfm_jax.kernels.pallas_gpu_attention import attend_slots  # Pallas is slow to import.

    return attend_slots(q_BTNH[:, 0], *args, interpret=interpret)[:, None]


def _by_kernel_forward(interpret: bool, *args: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _by_kernel(interpret, *args), args


def _by_kernel_backward(interpret: bool, args: tuple[jax.Array, ...], dout_BTNH: jax.Array) -> tuple[Any, ...]:
    q_BTNH, k_BSKH, v_BSKH, first_B, stop_B = args
    visible_BTS = _stretch(first_B, stop_B, k_BSKH.shape[1])
    return (*_derivative_of_sums(q_BTNH, k_BSKH, v_BSKH, visible_BTS, dout_BTNH), None, None)


_by_kernel.defvjp(_by_kernel_forward, _by_kernel_backward)


def _order(order: jax.Array | None, x: jax.Array, causal: bool) -> jax.Array:
    if not causal:  # All are equally far.
        return jnp.zeros(x.shape[:2], jnp.int32)
    return jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2]) if order is None else order


def _choose_any(q_BTNH: jax.Array, k_BSKH: jax.Array, whole: bool) -> str:
    pairs = q_BTNH.shape[0] * q_BTNH.shape[1] * k_BSKH.shape[1]
    worth = whole or MASKED_PAIRS <= pairs <= cudnn_attention.MASK_BYTES // 2
    cudnn = worth and not _what_cudnn_lacks(q_BTNH, k_BSKH, whole)
    return "cudnn" if cudnn else _choose(q_BTNH.shape, k_BSKH.shape[1])


def _choose(shape_BTNH: tuple[int, ...], S: int) -> str:
    B, T, N, _ = shape_BTNH
    on_cpu = platform() == "cpu"
    if on_cpu and T == 1:
        return "direct"
    faster = on_cpu and T >= CPU_QUERIES and T * S >= CPU_SCORES
    return "blockwise" if faster or 4 * B * N * T * S > SCORE_BYTES else "xla"


def _direct(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, visible_BTS: jax.Array, seen_S: jax.Array
) -> jax.Array:
    """Heads stay where they lie in keys and values.

    Args:
      seen_S: slots that any query sees whose output means something.
    """
    if k_BSKH.shape[1] > DIRECT_KEYS:
        return _direct_by_blocks(q_BTNH, k_BSKH, v_BSKH, visible_BTS, seen_S)
    return _direct_at_once(q_BTNH, k_BSKH, v_BSKH, visible_BTS)


def _direct_at_once(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, visible_BTS: jax.Array) -> jax.Array:
    """Products as sums over [B, T, S, K, G, H] that XLA fuses."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BT1KGH = q_BTNH.reshape(B, T, 1, K, N // K, H).astype(jnp.float32)
    scores_BTSKG = jnp.sum(q_BT1KGH * k_BSKH[:, None, :, :, None].astype(jnp.float32), axis=-1) * H**-0.5
    scores_BTSKG = jnp.where(visible_BTS[..., None, None], scores_BTSKG, jnp.finfo(jnp.float32).min)
    weight_BTSKG = jax.nn.softmax(scores_BTSKG, axis=2)
    out_BTKGH = jnp.sum(weight_BTSKG[..., None] * v_BSKH[:, None, :, :, None].astype(jnp.float32), axis=2)
    return out_BTKGH.reshape(q_BTNH.shape).astype(q_BTNH.dtype)


def _derivative_of_sums(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, visible_BTS: jax.Array, dout_BTNH: jax.Array
) -> tuple[jax.Array, ...]:
    """By q, k and v."""
    _, pull = jax.vjp(lambda q, k, v: _direct_at_once(q, k, v, visible_BTS), q_BTNH, k_BSKH, v_BSKH)
    return pull(dout_BTNH)


def _by_blocks(
    q_BTNH: jax.Array, k_BSKH: jax.Array | Int8Slots, v_BSKH: jax.Array | Int8Slots, visible_BTS: jax.Array,
    seen_S: jax.Array,
) -> jax.Array:
    """The same by blocks of DIRECT_KEYS slots, softmax online, up to the last slot that is seen.

    What lies behind costs nothing, and how far other rows reach changes no bit of a row: a block that a row does not
    see leaves its sums as they are. A query stands at its own head's place in a row of zeros as wide as all heads of a
    key (block diagonal), so that a block is one product of matrices a row: K times the arithmetic, and on a CPU still
    up to 1.8 times as fast as sums, which are far from what it can multiply (docs/measurements/kernels.md).

    C = K * H numbers of a key or value; J = K, the head that a query belongs to; Y slots of a block.
    """
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    q_BKHTG1 = jnp.moveaxis(q_BTNH.reshape(B, T, K, N // K, H), (2, 4), (1, 2))[..., None].astype(jnp.float32)
    exact = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
    own_K111J = jnp.eye(K, dtype=bool)[:, None, None, None]
    q_BCTGJ = (jnp.where(own_K111J, q_BKHTG1, 0) * H**-0.5).reshape(B, K * H, T, N // K, K)

    def meet(j: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        peak_BTGJ, total_BTGJ, sum_BTGJC = carry
        first = j * DIRECT_KEYS
        start = jnp.minimum(first, S - DIRECT_KEYS)  # The last block is moved back to end with the slots.
        k_BYKH, v_BYKH = jax.tree.map(
            lambda x: lax.dynamic_slice_in_dim(x, start, DIRECT_KEYS, axis=1), (k_BSKH, v_BSKH)
        )
        visible_BTY = lax.dynamic_slice_in_dim(visible_BTS, start, DIRECT_KEYS, axis=2)
        k_BYC, v_BYC = (x.astype(jnp.float32).reshape(B, DIRECT_KEYS, K * H) for x in (k_BYKH, v_BYKH))
        visible_BYT = jnp.swapaxes(visible_BTY & (start + jnp.arange(DIRECT_KEYS) >= first), 1, 2)
        scores_BYTGJ = exact("BYC,BCTGJ->BYTGJ", k_BYC, q_BCTGJ)
        scores_BYTGJ = jnp.where(visible_BYT[..., None, None], scores_BYTGJ, -jnp.inf)
        higher_BTGJ = jnp.maximum(peak_BTGJ, jnp.max(scores_BYTGJ, axis=1))
        shrink_BTGJ = jnp.exp(peak_BTGJ - higher_BTGJ)
        weight_BYTGJ = jnp.exp(scores_BYTGJ - higher_BTGJ[:, None])
        total_BTGJ = total_BTGJ * shrink_BTGJ + weight_BYTGJ.sum(axis=1)
        new_BTGJC = exact("BYTGJ,BYC->BTGJC", weight_BYTGJ, v_BYC)
        return higher_BTGJ, total_BTGJ, sum_BTGJC * shrink_BTGJ[..., None] + new_BTGJC

    used = jnp.max(jnp.where(seen_S, jnp.arange(1, S + 1), 0))
    zero_BTGJ = jnp.zeros((B, T, N // K, K))
    # The peak starts finite and invisible scores are -inf: where no key is seen, weights are 0 and never NaN.
    carry = (jnp.full_like(zero_BTGJ, jnp.finfo(jnp.float32).min), zero_BTGJ, jnp.zeros((*zero_BTGJ.shape, K * H)))
    _, total_BTGJ, sum_BTGJC = lax.fori_loop(0, -(-used // DIRECT_KEYS), meet, carry)
    # Of the values of all heads only those of the own one are wanted.
    sum_BTGHJ = jnp.diagonal(sum_BTGJC.reshape(B, T, N // K, K, K, H), axis1=3, axis2=4)
    out_BTGHJ = sum_BTGHJ / jnp.where(total_BTGJ == 0, 1, total_BTGJ)[..., None, :]
    return jnp.moveaxis(out_BTGHJ, 4, 2).reshape(q_BTNH.shape).astype(q_BTNH.dtype)


def _direct_forward(*args: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _direct_by_blocks(*args), args


def _direct_backward(args: tuple[jax.Array, ...], dout_BTNH: jax.Array) -> tuple[Any, ...]:
    # A loop of a length that only the data knows has no derivative; without blocks there is no loop.
    q_BTNH, k_BSKH, v_BSKH, visible_BTS, _ = args
    return (*_derivative_of_sums(q_BTNH, k_BSKH, v_BSKH, visible_BTS, dout_BTNH), None, None)


_direct_by_blocks = jax.custom_vjp(_by_blocks)
_direct_by_blocks.defvjp(_direct_forward, _direct_backward)


def _splash(
    q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, ids: tuple[jax.Array | None, jax.Array | None],
    window: int | None, causal: bool, whole: bool, interpret: bool,
) -> jax.Array:
    if not whole:
        raise ValueError(f"impl='splash' does self-attention of whole rows only: order_BT and key_order_BS None, "
                         f"T = S; here T = {q_BTNH.shape[1]}, S = {k_BSKH.shape[1]}; use impl='blockwise'")
    if not causal:
        raise ValueError("impl='splash' is causal; use impl='blockwise' with causal=False")
    from lfm_jax.kernels.splash import splash_attention  # Pallas is slow to import.

    return splash_attention(q_BTNH, k_BSKH, v_BSKH, *ids, window, interpret=interpret)


def _what_cudnn_lacks(q_BTNH: jax.Array, k_BSKH: jax.Array, whole: bool) -> str:
    """Why cuDNN cannot do it; empty if it can."""
    T, S, H, dtype = q_BTNH.shape[1], k_BSKH.shape[1], q_BTNH.shape[3], q_BTNH.dtype
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"takes q, k and v in bfloat16 or float16, not {dtype}"
    if H % 8 or H > 128:
        return f"takes head widths that are multiples of 8 up to 128, not {H}"
    if not whole and (T % 2 or S % 2):
        return f"takes even numbers of queries and of key slots, not {T} and {S}"
    return "" if nvidia_capability() >= AMPERE else f"needs an NVIDIA GPU of Ampere or later; this is {platform()}"


def _check(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    order_BT: jax.Array | None,
    key_order_BS: jax.Array | None,
    segment_ids_BT: jax.Array | None,
    key_segment_ids_BS: jax.Array | None,
    window: int | None,
) -> None:
    if q_BTNH.ndim != 4 or k_BSKH.ndim != 4:
        raise ValueError(f"q_BTNH {q_BTNH.shape} and k_BSKH {k_BSKH.shape} must have 4 axes: batch, token, head, width")
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    if k_BSKH.shape != (B, S, K, H) or N % K:
        raise ValueError(f"k_BSKH has shape {k_BSKH.shape}; with q_BTNH {q_BTNH.shape} expected ({B}, slots, a divisor "
                         f"of {N}, {H})")
    if v_BSKH.shape != k_BSKH.shape:
        raise ValueError(f"v_BSKH has shape {v_BSKH.shape}; expected that of k_BSKH, {k_BSKH.shape}")
    if not q_BTNH.dtype == k_BSKH.dtype == v_BSKH.dtype:
        raise ValueError(f"q, k and v are {q_BTNH.dtype}, {k_BSKH.dtype} and {v_BSKH.dtype}; cast them to one dtype")
    given = {"order_BT": (order_BT, (B, T)), "key_order_BS": (key_order_BS, (B, S)),
             "segment_ids_BT": (segment_ids_BT, (B, T)), "key_segment_ids_BS": (key_segment_ids_BS, (B, S))}
    for name, (x, shape) in given.items():
        if x is not None and x.shape != shape:
            raise ValueError(f"{name} has shape {x.shape}; expected {shape}")
    if (segment_ids_BT is None) != (key_segment_ids_BS is None):
        raise ValueError("segment_ids_BT and key_segment_ids_BS go together: give both or neither")
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; it counts the query's own token: give 1 or more, or None")
