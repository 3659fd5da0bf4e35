"""Numbers in few bits: the block types of GGUF files, and which type each tensor of a model gets."""

from lfm_jax.quant.block_types import TypeSize, dequantize, gguf_library, quantize, type_size
from lfm_jax.quant.mixes import ARCHITECTURES, MIXES, mix

__all__ = ["ARCHITECTURES", "MIXES", "TypeSize", "dequantize", "gguf_library", "mix", "quantize", "type_size"]
