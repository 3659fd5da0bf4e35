"""`lfm train`: next-token prediction on text or built datasets, through the runner of `train/`.

A run directory also holds the tokenizer, and what else of `init_from` chat and export look for.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from lfm_jax import init_from
from lfm_jax.data.corpora import make_tokenizer, open_corpus
from lfm_jax.data.corpora.corpus import check_lasts
from lfm_jax.files import write_whole
from lfm_jax.pretrain.config import TrainConfig
from lfm_jax.text.codec import check_tokenizer
from lfm_jax.text.tokenizer import TOKENIZER_FILE, load_tokenizer
from lfm_jax.train import processes
from lfm_jax.train.driver import Data
from lfm_jax.train.runner import run_training


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How a run ended: `step` < `steps` when it was interrupted."""

    run_dir: Path
    step: int
    steps: int
    """Steps of the whole run: those of the config, or as many as `train_minutes` allowed."""
    heldout_loss: float | None
    """Nats per held-out token; None when the run was interrupted or nothing is held out."""
    heldout_bits_per_byte: float | None
    """None also with `eval_batches`."""


def train(config: TrainConfig) -> TrainResult:
    """Runs or resumes a pre-training run to its end, or to an interrupt; see `runner.run_training`."""
    ended = run_training(config, Pretraining(config))
    measured = ended.measured
    return TrainResult(
        ended.run_dir, ended.step, ended.steps, measured.get("heldout_loss"), measured.get("heldout_bits_per_byte")
    )


class Pretraining:
    """What pre-training brings to a run (`runner.Method`)."""

    def __init__(self, config: TrainConfig):
        self._config = config

    def prepare(self, run_dir: Path, *, resuming: bool) -> None:
        config = self._config
        if resuming:
            tokenizer = _kept_tokenizer(config, run_dir)
        else:
            made = _new_tokenizer(config, run_dir) if processes.is_main() else None
            processes.barrier("tokenizer")
            tokenizer = made or load_tokenizer(run_dir)
        check_tokenizer(tokenizer, config.model)
        model = config.model
        self._corpus = open_corpus(config.data, tokenizer, bos_id=model.bos_id, eos_id=model.eos_ids[0])

    def weights(self) -> Any | None:
        name = self._config.init_from
        return None if name is None else init_from.weights(name, self._config.model)

    def others(self) -> Mapping[str, Any]:
        return {}

    def train_data(self, rows: np.ndarray | None) -> Data:
        return self._corpus.train_batches(rows)

    def check_lasts(self, steps: int) -> None:
        check_lasts(self._corpus, steps)

    def heldout(self) -> Iterable[Mapping[str, np.ndarray]]:
        return self._corpus.heldout_batches()

    def measured(self, sums: Mapping[str, float], weight: float, *, all_batches: bool) -> tuple[dict[str, float], str]:
        """Held-out loss in nats per token and, of all batches, in bits per byte of text."""
        nats = sums["loss"]
        record = {"heldout_loss": nats / weight}
        text = f"held-out loss {nats / weight:.4f} nats/token"
        if all_batches:
            record["heldout_bits_per_byte"] = nats / math.log(2) / self._corpus.heldout_bytes
            text += f", {record['heldout_bits_per_byte']:.4f} bits/byte"
        return record, text


def _new_tokenizer(config: TrainConfig, run_dir: Path) -> Tokenizer:
    """The tokenizer of a new run, kept in its directory.

    It is `data.tokenizer`, else the one of `init_from`, whose ids its weights mean, else one trained on the
    training files. A chat template and the like of `init_from` come along, so that chat and export find them.

    Raises:
      ValueError: a tokenizer or source file that cannot be read, or an `init_from` without a tokenizer.
    """
    if config.init_from is not None:
        with init_from.sidecar_files(config.init_from) as origin:
            if config.data.tokenizer is None and not (origin / TOKENIZER_FILE).exists():
                raise ValueError(
                    f"init_from {config.init_from} has no {TOKENIZER_FILE}; name its tokenizer in data.tokenizer"
                )
            init_from.carry_sidecars(origin, run_dir)
    if config.data.tokenizer is None and config.init_from is not None:
        return load_tokenizer(run_dir)
    tokenizer = make_tokenizer(config.data, vocab_size=config.model.vocab_size)
    write_whole(run_dir / TOKENIZER_FILE, tokenizer.to_str(pretty=True))
    return tokenizer


def _kept_tokenizer(config: TrainConfig, run_dir: Path) -> Tokenizer:
    """The tokenizer that a run began with.

    Raises:
      ValueError: `data.tokenizer` names another one.
    """
    kept = load_tokenizer(run_dir)
    if config.data.tokenizer is not None and load_tokenizer(config.data.tokenizer).to_str() != kept.to_str():
        raise ValueError(
            f"data.tokenizer {config.data.tokenizer} is not the tokenizer that run_dir {run_dir} began with; "
            "restore it, or choose a new run_dir"
        )
    return kept
