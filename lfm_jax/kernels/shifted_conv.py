"""The gated causal convolution as W shifted multiply-adds, with a derivative of its own: `shifted` of causal_conv.py.

Both directions are sums of shifted rows, which XLA fuses with the gates into one pass over memory an output. For that
each is made in two pieces: the rows whose taps stay inside the sequence, where a shift is a slice of the inputs, and
the V rows at one end, where it is a slice of a few padded columns. Padding whole arrays instead costs a copy of each on
CPU. Nothing is kept for the backward pass but the inputs.

Dimensions: B batch, T time, D channels, W taps, V = W - 1 columns of history, M rows of a piece, N = min(V, T).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

BLOCK = 64
"""Rows of time that the sums over time take at once on CPU, so that every tap reads them from the cache."""
PARTIAL = 8
"""Rows of partial sums; BLOCK / PARTIAL is a power of two. Sums stay short, and independent of one another."""


class _Product(NamedTuple):
    """`x * gate`, made where rows of it are read: sliced first, the product fuses into its reader."""

    x_BTD: jax.Array
    gate_BTD: jax.Array | None

    def rows(self, lo: int, hi: int) -> jax.Array:
        x_BMD = _wide(self.x_BTD[:, lo:hi])
        return x_BMD if self.gate_BTD is None else x_BMD * self.gate_BTD[:, lo:hi]


@jax.custom_vjp
def gated_conv(
    y_BTD: jax.Array,
    w_WD: jax.Array,
    tail_BVD: jax.Array,
    reach_BT: jax.Array | None,
    gate_in_BTD: jax.Array | None,
    gate_out_BTD: jax.Array | None,
    bias_D: jax.Array | None,
) -> jax.Array:
    """`gate_out * (conv(gate_in * y) + bias)`, sums in float32 at least.

    Args:
      y_BTD, w_WD, tail_BVD, gate_in_BTD, gate_out_BTD, bias_D: as in `causal_conv`.
      reach_BT: how many of the V columns before each token, history included, belong to its document; None: all.

    Returns:
      z_BTD in y's dtype. Each gradient comes in the dtype of its argument.
    """
    T, V = y_BTD.shape[1], w_WD.shape[0] - 1
    N = min(V, T)
    u = _Product(y_BTD, gate_in_BTD)

    def gated(z_BMD: jax.Array, lo: int, hi: int) -> jax.Array:
        z_BMD = z_BMD if bias_D is None else z_BMD + bias_D
        return (z_BMD if gate_out_BTD is None else z_BMD * gate_out_BTD[:, lo:hi]).astype(y_BTD.dtype)

    head_BSD = jnp.concatenate([_wide(tail_BVD), u.rows(0, N)], axis=1)
    first_BND = _taps(w_WD, lambda j: _reached(head_BSD[:, V - j : V - j + N], reach_BT, j, 0, N))
    if T <= V:
        return gated(first_BND, 0, T)
    rest_BMD = _taps(w_WD, lambda j: _reached(u.rows(V - j, T - j), reach_BT, j, V, T))
    return jnp.concatenate([gated(first_BND, 0, V), gated(rest_BMD, V, T)], axis=1)


def _forward(y_BTD, w_WD, tail_BVD, reach_BT, gate_in_BTD, gate_out_BTD, bias_D):
    args = (y_BTD, w_WD, tail_BVD, reach_BT, gate_in_BTD, gate_out_BTD, bias_D)
    return gated_conv(*args), args


def _backward(args, dz_BTD):
    y_BTD, w_WD, tail_BVD, reach_BT, gate_in_BTD, gate_out_BTD, bias_D = args
    u, dc = _Product(y_BTD, gate_in_BTD), _Product(dz_BTD, gate_out_BTD)
    by_gate_in = by_gate_out = by_bias = None
    by_y = _transposed(dc, w_WD, reach_BT, gate_in_BTD, y_BTD.dtype)
    if gate_in_BTD is not None:
        by_gate_in = _transposed(dc, w_WD, reach_BT, y_BTD, gate_in_BTD.dtype)
    if gate_out_BTD is not None:  # The forward pass once more, with dz as its last gate.
        by_gate_out = gated_conv(y_BTD, w_WD, tail_BVD, reach_BT, gate_in_BTD, dz_BTD, bias_D)
        by_gate_out = by_gate_out.astype(gate_out_BTD.dtype)
    by_w, total_D = _sums(u, dc, tail_BVD, reach_BT)
    if bias_D is not None:
        by_bias = total_D.astype(bias_D.dtype)
    by_tail = _by_tail(dc, w_WD, reach_BT).astype(tail_BVD.dtype)
    return by_y, by_w.astype(w_WD.dtype), by_tail, None, by_gate_in, by_gate_out, by_bias


gated_conv.defvjp(_forward, _backward)


def _transposed(
    dc: _Product, w_WD: jax.Array, reach_BT: jax.Array | None, factor_BTD: jax.Array | None, dtype: jnp.dtype
) -> jax.Array:
    """`du * factor`, du_t = sum_j w[V-j] * dc_{t+j} over the taps that reach back to t."""
    T, V = dc.x_BTD.shape[1], w_WD.shape[0] - 1
    N = min(V, T)

    def scaled(du_BMD: jax.Array, lo: int, hi: int) -> jax.Array:
        return (du_BMD if factor_BTD is None else du_BMD * factor_BTD[:, lo:hi]).astype(dtype)

    end_BND = dc.rows(T - N, T)
    last_BND = _taps(w_WD, lambda j: _padded(_reached(end_BND, reach_BT, j, T - N, T), 0, j)[:, j:])
    if T <= V:
        return scaled(last_BND, 0, T)
    rest_BMD = _taps(w_WD, lambda j: _reached(dc.rows(j, T - V + j), reach_BT, j, j, T - V + j))
    return jnp.concatenate([scaled(rest_BMD, 0, T - V), scaled(last_BND, T - V, T)], axis=1)


def _by_tail(dc: _Product, w_WD: jax.Array, reach_BT: jax.Array | None) -> jax.Array:
    """Column v of the history stands V - v before token 0: tap j takes it to token v - V + j."""
    V = w_WD.shape[0] - 1
    N = min(V, dc.x_BTD.shape[1])
    start_BND = dc.rows(0, N)
    return _taps(w_WD, lambda j: _padded(_reached(start_BND, reach_BT, j, 0, N), V, V)[:, j : j + V])


def _sums(
    u: _Product, dc: _Product, tail_BVD: jax.Array, reach_BT: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Sums over batch and time of dc times u shifted by each tap, [W, D], and of dc alone, [D]."""
    B, T, D = u.x_BTD.shape
    V = tail_BVD.shape[1]
    N = min(V, T)

    def plain(lo: int) -> list[jax.Array]:
        window = jax.tree.map(lambda x: x[:, lo - V :], (u, dc, reach_BT))
        return [jnp.sum(x, axis=(0, 1)) for x in _summands(window, V)]

    def blocked() -> list[jax.Array]:
        """On CPU XLA writes every summand to memory before it sums over leading axes; this adds them in the cache."""
        blocks = (T - V) // BLOCK

        def block(i: jax.Array | int) -> list[jax.Array]:
            def window(x: jax.Array) -> jax.Array:
                start = (i // blocks, i % blocks * BLOCK) + (0,) * (x.ndim - 2)
                return lax.dynamic_slice(x, start, (1, V + BLOCK, *x.shape[2:]))

            summands = _summands(jax.tree.map(window, (u, dc, reach_BT)), V)
            return [_pairwise(list(x.reshape(BLOCK // PARTIAL, PARTIAL, D))) for x in summands]

        def add(i: jax.Array, partial: list[jax.Array]) -> list[jax.Array]:
            return [a + b for a, b in zip(partial, block(i), strict=True)]

        partial = lax.fori_loop(1, B * blocks, add, block(0))
        return [jnp.sum(a, axis=0) + b for a, b in zip(partial, plain(V + blocks * BLOCK), strict=True)]

    head_BSD, start_BND = jnp.concatenate([_wide(tail_BVD), u.rows(0, N)], axis=1), dc.rows(0, N)
    first = [start_BND * _reached(head_BSD[:, V - j : V - j + N], reach_BT, j, 0, N) for j in range(V + 1)]
    sums = [jnp.sum(x, axis=(0, 1)) for x in (*first, start_BND)]
    if T > V:
        few = T - V < 2 * BLOCK
        rest = plain(V) if few else lax.platform_dependent(cpu=blocked, default=lambda: plain(V))
        sums = [a + b for a, b in zip(sums, rest, strict=True)]
    return jnp.stack(sums[V::-1]), sums[V + 1]


def _summands(window: tuple[_Product, _Product, jax.Array | None], V: int) -> list[jax.Array]:
    """What `_sums` adds up, for a window of (u, dc, reach); its first V rows are there to be reached."""
    u, dc, reach_BM = window
    M = u.x_BTD.shape[1]
    dc_BMD = dc.rows(V, M)
    return [dc_BMD * _reached(u.rows(V - j, M - j), reach_BM, j, V, M) for j in range(V + 1)] + [dc_BMD]


def _taps(w_WD: jax.Array, column: Callable[[int], jax.Array]) -> jax.Array:
    """Sum over j of `w[V-j] * column(j)`, column(j) what stands j tokens away."""
    w_WD, V = _wide(w_WD), w_WD.shape[0] - 1
    z_BMD = column(0) * w_WD[V]
    for j in range(1, V + 1):
        z_BMD += column(j) * w_WD[V - j]
    return z_BMD


def _reached(x_BMD: jax.Array, reach_BT: jax.Array | None, j: int, lo: int, hi: int) -> jax.Array:
    """Zero where tap j of tokens lo to hi would leave their document: selected, since what stands there may be NaN."""
    if reach_BT is None or j == 0:
        return x_BMD
    return jnp.where((reach_BT[:, lo:hi] >= j)[:, :, None], x_BMD, 0)


def _padded(x_BMD: jax.Array, before: int, after: int) -> jax.Array:
    return jnp.pad(x_BMD, ((0, 0), (before, after), (0, 0)))


def _pairwise(parts: list[jax.Array]) -> jax.Array:
    while len(parts) > 1:
        parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def _wide(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
