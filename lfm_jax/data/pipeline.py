"""From files to batches: what `lfm train` learns from, and what it is measured on.

Files are split into training and held-out ones; their documents are tokenised when an iterator is made,
cut and packed into rows (`packing.py`), and batched. A batch is a dict of int32 arrays [B, T]:

  tokens       inputs; 0 at padding
  targets      the next token of the same document, or LOSS_IGNORE at padding and only there
  segment_ids  1, 2, ... for the pieces of a row from left to right; 0 at padding, which is at the right end
  positions    0, 1, ... within each piece; 0 at padding

Dimensions: B rows, T time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer

from lfm_jax.data.sources import Documents, SourceFile, find_files, split_files
from lfm_jax.data.tokenizer import TOKENIZER_FILE, load_tokenizer, train_bpe
from lfm_jax.train.loss import LOSS_IGNORE

if TYPE_CHECKING:
    import grain

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which text to train on, and the shape of a batch of it.

    Raises:
      ValueError: on construction, one message that lists every bad field and how to mend it.
    """

    sources: tuple[str, ...]
    """Files (.txt, .md, .py, .jsonl), directories (read recursively) and globs to train on."""
    seq_len: int
    """T, tokens of a row; a longer document is cut into pieces."""
    batch_size: int
    """B, rows of one optimizer step over all devices."""
    heldout: tuple[str, ...] = ()
    """Files, directories and globs never trained on, for the held-out loss; overrides heldout_fraction."""
    heldout_fraction: float = 0.02
    """Share of the source files held out, chosen by a hash of their names. 0: none."""
    exclude: tuple[str, ...] = ()
    """Shell patterns of files and directories to leave out, for example `tests` or `lib/old`."""
    text_field: str = "text"
    """Key of the text in the JSON object on each line of a .jsonl file."""
    tokenizer: str | None = None
    """A tokenizer.json or a directory with one. None: train one on the training files."""
    seed: int = 0
    """Of the order of the data; the held-out files do not depend on it."""

    def __post_init__(self) -> None:
        problems = _problems(self)
        if problems:
            raise ValueError("DataConfig is not valid:\n" + "\n".join(f"  - {p}" for p in problems))


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
    return heldout_documents(config).num_bytes


def make_tokenizer(config: DataConfig, *, vocab_size: int) -> Tokenizer:
    """`config.tokenizer` where that is set, else one of `vocab_size` ids trained on the training documents.

    Raises:
      ValueError: a tokenizer or a source file that cannot be read.
    """
    if config.tokenizer is not None:
        return load_tokenizer(config.tokenizer)
    return train_bpe(train_documents(config), vocab_size)


def train_iterator(
    config: DataConfig, tokenizer: Tokenizer, *, bos_id: int = 1, eos_id: int = 7
) -> grain.DatasetIterator:
    """Endless batches of the training documents, in a new order each epoch.

    `get_state()` gives a small JSON-able dict; a new iterator of the same config and data continues after
    `set_state` with exactly the batches that were to come. Tokenising (about a million tokens a second and
    core) is done before this returns.

    Args:
      bos_id, eos_id: what a document begins and ends with; the defaults are those of `ModelConfig`.

    Raises:
      ValueError: files that cannot be found or read, no text, or ids that the tokenizer does not have.
    """
    import grain

    from lfm_jax.data.packing import GuardedIterator, Pieces, pack

    pieces = Pieces(train_documents(config), tokenizer, config.seq_len, bos_id=bos_id, eos_id=eos_id)
    # Grain shuffles epoch e with seed + e, so seeds as close as 0 and 1 would share their orders.
    order_seed, row_seed = np.random.SeedSequence(config.seed).generate_state(2).tolist()
    endless = grain.MapDataset.source(pieces).shuffle(seed=order_seed).repeat()
    rows = pack(endless, config.seq_len, shuffle_seed=row_seed)
    batches = rows.batch(config.batch_size, drop_remainder=True)
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
    import grain

    from lfm_jax.data.packing import Pieces, pack

    pieces = Pieces(heldout_documents(config), tokenizer, config.seq_len, bos_id=bos_id, eos_id=eos_id)
    rows = pack(grain.MapDataset.source(pieces), config.seq_len, shuffle_seed=None)
    for batch in rows.batch(config.batch_size, drop_remainder=False):
        short = config.batch_size - len(batch["tokens"])
        yield {
            key: np.pad(x, ((0, short), (0, 0)), constant_values=LOSS_IGNORE if key == "targets" else 0)
            for key, x in batch.items()
        }


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


def _problems(c: DataConfig) -> list[str]:
    problems = []

    def need(ok: bool, message: str) -> None:
        if not ok:
            problems.append(message)

    for name in ("sources", "heldout", "exclude"):
        value = getattr(c, name)
        need(isinstance(value, tuple) and all(isinstance(v, str) and v for v in value),
             f"{name} is {value!r}; it must be a tuple of non-empty strings")
    need(c.sources != (), "sources is empty; name at least one file, directory or glob")
    for name, least in (("seq_len", 1), ("batch_size", 1), ("seed", 0)):
        value = getattr(c, name)
        need(type(value) is int and value >= least,
             f"{name} is {value!r}; it must be a whole number of at least {least}")
    fraction = c.heldout_fraction
    need(isinstance(fraction, (int, float)) and 0 <= fraction < 1,
         f"heldout_fraction is {fraction!r}; it must be a number from 0 up to but not including 1")
    need(isinstance(c.text_field, str) and c.text_field != "", f"text_field is {c.text_field!r}; name a JSON key")
    need(c.tokenizer is None or (isinstance(c.tokenizer, str) and c.tokenizer != ""),
         f"tokenizer is {c.tokenizer!r}; give the path of a {TOKENIZER_FILE} or of its directory, or leave it out")
    return problems
