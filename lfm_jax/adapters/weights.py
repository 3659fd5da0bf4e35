"""The kind of weight that has an adapter: frozen numbers, and the product of two small matrices beside them.

Dimensions: B rows of a batch, I inputs, O outputs (each perhaps several axes), R rank, or the ranks of several adapters
together.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from lfm_jax.kernels.linear import linear, lookup
from lfm_jax.sharding import is_sharded, reshard, spec_of
from lfm_jax.weight_kinds import WeightKind


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapted(WeightKind):
    """`base + scale B A`: the product with an input is `base x + scale B A dropout(x)`, and the sum is never made.

    With `row_ids_B` there are several adapters, one after another along R, and each row of a batch meets its own: what
    A gives is set to zero at the others' places, so that rows of all adapters go through the same two products.
    """

    base: jax.Array | WeightKind
    """[*O, *I], or narrow."""
    a_RI: jax.Array
    """[R, *I]."""
    b_OR: jax.Array
    """[*O, R]."""
    scale: float = dataclasses.field(default=1.0, metadata=dict(static=True))
    dropout: float = dataclasses.field(default=0.0, metadata=dict(static=True))
    key: jax.Array | None = None
    """Of the inputs that are dropped; None: none is."""
    owner_R: jax.Array | None = None
    """int32: the number of the adapter that each place along R belongs to, from 1 up."""
    row_ids_B: jax.Array | None = None
    """int32: the number of each row's adapter; 0 or less for none."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def dtype(self) -> jnp.dtype:
        return self.base.dtype

    def astype(self, dtype: str | jnp.dtype) -> jax.Array:
        """Returns base and adapter as one array, added in float32.

        Raises:
          ValueError: rows have different adapters.
        """
        if self.row_ids_B is not None:
            raise ValueError("each row has an adapter of its own, so there is no one array; merge one adapter")
        a_RI, b_OR = self.a_RI.astype(jnp.float32), self.b_OR.astype(jnp.float32)
        split = P(*spec_of(b_OR)[:-1], *spec_of(a_RI)[1:]) if is_sharded(a_RI) else None
        change = jnp.tensordot(b_OR, a_RI, 1, precision="highest", out_sharding=split)
        base = self.base.astype("float32")
        return (base + reshard(self.scale * change, spec_of(base))).astype(dtype)

    def linear(self, x: jax.Array, *, inputs: int, dtype: jnp.dtype, impl: str) -> jax.Array:
        """See `WeightKind.linear`. The adapter's products are in x's dtype, the sum with the base's in `dtype`."""
        y = linear(x, self.base, inputs=inputs, dtype=dtype, impl=impl)
        low = linear(self._dropped(x), self.a_RI, inputs=inputs, impl=impl)
        if self.row_ids_B is not None:
            assert self.owner_R is not None  # They come together (`trees.adapt_rows`).
            own_BR = self.row_ids_B[:, None] == self.owner_R
            low = jnp.where(jnp.expand_dims(own_BR, range(1, low.ndim - 1)), low, 0)
        # Whole for what follows: XLA would put the sum into each of its uses, and keep both parts for the way back.
        return jax.lax.optimization_barrier(y + linear(self.scale * low, self.b_OR, dtype=dtype, impl=impl))

    def _dropped(self, x: jax.Array) -> jax.Array:
        if self.key is None or not self.dropout:
            return x
        split = spec_of(x) if is_sharded(x) else None
        kept = jax.random.bernoulli(self.key, 1 - self.dropout, x.shape, out_sharding=split)
        return jnp.where(kept, x / (1 - self.dropout), 0)

    def lookup(self, ids_BT: jax.Array, dtype: str | jnp.dtype) -> jax.Array:
        return lookup(ids_BT, self.astype(self.dtype), dtype)

    def axes(self, names: tuple[str | None, ...]) -> Self:
        base = self.base.axes(names) if isinstance(self.base, WeightKind) else names
        inputs = self.a_RI.ndim - 1
        whole: Any = jax.tree.map(lambda x: (None,) * x.ndim, self)
        return dataclasses.replace(
            whole, base=base, a_RI=(None, *names[len(names) - inputs :]), b_OR=(*names[: len(names) - inputs], None))
