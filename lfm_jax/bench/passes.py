"""Passes of a kernel, timed in turn, and the table row that they make.

A pass is one program: the forward computation, or that and the gradient. Calls of it are dispatched one after another
and waited for at the end, so that on an accelerator the host is not what is measured.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

LONGEST = 20.0
"""Seconds for one call above which a pass is not run."""
SLOW = 2.0
"""Seconds for one call above which a pass is run once only."""
BATCH_SECONDS = 0.05
"""Seconds of calls to wait for at once on an accelerator."""
MOST_CALLS = 200


class Pass(NamedTuple):
    """`run(n)` makes n calls and returns when they are done; None where it cannot be run, for the reason given."""

    run: Callable[[int], None] | None
    temp_bytes: int | None = None
    reason: str = ""


class Entry(NamedTuple):
    """An implementation on one shape: its passes, and the bytes (every input and output once) or operations of each."""

    name: str
    forward: Pass
    both: Pass
    forward_work: int
    both_work: int


def say(text: str) -> None:
    """Progress, to stderr."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


def on_accelerator() -> bool:
    return jax.default_backend() != "cpu"


def compiled(function: Callable[..., Any], *args: Any) -> Pass:
    """`function` compiled for `args`. Its result must fit in memory beside them, with what it needs for itself."""
    try:
        program = jax.jit(function).lower(*args).compile()
    except Exception as error:  # A finding, and no reason to lose the rest of the table.
        return Pass(None, reason=f"failed: {_first_line(error)}")
    memory = program.memory_analysis()
    temp = memory.temp_size_in_bytes if memory else None
    if memory and memory.temp_size_in_bytes + memory.output_size_in_bytes > _free_memory():
        return Pass(None, temp, "does not fit in memory")

    def run(calls: int) -> None:
        result = None
        for _ in range(calls):
            result = program(*args)
        jax.block_until_ready(result)

    return Pass(run, temp)


def gradient(function: Callable[[Any], jax.Array]) -> Callable[[Any, jax.Array], Any]:
    """The value and the gradient by all arrays, for a given cotangent: nothing is left for XLA to drop."""

    def both(arrays: Any, cotangent: jax.Array) -> Any:
        value, vjp = jax.vjp(function, arrays)
        return value, vjp(cotangent)

    return both


def times(passes: Sequence[Pass], repeats: int) -> list[float | str]:
    """Median seconds a call of each pass, run in turn; or the reason why there is none."""
    calls, found = [0] * len(passes), [p.reason for p in passes]
    records: list[list[float]] = [[] for _ in passes]
    for i, p in enumerate(passes):
        if p.run is None:
            continue
        try:
            seconds = _seconds(p.run, 1)
            if seconds < LONGEST:  # The first call may have had more to do than the next.
                seconds = _seconds(p.run, 1)
        except Exception as error:
            found[i] = f"failed: {_first_line(error)}"
            continue
        calls[i] = max(1, min(MOST_CALLS, round(BATCH_SECONDS / seconds))) if on_accelerator() else 1
        if seconds > SLOW:
            calls[i], records[i] = 0, [seconds]
    for _ in range(repeats):
        for p, n, record in zip(passes, calls, records, strict=True):
            if p.run is not None and n:
                p.run(1)  # Its memory back from the others.
                record.append(_seconds(p.run, n) / n)
    return [statistics.median(r) if r else reason for r, reason in zip(records, found, strict=True)]


def _seconds(run: Callable[[int], None], calls: int) -> float:
    start = time.perf_counter()
    run(calls)
    return time.perf_counter() - start


def copy(bytes_: int) -> Pass:
    """Reads and writes so many bytes each: `x + 1`."""
    return compiled(lambda x: x + 1, jnp.zeros(bytes_ // 4, jnp.float32))


def call_overhead(repeats: int) -> float | str:
    """Seconds between two calls of a program that does next to nothing."""
    return times([copy(32)], repeats)[0]


def _free_memory() -> float:
    stats = jax.devices()[0].memory_stats() if on_accelerator() else None
    if stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    try:
        return 0.8 * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return float("inf")


def _first_line(error: Exception) -> str:
    text = (str(error).splitlines() or [""])[0].replace("|", "/")
    return f"{type(error).__name__}: {text[:120]}"
