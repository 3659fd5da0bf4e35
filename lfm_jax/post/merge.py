"""`lfm.merge`: checkpoints of one architecture merged into one, tensor by tensor."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lfm_jax.config import ModelConfig
from lfm_jax.convert import sidecars
from lfm_jax.convert.families import family_of
from lfm_jax.convert.hf import MAX_SHARD_BYTES, arrays_of, inspect, output_problems, write_hf
from lfm_jax.convert.sources import Source, cast, common_dtype
from lfm_jax.convert.weights import Group, groups
from lfm_jax.kinds import FEED_FORWARDS
from lfm_jax.loading import HUGGING_FACE, local, recognise
from lfm_jax.post.merge_methods import ELECTING, METHODS, Recipe, Tensors, buffer_weights, weighted_mean
from lfm_jax.problems import raise_problems
from lfm_jax.recipe import to_plain
from lfm_jax.train.run_dir import NUMERICS

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Arrays = Iterator[tuple[str, np.ndarray]]
PerModel = float | Sequence[float] | None
TELL_SECONDS = 5.0


class Opened(NamedTuple):
    """A model that is merged, checked; its weights are read one at a time."""

    name: str
    config: ModelConfig
    tokenizer: Tokenizer | None
    beside: AbstractContextManager[Path]
    """Gives the directory with its tokenizer and the files beside it."""
    arrays: Callable[[list[Group]], Arrays]
    """Reads the tensors of a table, in its order."""


def merge(
    path: str | os.PathLike, models: Sequence[str | os.PathLike], method: str, *, base: str | os.PathLike | None = None,
    weights: PerModel = None, density: PerModel = None, t: float | None = None, seed: int | None = None,
    dtype: Any = None, max_shard_bytes: int = MAX_SHARD_BYTES, tell: Callable[[str], None] | None = None,
) -> None:
    """Merges models of one architecture and one tokenizer, and writes a Hugging Face directory, whole or not at all.

    Of Hugging Face directories one tensor of each is in memory at a time; other models are loaded first. The arithmetic
    is float32. Buffers (the bias of experts, which no gradient trains) become the mean of the models, weighted by the
    size of their weights, in every method.

    Args:
      path: a new or empty directory. Config, tokenizer and the files beside them are those of the base, else of the
        first model.
      models: what `lfm.load` takes.
      method: `linear`, the weighted mean; `slerp`, along the arc between two models; or, to what fine-tuning added to a
        base: `task_arithmetic`, base + the weighted sum of the differences; `ties`, base + the weighted mean of the
        trimmed differences that have the elected sign; `dare_linear` and `dare_ties`, as these two, of differences that
        are dropped by chance and rescaled in place of trimmed. The formulas: `lfm_jax.post.merge_methods`.
      base: the model that the others were fine-tuned from; all but `linear` and `slerp` need it.
      weights: one for each model, or one for all; 1 if left out. All but `slerp` read them.
      density: the share of each difference that is kept, over 0 and at most 1: one for each model, or one for all.
        `ties`, `dare_linear` and `dare_ties` need it.
      t: place between the two models of `slerp`, from 0, the first, to 1; 0.5 if left out.
      seed: of what `dare_linear` and `dare_ties` drop; 0 if left out.
      dtype: float32, bfloat16 or float16; None for that of the base, else of the first model.
      max_shard_bytes: larger weights are split into several files with an index.
      tell: is told how far it is.

    Raises:
      ValueError: the options do not fit the method, a model cannot be read, the models differ in config or tokenizer,
        or the directory is not empty: all in one message, before anything is written. Or weights are not finite: all
        such tensors in one message, and nothing is left behind.
    """
    recipe, problems = _recipe(method, len(models), base is not None, weights, density, t, seed)
    kept, found = common_dtype(Source({}, lambda name: np.zeros(())), dtype)
    problems += found
    opened: list[Opened] = []
    for name in map(str, models if base is None else [base, *models]):
        # The dtype of the first is that of the result; the others may mix theirs.
        model, found = _open(name, "float32" if opened else kept)
        problems += [f"{name}: {problem}" for problem in found]
        opened += [] if model is None else [model]
    problems += [line for other in opened[1:] for line in _differences(opened[0], other)]
    with opened[0].beside if opened else contextlib.nullcontext() as directory:
        raise_problems(f"cannot merge into {path}", problems + output_problems(path, directory, max_shard_bytes))
        first = opened[0]
        config = first.config.replace(param_dtype=kept or first.config.param_dtype)
        arrays = _merged(opened, method, recipe, base is not None, config, tell)
        write_hf(path, config, arrays, tokenizer=first.tokenizer, source=directory, max_shard_bytes=max_shard_bytes)


# -------------------------------------------------------------------- checks


def _recipe(
    method: str, count: int, has_base: bool, weights: PerModel, density: PerModel, t: float | None, seed: int | None
) -> tuple[Recipe, list[str]]:
    """Returns the options with defaults filled in, and what is wrong with them."""
    problems: list[str] = []
    if method not in METHODS:
        return Recipe(), [f"method is {method!r}; choose one of {', '.join(METHODS)}"]
    reads = METHODS[method].reads
    given = {"base": has_base or None, "weights": weights, "density": density, "t": t, "seed": seed}
    problems += [f"{method} does not read {name}; leave it out"
                 for name, value in given.items() if value is not None and name not in reads]
    if "base" in reads and not has_base:
        problems.append(f"{method} needs base, the model that the others were fine-tuned from")
    if "density" in reads and density is None:
        problems.append(f"{method} needs density, the share of each difference that is kept, such as 0.5")
    if method == "slerp" and count != 2:
        problems.append(f"slerp goes between two models; models has {count}")
    elif count < (least := 2 if method == "linear" else 1):
        problems.append(f"{method} needs at least {least} of models; models has {count}")
    recipe = Recipe(
        weights=_per_model("weights", weights, count, problems) if "weights" in reads else (),
        density=_per_model("density", density, count, problems) if "density" in reads else (),
        t=0.5 if t is None else t, seed=0 if seed is None else seed)
    problems += _value_problems(method, recipe)
    return recipe, problems


def _per_model(name: str, value: PerModel, count: int, problems: list[str]) -> tuple[float, ...]:
    values = (1.0,) if value is None else tuple(map(float, np.atleast_1d(value)))
    if len(values) not in (1, count):
        problems.append(f"{name} has {len(values)} numbers for {count} models; give one for each, or one for all")
    return values * count if len(values) == 1 else values


def _value_problems(method: str, recipe: Recipe) -> list[str]:
    weights, problems = recipe.weights, []
    if not all(map(math.isfinite, weights)):
        problems.append(f"weights are {_listed(weights)}; they must be finite")
    elif method in ELECTING and min(weights, default=1) <= 0:
        problems.append(f"weights are {_listed(weights)}; those of {method}, shares of a mean, must be above 0")
    elif method == "linear" and weights and abs(sum(weights)) < 1e-6 * max(1e-6, *map(abs, weights)):
        problems.append(f"weights are {_listed(weights)}, which sum to 0; linear divides by their sum")
    elif weights and not any(weights):
        problems.append("weights are all 0; nothing would be merged")
    if not all(0 < share <= 1 for share in recipe.density):
        problems.append(f"density is {_listed(recipe.density)}; it must be above 0 and at most 1")
    if not 0 <= recipe.t <= 1:
        problems.append(f"t is {recipe.t}; it must be from 0, the first model, to 1, the second")
    if type(recipe.seed) is not int or recipe.seed < 0:
        problems.append(f"seed is {recipe.seed!r}; it must be a whole number of at least 0")
    return problems


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _open(name: str, dtype: str | None) -> tuple[Opened | None, list[str]]:
    """Opens a model; returns it, or None and its problems."""
    try:
        path = local(name)
        source = recognise(path)
        if source is not HUGGING_FACE:
            model, tokenizer = source.load(path, None, None)
            weights = family_of(model.config).weights
            return Opened(name, model.config, tokenizer, source.beside(path), lambda _: arrays_of(model, weights)), []
    except ValueError as error:
        return None, [str(error)]
    checkpoint, problems = inspect(path, dtype)
    tokenizer, found = sidecars.read_tokenizer(path)
    problems += found
    if os.path.lexists(path / sidecars.DENSE):
        problems.append(f"it has a projection of its vectors, {sidecars.DENSE}, which cannot be merged")
    if checkpoint is None or problems:
        return None, problems
    exact = dataclasses.replace(checkpoint, config=checkpoint.config.replace(param_dtype="float32"))
    return Opened(name, checkpoint.config, tokenizer, source.beside(path), exact.arrays), []


def _differences(first: Opened, other: Opened) -> list[str]:
    """Returns why two models cannot be merged: fields of config that change the network, and parts of tokenizers."""
    ours, theirs = to_plain(first.config), to_plain(other.config)
    lines = [f"{other.name}: {field} is {theirs[field]!r}, but {ours[field]!r} in {first.name}"
             for field in ours if field not in NUMERICS and ours[field] != theirs[field]]
    here, there = _tokenizer_parts(first.tokenizer), _tokenizer_parts(other.tokenizer)
    if not here or not there:
        if here != there:
            have, lack = (first, other) if here else (other, first)
            lines.append(f"{lack.name}: it has no tokenizer, but {have.name} has one; copy its tokenizer.json if it is "
                         "the same")
    elif differing := [part for part in here if here[part] != there[part]]:
        lines.append(f"{other.name}: its tokenizer differs from that of {first.name} in {', '.join(differing)}, so "
                     "that the same ids mean different things; merge models with one tokenizer")
    return lines


def _tokenizer_parts(tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Returns what decides the ids of a text; what templates of special tokens do around it may differ."""
    if tokenizer is None:
        return {}
    held = json.loads(tokenizer.to_str())
    added = {token["content"]: token["id"] for token in held["added_tokens"]}
    parts = {part: held[part] for part in ("model", "normalizer", "pre_tokenizer")}
    return {"added tokens": added} | parts


# -------------------------------------------------------------------- merging


def _merged(
    opened: list[Opened], method: str, recipe: Recipe, has_base: bool, config: ModelConfig,
    tell: Callable[[str], None] | None,
) -> Arrays:
    """Yields the tensors of the result. Once a weight is not finite it yields no more, reads on and raises for all."""
    table = groups(family_of(config).weights, config.replace(param_dtype="float32"))
    buffers = {name for row in FEED_FORWARDS.kinds() for name in row.buffers}
    tensors = [(name, group) for group in table for name in group.names]
    streams = [model.arrays(table) for model in opened]
    combine, problems, told = METHODS[method].combine, [], time.monotonic()
    dtypes = {name: group.dtype for group in groups(family_of(config).weights, config) for name in group.names}

    def merged(name: str, is_buffer: bool) -> np.ndarray | None:
        # A function of its own, so that nothing here is held while the next tensors are read.
        arrays = [_next(stream, name) for stream in streams]
        wrong = [f"{model.name}: {name} holds NaN or infinity; its training or its file is broken"
                 for model, array in zip(opened, arrays, strict=True) if not np.isfinite(array).all()]
        problems.extend(wrong)
        if problems:
            return None
        x = Tensors(name, arrays[0] if has_base else np.zeros(()), arrays[has_base:])
        with np.errstate(over="ignore", invalid="ignore"):
            array = weighted_mean(x.models, buffer_weights(recipe)) if is_buffer else combine(x, recipe)
        if not np.isfinite(array).all():
            raise ValueError(f"{name}: its merged numbers are too large for float32; use smaller weights")
        return cast(name, array, dtypes[name])

    for i, (name, group) in enumerate(tensors, 1):
        array = merged(name, any(path[-1] in buffers for path in group.paths))
        if array is not None:
            yield name, array
        del array
        if tell is not None and time.monotonic() - told > TELL_SECONDS:
            told = time.monotonic()
            tell(f"{i} of {len(tensors)} tensors are merged")
    raise_problems("weights that are not finite cannot be merged", problems)


def _next(stream: Arrays, name: str) -> np.ndarray:
    given, array = next(stream)
    assert given == name
    return np.asarray(array, np.float32)
