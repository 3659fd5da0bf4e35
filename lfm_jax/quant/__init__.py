"""Numbers in few bits: the block types of GGUF files, and which type each tensor of a model gets."""

from lfm_jax.quant.block_types import TypeSize, dequantize, quantize, type_size

__all__ = ["TypeSize", "dequantize", "quantize", "type_size"]
