"""Text files to packed training batches: sources, tokenizer, pipeline."""

from lfm_jax.data.pipeline import (
    DataConfig,
    heldout_batches,
    heldout_bytes,
    heldout_documents,
    make_tokenizer,
    train_documents,
    train_iterator,
)
from lfm_jax.data.sources import Documents, SourceFile, find_files, split_files
from lfm_jax.data.tokenizer import SPECIAL_TOKENS, load_tokenizer, train_bpe

__all__ = [
    "SPECIAL_TOKENS",
    "DataConfig",
    "Documents",
    "SourceFile",
    "find_files",
    "heldout_batches",
    "heldout_bytes",
    "heldout_documents",
    "load_tokenizer",
    "make_tokenizer",
    "split_files",
    "train_bpe",
    "train_documents",
    "train_iterator",
]
