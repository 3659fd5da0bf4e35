"""Interleaved timing and the table it prints into."""

from __future__ import annotations

import dataclasses
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version


@dataclasses.dataclass(frozen=True)
class Row:
    """One measured comparison: median seconds of ours, and of the peer where there was one."""

    name: str
    ours: float
    peer: float | None
    target: float | None
    """The peer's time over ours that the project wants to reach."""


def interleave(tasks: Sequence[Callable[[], object]], repeats: int, *, settle: int = 0) -> list[float]:
    """Median seconds of each task, run in turn (A B A B ...) so that a drifting machine meets all alike.

    Each task runs once first, uncounted, and must return only when its work is done. Before each counted run come
    `settle` more uncounted ones of the same task: for a loop such as training, whose memory the other task has
    taken over in the meantime.
    """
    for task in tasks:
        task()
    times: list[list[float]] = [[] for _ in tasks]
    for _ in range(repeats):
        for task, record in zip(tasks, times, strict=True):
            for _ in range(settle):
                task()
            start = time.perf_counter()
            task()
            record.append(time.perf_counter() - start)
    return [statistics.median(record) for record in times]


def conditions(*packages: str) -> str:
    """One line that says on what the figures were made."""
    found = []
    for package in packages:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} absent")
    machine = f"{_cpu_name()}, {len(os.sched_getaffinity(0))} cores"
    return f"{machine}; Python {platform.python_version()}, {', '.join(found)}"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def table(rows: Sequence[Row], peer_name: str) -> str:
    """The rows as a Markdown table."""
    lines = [f"| | lfm_jax | {peer_name} | ratio | target |", "|---|---|---|---|---|"]
    for row in rows:
        peer = "absent" if row.peer is None else _seconds(row.peer)
        ratio = "" if row.peer is None else f"{row.peer / row.ours:.2f}x"
        target = "" if row.target is None else f">= {row.target:g}x"
        lines.append(f"| {row.name} | {_seconds(row.ours)} | {peer} | {ratio} | {target} |")
    return "\n".join(lines)


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.2f} ms"
