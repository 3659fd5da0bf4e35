"""The kernels with time, batch and channels split over devices equal one device; what moves in between is counted."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import long, rel_err
from jax.sharding import PartitionSpec as P
from meshes import collectives, mesh_of

from lfm_jax.kernels import sharded

B, T, D, W = 2, 64, 6, 4
BATCH, TIME = ("data", "fsdp"), "context"
MESHES = [dict(context=8), dict(data=2, context=2, tensor=2), long(dict(context=2)), long(dict(context=4))]
"""The long ones add shards of other lengths: documents' borders fall elsewhere in them."""
over_meshes = pytest.mark.parametrize("sizes", MESHES, ids=str)


def documents(seed=0):
    """Aligned rows: borders anywhere, one document over several shards, shards of padding alone."""
    rng = np.random.default_rng(seed)
    cuts = np.sort(rng.choice(np.arange(1, T), 6, replace=False))
    row = 1 + np.searchsorted(cuts, np.arange(T), side="right")
    return np.stack([row, np.where(np.arange(T) < 21, 1 + (np.arange(T) > 16), 0)]).astype(np.int32)


def arrays(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def value_and_gradients(kernel, args, ids, weight):
    """out, and the gradient of `sum(weight * out)` by every array of `args`, as plain numpy."""
    def loss(args):
        out = kernel(**args, ids=ids)
        return jnp.sum(jnp.where((weight != 0), weight * out, 0.0)), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(args)
    return np.asarray(out), jax.tree.map(np.asarray, grads)


def check(kernel, args, specs, ids, sizes, out_spec=None):
    """The kernel over the mesh equals itself on one device, forward and every gradient."""
    real = np.ones((B, T), bool) if ids is None else ids != 0
    shape = jax.eval_shape(lambda args: kernel(**args, ids=ids), args).shape
    weight = np.random.default_rng(9).standard_normal(shape).astype(np.float32)
    weight *= real.reshape(real.shape + (1,) * (len(shape) - 2))
    out, grads = value_and_gradients(kernel, args, ids, weight)
    with jax.set_mesh(mesh_of(**sizes)):
        placed = {name: jax.device_put(x, specs[name]) for name, x in args.items()}
        placed_ids = None if ids is None else jax.device_put(ids, P(BATCH, TIME))
        placed_weight = jax.device_put(weight, out_spec or specs[next(iter(args))])
        split_out, split_grads = value_and_gradients(kernel, placed, placed_ids, placed_weight)
    assert rel_err(split_out[real], out[real]) < 1e-5
    for name in args:
        assert rel_err(split_grads[name], grads[name]) < 1e-5, name


def compiled(kernel, args, specs, ids, sizes):
    with jax.set_mesh(mesh_of(**sizes)):
        placed = {name: jax.device_put(x, specs[name]) for name, x in args.items()}
        ids = None if ids is None else jax.device_put(ids, P(BATCH, TIME))
        return jax.jit(lambda args, ids: kernel(**args, ids=ids)).lower(placed, ids).compile()


CONV_SPECS = dict(y=P(BATCH, TIME, "tensor"), w=P(None, "tensor"), tail=P(BATCH, None, "tensor"),
                  gate_in=P(BATCH, TIME, "tensor"), gate_out=P(BATCH, TIME, "tensor"), bias=P("tensor"))
CONV = arrays(dict(y=(B, T, D), w=(W, D), tail=(B, W - 1, D), gate_in=(B, T, D), gate_out=(B, T, D), bias=(D,)))


def conv(y, w, tail=None, gate_in=None, gate_out=None, bias=None, *, ids):
    return sharded.causal_conv(y, w, tail, ids, gate_in_BTD=gate_in, gate_out_BTD=gate_out, bias_D=bias)


@over_meshes
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("given", [("y", "w"), tuple(CONV)], ids=["plain", "all"])
def test_convolution(sizes, packed, given):
    check(conv, {name: CONV[name] for name in given}, CONV_SPECS, documents() if packed else None, sizes)


def test_document_ids_that_come_back_do_not_join():
    """1 1 2 1: the halo's earlier document 1 is another one."""
    ids = np.ones((B, T), np.int32)
    ids[:, 30] = 2  # One token before the border between two shards of 32, less one.
    check(conv, CONV, CONV_SPECS, ids, dict(context=2))


def test_a_convolution_moves_w_minus_1_columns_a_neighbour():
    for ids in (None, documents()):
        moved = collectives(compiled(conv, CONV, CONV_SPECS, ids, dict(context=8)))
        expected = [("collective-permute", "f32", (B, W - 1, D))]
        if ids is not None:
            expected.append(("collective-permute", "s32", (B, W - 1)))
        assert sorted(moved) == sorted(expected)


SCAN_SPECS = dict(b=P(BATCH, TIME, "tensor"), a=P(BATCH, TIME, "tensor"), h0=P(BATCH, "tensor"))
SCAN = arrays(dict(b=(B, T, D), a=(B, T, D), h0=(B, D)))
SCAN["a"] = 1 / (1 + np.exp(-SCAN["a"] - 2))


def scan(b, a, h0=None, *, ids):
    return sharded.linear_scan(a, b, h0, ids)[0]


def last_of_scan(b, a, h0=None, *, ids):
    return sharded.linear_scan(a, b, h0, ids)[1][:, None] * jnp.ones((1, T, 1))


@over_meshes
@pytest.mark.parametrize("packed", [False, True])
def test_recurrence(sizes, packed):
    check(scan, SCAN, SCAN_SPECS, documents() if packed else None, sizes)


def test_the_last_state_of_a_recurrence_is_the_same_on_every_device():
    with jax.set_mesh(mesh_of(context=4)):
        placed = {name: jax.device_put(x, SCAN_SPECS[name]) for name, x in SCAN.items()}
        last = jax.jit(lambda args: sharded.linear_scan(args["a"], args["b"], args["h0"])[1])(placed)
        pieces = [np.asarray(shard.data) for shard in last.addressable_shards]
    expected = sharded.linear_scan(SCAN["a"], SCAN["b"], SCAN["h0"])[1]
    assert len(pieces) == 4
    for piece in pieces:
        assert rel_err(piece, expected) < 1e-5


def test_a_recurrence_moves_one_summary_a_step_never_the_sequence():
    for devices in (2, 8):
        moved = collectives(compiled(scan, SCAN, SCAN_SPECS, None, dict(context=devices)))
        assert {kind for kind, _, _ in moved} == {"collective-permute"}
        assert all(math.prod(shape) <= B * D for _, _, shape in moved)
        assert len(moved) <= 3 * (math.ceil(math.log2(devices)) + 1)


HEADS = {"heads over devices": 8, "gathered keys": 1}


@functools.cache
def attention_args(K):
    return arrays(dict(q=(B, T, 2 * K, 4), k=(B, T, K, 4), v=(B, T, K, 4)))


ATTENTION_SPECS = dict.fromkeys("qkv", P(BATCH, TIME, None, None))


def attend(q, k, v, *, ids, window=None):
    return sharded.attention(q, k, v, segment_ids_BT=ids, key_segment_ids_BS=ids, window=window)


@pytest.mark.parametrize("K", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize(
    ("sizes", "packed", "window"),
    [(dict(context=8), True, None), (dict(data=2, context=4), False, 9), long(dict(context=2), True, None),
     long(dict(context=4), True, 9), long(dict(context=8), False, 9), long(dict(data=2, context=4), False, None)],
)
def test_attention(sizes, packed, window, K):
    """In `make test-long` a window across the borders of documents, and each of the three by itself."""
    kernel = functools.partial(attend, window=window)
    check(kernel, attention_args(K), ATTENTION_SPECS, documents(1) if packed else None, sizes)


def test_attention_with_heads_split_too():
    specs = dict.fromkeys("qkv", P(BATCH, TIME, "tensor", None))
    check(attend, attention_args(8), specs, documents(2), dict(tensor=2, context=4))


def test_attention_trades_heads_for_time_while_the_axis_is_no_larger_than_k():
    moved = collectives(compiled(attend, attention_args(8), ATTENTION_SPECS, documents(), dict(context=8)))
    floats = [(kind, math.prod(shape)) for kind, dtype, shape in moved if dtype == "f32"]
    assert {kind for kind, _ in floats} == {"all-to-all"}
    q, k, v = attention_args(8).values()
    assert sum(size for _, size in floats) == (q.size + k.size + v.size + q.size) // 8
    assert all(math.prod(shape) <= B * T for _, dtype, shape in moved if dtype == "s32")
    moved = collectives(compiled(attend, attention_args(1), ATTENTION_SPECS, None, dict(context=8)))
    assert [(kind, shape) for kind, _, shape in moved] == [("all-gather", (B, T, 1, 4))] * 2


def test_a_step_of_decoding_with_heads_split_moves_nothing():
    q, k, v = attention_args(2).values()
    first, stop = np.array([0, 20], np.int32), np.array([T, 21], np.int32)
    whole = sharded.decode_attention(q[:, :1], k, v, first, stop)
    with jax.set_mesh(mesh_of(tensor=2)):
        split = [jax.device_put(x, P(None, None, "tensor", None)) for x in (q[:, :1], k, v)]
        program = jax.jit(sharded.decode_attention).lower(*split, first, stop).compile()
        assert collectives(program) == []
        assert rel_err(program(*split, first, stop), whole) < 1e-6
        one_head = (split[0], k[:, :, :1], v[:, :, :1])
        with pytest.raises(ValueError, match="1 key/value heads do not divide over the 2 devices of 'tensor'"):
            sharded.decode_attention(*one_head, first, stop)


def test_without_time_split_nothing_moves():
    specs = {name: P(*(None if axis == TIME else axis for axis in spec)) for name, spec in CONV_SPECS.items()}
    with jax.set_mesh(mesh_of(data=2, tensor=2)):
        put = {name: jax.device_put(CONV[name], spec) for name, spec in specs.items()}
        assert collectives(jax.jit(lambda args: conv(**args, ids=None)).lower(put).compile()) == []
        put = {name: jax.device_put(SCAN[name], P(BATCH, *(None,) * (SCAN[name].ndim - 2), "tensor")) for name in SCAN}
        assert collectives(jax.jit(lambda args: scan(**args, ids=None)).lower(put).compile()) == []


def test_what_cannot_be_split_is_refused():
    with jax.set_mesh(mesh_of(context=8)):
        y = jax.device_put(CONV["y"][:, :16], P(None, TIME, None))
        with pytest.raises(ValueError, match="16 tokens over 8 shards leave less than the 3 columns"):
            sharded.causal_conv(y, CONV["w"])
        q, k, v = (jax.device_put(x, P(None, TIME, None, None)) for x in attention_args(8).values())
        with pytest.raises(ValueError, match="decode state cannot split time"):
            sharded.attention(q, k, v, order_BT=jnp.zeros((B, T), jnp.int32))
    with jax.set_mesh(mesh_of(tensor=2)):
        q, k, v = attention_args(1).values()
        q = jax.device_put(q, P(None, None, "tensor", None))
        with pytest.raises(ValueError, match="1 key/value heads do not divide over the 2 devices of 'tensor'"):
            sharded.attention(q, k, v)
    with jax.set_mesh(mesh_of(data=2)):
        y = jax.device_put(CONV["y"], P(None, "data", None))
        with pytest.raises(ValueError, match="time is split over 'data'"):
            sharded.causal_conv(y, CONV["w"])
