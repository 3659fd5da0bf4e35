"""`lfm.load`: loads a model and its tokenizer from a path or a Hub id.

Only `local` decides where a name lies, and only `SOURCES` what a path is.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lfm_jax.config import ModelConfig
from lfm_jax.convert import sidecars
from lfm_jax.model import LFM, abstract_model

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from lfm_jax.train.checkpoint import CheckpointManager

Loaded = tuple[LFM, "Tokenizer | None"]


class ModelSource(NamedTuple):
    """A kind of path that a model can be loaded from."""

    accepted: str
    """Its name in messages."""
    recognises: Callable[[Path], bool]
    load: Callable[[Path, Any, str | None], Loaded]
    """(path, dtype or None, quantize or None) -> (model, tokenizer), as `load`."""
    beside: Callable[[Path], AbstractContextManager[Path]] = contextlib.nullcontext
    """Gives the directory with its tokenizer and chat template: its own, or one that is there for a while."""
    config: Callable[[Path], ModelConfig] | None = None
    """The config of the model that `load` gives, read without its weights; None: it takes loading them."""


def load(path: str | Path, dtype: Any = None, quantize: str | None = None) -> Loaded:
    """Loads weights and tokenizer.

    Args:
      path: a Hugging Face directory (config.json and safetensors); a run directory of `lfm train`, whose latest
        checkpoint is loaded; a GGUF file of llama.cpp, whose weights are dequantised; or a Hub id, `OWNER/NAME` or
        `OWNER/NAME@REVISION` (see `local`).
      dtype: dtype of parameters and computation, for example jnp.bfloat16. None keeps the stored dtype; weights that
        are quantised become float32.
      quantize: a form of `quantize`, such as `int8` or `int4:32`, with the group behind a colon: each matrix of a
        Hugging Face directory or GGUF file becomes narrow as it is read, so that the whole model is never in memory in
        its dtype.

    Returns:
      (model, tokenizer); the tokenizer neither truncates nor pads, and is None if the path has none.

    Raises:
      ValueError: the path is neither, or its checkpoint is damaged; the message lists all problems. Or see `local` and
        `quantize`.
    """
    path = local(path)
    return recognise(path).load(path, dtype, quantize)


def model_config(path: str | Path) -> ModelConfig:
    """Returns the config of the model that `load` would give, without its weights if it can; raises as `load` does."""
    path = local(path)
    source = recognise(path)
    return source.load(path, None, None)[0].config if source.config is None else source.config(path)


def local(name: str | os.PathLike) -> Path:
    """Returns the path of a model: the name itself, or for a Hub id the directory of its files in the Hub's cache.

    Files that are not there are fetched first. A path that exists wins over an id, and what begins with `./` or `../`
    is a path; a Path has no `./` any more, so hand over what was typed.

    Raises:
      ValueError: the model of an id cannot be had; see `convert.hub.fetch`.
    """
    from lfm_jax.convert import hub

    path, text = Path(name), str(name)
    if os.path.lexists(path) or text.startswith(("./", "../")) or text.endswith("/") or not hub.is_id(text):
        return path
    return hub.fetch(text)


def recognise(path: str | Path) -> ModelSource:
    """Returns the first of `SOURCES` that recognises the path.

    Raises:
      ValueError: none does; the message lists the accepted ones.
    """
    for source in SOURCES:
        if source.recognises(Path(path)):
            return source
    found = "has no model in it" if Path(path).is_dir() else "is not a directory"
    accepted = [source.accepted for source in SOURCES]
    raise ValueError(f"{path} {found}; a model is {' or '.join([*accepted, 'a Hub id (OWNER/NAME[@REVISION])'])}")


def chat_template(path: str | Path) -> str | None:
    """Returns the Jinja chat template of a model's path, None if it has none.

    Raises:
      ValueError: the path has no model, or its template cannot be read.
    """
    with recognise(path).beside(Path(path)) as directory:
        return sidecars.chat_template(directory)


def _load_hugging_face(path: Path, dtype: Any, quantize: str | None) -> Loaded:
    from lfm_jax.convert.hf import load_hf

    if os.path.lexists(path / sidecars.DENSE):
        raise ValueError(f"{path} has a projection of its vectors, {sidecars.DENSE}, which a model alone would lose; "
                         "load it with lfm.load_encoder")
    return load_hf(path, dtype, quantize)


def _hugging_face_config(path: Path) -> ModelConfig:
    from lfm_jax.convert.hf import hf_config

    return hf_config(path)


def _is_run(path: Path) -> bool:
    from lfm_jax.train.checkpoint import CHECKPOINTS

    return (path / CHECKPOINTS).is_dir()


def load_run(run_dir: Path, dtype: Any, quantize: str | None = None, *, gguf_type: str | None = None) -> Loaded:
    """Loads the weights that the steps of a run computed with, rounded if its `model.quantize` says so.

    Args:
      gguf_type: the type of a GGUF file that the weights are for. Where rounding them twice would move them, and it is
        the run's own, they are not rounded here, so that the file holds what the steps computed with.
    """
    from lfm_jax.quant.model import quantize_params
    from lfm_jax.text.tokenizer import TOKENIZER_FILE, inference_tokenizer
    from lfm_jax.train.rounding import is_fixed, rounded_weights

    with _latest_of(run_dir) as (manager, config):
        graphdef, abstract_params = abstract_model(config)
        params = manager.restore_params(abstract_params)
    if config.quantize:
        if config.quantize != gguf_type or is_fixed(config):
            params = rounded_weights(config.replace(scan_layers=False), params)
        config = config.replace(quantize="")
        graphdef, _ = abstract_model(config)
    if dtype is not None:
        name = jnp.dtype(dtype).name
        config = config.replace(param_dtype=name, dtype=name)
        graphdef, abstract_params = abstract_model(config)
        params = jax.tree.map(lambda x, abstract: x.astype(abstract.dtype), params, abstract_params)
    if quantize is not None:
        params = quantize_params(params, config, quantize)
    tokenizer = inference_tokenizer(run_dir) if (run_dir / TOKENIZER_FILE).exists() else None
    return nnx.merge(graphdef, params), tokenizer


@contextlib.contextmanager
def _latest_of(run_dir: Path) -> Generator[tuple[CheckpointManager, ModelConfig]]:
    """The checkpoints of a run, and the config of the model in the latest one."""
    from lfm_jax.train.checkpoint import CheckpointManager

    manager = CheckpointManager(run_dir, keep=None)
    try:
        if manager.latest_step() is None:
            raise ValueError(f"{run_dir} holds no finished checkpoint yet; train further or wait for the first one")
        yield manager, ModelConfig.from_plain(manager.metadata()["config"]["model"])
    finally:
        manager.close()


def _run_config(run_dir: Path) -> ModelConfig:
    with _latest_of(run_dir) as (_, config):
        return config.replace(quantize="")  # The weights are loaded rounded.


def _is_gguf(path: Path) -> bool:
    from lfm_jax.convert.gguf.models import is_gguf

    return is_gguf(path)


def _load_gguf(path: Path, dtype: Any, quantize: str | None) -> Loaded:
    from lfm_jax.convert.gguf.models import load_gguf

    return load_gguf(path, dtype, quantize)


def _gguf_config(path: Path) -> ModelConfig:
    from lfm_jax.convert.gguf.models import gguf_config

    return gguf_config(path)


def _beside_gguf(path: Path) -> AbstractContextManager[Path]:
    from lfm_jax.convert.gguf.models import sidecar_directory

    return sidecar_directory(path)


HUGGING_FACE = ModelSource(
    "a Hugging Face directory (with config.json)", lambda path: (path / "config.json").exists(), _load_hugging_face,
    config=_hugging_face_config,
)
RUN = ModelSource("a run directory of lfm train (with checkpoints/)", _is_run, load_run, config=_run_config)
GGUF = ModelSource("a GGUF file (.gguf)", _is_gguf, _load_gguf, _beside_gguf, _gguf_config)
SOURCES: list[ModelSource] = [HUGGING_FACE, RUN, GGUF]
"""In the order in which they are tried."""
