"""Text files to packed training batches: sources, tokenizer, built datasets, corpora."""

from lfm_jax.data.build import BuildConfig, build
from lfm_jax.data.config import DataConfig, DataUsedUp, MixturePart
from lfm_jax.data.corpora import Corpus, make_tokenizer, open_corpus
from lfm_jax.data.corpora.corpus import check_lasts
from lfm_jax.data.corpora.text import heldout_documents, train_documents
from lfm_jax.data.heldout import split_files
from lfm_jax.data.manifest import Manifest, load_manifest
from lfm_jax.data.sources import Documents, SourceFile, find_files
from lfm_jax.text.tokenizer import SPECIAL_TOKENS, load_tokenizer, train_bpe

__all__ = [
    "SPECIAL_TOKENS",
    "BuildConfig",
    "Corpus",
    "DataConfig",
    "DataUsedUp",
    "Documents",
    "Manifest",
    "MixturePart",
    "SourceFile",
    "build",
    "check_lasts",
    "find_files",
    "heldout_documents",
    "load_manifest",
    "load_tokenizer",
    "make_tokenizer",
    "open_corpus",
    "split_files",
    "train_bpe",
    "train_documents",
]
