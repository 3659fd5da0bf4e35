"""What runs learn from and are measured on: text, or built datasets."""

from __future__ import annotations

from tokenizers import Tokenizer

from lfm_jax.data.config import DataConfig
from lfm_jax.data.corpora.built import BuiltCorpus
from lfm_jax.data.corpora.corpus import Corpus
from lfm_jax.data.corpora.text import TextCorpus


def _kind_of(config: DataConfig) -> type[TextCorpus] | type[BuiltCorpus]:
    return BuiltCorpus if config.mixture else TextCorpus


def make_tokenizer(config: DataConfig, *, vocab_size: int) -> Tokenizer:
    """The tokenizer of a new run on this data: see the corpus of its kind.

    Raises:
      ValueError: a tokenizer, a source file or a dataset that cannot be read.
    """
    return _kind_of(config).make_tokenizer(config, vocab_size)


def open_corpus(config: DataConfig, tokenizer: Tokenizer, *, bos_id: int = 1, eos_id: int = 7) -> Corpus:
    """The corpus that a config names.

    Args:
      bos_id, eos_id: what a document begins and ends with; the defaults are those of `ModelConfig`.

    Raises:
      ValueError: a dataset that cannot be used, or that was built otherwise.
    """
    return _kind_of(config)(config, tokenizer, bos_id=bos_id, eos_id=eos_id)
