"""Meshes, and how an array is laid out over one.

Sharding is written for explicit mesh axes: how an array is split is part of its type, so code asks the array
(`spec_of`) and needs no table of its own. Without a mesh every answer is "not split".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

MESH_AXES = ("data", "fsdp", "tensor", "context")
CONTEXT = "context"
"""The mesh axis that time is split over."""


def make_mesh(
    *, data: int = 1, fsdp: int = 1, tensor: int = 1, context: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh of explicit axes `data, fsdp, tensor, context`, for `jax.set_mesh`.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = (data, fsdp, tensor, context)
    count = data * fsdp * tensor * context
    if min(sizes) < 1 or count != len(devices):
        named = ", ".join(f"{name}={size}" for name, size in zip(MESH_AXES, sizes, strict=True))
        raise ValueError(f"{named} make a mesh of {count} devices, but there are {len(devices)}; change a size")
    return jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Explicit,) * len(sizes), devices=devices)


def spec_of(x: jax.Array) -> P:
    """One entry for each axis of x: the mesh axis or axes it is split over, None where it is whole."""
    spec = tuple(jax.typeof(x).sharding.spec)
    return P(*spec, *(None,) * (x.ndim - len(spec)))


def is_sharded(x: jax.Array) -> bool:
    """Whether x lives on a mesh of explicit axes, split or whole; False inside a shard_map."""
    mesh = jax.typeof(x).sharding.mesh
    return not mesh.empty and AxisType.Explicit in mesh.axis_types


def parts(x: jax.Array, axis: int) -> int:
    """Into how many pieces an axis of x is split."""
    shape = jax.typeof(x).sharding.mesh.shape
    return math.prod(shape[name] for name in axis_names(spec_of(x)[axis]))


def axis_names(entries: Any) -> tuple[str, ...]:
    """The mesh axes named in an entry of a spec, or in several of them."""
    if entries is None:
        return ()
    return (entries,) if isinstance(entries, str) else tuple(name for entry in entries for name in axis_names(entry))


def reshard(x: jax.Array, spec: P) -> jax.Array:
    """x laid out as `spec` says; x itself where there is no mesh of explicit axes."""
    return jax.sharding.reshard(x, spec) if is_sharded(x) else x


def over_mesh(
    body: Callable[..., Any], args: Mapping[str, jax.Array | None], specs: Mapping[str, P], out_specs: Any
) -> Any:
    """`body(**args)` on every device's own part of arguments laid out as `specs` says; None is passed over."""
    given = {name: reshard(x, specs[name]) for name, x in args.items() if x is not None}
    in_specs = ({name: specs[name] for name in given},)
    # Replication is not tracked: kernels with a derivative of their own and Pallas calls cannot declare it alike on
    # jax 0.11 and 0.12. The gradient of what is whole on every device is summed over the devices either way.
    return jax.shard_map(lambda given: body(**given), in_specs=in_specs, out_specs=out_specs, check_vma=False)(given)


def platform() -> str:
    """`cpu`, `gpu` or `tpu`: that of the mesh in use, which ahead of time need not be this machine's."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    name = getattr(device, "platform", None) or jax.default_backend()
    return "gpu" if name in ("cuda", "rocm") else name
