"""Memory and speed of the files, as `edge.py` measures them: every measurement in a process of its own, in turns."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import edge
from records import Records, Row

from lfm_jax.files import say
from tool_caller.config import Life

COLUMNS = {"VmHWM": "peak", "RssAnon": "own", "prefill": "prefill", "decode": "decode"}


class Case(NamedTuple):
    """One engine on one file."""

    engine: str
    path: Path
    how: str
    """The form of the weights, of ours; how the file is taken, of llama.cpp."""

    def command(self, python: str) -> list[str]:
        sizes = [*map(str, (edge.PROMPT, edge.NEW, os.cpu_count()))]
        if self.engine == "lfm_jax":
            return [sys.executable, edge.__file__, "ours", str(self.path), self.how]
        return [python, "-c", edge.LLAMA, str(self.path), self.how, *sizes]


def speed(life: Life, cases: list[Case], path: Path) -> list[dict[str, Any]]:
    """Medians by case, with the smallest and largest; each measurement is a line of `path` as soon as it is there."""
    records = Records(path)
    cases = [case for case in cases if case.engine == "lfm_jax" or life.llama_cpp]
    for repeat in range(life.repeats):
        for case in cases:
            key = [repeat, case.engine, case.path.name, case.how]
            if any(row["key"] == key for row in records.rows):
                continue
            ended = subprocess.run(case.command(life.llama_cpp), stdout=subprocess.PIPE, text=True)
            if ended.returncode:
                raise ValueError(f"the speed of {case.engine} on {case.path} cannot be measured: its process ended "
                                 f"with status {ended.returncode}, for the reason above")
            row = {"key": key, **json.loads(ended.stdout.splitlines()[-1])}
            records.add(row)
            say(f"{' '.join(map(str, key))}: {row['decode']:.0f} tokens/s", who="tool_caller")
    return [{"engine": case.engine, "file": case.path.name, "how": case.how, **_spreads(case, records.rows)}
            for case in cases]


def _spreads(case: Case, rows: list[Row]) -> dict[str, list[float]]:
    of_case = [row for row in rows if row["key"][1:] == [case.engine, case.path.name, case.how]]
    return {name: _spread([row[key] for row in of_case]) for key, name in COLUMNS.items()}


def _spread(values: list[float]) -> list[float]:
    return [statistics.median(values), min(values), max(values)]
