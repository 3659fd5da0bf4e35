"""What is held out. There are two rules, and each has its place.

- Text that a run reads itself is held out file by file (`split_files`), by a hash of the file's name: known before a
  byte is read, so that the tokenizer is trained on the other files, and a book is never on both sides.
- A built dataset holds out document by document (`is_heldout`), by a hash of the text: copies of a document are on one
  side however the files are named and cut, in every dataset.

Neither depends on the seed of a run. In both, `heldout_fraction` is the share.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence

from lfm_jax.data.sources import SourceFile


def split_files(files: Sequence[SourceFile], heldout_fraction: float) -> tuple[list[SourceFile], list[SourceFile]]:
    """(training files, held-out files), each in the given order.

    A file is held out when a hash of its name, uniform in [0, 1), is below the fraction, so a file stays on its side
    when others come or go. A fraction of 0 holds out none.

    Raises:
      ValueError: a side would be empty though the fraction asks for both.
    """
    ranks = [_rank(file.name) for file in files]
    train = [file for file, rank in zip(files, ranks, strict=True) if rank >= heldout_fraction]
    heldout = [file for file, rank in zip(files, ranks, strict=True) if rank < heldout_fraction]
    if heldout_fraction > 0 and not (train and heldout):
        side = "training" if heldout else "held-out"
        raise ValueError(
            f"heldout_fraction {heldout_fraction} of {len(files)} file(s) leaves no {side} file; name the held-out "
            "files in `heldout`, or set heldout_fraction to 0 to hold out none"
            + _working_fraction(ranks)
        )
    return train, heldout


def _working_fraction(ranks: list[float]) -> str:
    """Advice on a fraction that gives both sides a file, if there is one."""
    distinct = sorted(set(ranks))[:2]
    if len(distinct) < 2:
        return ""
    fraction = math.ceil(distinct[0] * 1000 + 0.5) / 1000
    return f", or to {fraction} to hold out one" if fraction < distinct[1] else ""


def _rank(name: str) -> float:
    digest = hashlib.blake2b(b"0/" + os.fsencode(name), digest_size=7).digest()
    return int.from_bytes(digest, "big") / 2**56


def is_heldout(text: str, fraction: float) -> bool:
    """Whether a document is held out: `HELDOUT_RULE`. Equal texts are always on one side, in every dataset."""
    digest = hashlib.blake2b(text.encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big") < fraction * 2**56


HELDOUT_RULE = "blake2b with 7 bytes over a document's UTF-8 text, as a big-endian number, is below fraction * 2^56"
