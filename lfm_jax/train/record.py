"""What is kept of each step: records for metrics.jsonl and the trackers, lines for the console."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lfm_jax import recipe
from lfm_jax.train.budget import training_flops_per_token
from lfm_jax.train.config import RunConfig
from lfm_jax.train.console import Console
from lfm_jax.train.goodput import Ledger
from lfm_jax.train.metrics import mfu
from lfm_jax.train.optimizer import learning_rate
from lfm_jax.train.trackers import Trackers, open_trackers


class Recorder:
    """Writes records and lines in the process that does so, and nothing in the others.

    Args:
      resume_step: records of later steps are dropped.
      updates: optimizer updates made so far; those that were skipped do not count for the learning rate.
      main: whether this process writes.
    """

    def __init__(
        self, config: RunConfig, run_dir: Path, console: Console, ledger: Ledger, *, resume_step: int, updates: int,
        main: bool,
    ):
        self._run_dir, self._console, self._ledger = run_dir, console, ledger
        self._schedule = learning_rate(config.optimizer, config.steps)
        self._updates = updates
        self._flops_per_token = training_flops_per_token(config.training(), config.seq_len)
        self._trackers: Trackers | None = None
        if main:
            self._trackers = open_trackers(config.trackers, run_dir, recipe.to_plain(config), resume_step)

    def step(self, step: int, metrics: Mapping[str, jax.Array], ended: Future[float]) -> dict[str, float]:
        """Records a finished step; waits for its numbers and returns them. `ended` is that of `Ledger.running`."""
        values = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
        lr = np.asarray(self._schedule(self._updates)).item()
        self._updates += not values["skipped"]
        if values["skipped"]:
            self._console.warn(
                f"step {step}: the update was skipped, {values['skipped_in_row']:.0f} in a row: loss "
                f"{values['loss']:.4g}, gradient norm {values['grad_norm']:.4g}"
            )
        speed = self._console.step(step, values["loss"], int(values["tokens"]), ended.result())
        self.write(step, values | {
            "learning_rate": lr, "tokens_per_second": speed,
            "mfu": mfu(self._flops_per_token, speed, jax.devices()),
            "data_seconds": self._ledger.take("data"),
        })
        return values

    def write(self, step: int, record: Mapping[str, Any]) -> None:
        """Keeps a record of a step.

        Raises:
          OSError: metrics.jsonl or a tracker cannot be written.
        """
        if self._trackers is None:
            return
        try:
            self._trackers.log(step, {**record, "time": time.time()})
        except OSError as error:
            raise OSError(
                f"the records of step {step} cannot be written to {self._run_dir}: {error}; make room, then start the "
                "same command again"
            ) from error

    def rewind(self, step: int, updates: int) -> None:
        """Drops the records behind `step`, to which the run goes back."""
        self._updates = updates
        if self._trackers is not None:
            self._trackers.rewind(step)

    def close(self) -> None:
        if self._trackers is not None:
            self._trackers.close()

