"""Which type each tensor of a GGUF file gets: the mixes that llama.cpp names.

Q4_K_M for example has Q6_K where a coarser type costs most: the head, values, and the way down in some layers. Rules
are those of src/llama-quant.cpp (tensor_allows_quantization, llama_tensor_get_type, tensor_type_fallback) for the
architectures that our models are written as.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from lfm_jax.quant.block_types import PLAIN, type_size

ARCHITECTURES = ("lfm2", "lfm2moe", "llama")
MIXES = {
    "F32": "F32", "F16": "F16", "BF16": "BF16", "Q8_0": "Q8_0", "Q6_K": "Q6_K", "Q5_K_M": "Q5_K", "Q4_K_M": "Q4_K",
    "Q4_K_S": "Q4_K", "Q4_0": "Q4_0",
}
"""Names of mixes, and the type that most tensors of each have."""
_FALLBACKS = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""What rows that are no multiple of 256 numbers get; F16 if they are none of 32 either."""
_KEPT = ("ffn_gate_inp.weight", "shortconv.conv.weight")
"""How names of matrices end that stay float32."""


def mix(name: str, shapes: Mapping[str, tuple[int, ...]], *, arch: str, importance: bool = False) -> dict[str, str]:
    """Returns the type of each tensor.

    Args:
      name: one of MIXES.
      shapes: every tensor of the file by its name there (`blk.0.ffn_down.weight`), all layers included, shapes as in
        NumPy: [rows, columns], or [E, rows, columns] for stacked experts.
      arch: `general.architecture` of the file, one of ARCHITECTURES.
      importance: whether importance weights are used (llama.cpp's imatrix); Q4_0 then has Q4_1 in the first layers.

    Raises:
      ValueError: another name or architecture.
    """
    if name not in MIXES:
        raise ValueError(f"{name!r} is no type of GGUF files; take one of {', '.join(MIXES)}")
    if arch not in ARCHITECTURES:
        raise ValueError(f"arch {arch!r} has other rules; expected one of {', '.join(ARCHITECTURES)}")
    model = _Model(shapes, arch, importance)
    types = {}
    for tensor, shape in shapes.items():
        if not _narrows(tensor, shape):
            types[tensor] = "F32"
        elif MIXES[name] in PLAIN:
            types[tensor] = MIXES[name]
        else:
            types[tensor] = _fitting(model.wanted(name, tensor), shape[-1])
    return types


def _narrows(tensor: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor leaves float32: matrices called weight, but norms and what is small and sensitive."""
    matrix = any(size > 1 for size in shape[:-1])
    return matrix and tensor.endswith("weight") and "_norm.weight" not in tensor and not tensor.endswith(_KEPT)


def _fitting(type: str, columns: int) -> str:
    """Returns the type, or the one that stands in where rows are not whole blocks."""
    for fitting in (type, _FALLBACKS.get(type, type)):
        if columns % type_size(fitting).elements == 0:
            return fitting
    return "F16"


class _Model:
    """What the rules look at beside a tensor's name."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], arch: str, importance: bool) -> None:
        self.shapes = shapes
        self.importance = importance
        self.layers = 1 + max((_layer(tensor) for tensor in shapes), default=-1)
        self.values = sorted(_layer(tensor) for tensor in shapes if tensor.endswith("attn_v.weight"))
        """Layers with attention, first to last."""
        experts = [shape[0] for tensor, shape in shapes.items() if tensor.endswith("ffn_down_exps.weight")]
        self.eight_experts = experts[:1] == [8]
        self.tied = "output.weight" not in shapes
        queries, values = (shapes.get(f"blk.0.attn_{x}.weight", (0,))[0] for x in "qv")
        self.is_70b = arch == "llama" and self.layers == 80 and queries != values

    def wanted(self, name: str, tensor: str) -> str:
        """Returns the type that a mix of block types has for a tensor, whatever its width."""
        most = MIXES[name]
        if tensor == ("token_embd.weight" if self.tied else "output.weight"):
            whole = self.shapes[tensor][-1] % type_size(most).elements == 0
            return "Q6_K" if most != "Q8_0" and whole else "Q8_0"
        layer = _layer(tensor)
        first = layer < self.layers // 8
        if "attn_v.weight" in tensor:
            return self._values(name, self.values.index(layer))
        if "attn_k.weight" in tensor and self.eight_experts:
            return "Q8_0"
        if "attn_output.weight" in tensor and self.eight_experts and name in ("Q4_K_S", "Q4_K_M"):
            return "Q5_K"
        if "ffn_down" in tensor:
            if name in ("Q4_K_M", "Q5_K_M") and _more_bits(layer, self.layers):
                return "Q6_K"
            if first and name == "Q4_K_S":
                return "Q5_K"
            if first and name == "Q4_0" and self.importance:
                return "Q4_1"
        return most

    def _values(self, name: str, nth: int) -> str:
        """Returns the type of the values' projection in the nth layer with attention."""
        if self.eight_experts:
            return "Q8_0"
        if name in ("Q4_K_M", "Q5_K_M") and _more_bits(nth, len(self.values)):
            return "Q6_K"
        if (name == "Q4_K_S" and nth < 4) or (self.is_70b and MIXES[name] == "Q4_K"):
            return "Q5_K"
        return MIXES[name]


def _layer(tensor: str) -> int:
    """Returns the number of a tensor's layer, -1 if it belongs to none."""
    found = re.match(r"blk\.(\d+)\.", tensor)
    return int(found[1]) if found else -1


def _more_bits(i: int, count: int) -> bool:
    """Whether the ith of `count` layers has the finer type: the first and the last eighth, and each third between."""
    return i < count // 8 or i >= 7 * count // 8 or (i - count // 8) % 3 == 2
