"""What a run directory holds besides checkpoints and metrics, and when it may be resumed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from lfm_jax import recipe
from lfm_jax.config import ModelConfig
from lfm_jax.convert import sidecars
from lfm_jax.data import load_tokenizer, make_tokenizer
from lfm_jax.text.tokenizer import TOKENIZER_FILE
from lfm_jax.train.optimizer import OptimizerConfig

if TYPE_CHECKING:
    from lfm_jax.train.loop import TrainConfig

CONFIG = "config.yaml"

NUMERICS = frozenset({"param_dtype", "dtype", "logits_dtype", "conv_impl", "scan_impl", "attention_impl", "init",
                      "init_std",
                      "remat", "scan_layers",
                      "max_position", "pad_id", "bos_id", "eos_ids"})
"""Model fields that change no parameter's shape."""
_PATHS = frozenset({"sources", "mixture", "heldout", "exclude", "tokenizer", "prefetch"})
"""Data fields that may change, as when files move: whether the data is the same, its own fingerprint decides."""


def differences(old: dict[str, Any], new: dict[str, Any], ignore: frozenset[str] = frozenset()) -> list[str]:
    """A line for each key that both have with other values."""
    return [
        f"{key}: {old[key]!r} there, {new[key]!r} here"
        for key in sorted(old.keys() & new.keys() - ignore)
        if old[key] != new[key]
    ]


def check_resumable(config: TrainConfig, saved: dict[str, Any], step: int) -> list[str]:
    """Refuses to go on with a run as another one; returns the changes that are allowed, to be told.

    Raises:
      ValueError: another model, another order of the data, another structure of the optimizer, or `steps` behind.
    """
    plain = recipe.to_plain(config)
    # A run older than a field was made with what is now the field's default.
    saved = saved | {"model": recipe.to_plain(ModelConfig()) | saved["model"]}
    problems = [f"model.{line}" for line in differences(saved["model"], plain["model"], NUMERICS)]
    problems += [f"data.{line}" for line in differences(saved["data"], plain["data"], _PATHS)]
    old_optimizer = recipe.to_plain(OptimizerConfig()) | saved["optimizer"]
    problems += [
        f"optimizer.{name} changed, and with it the optimizer's state" for name in ("decay_all", "algorithm")
        if old_optimizer[name] != getattr(config.optimizer, name)
    ]
    if "guard" not in saved:
        problems.append("it was made by an older version, whose checkpoints hold less; go on in a new run_dir with "
                        f"init_from {config.run_dir}")
    if problems:
        lines = "".join(f"\n  - {p}" for p in problems)
        raise ValueError(f"run_dir {config.run_dir} holds another run; choose a new run_dir or restore:{lines}")
    if config.steps < step:
        raise ValueError(f"steps is {config.steps}, but run_dir {config.run_dir} is at step {step}; raise steps")
    changed = [f"optimizer.{line}" for line in differences(saved["optimizer"], plain["optimizer"])]
    changed += [f"model.{line}" for line in differences(saved["model"], plain["model"])]
    for section in ("mesh", "guard"):
        changed += [f"{section}.{line}" for line in differences(saved.get(section, {}), plain[section])]
    sections = {"model", "data", "optimizer", "mesh", "guard", "run_dir", "init_from"}
    return changed + differences(saved, plain, frozenset(sections))


def start(config: TrainConfig, run_dir: Path) -> Tokenizer:
    """The tokenizer of a new run, kept in its directory.

    It is `data.tokenizer`, else the one of `init_from`, whose ids its weights mean, else one trained on the
    training files. A chat template and the like of `init_from` come along, so that chat and export find them.

    Raises:
      ValueError: a tokenizer or source file that cannot be read, or an `init_from` without a tokenizer.
    """
    if config.init_from is not None:
        origin = Path(config.init_from)
        if config.data.tokenizer is None and not (origin / TOKENIZER_FILE).exists():
            raise ValueError(f"init_from {origin} has no {TOKENIZER_FILE}; name its tokenizer in data.tokenizer")
        for name, file in sidecars.carried(origin)[0].items():
            target = run_dir / name
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)
    if config.data.tokenizer is None and config.init_from is not None:
        return load_tokenizer(run_dir)
    tokenizer = make_tokenizer(config.data, vocab_size=config.model.vocab_size)
    _write(run_dir / TOKENIZER_FILE, tokenizer.to_str(pretty=True))
    return tokenizer


def resume(config: TrainConfig, run_dir: Path) -> Tokenizer:
    """The tokenizer that a run began with.

    Raises:
      ValueError: `data.tokenizer` names another one.
    """
    kept = load_tokenizer(run_dir)
    if config.data.tokenizer is not None and load_tokenizer(config.data.tokenizer).to_str() != kept.to_str():
        raise ValueError(
            f"data.tokenizer {config.data.tokenizer} is not the tokenizer that run_dir {run_dir} began with; "
            "restore it, or choose a new run_dir"
        )
    return kept


def write_config(config: TrainConfig, run_dir: Path) -> None:
    """Writes the resolved config, whole or not at all."""
    _write(run_dir / CONFIG, recipe.dump_recipe(config))


def _write(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
