"""Built datasets, mixed: their manifests checked against the config, then rows through Grain (`shards.py`).

Dimensions: B rows of a batch, T time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer

from lfm_jax.data.batch import Batch, batches_of
from lfm_jax.data.config import DataConfig
from lfm_jax.data.corpora.corpus import check_rows
from lfm_jax.data.encoding import tokenizer_digest
from lfm_jax.data.manifest import Manifest, load_manifest
from lfm_jax.problems import raise_problems
from lfm_jax.text.tokenizer import load_tokenizer, without_limits

if TYPE_CHECKING:
    import grain

    from lfm_jax.data.shards import Part


def _load_manifests(config: DataConfig) -> list[Manifest]:
    """The manifests of a mixture.

    Raises:
      ValueError: one message that lists every dataset that is not there, damaged, or of another seq_len or tokenizer.
    """
    manifests: list[Manifest] = []
    problems: list[str] = []
    for part in config.mixture:
        try:
            manifest = load_manifest(part.path)
            manifest.check_files()
        except ValueError as error:
            problems.append(str(error))
            continue
        manifests.append(manifest)
        if manifest.seq_len != config.seq_len:
            problems.append(
                f"{part.path} was built with seq_len {manifest.seq_len}, and seq_len is {config.seq_len}: "
                "make them equal, or build it again with another out"
            )
        if manifest.tokenizer != manifests[0].tokenizer:
            problems.append(f"{part.path} was built with another tokenizer than {manifests[0].directory}")
    raise_problems("mixture cannot be used", problems)
    return manifests


class BuiltCorpus:
    """The datasets of `config.mixture`, as `lfm data build` made them; a `Corpus`.

    Raises:
      ValueError: on construction: a dataset that cannot be used, or that was built with another tokenizer or other ids.
    """

    def __init__(self, config: DataConfig, tokenizer: Tokenizer, *, bos_id: int, eos_id: int):
        self._config, self._manifests = config, _load_manifests(config)
        _check_made_for(self._manifests, tokenizer, bos_id=bos_id, eos_id=eos_id)

    @staticmethod
    def make_tokenizer(config: DataConfig, vocab_size: int) -> Tokenizer:
        """The one that the datasets were built with, whatever `vocab_size` says.

        Raises:
          ValueError: a dataset that cannot be used, or `config.tokenizer` is another one.
        """
        manifests = _load_manifests(config)
        tokenizer = load_tokenizer(config.tokenizer or manifests[0].directory)
        _check_tokenizer(manifests, tokenizer)
        return tokenizer

    @property
    def batch_size(self) -> int:
        return self._config.batch_size

    @property
    def rows_available(self) -> int | None:
        """With the weights kept; None: endless."""
        from lfm_jax.data.shards import mix, num_rows

        return num_rows(mix(self._parts(), self._config.seed))

    @property
    def heldout_bytes(self) -> int:
        return sum(manifest.heldout.text_bytes for manifest in self._manifests)

    def train_batches(self, rows: np.ndarray | None = None) -> grain.DatasetIterator:
        config = self._config
        check_rows(rows, config.batch_size)
        from lfm_jax.data.guarded import GuardedIterator
        from lfm_jax.data.shards import batches, fingerprint, mix

        parts = self._parts()
        found = batches(mix(parts, config.seed), config.batch_size, rows, config.prefetch)
        return GuardedIterator(found, fingerprint(parts, config.seed))

    def heldout_batches(self) -> Iterator[Batch]:
        from lfm_jax.data.shards import heldout_rows

        return batches_of(heldout_rows(self._manifests), self._config.batch_size)

    def _parts(self) -> list[Part]:
        from lfm_jax.data.shards import Part

        return [Part(manifest, part.weight, part.epochs)
                for manifest, part in zip(self._manifests, self._config.mixture, strict=True)]


def _check_made_for(manifests: list[Manifest], tokenizer: Tokenizer, *, bos_id: int, eos_id: int) -> None:
    """Checks that datasets hold ids of this tokenizer, and documents that begin and end as the model expects.

    Raises:
      ValueError: they do not.
    """
    _check_tokenizer(manifests, tokenizer)
    raise_problems("mixture cannot be used", [
        f"{manifest.directory} was built with bos_id {manifest.bos_id} and eos_id {manifest.eos_id}, but the model has "
        f"bos_id {bos_id} and eos_id {eos_id}; build it again with these"
        for manifest in manifests if (manifest.bos_id, manifest.eos_id) != (bos_id, eos_id)
    ])


def _check_tokenizer(manifests: list[Manifest], tokenizer: Tokenizer) -> None:
    raise_problems("mixture cannot be used", [
        f"{manifest.directory} was built with another tokenizer than that of the run (data.tokenizer or init_from); "
        f"name {manifest.directory} in data.tokenizer, or build it again with the run's"
        for manifest in manifests if not _is_of(manifest, tokenizer)
    ])


def _is_of(manifest: Manifest, tokenizer: Tokenizer) -> bool:
    """Whether a dataset was built with a tokenizer, whatever it is set to cut or pad: documents are encoded whole."""
    if manifest.tokenizer == tokenizer_digest(tokenizer):
        return True
    kept = load_tokenizer(manifest.directory)
    return manifest.tokenizer == tokenizer_digest(kept) and (
        without_limits(kept).to_str() == without_limits(tokenizer).to_str()
    )
