"""`lfm.load`: a model and its tokenizer from a Hugging Face directory or from one of our runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

from lfm_jax.config import ModelConfig
from lfm_jax.model import LFM, abstract_model

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def load(path: str | Path, dtype: Any = None) -> tuple[LFM, Tokenizer | None]:
    """Loads weights and tokenizer.

    Args:
      path: a Hugging Face directory (config.json and safetensors), or the run directory of `lfm train`,
        whose latest checkpoint is taken.
      dtype: of parameters and computation, for example jnp.bfloat16. None keeps what is stored.

    Returns:
      (model, tokenizer), the tokenizer None where the directory has none.

    Raises:
      ValueError: neither kind of directory, or a checkpoint that is not whole and sound; the message lists
        everything that is wrong with it.
    """
    from lfm_jax.train.checkpoint import CHECKPOINTS

    path = Path(path)
    if (path / "config.json").exists():
        from lfm_jax.convert.hf import load_hf

        return load_hf(path, dtype)
    if (path / CHECKPOINTS).is_dir():
        return _load_run(path, dtype)
    raise ValueError(
        f"{path} is neither a Hugging Face directory (no config.json) nor a run directory (no {CHECKPOINTS}/)"
        if path.is_dir() else f"{path} is not a directory"
    )


def _load_run(run_dir: Path, dtype: Any) -> tuple[LFM, Tokenizer | None]:
    from lfm_jax.data import load_tokenizer
    from lfm_jax.train.checkpoint import CheckpointManager

    manager = CheckpointManager(run_dir, keep=None)
    try:
        if manager.latest_step() is None:
            raise ValueError(f"{run_dir} holds no finished checkpoint yet; train further or wait for the first one")
        saved = manager.metadata()["config"]["model"]
        fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in saved.items()}
        config = ModelConfig(**fields)
        graphdef, abstract_params = abstract_model(config)
        params = manager.restore_params(abstract_params)
    finally:
        manager.close()
    if dtype is not None:
        name = jnp.dtype(dtype).name
        config = config.replace(param_dtype=name, dtype=name)
        graphdef, _ = abstract_model(config)
        params = jax.tree.map(lambda x: x.astype(name), params)
    tokenizer = load_tokenizer(run_dir) if (run_dir / "tokenizer.json").exists() else None
    return nnx.merge(graphdef, params), tokenizer
