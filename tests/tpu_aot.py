"""What tests that compile for a TPU share; the compiler is found by `lfm_jax.plan.topology`."""

import jax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lfm_jax.plan.topology import libtpu_path, tpu_devices

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}

requires_libtpu = pytest.mark.skipif(
    libtpu_path() is None, reason="libtpu is not installed: pip install --target <prefix>/libtpu --no-deps libtpu"
)

devices_of = tpu_devices


def compile_for(topology, fn, *args):
    """`fn` compiled for one device of `topology` (see TOPOLOGIES); `args` are trees of `jax.ShapeDtypeStruct`."""
    mesh = Mesh(devices_of(topology)[:1], ("device",))
    sharding = NamedSharding(mesh, PartitionSpec())
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # Pallas asks it which TPU it lowers for.
        return jax.jit(fn).lower(*args).compile()
