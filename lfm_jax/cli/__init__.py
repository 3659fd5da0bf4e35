"""The `lfm` command: one verb a function, its flags from the function's signature (tyro)."""

from __future__ import annotations

import importlib
import itertools
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from lfm_jax.config import PRESETS, DType
from lfm_jax.engine.config import EngineConfig
from lfm_jax.sampling import Sampling
from lfm_jax.serve.limits import LIMITS, OFFLINE, Limits

if TYPE_CHECKING:
    from lfm_jax.model import LFM

    Preset = str
else:
    Preset = Literal[*sorted(PRESETS)]  # So that --help lists them.


PUBLISHED = Sampling(temperature=0.1, top_k=50, repetition_penalty=1.05)
"""As published for LFM2.5-350M."""
SERVER = EngineConfig(max_logprobs=20, prefix_cache_bytes=2**28)


def train(recipe: tyro.conf.Positional[Path]) -> int:
    """Train or resume a run: `lfm train RECIPE.yaml [--optimizer.peak-lr 1e-3 ...]`; every key is a flag."""
    return _train([str(recipe)])


def _train(args: list[str]) -> int:
    """Exit status: 0 at the run's end, `launch.STOPPED`, `launch.LOST` or `launch.FAILED`."""
    from lfm_jax import recipe
    from lfm_jax.train.config import TrainCommand
    from lfm_jax.train.launch import FAILED, LOST, STOPPED, start

    path = args[0] if args and not args[0].startswith("-") else None
    command = recipe.load_recipe(TrainCommand, path, args[1:] if path else args, prog="lfm train [RECIPE]")
    if command.launch.processes > 1:
        return start([sys.executable, "-m", "lfm_jax.cli", "train", *args], command.launch)
    from lfm_jax.train import processes
    from lfm_jax.train.loop import train as run

    processes.join(command.launch)
    try:
        result = run(command.run)
        status = 0 if result.step == command.run.steps else STOPPED
    except (ValueError, OSError) as error:
        if command.launch.many and os.environ.get("LFM_TRACEBACK"):  # Raised, it would wait for the others at the end.
            traceback.print_exc()
            status = FAILED
        else:
            status = _refuse(error)
    except Exception as error:
        if not command.launch.many:
            raise
        traceback.print_exc()
        status = LOST if processes.device_failed(error) else 1
    processes.leave(status)
    return status


def plan(recipe: tyro.conf.Positional[Path]) -> int:
    """What a run needs and costs on a machine: `lfm plan RECIPE.yaml --topology v5e:16x16`; every key is a flag."""
    return _plan([str(recipe)])


def _plan(args: list[str]) -> int:
    from lfm_jax import recipe
    from lfm_jax.plan import PlanConfig
    from lfm_jax.plan import plan as run

    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # Nothing runs here; a TPU or GPU need not be taken for it.
    path = args[0] if args and not args[0].startswith("-") else None
    config = recipe.load_recipe(PlanConfig, path, args[1:] if path else args, prog="lfm plan [RECIPE]")
    result = run(config)
    print(result.to_json() if config.format == "json" else result)
    result.check()
    return 0


def ablate(study: tyro.conf.Positional[Path]) -> int:
    """Run, resume or report an ablation study: `lfm ablate STUDY.yaml [SIZE.yaml] [--processes 2 ...]`.

    Later files win over earlier ones, and every key is a flag.
    """
    return _ablate([str(study)])


def _ablate(args: list[str]) -> int:
    from lfm_jax import recipe
    from lfm_jax.ablate.schedule import AblateConfig
    from lfm_jax.ablate.schedule import ablate as run

    files = list(itertools.takewhile(lambda arg: not arg.startswith("-"), args))
    config = recipe.load_recipe(AblateConfig, files, args[len(files) :], prog="lfm ablate STUDY [SIZE]")
    return run(config, args)


def generate(
    path: tyro.conf.Positional[Path],
    prompt: tyro.conf.Positional[tuple[str, ...]],
    /,
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = Sampling(),  # noqa: B008 (frozen)
    max_new_tokens: int = 128,
    stop: tuple[str, ...] = (),
    dtype: DType | None = None,
) -> int:
    """Continue one or more prompts and print the texts.

    Args:
      path: Hugging Face directory or run directory.
      prompt: one or more texts.
      sampling: how tokens are chosen.
      max_new_tokens: most tokens to add to a prompt.
      stop: texts that end a continuation.
      dtype: of parameters and computation; the stored one if left out.
    """
    from lfm_jax.infer.generate import generate as run
    from lfm_jax.infer.generate import stream

    if not prompt:
        raise ValueError("generate needs at least one prompt: lfm generate PATH 'some text'")
    model, tokenizer = _load(path, dtype)
    if len(prompt) == 1:
        print(prompt[0], end="", flush=True)
        pieces = stream(model, tokenizer, prompt[0], sampling=sampling, max_new_tokens=max_new_tokens, stop=stop)
        for piece in pieces:
            print(piece, end="", flush=True)
        print()
        return 0
    texts = run(model, tokenizer, list(prompt), sampling=sampling, max_new_tokens=max_new_tokens, stop=stop)
    for start, text in zip(prompt, texts, strict=True):
        print(f"{start}{text}\n")
    return 0


def chat(
    path: tyro.conf.Positional[Path],
    /,
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = PUBLISHED,
    system: str | None = None,
    max_new_tokens: int = 512,
    dtype: DType | None = None,
) -> int:
    """Talk with a model in the terminal, through its own chat template.

    Args:
      path: Hugging Face directory or run directory.
      sampling: how tokens are chosen; the defaults are those published for LFM2.5-350M.
      system: system message.
      max_new_tokens: longest reply.
      dtype: of parameters and computation; the stored one if left out.
    """
    from lfm_jax.convert.hf import chat_template
    from lfm_jax.infer.chat_loop import chat_loop
    from lfm_jax.text.chat import DEFAULT_TEMPLATE

    model, tokenizer = _load(path, dtype)
    template = chat_template(path) or DEFAULT_TEMPLATE
    chat_loop(model, tokenizer, template, system=system, sampling=sampling, max_new_tokens=max_new_tokens)
    return 0


def serve(
    path: tyro.conf.Positional[Path],
    /,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    sampling: Sampling = PUBLISHED,
    engine: EngineConfig = SERVER,
    limits: Limits = LIMITS,
    data: int = 1,
    tensor: int = 1,
    dtype: DType | None = None,
    drain_seconds: int = 60,
) -> int:
    """Serve a model over HTTP with the API of OpenAI, and a page to try it at /. Needs `lfm_jax[serve]`.

    With a key in the environment variable LFM_API_KEY, clients must send it.

    Args:
      path: Hugging Face directory or run directory.
      host: address to listen on; one that others reach needs a key.
      port: to listen on.
      name: of the model, to clients; the name of the directory if left out.
      sampling: for what a request does not say; the defaults are those published for LFM2.5-350M.
      engine: slots and limits of the engine.
      limits: of one request.
      data: replicas of the model.
      tensor: devices that each replica is split over.
      dtype: of parameters and computation; the stored one if left out.
      drain_seconds: how long what runs may take to end after SIGTERM.
    """
    launch = _serving("launch")
    launch.check_address(host, os.environ.get(launch.KEY_VARIABLE))
    service = launch.open_service(path, dtype, engine, (data, tensor))
    launch.serve(service, name or path.resolve().name, host, port, sampling, limits, drain_seconds)
    return 0


def batch(
    path: tyro.conf.Positional[Path],
    source: tyro.conf.Positional[Path],
    target: tyro.conf.Positional[Path],
    /,
    shard: str = "0/1",
    sampling: Sampling = PUBLISHED,
    engine: EngineConfig = SERVER,
    limits: Limits = OFFLINE,
    data: int = 1,
    tensor: int = 1,
    dtype: DType | None = None,
) -> int:
    """Answer a file of requests in OpenAI's batch format, one a line; the same command goes on. Needs `lfm_jax[serve]`.

    Exit status 1 if a line got an error; every line has an answer in any case.

    Args:
      path: Hugging Face directory or run directory.
      source: lines `{"custom_id": ..., "url": "/v1/chat/completions", "body": {...}}`.
      target: one line of answer for each.
      shard: I/N: only every N-th line from number I on, to spread a file over machines.
      sampling: for what a request does not say; the defaults are those published for LFM2.5-350M.
      engine: slots and limits of the engine.
      limits: of one line.
      data: replicas of the model.
      tensor: devices that each replica is split over.
      dtype: of parameters and computation; the stored one if left out.
    """
    run = _serving("batch")
    run.check_shard(shard)
    service = _serving("launch").open_service(path, dtype, engine, (data, tensor))
    bad = run.batch(service, path.resolve().name, source, target, shard=shard, sampling=sampling, limits=limits)
    print(f"{target}: every line is answered{f', {bad} with an error' if bad else ''}")
    return 1 if bad else 0


def _serving(module: Literal["launch", "batch"]) -> Any:
    try:
        return importlib.import_module(f"lfm_jax.serve.{module}")
    except ImportError as error:
        raise ValueError(f"{error.name} is not installed: pip install 'lfm_jax[serve]'") from None


def convert(
    src: tyro.conf.Positional[Path],
    dst: tyro.conf.Positional[Path],
    /,
    dtype: DType | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> int:
    """Write a checkpoint as a Hugging Face directory that `transformers` loads.

    Args:
      src: Hugging Face directory or run directory.
      dst: a new directory.
      dtype: of the written weights; the stored one if left out.
      max_shard_bytes: largest safetensors file; more weights become several files with an index.
    """
    from lfm_jax.convert.hf import convert as run
    from lfm_jax.convert.hf import save_hf

    if (src / "config.json").exists():
        run(src, dst, dtype=dtype, max_shard_bytes=max_shard_bytes)
    else:
        model, tokenizer = _load(src, dtype, need_tokenizer=False)
        save_hf(model, dst, tokenizer=tokenizer, source=src, max_shard_bytes=max_shard_bytes)
    print(f"wrote {dst}")
    return 0


def data(action: tyro.conf.Positional[Literal["build", "show"]]) -> int:
    """Build a dataset of packed rows from text, or look into one: `lfm data build --help`, `lfm data show --help`."""
    return _data([action])


def _data(args: list[str]) -> int:
    from lfm_jax.data import verbs

    if args[:1] == ["build"]:  # As with train, its flags come from a dataclass.
        return verbs.build(args[1:])
    return tyro.extras.subcommand_cli_from_dict(
        {"build": verbs.build_help, "show": verbs.show}, args=args, prog="lfm data",
        description="Build a dataset of packed rows from text, or look into one.",
    )


def selfcheck() -> int:
    """Check every kernel and collective against its reference on this device, and print a table.

    Under two minutes on two CPU cores. Exit status 1 if anything is off.
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
        data: packed tokens a second from shards, beside packing text on the fly; serve: the engine's tokens a second
        beside transformers or a roofline, and decoding by context.
      preset: shape for the model, train and serve suites.
      repeats: timed runs of which the median counts.
      gguf: file of llama.cpp with a model of the preset's shape, F32: the serve suite decodes beside it too.
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


def _load(path: Path, dtype: str | None, *, need_tokenizer: bool = True) -> tuple[LFM, Any]:
    from lfm_jax.loading import load

    model, tokenizer = load(path, dtype)
    if tokenizer is None and need_tokenizer:
        raise ValueError(f"{path} has no tokenizer.json; put the checkpoint's own beside its weights")
    return model, tokenizer


VERBS = {
    "train": train, "plan": plan, "data": data, "generate": generate, "chat": chat, "convert": convert, "bench": bench,
    "selfcheck": selfcheck, "ablate": ablate, "serve": serve, "batch": batch,
}
DATACLASS_VERBS = {"train": _train, "plan": _plan, "data": _data, "ablate": _ablate}
"""Verbs whose flags come from a config dataclass, not from the function's signature."""


def main(argv: list[str] | None = None) -> None:
    """Entry point of the `lfm` command; exits with the verb's status, 2 on bad input."""
    args = sys.argv[1:] if argv is None else argv
    try:
        if args and args[0] in DATACLASS_VERBS:
            status = DATACLASS_VERBS[args[0]](args[1:])
        else:
            status = tyro.extras.subcommand_cli_from_dict(VERBS, args=args, prog="lfm")
    except (ValueError, OSError) as error:
        status = _refuse(error)
    sys.exit(status)


def _refuse(error: Exception) -> int:
    """One clear line; LFM_TRACEBACK=1 shows where it comes from."""
    if os.environ.get("LFM_TRACEBACK"):
        raise error
    print(f"lfm: {error}", file=sys.stderr)
    return 2
