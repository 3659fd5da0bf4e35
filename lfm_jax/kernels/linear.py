"""What a model does with its matrices: products with weights stored [out, in], as checkpoints store them, and rows of a
table. Either may be a `WeightKind`.

Dimensions: M rows, I inputs, O outputs; B batch, T time, V vocabulary, D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from lfm_jax.sharding import FSDP, axis_names, is_sharded, platform, reshard, spec_of, whole
from lfm_jax.weight_kinds import WeightKind

FEW_ROWS = 256
"""Rows up to which `auto` puts the weights on the left on CPU."""


def linear(
    x: jax.Array, w: jax.Array | WeightKind, *, inputs: int = 1, dtype: str | jnp.dtype | None = None,
    impl: str = "auto",
) -> jax.Array:
    """Contracts the last `inputs` axes of x with the last `inputs` axes of w.

    Over a mesh of explicit axes w is first gathered over `fsdp`, in x's dtype; the result is split as the rows of x and
    the outputs of w are, and summed over what splits the contracted axes (`tensor`).

    Args:
      x: [..., *in].
      w: [*out, *in]; cast to x's dtype.
      inputs: how many trailing axes are contracted.
      dtype: of accumulation and result; None means x's.
      impl: `dot` (`lax.dot_general`, the reference), `left`: the same product as w @ x^T, which a CPU streams
        through memory up to twice as fast when there are few rows (docs/measurements/kernels.md), or `auto`: `left` on
        CPU up to FEW_ROWS rows, `dot` elsewhere and over a mesh, where rows split in two axes cannot become one.

    Returns:
      [..., *out].

    Raises:
      ValueError: an unknown impl, or axes that do not match.
    """
    lead, out = x.shape[: x.ndim - inputs], w.shape[: w.ndim - inputs]
    if x.shape[x.ndim - inputs :] != w.shape[w.ndim - inputs :]:
        raise ValueError(f"x {x.shape} and w {w.shape} differ in their last {inputs} axes")
    dtype = jnp.dtype(dtype or x.dtype)
    if isinstance(w, WeightKind):
        return w.linear(x, inputs=inputs, dtype=dtype, impl=impl)
    w = whole(w.astype(x.dtype), FSDP)
    rows = math.prod(lead)
    if impl == "auto":
        few = rows <= FEW_ROWS and platform() == "cpu" and not (is_sharded(x) or is_sharded(w))
        impl = "left" if few else "dot"
    if impl == "dot":
        x_axes, w_axes = (tuple(range(a.ndim - inputs, a.ndim)) for a in (x, w))
        out_sharding = P(*spec_of(x)[: len(lead)], *spec_of(w)[: len(out)]) if is_sharded(x) else None
        return lax.dot_general(
            x, w, ((x_axes, w_axes), ((), ())), preferred_element_type=dtype, out_sharding=out_sharding
        )
    if impl != "left":
        raise ValueError(f"impl is {impl!r}; choose one of auto, dot, left")
    x_MI, w_OI = x.reshape(rows, -1), w.reshape(math.prod(out), -1)
    y_OM = jnp.matmul(w_OI, x_MI.T, preferred_element_type=dtype)
    # Without the barrier XLA turns the transposed result back into x @ w^T.
    return lax.optimization_barrier(y_OM).T.reshape(*lead, *out)


def linears(x: jax.Array, ws: Sequence[jax.Array | WeightKind], outputs: Sequence[int]) -> list[jax.Array]:
    """Computes `linear` of x and each of some weights, [*out, I], with as many outputs along the first axis as said.

    Of `joined` weights it is one product, which is cut: one kernel instead of several, where launching them is what a
    product of few rows takes.
    """
    if ws[0].shape[0] == outputs[0]:
        return [linear(x, w) for w in ws]
    ends = [sum(outputs[: i + 1]) for i in range(len(outputs) - 1)]
    return jnp.split(linear(x, ws[0]), ends, axis=x.ndim - 1)


def joined(ws: Sequence[jax.Array]) -> list[jax.Array]:
    """Returns weights, [*out, I], one behind another along their first axis in place of the first, and what is empty in
    place of the others."""
    return [jnp.concatenate(ws), *[w[:0] for w in ws[1:]]]


def lookup(ids_BT: jax.Array, table_VD: jax.Array | WeightKind, dtype: str | jnp.dtype) -> jax.Array:
    """Rows of a table, [B, T, D] in dtype; ids are in [0, V).

    Over a mesh every device looks up its columns for the rows of all devices along `fsdp`, and columns are traded for
    rows (all-to-all): far less to move than the table.
    """
    if isinstance(table_VD, WeightKind):
        return table_VD.lookup(ids_BT, dtype)
    if not is_sharded(ids_BT):
        return table_VD.at[ids_BT].get().astype(dtype)
    b, t = spec_of(ids_BT)
    columns = spec_of(table_VD)[1]
    if columns is None:
        return table_VD.at[ids_BT].get(out_sharding=P(b, t, None)).astype(dtype)
    rows = tuple(name for name in axis_names(b) if name != FSDP) or None
    x_BTD = table_VD.at[reshard(ids_BT, P(rows, t))].get(out_sharding=P(rows, t, columns))
    return reshard(x_BTD.astype(dtype), P(b, t, None))
