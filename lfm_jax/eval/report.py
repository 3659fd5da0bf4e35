"""The page of an evaluation: what a sceptic needs to judge its scores, in Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple


class Metric(NamedTuple):
    """A score of a task or group."""

    task: str
    name: str
    filter: str
    score: float
    error: float | None
    """Standard error; None: there is none."""


def metrics(results: Mapping[str, Any]) -> Iterator[Metric]:
    """Yields the scores of lm-eval's results, groups after their tasks."""
    for task, found in (results["results"] | results.get("groups", {})).items():
        for key, score in found.items():
            name, comma, of = key.partition(",")
            if comma and not name.endswith("_stderr") and isinstance(score, (int, float)):
                error = found.get(f"{name}_stderr,{of}")
                yield Metric(task, name, of, float(score), error if isinstance(error, (int, float)) else None)


def counts(results: Mapping[str, Any]) -> Iterator[tuple[str, str, str, int]]:
    """Yields (task, metric, text, documents) of the metrics that count what was said of documents."""
    for task, found in results["results"].items():
        for key, value in found.items():
            if isinstance(value, dict):
                yield from ((task, key.partition(",")[0], text, n) for text, n in value.items())


def report(results: Mapping[str, Any]) -> str:
    """Returns the page."""
    about = results["lfm_jax"]
    sizes, shots = results.get("n-samples", {}), results.get("n-shot", {})
    lines = [f"# Evaluation of {about['model']}", ""]
    if about["predict_only"]:
        lines.append("Answers only; nothing was scored.")
    else:
        lines += ["| task | version | shots | n | filter | metric | score | standard error |",
                  "|---|---|---|---|---|---|---|---|"]
    for found in () if about["predict_only"] else metrics(results):
        n = sizes.get(found.task, {})
        of_all = f"{n['effective']} of {n['original']}" if n and n["effective"] != n["original"] else n.get("effective")
        better = results.get("higher_is_better", {}).get(found.task, {}).get(found.name)
        sign = "" if better is None else " ↑" if better else " ↓"
        cells = (found.task, results["versions"].get(found.task), shots.get(found.task), of_all, found.filter,
                 found.name + sign, f"{found.score:.4f}", None if found.error is None else f"{found.error:.4f}")
        lines.append(f"| {' | '.join('' if cell is None else str(cell) for cell in cells)} |")
    if rows := [] if about["predict_only"] else list(counts(results)):
        lines += ["", "## Counted", "", "| task | | | documents |", "|---|---|---|---|"]
        lines += [f"| {task} | {metric} | {_cell(text)} | {n} |" for task, metric, text, n in rows]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines += ["", "## Settings", "", "| | |", "|---|---|"]
    known = {"model hash (SHA-256)": about["model_hash"] or "not known of a server"}
    if server := about.get("server"):
        known["the server says"] = json.dumps(server["says"], sort_keys=True)
    settings = {"model": about["model"], **known, "tokenizer": about["tokenizer"],
            **about["settings"], "device": about["device"], "versions": versions}
    left_out = {"limit": "all documents", "num_fewshot": "as the task says"}
    for name, value in settings.items():
        text = left_out.get(name, "none") if value is None else str(value)
        lines.append(f"| {name} | {_cell(text)} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "&#124;").replace("\n", " ")
