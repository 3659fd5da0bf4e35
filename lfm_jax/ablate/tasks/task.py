"""What a run needs of a task, whichever it is.

Dimensions: B rows, T time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from lfm_jax.ablate.tasks.synthetic import SyntheticTask, Variant, heldout_batches, train_batches
from lfm_jax.ablate.tasks.text import PreparedText, Text, TextScore
from lfm_jax.data.batch import Batch


@dataclasses.dataclass(frozen=True)
class About:
    """What a reader of results must know of a task."""

    title: str
    score: str
    """What the score is."""
    better: Literal["lower", "higher"]
    chance: float | None
    """Score of a guess that knows the possible answers only."""
    curves: dict[str, dict[str, Any]]
    """By name: `x` and `y` say what is drawn, `log_x` how."""
    note: str = ""
    """What else a reader must know of the data."""


class Score(Protocol):
    """Collects held-out batches, then says what they come to."""

    def add(self, batch: Batch, tag: Any, nll_BT: np.ndarray, hit_BT: np.ndarray) -> None:
        """Counts a batch: negative log-likelihood of each target in nats, and whether the likeliest token is it."""
        ...

    def result(self) -> dict[str, Any]:
        """`score`, `metrics` (numbers by name) and `curves` ([[x, y], ...] by name)."""
        ...


class Task(Protocol):
    """Data to train on and to be measured on."""

    about: About
    vocab_size: int
    seq_len: int
    batch_size: int
    steps: int

    def digest(self) -> str:
        """Of everything that decides what is trained on and measured, but for steps and learning rates."""
        ...

    def train_batches(self, seed: int) -> Any:
        """An endless iterator of batches with `get_state` and `set_state`; the order belongs to the seed."""
        ...

    def heldout_batches(self) -> Iterator[tuple[Batch, Any]]:
        """(batch, tag for the score), the same for every run."""
        ...

    def score(self) -> Score: ...


def open_task(settings: Any, directory: Path) -> Task:
    """The task of some settings; what it must build once lies in `directory`.

    Raises:
      ValueError: text that cannot be read.
    """
    return _TextTask(settings, directory) if isinstance(settings, Text) else _Synthetic(settings)


class _TextTask:
    def __init__(self, text: Text, directory: Path):
        self._prepared = PreparedText(text, text.prepare(directory))
        self.about = About(
            title="Language modelling", score="held-out bits per byte", better="lower", chance=None,
            curves={"position": dict(x="tokens of context, up to", y="loss (nats per token)", log_x=True)},
            note=self._prepared.note(),
        )
        self._heldout_rows = text.heldout_rows
        self.vocab_size = self._prepared.vocab_size
        self.seq_len, self.batch_size, self.steps = text.seq_len, text.batch_size, text.steps

    def digest(self) -> str:
        return f"{self._prepared.digest()} {self.batch_size} {self._heldout_rows}"

    def train_batches(self, seed: int) -> Any:
        return self._prepared.train_batches(seed)

    def heldout_batches(self) -> Iterator[tuple[Batch, None]]:
        return ((batch, None) for batch in self._prepared.heldout_batches())

    def score(self) -> Score:
        return TextScore(self._prepared)


class _Synthetic:
    def __init__(self, settings: SyntheticTask):
        self._settings = settings
        self.vocab_size, self.seq_len = settings.vocab_size, settings.seq_len
        self.batch_size, self.steps = settings.batch_size, settings.steps
        curves = dict.fromkeys(variant.curve for variant in settings.variants())
        self.about = About(
            title=settings.title, score="accuracy", better="higher", chance=settings.chance,
            curves={name: dict(x=settings.curve_axes[name], y="accuracy", log_x=name != "depth") for name in curves},
        )

    def digest(self) -> str:
        fields = dataclasses.asdict(self._settings)
        plain = {key: value for key, value in fields.items() if key not in ("steps", "peak_lrs")}
        text = type(self._settings).__name__ + json.dumps(plain, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def train_batches(self, seed: int) -> Any:
        return train_batches(self._settings, seed)

    def heldout_batches(self) -> Iterator[tuple[Batch, Variant]]:
        return ((batch, variant) for variant, batch in heldout_batches(self._settings))

    def score(self) -> Score:
        return _Accuracy()


class _Accuracy:
    """Accuracy over answers by variant; the score is the mean over the variants that count."""

    def __init__(self) -> None:
        self._hits: dict[Variant, int] = {}
        self._answers: dict[Variant, int] = {}
        self._nll = 0.0

    def add(self, batch: Batch, tag: Variant, nll_BT: np.ndarray, hit_BT: np.ndarray) -> None:
        asked_BT = batch["targets"] >= 0
        self._hits[tag] = self._hits.get(tag, 0) + int(hit_BT[asked_BT].sum())
        self._answers[tag] = self._answers.get(tag, 0) + int(asked_BT.sum())
        if tag.scored:
            self._nll += float(nll_BT[asked_BT].astype(np.float64).sum())

    def result(self) -> dict[str, Any]:
        accuracy = {variant: hits / self._answers[variant] for variant, hits in self._hits.items()}
        scored = [variant for variant in accuracy if variant.scored]
        curves: dict[str, list[list[float]]] = {}
        for variant, value in accuracy.items():
            curves.setdefault(variant.curve, []).append([variant.x, value])
        answers = sum(self._answers[variant] for variant in scored)
        return {
            "score": sum(accuracy[variant] for variant in scored) / len(scored),
            "metrics": {"nats_per_answer": self._nll / answers, "answers": answers},
            "curves": {name: sorted(points) for name, points in curves.items()},
        }
