"""What all ways to tune share: the model that they begin with, and what a run directory holds of it."""

from __future__ import annotations

import abc
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

from lfm_jax import init_from
from lfm_jax.convert import sidecars
from lfm_jax.text.codec import check_tokenizer
from lfm_jax.text.tokenizer import TOKENIZER_FILE, load_tokenizer
from lfm_jax.train import processes
from lfm_jax.train.checkpoint import has_checkpoint
from lfm_jax.train.driver import Data, Experience

if TYPE_CHECKING:
    from lfm_jax.post.config import TuneConfig


class Tuning(abc.ABC):
    """A `runner.Method` that begins with the weights of `init_from` and speaks through its tokenizer and template.

    A run that has a checkpoint goes on with the files in its own directory, wherever `init_from` is by then. Its
    directory is a model that `lfm.load` takes: the latest checkpoint beside these files.

    Raises:
      ValueError: on construction: there is no such model, or it has no tokenizer.
    """

    def __init__(self, config: TuneConfig):
        self._config = config
        run_dir = Path(config.run_dir)
        kept = has_checkpoint(run_dir) and (run_dir / TOKENIZER_FILE).exists()
        with init_from.sidecar_files(config.run_dir if kept else config.init_from) as directory:
            if not (directory / TOKENIZER_FILE).exists():
                raise ValueError(f"init_from {config.init_from} has no {TOKENIZER_FILE}; put its model's there")
            self.tokenizer: Tokenizer = load_tokenizer(directory)
            self.template = sidecars.chat_template(directory)
        check_tokenizer(self.tokenizer, config.model)

    @abc.abstractmethod
    def steps(self) -> int:
        """Optimizer steps of the config's epochs."""

    @abc.abstractmethod
    def __str__(self) -> str:
        """What is learnt from, in one line."""

    # ------------------------------------------------------------ runner.Method

    def prepare(self, run_dir: Path, *, resuming: bool) -> None:
        if not resuming:
            if processes.is_main():
                with init_from.sidecar_files(self._config.init_from) as directory:
                    init_from.carry_sidecars(directory, run_dir)
            processes.barrier("sidecars")

    def weights(self) -> Any:
        return init_from.weights(self._config.init_from, self._config.model)

    def others(self) -> Mapping[str, Any]:
        return {name: init_from.weights(self._config.init_from, model)
                for name, model in self._config.other_models().items()}

    @abc.abstractmethod
    def check_lasts(self, steps: int) -> None: ...

    @abc.abstractmethod
    def train_data(self, rows: np.ndarray | None) -> Data | Experience: ...

    @abc.abstractmethod
    def heldout(self) -> Iterable[Mapping[str, np.ndarray]]: ...

    @abc.abstractmethod
    def measured(
        self, sums: Mapping[str, float], weight: float, *, all_batches: bool
    ) -> tuple[dict[str, float], str]: ...
