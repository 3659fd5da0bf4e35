"""Models in GGUF files: loads them, and writes them from memory, from a Hugging Face directory or from another file."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lfm_jax.config import ModelConfig
from lfm_jax.convert import sidecars
from lfm_jax.convert.families.family import Format
from lfm_jax.convert.gguf.archs import ARCHS, arch_of
from lfm_jax.convert.gguf.gguf_file import MAGIC, GgufFile, Written, open_gguf, write_gguf
from lfm_jax.convert.gguf.imatrix import Imatrix, read_imatrix
from lfm_jax.convert.gguf.vocabulary import PREFIX, TEMPLATE, special_ids, tokenizer_of, vocabulary_keys
from lfm_jax.convert.hf import Checkpoint, arrays_of, build, ending_as_generated
from lfm_jax.convert.hf import inspect as inspect_hf
from lfm_jax.convert.hub import model_name
from lfm_jax.convert.sources import check, common_dtype
from lfm_jax.convert.weights import groups
from lfm_jax.model import LFM
from lfm_jax.problems import raise_problems
from lfm_jax.quant import MIXES, gguf_library, mix, quantize
from lfm_jax.quant.block_types import PLAIN

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["export", "is_gguf", "load_gguf", "save_gguf", "sidecar_directory"]

Tell = Callable[[str], None]
DEFAULT = "Q4_K_M"
_TELL_SECONDS = 5.0


def is_gguf(path: Path) -> bool:
    """Returns whether a path is a file that is called or begins as a GGUF file."""
    if not path.is_file():
        return False
    if path.suffix == ".gguf":
        return True
    with open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


# -------------------------------------------------------------------- in


def load_gguf(
    path: str | os.PathLike, dtype: Any = None, quantize: str | None = None
) -> tuple[LFM, Tokenizer | None]:
    """Loads a GGUF file tensor by tensor: the architectures of `ARCHS`, and every type that the gguf library reads.

    Args:
      path: the file.
      dtype: dtype of parameters and computation: float32, bfloat16 or float16. None keeps the numbers to the bit: the
        dtype of the matrices if they are not quantised and it holds all other tensors, else float32.
      quantize: as in `lfm.load`.

    Returns:
      (model, tokenizer); the tokenizer is None if the file has none.

    Raises:
      ValueError: the file is damaged or not a model of these; the message lists all problems, before any weight is
        read.
    """
    opened, checkpoint, problems = _inspect(Path(path), dtype)
    tokenizer, found = (None, []) if opened is None else tokenizer_of(opened.keys)
    raise_problems(f"cannot load {path}", problems + found, most=None)
    assert checkpoint is not None
    return build(checkpoint.config, checkpoint.read, checkpoint.weights, quantize), tokenizer


def gguf_config(path: Path) -> ModelConfig:
    """Returns the config of the model that `load_gguf` loads, before any weight is read; raises as that does."""
    _, checkpoint, problems = _inspect(path, None)
    raise_problems(f"cannot load {path}", problems, most=None)
    assert checkpoint is not None
    return checkpoint.config


@contextlib.contextmanager
def sidecar_directory(path: Path) -> Generator[Path]:
    """Makes a directory, for a while, with the tokenizer and the chat template of a file as an HF directory has them.

    Raises:
      ValueError: the file, or its tokenizer, cannot be read.
    """
    opened, problems = open_gguf(path)
    tokenizer, found = (None, problems) if opened is None else tokenizer_of(opened.keys)
    raise_problems(f"cannot read {path}", found)
    assert opened is not None
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        if tokenizer is not None:
            tokenizer.save(str(directory / sidecars.TOKENIZER))
        if template := opened.keys.get(TEMPLATE):
            (directory / sidecars.CHAT_TEMPLATE).write_text(template, encoding="utf-8")
        yield directory


def _inspect(path: Path, dtype: Any) -> tuple[GgufFile | None, Checkpoint | None, list[str]]:
    """Checks a file completely, before any matrix is read."""
    if not path.is_file():
        return None, None, ["there is no such file"]
    opened, problems = open_gguf(path)
    if opened is None:
        return None, None, problems
    name = opened.keys.get("general.architecture")
    if name not in ARCHS:
        return opened, None, [*problems, f"general.architecture is {name!r}; expected {', '.join(ARCHS)}"]
    arch, config = ARCHS[name], None
    try:
        config = ModelConfig(**_fields(opened, arch))
    except (ValueError, TypeError, ArithmeticError, AttributeError) as error:
        problems.append(f"keys of {name}: {error}")
    if config is None:
        return opened, None, problems
    problems += check(opened.source(), arch.weights, config)
    kept = _dtype(opened, arch, config, dtype, problems)
    if problems:
        return opened, None, problems
    config = config.replace(param_dtype=kept, dtype=kept)
    return opened, Checkpoint(config, opened.read, arch.weights), []


def _fields(opened: GgufFile, arch: Format) -> dict[str, Any]:
    start = f"{arch.name}."
    keys = {key.removeprefix(start): value for key, value in opened.keys.items() if key.startswith(start)}
    size = keys.get("vocab_size") or len(opened.keys.get(f"{PREFIX}tokens", ()))
    return arch.read(keys) | special_ids(opened.keys) | dict(
        vocab_size=size, tie_embedding="output.weight" not in opened.tensors, param_dtype="float32", dtype="float32")


def _dtype(opened: GgufFile, arch: Format, config: ModelConfig, dtype: Any, problems: list[str]) -> str:
    """Returns the dtype for parameters; adds to the problems if the one asked for is not supported."""
    if dtype is not None:
        name, found = common_dtype(opened.source(), dtype)
        problems += found
        return name or "float32"
    own = {name for group in groups(arch.weights, config) if group.own_dtype for name in group.names}
    types = {tensor.type for tensor in opened.tensors.values()} - {"F32"}
    [only] = types if len(types) == 1 else [""]
    if problems or only not in PLAIN:
        return "float32"
    narrow = PLAIN[only]
    with np.errstate(over="ignore"):
        held = all(np.array_equal(x, x.astype(narrow).astype(np.float32)) for x in (
            opened.read(name) for name, tensor in opened.tensors.items() if tensor.type == "F32" and name not in own))
    return narrow.name if held else "float32"


# -------------------------------------------------------------------- out


@dataclasses.dataclass(frozen=True)
class _Plan:
    """A file to be written, when nothing is in the way."""

    path: Path
    arch: Format
    config: ModelConfig
    shapes: dict[str, tuple[int, ...]]
    types: dict[str, str]
    """Shape and type of each tensor, in the order of the file."""
    keys: dict[str, Any]
    importance: dict[str, np.ndarray]
    kept: GgufFile | None
    """The file whose blocks are taken where a tensor has not changed."""


def save_gguf(
    model: LFM, path: str | os.PathLike, tokenizer: Tokenizer | None = None, *, type: str | None = None,
    imatrix: str | os.PathLike | Imatrix | None = None, source: str | os.PathLike | None = None,
    tell: Tell | None = None,
) -> None:
    """Writes a GGUF file that llama.cpp runs.

    It appears whole or not at all, and one tensor at a time is in memory beside the model.

    Args:
      model: of the architectures lfm2, lfm2moe or llama (attention alone, without norms of queries and keys).
      path: a new file.
      tokenizer: written into the file; None for that of a GGUF `source`, or none.
      type: a mix of `lfm_jax.quant.MIXES`: F32, F16, BF16, Q8_0, Q6_K, Q5_K_M, Q4_K_M, Q4_K_S, Q4_0. None for the types
        of a GGUF `source`, else Q4_K_M.
      imatrix: importance of inputs, which makes errors smaller where they count: `importance` gives it, and llama.cpp's
        tool; a file or what `read_imatrix` returns.
      source: where the model comes from. Of a Hugging Face or run directory the chat template is taken; of a GGUF
        file, all keys that are not the model's own, and the blocks of tensors that have the same type in it and have
        not changed since, so that they do not lose twice.
      tell: is told how far it is.

    Raises:
      ValueError: llama.cpp cannot express the model, the tokenizer or the type; the file exists; the source or the
        imatrix does not fit. One message lists everything, before any work. Or a number is too large for its type.
    """
    problems: list[str] = []
    kept, template, name = None, None, Path(path).stem
    if source is not None and is_gguf(Path(source)):
        kept, found = open_gguf(Path(source))
        problems += [] if kept is not None else [f"source {source}: {problem}" for problem in found]
    elif source is not None:
        template, name = sidecars.chat_template(source), model_name(Path(source))
    plan, found = _plan(Path(path), model.config, tokenizer, template, name, type, imatrix, kept)
    raise_problems(f"cannot write {path}", problems + found, most=None)
    assert plan is not None
    _write(plan, arrays_of(model, plan.arch.weights), tell)


def export(
    src: str | os.PathLike, dst: str | os.PathLike, type: str | None = None,
    imatrix: str | os.PathLike | Imatrix | None = None, tell: Tell | None = None,
) -> None:
    """Writes a GGUF file from a Hugging Face directory or from another GGUF file, one tensor at a time.

    Of a GGUF file all keys are kept, and the bytes of each tensor whose type does not change. Arguments and errors are
    those of `save_gguf`.
    """
    path, kept, tokenizer, template = Path(src), None, None, None
    if is_gguf(path):
        kept, checkpoint, problems = _inspect(path, None)
    else:
        checkpoint, problems = inspect_hf(path, None)
        tokenizer, found = sidecars.read_tokenizer(path)
        problems += found
        template = sidecars.chat_template(path) if path.is_dir() else None
        if checkpoint is not None:
            checkpoint = dataclasses.replace(checkpoint, config=ending_as_generated(checkpoint.config, path))
    raise_problems(f"cannot load {src}", problems, most=None)
    assert checkpoint is not None
    plan, problems = _plan(Path(dst), checkpoint.config, tokenizer, template, model_name(path), type, imatrix, kept)
    if kept is not None and type is None and imatrix is not None:
        problems.append("an imatrix changes nothing where all blocks stay; name a type too")
    raise_problems(f"cannot write {dst}", problems, most=None)
    assert plan is not None
    table = groups(plan.arch.weights, plan.config)
    _write(plan, checkpoint.arrays(table) if kept is None else _of_file(plan, kept), tell)


def _plan(
    path: Path, config: ModelConfig, tokenizer: Tokenizer | None, template: str | None, name: str, type: str | None,
    imatrix: str | os.PathLike | Imatrix | None, kept: GgufFile | None,
) -> tuple[_Plan | None, list[str]]:
    """Decides all of a file before any weight is read; returns it, or None and all that is in the way."""
    arch, problems = arch_of(config)
    if path.exists():
        problems.append(f"{path} exists, and nothing is overwritten; choose another name")
    elif not path.parent.is_dir():
        problems.append(f"there is no directory {path.parent}; make it first")
    if type is not None and type not in MIXES:
        problems.append(f"type is {type!r}; choose one of {', '.join(MIXES)}")
    shapes = {} if arch.lacks(config) else {
        name: group.tensor.shape for group in groups(arch.weights, config) for name in group.names}
    if kept is not None and (wrong := [name for name, shape in shapes.items() if name not in kept.tensors
                                       or kept.tensors[name].shape != shape]):
        problems.append(f"{kept.path} holds another model, without such {', '.join(wrong[:3])}"
                        + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""))
    importance: dict[str, np.ndarray] = {}
    noted: dict[str, Any] = {}
    if imatrix is not None:
        try:
            found = imatrix if isinstance(imatrix, Imatrix) else read_imatrix(imatrix)
            importance, wrong = found.importance(shapes) if shapes else ({}, [])
            noted = found.keys()
            problems += wrong
        except ValueError as error:
            problems.append(str(error))
    vocabulary: dict[str, Any] = {}
    if kept is None or tokenizer is not None:
        vocabulary, wrong = vocabulary_keys(tokenizer, config, template)
        problems += wrong
    if problems:
        return None, problems
    if kept is not None and type is None:
        types = {name: kept.tensors[name].type for name in shapes}
    else:
        types = mix(type or DEFAULT, shapes, arch=arch.name, importance=bool(importance))
    keys = _keys(arch, config, name, type, kept) | vocabulary | noted
    return _Plan(path, arch, config, shapes, types, keys, importance, kept), []


def _keys(arch: Format, config: ModelConfig, name: str, type: str | None, kept: GgufFile | None) -> dict[str, Any]:
    """Returns the keys of a file but for those of the tokenizer, or all that are `kept`."""
    gguf = gguf_library()
    own = {f"{arch.name}.{key}": value for key, value in arch.write(config).items()}
    if kept is not None:
        gone = ("general.architecture", "general.alignment")
        before = {key: value for key, value in kept.keys.items() if key not in gone}
        own = before | {key: before[key] if before.get(key) == value else value for key, value in own.items()}
        if type is None:
            return own
    mixed = type or DEFAULT
    experts = sum(layer.feed_forward == "moe" for layer in config.layers) * config.num_experts
    of_experts = experts * 3 * config.hidden_size * config.expert_size
    params, count = config.num_params(), config.num_experts if experts else 0
    per_expert = of_experts // max(count, 1)
    general = {
        "general.type": "model",
        "general.name": name,
        "general.size_label": gguf.size_label(params, params - of_experts, per_expert, count),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        "general.file_type": int(gguf.LlamaFileType["ALL_F32" if mixed == "F32" else f"MOSTLY_{mixed}"]),
    }
    if kept is not None:
        return own | {key: general[key] for key in ("general.quantization_version", "general.file_type")}
    return general | own


def _of_file(plan: _Plan, kept: GgufFile) -> Iterator[tuple[str, np.ndarray | None]]:
    """Yields the tensors of a file; None for those whose bytes stay."""
    for name, type in plan.types.items():
        yield name, None if kept.tensors[name].type == type else kept.read(name)


def _write(plan: _Plan, arrays: Iterable[tuple[str, np.ndarray | None]], tell: Tell | None) -> None:
    def data() -> Iterator[np.ndarray]:
        told = time.monotonic()
        for i, (name, array) in enumerate(arrays, 1):
            yield _blocks(plan, name, array)
            if tell is not None and time.monotonic() - told > _TELL_SECONDS:
                told = time.monotonic()
                tell(f"{i} of {len(plan.types)} tensors are written")

    tensors = {name: Written(type, plan.shapes[name]) for name, type in plan.types.items()}
    types = {} if plan.kept is None else {
        key: types for key, types in plan.kept.types.items() if plan.keys.get(key) is plan.kept.keys[key]}
    write_gguf(plan.path, plan.arch.name, plan.keys, types, tensors, data())


def _blocks(plan: _Plan, name: str, array: np.ndarray | None) -> np.ndarray:
    """Returns the bytes of a tensor: those of the kept file if its numbers and its type are the same."""
    kept, type = plan.kept, plan.types[name]
    if kept is not None and kept.tensors[name].type == type and (array is None or _same(kept, name, array)):
        return kept.raw(name)
    assert array is not None
    return quantize(array, type, plan.importance.get(name), name=name).reshape(-1)


def _same(kept: GgufFile, name: str, array: np.ndarray) -> bool:
    with np.errstate(over="ignore"):
        return np.array_equal(kept.read(name).astype(array.dtype), array)
