"""From files to batches: what `lfm train` learns from, and what it is measured on.

Text is for small runs: files are split into training and held-out ones; their documents are tokenised when an
iterator is made, cut and packed into rows (`packing.py`), and batched. Built datasets are read as they are
(`mixture.py`, `shards.py`). What a batch is: see `batch.py`.

Dimensions: B rows, T time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer

from lfm_jax.data.batch import Batch, batches_of
from lfm_jax.data.config import DataConfig
from lfm_jax.data.heldout import split_files
from lfm_jax.data.mixture import check_made_for, load_manifests, mixture_iterator, mixture_rows, mixture_tokenizer
from lfm_jax.data.sources import Documents, SourceFile, find_files
from lfm_jax.text.tokenizer import load_tokenizer, train_bpe

if TYPE_CHECKING:
    import grain


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


def heldout_bytes(config: DataConfig) -> int:
    """UTF-8 bytes of the held-out text: the loss summed over `heldout_batches` is spent on these."""
    if config.mixture:
        return sum(manifest.heldout.text_bytes for manifest in load_manifests(config))
    return heldout_documents(config).num_bytes


def make_tokenizer(config: DataConfig, *, vocab_size: int) -> Tokenizer:
    """`config.tokenizer` where that is set, else one of `vocab_size` ids trained on the training documents.

    That of a mixture is the one it was built with, whatever vocab_size says.

    Raises:
      ValueError: a tokenizer, a source file or a dataset that cannot be read.
    """
    if config.mixture:
        return mixture_tokenizer(config)
    if config.tokenizer is not None:
        return load_tokenizer(config.tokenizer)
    return train_bpe(train_documents(config), vocab_size)


def rows_available(config: DataConfig) -> int | None:
    """How many training rows there are before an epoch limit is met; None: any number.

    A run takes `batch_size` of them each step.

    Raises:
      ValueError: a dataset that cannot be used.
    """
    return mixture_rows(config) if config.mixture else None


def check_lasts(config: DataConfig, steps: int) -> None:
    """Checks before a run that its data lasts to its end.

    Raises:
      ValueError: an epoch limit is met before; says after how many steps. Or a dataset cannot be used.
    """
    available = rows_available(config)
    if available is not None and available < steps * config.batch_size:
        raise ValueError(
            f"the epoch limits of data.mixture allow {available} rows, which is {available // config.batch_size} steps "
            f"of batch_size {config.batch_size}, and steps is {steps}; lower steps, or raise epochs or leave them out"
        )


def train_iterator(
    config: DataConfig, tokenizer: Tokenizer, *, rows: np.ndarray | None = None, bos_id: int = 1, eos_id: int = 7
) -> grain.DatasetIterator:
    """Batches of the training documents, in a new order each epoch; endless but for the epoch limits of a mixture.

    `get_state()` gives a small JSON-able dict; a new iterator of the same config and data continues after
    `set_state` with exactly the batches that were to come. The state does not depend on `rows`, so a run goes on
    with another number of processes. Text is tokenised (about a million tokens a second and core) before this returns.

    Args:
      rows: sorted places in a batch that this process needs, of [0, batch_size); it gets [len(rows), T] of each
        batch. None: all.
      bos_id, eos_id: what a document begins and ends with; the defaults are those of `ModelConfig`.

    Raises:
      ValueError: files that cannot be found or read, no text, ids that the tokenizer does not have, a dataset that was
        built otherwise, or rows that do not fit the batch. While iterating: the epoch limits are met.
    """
    _check_rows(rows, config.batch_size)
    if config.mixture:
        return mixture_iterator(config, tokenizer, rows, bos_id=bos_id, eos_id=eos_id)
    import grain

    from lfm_jax.data.guarded import GuardedIterator
    from lfm_jax.data.packing import Pieces, pack

    pieces = Pieces(train_documents(config), tokenizer, config.seq_len, bos_id=bos_id, eos_id=eos_id)
    # Grain shuffles epoch e with seed + e, so seeds as close as 0 and 1 would share their orders.
    order_seed, row_seed = np.random.SeedSequence(config.seed).generate_state(2).tolist()
    endless = grain.MapDataset.source(pieces).shuffle(seed=order_seed).repeat()
    batches = pack(endless, config.seq_len, shuffle_seed=row_seed).batch(config.batch_size, drop_remainder=True)
    if rows is not None:
        # Packing goes from row to row, so that each process packs them all.
        batches = batches.map(lambda batch: {key: x[rows] for key, x in batch.items()})
    fingerprint = f"{pieces.digest()}-{config.seq_len}-{config.batch_size}-{config.seed}"
    return GuardedIterator(iter(batches), fingerprint)


def heldout_batches(
    config: DataConfig, tokenizer: Tokenizer, *, bos_id: int = 1, eos_id: int = 7
) -> Iterator[Batch]:
    """One pass over the held-out documents, always in the same batches; none where nothing is held out.

    Every token of a document, the first one (predicted from bos) and its eos included, is a target exactly
    once. Bits per byte are therefore the loss in bits summed over all targets, by `heldout_bytes`; that
    charges the model for the end of each document too. The last batch is filled up with rows of padding.

    Raises:
      ValueError: see `train_iterator`.
    """
    return batches_of(_heldout_rows(config, tokenizer, bos_id, eos_id), config.batch_size)


def _heldout_rows(config: DataConfig, tokenizer: Tokenizer, bos_id: int, eos_id: int) -> Iterator[Batch]:
    if config.mixture:
        from lfm_jax.data.shards import heldout_rows

        manifests = load_manifests(config)
        check_made_for(manifests, tokenizer, bos_id=bos_id, eos_id=eos_id)
        return heldout_rows(manifests)
    import grain

    from lfm_jax.data.packing import Pieces, pack

    pieces = Pieces(heldout_documents(config), tokenizer, config.seq_len, bos_id=bos_id, eos_id=eos_id)
    return iter(pack(grain.MapDataset.source(pieces), config.seq_len, shuffle_seed=None))


def _check_rows(rows: np.ndarray | None, batch_size: int) -> None:
    if rows is None:
        return
    if not len(rows) or batch_size % len(rows):
        raise ValueError(
            f"this process needs {len(rows)} rows of each batch, which does not divide batch_size {batch_size}; choose "
            "a batch_size that all processes share evenly"
        )
    if rows[0] < 0 or rows[-1] >= batch_size or np.any(np.diff(rows) < 1):
        raise ValueError(f"rows {rows} must be sorted, distinct places in a batch of {batch_size}")


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
