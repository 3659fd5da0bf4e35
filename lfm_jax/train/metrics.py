"""metrics.jsonl, one JSON object a line; the curves drawn from it; and model FLOPs utilisation."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import jax

METRICS = "metrics.jsonl"
LOSS_CURVE = "loss.png"
CURVES = "curves.png"
TASKS = "eval/"
"""The keys of scores of tasks begin with it: eval/TASK/METRIC."""

_PANELS = (
    ("loss", "loss (nats per token)"), ("grad_norm", "gradient norm, before clipping"),
    ("learning_rate", "learning rate"), ("tokens_per_second", "tokens/s"),
)
_DRAWN = 5_000
"""Most points of one line."""


class MetricsLog:
    """Appends records to `run_dir/metrics.jsonl`, each flushed whole, so that a kill loses none.

    Args:
      run_dir: the run's directory.
      resume_step: records of later steps are dropped: they belong to work that a kill undid.
    """

    def __init__(self, run_dir: Path, *, resume_step: int):
        self.path = Path(run_dir) / METRICS
        self._file = self.path.open("ab")
        whole = 0
        for line in _lines(self.path):
            if json.loads(line)["step"] > resume_step:
                break
            whole += len(line)
        os.truncate(self.path, whole)

    def log(self, step: int, record: Mapping[str, Any]) -> None:
        """Appends `record` with its step first. A number that is not finite becomes null: JSON has none."""
        content = {"step": step} | {name: _finite(value) for name, value in record.items()}
        self._file.write(json.dumps(content, allow_nan=False).encode() + b"\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """All whole records of a run; a last line that a kill cut short is left out."""
    path = Path(run_dir) / METRICS
    return [json.loads(line) for line in _lines(path)] if path.exists() else []


def saved_step(run_dir: Path) -> int | None:
    """The last step of which a checkpoint was begun; None without one."""
    return max((r["step"] for r in read_metrics(run_dir) if "checkpoint_blocked_seconds" in r), default=None)


def mfu(flops_per_token: float, tokens_per_second: float | None, devices: Sequence[jax.Device]) -> float | None:
    """Model FLOPs utilisation, 0 to 1: the model's own arithmetic over what the devices could do in the same time.

    `flops_per_token * tokens_per_second / (sum of the devices' peak bfloat16 FLOP/s)`. What remat computes again, the
    optimizer and padding do not count. The peak is the dense bfloat16 one of `chips.py`, whatever dtype is computed in.

    Args:
      flops_per_token: of a training step (`budget.training_flops_per_token`).
      tokens_per_second: real tokens of all devices together.
      devices: all devices of the run, other processes' included.

    Returns:
      None where the speed is None, or the peak of a device is not known, as on CPU.
    """
    from lfm_jax.chips import chip_of

    chips = [chip_of(device) for device in devices]
    if tokens_per_second is None or not chips or any(chip is None for chip in chips):
        return None
    peak = sum(chip.peak_bf16_flops for chip in chips if chip is not None)
    return flops_per_token * tokens_per_second / peak


def plot_loss(run_dir: Path) -> Path | None:
    """Draws training and held-out loss against step into `run_dir/loss.png`; None without any record."""
    return _draw(run_dir, _PANELS[:1], LOSS_CURVE, f"{Path(run_dir).resolve().name}: loss")


def plot_curves(run_dir: Path) -> Path | None:
    """Draws loss, gradient norm, learning rate, tokens/s and scores of tasks as panels into `run_dir/curves.png`.

    Returns None without any record.
    """
    tasks = sorted({key for record in read_metrics(run_dir) for key in record if key.startswith(TASKS)})
    panels = (*_PANELS, *((key, key.removeprefix(TASKS)) for key in tasks))
    return _draw(run_dir, panels, CURVES, Path(run_dir).resolve().name)


def _draw(run_dir: Path, panels: Sequence[tuple[str, str]], name: str, title: str) -> Path | None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = read_metrics(run_dir)
    if not any("loss" in record for record in records):
        return None
    columns = 1 if len(panels) == 1 else 2
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(8, 4.5) if columns == 1 else (12, 3.6 * rows), layout="constrained")
    figure.suptitle(title)
    places = figure.subplots(rows, columns, squeeze=False).ravel()
    for unused in places[len(panels) :]:
        unused.set_axis_off()
    for axes, (key, label) in zip(places, panels, strict=False):
        steps, values = _series(records, key)
        smooth = key in ("loss", "grad_norm", "tokens_per_second")
        stride = max(1, len(steps) // _DRAWN)
        color, width = ("0.7", 0.8) if smooth else ("C0", 1.5)
        axes.plot(steps[::stride], values[::stride], "o-" if key.startswith(TASKS) else "-", color=color,
                  linewidth=width, markersize=4, label="training, each step")
        if smooth:
            window = max(1, len(values) // 50)
            means = _running_mean(values, window)
            axes.plot(steps[::stride], means[::stride], color="C0", label=f"training, mean of {window} steps")
        if key == "loss":
            held_steps, held = _series(records, "heldout_loss")
            if len(held):
                axes.plot(held_steps, held, "o-", color="C3", markersize=4, label="held out")
            axes.legend()
        if key == "tokens_per_second":
            axes.set_ylim(bottom=0)
        axes.set(xlabel="optimizer step", ylabel=label)
        axes.grid(alpha=0.3)
    path = Path(run_dir) / name
    FigureCanvasAgg(figure).print_png(path)
    return path


def _series(records: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of the records that have a value for `key`."""
    points = [(record["step"], record[key]) for record in records if record.get(key) is not None]
    steps, values = zip(*points, strict=True) if points else ((), ())
    return np.asarray(steps), np.asarray(values, np.float64)


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of each value and up to `window` - 1 before it."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _lines(path: Path) -> Iterator[bytes]:
    """Whole lines, each with its newline."""
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield line
