"""Weights that stay in 8 or 4 bits while a model runs: the kinds of weights that `lfm.quantize` makes.

Rounding is symmetric and to the nearest: `w = scale * q` with q in -127..127 or -7..7. All inputs of an output share a
scale, or each group of 32 or 128 of them does. This is no format of files; those of GGUF are in `block_types`.

Dimensions: M rows, I inputs, O outputs, G groups of an output's inputs, g inputs of a group; B batch, T time.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from lfm_jax.kernels.linear import linear, lookup
from lfm_jax.layers import Matrix
from lfm_jax.sharding import FSDP, is_sharded, platform, spec_of, whole
from lfm_jax.weight_kinds import WeightKind

LEVELS = {"int8": 127, "int4": 7}
"""Type -> the largest q; the smallest is its negative."""


class Axes(NamedTuple):
    """How the axes of an array are grouped in `Quantized`. Those before a matrix's count matrices."""

    matrix: Matrix
    inputs: tuple[int, ...]
    """Sizes of `matrix.inputs`; I is their product."""
    outputs: tuple[int, ...]
    """Sizes of `matrix.outputs`; O is their product."""

    @classmethod
    def of(cls, shape: tuple[int, ...], matrix: Matrix) -> Axes:
        return cls(matrix, tuple(shape[axis] for axis in matrix.inputs), tuple(shape[axis] for axis in matrix.outputs))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized(WeightKind):
    """Narrow numbers and their scales.

    Inputs come first: so a product with groups takes its weights as they lie, and XLA writes no wider copy of them
    (tests/quant/test_narrow_aot.py).
    """

    values: jax.Array
    """[..., G, g, O], int8 or int4; G is 1 where an output has one scale."""
    scales: jax.Array
    """[..., G, O], in the dtype of the array."""
    layout: Axes = dataclasses.field(metadata=dict(static=True))

    @classmethod
    def of(cls, w: jax.Array, matrix: Matrix, kind: str, group: int | None) -> tuple[Self, jax.Array]:
        """Returns the array in a narrow type of LEVELS, and whether all of it was finite; group is g, None for I."""
        layout = Axes.of(w.shape, matrix)
        merged = len(layout.inputs) + len(layout.outputs)
        x = jnp.moveaxis(w, (*matrix.inputs, *matrix.outputs), range(-merged, 0))
        size = math.prod(layout.inputs)
        x = x.reshape(*x.shape[:-merged], size // (group or size), group or size, math.prod(layout.outputs))
        values, scales, finite = _rounded(x, (-2,), kind)
        return cls(values, scales, layout), finite

    @property
    def shape(self) -> tuple[int, ...]:
        ndim = self.values.ndim - 3 + len(self.layout.inputs) + len(self.layout.outputs)
        matrix = self.layout.matrix
        sizes = dict(zip((*matrix.inputs, *matrix.outputs), (*self.layout.inputs, *self.layout.outputs), strict=True))
        counts = iter(self.values.shape)
        return tuple(sizes[axis] if axis in sizes else next(counts) for axis in range(-ndim, 0))

    @property
    def dtype(self) -> jnp.dtype:
        return self.scales.dtype

    def astype(self, dtype: str | jnp.dtype) -> jax.Array:
        layout, w = self.layout, self._widened(dtype)
        split = None
        if is_sharded(w):
            *counts, group, member, output = spec_of(w)
            split = P(*counts, *_first(group or member, layout.inputs), *_first(output, layout.outputs))
        w = jnp.reshape(w, (*w.shape[:-3], *layout.inputs, *layout.outputs), out_sharding=split)
        moved = range(-len(layout.inputs) - len(layout.outputs), 0)
        return jnp.moveaxis(w, moved, (*layout.matrix.inputs, *layout.matrix.outputs))

    def _widened(self, dtype: str | jnp.dtype) -> jax.Array:
        """The array as [..., G, g, O]."""
        return (self.values.astype("float32") * self.scales[..., None, :].astype("float32")).astype(dtype)

    def linear(self, x: jax.Array, *, inputs: int, dtype: jnp.dtype, impl: str) -> jax.Array:
        """See `WeightKind.linear`; there is one implementation for all values of impl."""
        del impl
        if self.layout.matrix.inputs != tuple(range(-inputs, 0)):
            raise ValueError(f"this weight is summed over its axes {self.layout.matrix.inputs}, not its last {inputs}")
        lead, (*counts, G, g, _), outputs = x.shape[: x.ndim - inputs], self.values.shape, self.layout.outputs
        values, scales = whole(self.values, FSDP), whole(self.scales, FSDP)
        split_x = split_y = split = None
        if is_sharded(x):
            rows, (*split_counts, group, member, output) = spec_of(x)[: len(lead)], spec_of(values)
            split_x, split_y = P(*rows, group, member), P(*rows, *split_counts, output)
            split = P(*rows, *split_counts, *_first(output, outputs))
        x = jnp.reshape(x, (*lead, G, g), out_sharding=split_x)
        product = functools.partial(_product, x, out_sharding=split_y)
        # One scale for an output is applied behind the sum, exactly; those of groups are part of the weights.
        if G == 1:
            y = (product(values.astype(x.dtype), dtype=jnp.float32) * scales[..., 0, :]).astype(dtype)
        else:
            w = dataclasses.replace(self, values=values, scales=scales)._widened(x.dtype)
            y = product(w, dtype=dtype)
        return jnp.reshape(y, (*lead, *counts, *outputs), out_sharding=split)

    def lookup(self, ids_BT: jax.Array, dtype: str | jnp.dtype) -> jax.Array:
        values, scales = whole(self.values, FSDP), whole(self.scales, FSDP)
        if is_sharded(ids_BT):
            rows = spec_of(ids_BT)
            q_GgBT = values.at[:, :, ids_BT].get(out_sharding=P(None, None, *rows))
            s_GBT = scales.at[:, ids_BT].get(out_sharding=P(None, *rows))
        else:
            q_GgBT, s_GBT = values.at[:, :, ids_BT].get(), scales.at[:, ids_BT].get()
        x_GgBT = (q_GgBT.astype("float32") * s_GBT[:, None].astype("float32")).astype(dtype)
        return jnp.moveaxis(x_GgBT, (0, 1), (-2, -1)).reshape(*ids_BT.shape, -1)

    def item(self, i: jax.Array, dtype: str | jnp.dtype) -> jax.Array:
        return jax.tree.map(lambda field: field[i], self).astype(dtype)

    def axes(self, names: tuple[str | None, ...]) -> Quantized:
        """Of merged axes the first one's name is kept; inputs are split by whole groups, where there are several."""
        matrix, ndim = self.layout.matrix, len(names)
        merged = {axis % ndim for axis in (*matrix.inputs, *matrix.outputs)}
        counts = tuple(name for axis, name in enumerate(names) if axis not in merged)
        into, out = names[matrix.inputs[0]], names[matrix.outputs[0]]
        grouped = self.values.shape[-3] > 1
        group, member = (into, None) if grouped else (None, into)
        return dataclasses.replace(self, values=(*counts, group, member, out), scales=(*counts, group, out))


def _first(name: Any, sizes: tuple[int, ...]) -> tuple[Any, ...]:
    """The layout of axes that were merged into one with this entry."""
    return (name, *(None,) * (len(sizes) - 1))


def _product(x: jax.Array, w: jax.Array, *, dtype: Any, out_sharding: P | None) -> jax.Array:
    """[..., G, g] by [*counts, G, g, O]: [..., *counts, O]."""
    axes = (x.ndim - 2, x.ndim - 1), (w.ndim - 3, w.ndim - 2)
    return lax.dot_general(x, w, (axes, ((), ())), preferred_element_type=dtype, out_sharding=out_sharding)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class W8A8(WeightKind):
    """int8 with one scale for an output, multiplied as integers: each row that meets it is rounded to int8 too.

    Numbers lie as in the array, where a CPU has its fast products of integers.
    """

    values: jax.Array
    """int8, in the shape of the array."""
    scales: jax.Array
    """The shape of the array without its inputs, in its dtype."""
    inputs: tuple[int, ...] = dataclasses.field(metadata=dict(static=True))
    """Axes of the array that a product sums over, counted from its last."""

    @classmethod
    def of(cls, w: jax.Array, matrix: Matrix) -> tuple[Self, jax.Array]:
        """Returns the array as int8, and whether all of it was finite."""
        values, scales, finite = _rounded(w, matrix.inputs, "int8")
        return cls(values, scales, matrix.inputs), finite

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def dtype(self) -> jnp.dtype:
        return self.scales.dtype

    def astype(self, dtype: str | jnp.dtype) -> jax.Array:
        scales = jnp.expand_dims(self.scales, self.inputs)
        return (self.values.astype(jnp.float32) * scales.astype(jnp.float32)).astype(dtype)

    def linear(self, x: jax.Array, *, inputs: int, dtype: jnp.dtype, impl: str) -> jax.Array:
        """See `WeightKind.linear`; there is one implementation for all values of impl."""
        del impl
        return _integer_linear(inputs, x, self.values, self.scales).astype(dtype)

    def lookup(self, ids_BT: jax.Array, dtype: str | jnp.dtype) -> jax.Array:
        scale_BT1 = lookup(ids_BT, self.scales[:, None], "float32")
        return (lookup(ids_BT, self.values, "float32") * scale_BT1).astype(dtype)

    def item(self, i: jax.Array, dtype: str | jnp.dtype) -> jax.Array:
        return jax.tree.map(lambda field: field[i], self).astype(dtype)

    def axes(self, names: tuple[str | None, ...]) -> W8A8:
        inputs = {axis % len(names) for axis in self.inputs}
        kept = tuple(name for axis, name in enumerate(names) if axis not in inputs)
        return dataclasses.replace(self, values=names, scales=kept)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _integer_linear(inputs: int, x: jax.Array, values: jax.Array, scales: jax.Array) -> jax.Array:
    """`linear` of x, rounded to int8 with a scale for each row, and values, times both scales; float32. Its gradient is
    that without the rounding of x."""
    lead, scales = x.shape[: x.ndim - inputs], whole(scales, FSDP)
    within = tuple(range(-inputs, 0))
    peak = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=within)
    step = jnp.expand_dims(jnp.where(peak == 0, 1, peak / 127), within)
    q = jnp.rint(x.astype(jnp.float32) / step).astype(jnp.int8)
    if is_sharded(x) or platform() != "cpu":
        y = linear(q, values, inputs=inputs, dtype="int32", impl="dot")
    else:  # Of one row, or by several axes, a CPU makes no product of integers but loops, ten times as slow.
        q_MI, w_OI = q.reshape(math.prod(lead), -1), values.reshape(scales.size, -1)
        alone = len(q_MI) == 1
        y_MO = linear(jnp.concatenate([q_MI, q_MI]) if alone else q_MI, w_OI, dtype="int32", impl="dot")
        y = (y_MO[:1] if alone else y_MO).reshape(*lead, *scales.shape)
    row = jnp.expand_dims(peak / 127, tuple(range(-scales.ndim, 0)))
    return y.astype(jnp.float32) * row * scales.astype(jnp.float32)


def _integer_forward(inputs: int, *args: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _integer_linear(inputs, *args), args


def _integer_backward(inputs: int, args: tuple[jax.Array, ...], dy: jax.Array) -> tuple[Any, ...]:
    x, values, scales = args
    _, pull = jax.vjp(lambda x: linear(x, values, inputs=inputs, dtype="float32", impl="dot"), x)
    return *pull(dy * whole(scales, FSDP).astype(jnp.float32)), None, None


_integer_linear.defvjp(_integer_forward, _integer_backward)


@functools.partial(jax.jit, static_argnames=("axes", "kind"))
def _rounded(x: jax.Array, axes: tuple[int, ...], kind: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(values, a scale for all along `axes`, in x's dtype, whether all of x is finite)."""
    levels, x32 = LEVELS[kind], x.astype(jnp.float32)
    peak = jnp.max(jnp.abs(x32), axis=axes)
    scale = (peak / levels).astype(x.dtype)
    # Rounded up, so that the largest value is not cut off.
    low = scale.astype(jnp.float32) * levels < peak
    scale = jnp.where(low, jnp.nextafter(scale, jnp.full_like(scale, jnp.inf)), scale)
    step = jnp.expand_dims(jnp.where(scale == 0, 1, scale).astype(jnp.float32), axes)
    q = jnp.clip(jnp.rint(x32 / step), -levels, levels)
    return q.astype(kind), scale, jnp.all(jnp.isfinite(peak))
