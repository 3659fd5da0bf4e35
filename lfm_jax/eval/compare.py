"""`lfm eval compare`: differences of two evaluations, with intervals from a paired bootstrap.

Both models answered the same documents, so documents are drawn in pairs: what makes one hard makes it hard for both,
and the interval of the difference is much narrower than those of the scores. Documents that belong together, as those
of one chat, are drawn together (`shares`).

Dimensions: M documents of a task, or clusters of them.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lfm_jax.eval.report import metrics
from lfm_jax.eval.shares import cluster_sums
from lfm_jax.problems import raise_problems

RESAMPLES = 10_000
LEVEL = 0.95
CANNOT_TELL = "nothing can be told apart"
_AT_ONCE = 4_000_000
"""Documents drawn at a time."""

OF_MEANS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "perplexity": lambda mean: np.exp(-mean),
    "word_perplexity": lambda mean: np.exp(-mean),
    "byte_perplexity": lambda mean: np.exp(-mean),
    "bits_per_byte": lambda mean: -mean / math.log(2),
}
"""What lm-eval makes of the mean of some metrics; of the others, the mean itself."""


@dataclasses.dataclass(frozen=True)
class Difference:
    """Of a metric of a task, the second evaluation minus the first."""

    task: str
    metric: str
    filter: str
    n: int
    first: float
    second: float
    low: float | None
    """Ends of the 95 % interval of second - first; None: the metric is not a mean over documents, or over one
    (or one cluster) alone."""
    high: float | None
    higher_is_better: bool | None

    @property
    def verdict(self) -> str:
        """What may be said of the second."""
        if self.low is None or self.high is None:
            return "not a mean over several documents: no interval"
        if self.low <= 0 <= self.high:
            return CANNOT_TELL
        higher = self.low > 0
        if self.higher_is_better is None:
            return "higher" if higher else "lower"
        return "better" if higher == self.higher_is_better else "worse"


def compare(first: Path, second: Path) -> list[Difference]:
    """Compares the directories of two evaluations, by task and metric.

    Raises:
      ValueError: a directory is not one of `lfm eval`, nothing was scored, they have no task in common, or a task has
        other documents in one than in the other.
    """
    one, other = _read(first), _read(second)
    scores = {(m.task, m.name, m.filter): m.score for m in metrics(other)}
    found, problems = [], []
    tasks: dict[str, tuple[_Samples, _Samples]] = {}
    for metric in metrics(one):
        key = metric.task, metric.name, metric.filter
        if key not in scores or metric.task in one.get("groups", {}):
            continue
        if metric.task not in tasks:
            tasks[metric.task] = _samples(first, metric.task), _samples(second, metric.task)
            problems += _unlike(metric.task, *(each.documents for each in tasks[metric.task]))
        if problems:
            continue
        values = [each.of(metric.name, metric.filter) for each in tasks[metric.task]]
        better = one.get("higher_is_better", {}).get(metric.task, {}).get(metric.name)
        found.append(_difference(key, (metric.score, scores[key]), values, better))
    raise_problems(f"{first} and {second} cannot be compared", problems)
    if not found:
        raise ValueError(f"{first} and {second} have no scored task in common")
    return found


def table(differences: Sequence[Difference]) -> str:
    """Returns a Markdown table of differences."""
    lines = ["| task | filter | metric | n | A | B | B - A | 95 % interval | B |",
             "|---|---|---|---|---|---|---|---|---|"]
    for d in differences:
        interval = "" if d.low is None or d.high is None else f"{d.low:+.4f} to {d.high:+.4f}"
        lines.append(f"| {d.task} | {d.filter} | {d.metric} | {d.n} | {d.first:.4f} | {d.second:.4f} | "
                     f"{d.second - d.first:+.4f} | {interval} | {d.verdict} |")
    return "\n".join(lines)


class _Samples:
    """The samples of a task."""

    def __init__(self, rows: Sequence[Mapping[str, Any]]):
        self._rows = sorted(rows, key=lambda row: row["doc_id"])
        self.documents = {row["doc_id"]: (row["doc_hash"], row["target_hash"]) for row in self._rows}

    def of(self, metric: str, of: str) -> list[Any]:
        """The values of a metric, by document."""
        return [row.get(metric) for row in self._rows if row["filter"] == of]


def _read(directory: Path) -> dict[str, Any]:
    path = directory / "results.json"
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        predicted = results["lfm_jax"]["predict_only"]
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); give the output of lfm eval") from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is not of lfm eval") from None
    if predicted:
        raise ValueError(f"{directory} has answers only (--predict-only); evaluate it again without, which asks the "
                         "model nothing twice")
    return results


def _samples(directory: Path, task: str) -> _Samples:
    path = directory / f"samples_{task}.jsonl"
    try:
        with path.open(encoding="utf-8") as file:
            return _Samples([json.loads(line) for line in file])
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def _unlike(task: str, one: Mapping[int, Any], other: Mapping[int, Any]) -> list[str]:
    if one == other:
        return []
    if one.keys() != other.keys():
        return [f"{task} has {len(one)} documents in the first and {len(other)} in the second; evaluate both with one "
                "--limit"]
    return [f"{task} has other documents in the first than in the second"]


def _difference(
    key: tuple[str, str, str], scores: tuple[float, float], values: Sequence[list[Any]], better: bool | None
) -> Difference:
    sums = [_sums(each) for each in values]
    of_mean = OF_MEANS.get(key[1], lambda mean: mean)
    low = high = None
    if all(each is not None for each in sums):
        one_2M, other_2M = sums
        # A score that is something else than this of its samples has no interval of this kind.
        if all(math.isclose(float(of_mean(x.sum(axis=1)[0] / x.sum(axis=1)[1])), score, rel_tol=1e-6, abs_tol=1e-9)
               for x, score in zip((one_2M, other_2M), scores, strict=True)):
            kept_M = one_2M[1] + other_2M[1] != 0
            if kept_M.sum() > 1:  # Of one nothing is known of how others would differ.
                low, high = _interval(one_2M[:, kept_M], other_2M[:, kept_M], of_mean)
    return Difference(*key, n=len(values[0]), first=scores[0], second=scores[1], low=low, high=high,
                      higher_is_better=better)


def _sums(values: list[Any]) -> Any:
    """What a mean is made of, [2, M]: (value, weight) of each document or cluster; None: the values are something
    else."""
    pairs = [value if isinstance(value, list) else [value, 1] for value in values]
    if not pairs or not all(len(pair) in (2, 3) and all(isinstance(x, (int, float)) for x in pair) for pair in pairs):
        return None
    return cluster_sums(pairs)


def _interval(
    one_2M: np.ndarray, other_2M: np.ndarray, of_mean: Callable[[np.ndarray], np.ndarray]
) -> tuple[float, float]:
    """Ends of the percentile interval of the difference over documents drawn anew."""
    draw, M = np.random.default_rng(0), one_2M.shape[1]
    drawn: list[np.ndarray] = []
    size = max(1, min(RESAMPLES, _AT_ONCE // M))
    for start in range(0, RESAMPLES, size):
        index = draw.integers(0, M, (min(size, RESAMPLES - start), M))
        of_one, of_other = (of_mean(x[0][index].sum(axis=1) / x[1][index].sum(axis=1)) for x in (one_2M, other_2M))
        drawn.append(of_other - of_one)
    low, high = np.quantile(np.concatenate(drawn), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
