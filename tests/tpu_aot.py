"""Compile for a TPU that is not there: PyPI's `libtpu` compiles ahead of time on a machine with only a CPU.

The library is looked for at TPU_LIBRARY_PATH, under the running environment (`<prefix>/libtpu`, where
`pip install --target <prefix>/libtpu libtpu` puts it) and among the importable packages, in this order.
"""

import functools
import importlib.util
import os
import pathlib
import sys

import jax
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}

_SETTINGS = {
    "TPU_SKIP_MDS_QUERY": "1",  # There is no cloud to ask which TPU this is.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # Several processes may compile at the same time.
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # This and the next only keep libtpu from complaining on stderr.
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
}


def _library():
    """Path of libtpu.so, or None."""
    if "TPU_LIBRARY_PATH" in os.environ:
        return os.environ["TPU_LIBRARY_PATH"]
    path = pathlib.Path(sys.prefix, "libtpu", "libtpu", "libtpu.so")
    if not path.exists():
        spec = importlib.util.find_spec("libtpu")
        path = pathlib.Path(spec.origin).with_name("libtpu.so") if spec and spec.origin else path
    return str(path) if path.exists() else None


requires_libtpu = pytest.mark.skipif(
    _library() is None, reason="libtpu is not installed: pip install --target <prefix>/libtpu --no-deps libtpu"
)


@functools.cache
def devices_of(topology):
    """The devices of a described slice, such as `v5e:2x2`: good for compiling, not for running."""
    for name, value in ({"TPU_LIBRARY_PATH": _library()} | _SETTINGS).items():
        os.environ.setdefault(name, value)
    return topologies.get_topology_desc(topology, "tpu").devices


def compile_for(topology, fn, *args):
    """`fn` compiled for one device of `topology` (see TOPOLOGIES); `args` are trees of `jax.ShapeDtypeStruct`."""
    mesh = Mesh(devices_of(topology)[:1], ("device",))
    sharding = NamedSharding(mesh, PartitionSpec())
    args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # Pallas asks it which TPU it lowers for.
        return jax.jit(fn).lower(*args).compile()
