"""The Hopper kernels in interpret mode against float64 numpy (a race is an error there), and their lowering for CUDA.

Chunks are small in interpret mode, so that short rows have several of them.

Dimensions: B batch, T time, D channels, W taps, V = W - 1.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import rel_err
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax import ShapeDtypeStruct as Shape
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lfm_jax.kernels import causal_conv as conv_module
from lfm_jax.kernels import linear_scan as scan_module
from lfm_jax.kernels import pallas_gpu, pallas_gpu_conv, reference
from lfm_jax.kernels.causal_conv import causal_conv
from lfm_jax.kernels.linear_scan import linear_scan
from lfm_jax.kernels.pallas_gpu import gated_conv, scan
from lfm_jax.sharding import AMPERE, HOPPER

BOUND = 2e-5


@pytest.fixture
def small_chunks(monkeypatch):
    """8 rows of float32 a chunk, 4 of them a group; 2 chunks a program of the convolution."""
    for module, sizes in (
        (pallas_gpu, dict(ROWS=8, GROUP=4)),
        (pallas_gpu_conv, dict(COLUMN_BYTES=32, GROUP=4, CHUNKS=2)),
    ):
        for name, value in sizes.items():
            monkeypatch.setattr(module, name, value)


def draw(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def numpy_scan(a, b, h, reverse):
    a, b, h = (np.asarray(x, np.float64) for x in (a, b, h))
    out = np.zeros_like(b)
    for t in range(b.shape[1])[:: -1 if reverse else 1]:
        h = np.where(a[:, t] == 0, b[:, t], a[:, t] * h + b[:, t])
        out[:, t] = h
    return out, h


@functools.cache
def jitted_scan(reverse):
    return jax.jit(functools.partial(scan, reverse=reverse, interpret=True))


def scan_inputs(seed, shape, dtype=np.float32):
    """Decays near 1, near 0, negative, and exactly 0 in one place out of eight."""
    rng = np.random.default_rng(seed)
    a = rng.choice([0.9999, 1e-20, 0.6, -0.8, 1.0], shape) * rng.uniform(0.999, 1, shape)
    a[rng.random(shape) < 1 / 8] = 0
    arrays = a, draw(rng, *shape), draw(rng, shape[0], shape[2])
    return tuple(np.asarray(x, d) for x, d in zip(arrays, (dtype, dtype, np.float32), strict=True))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("shape", [(2, 21, 72), (1, 1, 5), (1, 16, 64)])
def test_scan_equals_numpy_in_both_directions(small_chunks, shape, reverse):
    """T and D that are no multiples of chunk and block, one step, and an exact fit."""
    for seed in range(3):
        args = scan_inputs(seed, shape)
        h, last = jitted_scan(reverse)(*args)
        expected_h, expected_last = numpy_scan(*args, reverse)
        assert rel_err(h, expected_h) < BOUND
        assert rel_err(last, expected_last) < BOUND


def test_scan_of_bfloat16_computes_in_float32(small_chunks):
    args = scan_inputs(0, (1, 16, 64), jnp.bfloat16)
    h, last = jitted_scan(False)(*args)
    expected_h, expected_last = numpy_scan(*args, False)
    assert (h.dtype, last.dtype) == (jnp.bfloat16, jnp.float32)
    assert rel_err(last, expected_last) < BOUND
    assert rel_err(h, expected_h) < 2**-8


@pytest.mark.parametrize("reverse", [False, True])
def test_a_zero_decay_forgets_nan(small_chunks, reverse):
    a, b, h0 = scan_inputs(1, (2, 21, 72))
    border = 11
    a[:, border] = 0
    past, present = (slice(border + 1, None), slice(border + 1)) if reverse else (slice(border), slice(border, None))
    b[:, past] = np.nan
    h, last = jitted_scan(reverse)(a, b, h0)
    assert np.isnan(h[:, past]).all()
    assert np.isfinite(h[:, present]).all()
    assert np.isfinite(last).all()


@pytest.mark.parametrize("reverse", [False, True])
def test_two_scans_in_a_row_equal_one(small_chunks, reverse):
    a, b, h0 = scan_inputs(2, (2, 21, 72))
    whole, last = jitted_scan(reverse)(a, b, h0)
    state, outs = h0, {}
    for part in [slice(0, 10), slice(10, 21)][:: -1 if reverse else 1]:
        outs[part.start], state = jitted_scan(reverse)(a[:, part], b[:, part], state)
    np.testing.assert_array_equal(np.concatenate([outs[0], outs[10]], axis=1), whole)
    np.testing.assert_array_equal(state, last)


def documents(T, starts, padding=0):
    ids_T = 1 + np.cumsum(np.isin(np.arange(T), list(starts)))
    ids_T[T - padding :] = 0
    return ids_T[None].astype(np.int32)


def test_gradients_of_a_scan_with_documents_equal_numpy(small_chunks):
    """Through `linear_scan`, which lays resets and padding into a and b and takes the reverse scan as the gradient."""
    args = dict(zip(("a_BTD", "b_BTD", "h0_BD"), scan_inputs(3, (1, 21, 72)), strict=True))
    ids_BT = documents(21, {5, 8, 9}, padding=3)
    dh_BTD, dlast_BD = draw(np.random.default_rng(4), 1, 21, 72) * (ids_BT != 0)[:, :, None], args["h0_BD"]

    @jax.jit
    def gradients(args):
        run = functools.partial(linear_scan, segment_ids_BT=ids_BT, impl="pallas_gpu", interpret=True)
        return jax.vjp(lambda args: run(**args), args)[1]((dh_BTD, dlast_BD))[0]

    expected = reference.linear_scan(**args, segment_ids_BT=ids_BT)[1](dh_BTD, dlast_BD)
    for name, gradient in gradients(args).items():
        assert rel_err(gradient, expected[name]) < BOUND, name


class Conv:
    """Random operands of one shape by the names of `causal_conv`, compared with numpy for any documents."""

    def __init__(self, B, T, D, W, gates=("gate_in_BTD", "gate_out_BTD"), bias=True, dtype=np.float32):
        rng = np.random.default_rng(T)
        shapes = {"y_BTD": (B, T, D), "w_WD": (W, D), "tail_BVD": (B, W - 1, D)}
        shapes |= {name: (B, T, D) for name in gates} | ({"bias_D": (D,)} if bias else {})
        self.args = {name: draw(rng, *shape).astype(dtype) for name, shape in shapes.items()}
        self.dz_BTD = draw(rng, B, T, D).astype(dtype)

        @jax.jit
        def value_and_gradients(args, segment_ids, dz):
            run = functools.partial(causal_conv, segment_ids_BT=segment_ids, impl="pallas_gpu", interpret=True)
            value, pull = jax.vjp(lambda args: run(**args), args)
            return value, pull(dz)[0]

        self.value_and_gradients = value_and_gradients

    def check(self, segment_ids=None, bound=BOUND):
        dz = self.dz_BTD if segment_ids is None else self.dz_BTD * (segment_ids != 0)[:, :, None]
        value, gradients = self.value_and_gradients(self.args, segment_ids, dz)
        expected, expected_gradients = reference.causal_conv(**self.args, segment_ids_BT=segment_ids)
        expected_gradients = expected_gradients(dz)
        real = np.full(dz.shape[:2], True) if segment_ids is None else segment_ids != 0
        assert value.dtype == self.args["y_BTD"].dtype
        assert rel_err(np.asarray(value)[real], expected[real]) < bound
        for name, x in self.args.items():
            assert gradients[name].dtype == x.dtype
            scale = np.abs(expected_gradients[name]).max(initial=1e-9)
            error = np.abs(np.asarray(gradients[name], np.float64) - expected_gradients[name]).max(initial=0)
            assert error < bound * scale, name


@pytest.mark.parametrize(
    ("shape", "segment_ids"),
    [
        pytest.param(dict(B=1, T=21, D=130, W=3), documents(21, {7, 8, 16, 20}), id="ragged tiles, parts and chunks"),
        pytest.param(dict(B=2, T=9, D=8, W=2, gates=(), bias=False), None, id="no gate, no bias, no documents"),
        pytest.param(dict(B=1, T=1, D=5, W=4, gates=("gate_out_BTD",)), documents(1, ()), id="fewer tokens than taps"),
        pytest.param(dict(B=1, T=9, D=8, W=1, gates=("gate_in_BTD",)), documents(9, {4}), id="one tap"),
        pytest.param(dict(B=1, T=19, D=8, W=7), documents(19, {9}, 3), id="seven taps"),
    ],
)
def test_convolution_and_all_gradients_equal_numpy(small_chunks, shape, segment_ids):
    Conv(**shape).check(segment_ids)


conv_of_19 = functools.cache(lambda: Conv(1, 19, 8, 3))


@settings(max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(starts=st.sets(st.integers(1, 18)), padding=st.integers(0, 10))
def test_taps_stay_in_their_document_wherever_it_begins(small_chunks, starts, padding):
    """In and between chunks and programs."""
    conv_of_19().check(documents(19, starts, padding))


@pytest.mark.parametrize("border", [8, 10])
def test_nan_stays_in_its_document(small_chunks, border):
    """Values and their gradients by time; the border is that of a chunk, or not."""
    conv, segment_ids = conv_of_19(), documents(19, {border})
    args = {name: x.copy() for name, x in conv.args.items()}
    args["y_BTD"][:, :border] = args["tail_BVD"][...] = np.nan
    value, gradients = conv.value_and_gradients(args, segment_ids, conv.dz_BTD)
    assert np.isnan(value[:, :border]).all()
    for x in (value, gradients["y_BTD"], gradients["gate_in_BTD"], gradients["gate_out_BTD"]):
        assert np.isfinite(x[:, border:]).all()


def test_convolution_of_bfloat16_sums_in_float32(small_chunks):
    Conv(1, 19, 8, 3, dtype=jnp.bfloat16).check(documents(19, {9}), bound=2**-8)


def test_what_the_kernels_cannot_do_is_said():
    a, b, h0 = scan_inputs(0, (1, 8, 64))
    with pytest.raises(ValueError, match="b_BTD is float16; pallas_gpu takes bfloat16 or float32"):
        scan(a, b.astype(np.float16), h0, reverse=False)
    with pytest.raises(ValueError, match=r"a_BTD has shape \(1, 7, 64\); expected that of b_BTD"):
        scan(a[:, 1:], b, h0, reverse=False)
    with pytest.raises(ValueError, match="w_WD has 10 taps; pallas_gpu takes up to 9"):
        gated_conv(b, draw(np.random.default_rng(0), 10, 64), b[:, :0], None, None, None, None)
    with pytest.raises(ValueError, match="gate_out_BTD is int32"):
        gated_conv(b, b[0, :1], b[:, :0], None, None, b.astype(np.int32), None)


def lowered(f, *args):
    """StableHLO for CUDA of f, which needs no GPU."""
    return jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def conv_gradient(dz, y, w, tail, reach, gate_in, gate_out, bias):
    def run(y, w, tail, gate_in, gate_out, bias):
        return gated_conv(y, w, tail, reach, gate_in, gate_out, bias)

    return jax.vjp(run, y, w, tail, gate_in, gate_out, bias)[1](dz)


def big_results(text, size):
    """Operations, calls of functions apart, whose results have this many elements or more."""
    found = []
    for line in text.splitlines():
        match = re.match(r"\s*%\S+ = (?!call )(\S+)(?: @(\w+))?", line)
        shapes = re.findall(r"tensor<((?:\d+x)+)\w+>", line.split("->")[-1])
        if match and any(math.prod(int(n) for n in dims.split("x")[:-1]) >= size for dims in shapes):
            found.append(match[2] or match[1])
    return found


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_kernels_lower_for_cuda_and_nothing_else_touches_long_operands(dtype):
    """Mosaic's own lowering and its limit on shared memory, at the real sizes of chunks and of a benchmark."""
    B, T, D = 8, 4096, 1024
    long, h0 = Shape((B, T, D), dtype), Shape((B, D), jnp.float32)
    for reverse in (False, True):
        text = lowered(functools.partial(scan, reverse=reverse), long, long, h0)
        assert big_results(text, B * T * D) == ["mosaic_gpu_v2"]
    args = (long, Shape((3, D), dtype), Shape((B, 2, D), dtype), None, long, long, Shape((D,), dtype))
    assert big_results(lowered(gated_conv, *args), B * T * D) == ["mosaic_gpu_v2"]
    assert big_results(lowered(conv_gradient, long, *args), B * T * D) == ["mosaic_gpu_v2"]


@pytest.mark.parametrize("taps", [2, pallas_gpu_conv.MAX_TAPS])
def test_odd_shapes_and_documents_lower_for_cuda(taps):
    """Up to the largest chunks that the limit on shared memory allows."""
    B, T, D = 2, 333, 1030
    long, reach = Shape((B, T, D), jnp.float32), Shape((B, T), jnp.int32)
    w, tail, h0 = (Shape(shape, jnp.float32) for shape in ((taps, D), (B, taps - 1, D), (B, D)))
    lowered(functools.partial(scan, reverse=True), long, Shape((B, T, D), jnp.bfloat16), h0)
    lowered(conv_gradient, long, long, w, tail, reach, long, long, None)


def test_kernels_lower_inside_a_shard_map(small_chunks):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:1])
    rows = P("data")
    specs = {"y": rows, "w": P(), "tail": rows, "reach": rows}

    def run(args):
        h, last = scan(args["y"], args["y"], args["tail"][:, 0], reverse=False)
        dy, dw = conv_gradient(h, args["y"], args["w"], args["tail"], args["reach"], None, None, None)[:2]
        return last, dy, dw

    shapes = {"y": ((2, 9, 64), "float32"), "w": ((2, 64), "float32"), "tail": ((2, 1, 64), "float32"),
              "reach": ((2, 9), "int32")}
    args = {name: Shape(*shapes[name], sharding=NamedSharding(mesh, specs[name])) for name in shapes}
    with jax.set_mesh(mesh):
        sharded = jax.shard_map(run, in_specs=(specs,), out_specs=(rows, rows, P()), check_vma=False)
        assert lowered(sharded, args).count("@mosaic_gpu_v2") == 2


@pytest.mark.parametrize(("capability", "T", "changes", "taken"), [
    (HOPPER, 256, {}, {"conv", "scan"}), (HOPPER, 255, {}, set()), (AMPERE, 256, {}, set()),
    (HOPPER, 256, dict(dtype=jnp.float32), {"conv", "scan"}), (HOPPER, 256, dict(dtype=jnp.float16), set()),
    (HOPPER, 256, dict(gate=jnp.float16), {"scan"}),
    (HOPPER, 256, dict(taps=pallas_gpu_conv.MAX_TAPS), {"conv", "scan"}),
    (HOPPER, 256, dict(taps=pallas_gpu_conv.MAX_TAPS + 1), {"scan"}),
])
def test_auto_takes_them_for_long_rows_on_hopper_as_far_as_they_go(monkeypatch, capability, T, changes, taken):
    for module in (conv_module, scan_module):
        monkeypatch.setattr(module, "nvidia_capability", lambda: capability)
    dtype, W = changes.get("dtype", jnp.bfloat16), changes.get("taps", 3)
    x, gate = Shape((2, T, 8), dtype), Shape((2, T, 8), changes.get("gate", dtype))

    jaxprs = {
        "conv": jax.make_jaxpr(lambda y, w, gate: causal_conv(y, w, gate_in_BTD=gate))(x, Shape((W, 8), dtype), gate),
        "scan": jax.make_jaxpr(lambda a, b: linear_scan(a, b))(x, x),  # What is traced is kept by function.
    }
    assert {name for name, jaxpr in jaxprs.items() if "copy_gmem_to_smem" in str(jaxpr)} == taken
