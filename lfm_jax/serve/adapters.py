"""Adapters of a server: those that it is started with, and the routes that add and remove others, which have vLLM's
names."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter
from fastapi.responses import PlainTextResponse
from pydantic import Field

from lfm_jax.adapters.peft import Adapter, load_adapter
from lfm_jax.adapters.trees import for_place, largest_rank
from lfm_jax.config import ModelConfig
from lfm_jax.engine.config import EngineConfig
from lfm_jax.engine.engine import Engine
from lfm_jax.engine.request import UnknownAdapterError
from lfm_jax.files import say
from lfm_jax.problems import raise_problems
from lfm_jax.serve.errors import RefusalError, errors
from lfm_jax.serve.fields import Body, Ignored, Refused
from lfm_jax.serve.gate import ADMIN

OFF = "start it with --engine.adapters N and a key in LFM_ADMIN_KEY"


def split_adapters(given: Sequence[str], base: str) -> tuple[Path | None, dict[str, Path]]:
    """Returns the adapter to merge, and those to serve by their names, of the values of `--adapter`.

    A value is NAME=DIR, or the DIR of one to merge. A `/` before the first `=` belongs to a directory.

    Args:
      base: name of the model.

    Raises:
      ValueError: names that are empty, given twice or the model's; several adapters to merge, or others beside one.
    """
    parts = [value.partition("=") for value in given]
    merged = [value for value, (name, equals, _) in zip(given, parts, strict=True) if not equals or "/" in name]
    named = [(name, path) for name, equals, path in parts if equals and "/" not in name]
    names = [name for name, _ in named]
    problems = [f"{name}={path} has no {'directory' if name else 'name'}; write NAME=DIR"
                for name, path in named if not (name and path)]
    problems += [f"{name!r} is given twice" for name in dict.fromkeys(names) if names.count(name) > 1]
    if base in names:
        problems.append(f"{base!r} is the name of the model; choose another")
    if merged and len(given) > 1:
        problems.append(f"{merged[0]} has no name, so it is merged into the weights, and no other was trained beside "
                        "these; write NAME=DIR for each to serve them side by side")
    raise_problems("--adapter is not valid", problems)
    return Path(merged[0]) if merged else None, {name: Path(path) for name, path in named}


def read_adapters(
    named: Mapping[str, Path], model: ModelConfig, engine: EngineConfig
) -> tuple[EngineConfig, dict[str, Adapter]]:
    """Reads adapters of a model; returns them with the engine's config, which gets places for them if it has none.

    Raises:
      ValueError: what cannot be read or has no place; one message says all.
    """
    found: dict[str, Adapter] = {}
    problems = []
    for name, path in named.items():
        try:
            found[name] = load_adapter(path, model)
        except (ValueError, OSError) as error:
            problems.append(f"{name}: {error}")
    if not engine.adapters:
        engine = dataclasses.replace(engine, adapters=len(named))
        if engine.adapter_rank == EngineConfig.adapter_rank:  # Another one was asked for, for adapters to come.
            ranks = [largest_rank(model, one.lora) for one in found.values()]
            engine = dataclasses.replace(engine, adapter_rank=max(ranks, default=1))
    if len(named) > engine.adapters:
        problems.append(f"{len(named)} adapters are named, and there are {engine.adapters} places (engine.adapters)")
    for name, one in found.items():
        try:
            for_place(model, one.lora, one.weights, engine.adapter_rank)
        except ValueError as error:
            problems.append(f"{name}: {error}")
    raise_problems("adapters cannot be served", problems, most=None)
    return engine, found


class LoadBody(Body):
    """POST /v1/load_lora_adapter."""

    lora_name: Annotated[str, Field(min_length=1, max_length=256)] = Field(description="what requests call it")
    lora_path: Annotated[str, Field(min_length=1)] = Field(description="a directory of the server's machine")
    load_inplace: Annotated[Any, Refused("unload the old one first")] = None


class UnloadBody(Body):
    """POST /v1/unload_lora_adapter."""

    lora_name: str
    lora_int_id: Annotated[Any, Ignored("adapters go by their names")] = None


def adapter_routes(engine: Engine, base: str) -> APIRouter:
    """Makes the routes that add adapters to a running engine and remove them.

    Args:
      base: name of the model.
    """
    router = APIRouter()
    load_path, unload_path = ADMIN

    @router.post(load_path, response_class=PlainTextResponse, responses=errors(400, 401, 413))
    async def load(body: LoadBody) -> str:
        def take() -> None:
            if body.lora_name == base:
                raise ValueError(f"{base!r} is the name of the model; choose another")
            engine.load_adapter(body.lora_name, load_adapter(body.lora_path, engine.model_config), body.lora_path)

        try:
            await asyncio.to_thread(take)
        except (ValueError, OSError) as error:
            raise RefusalError(400, str(error)) from None
        say(f"adapter {body.lora_name!r} is loaded from {body.lora_path}")
        return f"Success: LoRA adapter '{body.lora_name}' added successfully."

    @router.post(unload_path, response_class=PlainTextResponse, responses=errors(400, 401, 404, 413))
    async def unload(body: UnloadBody) -> str:
        try:
            engine.unload_adapter(body.lora_name)
        except UnknownAdapterError as error:
            raise RefusalError(404, str(error), "model_not_found", param="lora_name") from None
        say(f"adapter {body.lora_name!r} is unloaded")
        return f"Success: LoRA adapter '{body.lora_name}' removed successfully."

    return router
