"""The kernels as the operators call them: on one device as they are, over a mesh inside one `shard_map`.

Batch, channels and heads need no word between devices. Time, split over the mesh axis `context` into contiguous
shards of equal length, does:
  - `causal_conv` takes the last W - 1 columns of the shard before it (a halo);
  - `linear_scan` exchanges one summary a shard, [B, D], in a logarithmic number of steps;
  - `attention` trades time for heads and back (all-to-all) where the key/value heads of a device divide by the number
    of shards, and otherwise gathers the keys and values.

Dimensions: B batch, T time, D channels, W taps, V = W - 1, S key slots, N query heads, K key/value heads, H head width,
E experts, A active experts of a token, F width of an expert.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from lfm_jax.kernels import attention as attention_kernel
from lfm_jax.kernels import causal_conv as conv_kernel
from lfm_jax.kernels import centred_conv as centred_kernel
from lfm_jax.kernels import experts as experts_kernel
from lfm_jax.kernels import linear_scan as scan_kernel
from lfm_jax.kernels.int8_slots import Int8Slots
from lfm_jax.sharding import CONTEXT, EXPERT, FSDP, axis_names, is_sharded, over_mesh, parts, spec_of, whole
from lfm_jax.weight_kinds import WeightKind


def causal_conv(
    y_BTD: jax.Array,
    w_WD: jax.Array,
    tail_BVD: jax.Array | None = None,
    segment_ids_BT: jax.Array | None = None,
    *,
    gate_in_BTD: jax.Array | None = None,
    gate_out_BTD: jax.Array | None = None,
    bias_D: jax.Array | None = None,
    impl: str = "auto",
    interpret: bool = False,
) -> jax.Array:
    """`kernels.causal_conv.causal_conv`, over a mesh too.

    Raises:
      ValueError: as there, or a shard of time shorter than the W - 1 columns that its right neighbour needs.
    """
    local = partial(conv_kernel.causal_conv, impl=impl, interpret=interpret)
    args = dict(
        y_BTD=y_BTD, w_WD=w_WD, tail_BVD=tail_BVD, segment_ids_BT=segment_ids_BT,
        gate_in_BTD=gate_in_BTD, gate_out_BTD=gate_out_BTD, bias_D=bias_D,
    )
    if not is_sharded(y_BTD):
        return local(**args)
    b, t, d = spec_of(y_BTD)
    shards, V = _time_shards(y_BTD), w_WD.shape[0] - 1
    if shards > 1 and y_BTD.shape[1] // shards < V:
        raise ValueError(f"{y_BTD.shape[1]} tokens over {shards} shards leave less than the {V} columns that "
                         f"{V + 1} taps reach back; use fewer shards of `{CONTEXT}` or longer rows")
    specs = dict(
        y_BTD=P(b, t, d), w_WD=P(None, d), tail_BVD=P(b, None, d), segment_ids_BT=P(b, t),
        gate_in_BTD=P(b, t, d), gate_out_BTD=P(b, t, d), bias_D=P(d),
    )
    body = partial(_conv_shard, local) if shards > 1 and V > 0 else local
    return over_mesh(body, args, specs, P(b, t, d))


def centred_conv(
    y_BTD: jax.Array,
    w_WD: jax.Array,
    segment_ids_BT: jax.Array | None = None,
    *,
    gate_in_BTD: jax.Array | None = None,
    gate_out_BTD: jax.Array | None = None,
    bias_D: jax.Array | None = None,
) -> jax.Array:
    """`kernels.centred_conv.centred_conv`, over a mesh too.

    Raises:
      ValueError: time is split over devices.
    """
    args = dict(y_BTD=y_BTD, w_WD=w_WD, segment_ids_BT=segment_ids_BT, gate_in_BTD=gate_in_BTD,
                gate_out_BTD=gate_out_BTD, bias_D=bias_D)
    if not is_sharded(y_BTD):
        return centred_kernel.centred_conv(**args)
    if _time_shards(y_BTD) > 1:
        raise ValueError(f"a convolution with causal=False cannot split time over `{CONTEXT}`; give it whole rows")
    b, t, d = spec_of(y_BTD)
    specs = dict(y_BTD=P(b, t, d), w_WD=P(None, d), segment_ids_BT=P(b, t), gate_in_BTD=P(b, t, d),
                 gate_out_BTD=P(b, t, d), bias_D=P(d))
    return over_mesh(centred_kernel.centred_conv, args, specs, P(b, t, d))


def _conv_shard(local: Callable[..., jax.Array], **args: Any) -> jax.Array:
    """One shard of time: its history is the end of the shard on its left, the caller's tail on the first."""
    y_BTD, gate_BTD, ids_BT = args["y_BTD"], args.get("gate_in_BTD"), args.get("segment_ids_BT")
    V, shards = args["w_WD"].shape[0] - 1, lax.axis_size(CONTEXT)
    to_right = [(i, i + 1) for i in range(shards - 1)]  # What nobody sends arrives as zeros.
    edge_BVD = y_BTD[:, -V:].astype(jnp.promote_types(y_BTD.dtype, jnp.float32))  # As the kernels keep this product.
    edge_BVD = edge_BVD if gate_BTD is None else edge_BVD * gate_BTD[:, -V:]
    halo_BVD = lax.ppermute(edge_BVD, CONTEXT, to_right)
    if ids_BT is not None:
        # Of the halo only the columns that belong to the document that goes on here; they are its last ones.
        same_BV = lax.ppermute(ids_BT[:, -V:], CONTEXT, to_right) == ids_BT[:, :1]
        reached_BV = lax.cummin(same_BV.astype(jnp.int32), axis=1, reverse=True) == 1
        halo_BVD = jnp.where(reached_BV[:, :, None], halo_BVD, 0)
    tail_BVD = args.get("tail_BVD")
    if tail_BVD is not None:
        halo_BVD = jnp.where(lax.axis_index(CONTEXT) == 0, tail_BVD.astype(halo_BVD.dtype), halo_BVD)
    return local(**args | {"tail_BVD": halo_BVD})


def linear_scan(
    a_BTD: jax.Array,
    b_BTD: jax.Array,
    h0_BD: jax.Array | None = None,
    segment_ids_BT: jax.Array | None = None,
    *,
    impl: str = "auto",
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """`kernels.linear_scan.linear_scan`, over a mesh too."""
    local = partial(scan_kernel.linear_scan, impl=impl, interpret=interpret)
    args = dict(a_BTD=a_BTD, b_BTD=b_BTD, h0_BD=h0_BD, segment_ids_BT=segment_ids_BT)
    if not is_sharded(b_BTD):
        return local(**args)
    b, t, d = spec_of(b_BTD)
    specs = dict(a_BTD=P(b, t, d), b_BTD=P(b, t, d), h0_BD=P(b, d), segment_ids_BT=P(b, t))
    body = partial(local, axis=CONTEXT) if _time_shards(b_BTD) > 1 else local
    return over_mesh(body, args, specs, (P(b, t, d), P(b, d)))


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
    """`kernels.attention.attention`, over a mesh too.

    Raises:
      ValueError: as there; or time is split and the keys are not those of the queries' own tokens (a decode state), or
        attention is not causal; or the key/value heads do not divide over the devices that heads are split over.
    """
    local = partial(attention_kernel.attention, window=window, causal=causal, impl=impl, interpret=interpret)
    args = dict(
        q_BTNH=q_BTNH, k_BSKH=k_BSKH, v_BSKH=v_BSKH, order_BT=order_BT, key_order_BS=key_order_BS,
        segment_ids_BT=segment_ids_BT, key_segment_ids_BS=key_segment_ids_BS,
    )
    if not is_sharded(q_BTNH):
        return local(**args)
    b, t, n, _ = spec_of(q_BTNH)
    shards, body = _time_shards(q_BTNH), local
    _check_heads(q_BTNH, k_BSKH)
    if shards > 1:
        if not causal:
            raise ValueError(f"attention with causal=False cannot split time over `{CONTEXT}`; give it whole rows")
        if order_BT is not None or key_order_BS is not None:
            raise ValueError(f"attention to a decode state cannot split time over `{CONTEXT}`; give it whole rows")
        heads = k_BSKH.shape[2] // parts(q_BTNH, 2)
        body = partial(_attend_by_heads if heads % shards == 0 else _attend_to_gathered, local)
    specs = dict(
        q_BTNH=P(b, t, n, None), k_BSKH=P(b, t, n, None), v_BSKH=P(b, t, n, None), order_BT=P(b, t),
        key_order_BS=P(b, t), segment_ids_BT=P(b, t), key_segment_ids_BS=P(b, t),
    )
    return over_mesh(body, args, specs, P(b, t, n, None))


def decode_attention(
    q_BTNH: jax.Array, k_BSKH: jax.Array | Int8Slots, v_BSKH: jax.Array | Int8Slots, first_B: jax.Array,
    stop_B: jax.Array,
) -> jax.Array:
    """`kernels.attention.decode_attention`, over a mesh too, where heads may be split.

    Raises:
      ValueError: as there; or the key/value heads do not divide over the devices that heads are split over.
    """
    if not is_sharded(q_BTNH):
        return attention_kernel.decode_attention(q_BTNH, k_BSKH, v_BSKH, first_B, stop_B)
    k_BSKH, v_BSKH = k_BSKH.astype(q_BTNH.dtype), v_BSKH.astype(q_BTNH.dtype)
    args = dict(q_BTNH=q_BTNH, k_BSKH=k_BSKH, v_BSKH=v_BSKH, first_B=first_B, stop_B=stop_B)
    _check_heads(q_BTNH, k_BSKH)
    heads = spec_of(q_BTNH)
    specs = dict(q_BTNH=heads, k_BSKH=heads, v_BSKH=heads, first_B=P(heads[0]), stop_B=P(heads[0]))
    return over_mesh(attention_kernel.decode_attention, args, specs, heads)


def _check_heads(q_BTNH: jax.Array, k_BSKH: jax.Array) -> None:
    devices, axis = parts(q_BTNH, 2), spec_of(q_BTNH)[2]
    if k_BSKH.shape[2] % devices:
        raise ValueError(f"{k_BSKH.shape[2]} key/value heads do not divide over the {devices} devices of {axis!r}; "
                         "give that axis a divisor of them")


def _attend_by_heads(
    local: Callable[..., jax.Array], *, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, **ids: jax.Array
) -> jax.Array:
    """All of time for a share of the heads: every device does the same work, whatever the mask."""
    trade = partial(lax.all_to_all, axis_name=CONTEXT, split_axis=2, concat_axis=1, tiled=True)
    ids = {name: _gather_time(x) for name, x in ids.items()}
    out_BTNH = local(q_BTNH=trade(q_BTNH), k_BSKH=trade(k_BSKH), v_BSKH=trade(v_BSKH), **ids)
    return lax.all_to_all(out_BTNH, CONTEXT, split_axis=1, concat_axis=2, tiled=True)


def _attend_to_gathered(
    local: Callable[..., jax.Array], *, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, **ids: jax.Array
) -> jax.Array:
    """This shard's queries over everyone's keys; later shards have more to do."""
    B, T = q_BTNH.shape[:2]
    order_T = lax.axis_index(CONTEXT) * T + jnp.arange(T, dtype=jnp.int32)
    if "key_segment_ids_BS" in ids:
        ids["key_segment_ids_BS"] = _gather_time(ids["key_segment_ids_BS"])
    return local(q_BTNH=q_BTNH, k_BSKH=_gather_time(k_BSKH), v_BSKH=_gather_time(v_BSKH),
                 order_BT=jnp.broadcast_to(order_T, (B, T)), **ids)


def _gather_time(x: jax.Array) -> jax.Array:
    return lax.all_gather(x, CONTEXT, axis=1, tiled=True)


def _time_shards(x: jax.Array) -> int:
    """Number of shards that time (axis 1) is split into."""
    shards = parts(x, 1)
    if shards > 1 and spec_of(x)[1] not in (CONTEXT, (CONTEXT,)):
        raise ValueError(f"time is split over {spec_of(x)[1]!r}; only the mesh axis {CONTEXT!r} may split it")
    return shards


def highest(x_BTE: jax.Array, count: int) -> jax.Array:
    """Indices of the `count` highest of the last axis, int32 [B, T, count], the lowest index first among equals.

    Over a mesh each device takes its own rows; `lax.top_k` alone would gather them all.
    """
    def local(x_BTE: jax.Array) -> jax.Array:
        return lax.top_k(x_BTE, count)[1]

    if not is_sharded(x_BTE):
        return local(x_BTE)
    return over_mesh(local, dict(x_BTE=x_BTE), dict(x_BTE=spec_of(x_BTE)), spec_of(x_BTE))


def experts(
    x_BTD: jax.Array, chosen_BTA: jax.Array, weight_BTA: jax.Array, w1_EDF: jax.Array | WeightKind,
    w3_EDF: jax.Array | WeightKind, w2_EFD: jax.Array | WeightKind, *, impl: str = "auto",
) -> jax.Array:
    """`kernels.experts.experts` of tokens [B, T], over a mesh too.

    Devices along `expert` hold different experts and different rows: each takes the rows of all of them, computes what
    its experts add, and gives back the sums of each device's rows. With buffers of fixed size, in which no token may be
    dropped, a trade of tokens for experts (all-to-all) would have to move as much or more: a device may have to send
    all of its tokens to any other.
    """
    D, A = x_BTD.shape[-1], chosen_BTA.shape[-1]
    kinds = dict(w1_EDF=w1_EDF, w3_EDF=w3_EDF, w2_EFD=w2_EFD)

    def local(x_BTD: jax.Array, chosen_BTA: jax.Array, weight_BTA: jax.Array, **matrices: Any) -> jax.Array:
        y_MD = experts_kernel.experts(
            x_BTD.reshape(-1, D), chosen_BTA.reshape(-1, A), weight_BTA.reshape(-1, A), **matrices, impl=impl
        )
        return y_MD.reshape(x_BTD.shape)

    args = dict(x_BTD=x_BTD, chosen_BTA=chosen_BTA, weight_BTA=weight_BTA)
    if not is_sharded(x_BTD):
        return local(**args, **kinds)
    matrices = {name: whole(w.astype(x_BTD.dtype), FSDP) for name, w in kinds.items()}
    b, t, _ = spec_of(x_BTD)
    held, _, units = spec_of(matrices["w1_EDF"])
    traded = held is not None and EXPERT in axis_names(b)

    def over_devices(x_BTD: jax.Array, chosen_BTA: jax.Array, weight_BTA: jax.Array, **matrices: jax.Array) -> Any:
        if traded:
            x_BTD, chosen_BTA, weight_BTA = (
                lax.all_gather(x, EXPERT, axis=0, tiled=True) for x in (x_BTD, chosen_BTA, weight_BTA)
            )
        if held is not None:
            chosen_BTA -= lax.axis_index(EXPERT) * matrices["w1_EDF"].shape[0]  # Those of others lie outside.
        y_BTD = local(x_BTD, chosen_BTA, weight_BTA, **matrices)
        summed = (*axis_names(units), *(() if traded else axis_names(held)))
        y_BTD = lax.psum(y_BTD, summed) if summed else y_BTD
        return lax.psum_scatter(y_BTD, EXPERT, scatter_dimension=0, tiled=True) if traded else y_BTD

    specs = {name: P(b, t, None) for name in args} | {name: spec_of(w) for name, w in matrices.items()}
    return over_mesh(over_devices, args | matrices, specs, P(b, t, None))
