"""What every corpus gives a run, and what all of them check.

Dimensions: B rows of a batch, T time.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

import numpy as np

from lfm_jax.data.batch import Batch

if TYPE_CHECKING:
    import grain


class Corpus(Protocol):
    """What a run learns from and is measured on, in the tokens of one tokenizer."""

    @property
    def batch_size(self) -> int:
        """B, rows of one optimizer step over all devices."""
        ...

    @property
    def rows_available(self) -> int | None:
        """How many training rows there are before an epoch limit is met; None: any number.

        A run takes `batch_size` of them each step.
        """
        ...

    @property
    def heldout_bytes(self) -> int:
        """UTF-8 bytes of the held-out text: the loss summed over `heldout_batches` is spent on these.

        Raises:
          ValueError: files that cannot be found or read.
        """
        ...

    def train_batches(self, rows: np.ndarray | None = None) -> grain.DatasetIterator:
        """Batches of the training documents, in a new order each epoch; endless but for epoch limits.

        `get_state()` gives a small JSON-able dict; the batches of a new corpus of the same config and data continue
        after `set_state` with exactly those that were to come. The state does not depend on `rows`, so a run goes on
        with another number of processes.

        Args:
          rows: sorted places in a batch that this process needs, of [0, batch_size); it gets [len(rows), T] of each
            batch. None: all.

        Raises:
          ValueError: data that cannot be read, ids that the tokenizer does not have, or rows that do not fit the batch.
            While iterating: the epoch limits are met.
        """
        ...

    def heldout_batches(self) -> Iterable[Batch]:
        """One pass over the held-out documents, always in the same batches; none where nothing is held out.

        Every token of a document, the first one (predicted from bos) and its eos included, is a target exactly once.
        Bits per byte are therefore the loss in bits summed over all targets, by `heldout_bytes`; that charges the model
        for the end of each document too. The last batch is filled up with rows of padding.

        Raises:
          ValueError: see `train_batches`.
        """
        ...


def check_lasts(corpus: Corpus, steps: int) -> None:
    """Checks before a run that its data lasts for all of its steps.

    Raises:
      ValueError: an epoch limit is met before; says after how many steps.
    """
    available, B = corpus.rows_available, corpus.batch_size
    if available is not None and available < steps * B:
        raise ValueError(
            f"the epoch limits of data.mixture allow {available} rows, which is {available // B} steps "
            f"of batch_size {B}, and the run has {steps}; lower steps or train_minutes, raise epochs, or leave them out"
        )


def check_rows(rows: np.ndarray | None, batch_size: int) -> None:
    """Checks the rows that a process asks for (`Corpus.train_batches`).

    Raises:
      ValueError: they do not fit the batch.
    """
    if rows is None:
        return
    if not len(rows) or batch_size % len(rows):
        raise ValueError(
            f"this process needs {len(rows)} rows of each batch, which does not divide batch_size {batch_size}; choose "
            "a batch_size that all processes share evenly"
        )
    if rows[0] < 0 or rows[-1] >= batch_size or np.any(np.diff(rows) < 1):
        raise ValueError(f"rows {rows} must be sorted, distinct places in a batch of {batch_size}")
