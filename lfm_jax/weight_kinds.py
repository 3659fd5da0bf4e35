"""The base class of weights that are not plain arrays.

A parameter of a model holds an array, or a `WeightKind`: a dataclass of arrays that represents one array, such as
narrow numbers with their scales. Products and lookups (`kernels.linear`) call the kind's methods; everything else in a
model calls `astype`, which arrays and kinds both have. So operators need not know the kinds.
"""

from __future__ import annotations

import abc
from types import EllipsisType
from typing import Any, Self

import jax
import jax.numpy as jnp


class WeightKind(abc.ABC):
    """An array in another form: the base class of dataclasses registered by `jax.tree_util.register_dataclass`.

    Its fields are arrays or other kinds. `jax.jit`, `jax.grad`, optimizers and checkpoints see the fields, a mesh
    splits them, and a scan over stacked layers takes one layer of each. So `shape` and `dtype` must be computed from
    the current fields.
    """

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of the array."""

    @property
    @abc.abstractmethod
    def dtype(self) -> jnp.dtype:
        """The dtype of the array."""

    @abc.abstractmethod
    def astype(self, dtype: str | jnp.dtype) -> jax.Array:
        """Returns the array itself."""

    @abc.abstractmethod
    def linear(self, x: jax.Array, *, inputs: int, dtype: jnp.dtype, impl: str) -> jax.Array:
        """Computes `kernels.linear.linear` of x and the array, perhaps without making it; shapes have been checked."""

    @abc.abstractmethod
    def lookup(self, ids_BT: jax.Array, dtype: str | jnp.dtype) -> jax.Array:
        """Computes `kernels.linear.lookup` of rows of the array."""

    def item(self, i: jax.Array, dtype: str | jnp.dtype) -> jax.Array:
        """Returns item i of the first axis of the array, such as one expert's matrix; a kind that can make it alone
        does."""
        return self.astype(dtype)[i]

    def axes(self, names: tuple[str | None, ...]) -> Any:
        """Returns the logical axes of every field (`sharding.LOGICAL_AXES`) if those of the array are `names`.

        A field with the shape of the array is split like it, any other is whole on every device.
        """
        return jax.tree.map(lambda x: names if x.shape == self.shape else (None,) * x.ndim, self)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __getitem__(self, key: EllipsisType) -> Self:
        """Returns the kind itself, so that `param[...]` reads any parameter."""
        if key is not ...:
            raise TypeError(f"{type(self).__name__} is indexed with {key!r}; read it with [...], a part by astype")
        return self


def pull_back(w: jax.Array | WeightKind, dw: jax.Array) -> Any:
    """Returns the gradient by a weight, or by its fields if it is a kind, of that by its array, in its dtype."""
    if not isinstance(w, WeightKind):
        return dw
    return jax.vjp(lambda w: w.astype(w.dtype), w)[1](dw)[0]
