"""What a run takes over from the model that it begins with (`init_from`): weights, tokenizer, chat template."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Generator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from lfm_jax import recipe
from lfm_jax.config import ModelConfig
from lfm_jax.convert import sidecars
from lfm_jax.loading import load, local, recognise
from lfm_jax.model import LFM, abstract_model
from lfm_jax.problems import raise_problems
from lfm_jax.train import state as states
from lfm_jax.train.checkpoint import CheckpointManager, has_checkpoint
from lfm_jax.train.run_dir import NUMERICS, differences


def weights(name: str, config: ModelConfig) -> Any:
    """Loads the weights of a model in the dtypes of `config`, as a plain dict of numpy arrays.

    Args:
      name: whatever `lfm.load` takes.

    Raises:
      ValueError: see `lfm.load`, or `config` is another model; the message lists the fields.
    """
    model, _ = load(name)
    raise_problems(
        f"init_from {name} holds another model; make these model fields equal",
        differences(recipe.to_plain(model.config), recipe.to_plain(config), NUMERICS),
    )
    loaded = nnx.to_pure_dict(nnx.split(model, nnx.Param)[1])
    _, abstract = abstract_model(config)  # Some weights have a dtype of their own.
    return jax.tree.map(lambda x, kept: np.asarray(x.astype(kept.dtype)), loaded, abstract)


@contextlib.contextmanager
def sidecar_files(name: str) -> Generator[Path]:
    """Gives the directory with a model's tokenizer and chat template; that of a GGUF file is there for a while."""
    path = local(name)
    with recognise(path).beside(path) as directory:
        yield directory


def carry_sidecars(directory: Path, run_dir: Path) -> None:
    """Copies tokenizer, chat template and the like into a run directory, so that chat and export find them."""
    for name, file in sidecars.carried(directory)[0].items():
        target = run_dir / name
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, target)


def write_model(model: LFM, run_dir: Path, origin: str) -> None:
    """Writes a model as the directory of a run that has made no step: what `lfm.load` and `init_from` take, for models
    that no published family holds.

    Args:
      run_dir: made.
      origin: the model whose tokenizer and chat template are carried along.

    Raises:
      ValueError: there is a run in the directory, or see `lfm.load`.
      OSError: it cannot be written.
    """
    if has_checkpoint(run_dir):
        raise ValueError(f"{run_dir} holds a run; choose another directory for the model")
    run_dir.mkdir(parents=True, exist_ok=True)
    with sidecar_files(origin) as directory:
        carry_sidecars(directory, run_dir)
    weights = nnx.to_pure_dict(nnx.split(model, nnx.Param)[1])
    manager = CheckpointManager(run_dir, keep=1)
    try:
        manager.save(0, states.new_state(weights, {}, optax.identity()), {}, {"model": recipe.to_plain(model.config)})
    finally:
        manager.close()
