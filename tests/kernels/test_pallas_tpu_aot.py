"""The Pallas kernels for TPU compile for real chips, and fit their memory."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tpu_aot
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lfm_jax.kernels import pallas_tpu

F32, BF16 = jnp.float32, jnp.bfloat16
STRUCT = jax.ShapeDtypeStruct

pytestmark = tpu_aot.requires_libtpu


def kernels(B, T, D, W, dtype):
    """Every kernel as (function, shapes), by name."""
    x_BTD, h_BD, reach_BT = STRUCT((B, T, D), dtype), STRUCT((B, D), F32), STRUCT((B, T), jnp.int32)
    conv = (x_BTD, STRUCT((W, D), dtype), STRUCT((B, W - 1, D), dtype), reach_BT, x_BTD, x_BTD, STRUCT((D,), dtype))

    def conv_gradient(dz_BTD, *args):
        return jax.vjp(lambda *args: pallas_tpu.gated_conv(*args), *args)[1](dz_BTD)

    return {
        "scan": (functools.partial(pallas_tpu.scan, reverse=False), (x_BTD, x_BTD, h_BD)),
        "reverse scan": (functools.partial(pallas_tpu.scan, reverse=True), (x_BTD, x_BTD, h_BD)),
        "gated_conv": (pallas_tpu.gated_conv, conv),
        "gradient of gated_conv": (conv_gradient, (x_BTD, *conv)),
    }


def vmem_bytes(compiled):
    """What the one Pallas call of a compiled function takes on the chip beside its operands."""
    (call,) = [line for line in compiled.as_text().splitlines() if 'custom_call_target="tpu_custom_call"' in line]
    (used,) = re.findall(r'"used_scoped_memory_configs":(\[.*?\])', call)
    return sum(int(config["size"]) for config in json.loads(used))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["f32", "bf16"])
@pytest.mark.parametrize("kernel", ["scan", "reverse scan", "gated_conv", "gradient of gated_conv"])
@pytest.mark.parametrize("chip", tpu_aot.TOPOLOGIES)
def test_compiles_for_tpu_within_its_memory(chip, kernel, dtype):
    fn, args = kernels(8, 4096, 1024, 3, dtype)[kernel]
    compiled = tpu_aot.compile_for(tpu_aot.TOPOLOGIES[chip], fn, *args)
    # 16 MiB is what every one of these chips grants a kernel unasked; they have 64 to 128.
    assert 4 << 20 < vmem_bytes(compiled) < 16 << 20
    # No copy of a large array around the call.
    assert compiled.memory_analysis().temp_size_in_bytes < 1 << 20


def test_inside_shard_map_only_the_gradients_of_taps_and_bias_travel():
    """Rows over `data`, channels over `tensor`, explicit mesh axes, four chips."""
    devices = np.array(tpu_aot.devices_of(tpu_aot.TOPOLOGIES["v5e"])).reshape(2, 2)
    mesh = jax.sharding.Mesh(devices, ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    rows, state = P("data", None, "tensor"), P("data", "tensor")

    def collectives(fn, *args_and_specs):
        args = [STRUCT(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)) for x, spec in args_and_specs]
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            hlo = jax.jit(fn).lower(*args).compile().as_text()
        assert hlo.count('custom_call_target="tpu_custom_call"') == 1
        return re.findall(r"= (.*) (?:all-\w+|collective-permute|reduce-scatter)(?:-start)?\(", hlo)

    scan, args = kernels(8, 512, 1024, 3, BF16)["scan"]
    specs = (rows, rows, state)
    sharded_scan = jax.shard_map(scan, in_specs=specs, out_specs=(rows, state), check_vma=False)
    assert collectives(sharded_scan, *zip(args, specs, strict=True)) == []

    conv, args = kernels(8, 512, 1024, 3, BF16)["gated_conv"]
    specs = (rows, P(None, "tensor"), rows, P("data", None), rows, rows, P("tensor"))
    sharded_conv = jax.shard_map(conv, in_specs=specs, out_specs=rows, check_vma=False)

    def gradient(dz_BTD, *args):
        return jax.vjp(sharded_conv, *args)[1](dz_BTD)

    (moved,) = collectives(gradient, (args[0], rows), *zip(args, specs, strict=True))
    assert re.findall(r"\[([\d,]+)\]", moved) == ["3,512", "512"]
