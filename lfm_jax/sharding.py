"""Meshes and the layout of arrays over them.

Mesh axes are explicit: the split of an array is part of its type. Where an array is made, one table of logical axes
(`LOGICAL_AXES`, through `spec`) defines its layout; code that computes with it reads the layout from the array
(`spec_of`). Without a mesh no array is split.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lfm_jax.problems import raise_problems
from lfm_jax.weight_kinds import WeightKind

MESH_AXES = ("data", "fsdp", "expert", "tensor", "context")
CONTEXT = "context"
"""The mesh axis that splits time."""
FSDP = "fsdp"
"""The mesh axis that splits rows of a batch and, between uses, parameters: each is gathered where it is used."""
EXPERT = "expert"
"""The mesh axis that splits rows of a batch and the experts of a mixture."""
TENSOR = "tensor"
"""The mesh axis that splits heads, channels, feed-forward units and the vocabulary."""
ROWS = ("data", FSDP, EXPERT)
"""The mesh axes that split rows of a batch."""

LOGICAL_AXES: dict[str, tuple[str, ...]] = {
    "batch": ROWS,  # Rows of a batch and of activations; decode state is whole along it.
    "time": (CONTEXT,),
    "width": (FSDP,),  # Of parameters; the residual stream is whole.
    "channels": (TENSOR,),  # Inside a short convolution or a recurrence.
    "heads": (TENSOR,),
    "kv_heads": (TENSOR,),
    "ffn": (TENSOR,),
    "experts": (EXPERT,),
    "vocab": (TENSOR,),
}
"""Logical axis -> the mesh axes that split it. An axis without a name (None) is whole on every device. Optimizer state
has the layout of its parameters."""


def make_mesh(
    *, data: int = 1, fsdp: int = 1, expert: int = 1, tensor: int = 1, context: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Makes a mesh of explicit axes `data, fsdp, expert, tensor, context`, for `jax.set_mesh`.

    Raises:
      ValueError: the product of the sizes is not the number of devices, or a size is not a product of dimensions of the
        slice.
    """
    devices = jax.devices() if devices is None else devices
    sizes = (data, fsdp, expert, tensor, context)
    count = math.prod(sizes)
    if min(sizes) < 1 or count != len(devices):
        named = ", ".join(f"{name}={size}" for name, size in zip(MESH_AXES, sizes, strict=True))
        raise ValueError(f"{named} make a mesh of {count} devices, but there are {len(devices)}; change a size")
    try:
        return jax.make_mesh(sizes, MESH_AXES, axis_types=(AxisType.Explicit,) * len(sizes), devices=devices)
    except NotImplementedError as error:  # JAX raises it for axes that do not follow the dimensions of a TPU slice.
        raise ValueError(
            f"mesh sizes {sizes} do not fit this slice: each size must be the product of some of its dimensions; "
            f"change them ({error})"
        ) from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """The number of devices along each mesh axis.

    Raises:
      ValueError: on construction; the message lists every bad field.
    """

    data: int = 0
    """Copies of the model that share a batch's rows; 0 uses all devices that the other axes leave."""
    fsdp: int = 1
    """Devices that share rows and keep a part of every parameter and of its optimizer state."""
    expert: int = 1
    """Devices that share rows and the experts of `moe` layers; a divisor of their number."""
    tensor: int = 1
    """Devices that share heads, channels, feed-forward units and vocabulary; a divisor of the key/value heads."""
    context: int = 1
    """Devices that share the tokens of a row."""

    def __post_init__(self) -> None:
        least = {name: 0 if name == "data" else 1 for name in MESH_AXES}
        problems = [f"mesh.{name} is {getattr(self, name)}; it must be at least {low}"
                    for name, low in least.items() if getattr(self, name) < low]
        raise_problems("MeshConfig is not valid", problems)

    def sizes(self, num_devices: int) -> dict[str, int]:
        """Returns the number of devices along each axis, `data` included.

        Raises:
          ValueError: the product of the sizes is not the number of devices.
        """
        others = self.fsdp * self.expert * self.tensor * self.context
        data = self.data or max(num_devices // others, 1)
        if data * others != num_devices:
            named = ", ".join(f"{name}={getattr(self, name)}" for name in MESH_AXES)
            raise ValueError(f"mesh of {named} does not make up {num_devices} devices; change a size")
        return {name: getattr(self, name) for name in MESH_AXES} | {"data": data}

    def make(self, devices: Sequence[jax.Device] | None = None) -> Mesh:
        """Makes the mesh over `devices` (None: all devices)."""
        devices = jax.devices() if devices is None else devices
        return make_mesh(**self.sizes(len(devices)), devices=devices)


def spec(*logical: str | None) -> P | None:
    """Returns the layout of an array whose axes have these logical names over the mesh in use; None without a mesh.

    Mesh axes of one device are left out: in the type of an array they would only hinder.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or AxisType.Explicit not in mesh.axis_types:
        return None
    entries = []
    for name in logical:
        split = tuple(axis for axis in (() if name is None else LOGICAL_AXES[name]) if mesh.shape.get(axis, 1) > 1)
        entries.append(split[0] if len(split) == 1 else split or None)
    return P(*entries)


def shardings(abstract: Any, axes: Any) -> Any:
    """Returns the layout of every array of a tree over the mesh in use (`jax.set_mesh`).

    Args:
      abstract: nested dicts of weights, as arrays or as their shapes.
      axes: the same dicts with a tuple of logical names (or None) for each weight, one for each dimension; for a
        `WeightKind` they are those of the array that it represents.

    Returns:
      The tree with a NamedSharding for each array.

    Raises:
      ValueError: dimensions do not divide over their mesh axes; the message lists them all.
    """
    mesh = jax.sharding.get_mesh()
    problems: dict[str, None] = {}

    def leaf(x: Any, names: tuple[str | None, ...]) -> NamedSharding:
        layout = spec(*names)
        assert layout is not None  # There is a mesh.
        for name, size, entry in zip(names, x.shape, layout, strict=True):
            count = math.prod(mesh.shape[axis] for axis in axis_names(entry))
            if size % count:
                over = " x ".join(f"{axis}={mesh.shape[axis]}" for axis in axis_names(entry))
                problems[f"{name} ({size}) does not divide over {over}; give the mesh a divisor of {size}"] = None
        return NamedSharding(mesh, layout)

    def weight(names: tuple[str | None, ...], w: Any) -> Any:
        return jax.tree.map(leaf, w, w.axes(names) if isinstance(w, WeightKind) else names)

    tree = jax.tree.map(weight, axes, abstract, is_leaf=lambda x: type(x) is tuple)
    raise_problems("the mesh does not fit the model", list(problems))
    return tree


def check_divides(B: int, T: int, micro_batches: int, mesh: Mesh | AbstractMesh) -> None:
    """Raises ValueError if a batch of B rows of T tokens, in its micro-batches, does not divide over a mesh."""
    rows, context = math.prod(mesh.shape[axis] for axis in ROWS) * micro_batches, mesh.shape["context"]
    problems = []
    if B % rows:
        over = " x ".join(f"mesh.{axis}" for axis in ROWS if mesh.shape[axis] > 1 or axis != EXPERT)
        problems.append(f"a batch of {B} rows is not a multiple of {over} x micro_batches = {rows}")
    if T % context:
        problems.append(f"a row of {T} tokens is not a multiple of mesh.context = {context}")
    if problems:
        raise ValueError(f"{' and '.join(problems)}; the mesh is {dict(mesh.shape)}")


def whole(x: jax.Array, *axes: str) -> jax.Array:
    """Gathers x over some mesh axes and keeps its split over others; returns x itself without an explicit mesh."""
    if not is_sharded(x):
        return x

    def without(entry: Any) -> Any:
        left = tuple(name for name in axis_names(entry) if name not in axes)
        return left[0] if len(left) == 1 else left or None

    return jax.sharding.reshard(x, P(*map(without, spec_of(x))))


def spec_of(x: jax.Array) -> P:
    """Returns an entry for each axis of x: the mesh axis or axes that split it, None if it is whole."""
    spec = tuple(jax.typeof(x).sharding.spec)
    return P(*spec, *(None,) * (x.ndim - len(spec)))


def is_sharded(x: jax.Array) -> bool:
    """Returns whether x is on a mesh of explicit axes, split or whole; False inside a shard_map."""
    mesh = jax.typeof(x).sharding.mesh
    return not mesh.empty and AxisType.Explicit in mesh.axis_types


def parts(x: jax.Array, axis: int) -> int:
    """Returns the number of pieces that an axis of x is split into."""
    shape = jax.typeof(x).sharding.mesh.shape
    return math.prod(shape[name] for name in axis_names(spec_of(x)[axis]))


def axis_names(entries: Any) -> tuple[str, ...]:
    """Returns the mesh axes in an entry of a spec, or in several entries."""
    if entries is None:
        return ()
    return (entries,) if isinstance(entries, str) else tuple(name for entry in entries for name in axis_names(entry))


def reshard(x: jax.Array, spec: P) -> jax.Array:
    """Lays x out by `spec`; returns x itself without a mesh of explicit axes."""
    return jax.sharding.reshard(x, spec) if is_sharded(x) else x


def on_mesh(x: jax.Array) -> jax.Array:
    """Returns an array from the host, whole on every device of the mesh in use, if there is one."""
    layout = spec(*(None,) * x.ndim)
    return x if layout is None else jax.sharding.reshard(x, layout)


def over_mesh(
    body: Callable[..., Any], args: Mapping[str, jax.Array | None], specs: Mapping[str, P], out_specs: Any
) -> Any:
    """Calls `body(**args)` on every device with its part of the arguments, laid out by `specs`; leaves out None."""
    given = {name: reshard(x, specs[name]) for name, x in args.items() if x is not None}
    in_specs = ({name: specs[name] for name in given},)
    # Replication is not tracked: kernels with their own derivative and Pallas calls cannot declare it in the same way
    # on jax 0.11 and 0.12. Gradients of arrays that are whole on every device are summed over the devices either way.
    return jax.shard_map(lambda given: body(**given), in_specs=in_specs, out_specs=out_specs, check_vma=False)(given)


def platform() -> str:
    """Returns `cpu`, `gpu` or `tpu`: the platform of the mesh in use, which may differ from this machine's when
    compiling ahead of time."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    name = getattr(device, "platform", None) or jax.default_backend()
    return "gpu" if name in ("cuda", "rocm") else name


AMPERE, HOPPER = 8.0, 9.0
"""Compute capabilities. Kernels in Pallas' Mosaic GPU dialect are written for Hopper and nothing else."""


def nvidia_capability() -> float:
    """Returns the compute capability of the NVIDIA GPU in use, 9.0 for Hopper; 0.0 on other devices, and ahead of time
    for a GPU that is not this machine's."""
    meant, here = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None), jax.devices()[0]
    if platform() != "gpu" or (meant is not None and meant.device_kind != here.device_kind):
        return 0.0
    found = getattr(here, "compute_capability", None)
    try:
        return float(found or 0)
    except ValueError:  # Those of AMD are names.
        return 0.0
