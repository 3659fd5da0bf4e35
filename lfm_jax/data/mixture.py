"""Batches of a mixture of built datasets: the manifests checked against the config, then rows through Grain.

Dimensions: B rows of a batch, T time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer

from lfm_jax.data.config import DataConfig
from lfm_jax.data.encoding import tokenizer_digest
from lfm_jax.data.manifest import Manifest, load_manifest
from lfm_jax.data.sources import raise_problems
from lfm_jax.text.tokenizer import load_tokenizer

if TYPE_CHECKING:
    import grain


def load_manifests(config: DataConfig) -> list[Manifest]:
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


def mixture_tokenizer(config: DataConfig) -> Tokenizer:
    """The tokenizer that the datasets were built with.

    Raises:
      ValueError: see `load_manifests`, or `config.tokenizer` is another one.
    """
    manifests = load_manifests(config)
    tokenizer = load_tokenizer(config.tokenizer or manifests[0].directory)
    _check_tokenizer(manifests, tokenizer)
    return tokenizer


def mixture_rows(config: DataConfig) -> int | None:
    """How many training rows the epoch limits of a mixture allow with its weights kept; None: endless."""
    from lfm_jax.data.shards import mix, num_rows

    return num_rows(mix(_parts(config, load_manifests(config)), config.seed))


def mixture_iterator(
    config: DataConfig, tokenizer: Tokenizer, rows: np.ndarray | None, *, bos_id: int, eos_id: int
) -> grain.DatasetIterator:
    """`pipeline.train_iterator` for a mixture."""
    from lfm_jax.data.guarded import GuardedIterator
    from lfm_jax.data.shards import batches, fingerprint, mix

    manifests = load_manifests(config)
    check_made_for(manifests, tokenizer, bos_id=bos_id, eos_id=eos_id)
    parts = _parts(config, manifests)
    mixed = mix(parts, config.seed)
    return GuardedIterator(batches(mixed, config.batch_size, rows, config.prefetch), fingerprint(parts, config.seed))


def check_made_for(manifests: list[Manifest], tokenizer: Tokenizer, *, bos_id: int, eos_id: int) -> None:
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
    digest = tokenizer_digest(tokenizer)
    raise_problems("mixture cannot be used", [
        f"{manifest.directory} was built with another tokenizer than that of the run (data.tokenizer or init_from); "
        f"name {manifest.directory} in data.tokenizer, or build it again with the run's"
        for manifest in manifests if manifest.tokenizer != digest
    ])


def _parts(config: DataConfig, manifests: list[Manifest]) -> list:
    from lfm_jax.data.shards import Part

    return [Part(manifest, part.weight, part.epochs) for manifest, part in zip(manifests, config.mixture, strict=True)]
