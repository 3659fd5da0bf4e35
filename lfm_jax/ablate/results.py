"""What a study has found: one small file a run, and results.jsonl made of them.

```
study.yaml                    the study as it was resolved
runs/TASK/POINT/seed-0.json   a run; tune-0.003.json one that chose a learning rate
costs/POINT.json
results.jsonl                 all of it in the order of the study: what the report is made from
```
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from lfm_jax.files import write_whole

RESULTS = "results.jsonl"

Record = dict[str, Any]


def slug(name: str) -> str:
    """A name (of a point, a task, a curve) as a file name."""
    return re.sub(r"[^A-Za-z0-9=.+-]+", "_", name)


def run_file(out: Path, task: str, point: str, seed: int) -> Path:
    return out / "runs" / task / slug(point) / f"seed-{seed}.json"


def tuning_file(out: Path, task: str, point: str, peak_lr: float) -> Path:
    return out / "runs" / task / slug(point) / f"tune-{peak_lr:g}.json"


def cost_file(out: Path, point: str) -> Path:
    return out / "costs" / f"{slug(point)}.json"


def digest(*parts: Any) -> str:
    """A fingerprint of plain values."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=12).hexdigest()


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Writes a record whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(record, allow_nan=False) + "\n")


def read_record(path: Path, *expected: str) -> dict[str, Any] | None:
    """A record; None where there is none.

    Args:
      expected: fingerprints of what the record may belong to; none for anything.

    Raises:
      ValueError: it belongs to something else, or cannot be read.
    """
    try:
        record = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        raise ValueError(f"{path} is not whole; delete it, and its run is made again") from None
    if expected and record["digest"] not in expected:
        raise ValueError(
            f"{path} holds a run of another study: its model, data, steps or learning rate differ from what the study "
            "now says; restore the study, choose another out, or delete the file to make that run again"
        )
    return record


def write_results(out: Path, records: Iterable[dict[str, Any]]) -> Path:
    """Writes results.jsonl; fingerprints are left out."""
    lines = [json.dumps({key: value for key, value in record.items() if key != "digest"}) for record in records]
    write_whole(out / RESULTS, "\n".join(lines) + "\n")
    return out / RESULTS


# ---------------------------------------------------------------- read again, for the report


@dataclasses.dataclass(frozen=True)
class Results:
    """The records of results.jsonl, the same whatever their order there."""

    study: Record
    tasks: dict[str, Record]
    points: dict[tuple[str, str], Record]
    """By (task, point)."""
    runs: dict[tuple[str, str, int], Record]
    """Finished ones, by (task, point, seed)."""
    failures: tuple[Record, ...]
    """Failed runs and failed tuning runs; those that finished when repeated are among them."""
    tuning: tuple[Record, ...]
    costs: dict[str, Record]
    """By point."""

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Points, in the order of display."""
        planned = self.study.get("points", [])
        seen = {point for _, point in self.points} | {point for _, point, _ in self.runs} | set(self.costs)
        seen |= {record["point"] for record in (*self.failures, *self.tuning)}
        return (*planned, *sorted(seen - set(planned)))

    @property
    def base(self) -> str | None:
        return self.study.get("base")

    @cached_property
    def task_names(self) -> tuple[str, ...]:
        seen = {task for task, _ in self.points} | {task for task, _, _ in self.runs} | set(self.tasks)
        return tuple(sorted(seen | {record["task"] for record in (*self.failures, *self.tuning)}))

    @cached_property
    def axes(self) -> tuple[str, ...]:
        """Axes that the study varies."""
        if "axes" in self.study:
            return tuple(self.study["axes"])
        return tuple(sorted({axis for record in self.points.values() for axis in record["settings"]}))

    @cached_property
    def labels(self) -> dict[str, str]:
        """What figures call each point: its values of the axes, or its name where they do not tell it apart."""
        values = {name: ", ".join(self.values(name)) or name for name in self.names}
        unique = all(list(values.values()).count(value) == 1 for value in values.values())
        return {name: (value if unique else name) + (" (base)" if name == self.base else "")
                for name, value in values.items()}

    def record(self, point: str) -> Record | None:
        """The point on the first task that has it."""
        return next((self.points[task, point] for task in self.task_names if (task, point) in self.points), None)

    def values(self, point: str) -> list[str]:
        """Values of the axes, as text; empty where the point is not recorded."""
        record = self.record(point)
        return [] if record is None else [_setting(record["settings"].get(axis)) for axis in self.axes]

    def scores(self, task: str) -> dict[str, dict[int, float]]:
        """point -> seed -> score of finished runs, points in the order of display."""
        found: dict[str, dict[int, float]] = {name: {} for name in self.names}
        for (of, point, seed), run in self.runs.items():
            if of == task:
                found[point][seed] = run["score"]
        return {point: scores for point, scores in found.items() if scores}

    def score_label(self, task: str) -> str:
        """The score and which way is good, for an axis of a figure or the head of a column."""
        record = self.tasks.get(task)
        return "score" if record is None else f"{record['score']} ({record['better']} is better)"

    def title(self, task: str) -> str:
        return self.tasks.get(task, {}).get("title", task)


def read_results(path: Path) -> Results:
    """Reads results.jsonl; a last line that a kill cut short is left out, and a line twice counts once.

    Raises:
      ValueError: a line that is no record, or two records of one thing that differ.
    """
    of_kind: dict[str, list[Record]] = {kind: [] for kind in ("study", "task", "point", "run", "tuning", "cost")}
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            record = json.loads(line)
            of_kind[record["kind"]].append(record)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path.name} line {number} is no record of a study ({error!r}); remove it") from None
    finished: dict[tuple[str, str, int], Record] = {}
    failures = []
    for record in _distinct(of_kind["run"] + of_kind["tuning"]):
        failures += [record | {"status": "failed"} | error for error in record.get("earlier_errors", ())]
        if not is_finished(record):
            failures.append(record)
        elif record["kind"] == "run":
            key = (record["task"], record["point"], record["seed"])
            if finished.setdefault(key, record)["score"] != record["score"]:
                raise ValueError(f"{path.name} has two scores of run {key}: {finished[key]['score']} and "
                                 f"{record['score']}; remove one of the lines")
    studies = _by(("name",), of_kind["study"], path)
    if len(studies) > 1:
        raise ValueError(f"{path.name} holds the studies {sorted(name for name, in studies)}; give each its own file")
    return Results(
        study=next(iter(studies.values()), {}),
        tasks={task: record for (task,), record in _by(("task",), of_kind["task"], path).items()},
        points={(task, point): record
                for (task, point), record in _by(("task", "point"), of_kind["point"], path).items()},
        runs=finished,
        failures=tuple(failures),
        tuning=tuple(_distinct(of_kind["tuning"])),
        costs={point: record for (point,), record in _by(("point",), of_kind["cost"], path).items()},
    )


def is_finished(record: Record) -> bool:
    score = record.get("score")
    return record["status"] == "ok" and score is not None and math.isfinite(score)


def _distinct(records: Iterable[Record]) -> list[Record]:
    """Each record once, in an order of its own."""
    return [json.loads(text) for text in sorted({json.dumps(record, sort_keys=True) for record in records})]


def _by(keys: tuple[str, ...], records: Iterable[Record], path: Path) -> dict[tuple[str, ...], Record]:
    found: dict[tuple[str, ...], Record] = {}
    for record in _distinct(records):
        other = found.setdefault(tuple(record[key] for key in keys), record)
        if other != record:
            differ = sorted(name for name in other.keys() | record.keys() if other.get(name) != record.get(name))
            raise ValueError(f"{path.name} has two {record['kind']} records of {' '.join(record[k] for k in keys)} "
                             f"that differ in {', '.join(differ)}; remove the one that no longer holds")
    return found


def _setting(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:g}" if isinstance(value, float) else str(value)
