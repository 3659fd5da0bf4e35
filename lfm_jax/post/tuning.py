"""What all ways to tune share: the model that they begin with, and what a run directory holds of it."""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from tokenizers import Tokenizer

from lfm_jax import init_from
from lfm_jax.convert import sidecars
from lfm_jax.data.corpora.packed import Beside, PackedCorpus
from lfm_jax.files import say
from lfm_jax.post.alike import alike
from lfm_jax.post.stored import Field, Speaker, stored
from lfm_jax.text.codec import check_tokenizer
from lfm_jax.text.tokenizer import TOKENIZER_FILE, load_tokenizer
from lfm_jax.train import processes
from lfm_jax.train.checkpoint import has_checkpoint
from lfm_jax.train.driver import Data, Experience
from lfm_jax.train.rounding import rounded_weights

if TYPE_CHECKING:
    from lfm_jax.post.config import TuneConfig

SIDES = ("train", "heldout")
"""Directories of what is kept of the rows that are learnt from, and of those that are held out."""
LOOKED_AT = 256
"""Rows in which marks are looked for."""


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

    def as_begun(self) -> Any:
        """`weights` as the first step computes with them."""
        model, weights = self._config.model.replace(scan_layers=False), self.weights()
        if not model.quantize:
            return weights
        return jax.tree.map(np.asarray, jax.jit(lambda w: rounded_weights(model, w))(weights))

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
        return {}

    def check_lasts(self, steps: int) -> None:
        del steps  # Rows are read again and again.

    @abc.abstractmethod
    def train_data(self, rows: np.ndarray | None) -> Data | Experience: ...

    @abc.abstractmethod
    def heldout(self) -> Iterable[Mapping[str, np.ndarray]]: ...

    @abc.abstractmethod
    def measured(
        self, sums: Mapping[str, float], weight: float, *, all_batches: bool
    ) -> tuple[dict[str, float], str]: ...


class CorpusTuning(Tuning):
    """A `Tuning` on rows that are there before the run begins."""

    def __init__(self, config: TuneConfig):
        super().__init__(config)
        self._beside: list[Beside | None] = [None, None]
        self._corpus = self.open_corpus()

    @abc.abstractmethod
    def open_corpus(self) -> PackedCorpus[Any]:
        """Reads and checks what is learnt from."""

    def steps(self) -> int:
        """Optimizer steps of the config's epochs."""
        return self._corpus.steps(self._config.epochs)

    def __str__(self) -> str:
        """What is learnt from, in one line."""
        return str(self._corpus)

    def keep(
        self, directory: Path, fields: Mapping[str, Field], about: Mapping[str, Any], speaker: Callable[[], Speaker], *,
        resuming: bool,
    ) -> None:
        """Puts what a frozen model says of each row beside the row, in all batches to come.

        Args:
          directory: where it is kept, and made if it is not there; see `stored.stored`.
        """
        config, once = self._config, functools.cache(speaker)
        sides = zip(SIDES, (self._corpus.train_rows, self._corpus.heldout_rows), strict=True)
        self._beside = [
            stored(directory / side, rows, fields, B=config.rows, T=config.seq_len, about=about, speaker=once,
                   resuming=resuming).beside
            for side, rows in sides
        ]

    def weights(self) -> Any:
        weights = super().weights()
        if self._config.lora.rank:
            self._report_alike(weights["embed" if self._config.model.tie_embedding else "head"])
        return weights

    def _report_alike(self, table_VD: Any) -> None:
        """Reports marks of chats that an adapter cannot learn to write, as far as the first rows show."""
        rows = self._corpus.train_rows
        learnt = {int(id) for i in range(min(len(rows), LOOKED_AT)) for id in np.unique(rows[i]["targets"])}
        for token, others in alike(np.asarray(table_VD), learnt, self.tokenizer):
            say(f"the model cannot tell {token} from {' '.join(others)}: their rows of the output matrix are the same, "
                "as of tokens that it was never trained on, and an adapter leaves them so. Use marks that it knows, or "
                "train all weights")

    def train_data(self, rows: np.ndarray | None) -> Data:
        return self._corpus.train_batches(rows, self._beside[0])

    def heldout(self) -> Iterable[Mapping[str, np.ndarray]]:
        return self._corpus.heldout_batches(self._beside[1])
