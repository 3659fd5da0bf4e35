"""The experts of a mixture: each is a SwiGLU of its own, for the tokens that chose it. No token is ever dropped.

Implementations (`IMPLS`), compared in docs/measurements/kernels.md:
  - `dense`: every expert on every token, weighted; the reference;
  - `ragged`: tokens sorted by expert and `jax.lax.ragged_dot`, which TPUs have; elsewhere it is one masked product
    over all experts;
  - `pallas_gpu`: the same with kernels for Hopper GPUs (`pallas_gpu_experts`), in half precision;
  - `blocks`: sorted tokens in blocks of one expert each, a loop over the blocks that are used, and a derivative that
    makes the hidden layer again, block by block. What it keeps is its arguments.

Dimensions: M tokens, A active experts of a token, R = M A (token, choice) rows, E experts, D width, F width of an
expert, N blocks, b rows of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lfm_jax.kernels.pallas_gpu_experts import BLOCK, grouped_product
from lfm_jax.sharding import HOPPER, nvidia_capability, platform
from lfm_jax.weight_kinds import WeightKind, pull_back

LEAST_ROWS, MOST_ROWS = 8, 64
"""Rows of a block. One row alone would take another code path, whose results differ."""
MASKED = 2**28
"""Numbers in the masked rows of `ragged` on a GPU above which every expert on every token is faster, and smaller."""


def experts(
    x_MD: jax.Array, chosen_MA: jax.Array, weight_MA: jax.Array, w1_EDF: jax.Array | WeightKind,
    w3_EDF: jax.Array | WeightKind, w2_EFD: jax.Array | WeightKind, *, impl: str = "auto",
) -> jax.Array:
    """Computes the sum over a token's chosen experts e of `weight * w2_e(silu(w1_e x) * w3_e x)`.

    Differentiable in x, weight and the matrices.

    Args:
      x_MD: tokens; products are in its dtype.
      chosen_MA: int32 indices of experts. An index outside of [0, E), such as E, stands for no expert: it adds nothing
        and takes no work.
      weight_MA: float32.
      w1_EDF, w3_EDF, w2_EFD: gate, up and down of every expert; cast to x's dtype. They are stored [in, out], which
        `ragged_dot` takes without a copy and a CPU multiplies twice as fast in few rows. Of a `WeightKind` `blocks`
        makes one expert's array at a time, and the others all of it.
      impl: one of `IMPLS`, or `auto`: `blocks` on CPU, `ragged` on TPU; on a GPU `pallas_gpu` where it applies, else
        `ragged` for few rows and `dense` for many.

    Returns:
      [M, D] in x's dtype, summed in float32.

    Raises:
      ValueError: an unknown impl, or shapes that do not fit.
    """
    (M, D), (E, _, F) = x_MD.shape, w1_EDF.shape
    expected = dict(chosen_MA=(M, chosen_MA.shape[-1]), weight_MA=chosen_MA.shape, w1_EDF=(E, D, F), w3_EDF=(E, D, F),
                    w2_EFD=(E, F, D))
    given = dict(chosen_MA=chosen_MA, weight_MA=weight_MA, w1_EDF=w1_EDF, w3_EDF=w3_EDF, w2_EFD=w2_EFD)
    for name, shape in expected.items():
        if given[name].shape != shape:
            raise ValueError(f"{name} has shape {given[name].shape}; expected {shape}")
    if impl == "auto":
        impl = _choose(x_MD, chosen_MA.shape[1], E, F)
    if impl not in IMPLS:
        raise ValueError(f"impl is {impl!r}; choose one of auto, {', '.join(IMPLS)}")
    real_MA = (chosen_MA >= 0) & (chosen_MA < E)
    chosen_MA, weight_MA = jnp.where(real_MA, chosen_MA, E), jnp.where(real_MA, weight_MA, 0.0)
    matrices = [w if isinstance(w, WeightKind) else jnp.asarray(w) for w in (w1_EDF, w3_EDF, w2_EFD)]
    if impl != "blocks":
        matrices = [w.astype(x_MD.dtype) if isinstance(w, WeightKind) else w for w in matrices]
    return IMPLS[impl](*map(jnp.asarray, (x_MD, chosen_MA, weight_MA)), *matrices)


def _choose(x_MD: jax.Array, A: int, E: int, F: int) -> str:
    M, D = x_MD.shape
    if platform() != "gpu":
        return "blocks" if platform() == "cpu" else "ragged"
    half = x_MD.dtype in (jnp.bfloat16, jnp.float16)
    if half and nvidia_capability() == HOPPER and not D % BLOCK and not F % BLOCK:
        return "pallas_gpu"
    return "ragged" if M * A * E * max(D, F) <= MASKED else "dense"


def _dense(x_MD: jax.Array, chosen_MA: jax.Array, weight_MA: jax.Array, w1_EDF: jax.Array, w3_EDF: jax.Array,
           w2_EFD: jax.Array) -> jax.Array:
    def add(y_MD: jax.Array, expert: Any) -> tuple[jax.Array, None]:
        e, *matrices = expert
        w1_DF, w3_DF, w2_FD = (w.astype(x_MD.dtype) for w in matrices)
        share_M = jnp.sum(jnp.where(chosen_MA == e, weight_MA, 0.0), axis=-1)
        out_MD = (jax.nn.silu(x_MD @ w1_DF) * (x_MD @ w3_DF)) @ w2_FD
        return y_MD + share_M[:, None] * out_MD, None

    y_MD, _ = lax.scan(add, jnp.zeros(x_MD.shape, jnp.float32), (jnp.arange(len(w1_EDF)), w1_EDF, w3_EDF, w2_EFD))
    return y_MD.astype(x_MD.dtype)


# ------------------------------------------------------------------------------------------------- products by groups


Product = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def _by_groups(product: Product, x_MD: jax.Array, chosen_MA: jax.Array, weight_MA: jax.Array, w1_EDF: jax.Array,
               w3_EDF: jax.Array, w2_EFD: jax.Array) -> jax.Array:
    """Args: product: of sorted rows, the matrices, and the rows of each."""
    (M, A), E, dtype = chosen_MA.shape, len(w1_EDF), x_MD.dtype
    order_R = jnp.argsort(chosen_MA.reshape(-1), stable=True)  # Rows of no expert are last, beyond every group.
    size_E = _sizes(chosen_MA, E)
    w1_EDF, w3_EDF, w2_EFD = (w.astype(dtype) for w in (w1_EDF, w3_EDF, w2_EFD))
    # Rows beyond the groups are not defined in products, nor in what their derivatives give.
    in_group_R1 = (jnp.arange(order_R.size) < jnp.sum(size_E))[:, None]
    x_RD = jnp.where(in_group_R1, x_MD[order_R // A], 0)
    y_RD = product(jax.nn.silu(product(x_RD, w1_EDF, size_E)) * product(x_RD, w3_EDF, size_E), w2_EFD, size_E)
    y_MAD = jnp.where(in_group_R1, y_RD, 0)[jnp.argsort(order_R)].reshape(M, A, -1)
    return jnp.einsum("MAD,MA->MD", y_MAD.astype(jnp.float32), weight_MA).astype(dtype)


def _ragged_dot(rows: jax.Array, w: jax.Array, size_E: jax.Array) -> jax.Array:
    # A TPU refuses a precision above that of half-precision operands.
    return lax.ragged_dot(rows, w, size_E, precision=None if w.dtype == jnp.float32 else lax.Precision.DEFAULT)


def _sizes(chosen_MA: jax.Array, E: int) -> jax.Array:
    """Rows of each expert, int32 [E]."""
    return jnp.sum(chosen_MA.reshape(-1, 1) == jnp.arange(E), axis=0, dtype=jnp.int32)


# -------------------------------------------------------------------------------------------------------------- blocks


class Blocks(NamedTuple):
    """Rows sorted by expert, with each expert's rows padded to whole blocks."""

    row_Nb: jax.Array
    """Index of each row among the R; R where there is none."""
    expert_N: jax.Array
    used: jax.Array
    """How many blocks have rows; the others follow them."""


def block_rows(M: int, A: int, E: int) -> int:
    """Rows of a block, a power of two: what an expert gets if all get the same, so that its matrices are read about
    once."""
    share = -(-M * A // E)
    return min(max(1 << (share - 1).bit_length(), LEAST_ROWS), MOST_ROWS)


def in_blocks(chosen_MA: jax.Array, E: int, b: int) -> Blocks:
    """Lays out the rows of `experts` in blocks of b: at most R + E (b - 1) rows with what pads them."""
    R = chosen_MA.size
    N = min(R, R // b + E)
    chosen_R = chosen_MA.reshape(-1)
    order_R = jnp.argsort(chosen_R, stable=True)
    sorted_R = chosen_R[order_R]
    size_E = _sizes(chosen_MA, E)
    blocks_E = -(-size_E // b)
    stop_E = jnp.cumsum(blocks_E)
    # The place of each row: its expert's first block, then its rank among the expert's rows.
    rank_R = jnp.arange(R, dtype=jnp.int32) - (jnp.cumsum(size_E) - size_E).at[sorted_R].get(mode="clip")
    place_R = (stop_E - blocks_E).at[sorted_R].get(mode="clip") * b + rank_R
    place_R = jnp.where(sorted_R < E, place_R, N * b)
    row_Nb = jnp.full((N * b,), R, jnp.int32).at[place_R].set(order_R.astype(jnp.int32), mode="drop").reshape(N, b)
    expert_N = jnp.searchsorted(stop_E, jnp.arange(N, dtype=jnp.int32), side="right").astype(jnp.int32)
    return Blocks(row_Nb, expert_N, stop_E[-1])


@jax.custom_vjp
def _blocks(x_MD: jax.Array, chosen_MA: jax.Array, weight_MA: jax.Array, w1_EDF: jax.Array | WeightKind,
            w3_EDF: jax.Array | WeightKind, w2_EFD: jax.Array | WeightKind) -> jax.Array:
    (M, A), E = chosen_MA.shape, w1_EDF.shape[0]
    blocks = in_blocks(chosen_MA, E, block_rows(M, A, E))

    def add(i: jax.Array, y_MD: jax.Array) -> jax.Array:
        block = _block(blocks, i, x_MD, weight_MA, w1_EDF, w3_EDF, w2_EFD)
        out_bD = (jax.nn.silu(block.gate_bF) * block.up_bF) @ block.w2_FD
        return y_MD.at[block.token_b].add(block.weight_b1 * out_bD, mode="drop")

    return lax.fori_loop(0, blocks.used, add, jnp.zeros(x_MD.shape, jnp.float32)).astype(x_MD.dtype)


class _Block(NamedTuple):
    """One block's tokens, matrices and hidden layer."""

    row_b: jax.Array
    token_b: jax.Array
    """M, and with it a weight of 0, where there is no row."""
    x_bD: jax.Array
    weight_b1: jax.Array
    w1_DF: jax.Array
    w3_DF: jax.Array
    w2_FD: jax.Array
    gate_bF: jax.Array
    up_bF: jax.Array


def _block(
    blocks: Blocks, i: jax.Array, x_MD: jax.Array, weight_MA: jax.Array, *matrices: jax.Array | WeightKind
) -> _Block:
    row_b, e = blocks.row_Nb[i], blocks.expert_N[i]
    token_b = row_b // weight_MA.shape[1]
    x_bD = x_MD.at[token_b].get(mode="fill", fill_value=0)
    weight_b1 = weight_MA.reshape(-1).at[row_b].get(mode="fill", fill_value=0)[:, None]
    w1_DF, w3_DF, w2_FD = (
        w.item(e, x_MD.dtype) if isinstance(w, WeightKind) else w[e].astype(x_MD.dtype) for w in matrices
    )
    return _Block(row_b, token_b, x_bD, weight_b1, w1_DF, w3_DF, w2_FD, x_bD @ w1_DF, x_bD @ w3_DF)


def _blocks_forward(*args: Any) -> tuple[jax.Array, tuple[Any, ...]]:
    return _blocks(*args), args


def _blocks_backward(kept: tuple[Any, ...], dy_MD: jax.Array) -> tuple[Any, ...]:
    x_MD, chosen_MA, weight_MA, *matrices = kept
    (M, A), E, dtype = chosen_MA.shape, matrices[0].shape[0], x_MD.dtype
    blocks = in_blocks(chosen_MA, E, block_rows(M, A, E))

    def add(i: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        dx_MD, dweight_R, dw1_EDF, dw3_EDF, dw2_EFD = sums
        e, block = blocks.expert_N[i], _block(blocks, i, x_MD, weight_MA, *matrices)
        dy_bD = dy_MD.at[block.token_b].get(mode="fill", fill_value=0)
        hidden_bF, to_gate_up = jax.vjp(lambda gate, up: jax.nn.silu(gate) * up, block.gate_bF, block.up_bF)
        dhidden_bF = dy_bD @ block.w2_FD.T
        dweight_b = jnp.sum((hidden_bF * dhidden_bF).astype(jnp.float32), axis=-1)
        weight_b1 = block.weight_b1.astype(dtype)
        dgate_bF, dup_bF = to_gate_up(weight_b1 * dhidden_bF)
        return (
            dx_MD.at[block.token_b].add(dgate_bF @ block.w1_DF.T + dup_bF @ block.w3_DF.T, mode="drop"),
            dweight_R.at[block.row_b].set(dweight_b, mode="drop"),
            dw1_EDF.at[e].add(block.x_bD.T @ dgate_bF),
            dw3_EDF.at[e].add(block.x_bD.T @ dup_bF),
            dw2_EFD.at[e].add(hidden_bF.T @ (weight_b1 * dy_bD)),
        )

    zeros = [jnp.zeros(shape, jnp.float32) for shape in (x_MD.shape, (M * A,), *(w.shape for w in matrices))]
    dx_MD, dweight_R, *dmatrices = lax.fori_loop(0, blocks.used, add, tuple(zeros))
    return (dx_MD.astype(dtype), None, dweight_R.reshape(M, A),
            *(pull_back(w, dw.astype(w.dtype)) for dw, w in zip(dmatrices, matrices, strict=True)))


_blocks.defvjp(_blocks_forward, _blocks_backward)

IMPLS = {"dense": _dense, "ragged": partial(_by_groups, _ragged_dot), "blocks": _blocks,
         "pallas_gpu": partial(_by_groups, grouped_product)}
