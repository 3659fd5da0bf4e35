"""Text as it lies in files, for small runs: tokenised, cut and packed into rows when a run asks for batches.

Files are split into training and held-out ones (`heldout.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer

from lfm_jax.data.batch import Batch, batches_of
from lfm_jax.data.config import DataConfig
from lfm_jax.data.corpora.corpus import check_rows
from lfm_jax.data.heldout import split_files
from lfm_jax.data.sources import Documents, SourceFile, find_files
from lfm_jax.text.tokenizer import load_tokenizer, train_bpe

if TYPE_CHECKING:
    import grain

    from lfm_jax.data.packing import Pieces


def train_documents(config: DataConfig) -> Documents:
    """The documents to train on.

    Raises:
      ValueError: files that cannot be found or read, or no text.
    """
    documents = Documents(_split(config)[0], config.text_field)
    if not len(documents):
        raise ValueError(f"sources {list(config.sources)}: every training document is empty; name files with text")
    return documents


def heldout_documents(config: DataConfig) -> Documents:
    """The held-out documents; none if heldout_fraction is 0 and `heldout` is empty.

    Raises:
      ValueError: files that cannot be found or read, or held-out files without text.
    """
    documents = Documents(_split(config)[1], config.text_field)
    if documents.files and not len(documents):
        raise ValueError("every held-out document is empty; name files with text in `heldout`")
    return documents


class TextCorpus:
    """The documents of `config.sources`; a `Corpus`.

    Text is tokenised (about a million tokens a second and core) before `train_batches` or `heldout_batches` returns.
    Rows are packed as batches are asked for.
    """

    rows_available = None

    def __init__(self, config: DataConfig, tokenizer: Tokenizer, *, bos_id: int, eos_id: int):
        self._config, self._tokenizer, self._bos_id, self._eos_id = config, tokenizer, bos_id, eos_id

    @staticmethod
    def make_tokenizer(config: DataConfig, vocab_size: int) -> Tokenizer:
        """`config.tokenizer` where that is set, else one of `vocab_size` ids trained on the training documents."""
        if config.tokenizer is not None:
            return load_tokenizer(config.tokenizer)
        return train_bpe(train_documents(config), vocab_size)

    @property
    def batch_size(self) -> int:
        return self._config.batch_size

    def train_batches(self, rows: np.ndarray | None = None) -> grain.DatasetIterator:
        config = self._config
        check_rows(rows, config.batch_size)
        import grain

        from lfm_jax.data.guarded import GuardedIterator
        from lfm_jax.data.packing import pack

        pieces = self._pieces(train_documents(config))
        # Grain shuffles epoch e with seed + e, so seeds as close as 0 and 1 would share their orders.
        order_seed, row_seed = np.random.SeedSequence(config.seed).generate_state(2).tolist()
        endless = grain.MapDataset.source(pieces).shuffle(seed=order_seed).repeat()
        batches = pack(endless, config.seq_len, shuffle_seed=row_seed).batch(config.batch_size, drop_remainder=True)
        if rows is not None:
            # Packing goes from row to row, so that each process packs them all.
            batches = batches.map(lambda batch: {key: x[rows] for key, x in batch.items()})
        fingerprint = f"{pieces.digest()}-{config.seq_len}-{config.batch_size}-{config.seed}"
        return GuardedIterator(iter(batches), fingerprint)

    def heldout_batches(self) -> Iterator[Batch]:
        import grain

        from lfm_jax.data.packing import pack

        source = grain.MapDataset.source(self._pieces(self._heldout_documents))
        return batches_of(pack(source, self._config.seq_len, shuffle_seed=None), self._config.batch_size)

    @property
    def heldout_bytes(self) -> int:
        return self._heldout_documents.num_bytes

    @cached_property
    def _heldout_documents(self) -> Documents:
        return heldout_documents(self._config)

    def _pieces(self, documents: Documents) -> Pieces:
        from lfm_jax.data.packing import Pieces

        return Pieces(documents, self._tokenizer, self._config.seq_len, bos_id=self._bos_id, eos_id=self._eos_id)


def _split(config: DataConfig) -> tuple[list[SourceFile], list[SourceFile]]:
    """(training files, held-out files)."""
    files = find_files(config.sources, config.exclude)
    if not config.heldout:
        return split_files(files, config.heldout_fraction)
    heldout = find_files(config.heldout, config.exclude)
    held = {file.path for file in heldout}
    train = [file for file in files if file.path not in held]
    if not train:
        raise ValueError(f"heldout {list(config.heldout)} takes every file of sources; name fewer, or add sources")
    return train, heldout
