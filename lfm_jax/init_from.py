"""What a run takes over from the model that it begins with (`init_from`): weights, tokenizer, chat template."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Generator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from lfm_jax import recipe
from lfm_jax.config import ModelConfig
from lfm_jax.convert import sidecars
from lfm_jax.loading import load, local, recognise
from lfm_jax.model import abstract_model
from lfm_jax.problems import raise_problems
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
