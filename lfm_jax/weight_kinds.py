"""What may stand where an array of weights stands.

A parameter of a model holds an array, or a `WeightKind`: a dataclass of arrays that stands for one, such as narrow
numbers with their scales. Products and lookups (`kernels.linear`) leave the work to the kind; whatever else a model
does with a parameter is `astype`, which an array and a kind both have. So operators know no kinds.
"""

from __future__ import annotations

import abc
from types import EllipsisType
from typing import Any, Self

import jax
import jax.numpy as jnp


class WeightKind(abc.ABC):
    """An array in another form: the base class of dataclasses registered by `jax.tree_util.register_dataclass`.

    Its fields are arrays, or kinds themselves. They are what `jax.jit`, `jax.grad`, optimizers and checkpoints see,
    what a mesh splits, and what a scan over stacked layers takes one layer of. So `shape` and `dtype` have to be read
    off the fields, whatever these are at the time.
    """

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Of the array that it stands for."""

    @property
    @abc.abstractmethod
    def dtype(self) -> jnp.dtype:
        """Of the array that it stands for."""

    @abc.abstractmethod
    def astype(self, dtype: str | jnp.dtype) -> jax.Array:
        """The array itself."""

    @abc.abstractmethod
    def linear(self, x: jax.Array, *, inputs: int, dtype: jnp.dtype, impl: str) -> jax.Array:
        """`kernels.linear.linear` of x and the array, which need not be made for it; shapes have been checked."""

    @abc.abstractmethod
    def lookup(self, ids_BT: jax.Array, dtype: str | jnp.dtype) -> jax.Array:
        """`kernels.linear.lookup` of rows of the array."""

    def axes(self, names: tuple[str | None, ...]) -> Any:
        """Logical axes of every field (`sharding.LOGICAL_AXES`), where the array's are `names`.

        A field of the array's own shape is split as it, any other is whole on every device.
        """
        return jax.tree.map(lambda x: names if x.shape == self.shape else (None,) * x.ndim, self)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __getitem__(self, key: EllipsisType) -> Self:
        """Itself: `param[...]` reads a parameter, whatever it holds."""
        if key is not ...:
            raise TypeError(f"{type(self).__name__} is indexed with {key!r}; read it with [...], a part by astype")
        return self
