"""`lfm.load`: loads a model and its tokenizer from a path or a Hub id.

Only `local` decides where a name lies, and only `SOURCES` what a path is.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lfm_jax.config import ModelConfig
from lfm_jax.model import LFM, abstract_model

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Loaded = tuple[LFM, "Tokenizer | None"]


class ModelSource(NamedTuple):
    """A kind of path that a model can be loaded from."""

    accepted: str
    """Its name in messages."""
    recognises: Callable[[Path], bool]
    load: Callable[[Path, Any, str | None], Loaded]
    """(path, dtype or None, quantize or None) -> (model, tokenizer), as `load`."""


def load(path: str | Path, dtype: Any = None, quantize: str | None = None) -> Loaded:
    """Loads weights and tokenizer.

    Args:
      path: a Hugging Face directory (config.json and safetensors); a run directory of `lfm train`, whose latest
        checkpoint is loaded; or a Hub id, `OWNER/NAME` or `OWNER/NAME@REVISION` (see `local`).
      dtype: dtype of parameters and computation, for example jnp.bfloat16. None keeps the stored dtype.
      quantize: a form of `quantize`, such as `int8` or `int4:32`, with the group behind a colon: each matrix of a
        Hugging Face directory becomes narrow as it is read, so that the whole model is never in memory in its dtype.

    Returns:
      (model, tokenizer); the tokenizer neither truncates nor pads, and is None if the directory has none.

    Raises:
      ValueError: the path is neither, or its checkpoint is damaged; the message lists all problems. Or see `local` and
        `quantize`.
    """
    path = local(path)
    return recognise(path).load(path, dtype, quantize)


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


def _load_hugging_face(path: Path, dtype: Any, quantize: str | None) -> Loaded:
    from lfm_jax.convert.hf import load_hf
    from lfm_jax.convert.sidecars import DENSE

    if os.path.lexists(path / DENSE):
        raise ValueError(f"{path} has a projection of its vectors, {DENSE}, which a model alone would lose; load it "
                         "with lfm.load_encoder")
    return load_hf(path, dtype, quantize)


def _is_run(path: Path) -> bool:
    from lfm_jax.train.checkpoint import CHECKPOINTS

    return (path / CHECKPOINTS).is_dir()


def _load_run(run_dir: Path, dtype: Any, quantize: str | None) -> Loaded:
    from lfm_jax.quant.model import quantize_params
    from lfm_jax.text.tokenizer import TOKENIZER_FILE, inference_tokenizer
    from lfm_jax.train.checkpoint import CheckpointManager

    manager = CheckpointManager(run_dir, keep=None)
    try:
        if manager.latest_step() is None:
            raise ValueError(f"{run_dir} holds no finished checkpoint yet; train further or wait for the first one")
        config = ModelConfig.from_plain(manager.metadata()["config"]["model"])
        graphdef, abstract_params = abstract_model(config)
        params = manager.restore_params(abstract_params)
    finally:
        manager.close()
    if dtype is not None:
        name = jnp.dtype(dtype).name
        config = config.replace(param_dtype=name, dtype=name)
        graphdef, abstract_params = abstract_model(config)
        params = jax.tree.map(lambda x, abstract: x.astype(abstract.dtype), params, abstract_params)
    if quantize is not None:
        params = quantize_params(params, config, quantize)
    tokenizer = inference_tokenizer(run_dir) if (run_dir / TOKENIZER_FILE).exists() else None
    return nnx.merge(graphdef, params), tokenizer


HUGGING_FACE = ModelSource(
    "a Hugging Face directory (with config.json)", lambda path: (path / "config.json").exists(), _load_hugging_face
)
RUN = ModelSource("a run directory of lfm train (with checkpoints/)", _is_run, _load_run)
SOURCES: list[ModelSource] = [HUGGING_FACE, RUN]
"""In the order in which they are tried."""
