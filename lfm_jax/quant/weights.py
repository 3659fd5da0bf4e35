"""Weights that stay in 8 or 4 bits while a model runs: the kinds of weights that `lfm.quantize` makes.

Rounding is symmetric and to the nearest: `w = scale * q` with q in -127..127 or -7..7. All inputs of an output share a
scale, or each group of 32 or 128 of them does. This is no format of files; those of GGUF are in `block_types`.

The layouts are those from which XLA for a TPU multiplies without writing a wider copy of the weights, nor a copy in
another layout (tests/quant/test_quantized_aot.py).

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
FEW_ROWS = 64
"""Rows up to which a product with groups is a sum of products, one for each group; above, it is one of weights with
their scales, which XLA may write, once for all the rows."""


class Layout(NamedTuple):
    """How the axes of an array are merged: those of inputs into I, those of outputs into O; others count matrices."""

    matrix: Matrix
    inputs: tuple[int, ...]
    """Sizes of `matrix.inputs`."""
    outputs: tuple[int, ...]
    """Sizes of `matrix.outputs`."""

    @classmethod
    def of(cls, shape: tuple[int, ...], matrix: Matrix) -> Self:
        return cls(matrix, tuple(shape[axis] for axis in matrix.inputs), tuple(shape[axis] for axis in matrix.outputs))

    @property
    def merged(self) -> int:
        """The number of axes that are merged."""
        return len(self.inputs) + len(self.outputs)

    def shape(self, counts: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the array; counts are the sizes of its other axes."""
        sizes = dict(zip((*self.matrix.outputs, *self.matrix.inputs), (*self.outputs, *self.inputs), strict=True))
        left = iter(counts)
        return tuple(sizes[axis] if axis in sizes else next(left) for axis in range(-len(counts) - self.merged, 0))

    def merge(self, w: jax.Array) -> jax.Array:
        """Returns the array as [..., O, I]."""
        w = jnp.moveaxis(w, (*self.matrix.outputs, *self.matrix.inputs), range(-self.merged, 0))
        return w.reshape(*w.shape[: -self.merged], math.prod(self.outputs), math.prod(self.inputs))

    def part(self, w: jax.Array) -> jax.Array:
        """Returns the array of [..., O, I]."""
        split = None
        if is_sharded(w):
            *counts, output, into = spec_of(w)
            split = P(*counts, *_first(output, self.outputs), *_first(into, self.inputs))
        w = jnp.reshape(w, (*w.shape[:-2], *self.outputs, *self.inputs), out_sharding=split)
        return jnp.moveaxis(w, range(-self.merged, 0), (*self.matrix.outputs, *self.matrix.inputs))

    def names(self, names: tuple[str | None, ...]) -> tuple[tuple[str | None, ...], str | None, str | None]:
        """Returns the logical axes of the counts, of O and of I; of merged axes the first one's name is kept."""
        merged = {axis % len(names) for axis in (*self.matrix.inputs, *self.matrix.outputs)}
        counts = tuple(name for axis, name in enumerate(names) if axis not in merged)
        return counts, names[self.matrix.outputs[0]], names[self.matrix.inputs[0]]

    def need_last(self, inputs: int) -> None:
        """Raises ValueError unless the inputs of the matrix are the last axes of the array."""
        if self.matrix.inputs != tuple(range(-inputs, 0)):
            raise ValueError(f"this weight is summed over its axes {self.matrix.inputs}, not its last {inputs}")


def _where_it_is_used[W: WeightKind](x: jax.Array, w: W) -> tuple[jax.Array, W]:
    """The two as they are. XLA for a CPU widens weights before a product; of a loop over tokens it would take that out,
    and so keep all of a model's weights widened at one time."""
    return lax.optimization_barrier((x, w)) if platform() == "cpu" else (x, w)


def _first(name: Any, sizes: tuple[int, ...]) -> tuple[Any, ...]:
    """The entries of a spec for axes that were merged into one with this entry."""
    return (name, *(None,) * (len(sizes) - 1))


# ---------------------------------------------------------------------------------------------------- one scale


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized(WeightKind):
    """Narrow numbers with a scale for each output, which is applied behind the sum."""

    values: jax.Array
    """[..., O, I], int8 or int4."""
    scales: jax.Array
    """[..., O], in the dtype of the array."""
    layout: Layout = dataclasses.field(metadata=dict(static=True))
    by_int8: bool = dataclasses.field(metadata=dict(static=True))
    """Whether each row that meets it is rounded to int8 too, and they are multiplied as integers."""

    @classmethod
    def of(cls, w: jax.Array, matrix: Matrix, kind: str, *, by_int8: bool = False) -> tuple[Self, jax.Array]:
        """Returns the array in a type of LEVELS, and whether all of it was finite."""
        layout = Layout.of(w.shape, matrix)
        values, scales, finite = _rounded(layout.merge(w), -1, kind)
        return cls(values, scales, layout, by_int8), finite

    @property
    def shape(self) -> tuple[int, ...]:
        return self.layout.shape(self.values.shape[:-2])

    @property
    def dtype(self) -> jnp.dtype:
        return self.scales.dtype

    def astype(self, dtype: str | jnp.dtype) -> jax.Array:
        return self.layout.part((_float32(self.values) * _float32(self.scales)[..., None]).astype(dtype))

    def linear(self, x: jax.Array, *, inputs: int, dtype: jnp.dtype, impl: str) -> jax.Array:
        """See `WeightKind.linear`; there is one implementation for all values of impl."""
        del impl
        self.layout.need_last(inputs)
        if not self.by_int8:
            x, self = _where_it_is_used(x, self)
        lead, split = x.shape[: x.ndim - inputs], None
        scales = whole(self.scales, FSDP)
        if is_sharded(x):
            rows, (*counts, output) = spec_of(x)[: len(lead)], spec_of(scales)
            x = jnp.reshape(x, (*lead, -1), out_sharding=P(*rows, spec_of(x)[len(lead)]))
            split = P(*rows, *counts, *_first(output, self.layout.outputs))
        else:
            x = x.reshape(math.prod(lead), -1)
        product = _integer_product if self.by_int8 else _product
        y = (product(x, self.values) * _float32(scales)).astype(dtype)
        return jnp.reshape(y, (*lead, *self.scales.shape[:-1], *self.layout.outputs), out_sharding=split)

    def lookup(self, ids_BT: jax.Array, dtype: str | jnp.dtype) -> jax.Array:
        # Of one row XLA for a TPU makes a slice, for which it copies the table into another layout.
        alone = ids_BT.size == 1 and not is_sharded(ids_BT)
        ids = jnp.broadcast_to(ids_BT, (2, 1)) if alone else ids_BT
        x = lookup(ids, self.values, "float32") * lookup(ids, self.scales[:, None], "float32")
        return x[: len(ids_BT)].astype(dtype)

    def item(self, i: jax.Array, dtype: str | jnp.dtype) -> jax.Array:
        return jax.tree.map(lambda field: field[i], self).astype(dtype)

    def axes(self, names: tuple[str | None, ...]) -> Quantized:
        counts, output, into = self.layout.names(names)
        return dataclasses.replace(self, values=(*counts, output, into), scales=(*counts, output))


def _product(x: jax.Array, values: jax.Array) -> jax.Array:
    """[..., I] by [*counts, O, I]: [..., *counts, O], float32."""
    return linear(x, values, dtype="float32", impl="dot")


@jax.custom_vjp
def _integer_product(x: jax.Array, values: jax.Array) -> jax.Array:
    """`_product` of x rounded to int8 with a scale for each row. Its gradient is that without the rounding."""
    peak = jnp.max(jnp.abs(_float32(x)), axis=-1, keepdims=True)
    q = jnp.rint(_float32(x) / jnp.where(peak == 0, 1, peak / 127)).astype(jnp.int8)
    if is_sharded(x) or platform() != "cpu":
        y = linear(q, values, dtype="int32", impl="dot")
    else:  # A CPU has products of int8 for two matrices, and of one row it makes a loop ten times as slow.
        alone = len(q) == 1
        y = linear(jnp.concatenate([q, q]) if alone else q, values.reshape(-1, q.shape[-1]), dtype="int32", impl="dot")
        y = (y[:1] if alone else y).reshape(-1, *values.shape[:-1])
    return _float32(y) * jnp.expand_dims(peak / 127, range(x.ndim, y.ndim))


def _integer_forward(*args: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _integer_product(*args), args


def _integer_backward(args: tuple[jax.Array, ...], dy: jax.Array) -> tuple[jax.Array, None]:
    x, values = args
    return *jax.vjp(lambda x: _product(x, values), x)[1](dy), None


_integer_product.defvjp(_integer_forward, _integer_backward)

# -------------------------------------------------------------------------------------------------- many scales


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GroupQuantized(WeightKind):
    """Narrow numbers with a scale for each group of an output's inputs."""

    values: jax.Array
    """[..., G, g, O], int8 or int4."""
    scales: jax.Array
    """[..., G, O], in the dtype of the array."""
    layout: Layout = dataclasses.field(metadata=dict(static=True))

    @classmethod
    def of(cls, w: jax.Array, matrix: Matrix, kind: str, group: int) -> tuple[Self, jax.Array]:
        """Returns the array in a type of LEVELS with groups of `group` inputs, and whether all of it was finite."""
        layout = Layout.of(w.shape, matrix)
        w = jnp.swapaxes(layout.merge(w), -1, -2)
        values, scales, finite = _rounded(w.reshape(*w.shape[:-2], -1, group, w.shape[-1]), -2, kind)
        return cls(values, scales, layout), finite

    @property
    def shape(self) -> tuple[int, ...]:
        return self.layout.shape(self.values.shape[:-3])

    @property
    def dtype(self) -> jnp.dtype:
        return self.scales.dtype

    def astype(self, dtype: str | jnp.dtype) -> jax.Array:
        w, split = self._widened(dtype), None
        if is_sharded(w):
            *counts, group, _, output = spec_of(w)
            split = P(*counts, group, output)
        w = jnp.reshape(w, (*w.shape[:-3], math.prod(self.layout.inputs), w.shape[-1]), out_sharding=split)
        return self.layout.part(jnp.swapaxes(w, -1, -2))

    def _widened(self, dtype: str | jnp.dtype) -> jax.Array:
        """The array as [..., G, g, O]."""
        return (_float32(self.values) * _float32(self.scales)[..., None, :]).astype(dtype)

    def linear(self, x: jax.Array, *, inputs: int, dtype: jnp.dtype, impl: str) -> jax.Array:
        """See `WeightKind.linear`; there is one implementation for all values of impl."""
        del impl
        self.layout.need_last(inputs)
        x, self = _where_it_is_used(x, self)
        lead, (*counts, G, g, _) = x.shape[: x.ndim - inputs], self.values.shape
        here = dataclasses.replace(self, values=whole(self.values, FSDP), scales=whole(self.scales, FSDP))
        if is_sharded(x):
            rows, (*split, group, _, output) = spec_of(x)[: len(lead)], spec_of(here.values)
            x = jnp.reshape(x, (*lead, G, g), out_sharding=P(*rows, group, None))
            y = here._product(x, dtype, P(*rows, *split, output))
            split = P(*rows, *split, *_first(output, self.layout.outputs))
        else:  # With rows as one axis XLA has more ways.
            x, split = x.reshape(-1, G, g), None
            y = here._sum_of_groups(x) if len(x) <= FEW_ROWS else here._product(x, dtype, None)
        return jnp.reshape(y.astype(dtype), (*lead, *counts, *self.layout.outputs), out_sharding=split)

    def _sum_of_groups(self, x_MGg: jax.Array) -> jax.Array:
        """[M, ..., O] in float32; each group's product is scaled by itself."""
        group, member = self.values.ndim - 3, self.values.ndim - 2
        y = lax.dot_general(x_MGg, self.values.astype(x_MGg.dtype), (((2,), (member,)), ((1,), (group,))),
                            preferred_element_type=jnp.float32)
        return jnp.sum(y * jnp.moveaxis(_float32(self.scales), -2, 0)[:, None], axis=0)

    def _product(self, x: jax.Array, dtype: jnp.dtype, split: P | None) -> jax.Array:
        """[..., O] of [..., G, g] and the widened weights."""
        w = self._widened(x.dtype)
        axes = (x.ndim - 2, x.ndim - 1), (w.ndim - 3, w.ndim - 2)
        return lax.dot_general(x, w, (axes, ((), ())), preferred_element_type=dtype, out_sharding=split)

    def lookup(self, ids_BT: jax.Array, dtype: str | jnp.dtype) -> jax.Array:
        values, scales = whole(self.values, FSDP), whole(self.scales, FSDP)
        if is_sharded(ids_BT):
            rows = spec_of(ids_BT)
            q_GgBT = values.at[:, :, ids_BT].get(out_sharding=P(None, None, *rows))
            s_GBT = scales.at[:, ids_BT].get(out_sharding=P(None, *rows))
        else:
            q_GgBT, s_GBT = values.at[:, :, ids_BT].get(), scales.at[:, ids_BT].get()
        x_BTGg = jnp.moveaxis(_float32(q_GgBT) * _float32(s_GBT)[:, None], (0, 1), (-2, -1))
        return x_BTGg.reshape(*ids_BT.shape, -1).astype(dtype)

    def item(self, i: jax.Array, dtype: str | jnp.dtype) -> jax.Array:
        return jax.tree.map(lambda field: field[i], self).astype(dtype)

    def axes(self, names: tuple[str | None, ...]) -> GroupQuantized:
        """Inputs are split by whole groups."""
        counts, output, into = self.layout.names(names)
        return dataclasses.replace(self, values=(*counts, into, None, output), scales=(*counts, into, output))


def _float32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


@functools.partial(jax.jit, static_argnames=("axis", "kind"))
def _rounded(x: jax.Array, axis: int, kind: str) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(values, a scale for all along an axis, in x's dtype, whether all of x is finite)."""
    levels, x32 = LEVELS[kind], _float32(x)
    peak = jnp.max(jnp.abs(x32), axis=axis)
    scale = (peak / levels).astype(x.dtype)
    # Rounded up, so that the largest value is not cut off.
    low = _float32(scale) * levels < peak
    scale = jnp.where(low, jnp.nextafter(scale, jnp.full_like(scale, jnp.inf)), scale)
    step = jnp.expand_dims(_float32(jnp.where(scale == 0, 1, scale)), axis)
    q = jnp.clip(jnp.rint(x32 / step), -levels, levels)
    return q.astype(kind), scale, jnp.all(jnp.isfinite(peak))
