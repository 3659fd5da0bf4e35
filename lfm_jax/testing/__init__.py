"""Tiny models and tokenizers for tests and documentation, made on the spot and never downloaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flax import nnx

from lfm_jax.config import ModelConfig
from lfm_jax.model import LFM

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def tiny_config(**changes: Any) -> ModelConfig:
    """A float32 hybrid of three layers and about ten thousand parameters, loud enough that no layer is silent."""
    fields: dict[str, Any] = dict(
        layer_types=("conv", "full_attention", "conv"),
        vocab_size=97,
        hidden_size=32,
        ffn_size=48,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        max_position=4096,
        init_std=0.3,
        dtype="float32",
    )
    return ModelConfig(**(fields | changes))


def tiny_model(seed: int = 0, **changes: Any) -> LFM:
    """A `tiny_config` model with random weights."""
    return LFM(tiny_config(**changes), rngs=nnx.Rngs(seed))


def tiny_tokenizer(text: str = "the quick brown fox jumps over the lazy dog\n" * 8, vocab_size: int = 512) -> Tokenizer:
    """A byte-level BPE tokenizer with LFM2's special tokens, trained on `text`."""
    from lfm_jax.text.tokenizer import train_bpe

    return train_bpe([text], vocab_size=vocab_size)
