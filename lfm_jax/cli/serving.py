"""`lfm serve`, `lfm batch`."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, Literal

import tyro

from lfm_jax.cli.arguments import ModelName
from lfm_jax.config import DType, Quantize
from lfm_jax.convert.hub import model_name
from lfm_jax.engine.config import EngineConfig
from lfm_jax.sampling import PUBLISHED, Sampling
from lfm_jax.serve.limits import LIMITS, OFFLINE, Limits

SERVER = EngineConfig(slots=(), max_logprobs=20, prefix_cache_bytes=2**28)


def serve(
    path: ModelName,
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
    quantize: Quantize | None = None,
    adapter: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    warm_up: Literal["first", "all"] = "first",
    drain_seconds: int = 60,
    plain_contents: bool = False,
    cors_origins: tuple[str, ...] = (),
) -> int:
    """Serve a model over HTTP with the API of OpenAI, and a page to try it at /. Needs `lfm_jax[serve]`.

    An encoder answers /v1/embeddings and /v1/rerank. With a key in the environment variable LFM_API_KEY, clients must
    send it; with one in LFM_ADMIN_KEY, whoever has it may add and remove adapters (--engine.adapters).

    Args:
      path: Hugging Face directory, run directory, GGUF file, or Hub id (OWNER/NAME or OWNER/NAME@REVISION).
      host: address to listen on; one that other machines can reach needs a key.
      port: port to listen on; 0 takes any free one.
      name: name of the model for clients; if left out that of the directory, or the NAME of a Hub id.
      sampling: default sampling parameters; those published for LFM2.5-350M if left out.
      engine: slots and limits of the engine.
      limits: limits of one request.
      data: replicas of the model.
      tensor: devices that each replica is split over.
      dtype: of parameters and computation; the stored one if left out.
      quantize: keep matrices in a narrow type; w8a8 suits a CPU, int8 and int4 other devices.
      adapter: NAME=DIR, once for each: an adapter (PEFT's files) that requests name as their model, beside the model
        itself. One DIR alone is merged into the weights.
      warm_up: programs to compile before it serves: what a first request needs, and the others beside the work, or all.
      drain_seconds: how long what runs may take to end after SIGTERM.
      plain_contents: encode the names of special tokens inside messages as plain text, for texts of strangers.
      cors_origins: origins whose pages may use the server, as https://example.org; * is any.
    """
    from lfm_jax.loading import local

    launch = _serving("launch")
    address = launch.listen(host, port)  # What can be refused is refused before anything is loaded.
    directory = local(path)
    if launch.is_encoder(directory):
        from lfm_jax.infer.embed import load_encoder

        if (sampling, engine, data, tensor, quantize, adapter, warm_up, plain_contents) != (
            PUBLISHED, SERVER, 1, 1, None, (), "first", False
        ):
            raise ValueError(f"{path} is an encoder, which has no slots, samples nothing and runs on one device: leave "
                             "out --sampling, --engine, --data, --tensor, --quantize, --adapter, --warm-up and "
                             "--plain-contents")
        encoder = load_encoder(directory, dtype)
        launch.serve_encoder(encoder, name or model_name(directory), address, limits, drain_seconds, cors_origins)
        return 0
    name = name or model_name(directory)
    merged, named = _serving("adapters").split_adapters(adapter, name)
    service = launch.open_service(directory, dtype, engine, (data, tensor), quantize=quantize, adapter=merged,
                                  adapters=named, everything=warm_up == "all", plain_contents=plain_contents)
    launch.serve(service, name, address, sampling, limits, drain_seconds, cors_origins)
    return 0


def batch(
    path: ModelName,
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
    quantize: Quantize | None = None,
    adapter: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    plain_contents: bool = False,
) -> int:
    """Answer a file of requests in OpenAI's batch format, one per line. Needs `lfm_jax[serve]`.

    The same command continues where an earlier one stopped. The exit status is 1 if a line got an error; every line
    gets an answer in any case.

    Args:
      path: Hugging Face directory, run directory, GGUF file, or Hub id (OWNER/NAME or OWNER/NAME@REVISION).
      source: lines `{"custom_id": ..., "url": "/v1/chat/completions", "body": {...}}`.
      target: one line of answer for each.
      shard: I/N answers only every N-th line from number I on, to spread a file over machines.
      sampling: default sampling parameters; those published for LFM2.5-350M if left out.
      engine: slots and limits of the engine.
      limits: limits of one line.
      data: replicas of the model.
      tensor: devices that each replica is split over.
      dtype: dtype of parameters and computation; the stored one if left out.
      quantize: keep matrices in a narrow type; w8a8 suits a CPU, int8 and int4 other devices.
      adapter: NAME=DIR, once for each: an adapter (PEFT's files) that requests name as their model, beside the model
        itself. One DIR alone is merged into the weights.
      plain_contents: encode the names of special tokens inside messages as plain text, for texts of strangers.
    """
    from lfm_jax.loading import local, recognise

    run, launch = _serving("batch"), _serving("launch")
    directory = local(path)
    recognise(directory)  # Before a target is made.
    name = model_name(directory)
    merged, named = _serving("adapters").split_adapters(adapter, name)

    def open_service() -> Any:
        return launch.open_service(directory, dtype, engine, (data, tensor), quantize=quantize, adapter=merged,
                                   adapters=named, plain_contents=plain_contents)

    bad = run.batch(open_service, name, source, target, shard=shard, sampling=sampling, limits=limits)
    print(f"{target}: every line is answered{f', {bad} with an error' if bad else ''}")
    return 1 if bad else 0


def _serving(module: Literal["adapters", "batch", "launch"]) -> Any:
    try:
        return importlib.import_module(f"lfm_jax.serve.{module}")
    except ImportError as error:
        raise ValueError(f"{error.name} is not installed: pip install 'lfm_jax[serve]'") from None
