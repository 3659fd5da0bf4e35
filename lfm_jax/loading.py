"""`lfm.load`: loads a model and its tokenizer from a path or a Hub id.

Only `local` decides where a name lies, and only `SOURCES` what a path is.
"""

from __future__ import annotations

import contextlib
import dataclasses
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
from lfm_jax.quant.model import quantize_params
from lfm_jax.weight_kinds import WeightKind

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from lfm_jax.adapters.config import LoRAConfig
    from lfm_jax.adapters.peft import Adapter
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


def load(
    path: str | Path, dtype: Any = None, quantize: str | None = None, *, adapter: str | Path | None = None,
    merge: bool = True,
) -> Loaded:
    """Loads weights and tokenizer.

    Args:
      path: a Hugging Face directory (config.json and safetensors); a run directory of `lfm train`, whose latest
        checkpoint is loaded; a GGUF file of llama.cpp, whose weights are dequantised; or a Hub id, `OWNER/NAME` or
        `OWNER/NAME@REVISION` (see `local`).
      dtype: dtype of parameters and computation, for example jnp.bfloat16. None keeps the stored dtype; weights that
        are quantised become float32.
      quantize: a form of `quantize`, such as `int8` or `int4:32`, with the group behind a colon: each matrix of a
        Hugging Face directory or GGUF file becomes narrow as it is read, so that the whole model is never in memory in
        its dtype, unless an adapter is merged first.
      adapter: the directory of an adapter, as PEFT writes it.
      merge: whether this adapter, and that of a run that trained one, is added to the weights. False keeps it beside
        them, over narrow ones too (`adapters.weights.Adapted`).

    Returns:
      (model, tokenizer); the tokenizer neither truncates nor pads, and is None if the path has none.

    Raises:
      ValueError: the path is neither, or its checkpoint is damaged; the message lists all problems. Or see `local` and
        `quantize`.
    """
    return load_local(local(path), dtype, quantize, adapter=adapter, merge=merge)


def load_local(
    path: Path, dtype: Any = None, quantize: str | None = None, *, adapter: str | Path | None = None,
    merge: bool = True,
) -> Loaded:
    """`load` of a path that is here."""
    source = recognise(path)
    if adapter is None:
        return load_run(path, dtype, quantize, merge=False) if source is RUN and not merge else (
            source.load(path, dtype, quantize))
    from lfm_jax.adapters.peft import load_adapter

    model, tokenizer = source.load(path, dtype, None if merge else quantize)
    graphdef, state = nnx.split(model, nnx.Param)
    weights: Any = nnx.to_pure_dict(state)
    found = load_adapter(adapter, model.config)
    del model, state
    return nnx.merge(graphdef, _with_adapter(weights, found, quantize, merge=merge)), tokenizer


def _with_adapter(weights: Any, found: Adapter, quantize: str | None, *, merge: bool) -> Any:
    from lfm_jax.adapters import trees

    adapter = jax.tree.map(jnp.asarray, found.weights)
    if not merge:
        return trees.adapt(found.model, found.lora, weights, adapter)
    weights = trees.merge(found.model, found.lora, weights, adapter)
    return weights if quantize is None else quantize_params(weights, found.model, quantize)


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


def load_run(
    run_dir: Path, dtype: Any, quantize: str | None = None, *, gguf_type: str | None = None, merge: bool = True
) -> Loaded:
    """Loads the weights that the steps of a run computed with, rounded if its `model.quantize` says so, and of a run
    that trained an adapter those of both.

    Args:
      merge: as for `load`.
      gguf_type: the type of a GGUF file that the weights are for. Where rounding them twice would move them, and it is
        the run's own, they are not rounded here, so that the file holds what the steps computed with.
    """
    from lfm_jax.text.tokenizer import TOKENIZER_FILE, inference_tokenizer
    from lfm_jax.train.rounding import is_fixed, rounded_weights

    config, saved, lora, params = _restored(run_dir)
    graphdef, _ = abstract_model(config)
    if lora.rank:
        from lfm_jax.adapters.peft import Adapter

        begun = _begun(run_dir, saved, config, lora)
        if not merge and quantize is not None and not lora.quantize:
            begun, quantize = quantize_params(begun, config, quantize), None
        params = _with_adapter(begun, Adapter(config, lora, params), None, merge=merge)
        if merge:  # What has no adapter, such as the embedding, is narrow still.
            params = jax.tree.map(lambda w: w.astype(config.param_dtype) if isinstance(w, WeightKind) else w, params,
                                  is_leaf=lambda w: isinstance(w, WeightKind))
    if config.quantize:
        if config.quantize != gguf_type or is_fixed(config):
            params = rounded_weights(config.replace(scan_layers=False), params)
        config = config.replace(quantize="")
        graphdef, _ = abstract_model(config)
    if dtype is not None:
        name = jnp.dtype(dtype).name
        config = config.replace(param_dtype=name, dtype=name)
        graphdef, abstract_params = abstract_model(config)
        params = jax.tree.map(lambda abstract, w: _cast(w, abstract.dtype), abstract_params, params)
    if quantize is not None:
        params = quantize_params(params, config, quantize)
    tokenizer = inference_tokenizer(run_dir) if (run_dir / TOKENIZER_FILE).exists() else None
    return nnx.merge(graphdef, params), tokenizer


@contextlib.contextmanager
def _latest_of(run_dir: Path) -> Generator[tuple[CheckpointManager, dict[str, Any]]]:
    """The checkpoints of a run, and all of its config as the latest one has it."""
    from lfm_jax.train.checkpoint import CheckpointManager

    manager = CheckpointManager(run_dir, keep=None)
    try:
        if manager.latest_step() is None:
            raise ValueError(f"{run_dir} holds no finished checkpoint yet; train further or wait for the first one")
        yield manager, manager.metadata()["config"]
    finally:
        manager.close()


def _restored(run_dir: Path) -> tuple[ModelConfig, dict[str, Any], LoRAConfig, Any]:
    """(config of the model, all of the run, its `lora`, the trained weights or the adapter) of a run's latest
    checkpoint."""
    from lfm_jax.adapters.config import LoRAConfig
    from lfm_jax.adapters.trees import init_adapter
    from lfm_jax.train.state import frozen_mask, without

    with _latest_of(run_dir) as (manager, saved):
        config = ModelConfig.from_plain(saved["model"])
        lora = LoRAConfig.from_plain(saved.get("lora", {"rank": 0}))
        _, shapes = abstract_model(config)
        if lora.rank:
            shapes = jax.eval_shape(lambda: init_adapter(config, lora, jax.random.key(0)))
            frozen = frozen_mask(config.replace(scan_layers=False), tuple(saved["freeze"]))
            shapes = without(shapes, frozen)
        return config, saved, lora, manager.restore_params(shapes)


def run_quantize(run_dir: Path) -> str:
    """Returns the `model.quantize` of a run: the form that its weights were trained through; empty for none."""
    with _latest_of(run_dir) as (_, saved):
        return saved["model"].get("quantize", "")


def _run_config(run_dir: Path) -> ModelConfig:
    with _latest_of(run_dir) as (_, saved):
        return ModelConfig.from_plain(saved["model"]).replace(quantize="")  # The weights are loaded rounded.


def run_adapter(run_dir: Path) -> tuple[Adapter, str | None]:
    """Returns the adapter that a run has trained, and what the run began with (its `init_from`).

    Raises:
      ValueError: there is no finished checkpoint, or the run trained the model itself.
    """
    from lfm_jax.adapters.peft import Adapter

    config, saved, lora, params = _restored(run_dir)
    if not lora.rank:
        raise ValueError(f"{run_dir} is a run without an adapter (lora.rank is 0); convert it as a model")
    return Adapter(config, lora, params), saved.get("init_from")


def _begun(run_dir: Path, saved: dict[str, Any], config: ModelConfig, lora: LoRAConfig) -> Any:
    """The weights that a run with an adapter began with, as it held them.

    Raises:
      ValueError: there are others now.
    """
    from lfm_jax.adapters.trees import digest
    from lfm_jax.train.checkpoint import DIGESTS

    name, weights = saved.get("init_from"), None
    _, abstract = abstract_model(config)
    if name is not None:
        held = nnx.to_pure_dict(nnx.split(load(name)[0], nnx.Param)[1])
        weights = jax.tree.map(lambda x, kept: x.astype(kept.dtype), held, abstract)
    if digest(weights, saved["seed"]) != saved[DIGESTS]["model"]:
        raise ValueError(f"{name} holds other weights than those that {run_dir} began with and trained an adapter of; "
                         "restore them")
    if weights is None:
        weights = nnx.to_pure_dict(nnx.split(LFM(config, rngs=nnx.Rngs(saved["seed"])), nnx.Param)[1])
    return quantize_params(weights, config, lora.quantize) if lora.quantize else weights


def _cast(w: Any, dtype: Any) -> Any:
    """An array in another dtype; what an adapter stands beside too, but for narrow weights."""
    from lfm_jax.adapters.weights import Adapted

    if isinstance(w, Adapted):
        return dataclasses.replace(w, base=_cast(w.base, dtype))
    return w if isinstance(w, WeightKind) else w.astype(dtype)


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
