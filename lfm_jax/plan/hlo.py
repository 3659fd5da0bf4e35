"""Reads the text of an optimised HLO module: what runs, how often, and what it moves.

The compiler's own counts take the body of a loop once; here every instruction comes with the number of times that it
runs. Formats are those that XLA prints for CPU and TPU in jax 0.11 and 0.12.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from functools import cached_property

import numpy as np

ITEMSIZE = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "s64": 8, "u64": 8,
    "f8e4m3fn": 1, "f8e5m2": 1, "f16": 2, "bf16": 2, "f32": 4, "f64": 8, "c64": 8, "c128": 16, "token": 0,
}

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"([a-z][\w\-]*)\(")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](\{[^{}]*\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_ON_CHIP = re.compile(r"S\([1-9]")


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array as one device holds it."""

    dtype: str
    dims: tuple[int, ...]
    in_hbm: bool
    """False for what the compiler keeps in a chip's own memory (a memory space other than 0)."""

    @property
    def bytes(self) -> float:
        return ITEMSIZE.get(self.dtype, 0) * math.prod(self.dims)


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    """Of the result; several if it is a tuple, as a flat list."""
    operands: tuple[str, ...]
    text: str
    """All that stands behind the opcode."""
    is_root: bool

    def called(self, attribute: str) -> str | None:
        """The computation that an attribute such as `calls` names."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.text)
        return found and found[1]


Computation = dict[str, Instruction]


class Module:
    """A parsed module.

    Raises:
      ValueError: the text has no entry computation.
    """

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        self.unknown_loops = 0
        """Loops whose trip count could not be read; their bodies count once."""
        entry, body = None, None
        for line in text.splitlines():
            if body is None:
                if header := _HEADER.match(line):
                    body = self.computations[header[2]] = {}
                    entry = header[2] if header[1] else entry
            elif line == "}" or line.startswith("}, execution_thread="):
                body = None
            elif found := _INSTRUCTION.match(line):
                body[found[2]] = _instruction(found[2], found[3], found[1] is not None)
        if entry is None:
            raise ValueError("this is not the text of an HLO module: it has no ENTRY computation")
        self.entry = entry

    @cached_property
    def executed(self) -> list[tuple[Computation, Instruction, float]]:
        """Every instruction outside fusions with its computation and how often one step runs it.

        Of a conditional all branches count, which is the upper bound.
        """
        return list(self.walk(self.entry, 1.0))

    def walk(self, name: str, times: float) -> Iterator[tuple[Computation, Instruction, float]]:
        """Every instruction that a computation runs, outside fusions, when it runs so many times (see `executed`)."""
        computation = self.computations[name]
        for instruction in computation.values():
            opcode = instruction.opcode
            if opcode == "while":
                count = self._trip_count(computation, instruction)
                yield from self.walk(_required(instruction, "body"), times * count)
            elif opcode in ("call", "call-start"):  # The latter on another core of the chip (TPU7x: sparsecore).
                yield from self.walk(_required(instruction, "to_apply"), times)
            elif opcode == "conditional":
                listed = re.search(r"branch_computations=\{([^}]*)\}", instruction.text)
                branches = _NAME.findall(listed[1]) if listed else [
                    _required(instruction, "true_computation"), _required(instruction, "false_computation")
                ]
                for branch in branches:
                    yield from self.walk(branch, times)
            else:
                yield computation, instruction, times

    def _trip_count(self, computation: Computation, loop: Instruction) -> int:
        """From the compiler's annotation, or from `index < constant` in the condition and the index's start."""
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.text):
            return int(known[1])
        condition = self.computations[_required(loop, "condition")]
        root = next(i for i in condition.values() if i.is_root)
        inside = self.computations.get(root.called("calls") or "", condition)
        compares = any(i.opcode == "compare" and "direction=LT" in i.text for i in inside.values())
        ends = [_constant(i) for i in condition.values() if i.opcode == "constant"]
        index = next((i for i in condition.values() if i.opcode == "get-tuple-element"), None)
        if compares and len(ends) == 1 and ends[0] is not None and index is not None:
            start = self._loop_start(computation, loop, int(re.findall(r"index=(\d+)", index.text)[0]))
            if start is not None:
                return max(ends[0] - start, 0)
        self.unknown_loops += 1
        return 1

    def _loop_start(self, computation: Computation, loop: Instruction, index: int) -> int | None:
        """The constant that an element of a loop's carry begins with; None if it is no constant."""
        carry = computation.get(loop.operands[0])
        value = computation.get(carry.operands[index]) if carry is not None and carry.opcode == "tuple" else None
        while value is not None and value.opcode in ("copy", "bitcast") and value.operands:
            value = computation.get(value.operands[0])
        return _constant(value) if value is not None and value.opcode == "constant" else None

    def inside(self, instruction: Instruction) -> Computation:
        """What a fusion or a wrapped asynchronous operation computes; empty for any other instruction."""
        if instruction.opcode not in ("fusion", "async-start"):
            return {}
        return self.computations.get(instruction.called("calls") or "", {})

    def nested(self, instruction: Instruction) -> Iterator[tuple[Computation, Instruction]]:
        """All instructions inside a fusion, those of fusions within it included."""
        body = self.inside(instruction)
        for inner in body.values():
            yield body, inner
            yield from self.nested(inner)


def _instruction(name: str, rest: str, is_root: bool) -> Instruction:
    opcode = _opcode(rest)
    shapes = tuple(
        Shape(dtype, tuple(int(d.removeprefix("<=")) for d in dims.split(",") if d),
              not (layout and _ON_CHIP.search(layout)))
        for dtype, dims, layout in _SHAPE.findall(rest[: opcode.start()])
    )
    end = _close(rest, opcode.end() - 1)
    operands = () if opcode[1] == "constant" else tuple(_NAME.findall(rest[opcode.end() : end]))
    return Instruction(name, opcode[1], shapes, operands, rest[opcode.end() :], is_root)


def _opcode(rest: str) -> re.Match[str]:
    """The match of `opcode(`, behind the type, which may be a tuple in parentheses."""
    found = _OPCODE.search(rest, _close(rest, 0) if rest.startswith("(") else rest.find(" "))
    if found is None:
        raise ValueError(f"an HLO instruction without an opcode: {rest[:80]}")
    return found


def _close(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, start):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    return len(text)


def _constant(instruction: Instruction) -> int | None:
    value = re.match(r"(-?\d+)\)", instruction.text)
    return int(value[1]) if value else None


def _required(instruction: Instruction, attribute: str) -> str:
    name = instruction.called(attribute)
    if name is None:
        raise ValueError(f"HLO {instruction.opcode} {instruction.name} names no {attribute}")
    return name


# ------------------------------------------------------------------------------------------------- replica groups


def replica_groups(text: str, num_devices: int) -> np.ndarray:
    """The groups of devices that a collective runs over, [groups, devices in each], from an instruction's text.

    Reads `{{0,1},{2,3}}`, `{}` (all), `[4,2]<=[2,4]T(1,0)` and `mesh['x'=2,'y'=4] {'y'}`.

    Raises:
      ValueError: another form.
    """
    devices = np.arange(num_devices)
    if pairs := re.search(r"source_target_pairs=\{(\{.*?\})\}", text):
        return _numbers(pairs[1])
    if explicit := re.search(r"replica_groups=\{(\{.*?\})?\}", text):
        return _numbers(explicit[1]) if explicit[1] else devices[None]
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        shape, reshape, order = ([int(n) for n in part.split(",")] if part else None for part in iota.groups())
        return devices.reshape(reshape).transpose(order).reshape(shape)
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", text):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh[1])}
        names = re.findall(r"'([^']+)'", mesh[2])
        if set(names) <= set(sizes) and ":" not in mesh[2]:
            axes = list(sizes)
            order = [axes.index(a) for a in axes if a not in names] + [axes.index(a) for a in names]
            return devices.reshape(list(sizes.values())).transpose(order).reshape(
                -1, math.prod(sizes[a] for a in names)
            )
    raise ValueError(f"replica groups of an unknown form: {text[:200]}")


def _numbers(groups: str) -> np.ndarray:
    return np.asarray([[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", groups)])


def axes_of(groups: np.ndarray, mesh: dict[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the members of a group differ (of a permutation: source and target)."""
    places = np.stack(np.unravel_index(groups, tuple(mesh.values())), axis=-1)
    differs = (places != places[:, :1]).any(axis=(0, 1))
    return tuple(name for name, moves in zip(mesh, differs, strict=True) if moves)


# ---------------------------------------------------------------------------------------------------- collectives

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective of the program and how often one step runs it."""

    kind: str
    """One of KINDS. TPU's `all-reduce-scatter` fusion is a reduce-scatter."""
    axes: tuple[str, ...]
    """Mesh axes that it runs over."""
    group: int
    """Devices in a group."""
    shapes: tuple[Shape, ...]
    """Of what one device gives."""
    times: float
    op_name: str
    """What of the source it comes from, as XLA's metadata says."""

    @property
    def bytes(self) -> float:
        """Bytes of the whole arrays at one device, each time: gathered, to be reduced, or to be moved."""
        given = sum(shape.bytes for shape in self.shapes)
        return given * self.group if self.kind == "all-gather" else given

    @property
    def sent(self) -> float:
        """Bytes that a device sends in one step, rings assumed: (n - 1) / n of the array, twice for an all-reduce."""
        share = (self.group - 1) / self.group
        factor = {"all-reduce": 2 * share, "collective-permute": 1.0, "collective-broadcast": 1.0}.get(self.kind, share)
        return self.times * factor * self.bytes


def collectives(module: Module, mesh: dict[str, int]) -> list[Collective]:
    """Every collective that a step runs, from the program of one device of a mesh (axis name -> size)."""
    found = []
    for computation, instruction, times in module.executed:
        if _kind(instruction.opcode):
            found.append(_collective(computation, instruction, times, mesh, scattered=False))
        body = module.inside(instruction)
        if not body or continues(instruction, body):
            continue
        # On TPU an all-reduce fused with the slice that follows is sent as a reduce-scatter.
        scattered = "reduce-scatter" in (instruction.called("calls") or "")
        for inside, inner in module.nested(instruction):
            if _kind(inner.opcode):
                found.append(_collective(inside, inner, times, mesh, scattered))
    return found


def _kind(opcode: str) -> str | None:
    name = opcode.removesuffix("-start")
    return name if name in KINDS else None


def continues(instruction: Instruction, body: Computation) -> bool:
    """Whether a fusion only goes on with, or ends, a collective that another one began (TPU's asynchronous ones)."""
    return (instruction.called("calls") or "").startswith("async_collective_fusion") or any(
        'custom_call_target="AsyncCollectiveDone"' in inner.text for inner in body.values()
    )


def _collective(
    computation: Computation, instruction: Instruction, times: float, mesh: dict[str, int], scattered: bool
) -> Collective:
    groups = replica_groups(instruction.text, math.prod(mesh.values()))
    kind = _kind(instruction.opcode)
    given = tuple(shape for name in instruction.operands for shape in computation[name].shapes)
    op_name = re.search(r'op_name="([^"]*)"', instruction.text)
    return Collective(
        kind="reduce-scatter" if scattered and kind == "all-reduce" else kind or "", axes=axes_of(groups, mesh),
        group=groups.shape[1], shapes=given, times=times, op_name=op_name[1] if op_name else "",
    )
