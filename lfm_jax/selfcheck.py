"""`lfm selfcheck`: every kernel and collective against float64 numpy, on the device at hand.

Dimensions: B batch, T query time, S key slots, D channels, W taps, N query heads, K key/value heads, H head width, M
rows or tokens, I inputs, O outputs, A active experts of a token, E experts, F width of an expert.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lfm_jax.kernels import attention, causal_conv, experts, linear, linear_scan, reference, sharded
from lfm_jax.sharding import AMPERE, CONTEXT, HOPPER, make_mesh, nvidia_capability, platform

BOUND = 2e-5
"""Of the reference's largest value, in float32."""
HALF_BOUND = 2e-2
"""The same where an implementation takes half precision only."""
CPU_DEVICES = 4
"""CPU devices asked for, so that there is something to exchange."""
MOST_DEVICES = 8
"""Devices that time is split over, where there are more."""

Arrays = dict[str, np.ndarray]
NEEDS = {"pallas_tpu": "tpu", "splash": "tpu", "pallas_gpu": "gpu", "cudnn": "gpu"}
INTERPRETED = ("pallas_tpu", "splash", "pallas_gpu")
"""Kernels that JAX can also run in plain operations on a CPU, those of `experts` excepted."""


class Problem(NamedTuple):
    """Inputs of a kernel and what should come out. NaN in `values`: means nothing, is not compared."""

    arrays: Arrays
    ids: Arrays
    values: tuple[np.ndarray, ...]
    cotangents: tuple[np.ndarray, ...]
    gradients: Arrays
    options: dict[str, Any]


class Check(NamedTuple):
    """One row of the table: a kernel's implementation, and the problems it has to solve."""

    kernel: str
    impl: str
    run: Callable[..., Any]
    problems: list[Problem]
    bound: float = BOUND
    note: str = ""
    mesh: jax.sharding.Mesh | None = None


def selfcheck(kernels: Sequence[str] | None = None) -> tuple[str, bool]:
    """Compares forward pass and gradients of every kernel, and of its form over a mesh, with float64 numpy.

    Unless their number is chosen already (XLA_FLAGS, JAX_NUM_CPU_DEVICES, or JAX at work) it asks JAX for CPU_DEVICES
    CPU devices. Takes one to two minutes on two CPU cores; progress goes to stderr.

    Args:
      kernels: names of those to check; None: all.

    Returns:
      A Markdown report, and whether every row passed that could be tried here.
    """
    _ask_for_devices()
    devices = jax.local_devices()
    head = (f"{platform()}: {len(devices)} x {devices[0].device_kind}, jax {jax.__version__}. Errors are the largest "
            "difference from float64 numpy over its largest value.")
    lines = ["| kernel | implementation | forward | gradient | bound | |", "|---|---|---|---|---|---|"]
    ok = True
    for check in _checks(min(len(devices), MOST_DEVICES)):
        if kernels is not None and check.kernel not in kernels:
            continue
        print(f"selfcheck: {check.kernel} {check.impl}", file=sys.stderr)
        cells, passed = _row(check)
        lines.append(f"| {check.kernel} | {check.impl} | {cells} |")
        ok &= passed
    if len(devices) == 1:
        lines += ["", "One device: the collectives were not exercised. They are on a machine with more, or on CPU with "
                  f"`JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES={CPU_DEVICES} lfm selfcheck`."]
    return "\n".join([head, "", *lines]), ok


def _ask_for_devices() -> None:
    chosen = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if chosen or jax.config.jax_num_cpu_devices > 0:
        return
    with contextlib.suppress(RuntimeError):  # JAX that runs already keeps the devices it has.
        jax.config.update("jax_num_cpu_devices", CPU_DEVICES)


def _row(check: Check) -> tuple[str, bool]:
    """The cells after the implementation's name, and whether it passed or could not be tried."""
    reason = "" if _interpreted(check) else needs(check.kernel, check.impl)
    if reason:
        return f"| | | not for this platform: {reason}", True
    try:
        errors = [_errors(check, problem) for problem in check.problems]
    except Exception as error:  # Whatever it is, it is the finding.
        text = " ".join(str(error).split()).replace("|", "/")
        return f" | | {check.bound:g} | FAILED: {type(error).__name__}: {text[:200]}", False
    forward, gradient = (max(kind) for kind in zip(*errors, strict=True))
    passed = max(forward, gradient) <= check.bound
    note = f"{check.note}; " if check.note else ""
    note += "interpret mode" if _interpreted(check) else ""
    verdict = ("ok" if passed else "FAILED") + (f" ({note.removesuffix('; ')})" if note else "")
    return f"{forward:.1e} | {gradient:.1e} | {check.bound:g} | {verdict}", passed


def needs(kernel: str, impl: str) -> str:
    """What an implementation of a kernel would need other than this device; empty if it runs here."""
    needed = NEEDS.get(impl, platform())
    if needed != platform():
        return f"needs a {needed.upper()}"
    if needed == "gpu":
        capability = nvidia_capability()
        if impl == "pallas_gpu" and kernel != "decode_attention" and capability != HOPPER:
            return f"needs compute capability {HOPPER} (Hopper), this is {capability}"
        if capability < AMPERE:
            return f"needs compute capability {AMPERE} (Ampere), this is {capability}"
    return ""


def _interpreted(check: Check) -> bool:
    return check.impl in INTERPRETED and check.kernel != "experts" and platform() == "cpu"


def _errors(check: Check, problem: Problem) -> tuple[float, float]:
    """The largest relative error of the values, and of the gradients."""
    fixed = problem.options | ({"interpret": True} if _interpreted(check) else {})

    @jax.jit
    def run(arrays: Any, ids: Any, cotangents: Any) -> Any:
        values, vjp = jax.vjp(lambda arrays: check.run(**arrays, **ids, **fixed), arrays)
        single = not isinstance(values, tuple)
        return (values,) if single else values, vjp(cotangents[0] if single else cotangents)[0]

    given: Any = (problem.arrays, problem.ids, problem.cotangents)
    with jax.default_matmul_precision("highest"):
        if check.mesh is None:
            values, gradients = run(*given)
        else:
            with jax.set_mesh(check.mesh):
                values, gradients = run(*_split_time(given, problem.values[0].shape[1], check.mesh))
    forward = max(_error(x, y) for x, y in zip(values, problem.values, strict=True))
    return forward, max(_error(gradients[name], problem.gradients[name]) for name in problem.arrays)


def _error(x: jax.Array, expected: np.ndarray) -> float:
    compared = ~np.isnan(expected)
    off = np.abs(np.asarray(x, np.float64) - expected)[compared].max(initial=0)
    error = float(off / (np.abs(expected[compared]).max(initial=0) or 1))
    return error if np.isfinite(error) else np.inf


def _split_time(tree: Any, T: int, mesh: jax.sharding.Mesh) -> Any:
    """Arrays over the mesh: split along axis 1 where that is time, whole on every device where it is not."""

    def place(x: np.ndarray) -> jax.Array:
        split = x.ndim > 1 and x.shape[1] == T
        return jax.device_put(x, NamedSharding(mesh, P(None, CONTEXT) if split else P()))

    return jax.tree.map(place, tree)


def _checks(devices: int) -> Iterator[Check]:
    rng = np.random.default_rng(0)
    conv = [_conv(rng, T=37, D=20, W=3), _conv(rng, T=5, D=9, W=7, documents=False)]
    for impl in causal_conv.IMPLS:
        # Long enough for the blocks of `shifted`.
        more = [_conv(rng, T=203, D=20, W=4)] if impl == "shifted" else []
        yield Check("causal_conv", impl, partial(causal_conv.causal_conv, impl=impl), conv + more)
    scan = [_scan(rng, T=37, D=20), _scan(rng, T=300, D=9, documents=False)]
    for impl in linear_scan.IMPLS:
        yield Check("linear_scan", impl, partial(linear_scan.linear_scan, impl=impl), scan)
    rows = [_attention(rng, T=37, N=4, K=2), _attention(rng, T=37, N=3, K=3, window=5)]
    slots = [_slots(rng, T=2, S=16, N=4, K=2)]
    wide = dict(N=4, K=2, H=64, dtype=jnp.bfloat16)
    half = [_attention(rng, T=64, documents=False, **wide), _attention(rng, T=64, documents=False, window=9, **wide),
            _attention(rng, T=90, **wide), _attention(rng, T=90, window=9, **wide),  # So many documents take a mask.
            _packed(rng), _packed(rng, window=150), _packed(rng, causal=False),
            _slots(rng, T=2, S=16, **wide)]
    for impl in attention.IMPLS:
        problems = half if impl == "cudnn" else rows if impl == "splash" else rows + slots
        bound = HALF_BOUND if impl == "cudnn" else BOUND
        yield Check("attention", impl, partial(attention.attention, impl=impl), problems, bound,
                    "bfloat16" if impl == "cudnn" else "")
    for impl in attention.DECODE_IMPLS:
        kernel = impl == "pallas_gpu"
        problem = _decode(rng, S=90, N=4, K=2, dtype=jnp.bfloat16 if kernel else np.float32)
        yield Check("decode_attention", impl, partial(attention.decode_attention, impl=impl), [problem],
                    HALF_BOUND if kernel else BOUND, "bfloat16" if kernel else "")
    for impl in ("dot", "left"):
        yield Check("linear", impl, partial(linear.linear, impl=impl), [_linear(rng)])
    mixtures = [_experts(rng, M=50, A=3, E=8), _experts(rng, M=1, A=2, E=5)]
    wide = dict(D=256, F=128, dtype=jnp.bfloat16)
    half = [_experts(rng, M=150, A=3, E=8, **wide), _experts(rng, M=1, A=2, E=5, **wide)]
    for impl in experts.IMPLS:
        kernel = impl == "pallas_gpu"
        yield Check("experts", impl, partial(experts.experts, impl=impl), half if kernel else mixtures,
                    HALF_BOUND if kernel else BOUND, "bfloat16" if kernel else "")

    if devices > 1:
        yield from _collectives(rng, devices)


def _collectives(rng: np.random.Generator, devices: int) -> Iterator[Check]:
    """The forms of the kernels for time split over devices; `pallas_*` inside them where it is at home."""
    over: Any = dict(mesh=make_mesh(context=devices, devices=jax.local_devices()[:devices]), note=f"{devices} devices")
    T = 10 * devices
    for impl in ("auto", *(impl for impl, needed in NEEDS.items() if "pallas" in impl and needed == platform())):
        conv, scan = (partial(kernel, impl=impl) for kernel in (sharded.causal_conv, sharded.linear_scan))
        yield Check("causal_conv, halo", impl, conv, [_conv(rng, T, D=20, W=4)], **over)
        yield Check("linear_scan, exchange", impl, scan, [_scan(rng, T, D=20)], **over)
    by_heads, gathered = _attention(rng, T, N=2 * devices, K=devices), _attention(rng, T, N=2, K=1, window=13)
    yield Check("attention, all-to-all", "auto", sharded.attention, [by_heads], **over)
    yield Check("attention, gathered keys", "auto", sharded.attention, [gathered], **over)


def _normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def _documents(rng: np.random.Generator, T: int) -> np.ndarray:
    """Three rows: documents of many lengths, two documents and padding, and nothing but padding."""
    lengths = np.where(rng.random(T) < 0.5, 1, rng.integers(2, 2 + max(1, T // 6), T))
    many = np.repeat(np.arange(1, T + 1), lengths)[:T]
    few = np.repeat([1, 2, 0], [T // 3, T // 2, T - T // 3 - T // 2])
    return np.stack([many, few, np.zeros(T)]).astype(np.int32)


def _conv(rng: np.random.Generator, T: int, D: int, W: int, documents: bool = True) -> Problem:
    ids = _documents(rng, T) if documents else None
    B = 3
    arrays = dict(y_BTD=_normal(rng, B, T, D), w_WD=_normal(rng, W, D), tail_BVD=_normal(rng, B, W - 1, D),
                  gate_in_BTD=_normal(rng, B, T, D), gate_out_BTD=_normal(rng, B, T, D), bias_D=_normal(rng, D))
    return _problem(rng, reference.causal_conv, arrays, dict(segment_ids_BT=ids))


def _scan(rng: np.random.Generator, T: int, D: int, documents: bool = True) -> Problem:
    ids = _documents(rng, T) if documents else None
    a = rng.choice([0.0, 1e-4, 0.5, 0.9, 0.9999], (3, T, D)) * rng.uniform(0.9, 1, (3, T, D))
    arrays = dict(a_BTD=a.astype(np.float32), b_BTD=_normal(rng, 3, T, D), h0_BD=_normal(rng, 3, D))
    return _problem(rng, reference.linear_scan, arrays, dict(segment_ids_BT=ids))


def _attention(
    rng: np.random.Generator, T: int, N: int, K: int, H: int = 16, window: int | None = None, documents: bool = True,
    dtype: Any = np.float32,
) -> Problem:  # fmt: skip
    ids = _documents(rng, T) if documents else None
    shapes = dict(q_BTNH=(3, T, N, H), k_BSKH=(3, T, K, H), v_BSKH=(3, T, K, H))
    arrays = {name: np.asarray(_normal(rng, *shape), dtype) for name, shape in shapes.items()}
    ids = dict(segment_ids_BT=ids, key_segment_ids_BS=ids)
    return _problem(rng, reference.attention, arrays, ids, **({} if window is None else {"window": window}))


def _packed(rng: np.random.Generator, N: int = 2, K: int = 1, H: int = 64, **options: Any) -> Problem:
    """Documents of such lengths that cuDNN gets them as sequences, some of which end behind the block of tokens that
    they begin in (`cudnn_attention`)."""
    T = 1024
    ids = np.zeros((2, T), np.int32)
    for row_T, lengths in zip(ids, ((700, 100, 3, 180, 41), (300, 10, 400, 20)), strict=True):
        row_T[: sum(lengths)] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    shapes = dict(q_BTNH=(2, T, N, H), k_BSKH=(2, T, K, H), v_BSKH=(2, T, K, H))
    arrays = {name: np.asarray(_normal(rng, *shape), jnp.bfloat16) for name, shape in shapes.items()}
    return _problem(rng, reference.attention, arrays, dict(segment_ids_BT=ids, key_segment_ids_BS=ids), **options)


def _slots(
    rng: np.random.Generator, T: int, S: int, N: int, K: int, H: int = 16, dtype: Any = np.float32
) -> Problem:
    """A few queries and a rolling buffer: slots in any order, some of them of another document."""
    shapes = dict(q_BTNH=(3, T, N, H), k_BSKH=(3, S, K, H), v_BSKH=(3, S, K, H))
    arrays = {name: np.asarray(_normal(rng, *shape), dtype) for name, shape in shapes.items()}
    key_order = np.stack([rng.permutation(S) for _ in range(3)]).astype(np.int32)
    order = np.broadcast_to(S - T + np.arange(T), (3, T)).astype(np.int32)
    ids = dict(order_BT=order, key_order_BS=key_order, segment_ids_BT=np.full((3, T), 2, np.int32),
               key_segment_ids_BS=1 + (key_order >= S // 4).astype(np.int32))
    return _problem(rng, reference.attention, arrays, ids, window=S - 3)


def _decode(rng: np.random.Generator, S: int, N: int, K: int, dtype: Any, H: int = 16) -> Problem:
    """One query a row and the stretch of slots that it sees."""
    def stretch(
        q_BTNH: np.ndarray, k_BSKH: np.ndarray, v_BSKH: np.ndarray, first_B: np.ndarray, stop_B: np.ndarray
    ) -> Any:
        slots = np.arange(S) + np.zeros((3, 1), np.int32)
        hidden = (slots < first_B[:, None]) | (slots >= stop_B[:, None])
        orders = dict(order_BT=np.zeros((3, 1), np.int32), key_order_BS=hidden.astype(np.int32))
        return reference.attention(q_BTNH, k_BSKH, v_BSKH, **orders)

    shapes = dict(q_BTNH=(3, 1, N, H), k_BSKH=(3, S, K, H), v_BSKH=(3, S, K, H))
    arrays = {name: np.asarray(_normal(rng, *shape), dtype) for name, shape in shapes.items()}
    bounds = dict(first_B=np.array([0, 5, 70], np.int32), stop_B=np.array([1, S, 80], np.int32))
    return _problem(rng, stretch, arrays, bounds)


def _linear(rng: np.random.Generator, M: int = 7, I: int = 33, O: int = 50) -> Problem:  # noqa: E741 (inputs, outputs)
    def product(x: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, Callable[[np.ndarray], Arrays]]:
        x_MI, w_OI = x.astype(np.float64), w.astype(np.float64)
        return x_MI @ w_OI.T, lambda dy_MO: dict(x=dy_MO @ w_OI, w=dy_MO.T @ x_MI)

    return _problem(rng, product, dict(x=_normal(rng, M, I), w=_normal(rng, O, I)), {})


def _experts(
    rng: np.random.Generator, M: int, A: int, E: int, D: int = 20, F: int = 12, dtype: Any = np.float32
) -> Problem:
    """Most tokens choose one expert, some choose none, and one expert has no token."""
    chosen_MA = np.stack([rng.permutation(E - 1)[:A] for _ in range(M)]).astype(np.int32)
    chosen_MA[::2, 0], chosen_MA[::2, 1:] = 0, np.maximum(chosen_MA[::2, 1:], 1)
    chosen_MA[7::9] = E
    shapes = dict(x_MD=(M, D), w1_EDF=(E, D, F), w3_EDF=(E, D, F), w2_EFD=(E, F, D))
    # As rows of one size: a large product would leave its rounding, which half precision has, to what follows.
    arrays = {name: np.asarray(_normal(rng, *shape) * (4 / shape[-2]) ** 0.5, dtype) for name, shape in shapes.items()}
    arrays |= dict(weight_MA=_normal(rng, M, A))
    return _problem(rng, reference.experts, arrays, dict(chosen_MA=chosen_MA))


def _problem(
    rng: np.random.Generator, solve: Callable[..., Any], arrays: Arrays, ids: Mapping[str, np.ndarray | None],
    **options: Any,
) -> Problem:  # fmt: skip
    """`solve` answers it; padding gets no cotangent and is not compared."""
    given = {name: x for name, x in ids.items() if x is not None}
    values, gradients = solve(**arrays, **given, **options)
    values = values if isinstance(values, tuple) else (values,)
    segments, dtype = given.get("segment_ids_BT"), next(iter(arrays.values())).dtype
    cotangents, expected = [], []
    for value in values:
        cotangent = np.asarray(_normal(rng, *value.shape), dtype)
        if segments is not None and value.shape[:2] == segments.shape and value.ndim > 2:
            padding = (segments == 0).reshape(segments.shape + (1,) * (value.ndim - 2))
            cotangent = np.where(padding, np.zeros_like(cotangent), cotangent)
            value = np.where(padding, np.nan, value)
        cotangents.append(cotangent)
        expected.append(value)
    return Problem(arrays, given, tuple(expected), tuple(cotangents), gradients(*cotangents), options)


if __name__ == "__main__":
    report, ok = selfcheck()
    print(report)
    sys.exit(0 if ok else 1)
