"""`lfm bench`, `lfm selfcheck`, `lfm cache`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from lfm_jax.config import PRESETS

if TYPE_CHECKING:
    Preset = str
else:
    Preset = Literal[*sorted(PRESETS)]  # So that --help lists them.


def selfcheck() -> int:
    """Check every kernel and collective against its reference on this device, and print a table.

    It takes under two minutes on two CPU cores. The exit status is 1 if a check fails.
    """
    from lfm_jax.selfcheck import selfcheck as run

    report, ok = run()
    print(report)
    return 0 if ok else 1


def bench(
    suite: tyro.conf.Positional[Literal["model", "kernels", "train", "data", "serve"]] = "model",
    /,
    preset: Preset = "lfm2.5-350m",
    repeats: int = 5,
    gguf: Path | None = None,
) -> int:
    """Measure on this machine, beside a peer in the same process, and print a Markdown table.

    Args:
      suite: model: prefill, decode and training step beside transformers; kernels: implementations of each kernel;
        train: training steps and their memory beside transformers, each side in a process of its own;
        data: packed tokens per second from shards, beside packing text on the fly; serve: the engine's tokens per
        second beside transformers or a roofline, and decoding by context.
      preset: shape for the model, train and serve suites.
      repeats: number of timed runs, whose median is reported.
      gguf: F32 file of llama.cpp with a model of the preset's shape, which the serve suite then decodes too.
    """
    from lfm_jax.config import ModelConfig

    if gguf is not None and suite != "serve":
        raise ValueError("--gguf belongs to `bench serve`; leave it out")

    if suite in ("kernels", "data") and preset != "lfm2.5-350m":
        raise ValueError(f"--preset belongs to the other suites; leave it out of `bench {suite}`")
    if suite == "data":
        from lfm_jax.bench.data import bench_data

        print(bench_data(repeats=repeats))
    elif suite == "kernels":
        from lfm_jax.bench.kernels import bench_kernels

        print(bench_kernels(repeats=repeats))
    elif suite == "serve":
        from lfm_jax.bench.serve import bench_serve

        print(bench_serve(preset=preset, repeats=repeats, gguf=gguf))
    elif suite == "train":
        from lfm_jax.bench.train import bench_train

        print(bench_train(preset=preset, repeats=repeats))
    else:
        from lfm_jax.bench.model import bench_model

        print(bench_model(ModelConfig.preset(preset), repeats=repeats))
    return 0


def cache(clear: bool = False) -> int:
    """Report where compiled programs are kept between starts, their number and size, or remove them.

    Every verb that compiles, except plan, looks there first, so that its second start is fast. The place is `compiled`
    below LFM_CACHE_DIR, or else XDG_CACHE_HOME/lfm_jax, or else ~/.cache/lfm_jax; it holds at most 1 GiB, and the
    program that was not used for longest goes first. An empty LFM_CACHE_DIR switches it off. Where
    JAX_COMPILATION_CACHE_DIR is set, JAX keeps programs there instead, and this verb leaves them alone.

    Args:
      clear: removes them all.
    """
    from lfm_jax import compile_cache

    other, path = os.environ.get("JAX_COMPILATION_CACHE_DIR"), compile_cache.directory()
    if other is not None and clear:
        raise ValueError("JAX_COMPILATION_CACHE_DIR is set, and lfm does not remove its files; unset it, or "
                         f"remove the files in {other!r} yourself")
    if other is not None:
        print(f"JAX_COMPILATION_CACHE_DIR is set: JAX keeps compiled programs in {other!r}")
    elif path is None:
        print(f"compiled programs are not kept: {compile_cache.VARIABLE} is empty, or there is no home directory")
    else:
        if clear:
            compile_cache.clear(path)
        count, size = compile_cache.usage(path)
        print(f"{path}: {count} programs, {size / 2**20:.1f} MiB of at most {compile_cache.MAX_BYTES / 2**20:.0f} MiB")
    return 0
