"""Weights as an engine holds them, replicas of a model over a mesh, and the memory that an engine needs."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from lfm_jax.config import ModelConfig
from lfm_jax.engine.config import EngineConfig
from lfm_jax.engine.slots import slot_shapes
from lfm_jax.kernels.int8_slots import Int8Slots
from lfm_jax.kernels.linear import joined
from lfm_jax.model import LFM, param_axes
from lfm_jax.sharding import MESH_AXES, TENSOR, axis_names, make_mesh, shardings, spec_of, whole
from lfm_jax.state import State
from lfm_jax.weight_kinds import WeightKind


def replica_mesh(mesh: Mesh) -> Mesh:
    """Returns the mesh of an engine over the devices of another mesh, in the same order: a replica for each place along
    its axes, split as they are over `tensor`."""
    sizes = dict.fromkeys(MESH_AXES, 1) | {"data": mesh.size // mesh.shape[TENSOR], TENSOR: mesh.shape[TENSOR]}
    devices = np.moveaxis(mesh.devices, mesh.axis_names.index(TENSOR), -1)
    return Mesh(devices.reshape(*sizes.values()), MESH_AXES, axis_types=(AxisType.Explicit,) * len(MESH_AXES))


def gathered(params: Any) -> Any:
    """Returns parameters that lie on a mesh with no split but that over `tensor`, so that every device holds what a
    replica over `replica_mesh` needs of it. The devices gather them; `jax.device_put` would do so through the host.
    What is not split otherwise, and what lies on no mesh, is returned itself."""
    others = set(MESH_AXES) - {TENSOR}
    return jax.tree.map(lambda x: whole(x, *others) if others & {*axis_names(spec_of(x))} else x, params)


def place_replicas(params: Any, config: ModelConfig, mesh: Mesh | None) -> list[tuple[Any, Mesh]]:
    """Returns a copy of the parameters for each index along `data`, split over its devices along `tensor`, with its
    mesh. What each device holds as it needs it is not copied.

    Raises:
      ValueError: the mesh splits `fsdp` or `context`, or heads or widths do not divide over `tensor`.
    """
    if mesh is None:
        return [(params, jax.sharding.get_mesh())]
    sizes = dict(mesh.shape)
    others = {name: size for name, size in sizes.items() if name not in ("data", "tensor") and size > 1}
    if others:
        raise ValueError(f"the mesh splits {others}; an engine uses `data` and `tensor` only")
    order = [mesh.axis_names.index(name) for name in ("data", "tensor")]
    rest = [i for i in range(mesh.devices.ndim) if i not in order]
    devices = np.transpose(mesh.devices, [*order, *rest]).reshape(sizes["data"], sizes["tensor"])
    replicas = []
    for row in devices:
        part = make_mesh(tensor=sizes["tensor"], devices=list(row))
        with jax.set_mesh(part):
            replicas.append((jax.device_put(params, shardings(params, param_axes(config))), part))
    return replicas


Joins = list[tuple[int, str, tuple[str, ...]]]
"""Layer, part of it (operator or feed_forward), and the names of weights that meet the same input."""


def joins(model: LFM) -> Joins:
    """Returns the weights of a model that `joined_weights` makes one."""
    parts = [(i, part, getattr(getattr(block, part), "together", ()))
             for i, block in enumerate(model.blocks) for part in ("operator", "feed_forward")]
    return [(i, part, names) for i, part, names in parts if names]


def joined_weights(params: Any, groups: Joins) -> Any:
    """Returns the parameters with weights that meet the same input as one matrix (`kernels.linear.joined`), except
    those that are no plain arrays: narrow ones, and those with an adapter."""
    if not groups:
        return params
    blocks = {i: dict(block) for i, block in params["blocks"].items()}
    for i, part, names in groups:
        ws = [blocks[i][part][name] for name in names]
        if not any(isinstance(w, WeightKind) for w in ws):
            blocks[i][part] = {**blocks[i][part], **dict(zip(names, joined(ws), strict=True))}
    return {**params, "blocks": blocks}


TRAINED = 32_768
"""Tokens of context that models of this family were trained for."""
SHARE = 0.75
"""Of a device's memory, for slots of our own choice: on a CPU the process and others need the rest."""


def fit_slots(engine: EngineConfig, model: ModelConfig, params: Any, mesh: Mesh | None, limit: int) -> EngineConfig:
    """The config with the most room that fits, where it names no slots.

    Args:
      params: the model's parameters, or their shapes.
      limit: bytes of a device that may be used.
    """
    if engine.slots:
        return engine
    longest = min(TRAINED, model.max_position)
    short = min(2048, longest)
    choices: list[tuple[tuple[int, int], ...]] = [
        ((16, short), (1, longest // part)) for part in (1, 2, 4, 8) if longest // part > short
    ]
    choices += [((number, short // part),) for number, part in ((16, 1), (8, 1), (4, 1), (4, 2), (4, 4), (1, 4))]
    configs = [dataclasses.replace(engine, slots=slots) for slots in choices]
    needed = (sum(memory_needed(config, model, params, mesh).values()) for config in configs)
    # The smallest one where none fits: what is too much is then told with a table.
    return next((config for config, size in zip(configs, needed, strict=True) if size <= SHARE * limit), configs[-1])


def device_memory() -> int:
    """Returns the bytes of memory of the first device, as its driver reports them; for a CPU those of the machine or
    its container."""
    device = jax.local_devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    granted = limit.read_text().strip() if limit.is_file() else "max"
    return min(machine, int(granted)) if granted.isdigit() else machine


def memory_needed(
    engine: EngineConfig, model: ModelConfig, params: Any, mesh: Mesh | None = None
) -> dict[str, int]:
    """Returns the bytes that an engine takes on a device, by purpose; working memory is an estimate.

    Args:
      params: the model's parameters, or their shapes.
    """
    V, tensor = model.vocab_size, 1 if mesh is None else mesh.shape["tensor"]
    most = max(engine.slots, key=lambda kind: kind[0])
    logits = 4 * V * most[0] * (1 + engine.draft)
    if engine.max_logprobs:
        logits = max(logits, 4 * V * engine.prompts_at_once(most, engine.chunk)[0] * engine.chunk)
    found = {"parameters": _bytes(params) // tensor}
    working = 0
    if engine.adapters:
        from lfm_jax.adapters.trees import empty_places

        places = jax.eval_shape(lambda: empty_places(model, engine.adapters, engine.adapter_rank))
        name = f"places for {engine.adapters} adapters of rank {engine.adapter_rank}, and their copy when one comes"
        found[name] = 2 * _bytes(places)
    for shape in slot_shapes(engine, model):
        slots = jax.eval_shape(shape.init)
        state, rest = _bytes(slots.state), _bytes(dataclasses.replace(slots, state=()))
        found[f"{shape.slots} slots of {shape.length} tokens"] = state // tensor + rest
        # A dispatch copies the rows that it works on, unless it works on all; rows of prompts are copied twice.
        taken_in = engine.prompts_at_once((shape.slots, shape.length), 16)[-1]
        copied = max(2 * taken_in, *[n for n in shape.row_counts if n < shape.slots], 0)
        # A layer's keys and values in int8 are widened for the rows that attend: on a CPU only those of prompts.
        wide = taken_in if jax.default_backend() == "cpu" else shape.slots
        widened = _widest(slots.state, model) // tensor * wide
        working = max(working, ((state // tensor + rest) * copied + widened) // shape.slots)
    return found | {"prefix cache": engine.prefix_cache_bytes, "working": working + 3 * logits}


def _widest(state: State, model: ModelConfig) -> int:
    """Bytes of the keys and values of one layer in the model's dtype; 0 where they are not narrow."""
    sizes = [sum(x.values_BSKH.size for x in jax.tree.leaves(layer, is_leaf=_is_narrow) if _is_narrow(x))
             for layer in state.layers]
    return max(sizes) * jnp.dtype(model.dtype).itemsize


def _is_narrow(x: Any) -> bool:
    return isinstance(x, Int8Slots)


def give_back_memory() -> None:
    """Has the allocator return to the system what it keeps of freed memory: after compiling, a hundred MiB."""
    with contextlib.suppress(OSError, AttributeError):  # Other libraries than glibc have no such call.
        ctypes.CDLL(None).malloc_trim(0)


def _bytes(tree: Any) -> int:
    """As a device holds them: int4 in half a byte, whatever NumPy says of it."""
    return sum(-(-x.size * _bits(x.dtype) // 8) for x in jax.tree.leaves(tree))


def _bits(dtype: Any) -> int:
    return jnp.iinfo(dtype).bits if jnp.issubdtype(dtype, jnp.integer) else 8 * dtype.itemsize


def check_memory(needed: Mapping[str, int], limit: int) -> None:
    """Raises ValueError with a table if the memory needed exceeds the limit."""
    total = sum(needed.values())
    if total > limit:
        lines = "\n".join(f"  {size / 2**20:10,.1f} MiB  {name}" for name, size in needed.items())
        raise ValueError(f"the engine needs {total / 2**20:,.1f} MiB of memory a device and may use "
                         f"{limit / 2**20:,.1f}; take fewer or shorter slots, or a smaller prefix cache:\n{lines}")
