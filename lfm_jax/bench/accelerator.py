"""`python -m lfm_jax.bench.accelerator --minutes 8`: what this project wants to know of an accelerator, most telling
first, within a time.

Needs jax, flax, optax and numpy only. Each stage (`accelerator_stages.STAGES`) has a process of its own, so that one
that fails, hangs or runs out of memory loses its own figures alone. Every figure is written as it comes; started again
with the same directory, the command runs what is not finished.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lfm_jax.bench.accelerator_stages import SIZES, STAGES, Stage
from lfm_jax.bench.passes import say
from lfm_jax.bench.timing import conditions
from lfm_jax.files import write_whole

RESULTS, TABLE, CACHE = "results.jsonl", "table.md", "cache"
"""In the directory of a run: a line for each thing that happened, what they amount to, and compiled programs."""
LEAST = 20.0
"""With fewer seconds left no stage is begun: a process, JAX and a GPU take half of them."""
PATIENCE = 120.0
"""Seconds in which JAX is to find the device."""
COMMAND = [sys.executable, "-m", "lfm_jax.bench.accelerator_stages"]
DEVICE = "import jax; d = jax.devices(); print(f'{jax.default_backend()}|{len(d)} x {d[0].device_kind}')"
PACKAGES = ("lfm_jax", "jax", "jaxlib", "flax", "optax", "torch", "transformers")
Record = dict[str, Any]


def bench_accelerator(
    out: Path, *, minutes: float = 8.0, size: str | None = None, stages: Sequence[str] | None = None
) -> str:
    """Runs the stages that are not finished, one after another, until the time is over; progress goes to stderr.

    Args:
      out: directory of the results, made if need be.
      minutes: for all stages together.
      size: `full`, or `toy`, whose figures mean nothing. None: toy on a CPU.
      stages: names of those to run; None: all.

    Returns:
      The table, which is in `out` too.

    Raises:
      ValueError: an unknown stage, no device, or `out` holds results of another device or size.
    """
    began = time.monotonic()
    known = {stage.name: stage for stage in STAGES}
    if unknown := [name for name in stages or () if name not in known]:
        raise ValueError(f"stages names {', '.join(unknown)}; choose from {', '.join(known)}")
    backend, device = _device()
    size = size or ("toy" if backend == "cpu" else "full")
    out.mkdir(parents=True, exist_ok=True)
    log = _Log(out)
    log.open({"device": device, "size": size, "versions": conditions(*PACKAGES), "minutes": minutes})
    for stage in [known[name] for name in stages or known]:
        left = began + 60 * minutes - time.monotonic()
        if log.status(stage.name) == "done":
            say(f"{stage.name}: finished before")
        elif left < LEAST and size != "toy":
            say(f"{stage.name}: out of time")
        elif left > 0:
            # Toy stages are no measurements: a slow machine may take its time for them.
            _run(stage, size, left if size == "toy" else min(stage.seconds, left), log)
    return log.table()


def _device() -> tuple[str, str]:
    """(backend, devices), asked in a process of its own: JAX in this one would take most of a GPU's memory.

    Raises:
      ValueError: JAX finds none, or does not answer.
    """
    try:
        asked = subprocess.run([sys.executable, "-c", DEVICE], capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        raise ValueError(f"JAX has not found a device within {PATIENCE:.0f} s; look at the driver") from None
    if asked.returncode:
        said = asked.stderr.strip().splitlines() or [f"status {asked.returncode}"]
        raise ValueError(f"JAX finds no device: {said[-1]}")
    backend, device = asked.stdout.strip().splitlines()[-1].split("|")
    return backend, device


def _run(stage: Stage, size: str, seconds: float, log: _Log) -> None:
    """Runs a stage in a process, which is killed after so many seconds."""
    say(f"{stage.name}: at most {seconds:.0f} s")
    log.add({"kind": "begin", "stage": stage.name, "seconds": round(seconds, 1)})
    environment = {
        # Programs of one stage serve the next, and a later run.
        "JAX_COMPILATION_CACHE_DIR": str((log.out / CACHE).absolute()), "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",
    }
    began = time.monotonic()
    end: Record | None = None
    process = subprocess.Popen(
        [*COMMAND, stage.name, "--size", size], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
        errors="replace", env=environment | os.environ,
    )
    late = threading.Timer(seconds, process.kill)
    late.start()
    try:
        assert process.stdout is not None
        for record in filter(None, map(_record, process.stdout)):
            if record["kind"] == "end":
                end = record
            else:
                log.add({**record, "stage": stage.name})
        process.wait()
    finally:
        late.cancel()
        process.kill()
        process.communicate()
    took = time.monotonic() - began
    if end is None:
        timed_out = took >= seconds
        end = {"kind": "end", "status": "out of time" if timed_out else "failed",
               "error": f"stopped after {seconds:.0f} s" if timed_out else f"ended with status {process.returncode}"}
    log.add({**end, "stage": stage.name, "took": round(took, 1)})
    say(f"{stage.name}: {end['status']} after {took:.0f} s {end.get('error', '')}")


def _record(line: str) -> Record | None:
    """What a stage tells in a line; None for what a library prints before figures have a channel of their own."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and "kind" in found else None


class _Log:
    """The results of a directory; each record is on disk before the next thing happens."""

    def __init__(self, out: Path):
        self.out, self._path = out, out / RESULTS
        lines = self._path.read_text().split("\n") if self._path.exists() else [""]
        self._records: list[Record] = [json.loads(line) for line in lines[:-1]]
        if lines[-1]:  # A kill has cut the last line.
            write_whole(self._path, "".join(f"{line}\n" for line in lines[:-1]))

    def open(self, run: Record) -> None:
        """Begins a run in the directory.

        Raises:
          ValueError: it holds results of another device or size.
        """
        before = next((record for record in self._records if record["kind"] == "run"), run)
        for name in ("device", "size"):
            if before[name] != run[name]:
                raise ValueError(f"{self.out} holds results of {name} {before[name]}, and this is {run[name]}; name "
                                 "another directory with --out")
        self.add({"kind": "run", **run, "at": time.strftime("%Y-%m-%d %H:%M", time.gmtime())})

    def add(self, record: Record) -> None:
        self._records.append(record)
        with self._path.open("a") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        write_whole(self.out / TABLE, self.table() + "\n")

    def status(self, stage: str) -> str:
        """How the stage ended the last time; empty if it has not."""
        ends = [record["status"] for record in self._of(stage) if record["kind"] == "end"]
        return ends[-1] if ends else ""

    def table(self) -> str:
        """The figures of the last time that each stage ran, beside what the project wants to reach."""
        runs = [record for record in self._records if record["kind"] == "run"]
        run, made_with = runs[-1], dict.fromkeys(f"{run['versions']}; {run['at'][:10]}" for run in runs)
        head = f"{run['device']}; {'; and '.join(made_with)}."
        if run["size"] == "toy":
            head += " Toy size: no figure here means anything."
        return "\n".join([head, "", "| stage | | measured | aim | beside transformers | |", "|---|---|---|---|---|---|",
                          *(line for stage in STAGES for line in self._lines(stage))])

    def _of(self, stage: str) -> list[Record]:
        """The records of its last attempt."""
        mine = [record for record in self._records if record.get("stage") == stage]
        begins = [i for i, record in enumerate(mine) if record["kind"] == "begin"]
        return mine[begins[-1] :] if begins else []

    def _lines(self, stage: Stage) -> Iterator[str]:
        records = self._of(stage.name)
        rows = {record["what"]: record for record in records if record["kind"] == "row"}
        theirs = {row["what"]: row["value"] for row in self._of(stage.peer) if row["kind"] == "row"}
        for what, row in rows.items():
            value = row["value"]
            ratio = f"{value / theirs[what]:.2f}x" if value is not None and theirs.get(what) else ""
            yield _line([stage.name, what, _figure(value, row["unit"]), _aim(stage, what, value), ratio, row["note"]])
        for what in [what for what in stage.aims if what not in rows]:
            yield _line([stage.name, what, "not measured", _aim(stage, what, None), "", ""])
        if not records and not stage.aims:
            yield _line([stage.name, "", "not measured", "", "", ""])
        elif records and records[-1]["kind"] != "end":
            yield _line([stage.name, "", "broken off", "", "", ""])
        elif records and (end := records[-1])["status"] != "done":
            yield _line([stage.name, "", end["status"], "", "", end["error"]])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _figure(value: float | None, unit: str) -> str:
    if value is None:
        return "not known"
    if unit == "share":
        return f"{100 * value:.1f} %"
    return f"{value:,.0f} {unit}" if value >= 1000 or float(value).is_integer() else f"{value:.3g} {unit}"


def _aim(stage: Stage, what: str, value: float | None) -> str:
    if what not in stage.aims:
        return ""
    aim, unit = stage.aims[what]
    return f">= {_figure(aim, unit)}{', missed' if value is not None and value < aim else ''}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m lfm_jax.bench.accelerator",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="for all stages together")
    parser.add_argument("--out", type=Path, default=Path("accelerator"), help="directory of the results")
    parser.add_argument("--size", choices=SIZES, help="by default full, but toy on a CPU")
    parser.add_argument("--stages", nargs="+", metavar="NAME", help="by default all, in this order: "
                        + "; ".join(stage.name for stage in STAGES))
    arguments = parser.parse_args()
    try:
        print(bench_accelerator(**vars(arguments)))
    except ValueError as error:
        sys.exit(f"lfm_jax.bench.accelerator: {error}")
