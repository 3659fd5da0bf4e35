"""What an accelerator can do: one table of constants, each row with its source.

Needs nothing but Python, so that a loop can ask for the peak without importing the planner.
"""

from __future__ import annotations

import dataclasses
from typing import Any

GB, GIB, TERA = 10**9, 2**30, 10**12

_CLOUD = "https://docs.cloud.google.com/tpu/docs/"
_ICI = "; link: https://jax-ml.github.io/scaling-book/tpus (table of interconnect figures)"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One device as JAX counts them: a chip, but half a chip where each of two chiplets is a device (TPU7x).

    Rates are the vendor's peaks, dense, a second.
    """

    name: str
    """As topologies name it: v5e, H200."""
    kinds: tuple[str, ...]
    """What `device.device_kind` says: in full, or how it begins if this ends with `*`."""
    peak_bf16_flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    """Bytes per second."""
    link_bandwidth: float
    """Bytes per second over one link in one direction."""
    torus_dims: int
    """Dimensions of the TPU torus, a link either way along each; 0: a switch that all devices of a node hang on."""
    wraps_from: int = 1
    """Devices along a dimension of a slice from which on it closes to a ring, in multiples of this number."""
    source: str

    @property
    def devices_per_chip(self) -> int:
        return 2 if self.name == "tpu7x" else 1


def _tpu(name: str, kinds: tuple[str, ...], tflops: float, gib: float, gb_s: float, link_gb_s: float, dims: int,
         wraps_from: int, page: str, per_chip: int = 1) -> Chip:
    return Chip(
        name=name, kinds=kinds, peak_bf16_flops=tflops * TERA / per_chip, hbm_bytes=int(gib * GIB) // per_chip,
        hbm_bandwidth=gb_s * GB / per_chip, link_bandwidth=link_gb_s * GB / per_chip, torus_dims=dims,
        wraps_from=wraps_from, source=f"{_CLOUD}{page}{_ICI}",
    )


def _gpu(name: str, kinds: tuple[str, ...], tflops: float, gb: int, gb_s: float, nvlink_gb_s: float, page: str) -> Chip:
    return Chip(
        name=name, kinds=kinds, peak_bf16_flops=tflops * TERA, hbm_bytes=gb * GB, hbm_bandwidth=gb_s * GB,
        link_bandwidth=nvlink_gb_s * GB, torus_dims=0, source=page,
    )


CHIPS: dict[str, Chip] = {chip.name: chip for chip in (
    _tpu("v4", ("TPU v4",), 275, 32, 1200, 45, 3, 4, "v4"),
    _tpu("v5e", ("TPU v5 lite", "TPU v5e"), 197, 16, 819, 45, 2, 16, "v5e"),
    _tpu("v5p", ("TPU v5", "TPU v5p"), 459, 95, 2765, 90, 3, 4, "v5p"),
    _tpu("v6e", ("TPU v6 lite", "TPU v6e"), 918, 32, 1638, 90, 2, 16, "v6e"),
    _tpu("tpu7x", ("TPU7x",), 2307, 192, 7380, 90, 3, 4, "tpu7x", per_chip=2),
    # NVIDIA prints BF16 with sparsity for Hopper and Blackwell; dense is half of it. NVLink: one direction of the sum.
    _gpu("A100", ("NVIDIA A100*",), 312, 80, 2039, 300,
         "https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/"
         "nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf (A100 80GB SXM)"),
    _gpu("H100", ("NVIDIA H100*",), 989.4, 80, 3350, 450,
         "https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet (H100 SXM)"),
    _gpu("H200", ("NVIDIA H200*",), 989.4, 141, 4800, 450,
         "https://nvdam.widen.net/s/nb5zzzsjdf/hpc-datasheet-sc23-h200-datasheet-3002446 (H200 SXM)"),
    _gpu("B200", ("NVIDIA B200*",), 2250, 180, 8000, 900,
         "https://resources.nvidia.com/en-us-blackwell-architecture/datasheet (HGX B200, one of 8 GPUs, 1,000 W)"),
)}
"""The table, by name."""


def chip_of(device: Any) -> Chip | None:
    """The table's row of a `jax.Device` (or of its `device_kind`); None if it has none, a CPU for example.

    Of parts sold in several forms the row is the SXM one, as NVIDIA's names do not tell the boards apart reliably.
    """
    kind = device if isinstance(device, str) else device.device_kind
    for chip in CHIPS.values():
        if any(kind.startswith(k[:-1]) if k.endswith("*") else kind == k for k in chip.kinds):
            return chip
    return None
