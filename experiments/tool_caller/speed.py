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


def speed(life: Life, cases: list[Case], records: Path) -> list[dict[str, Any]]:
    """Medians by case, with the smallest and largest; each measurement is a line of `records` as soon as it is
    there."""
    records.parent.mkdir(parents=True, exist_ok=True)
    cases = [case for case in cases if case.engine == "lfm_jax" or life.llama_cpp]
    lines = records.read_text(encoding="utf-8").split("\n")[:-1] if records.exists() else []  # The last may be cut.
    done = [json.loads(line) for line in lines]
    records.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    for repeat in range(life.repeats):
        for case in cases:
            key = [repeat, case.engine, case.path.name, case.how]
            if any(row["key"] == key for row in done):
                continue
            said = subprocess.run(case.command(life.llama_cpp), stdout=subprocess.PIPE, text=True, check=True).stdout
            row = {"key": key, **json.loads(said.splitlines()[-1])}
            done.append(row)
            with records.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            say(f"{' '.join(map(str, key))}: {row['decode']:.0f} tokens/s", who="tool_caller")
    return [{"engine": case.engine, "file": case.path.name, "how": case.how,
             **{name: _spread([row[key] for row in done if row["key"][1:] == [case.engine, case.path.name, case.how]])
                for key, name in COLUMNS.items()}} for case in cases]


def _spread(values: list[float]) -> list[float]:
    return [statistics.median(values), min(values), max(values)]
