"""The recurrence with time split over devices equals one device, forward and gradient; what moves is a few states."""

import functools
import math

import jax
import numpy as np
import pytest
from helpers import long, rel_err
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import collectives

from lfm_jax.kernels.linear_scan import linear_scan

B, T, D = 3, 72, 5
ROW, TIME = P(), P(None, "context")


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    a, b, h0, dh, dlast = (rng.standard_normal(s) for s in ((B, T, D), (B, T, D), (B, D), (B, T, D), (B, D)))
    a = rng.choice([0.0, 1e-30, 0.5, 0.9999], a.shape, p=[0.02, 0.02, 0.36, 0.6])
    return tuple(x.astype(np.float32) for x in (a, b, h0, dh, dlast))


def layouts():
    """Documents over several shards, one that starts where a shard does, shards of padding, a row of nothing else."""
    straddling = np.repeat([7, 3, 4, 9], [5, 33, 17, 17])
    at_border = np.repeat([1, 2, 0], [36, 9, 27])
    return np.stack([straddling, at_border, np.zeros(T)]).astype(np.int32)


@functools.cache
def mesh_of(shards):
    return jax.make_mesh((shards,), ("context",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:shards])


def place(x, shards):
    """Time over the devices, states whole on each; on one device, x."""
    if shards == 1:
        return x
    sharding = NamedSharding(mesh_of(shards), TIME if x.shape[:2] == (B, T) else ROW)
    return jax.device_put(x, sharding)


def scan(impl, ids, shards):
    """(a, b, h0) -> (h, last), on one device or split over several."""
    def whole(a, b, h0):
        return linear_scan(a, b, h0, ids, impl=impl)

    def shard(a, b, h0, *ids):
        return linear_scan(a, b, h0, *ids, impl=impl, axis="context")

    if shards == 1:
        return whole
    given = () if ids is None else (place(ids, shards),)
    specs = (TIME, TIME, ROW) + (TIME,) * len(given)
    split = jax.shard_map(shard, mesh=mesh_of(shards), in_specs=specs, out_specs=(TIME, ROW), check_vma=False)
    return lambda a, b, h0: split(a, b, h0, *given)


def values_and_gradients(impl, ids, shards, args):
    @jax.jit
    def run(a, b, h0, dh, dlast):
        values, pull = jax.vjp(scan(impl, ids, shards), a, b, h0)
        return *values, *pull((dh, dlast))

    return [np.asarray(x) for x in run(*(place(x, shards) for x in args))]


@functools.cache
def on_one_device(packed):
    return values_and_gradients("sequential", layouts() if packed else None, 1, arrays())


@pytest.mark.parametrize(("impl", "shards", "packed"), [
    ("chunked", 8, True), ("chunked", 2, False), ("sequential", 8, True), ("associative", 4, True),
    *(long("chunked", *rest) for rest in ((2, True), (4, True), (4, False), (8, False))),
    *(long("sequential", *rest) for rest in ((2, True), (2, False), (4, True), (4, False), (8, False))),
    long("associative", 4, False),
])
def test_values_and_gradients_equal_one_device(impl, shards, packed):
    """In `make test-long` every number of shards, with documents and without."""
    ids = layouts() if packed else None
    split = values_and_gradients(impl, ids, shards, arrays())
    real = np.ones((B, T), bool) if ids is None else ids != 0
    for i, (mine, expected) in enumerate(zip(split, on_one_device(packed), strict=True)):
        mine, expected = (mine[real], expected[real]) if i == 0 else (mine, expected)
        assert rel_err(mine, expected) < 1e-5, ("h", "last", "da", "db", "dh0")[i]


@pytest.mark.parametrize("impl", ["chunked", long("sequential")])
def test_nan_stays_in_its_document_and_its_shards(impl):
    """Row 0: the document 3 is NaN, its successors are as they were. Row 2 is padding: NaN everywhere means nothing.

    In `make test-long` the plain loop over tokens too.
    """
    ids, (a, b, h0, dh, dlast) = layouts(), arrays()
    bad = ids == 3
    bad[2] = True
    poisoned = [np.where(bad[:, :, None], np.nan, x) for x in (a, b)]
    cotangent = np.where(bad[:, :, None], 0, dh)
    good = values_and_gradients(impl, ids, 8, (a, b, h0, cotangent, dlast))
    mine = values_and_gradients(impl, ids, 8, (*poisoned, h0, cotangent, dlast))
    kept = ~bad & (ids != 0)
    np.testing.assert_array_equal(mine[0][kept], good[0][kept])
    np.testing.assert_array_equal(mine[1], good[1])
    for x, y in zip(mine[2:4], good[2:4], strict=True):
        np.testing.assert_array_equal(x[~bad], y[~bad])
    np.testing.assert_array_equal(mine[4], good[4])


@pytest.mark.parametrize("shards", [4, long(2), long(8)])
def test_what_moves_is_a_logarithmic_number_of_states_never_the_sequence(shards):
    """In `make test-long` fewer and more shards: the number of steps follows."""
    args = [place(x, shards) for x in arrays()]
    steps = 1 + math.ceil(math.log2(shards))  # To the neighbour, then 1, 2, 4, ... shards on.

    def moved(fn, *args):
        return collectives(jax.jit(fn).lower(*args).compile())

    def check(moved, passes, columns=0):
        """(a, 1 - a, b) at each step of a pass; of the last step's only b is used."""
        state = ("collective-permute", "f32", (B, D))
        assert moved.count(state) <= passes * (3 * steps - 2)
        assert moved.count(("collective-permute", "s32", (B, 1))) == columns
        assert len(moved) == moved.count(state) + columns
        assert moved.count(state) >= passes * steps

    check(moved(lambda a, b, h0: scan("chunked", None, shards)(a, b, h0)[0], *args[:3]), 1)
    check(moved(lambda a, b, h0: scan("chunked", layouts(), shards)(a, b, h0)[0], *args[:3]), 1, columns=1)

    def gradient(a, b, h0, dh):
        h, pull = jax.vjp(lambda a, b: scan("chunked", None, shards)(a, b, h0)[0], a, b)
        return h, pull(dh)

    check(moved(gradient, *args[:4]), 2)
    last = moved(lambda a, b, h0: scan("chunked", None, shards)(a, b, h0)[1], *args[:3])
    assert [kind for kind in last if kind[0] != "collective-permute"] == [("all-reduce", "f32", (B, D))]


def test_the_summary_of_a_shard_costs_chunked_no_pass_of_its_own():
    """Arrays of a shard are read twice, as on one device: for the summaries of chunks and for the states."""
    def reads(fn, *args):
        text = jax.jit(fn).lower(*args).compile().as_text()
        entry = text[text.index("\nENTRY") :].splitlines()
        inputs = {line.split()[0] for line in entry if " f32[1,4096,16]" in line and " parameter(" in line}
        assert len(inputs) == 2
        return sum(f"{name}," in line or f"{name})" in line for line in entry if " fusion(" in line for name in inputs)

    def struct(shape, spec):
        return jax.ShapeDtypeStruct(shape, np.float32, sharding=NamedSharding(mesh_of(2), spec))

    shard = functools.partial(linear_scan, impl="chunked", axis="context")
    split = jax.shard_map(lambda *args: shard(*args)[0], mesh=mesh_of(2), in_specs=(TIME, TIME, ROW), out_specs=TIME,
                          check_vma=False)
    alone, h0 = jax.ShapeDtypeStruct((1, 4096, 16), np.float32), jax.ShapeDtypeStruct((1, 16), np.float32)
    expected = reads(lambda *args: linear_scan(*args, impl="chunked")[0], alone, alone, h0)
    assert reads(split, struct((1, 8192, 16), TIME), struct((1, 8192, 16), TIME), struct((1, 16), ROW)) == expected


def test_an_axis_that_is_not_there_is_named():
    a, b, h0 = arrays()[:3]
    with pytest.raises(ValueError, match="axis is 'context', which is no mesh axis here"):
        linear_scan(a, b, h0, axis="context")
    body = functools.partial(linear_scan, axis="time")
    split = jax.shard_map(body, mesh=mesh_of(2), in_specs=(TIME, TIME, ROW), out_specs=(TIME, ROW), check_vma=False)
    with pytest.raises(ValueError, match="axis is 'time', which is no mesh axis here"):
        split(*(place(x, 2) for x in (a, b, h0)))
