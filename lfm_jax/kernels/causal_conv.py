"""Causal depthwise convolution over time between two gates, with document boundaries and carried history.

`z_t = gate_out_t * (sum_j w[W-1-j] * u_{t-j} + bias)`, `u = gate_in * y`, j = 0 .. W-1: cross-correlation with the
newest tap last, as `torch.nn.Conv1d` in `Lfm2ShortConv`, and the gates around it. A tap that would reach into another
document contributes nothing.

Dimensions: B batch, T time, D channels, W taps, V = W - 1 columns of history.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from lfm_jax.kernels import shifted_conv
from lfm_jax.sharding import HOPPER, nvidia_capability

PALLAS = ("pallas_tpu", "pallas_gpu")
KERNEL_TAPS, KERNEL_TOKENS = 9, 256
"""The most taps that `pallas_gpu` takes, and the tokens of a row from which `auto` takes it on a Hopper GPU."""
IMPLS = ("lax", "shifted", "associative", *PALLAS)


def causal_conv(
    y_BTD: jax.Array,
    w_WD: jax.Array,
    tail_BVD: jax.Array | None = None,
    segment_ids_BT: jax.Array | None = None,
    *,
    gate_in_BTD: jax.Array | None = None,
    gate_out_BTD: jax.Array | None = None,
    bias_D: jax.Array | None = None,
    impl: str = "auto",
    interpret: bool = False,
) -> jax.Array:
    """Gated depthwise causal convolution of y along time. Sums run in float32 at least, whatever the dtypes.

    Args:
      y_BTD: input.
      w_WD: taps, oldest first.
      tail_BVD: the W - 1 columns of `gate_in * y` before y, oldest first; zeros where there is no history. They
        belong to the document of each row's first token. None means no history.
      segment_ids_BT: document of each token; ids differ between neighbouring documents. A row's padding
        stands at its right end (see `state.align`). None means one document per row.
      gate_in_BTD: multiplies y before the convolution; None leaves it out.
      gate_out_BTD: multiplies the result; None leaves it out.
      bias_D: added to the convolution, before `gate_out`; None leaves it out.
      impl: `lax` (`lax.conv_general_dilated`, the reference), `shifted` (W multiply-adds that XLA fuses),
        `associative` (the shift register as an associative scan), `pallas_tpu`, `pallas_gpu` (fused kernels), or
        `auto`: `pallas_gpu` for rows of KERNEL_TOKENS and more on a Hopper GPU, `shifted` elsewhere.
        docs/measurements/kernels.md has the times, and for TPU the bytes that its compiler counts.
      interpret: runs a Pallas implementation in interpret mode, on any platform, for tests.

    Returns:
      z_BTD, in y's dtype. At padding its values mean nothing.

    Raises:
      ValueError: an unknown impl, `interpret` for one that is not a Pallas kernel, or shapes that do not fit.
    """
    B, T, D = y_BTD.shape
    W = w_WD.shape[0]
    if w_WD.shape != (W, D) or W == 0:
        raise ValueError(f"w_WD has shape {w_WD.shape}; expected (taps, {D}) to match y_BTD {y_BTD.shape}")
    if tail_BVD is None:
        tail_BVD = jnp.zeros((B, W - 1, D), y_BTD.dtype)
    if tail_BVD.shape != (B, W - 1, D):
        raise ValueError(f"tail has shape {tail_BVD.shape}; expected {(B, W - 1, D)}: the W - 1 columns before y")
    for name, x, shape in (
        ("segment_ids_BT", segment_ids_BT, (B, T)),
        ("gate_in_BTD", gate_in_BTD, (B, T, D)),
        ("gate_out_BTD", gate_out_BTD, (B, T, D)),
        ("bias_D", bias_D, (D,)),
    ):
        if x is not None and x.shape != shape:
            raise ValueError(f"{name} has shape {x.shape}; expected {shape} to match y_BTD {y_BTD.shape}")
    if impl == "auto":
        dtypes = {x.dtype for x in (y_BTD, gate_in_BTD, gate_out_BTD) if x is not None}
        kernel = nvidia_capability() == HOPPER and T >= KERNEL_TOKENS and W <= KERNEL_TAPS
        impl = "pallas_gpu" if kernel and dtypes <= {jnp.dtype("bfloat16"), jnp.dtype("float32")} else "shifted"
    if impl not in IMPLS:
        raise ValueError(f"impl is {impl!r}; choose one of auto, {', '.join(IMPLS)}")
    if interpret and impl not in PALLAS:
        raise ValueError(f"interpret is for {' and '.join(PALLAS)}; leave it out with impl={impl!r}")
    reach_BT = None if segment_ids_BT is None or W == 1 else _distance_to_start(segment_ids_BT, W)
    args = (y_BTD, w_WD, tail_BVD, reach_BT, gate_in_BTD, gate_out_BTD, bias_D)
    if impl in PALLAS:  # Pallas is slow to import.
        return importlib.import_module(f"lfm_jax.kernels.{impl}").gated_conv(*args, interpret=interpret)
    return _PLAIN[impl](*args)


def _distance_to_start(segment_ids_BT: jax.Array, W: int) -> jax.Array:
    """How many of the last W - 1 tokens belong to each token's document; W - 1 where history may reach in."""
    T = segment_ids_BT.shape[1]
    first_B1 = segment_ids_BT[:, :1]
    padded_BS = jnp.concatenate([jnp.broadcast_to(first_B1, (first_B1.shape[0], W - 1)), segment_ids_BT], axis=1)
    reach_BT = jnp.zeros(segment_ids_BT.shape, jnp.int32)
    same_BT = jnp.ones(segment_ids_BT.shape, bool)
    for j in range(1, W):
        same_BT &= padded_BS[:, W - 1 - j : W - 1 - j + T] == segment_ids_BT
        reach_BT += same_BT
    return reach_BT


Plain = Callable[[jax.Array, jax.Array, jax.Array, "jax.Array | None"], jax.Array]


def _between_gates(conv: Plain) -> Callable[..., jax.Array]:
    """The gated form of a plain convolution `conv(u_BTD, w_WD, tail_BVD, reach_BT)`, which gets float32 at least."""

    def gated_conv(
        y_BTD: jax.Array,
        w_WD: jax.Array,
        tail_BVD: jax.Array,
        reach_BT: jax.Array | None,
        gate_in_BTD: jax.Array | None,
        gate_out_BTD: jax.Array | None,
        bias_D: jax.Array | None,
    ) -> jax.Array:
        u_BTD, w_WD, tail_BVD = (x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in (y_BTD, w_WD, tail_BVD))
        if gate_in_BTD is not None:
            u_BTD *= gate_in_BTD
        z_BTD = conv(u_BTD, w_WD, tail_BVD, reach_BT)
        if bias_D is not None:
            z_BTD += bias_D
        if gate_out_BTD is not None:
            z_BTD *= gate_out_BTD
        return z_BTD.astype(y_BTD.dtype)

    return gated_conv


def _lax(u_BTD: jax.Array, w_WD: jax.Array, tail_BVD: jax.Array, reach_BT: jax.Array | None) -> jax.Array:
    """One plain convolution; with documents, one per reach, of the taps within it, so that none crosses a border."""
    W, D = w_WD.shape
    padded_BSD = jnp.concatenate([tail_BVD, u_BTD], axis=1)

    def conv(reach: int) -> jax.Array:
        return lax.conv_general_dilated(
            padded_BSD[:, W - 1 - reach :], w_WD[W - 1 - reach :, None], window_strides=(1,), padding="VALID",
            dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=D,
        )

    z_BTD = conv(W - 1)
    if reach_BT is not None:
        for reach in range(W - 1):
            z_BTD = jnp.where(reach_BT[:, :, None] == reach, conv(reach), z_BTD)
    return z_BTD


def _associative(u_BTD: jax.Array, w_WD: jax.Array, tail_BVD: jax.Array, reach_BT: jax.Array | None) -> jax.Array:
    """The convolution as a linear recurrence: its state is a register of the last W columns, its output `w . state`.

    A token takes the register r to `S^n r + x`, where S moves every column one place towards the old end (and the
    oldest one out), n = 1, and x holds u_t in the newest place. Maps of this form are closed under composition,
        (n2, x2) after (n1, x1) = (min(n1 + n2, W), x2 + S^n2 x1),
    so an associative scan finds all states: the operator of `linear_scan` with the nilpotent matrix S^n in the place
    of the diagonal one a. The first token of a document has n = W: S^W = 0 forgets everything. W times the memory
    of the other implementations: a proof and a check, not a fast path.
    """
    B, T, _ = u_BTD.shape
    W = w_WD.shape[0]
    register_BTWD = jnp.pad(u_BTD[:, :, None], ((0, 0), (0, 0), (W - 1, 0), (0, 0)))
    register_BTWD = register_BTWD.at[:, 0, : W - 1].set(tail_BVD)  # The history, moved on by token 0.
    moved_BT = jnp.ones((B, T), jnp.int32) if reach_BT is None else jnp.where(reach_BT == 0, W, 1)

    def after(first: tuple[jax.Array, jax.Array], second: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        (n1, x1), (n2, x2) = first, second
        x = x2
        for n in range(1, W):  # Selected, not multiplied: what is forgotten may be NaN. n2 >= 1; S^W = 0.
            moved = jnp.pad(x1[:, :, n:], ((0, 0), (0, 0), (0, n), (0, 0)))
            x += jnp.where((n2 == n)[:, :, None, None], moved, 0)
        return jnp.minimum(n1 + n2, W), x

    _, state_BTWD = lax.associative_scan(after, (moved_BT, register_BTWD), axis=1)
    return jnp.sum(state_BTWD * w_WD, axis=2)


_PLAIN = {
    "lax": _between_gates(_lax),
    "shifted": shifted_conv.gated_conv,
    "associative": _between_gates(_associative),
}
