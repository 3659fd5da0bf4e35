"""Texts to token ids with document borders, and the cuts that make pieces of them.

A document is bos, its tokens, eos. It makes (input, target) pairs of neighbours, so its eos is only ever a
target and its bos only an input. Pieces are runs of at most T pairs: the input that opens a piece is the
target that closed the piece before, so every token but bos is a target exactly once.

Dimensions: T time (pairs of a row).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

BATCH_DOCUMENTS = 16
"""Documents encoded at a time, in parallel where there are cores."""


class DocumentEncoder:
    """Encodes documents with a copy of a tokenizer, stripped of its own truncation, padding and special tokens.

    The names of special tokens in a text are text like any other.

    Raises:
      ValueError: bos_id or eos_id is not an id of the tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer, *, bos_id: int, eos_id: int):
        encoder = Tokenizer.from_str(tokenizer.to_str())
        encoder.encode_special_tokens = True
        encoder.no_truncation()
        encoder.no_padding()
        size = max(encoder.get_vocab(with_added_tokens=True).values()) + 1
        bad = [f"{name} {i}" for name, i in (("bos_id", bos_id), ("eos_id", eos_id)) if not 0 <= i < size]
        if bad:
            raise ValueError(f"the tokenizer has no {' and no '.join(bad)}; its ids lie in 0..{size - 1}")
        self._encoder, self._bos_id, self._eos_id = encoder, bos_id, eos_id
        self.vocab_size = size
        """One more than the largest id."""
        self.dtype = np.dtype("<u2" if size <= 2**16 else "<u4")
        """The smallest type that holds every id."""

    def __call__(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each document, bos and eos included."""
        encodings = self._encoder.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array([self._bos_id, *encoding.ids, self._eos_id], self.dtype) for encoding in encodings]


def cuts(num_ids: int, T: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the pieces of a document of `num_ids` ids begin and end, in pairs: ids[start : stop + 1] is one piece."""
    starts = np.arange(0, num_ids - 1, T)
    return starts, np.minimum(starts + T, num_ids - 1)


class Tokens(NamedTuple):
    """A document, or a piece of one."""

    ids: np.ndarray
    spans: np.ndarray | None = None
    """Which ids are learnt, [spans, 2]: the first of each, and the one after its last. None: all."""

    def learnt(self) -> np.ndarray:
        """Of each id, whether it is learnt; bool [ids]."""
        learnt = np.full(len(self.ids), self.spans is None)
        for start, stop in () if self.spans is None else self.spans.tolist():
            learnt[start:stop] = True
        return learnt

    def pieces(self, T: int) -> list[Tokens]:
        """The pieces of a document (`cuts`)."""
        pieces = []
        for start, stop in zip(*(x.tolist() for x in cuts(len(self.ids), T)), strict=True):
            spans = None if self.spans is None else np.clip(self.spans - start, 0, stop + 1 - start)
            pieces.append(Tokens(self.ids[start : stop + 1], spans))
        return pieces


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """A fingerprint of everything a tokenizer does."""
    return hashlib.blake2b(tokenizer.to_str().encode(), digest_size=16).hexdigest()
