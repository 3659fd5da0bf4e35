"""Blocks of a build shared out over processes, with a progress bar."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from lfm_jax.data.block import Block, Settings, build_block
from lfm_jax.data.manifest import Counts
from lfm_jax.data.sources import Stretch

POLL_SECONDS = 0.2

_counter: Any = None
"""In a worker: the source bytes that all workers have read."""
_stop: Any = None
"""In a worker: set where the build is given up."""


def run_blocks(
    settings: Settings,
    todo: Mapping[int, Sequence[Stretch]],
    workers: int,
    total_bytes: int,
    done: Sequence[Block],
    show_progress: bool,
) -> Iterator[tuple[int, Block]]:
    """(number, record) of each block, in the order in which they get done.

    One worker works in this process, where the tokenizer's threads use the cores; several are processes of their own.

    Args:
      workers: most processes; 0: one a core.
      total_bytes, done: of the whole build, for the progress bar.
    """
    workers = min(workers or len(os.sched_getaffinity(0)), len(todo))
    with _Progress(settings.seq_len, total_bytes, done, len(todo) + len(done), show_progress) as progress:
        if workers <= 1:
            for number, parts in todo.items():
                block = build_block(settings, number, parts, progress.advance)
                progress.finished(block)
                yield number, block
            return
        context = multiprocessing.get_context("spawn")
        counter, stop = context.Value("q", 0), context.Event()
        with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(counter, stop)) as pool:
            try:
                numbers = {pool.submit(_work, settings, number, parts): number for number, parts in todo.items()}
                waiting, seen = set(numbers), 0
                while waiting:
                    finished, waiting = wait(waiting, POLL_SECONDS, FIRST_COMPLETED)
                    read = counter.value
                    progress.advance(read - seen)
                    seen = read
                    for future in finished:
                        block = future.result()
                        progress.finished(block)
                        yield numbers[future], block
            except BrokenProcessPool:
                raise ValueError(
                    "a worker process died, perhaps for want of memory; the same command goes on with the build: "
                    "try fewer --workers"
                ) from None
            finally:
                stop.set()
                pool.shutdown(cancel_futures=True)


def _start_worker(counter: Any, stop: Any) -> None:
    global _counter, _stop
    _counter, _stop = counter, stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # The parent gets it too, and sets stop.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # Each worker has one core.

    def end_with_parent() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)  # A build that was killed must not leave workers that write on.

    threading.Thread(target=end_with_parent, daemon=True).start()


def _work(settings: Settings, number: int, parts: Sequence[Stretch]) -> Block:
    def advance(size: int) -> None:
        if _stop.is_set():
            raise InterruptedError("the build was given up")
        with _counter.get_lock():
            _counter.value += size

    return build_block(settings, number, parts, advance)


class _Progress:
    """A bar of source bytes, with what has become of them so far."""

    def __init__(self, seq_len: int, total_bytes: int, done: Sequence[Block], blocks: int, show: bool):
        self._seq_len, self._blocks, self._done = seq_len, blocks, len(done)
        self._counts = sum((block.train + block.heldout for block in done), Counts())
        self._bar = Progress(
            BarColumn(20), TaskProgressColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"), disable=not show,
        )
        before = sum(block.source_bytes for block in done)
        self._task = self._bar.add_task("", total=total_bytes, completed=before, status=self._status())
        if before and show:
            self._bar.console.print(f"going on: {len(done)} of {blocks} blocks are done")

    def __enter__(self) -> _Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self, size: int) -> None:
        self._bar.advance(self._task, size)

    def finished(self, block: Block) -> None:
        self._done += 1
        self._counts += block.train + block.heldout
        self._bar.update(self._task, status=self._status())

    def _status(self) -> str:
        counts = self._counts
        packed = f", {counts.rows:,} rows {counts.efficiency(self._seq_len):.2%} full" if counts.rows else ""
        return f"block {self._done}/{self._blocks}{packed}"
