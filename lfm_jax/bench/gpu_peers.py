"""Other people's kernels on the same tensors: PyTorch's depthwise convolution and its grouped product,
flash-linear-attention's HGRN scan.

Each is optional; where it cannot be imported or fails, its row says so.

Dimensions: B batch, T time, D channels, W taps, M tokens, A active experts of a token, R = M A (token, choice) rows, E
experts, F width of an expert, U = 2 F.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from lfm_jax.bench.passes import Entry, Pass

PACKAGES = ("torch", "triton", "flash-linear-attention")
"""Distributions whose versions belong to the figures."""

Arrays = dict[str, jax.Array]


def conv(arrays: Arrays, dz_BTD: jax.Array) -> list[Entry]:
    """`torch.nn.functional.conv1d` of D groups in its own layout, [B, D, T]: alone, and between the gates."""
    unit = dz_BTD.nbytes
    names = {"PyTorch conv1d alone": (2, 5), "PyTorch gate, conv1d, gate": (4, 11)}
    torch, reason = _cuda_torch()
    if reason:
        return _absent(names, unit, reason)
    y, gate_in, gate_out = (
        _tensor(torch, arrays[name]).transpose(1, 2).contiguous().requires_grad_()
        for name in ("y_BTD", "gate_in_BTD", "gate_out_BTD")
    )
    w = _tensor(torch, arrays["w_WD"]).T[:, None].contiguous().requires_grad_()
    dz = _tensor(torch, dz_BTD).transpose(1, 2).contiguous()

    def alone() -> Any:
        return conv1d(torch, y, w)

    def gated() -> Any:
        return gate_out * conv1d(torch, gate_in * y, w)

    calls = zip(names.items(), ((alone, (y, w)), (gated, (y, w, gate_in, gate_out))), strict=True)
    return [_entry(torch, name, unit, copies, call, inputs, dz) for (name, copies), (call, inputs) in calls]


def conv1d(torch: Any, y_BDT: Any, w_D1W: Any) -> Any:
    """PyTorch's causal depthwise convolution, as `Lfm2ShortConv` calls it."""
    D, T, W = y_BDT.shape[1], y_BDT.shape[2], w_D1W.shape[2]
    return torch.nn.functional.conv1d(y_BDT, w_D1W, padding=W - 1, groups=D)[..., :T]


def scan(arrays: Arrays, dh_BTD: jax.Array) -> list[Entry]:
    """`h_t = exp(g_t) * h_{t-1} + x_t` of HGRN, g = log a."""
    unit = dh_BTD.nbytes
    names = {"fla chunk_hgrn": (3, 8), "fla fused_recurrent_hgrn": (3, 8)}
    torch, reason = _cuda_torch()
    ops, ops_reason = (None, reason) if reason else _imported("fla.ops.hgrn")
    if ops_reason:
        return _absent(names, unit, ops_reason)
    x = _tensor(torch, arrays["b_BTD"]).requires_grad_()
    g = _tensor(torch, arrays["a_BTD"]).log().requires_grad_()
    dh = _tensor(torch, dh_BTD)

    def call(kernel: Callable[..., Any]) -> Callable[[], Any]:
        return lambda: kernel(x, g)[0]

    return [
        _entry(torch, name, unit, copies, call(getattr(ops, name.removeprefix("fla "))), (x, g), dh)
        for name, copies in names.items()
    ]


def experts(arrays: Arrays, dy_MD: jax.Array, flops: int) -> list[Entry]:
    """The tokens of each expert sorted together, and `grouped_mm` of torch 2.10 and later: bfloat16 on CUDA."""
    names = {"PyTorch grouped_mm": (1, 3)}
    torch, reason = _cuda_torch()
    if not reason and not hasattr(torch.nn.functional, "grouped_mm"):
        reason = f"torch {torch.__version__} has no torch.nn.functional.grouped_mm"
    if reason:
        return _absent(names, flops, reason)
    x, w1, w3, w2 = (_tensor(torch, arrays[name]) for name in ("x_MD", "w1_EDF", "w3_EDF", "w2_EFD"))
    inputs = tuple(w.requires_grad_() for w in (x, torch.cat((w1, w3), -1), w2))
    chosen, dy = torch.tensor(np.asarray(arrays["chosen_MA"]), device="cuda"), _tensor(torch, dy_MD)

    def call() -> Any:
        return grouped_experts(torch, chosen, *inputs)

    return [_entry(torch, name, flops, works, call, inputs, dy) for name, works in names.items()]


def grouped_experts(torch: Any, chosen_MA: Any, x_MD: Any, w13_EDU: Any, w2_EFD: Any) -> Any:
    """Experts with equal weights, gate and up in one product as in `Lfm2MoeExperts`. Nothing waits for the device."""
    M, A = chosen_MA.shape
    sorted_R, order_R = chosen_MA.reshape(-1).sort(stable=True)
    each_E = torch.arange(len(w2_EFD), dtype=sorted_R.dtype, device=sorted_R.device)
    stop_E = torch.searchsorted(sorted_R, each_E, right=True, out_int32=True)
    grouped_mm = torch.nn.functional.grouped_mm
    gate_RF, up_RF = grouped_mm(x_MD[order_R // A], w13_EDU, offs=stop_E).chunk(2, dim=-1)
    y_RD = grouped_mm(torch.nn.functional.silu(gate_RF) * up_RF, w2_EFD, offs=stop_E)
    return y_RD[order_R.argsort()].reshape(M, A, -1).mean(1)


def _entry(
    torch: Any, name: str, unit: int, copies: tuple[int, int], call: Callable[[], Any], inputs: tuple[Any, ...],
    cotangent: Any,
) -> Entry:  # fmt: skip
    """Work, forward and both: so many copies of a unit, in bytes or operations."""
    def forward(calls: int) -> None:
        with torch.no_grad():
            for _ in range(calls):
                call()
        torch.cuda.synchronize()

    def both(calls: int) -> None:
        for _ in range(calls):
            torch.autograd.grad(call(), inputs, cotangent)
        torch.cuda.synchronize()

    return Entry(name, Pass(forward), Pass(both), copies[0] * unit, copies[1] * unit)


def _absent(names: dict[str, tuple[int, int]], unit: int, reason: str) -> list[Entry]:
    absent = Pass(None, reason=f"absent: {reason}")
    return [Entry(name, absent, absent, unit, unit) for name in names]


def _cuda_torch() -> tuple[Any, str]:
    torch, reason = _imported("torch")
    if not reason and not torch.cuda.is_available():
        reason = f"torch {torch.__version__} sees no CUDA device"
    return torch, reason


def _imported(name: str) -> tuple[Any, str]:
    """(module, why it is absent)."""
    try:
        return importlib.import_module(name), ""
    except Exception as error:  # Triton and its users fail to import in many ways.
        return None, " ".join(str(error).split()).replace("|", "/")[:120]


def _tensor(torch: Any, x: jax.Array) -> Any:
    values = torch.from_numpy(np.asarray(x, np.float32).copy())
    return values.to("cuda", getattr(torch, str(x.dtype)))
