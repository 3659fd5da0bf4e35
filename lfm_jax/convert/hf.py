"""Loads weights from `transformers` and saves weights for it: state dicts in memory, directories on disk.

Everything folds over the rows of the model's family (`families`). A source of weights names its tensors and reads
them one at a time, so that nothing holds a second copy of the model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import operator
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lfm_jax.config import ModelConfig
from lfm_jax.convert import safetensors_io as files
from lfm_jax.convert import sidecars
from lfm_jax.convert.families import config_from_hf, config_to_hf, families_of, family_of, named_family
from lfm_jax.convert.sidecars import chat_template
from lfm_jax.convert.sources import Source, Spec, cast, check, common_dtype
from lfm_jax.convert.weights import Group, Weight, groups, leaf, misfits
from lfm_jax.model import LFM, abstract_model
from lfm_jax.problems import raise_problems
from lfm_jax.quant.model import keeper
from lfm_jax.weight_kinds import WeightKind

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["chat_template", "convert", "from_state_dict", "load_hf", "save_hf", "tensors", "to_state_dict", "write_hf"]

MAX_SHARD_BYTES = 5_000_000_000


def tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns the name and shape of every tensor of a model, in the order of a checkpoint file.

    Raises:
      ValueError: no family can express the model, so its tensors have no names.
    """
    return tensors_of(family_of(config).weights, config)


def tensors_of(weights: tuple[Weight, ...], config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns the name and shape of every tensor of a table."""
    return {name: group.tensor.shape for group in groups(weights, config) for name in group.names}


def _groups(config: ModelConfig) -> list[Group]:
    return groups(family_of(config).weights, config)


def _specs(config: ModelConfig) -> dict[str, Spec]:
    return {name: Spec(group.tensor.shape, group.dtype) for group in _groups(config) for name in group.names}


def _apart(weights: tuple[Weight, ...], config: ModelConfig) -> set[str]:
    """The tensors that have a dtype of their own."""
    return {name for group in groups(weights, config) if group.own_dtype for name in group.names}


def fitting_groups(weights: tuple[Weight, ...], config: ModelConfig, params: Any) -> list[Group]:
    """Returns the tensors of a model; raises ValueError if they do not make exactly these parameters."""
    table = groups(weights, config)
    raise_problems("the tensors of the format are not this model", misfits(table, params), most=None)
    return table


# -------------------------------------------------------------------- in memory


def from_state_dict(state_dict: Mapping[str, Any], config: ModelConfig) -> LFM:
    """Makes a model with the weights of the `state_dict()` of a PyTorch model, for example `Lfm2ForCausalLM`.

    Args:
      state_dict: name in a checkpoint file -> NumPy array or PyTorch tensor of float32, bfloat16 or float16. The values
        are copied, bit for bit if they have `config.param_dtype` already, else rounded to it. A tied model may have
        `lm_head.weight` if it equals the embedding.
      config: the config of the model.

    Raises:
      ValueError: tensors are missing, unexpected, or of a wrong shape or dtype; the message lists them all.
    """
    specs = {
        name: Spec(tuple(value.shape), str(value.dtype).removeprefix("torch.")) for name, value in state_dict.items()
    }
    source = Source(specs, lambda name: _as_numpy(state_dict[name]))
    # By the names in it: several families may express the model, and a dict with the names of files is read too.
    able = families_of(config) or [family_of(config)]
    tables = [table for family in able for table in (family.in_memory, family.weights)]
    weights = max(tables, key=lambda table: len(tensors_of(table, config).keys() & state_dict.keys()))
    raise_problems("the state dict is not this model", check(source, weights, config), most=None)
    return build(config, source.read, weights)


def to_state_dict(model: LFM) -> dict[str, np.ndarray]:
    """Returns copies of the weights with their HF names and layout, in the dtype that they are stored in.

    As in a checkpoint file, there is no tied head; load them with `load_state_dict(..., strict=False)`.

    Raises:
      ValueError: the model has a feature that no family in `transformers` can express.
    """
    return {name: np.array(array, order="C") for name, array in arrays_of(model, family_of(model.config).in_memory)}


def _as_numpy(value: Any) -> np.ndarray:
    if not hasattr(value, "detach"):
        return np.asarray(value)
    value = value.detach().cpu().contiguous()
    if str(value.dtype) != "torch.bfloat16":
        return value.numpy()
    # PyTorch cannot convert bfloat16 to NumPy: the bits are passed as int16. A caller with a tensor has imported torch.
    return value.view(sys.modules["torch"].int16).numpy().view(jnp.bfloat16)


def build(
    config: ModelConfig, read: Callable[[str], np.ndarray], weights: tuple[Weight, ...], quantize: str | None = None
) -> LFM:
    """Makes a model and reads every parameter by its name in the file, without initialising any first."""
    graphdef, params = abstract_model(config)
    # A copy of its own, which the device may use as it is; nothing is compiled for it.
    keep = keeper(config, quantize) if quantize else lambda _, array: jax.device_put(np.array(array, order="C"))
    for group in fitting_groups(weights, config, params):
        made = group.to_leaves(cast(name, read(name), group.dtype) for name in group.names)
        for path, array in zip(group.paths, made, strict=True):
            *parents, last = path
            functools.reduce(operator.getitem, parents, params)[last] = keep(path, array)
    return nnx.merge(graphdef, params)


def stored(model: LFM, weights: tuple[Weight, ...]) -> Iterator[tuple[Group, list[jax.Array | WeightKind]]]:
    """Yields the rows of a table with the weights of a model that each holds."""
    params: Any = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    for group in fitting_groups(weights, model.config, params):
        yield group, [leaf(params, path) for path in group.paths]


def arrays_of(model: LFM, weights: tuple[Weight, ...]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the tensors of a table, in the dtype that they are stored in."""
    for group, leaves in stored(model, weights):
        arrays = (np.asarray(w.astype(w.dtype)) for w in leaves)
        yield from zip(group.names, group.to_tensors(arrays), strict=True)


# -------------------------------------------------------------------- directories


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model in files, checked; its weights are read one at a time."""

    config: ModelConfig
    read: Callable[[str], np.ndarray]
    weights: tuple[Weight, ...]
    """The table of the family that the file names."""

    def arrays(self, written: list[Group]) -> Iterator[tuple[str, np.ndarray]]:
        """Yields the tensors of a table, which may be that of another format that can express the model."""
        if {name for group in written for name in group.names} == tensors_of(self.weights, self.config).keys():
            for group in written:
                for name in group.names:
                    yield name, cast(name, self.read(name), group.dtype)
            return
        places = {path: (group, i) for group in groups(self.weights, self.config) for i, path in enumerate(group.paths)}
        for group in written:
            leaves = []
            for path in group.paths:
                held, i = places[path]
                leaves.append(held.to_leaves(cast(name, self.read(name), held.dtype) for name in held.names)[i])
            yield from zip(group.names, group.to_tensors(leaves), strict=True)


def inspect(path: Path, dtype: Any) -> tuple[Checkpoint | None, list[str]]:
    """Checks an HF directory completely, before any weight is read; returns the checkpoint, or None and its
    problems."""
    if not path.is_dir():
        if path.name.endswith(files.PICKLES):
            return None, ["this is a pickle file, and opening one runs the code in it; expected a directory with "
                          "config.json and model.safetensors"]
        return None, ["this is a file; expected a directory with config.json and model.safetensors" if path.is_file()
                      else "there is no such directory"]
    hf, problems = files.read_json(path, "config.json")
    source, found = files.open_directory(path)
    problems += found
    config, weights = None, ()
    if hf:
        try:
            config = config_from_hf(hf, param_dtype="float32", dtype="float32")
            weights = named_family(hf).weights
        except (ValueError, TypeError, ArithmeticError, AttributeError) as e:
            problems.append(f"config.json: {str(e).removeprefix('config.json ')}")
    # The dtype is that of the tensors, not of the config, or float32 if theirs is not known.
    kept, found = common_dtype(source, dtype, _apart(weights, config) if config else frozenset())
    problems += found
    if config is not None and kept is not None:
        config = config.replace(param_dtype=kept, dtype=kept)
    # If no file could be read, that is the problem, not that every tensor is missing.
    if config is not None and (source.specs or not problems):
        problems += check(source, weights, config)
    return (None if config is None or problems else Checkpoint(config, source.read, weights)), problems


def load_hf(
    path: str | os.PathLike, dtype: Any = None, quantize: str | None = None
) -> tuple[LFM, Tokenizer | None]:
    """Loads a directory in Hugging Face format, tensor by tensor.

    Args:
      path: a directory with config.json, model.safetensors (or shards and their index), perhaps tokenizer.json.
      dtype: dtype of parameters and activations: float32, bfloat16 or float16. None keeps the stored one, bit for bit.
      quantize: as for `lfm.load`.

    Returns:
      (model, tokenizer); the tokenizer is None if there is no tokenizer.json.

    Raises:
      ValueError: the directory is not a valid checkpoint; the message lists all problems, before any weight is read.
    """
    path = Path(path)
    checkpoint, problems = inspect(path, dtype)
    tokenizer, found = sidecars.read_tokenizer(path)
    raise_problems(f"cannot load {path}", problems + found, most=None)
    assert checkpoint is not None
    config = ending_as_generated(checkpoint.config, path)
    return build(config, checkpoint.read, checkpoint.weights, quantize), tokenizer


def hf_config(path: Path) -> ModelConfig:
    """Returns the config of the model that `load_hf` loads, before any weight is read; raises as that does."""
    checkpoint, problems = inspect(path, None)
    raise_problems(f"cannot load {path}", problems, most=None)
    assert checkpoint is not None
    return ending_as_generated(checkpoint.config, path)


def ending_as_generated(config: ModelConfig, path: Path) -> ModelConfig:
    """Returns the config with the eos ids of an HF directory's generation_config.json too, as transformers has them."""
    more = [i for i in sidecars.generation_eos_ids(path) if i < config.vocab_size]
    return config.replace(eos_ids=tuple(dict.fromkeys([*config.eos_ids, *more])))


def save_hf(
    model: LFM, path: str | os.PathLike, tokenizer: Tokenizer | None = None, *,
    source: str | os.PathLike | None = None, max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a directory that `transformers` loads without code of ours.

    It appears whole or not at all: it is written beside its place under another name, then renamed.

    Args:
      model: its parameters are written in their dtype.
      path: a new or empty directory.
      tokenizer: written as tokenizer.json with a tokenizer_config.json that `AutoTokenizer` reads.
      source: an HF directory whose tokenizer, chat template and generation_config.json are copied as they are; a
        different `tokenizer` replaces the files of its own.
      max_shard_bytes: larger weights are split into several files with an index.

    Raises:
      ValueError: no family can express the model; or, all in one message, its parameters have an unsupported dtype or
        several, the destination is not empty, `source` is not usable.
    """
    weights = family_of(model.config).weights
    specs = {name: Spec(group.tensor.shape, " and ".join(sorted({array.dtype.name for array in leaves})))
             for group, leaves in stored(model, weights) for name in group.names}
    held = Source(specs, _unreadable)
    kept, problems = common_dtype(held, None, _apart(weights, model.config))
    problems += check(held, weights, model.config) + _output_problems(path, source, max_shard_bytes)
    raise_problems(f"cannot save to {path}", problems, most=None)
    config = model.config.replace(param_dtype=kept)
    arrays = arrays_of(model, weights)
    write_hf(path, config, arrays, tokenizer=tokenizer, source=source, max_shard_bytes=max_shard_bytes)


def convert(
    src: str | os.PathLike, dst: str | os.PathLike, dtype: Any = None, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Checks an HF directory and writes it again, with one style of config and perhaps another dtype or shard size.

    One tensor is in memory at a time. The files beside the weights are copied as they are.

    Args:
      src: a directory in Hugging Face format.
      dst: a new or empty directory.
      dtype: float32, bfloat16 or float16; None keeps the stored one, bit for bit.
      max_shard_bytes: larger weights are split into several files with an index.

    Raises:
      ValueError: either directory has problems, all in one message and before any weight is read; or a value is too
        large for `dtype`, and nothing is left behind.
    """
    checkpoint, problems = inspect(Path(src), dtype)
    source = src if Path(src).is_dir() else None
    problems += _output_problems(dst, source, max_shard_bytes)
    raise_problems(f"cannot convert {src} to {dst}", problems, most=None)
    assert checkpoint is not None
    arrays = checkpoint.arrays(_groups(checkpoint.config))
    write_hf(dst, checkpoint.config, arrays, source=source, max_shard_bytes=max_shard_bytes)


def write_hf(
    path: str | os.PathLike, config: ModelConfig, arrays: Iterable[tuple[str, np.ndarray]], *,
    tokenizer: Tokenizer | None = None, source: str | os.PathLike | None = None, max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes an HF directory from a stream of weights; `save_hf` and `convert` end here.

    Args:
      arrays: (name, array in the layout and dtype of a file) in the order of `tensors(config)`.
      path, config, tokenizer, source, max_shard_bytes: as in `save_hf`.

    Raises:
      ValueError: as `save_hf`, or `arrays` does not fit the config. Nothing is left behind.
    """
    hf = config_to_hf(config)
    specs = _specs(config)
    raise_problems(f"cannot write {path}", _output_problems(path, source, max_shard_bytes))
    with new_directory(Path(path)) as directory:
        sidecars.write(directory, hf, tokenizer, None if source is None else Path(source))
        files.write(directory, specs, arrays, max_shard_bytes)


def _unreadable(name: str) -> np.ndarray:
    raise AssertionError(f"{name} must not be read")


def _output_problems(path: str | os.PathLike, source: str | os.PathLike | None, max_shard_bytes: int) -> list[str]:
    problems = []
    target = Path(path).resolve()
    if target.exists() and not target.is_dir():
        problems.append(f"{path} is a file; choose the name of a new directory")
    elif target.exists() and any(target.iterdir()):
        problems.append(f"{path} is not empty, and nothing in it will be overwritten; choose a new directory")
    if type(max_shard_bytes) is not int or max_shard_bytes < 1:
        problems.append(f"max_shard_bytes is {max_shard_bytes!r}; it must be a whole number of at least 1")
    return problems + ([] if source is None else sidecars.carried(Path(source))[1])


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Makes a temporary directory, which is moved to its place when the block ends and removed if the block fails."""
    target = path.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.name}.{secrets.token_hex(4)}.tmp"
    temporary.mkdir()
    try:
        yield temporary
        for entry in [*temporary.rglob("*"), temporary]:
            _sync(entry)
        os.rename(temporary, target)  # Takes the place of an empty directory, never of a full one.
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync(target.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
