"""What a run directory holds besides checkpoints and metrics, and when it may be resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lfm_jax import recipe
from lfm_jax.adapters.config import NO_LORA
from lfm_jax.config import ModelConfig
from lfm_jax.files import write_whole
from lfm_jax.problems import raise_problems
from lfm_jax.train.config import RunConfig
from lfm_jax.train.optimizer import OptimizerConfig

CONFIG = "config.yaml"

NUMERICS = frozenset({"param_dtype", "dtype", "logits_dtype", "conv_impl", "scan_impl", "attention_impl",
                      "experts_impl", "expert_bias_rate", "router_z_loss", "init", "init_std", "remat", "scan_layers",
                      "quantize", "max_position", "pad_id", "bos_id", "eos_ids"})
"""Model fields that change no parameter's shape."""


def differences(old: dict[str, Any], new: dict[str, Any], ignore: frozenset[str] = frozenset()) -> list[str]:
    """A line for each key that both have with other values."""
    return [
        f"{key}: {old[key]!r} there, {new[key]!r} here"
        for key in sorted(old.keys() & new.keys() - ignore)
        if old[key] != new[key]
    ]


def check_resumable(config: RunConfig, saved: dict[str, Any], step: int) -> list[str]:
    """Refuses a config that does not belong to the run; returns the changed settings that are allowed, to be reported.

    Raises:
      ValueError: another method, another model, another order of the data, another structure of the optimizer, or
        `steps` behind.
    """
    plain = recipe.to_plain(config)
    # A run older than a field was made with what is now the field's default.
    saved = saved | {"model": recipe.to_plain(ModelConfig.from_plain(saved["model"]))}
    problems = differences({"method": saved.get("method")}, {"method": plain.get("method")})
    problems += [f"model.{line}" for line in differences(saved["model"], plain["model"], NUMERICS)]
    data, saved_data = plain.get("data", {}), saved.get("data", {})
    problems += [f"data.{line}" for line in differences(saved_data, data, config.movable)]
    old_optimizer = recipe.to_plain(OptimizerConfig()) | saved["optimizer"]
    problems += [
        f"optimizer.{name} changed, and with it the optimizer's state" for name in ("decay_all", "algorithm")
        if old_optimizer[name] != getattr(config.optimizer, name)
    ]
    if saved.get("freeze", []) != plain["freeze"]:
        problems.append("freeze changed, and with it the optimizer's state")
    old_lora = recipe.to_plain(NO_LORA) | saved.get("lora", {})
    problems += [f"lora.{line}" for line in differences(old_lora, plain["lora"], frozenset({"dropout"}))]
    if "guard" not in saved:
        problems.append("it was made by an older version, whose checkpoints hold less; go on in a new run_dir with "
                        f"init_from {config.run_dir}")
    raise_problems(f"run_dir {config.run_dir} holds another run; choose a new run_dir or restore", problems)
    if config.steps < step:
        raise ValueError(f"steps is {config.steps}, but run_dir {config.run_dir} is at step {step}; raise steps")
    sections = {name for name, value in plain.items() if isinstance(value, dict)}
    changed = [f"{section}.{line}" for section in sorted(sections - {"data"})
               for line in differences(saved.get(section, {}), plain[section])]
    told = sections | {"freeze", "run_dir"}
    timed = saved.get("train_minutes")
    if config.train_minutes is not None and config.train_minutes != timed:
        changed.append(f"train_minutes: {timed} there, {config.train_minutes} here; only a new run is timed, this one "
                       f"keeps its {config.steps} steps")
        told.add("train_minutes")
    return changed + differences(saved, plain, frozenset(told))


def write_config(config: RunConfig, run_dir: Path) -> None:
    """Writes the resolved config, whole or not at all."""
    write_whole(run_dir / CONFIG, recipe.dump_recipe(config))
