"""Machines by name (`v5e:16x16`, `gpu:8xH200`, `cpu`), and their devices without the machine.

PyPI's `libtpu` compiles for a TPU that is not there. It is looked for at TPU_LIBRARY_PATH, under the running
environment (`<prefix>/libtpu`, where `pip install --target <prefix>/libtpu --no-deps libtpu` puts it, off the import
path, where JAX would look for a TPU at each start) and among the importable packages, in this order.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import itertools
import math
import os
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.sharding import AxisType, Mesh

from lfm_jax.chips import CHIPS, Chip
from lfm_jax.sharding import MESH_AXES, MeshConfig

_SETTINGS = {
    "TPU_SKIP_MDS_QUERY": "1",  # There is no cloud to ask which TPU this is.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # Several processes may compile at the same time.
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # This and the next only keep libtpu from complaining on stderr.
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
}


def libtpu_path() -> str | None:
    """Path of libtpu.so, or None where it is not installed."""
    if "TPU_LIBRARY_PATH" in os.environ:
        return os.environ["TPU_LIBRARY_PATH"]
    path = pathlib.Path(sys.prefix, "libtpu", "libtpu", "libtpu.so")
    if not path.exists():
        spec = importlib.util.find_spec("libtpu")
        path = pathlib.Path(spec.origin).with_name("libtpu.so") if spec and spec.origin else path
    return str(path) if path.exists() else None


@functools.cache
def tpu_devices(topology: str) -> list[Any]:
    """The devices of a described slice, such as `v5e:2x2`: good for compiling, not for running.

    Raises:
      ValueError: libtpu is not installed.
    """
    from jax.experimental import topologies

    library = libtpu_path()
    if library is None:
        raise ValueError("libtpu is not installed: pip install --target <prefix>/libtpu --no-deps libtpu")
    for name, value in ({"TPU_LIBRARY_PATH": library} | _SETTINGS).items():
        os.environ.setdefault(name, value)
    # As Cloud TPU runs a v4: the two cores of a chip as one device.
    extra = {"chip_config_name": "megacore"} if topology.startswith("v4:") else {}
    return list(topologies.get_topology_desc(topology, "tpu", **extra).devices)


@dataclasses.dataclass(frozen=True)
class StandIn:
    """A device that can neither run nor compile: enough for a mesh, and so for the layout of a training state."""

    id: int
    platform: str
    device_kind: str
    coords: tuple[int, ...] | None
    process_index: int = 0
    num_cores: int = 1
    client: None = None


@dataclasses.dataclass(frozen=True)
class Topology:
    """A machine: its chips and how they hang together."""

    name: str
    chip: Chip | None
    """None for a CPU."""
    shape: tuple[int, ...]
    """Chips along each dimension of a TPU slice, else the one number of devices."""

    @classmethod
    def parse(cls, name: str) -> Topology:
        """Reads `v5e:16x16` (any TPU of the chip table), `gpu:8xH200` or `cpu`, `cpu:8`.

        Raises:
          ValueError: another form, or a chip that is not in the table.
        """
        tpus = [chip.name for chip in CHIPS.values() if chip.torus_dims]
        gpus = [chip.name for chip in CHIPS.values() if not chip.torus_dims]
        if found := re.fullmatch(r"cpu(?::([1-9]\d*))?", name):
            return cls(name, None, (int(found[1] or 1),))
        if (found := re.fullmatch(r"gpu:([1-9]\d*)x(\w+)", name)) and found[2] in gpus:
            return cls(name, CHIPS[found[2]], (int(found[1]),))
        if (found := re.fullmatch(r"(\w+):([1-9]\d*(?:x[1-9]\d*)+)", name)) and found[1] in tpus:
            shape = tuple(int(n) for n in found[2].split("x"))
            if len(shape) == CHIPS[found[1]].torus_dims:
                return cls(name, CHIPS[found[1]], shape)
            raise ValueError(f"topology {name!r} has {len(shape)} dimensions; a slice of {found[1]} has "
                             f"{CHIPS[found[1]].torus_dims}")
        raise ValueError(f"topology {name!r} is not known; expected for example v5e:16x16 ({', '.join(tpus)}), "
                         f"gpu:8xH200 ({', '.join(gpus)}) or cpu:8")

    @property
    def num_devices(self) -> int:
        """Devices as JAX counts them."""
        return math.prod(self.shape) * (self.chip.devices_per_chip if self.chip else 1)

    @property
    def compiles(self) -> bool:
        """Whether the compiler for it is here."""
        return self.chip is not None and self.chip.torus_dims > 0 and libtpu_path() is not None

    def stand_ins(self) -> list[StandIn]:
        """Devices for a mesh that nothing is compiled for."""
        if self.chip is None or not self.chip.torus_dims:
            kind = self.chip.kinds[0].rstrip("*") if self.chip else "cpu"
            return [StandIn(i, "gpu" if self.chip else "cpu", kind, None) for i in range(self.num_devices)]
        places = itertools.product(*map(range, self.shape))
        cores = self.chip.devices_per_chip
        return [StandIn(i * cores + core, "tpu", self.chip.kinds[0], place)
                for i, place in enumerate(places) for core in range(cores)]

    def mesh(self, config: MeshConfig, *, for_compiling: bool) -> Mesh:
        """The mesh of a recipe over this machine.

        Raises:
          ValueError: the sizes do not make up the machine, or do not lie along the dimensions of its torus.
        """
        if for_compiling:
            return config.make(tpu_devices(self.name))
        sizes = config.sizes(self.num_devices)
        devices = np.empty(self.num_devices, object)
        devices[:] = self.stand_ins()
        return Mesh(devices.reshape(tuple(sizes.values())), MESH_AXES, axis_types=(AxisType.Explicit,) * len(sizes))


def bandwidth(mesh: Mesh, axes: Sequence[str], chip: Chip, shape: tuple[int, ...]) -> float:
    """Bytes per second that a device can send to the others along some mesh axes, rings or lines assumed.

    On a torus each of its dimensions that the axes run along gives a link either way where it closes to a ring, and
    one link where it does not; on a switch it is the device's own.

    Args:
      mesh: of devices with coordinates, if on a torus.
      axes: the mesh axes of a collective.
      chip: what the devices are.
      shape: of the slice.
    """
    if not chip.torus_dims:
        return chip.link_bandwidth
    where = [mesh.axis_names.index(axis) for axis in axes]
    index = tuple(slice(None) if i in where else 0 for i in range(mesh.devices.ndim))
    places = np.asarray([device.coords for device in mesh.devices[index].flat])[:, : len(shape)]
    links = 0
    for d, size in enumerate(shape):
        extent = len(np.unique(places[:, d]))
        if extent > 1:
            links += 2 if extent == size and size % chip.wraps_from == 0 else 1
    return max(links, 1) * chip.link_bandwidth
