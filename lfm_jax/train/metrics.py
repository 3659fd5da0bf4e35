"""metrics.jsonl: one JSON object a line, and the loss curve drawn from it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"
CURVE = "loss.png"


class MetricsLog:
    """Appends records to `run_dir/metrics.jsonl`, each flushed whole.

    Args:
      run_dir: the run's directory.
      resume_step: records of later steps are dropped: they belong to work that a kill undid.
    """

    def __init__(self, run_dir: Path, *, resume_step: int):
        self.path = run_dir / METRICS
        kept = [r for r in read_metrics(run_dir) if r["step"] <= resume_step]
        fresh = self.path.with_suffix(".tmp")
        fresh.write_text("".join(json.dumps(record) + "\n" for record in kept))
        os.replace(fresh, self.path)
        self._file = self.path.open("a")

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """All whole records of a run; a last line that a kill cut short is left out."""
    path = Path(run_dir) / METRICS
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]


def plot_loss(run_dir: Path) -> Path | None:
    """Draws training and held-out loss against step into `run_dir/loss.png`; None without any record."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = read_metrics(run_dir)
    train = [(r["step"], r["loss"]) for r in records if "loss" in r]
    heldout = [(r["step"], r["heldout_loss"]) for r in records if "heldout_loss" in r]
    if not train:
        return None
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*train, strict=True), color="0.7", linewidth=0.8, label="training, each step")
    window = max(1, len(train) // 50)
    smooth = [
        sum(loss for _, loss in train[max(0, i - window + 1) : i + 1]) / len(train[max(0, i - window + 1) : i + 1])
        for i in range(len(train))
    ]
    axes.plot([step for step, _ in train], smooth, color="C0", label=f"training, mean of {window} steps")
    if heldout:
        axes.plot(*zip(*heldout, strict=True), "o-", color="C3", markersize=4, label="held out")
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)", title=f"{Path(run_dir).name}: loss")
    axes.grid(alpha=0.3)
    axes.legend()
    path = Path(run_dir) / CURVE
    FigureCanvasAgg(figure).print_png(path)
    return path
