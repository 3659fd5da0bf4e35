"""What instructions of an optimised program cost: floating-point operations of products, and bytes to and from HBM."""

from __future__ import annotations

import math
import re

import numpy as np

from lfm_jax.plan.hlo import Computation, Instruction, Module, Shape, continues

_FREE = frozenset({
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
    "iota", "opt-barrier", "while", "conditional", "call",
})
_FREE_CALLS = ("ConcatBitcast", "AllocateBuffer", "Sharding", "SPMDFullToShardShape", "SPMDShardToFullShape")


def flops(module: Module, computation: Computation, instruction: Instruction) -> float:
    """FLOPs of the matrix products and convolutions in an instruction, a fusion's included: two per multiply-add.

    Elementwise work counts as none, and so do kernels that XLA does not see into (Pallas).
    """
    inside = sum(_product_flops(body, inner) for body, inner in module.nested(instruction))
    return inside + _product_flops(computation, instruction)


def _product_flops(computation: Computation, instruction: Instruction) -> float:
    if instruction.opcode == "dot":
        contracted = _listed(instruction.text, "lhs_contracting_dims")
        lhs = computation[instruction.operands[0]].shapes[0].dims
        return 2.0 * math.prod(instruction.shapes[0].dims) * math.prod(lhs[d] for d in contracted)
    if instruction.opcode == "convolution":
        return _convolution_flops(computation, instruction)
    return 0.0


def _convolution_flops(computation: Computation, instruction: Instruction) -> float:
    """Counts only the places of the window that fall on data, as padding and dilation express batched products."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.text)
    if labels is None:
        return 0.0
    lhs, kernel = (computation[name].shapes[0].dims for name in instruction.operands[:2])
    out = instruction.shapes[0].dims
    window = _window(instruction.text)
    total = 2.0 * kernel[labels[2].index("i")]
    for label, size in zip(labels[3], out, strict=True):
        if not label.isdigit():
            total *= size
            continue
        taps = kernel[labels[2].index(label)]
        total *= _hits(lhs[labels[1].index(label)], size, taps, {k: v[int(label)] for k, v in window.items()})
    return total


def _window(text: str) -> dict[str, list[str]]:
    found = re.search(r"window=\{([^}]*)\}", text)
    return {k: v.split("x") for k, v in (part.split("=") for part in found[1].split())} if found else {}


def _hits(size: int, out: int, taps: int, window: dict[str, str]) -> int:
    """Pairs of output and tap along one axis that meet an input element."""
    low = int(window.get("pad", "0_0").split("_")[0])
    stride, dilated, spread = (int(window.get(k, "1")) for k in ("stride", "lhs_dilate", "rhs_dilate"))
    if out * taps > 1 << 24:
        return out * min(taps, size)
    at = np.arange(out)[:, None] * stride + np.arange(taps) * spread - low
    return int(np.sum((at >= 0) & (at <= (size - 1) * dilated) & (at % dilated == 0)))


def _listed(text: str, attribute: str) -> list[int]:
    found = re.search(rf"{attribute}=\{{([\d,]*)\}}", text)
    return [int(d) for d in found[1].split(",") if d] if found else []


# --------------------------------------------------------------------------------------------------------- memory


def hbm_bytes(module: Module, computation: Computation, instruction: Instruction) -> float:
    """Bytes that an instruction reads from and writes to HBM.

    Its operands and results that lie there, but of an array that is only sliced the slices, and of one that is updated
    in place the update.
    """
    opcode, text = instruction.opcode, instruction.text
    if opcode in _FREE or opcode.endswith(("-done", "-update")):
        return 0.0
    if opcode == "custom-call" and any(f'custom_call_target="{name}"' in text for name in _FREE_CALLS):
        return 0.0
    if opcode == "copy-start":  # (destination, source, context)
        return _in_hbm(instruction.shapes[:2])
    if opcode == "slice-start":  # (source, destination, context)
        source, destination = instruction.shapes[:2]
        return destination.bytes * (source.in_hbm + destination.in_hbm)
    given = [computation[name] for name in instruction.operands if name in computation]
    body = module.inside(instruction)
    if opcode == "fusion" and body:
        return _fusion_bytes(module, given, instruction, body)
    if opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * _in_hbm(instruction.shapes)
    if opcode == "dynamic-update-slice":
        return 2 * _in_hbm(given[1].shapes)
    return sum(_in_hbm(x.shapes) for x in given) + _in_hbm(instruction.shapes)


def _in_hbm(shapes: tuple[Shape, ...]) -> float:
    return sum(shape.bytes for shape in shapes if shape.in_hbm)


def _fusion_bytes(module: Module, given: list[Instruction], fusion: Instruction, body: Computation) -> float:
    aliased_out: set[int] = set()
    aliased_in: set[int] = set()
    if continues(fusion, body):  # Buffers of a collective under way go through the fusion untouched.
        for out, operand in re.findall(r"\{(\d*)\}: \((\d+), \{", fusion.text):
            aliased_out.add(int(out or 0))
            aliased_in.add(int(operand))
    parameters = {int(i.text.split(")")[0]): name for name, i in body.items() if i.opcode == "parameter"}
    total = sum(
        min(_read(module, body, parameters[k]), _in_hbm(x.shapes))
        for k, x in enumerate(given) if k in parameters and k not in aliased_in
    )
    root = next(i for i in body.values() if i.is_root)
    parts = [body[name] for name in root.operands] if root.opcode == "tuple" else [root]
    for k, shape in enumerate(fusion.shapes):
        if k not in aliased_out and shape.in_hbm:
            part = parts[k] if len(parts) == len(fusion.shapes) else root
            total += min(_written(module, body, part), shape.bytes)
    return total


def _read(module: Module, body: Computation, name: str) -> float:
    """Bytes that a fused computation reads of one of its values."""
    whole = sum(shape.bytes for shape in body[name].shapes)
    total = 0.0
    for user in body.values():
        if name not in user.operands:
            continue
        place = user.operands.index(name)
        if user.opcode in ("dynamic-slice", "slice", "gather") and place == 0:
            total += sum(shape.bytes for shape in user.shapes)
        elif user.opcode == "dynamic-update-slice" and place == 0:
            continue
        elif user.opcode == "bitcast":
            total += _read(module, body, user.name)
        elif user.opcode == "fusion":
            inner = module.inside(user)
            parameters = {int(i.text.split(")")[0]): n for n, i in inner.items() if i.opcode == "parameter"}
            total += _read(module, inner, parameters[place]) if place in parameters else whole
        else:
            return whole
    return min(total, whole)


def _written(module: Module, body: Computation, value: Instruction) -> float:
    """Bytes that a fused computation writes of a result: all of it, or the update of an array updated in place."""
    if value.opcode == "dynamic-update-slice":
        return sum(shape.bytes for shape in body[value.operands[1]].shapes)
    if value.opcode in ("bitcast", "copy") and value.operands and value.operands[0] in body:
        return _written(module, body, body[value.operands[0]])
    if value.opcode == "fusion" and (inner := module.inside(value)):
        return _written(module, inner, next(i for i in inner.values() if i.is_root))
    return sum(shape.bytes for shape in value.shapes)
