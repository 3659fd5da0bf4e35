"""Batches whose place is saved together with what data they are of.

Importing this loads Grain, which is slow.
"""

from __future__ import annotations

from typing import Any

import grain

from lfm_jax.data.config import DataUsedUp


class GuardedIterator(grain.DatasetIterator):
    """An iterator whose saved state is refused where the data is not the same."""

    def __init__(self, parent: grain.DatasetIterator, fingerprint: str):
        super().__init__(parent)
        self._fingerprint = fingerprint

    def __next__(self) -> Any:
        try:
            return next(self._parent)
        except StopIteration:
            raise DataUsedUp(
                "the epoch limits of data.mixture are met, and the run asks for more; lower steps, or raise epochs "
                "or leave them out"
            ) from None

    def get_state(self) -> dict[str, Any]:
        """Plain dicts and integers, fit for JSON."""
        return {"fingerprint": self._fingerprint, "iterator": self._parent.get_state()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on exactly where the state was taken.

        Raises:
          ValueError: the state belongs to other data.
        """
        if state.get("fingerprint") != self._fingerprint:
            raise ValueError(
                "the saved data position belongs to other data: the source files, the tokenizer, or seq_len, "
                "batch_size or seed changed since; restore them, or start a new run"
            )
        self._parent.set_state(state["iterator"])
