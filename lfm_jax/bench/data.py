"""`lfm bench data`: packed tokens a second from shards, beside the pipeline that packs text on the fly.

The data is made here: documents of about 400 tokens, ids drawn at random, so that no text or tokenizer is needed.
Processor time counts all threads; one core delivers what a second of it does.

Dimensions: B rows of a batch, T time.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lfm_jax.bench.timing import conditions
from lfm_jax.data.build import BuildConfig, build
from lfm_jax.data.config import DataConfig, MixturePart
from lfm_jax.data.corpora import open_corpus
from lfm_jax.text.tokenizer import train_bpe

B = 16
BATCHES = 60
"""Batches of a timed run."""
WORDS = 1 << 12


def bench_data(T: int = 4096, repeats: int = 5, documents: int = 12_000) -> str:
    """Reads shards with and without reading ahead, and packs the same text on the fly; a Markdown table."""
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        tokenizer = _write_text(root, documents)
        manifest = build(
            BuildConfig(sources=(str(root / "text.jsonl"),), out=str(root / "set"), tokenizer=str(root), seq_len=T),
            show_progress=False,
        )

        def shards(prefetch: int) -> Iterator[Any]:
            mixture = (MixturePart(path=str(root / "set")),)
            config = DataConfig(mixture=mixture, seq_len=T, batch_size=B, prefetch=prefetch)
            return open_corpus(config, tokenizer).train_batches()

        text = DataConfig(sources=(str(root / "text.jsonl"),), heldout_fraction=0.0, seq_len=T, batch_size=B)
        start = time.perf_counter(), time.process_time()
        on_the_fly = open_corpus(text, tokenizer).train_batches()
        next(on_the_fly)
        setup = time.perf_counter() - start[0], time.process_time() - start[1]
        figures = _measure({
            "shards": shards(0),
            "shards, 2 batches read ahead": shards(2),
            "text, packed on the fly, once tokenised": on_the_fly,
        }, repeats)
    counts = manifest.train
    lines = [
        f"B = {B}, T = {T}: {counts.documents:,} documents of {counts.tokens / counts.documents:.0f} tokens, rows "
        f"{counts.efficiency(T):.2%} full; medians of {repeats} runs of {BATCHES} batches",
        "",
        "| batches from | million tokens/s and core (processor time) | million tokens/s (wall) |",
        "|---|---|---|",
    ]
    for name, (wall, cpu) in figures.items():
        lines.append(f"| {name} | {B * T / cpu / 1e6:.1f} | {B * T / wall / 1e6:.1f} |")
    wall, cpu = ((counts.tokens + manifest.heldout.tokens) / seconds / 1e6 for seconds in setup)
    lines.append(f"| text, tokenised before the first batch | {cpu:.1f} | {wall:.1f} |")
    return "\n".join([*lines, "", conditions("grain", "array_record", "numpy", "tokenizers")])


def _write_text(root: Path, documents: int) -> Any:
    """Documents of random words of a byte-pair vocabulary, and its tokenizer."""
    draw = np.random.default_rng(0)
    words = [" " + "".join(draw.choice(list("abcdefghijklmnopqrstuvwxyz"), size=5)) for _ in range(WORDS)]
    tokenizer = train_bpe((" ".join(words) for _ in range(2)), 4 * WORDS)
    tokenizer.save(str(root / "tokenizer.json"))
    with open(root / "text.jsonl", "w") as file:
        for n in np.maximum(draw.lognormal(np.log(300), 0.75, documents).astype(int), 2):
            chosen = "".join(words[i] for i in draw.integers(0, WORDS, n))
            file.write(f'{{"text": "{chosen}"}}\n')
    return tokenizer


def _measure(batches: dict[str, Iterator[Any]], repeats: int) -> dict[str, tuple[float, float]]:
    """Median seconds a batch of each, by the clock and of processor time, run in turn."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in batches}
    for _ in range(repeats):
        for name, iterator in batches.items():
            next(iterator)
            start = time.perf_counter(), time.process_time()
            for _ in range(BATCHES):
                next(iterator)
            times[name].append(((time.perf_counter() - start[0]) / BATCHES, (time.process_time() - start[1]) / BATCHES))
    return {
        name: (statistics.median(wall for wall, _ in record), statistics.median(cpu for _, cpu in record))
        for name, record in times.items()
    }


if __name__ == "__main__":
    print(bench_data())
