"""Language modelling on packed text: held-out bits per byte, and the loss by position in context.

Dimensions: B rows, T time, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

from lfm_jax.data.batch import Batch, batches_of
from lfm_jax.data.build import BuildConfig, build
from lfm_jax.data.config import DataConfig, MixturePart
from lfm_jax.data.corpora import open_corpus
from lfm_jax.data.manifest import MANIFEST_FILE, Manifest, load_manifest
from lfm_jax.data.sources import Documents, find_files
from lfm_jax.files import locked, say, write_whole
from lfm_jax.problems import raise_problems
from lfm_jax.text.tokenizer import TOKENIZER_FILE, load_tokenizer, train_bpe

if TYPE_CHECKING:
    import grain

STDLIB_EXCLUDE = ("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "pydoc_data")
BOS, EOS = 1, 7
"""What documents begin and end with: the defaults of `ModelConfig`."""
BLOCK_BYTES = 8 * 2**20
FEW_DOCUMENTS = 10
"""Below as many held-out documents the report says that they are few."""
_AT_WORK = "another build is at work"
"""What `data.build` says of a directory that is taken."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
    """Text, tokenised and packed once a study.

    Raises:
      ValueError: on construction, one message that lists every bad field.
    """

    sources: tuple[str, ...] = ()
    """Files (.txt, .md, .py, .jsonl), directories and globs. None: the source of Python's own standard library."""
    exclude: tuple[str, ...] = ()
    """Shell patterns of files and directories to leave out."""
    text_field: str = "text"
    """Key of the text in the JSON object on each line of a .jsonl file."""
    tokenizer: str | None = None
    """A tokenizer.json or a directory with one. None: train a BPE tokenizer of `vocab_size` ids on the sources."""
    vocab_size: int = 1024
    """Ids of the tokenizer to train."""
    seq_len: int = 256
    """T, tokens of a row."""
    batch_size: int = 8
    """B, rows of one optimizer step."""
    steps: int = 400
    """Optimizer steps of a run."""
    heldout_fraction: float = 0.05
    """Share of the documents held out, chosen by a hash of their text."""
    heldout_rows: int = 512
    """Held-out rows that are measured, spread evenly over all."""
    peak_lrs: tuple[float, ...] = ()
    """In place of the study's."""

    def __post_init__(self) -> None:
        problems = [
            f"text.{name} is {getattr(self, name)!r}; it must be a whole number of at least {least}"
            for name, least in (("vocab_size", 270), ("seq_len", 2), ("batch_size", 1), ("steps", 1),
                                ("heldout_rows", 1))
            if not (type(getattr(self, name)) is int and getattr(self, name) >= least)
        ]
        if not 0 < self.heldout_fraction < 1:
            problems.append(f"text.heldout_fraction is {self.heldout_fraction}; it must lie between 0 and 1")
        raise_problems("Text is not valid", problems)

    def found(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """(sources, exclude) with the default filled in."""
        if self.sources:
            return self.sources, self.exclude
        return (sysconfig.get_paths()["stdlib"],), (*STDLIB_EXCLUDE, *self.exclude)

    def prepare(self, directory: Path) -> Manifest:
        """Trains the tokenizer and builds the dataset in a folder of `directory`, or finds both there.

        Raises:
          ValueError: sources or tokenizer cannot be read.
        """
        sources, exclude = self.found()
        what = {name: getattr(self, name) for name in ("text_field", "tokenizer", "vocab_size", "seq_len",
                                                       "heldout_fraction")}
        name = hashlib.blake2b(json.dumps([sources, exclude, what]).encode(), digest_size=6).hexdigest()
        out = directory / f"text-{name}"
        # Another process of the study may be at it; each waits rather than fail.
        tries = 0
        while True:
            try:
                tokenizer = self._tokenizer(directory / f"tokenizer-{name}", sources, exclude)
                return build(BuildConfig(
                    sources=sources, exclude=exclude, out=str(out), tokenizer=str(tokenizer), seq_len=self.seq_len,
                    text_field=self.text_field, heldout_fraction=self.heldout_fraction, bos_id=BOS, eos_id=EOS,
                    block_bytes=BLOCK_BYTES,
                ), show_progress=False)
            except ValueError as error:
                if _AT_WORK not in str(error):
                    raise
                tries += 1
                if tries % 60 == 5:
                    say(f"waiting for the process that builds {out}")
                time.sleep(1)

    def _tokenizer(self, directory: Path, sources: tuple[str, ...], exclude: tuple[str, ...]) -> Path:
        if self.tokenizer is not None:
            return Path(self.tokenizer)
        file = directory / TOKENIZER_FILE
        directory.mkdir(parents=True, exist_ok=True)
        with locked(directory, f"{_AT_WORK} in {directory}"):
            if not file.exists():
                documents = Documents(find_files(sources, exclude), self.text_field)
                write_whole(file, train_bpe(documents, self.vocab_size).to_str(pretty=True))
        return directory


class PreparedText:
    """Text as rows on disk.

    Raises:
      ValueError: nothing is held out, or the tokenizer is not a byte-level one.
    """

    def __init__(self, text: Text, manifest: Manifest):
        assert (manifest.directory / MANIFEST_FILE).exists()
        self.text, self.manifest = text, manifest
        self._tokenizer = load_tokenizer(manifest.directory)
        self.bytes_of_ids = _bytes_of_ids(self._tokenizer, manifest.vocab_size)
        """UTF-8 bytes that each id stands for, int64 [V]; 0 for special tokens, which no text holds."""
        if not manifest.heldout.rows:
            raise ValueError(
                f"text.heldout_fraction {text.heldout_fraction} of {manifest.train.documents} documents holds out "
                "none; raise it, or give more and shorter documents"
            )

    @property
    def vocab_size(self) -> int:
        return self.manifest.vocab_size

    def note(self) -> str:
        """What is held out, and how far it goes."""
        train, heldout = self.manifest.train, self.manifest.heldout
        rows = min(self.text.heldout_rows, heldout.rows)
        few = "" if heldout.documents >= FEW_DOCUMENTS else "; so few say little of text in general"
        return (f"Measured on {rows:,} of {heldout.rows:,} rows of {heldout.documents:,} of "
                f"{train.documents + heldout.documents:,} documents, the others to train on{few}")

    def digest(self) -> str:
        """Of every training row; the held-out ones come of the same build."""
        return self.manifest.fingerprint()

    def train_batches(self, seed: int) -> grain.DatasetIterator:
        """Endless batches in the order of a seed; `get_state` and `set_state` resume."""
        data = DataConfig(
            mixture=(MixturePart(path=str(self.manifest.directory)),), seq_len=self.text.seq_len,
            batch_size=self.text.batch_size, seed=seed, prefetch=1,
        )
        return open_corpus(data, self._tokenizer, bos_id=BOS, eos_id=EOS).train_batches()

    def heldout_batches(self) -> Iterator[Batch]:
        """The same held-out rows for every run; the last batch is filled up with padding."""
        from lfm_jax.data.shards import rows_of

        rows = rows_of(load_manifest(self.manifest.directory), "heldout")
        assert rows is not None  # Checked on construction.
        chosen = np.unique(np.linspace(0, len(rows) - 1, self.text.heldout_rows).round().astype(int)).tolist()
        return batches_of((rows[i] for i in chosen), self.text.batch_size)


def _bytes_of_ids(tokenizer: Tokenizer, vocab_size: int) -> np.ndarray:
    plain = json.loads(tokenizer.to_str())
    if "ByteLevel" not in json.dumps(plain["decoder"]):
        raise ValueError("text.tokenizer is not a byte-level BPE, so that the bytes of a token are not known; leave it "
                         "out or give another")
    sizes = np.zeros(vocab_size, np.int64)
    for token, i in tokenizer.get_vocab(with_added_tokens=False).items():
        sizes[i] = len(token)  # One character of its alphabet is one byte.
    for token in plain["added_tokens"]:
        sizes[token["id"]] = 0 if token["special"] else len(token["content"].encode())
    return sizes


class TextScore:
    """Sums over held-out rows, and what is reported of them."""

    def __init__(self, prepared: PreparedText):
        self._bytes = prepared.bytes_of_ids
        edges = [0, 1]
        while edges[-1] < prepared.text.seq_len:
            edges.append(2 * edges[-1])
        self._edges = np.array(edges)
        self._nll = self._count = np.zeros(len(edges) - 1)
        self._total_bytes = 0

    def add(self, batch: Batch, tag: None, nll_BT: np.ndarray, hit_BT: np.ndarray) -> None:
        """Counts a batch with the negative log-likelihood of each target in nats."""
        del tag, hit_BT
        kept_BT = batch["targets"] >= 0
        bins = np.searchsorted(self._edges, batch["positions"][kept_BT], side="right") - 1
        nll = nll_BT[kept_BT].astype(np.float64)
        self._nll = self._nll + np.bincount(bins, nll, len(self._nll))
        self._count = self._count + np.bincount(bins, minlength=len(self._count))
        self._total_bytes += int(self._bytes[batch["targets"][kept_BT]].sum())

    def result(self) -> dict[str, Any]:
        """score (bits per byte), metrics, and the loss in nats a token by tokens of context (upper ends of bins)."""
        nats, tokens = float(self._nll.sum()), float(self._count.sum())
        bits = nats / math.log(2)
        bins = zip(self._edges[1:], self._nll, self._count, strict=True)
        curve = [[int(edge), nll / n] for edge, nll, n in bins if n]
        return {
            "score": bits / self._total_bytes,
            "metrics": {"nats_per_token": nats / tokens, "tokens": tokens, "bytes": self._total_bytes},
            "curves": {"position": curve},
        }
