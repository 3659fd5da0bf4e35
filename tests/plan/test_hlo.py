"""The HLO reader, on programs whose counts are known on paper."""

import jax
import jax.numpy as jnp
import pytest
import tpu_aot
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lfm_jax.plan import hlo_cost
from lfm_jax.plan.hlo import Module, axes_of, collectives, replica_groups

MESH = {"data": 2, "fsdp": 4, "tensor": 2}


@pytest.mark.parametrize(("text", "axes", "count"), [
    ("replica_groups={{0,2,4,6},{1,3,5,7},{8,10,12,14},{9,11,13,15}}", ("fsdp",), 4),
    ("replica_groups=[8,2]<=[16]", ("tensor",), 8),
    ("replica_groups=[4,4]<=[2,4,2]T(0,2,1)", ("fsdp",), 4),
    ("replica_groups=[2,8]<=[8,2]T(1,0)", ("data", "fsdp"), 2),
    ("replica_groups=mesh['data'=2,'fsdp'=4,'tensor'=2] {'data','tensor'}", ("data", "tensor"), 4),
    ("replica_groups=mesh['axis_0'=16] {'axis_0'}", ("data", "fsdp", "tensor"), 1),
    ("replica_groups={}", ("data", "fsdp", "tensor"), 1),
    ("source_target_pairs={{0,2},{2,4},{4,6}}", ("fsdp",), 3),
])
def test_every_form_of_groups_names_its_mesh_axes(text, axes, count):
    groups = replica_groups(text, 16)
    assert axes_of(groups, MESH) == axes
    assert len(groups) == count
    if "source" not in text:
        assert sorted(groups.flat) == list(range(16))


def test_groups_of_an_unknown_form_are_refused():
    with pytest.raises(ValueError, match="replica groups of an unknown form"):
        replica_groups("replica_groups=mesh['x'=16] {'x':(2)4}", 16)
    with pytest.raises(ValueError, match="no ENTRY"):
        Module("nothing")


def counted(text):
    module = Module(text)
    return module, sum(times * hlo_cost.flops(module, c, i) for c, i, times in module.executed)


def test_products_in_nested_loops_count_as_often_as_they_run():
    w = jnp.ones((32, 32))

    def inner(x, _):
        return jnp.tanh(x @ w), None

    def outer(x, _):
        return jax.lax.scan(inner, x, None, length=5)[0] @ w, None

    compiled = jax.jit(lambda x: jax.lax.scan(outer, x, None, length=3)[0]).lower(jnp.ones((8, 32))).compile()
    module, flops = counted(compiled.as_text())
    assert flops == 2 * 8 * 32 * 32 * 3 * (5 + 1)
    assert module.unknown_loops == 0


def test_a_loop_without_a_known_end_is_said():
    def body(x):
        return x @ jnp.ones((8, 8)) * 0.1

    compiled = jax.jit(lambda x: jax.lax.while_loop(lambda x: x[0, 0] > 1, body, x)).lower(jnp.ones((8, 8))).compile()
    module, flops = counted(compiled.as_text())
    assert flops == 2 * 8**3
    assert module.unknown_loops == 1


def test_bytes_of_what_is_sliced_are_those_of_the_slices():
    stack = jax.ShapeDtypeStruct((10, 256, 256), jnp.float32)

    def add(total, x):
        return total + x, None

    compiled = jax.jit(lambda xs: jax.lax.scan(add, jnp.zeros((256, 256)), xs)[0]).lower(stack).compile()
    module = Module(compiled.as_text())
    moved = sum(times * hlo_cost.hbm_bytes(module, c, i) for c, i, times in module.executed)
    # Ten times: one slice and the sum read, the sum written; and the start. Never the stack ten times.
    assert 10 * 3 * 256**2 * 4 <= moved <= 1.3 * 10 * 3 * 256**2 * 4


# ------------------------------------------------------------------------------------------------- ahead of time

LAYERS, D, F = 3, 256, 512


def fsdp_step(sizes, *, scan, topology="v5e:4x4"):
    """A two-matrix network with weights gathered over fsdp for each use: its optimised HLO for a TPU."""
    mesh = jax.make_mesh(sizes, tuple(MESH), axis_types=(AxisType.Explicit,) * 3,
                         devices=tpu_aot.devices_of(topology))

    def layer(x, weights):
        up, down = (jax.sharding.reshard(w.astype(jnp.bfloat16), P(*spec)) for w, spec in
                    zip(weights, ((None, "tensor"), ("tensor", None)), strict=True))
        rows = P(("data", "fsdp"), None)
        h = jax.nn.silu(jax.lax.dot_general(x, up, (((1,), (0,)), ((), ())), out_sharding=P(rows[0], "tensor")))
        return x + jax.lax.dot_general(h, down, (((1,), (0,)), ((), ())), out_sharding=rows), None

    def loss(weights, x):
        if scan:
            x, _ = jax.lax.scan(jax.checkpoint(layer), x, weights)
        else:
            for i in range(LAYERS):
                x, _ = layer(x, jax.tree.map(lambda w, i=i: w[i], weights))
        return jnp.sum(x.astype(jnp.float32) ** 2)

    def struct(shape, dtype, *spec):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))

    weights = (struct((LAYERS, D, F), jnp.float32, None, "fsdp", "tensor"),
               struct((LAYERS, F, D), jnp.float32, None, "tensor", "fsdp"))
    x = struct((4096, D), jnp.bfloat16, ("data", "fsdp"), None)
    with jax.set_mesh(mesh):
        compiled = jax.jit(jax.grad(loss)).lower(weights, x).compile()
    return compiled.as_text(), dict(zip(MESH, sizes, strict=True))


@tpu_aot.requires_libtpu
@pytest.mark.parametrize(("topology", "sizes", "scan"), [
    ("v5e:4x4", (1, 16, 1), False), ("v5e:4x4", (2, 8, 1), True), ("v5e:4x4", (2, 4, 2), True),
    # Collectives run on a core of their own.
    ("tpu7x:2x2x1", (1, 8, 1), False),
])
def test_collectives_of_a_tpu_program_are_those_on_paper(topology, sizes, scan):
    text, mesh = fsdp_step(sizes, scan=scan, topology=topology)
    moved = {}
    for c in collectives(Module(text), mesh):
        moved[c.kind, c.axes] = moved.get((c.kind, c.axes), 0) + c.times * c.bytes
    data, fsdp, tensor = sizes
    matrices = LAYERS * 2 * D * F * 2 / tensor
    # Gathered for the forward pass, and under a checkpoint again; asynchronous ones, in several fusions, count once.
    assert moved.pop(("all-gather", ("fsdp",))) == matrices * (2 if scan else 1)
    shared = ("data", "fsdp") if data > 1 else ("fsdp",)
    scattered = moved.pop(("reduce-scatter", shared), 0)
    summed = moved.pop(("all-reduce", shared), 0) + scattered
    assert summed == pytest.approx(matrices, abs=64)  # And the loss.
    if tensor > 1:  # Sums over hidden units, and over both products' inputs in the gradient.
        rows = 4096 / (data * fsdp) * D * 2
        assert moved.pop(("all-reduce", ("tensor",))) == 2 * LAYERS * rows
    assert not moved


@tpu_aot.requires_libtpu
def test_products_of_a_tpu_program_are_those_on_paper():
    text, _ = fsdp_step((1, 16, 1), scan=True)
    module, flops = counted(text)
    rows = 4096 / 16
    # Forward, gradients by inputs (of the first layer too, for the scan) and by weights; `up` again in the checkpoint.
    assert flops == pytest.approx(2 * rows * D * F * LAYERS * (3 * 2 + 1), rel=1e-6)
    assert module.unknown_loops == 0


def test_a_trip_count_that_begins_elsewhere():
    text = """HloModule m

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p = (s32[], f32[4]{0}) parameter(0)
  ROOT %t = (s32[], f32[4]{0}) tuple(%p)
}

%cond (q: (s32[], f32[4])) -> pred[] {
  %end = s32[] constant(9)
  %q = (s32[], f32[4]{0}) parameter(0)
  %i = s32[] get-tuple-element(%q), index=0
  ROOT %less = pred[] compare(%i, %end), direction=LT
}

ENTRY %main (x: f32[4]) -> (s32[], f32[4]) {
  %x = f32[4]{0} parameter(0)
  %start = s32[] constant(2)
  %init = (s32[], f32[4]{0}) tuple(%start, %x)
  ROOT %loop = (s32[], f32[4]{0}) while(%init), condition=%cond, body=%body
}
"""
    assert {times for _, i, times in Module(text).executed if i.name == "t"} == {7.0}


def test_a_window_counts_where_it_meets_data():
    taps = {"pad": "2_0"}
    assert hlo_cost._hits(16, 16, 3, taps) == 16 * 3 - 3
    assert hlo_cost._hits(16, 14, 3, {}) == 14 * 3
    # How TPU's compiler writes a product with batch dimensions: each place of the window meets one element.
    assert hlo_cost._hits(4, 4, 4, {"pad": "3_3", "stride": "3", "lhs_dilate": "4"}) == 4
