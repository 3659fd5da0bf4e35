"""Text files to packed training batches: sources, tokenizer, pipeline, built datasets."""

from lfm_jax.data.build import BuildConfig, build
from lfm_jax.data.config import DataConfig, DataUsedUp, MixturePart
from lfm_jax.data.heldout import split_files
from lfm_jax.data.manifest import Manifest, load_manifest
from lfm_jax.data.pipeline import (
    check_lasts,
    heldout_batches,
    heldout_bytes,
    heldout_documents,
    make_tokenizer,
    rows_available,
    train_documents,
    train_iterator,
)
from lfm_jax.data.sources import Documents, SourceFile, find_files
from lfm_jax.text.tokenizer import SPECIAL_TOKENS, load_tokenizer, train_bpe

__all__ = [
    "SPECIAL_TOKENS",
    "BuildConfig",
    "DataConfig",
    "DataUsedUp",
    "Documents",
    "Manifest",
    "MixturePart",
    "SourceFile",
    "build",
    "check_lasts",
    "find_files",
    "heldout_batches",
    "heldout_bytes",
    "heldout_documents",
    "load_manifest",
    "load_tokenizer",
    "make_tokenizer",
    "rows_available",
    "split_files",
    "train_bpe",
    "train_documents",
    "train_iterator",
]
