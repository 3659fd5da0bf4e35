"""Numbers in few bits: the block types of GGUF files, and which type each tensor of a model gets."""

from lfm_jax.quant.block_types import TypeSize, dequantize, quantize, type_size
from lfm_jax.quant.mixes import ARCHITECTURES, MIXES, mix

__all__ = ["ARCHITECTURES", "MIXES", "TypeSize", "dequantize", "mix", "quantize", "type_size"]
