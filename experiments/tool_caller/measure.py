"""What a model is worth at a station: bits per byte, calls, JSON; and what a station gave beside an earlier one."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lfm_jax.cli.inference import load_chat
from lfm_jax.eval.compare import compare
from lfm_jax.eval.run import RESULTS, evaluate, of_model
from lfm_jax.eval.shares import NONE, share_error
from lfm_jax.files import say
from tool_caller.config import Life

TEXT, PLAIN, CONSTRAINED = "text", "plain", "constrained"
"""Directories of a measurement."""
KINDS = {"tool_calls_seen": "seen", "tool_calls_unseen": "unseen", "json_schema": "json"}
CALLS = ("called", "valid", "exact", "argument_values", "refrained")
METRICS = {"seen": CALLS, "unseen": CALLS, "json": ("json_validity", "schema_compliance")}


def measure(life: Life, model: Path, out: Path, *, tuned: bool) -> dict[str, Any]:
    """Measures a model with `lfm eval`'s tasks, into directories below `out`, which continue where they were.

    Args:
      tuned: it has learnt chats, so that all turns are asked, free and held to grammars.

    Returns:
      Scores as [value, standard error or None, number of documents], and what was counted; plain data.
    """
    subject = of_model(*load_chat(str(model), None), name=model.name, slots=life.slots, seed=life.seed)
    data = life.data / "eval"
    say(f"{model.name}: bits per byte", who="tool_caller")
    evaluate(subject, ["heldout"], out / TEXT, data=data)
    found: dict[str, Any] = {TEXT: _bits(out / TEXT)}
    for form in (PLAIN, CONSTRAINED) if tuned else (PLAIN,):
        say(f"{model.name}: calls and JSON, {form}", who="tool_caller")
        results = evaluate(
            subject, ["tool_calls", "json_schema"], out / form, data=data, apply_chat_template=True,
            limit=life.documents if tuned else life.base_documents, constrained=form == CONSTRAINED)
        assert results is not None  # It is no shard.
        found[form] = _scores(results["results"], results["n-samples"])
    return found


def _bits(directory: Path) -> dict[str, Any]:
    """Bits per byte of all passages; the standard error is that of a ratio over passages."""
    rows = [json.loads(line)["bits_per_byte"]
            for line in (directory / "samples_heldout.jsonl").read_bytes().splitlines()]
    parts = [[-nats / math.log(2), size] for nats, size in rows]
    error = share_error(parts)
    return {"bits_per_byte": [sum(bits for bits, _ in parts) / sum(size for _, size in parts),
                              None if error == NONE else error, len(parts)]}


def _scores(results: Mapping[str, Any], counts: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for task, kind in KINDS.items():
        of = results[task]
        for name in METRICS[kind]:
            value, error = (_number(of.get(key)) for key in (f"{name},none", f"{name}_stderr,none"))
            if value is not None:
                found[f"{kind}.{name}"] = [value, error, counts[task]["effective"]]
        found[f"{kind}.counted"] = {name: of[f"{name},none"] for name in ("turns", "errors", "problems")
                                    if of.get(f"{name},none")}
    return found


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def gave(before: Path, after: Path, forms: Sequence[str] = (TEXT, PLAIN, CONSTRAINED)) -> dict[str, Any]:
    """Differences of the scores of two measurements, after - before, as [difference, low, high] of the paired 95 %
    interval over documents (`lfm eval compare`), in forms that both have."""
    found: dict[str, Any] = {}
    for form in forms:
        if not all((path / form / RESULTS).exists() for path in (before, after)):
            continue
        wanted = {"heldout": ("bits_per_byte",)} | {task: METRICS[kind] for task, kind in KINDS.items()}
        for d in compare(before / form, after / form):
            if d.metric in wanted[d.task]:
                name = d.metric if form == TEXT else f"{form}.{KINDS[d.task]}.{d.metric}"
                found[name] = [d.second - d.first, d.low, d.high]
    return found
