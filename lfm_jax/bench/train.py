"""`lfm bench train`: the training step beside `transformers` on PyTorch, each side in a process of its own.

Needs jax, flax, optax and numpy only: `python -m lfm_jax.bench.train`. On a GPU it ends within eight minutes; where
PyTorch or transformers is missing, their column says so.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from typing import Any

from lfm_jax.bench.passes import say
from lfm_jax.bench.timing import conditions
from lfm_jax.bench.train_side import Job
from lfm_jax.train.metrics import mfu

GPU_SECONDS = 450.0
"""After so long the GPU suite stops, whatever is under way."""
MEASURE_SECONDS = 4.0
"""Least time that a GPU variant is measured for, after which its speed is known to a percent."""
SIDE = [sys.executable, "-m", "lfm_jax.bench.train_side"]
_PACKAGES = ("jax", "jaxlib", "flax", "torch", "transformers")


class Failed(Exception):
    """A side that gave no figure, and why."""


class Process:
    """A side at work; see `train_side`."""

    def __init__(self, job: Job, deadline: float, environment: dict[str, str]):
        self.job, self._deadline = job, deadline
        self._process = subprocess.Popen(
            SIDE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env=os.environ | environment,
        )
        self.begun = self._ask(json.dumps(dataclasses.asdict(job)))

    def steps(self, count: int) -> dict[str, Any]:
        return self._ask(str(count))

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _ask(self, line: str) -> dict[str, Any]:
        left = min(max(self._deadline - time.monotonic(), 0.0), threading.TIMEOUT_MAX)
        late = threading.Timer(left, self._process.kill)
        late.start()
        try:
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            print(line, file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        finally:
            late.cancel()
        found = json.loads(answer) if answer else {}
        if "error" not in found and answer:
            return found
        self.close()
        if answer:
            raise Failed(found["error"].replace("|", "/")[:160])
        status = self._process.returncode
        raise Failed("out of time" if time.monotonic() >= self._deadline else f"ended with status {status}")


def bench_train(*, preset: str = "lfm2.5-350m", repeats: int = 5, toy: bool = False) -> str:
    """Measures on the default device; a Markdown report. Progress goes to stderr.

    Args:
      preset: the shape.
      repeats: on CPU, turns of each side of which the median counts.
      toy: the GPU suite on shapes too small to say anything, on any device.
    """
    backend = subprocess.run(
        [sys.executable, "-c", "import jax; print(jax.default_backend())"], capture_output=True, text=True, check=True
    ).stdout.split()[-1]
    head = conditions(*_PACKAGES)
    if toy:
        return f"{head}. Toy shapes: no figure here means anything.\n\n{bench_gpu(toy_jobs())}"
    if backend == "cpu":
        return f"{head}.\n\n{bench_cpu(preset, repeats=repeats)}"
    return f"{head}.\n\n{bench_gpu(gpu_jobs(preset))}"


# ---------------------------------------------------------------- CPU

CPU_SHAPES = ((2, 256), (1, 512))
STEPS_A_TURN = 2


def bench_cpu(preset: str, *, repeats: int, shapes: Sequence[tuple[int, int]] = CPU_SHAPES) -> str:
    """Both sides in turn, in float32: medians of tokens/s, and peak memory of each process."""
    lines = ["| float32, AdamW, clipping | lfm_jax | transformers | ratio | target |", "|---|---|---|---|---|"]
    # glibc asks for huge pages: half a million page faults a step otherwise (docs/measurements/model.md). For both.
    environment = {"GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")}
    for rows, T in shapes:
        model = {"preset": preset, "param_dtype": "float32", "dtype": "float32"}
        sides: list[Process | None] = []
        names = {"ours": "", "peer": ""}
        for side in names:
            say(f"{rows} x {T}, {side}: compiling" if side == "ours" else f"{rows} x {T}, {side}")
            try:
                sides.append(Process(Job(side=side, model=model, rows=rows, T=T), float("inf"), environment))
            except Failed as error:
                names[side] = f"absent: {error}"
                sides.append(None)
        seconds: list[list[float]] = [[], []]
        busy: list[list[float]] = [[], []]
        last: list[dict[str, Any]] = [{}, {}]
        for turn in range(repeats):
            say(f"{rows} x {T}, turn {turn + 1} of {repeats}")
            for i, process in enumerate(sides):
                if process is not None:
                    last[i] = process.steps(STEPS_A_TURN)
                    seconds[i].append(last[i]["seconds"] / STEPS_A_TURN)
                    busy[i].append(last[i]["cpu_seconds"] / STEPS_A_TURN)
        for process in sides:
            if process is not None:
                process.close()
        begun = sides[0].begun if sides[0] is not None else {}
        lines += _cpu_lines(rows, T, list(names.values()), seconds, busy, last, begun)
    head = (f"{preset}; each side in a process of its own, {STEPS_A_TURN} steps a turn, medians of {repeats} turns; "
            f"GLIBC_TUNABLES={environment['GLIBC_TUNABLES']}.")
    return head + "\n\n" + "\n".join(lines)


def _cpu_lines(
    rows: int, T: int, absent: list[str], seconds: list[list[float]], busy: list[list[float]],
    last: list[dict[str, Any]], begun: dict[str, Any],
) -> list[str]:
    shape = f"{rows} x {T} tokens"
    both = all(seconds)
    times, processor = (
        [statistics.median(record) if record else float("nan") for record in kind] for kind in (seconds, busy)
    )

    def row(name: str, cells: list[str], ratio: str, target: str) -> str:
        cells = [reason or cell for cell, reason in zip(cells, absent, strict=True)]
        return f"| {shape}: {name} | {cells[0]} | {cells[1]} | {ratio if both else ''} | {target} |"

    memory = [found.get("rss", float("nan")) for found in last]
    first = "" if not begun else f"{begun['compile_seconds']:.1f} s"
    return [
        row("tokens/s", [f"{rows * T / t:.1f}" for t in times], f"{times[1] / times[0]:.2f}x", ">= 1.3x"),
        row("step", [f"{t:.2f} s" for t in times], f"{times[1] / times[0]:.2f}x", ""),
        row("processor time of a step", [f"{t:.2f} s" for t in processor], f"{processor[1] / processor[0]:.2f}x", ""),
        row("peak RSS", [f"{m / 1e9:.2f} GB" for m in memory], f"{memory[0] / memory[1]:.2f}x", "<= 1x"),
        row("compile", [first, ""], "", ""),
    ]


# ---------------------------------------------------------------- GPU


@dataclasses.dataclass(frozen=True)
class Variant:
    """A line of the GPU table."""

    name: str
    job: Job
    seconds: float = 90.0
    """After so long it is given up."""


def gpu_jobs(preset: str) -> list[Variant]:
    """A shape in bfloat16, the most telling variants first: the time may not suffice for all."""
    model = {"preset": preset, "param_dtype": "float32", "dtype": "bfloat16"}

    def ours(rows: int, T: int, *, documents: int = 0, micro_batches: int = 1, **changes: Any) -> Variant:
        job = Job(side="ours", model=model | changes, rows=rows, T=T, documents=documents,
                  micro_batches=micro_batches)
        named = {"attention_impl": "attention", "remat": "remat", "scan_layers": "scan_layers"}
        parts = [f"{named[key]} {value}" for key, value in changes.items()]
        parts += [f"{micro_batches} micro-batches"] * (micro_batches > 1)
        return Variant(", ".join(parts) or "lfm_jax", job)

    def peer(rows: int, T: int) -> Variant:
        job = Job(side="peer", model=model, rows=rows, T=T, compile=True)
        return Variant("transformers, torch.compile", job, seconds=150.0)

    short, long = 4096, 32_768
    return [
        ours(8, short, documents=8),
        ours(1, long, documents=8),
        ours(32, short, documents=8, remat="ffn"),
        ours(8, short),
        peer(8, short),
        ours(16, short, documents=8),
        ours(1, long),
        ours(2, long, documents=8, remat="ffn"),
        peer(1, long),
        ours(32, short, documents=8, micro_batches=4),
        ours(8, short, documents=8, scan_layers=True),
        ours(32, short, documents=8, remat="dots"),
    ]


def toy_jobs() -> list[Variant]:
    """The same code on a shape that compiles in seconds, one variant of each sort."""
    tiny = dict(
        preset="lfm2.5-350m", layer_types=("conv", "full_attention"), vocab_size=300, hidden_size=16, ffn_size=24,
        num_heads=2, num_kv_heads=1, head_dim=8, max_position=64, param_dtype="float32", dtype="bfloat16",
    )
    return [
        Variant("remat ffn, packed", Job(side="ours", model=tiny | {"remat": "ffn"}, rows=2, T=32, documents=2)),
        Variant("attention cudnn", Job(side="ours", model=tiny | {"attention_impl": "cudnn"}, rows=2, T=32)),
        Variant("transformers", Job(side="peer", model=tiny, rows=2, T=32)),
    ]


def bench_gpu(variants: Sequence[Variant], *, limit: float = GPU_SECONDS, measure: float = MEASURE_SECONDS) -> str:
    """One variant after the other, each in a process of its own, until the time is over.

    Args:
      variants: in order of importance.
      limit: seconds for all.
      measure: least seconds that one is measured for.
    """
    deadline = time.monotonic() + limit
    head = ["T", "rows", "documents a row", "variant", "tokens/s", "MFU", "step", "GPU memory", "compile"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    best: dict[tuple[int, str, bool], tuple[float, str]] = {}
    device, left_out = "", 0
    with tempfile.TemporaryDirectory() as cache:
        environment = {
            # Programs and autotuning results of one variant serve the next.
            "JAX_COMPILATION_CACHE_DIR": cache, "TORCHINDUCTOR_CACHE_DIR": os.path.join(cache, "torch"),
            "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",
        }
        for variant in variants:
            job = variant.job
            if time.monotonic() > deadline:
                left_out += 1
                continue
            say(f"T {job.T}, {job.rows} rows, {variant.name}")
            cells = [str(job.T), str(job.rows), str(max(job.documents, 1)), variant.name]
            try:
                end = min(deadline, time.monotonic() + variant.seconds)
                found = _measure(variant.job, end, environment, measure)
            except Failed as error:
                lines.append(f"| {' | '.join(cells)} | {error} | | | | |")
                continue
            device = device or found["device"]
            lines.append(f"| {' | '.join([*cells, *_gpu_cells(job, found)])} |")
            key = job.T, job.side, job.documents > 1
            best[key] = max(best.get(key, (0.0, "")), (job.tokens / found["step"], f"{variant.name}, {job.rows} rows"))
    notes = [f"{device or 'no device'}; bfloat16 with float32 parameters, AdamW, clipping at 1.0; every variant in a "
             "process of its own. MFU: `train/metrics.py`; of packed rows only the attention within documents counts. "
             "The rows of transformers hold one document each: it cannot keep several apart."]
    notes += [_best_line(T, packed, *best[T, side, packed], best.get((T, "peer", False)))
              for T, side, packed in best if side == "ours"]
    if left_out:
        notes.append(f"Out of time: the last {left_out} variants were not run.")
    return "\n".join(lines) + "\n\n" + "\n".join(notes)


def _measure(job: Job, deadline: float, environment: dict[str, str], measure: float) -> dict[str, Any]:
    """What the process said, and `step`, the seconds of one: few to warm up, then as many as fill the time."""
    process = Process(job, deadline, environment)
    try:
        warm = process.steps(3)["seconds"] / 3
        count = max(3, min(200, round(measure / max(warm, 1e-6))))
        found = process.steps(count)
    finally:
        process.close()
    return process.begun | found | {"step": found["seconds"] / count}


def _gpu_cells(job: Job, found: dict[str, Any]) -> list[str]:
    speed = job.tokens / found["step"]
    share = utilisation(job, speed, found["device"])
    memory, compiled = found["device_bytes"], found["compile_seconds"]
    return [
        f"{speed:,.0f}", "" if share is None else f"{share:.1%}".replace("%", " %"), f"{found['step'] * 1e3:.1f} ms",
        "" if memory is None else f"{memory / 1e9:.1f} GB",
        f"{compiled:.0f} s" if compiled is not None else f"first step {found['first_seconds']:.0f} s",
    ]


def utilisation(job: Job, speed: float, device: Any) -> float | None:
    """MFU at so many tokens/s; of packed rows only the attention within documents counts. None: the peak of the
    device, or of its `device_kind`, is not known."""
    return mfu(3 * job.config.flops_per_token(job.T // max(job.documents, 1)), speed, [device])


def _best_line(T: int, packed: bool, speed: float, name: str, other: tuple[float, str] | None) -> str:
    """The fastest of the rows of several documents, or of those of one: they are not the same work."""
    text = f"Best at T = {T:,}, {'packed' if packed else 'one document a row'}: {name}, {speed:,.0f} tokens/s"
    return text + (f"; {speed / other[0]:.2f}x transformers." if other else "; no figure of transformers.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m lfm_jax.bench.train", description=bench_train.__doc__)
    parser.add_argument("--preset", default="lfm2.5-350m")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--toy", action="store_true")
    print(bench_train(**vars(parser.parse_args())))
