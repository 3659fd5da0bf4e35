"""Files of adapters as PEFT 0.21 has them: `adapter_config.json` and `adapter_model.safetensors`, both ways.

Tensors are called `base_model.model.MODULE.lora_A.weight`, [rank, inputs], and `.lora_B.weight`, [outputs, rank]; axes
that are several in our weights, such as heads, are merged in order.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from lfm_jax.adapters.config import LoRAConfig
from lfm_jax.adapters.targets import ends_with, modules, named_targets
from lfm_jax.adapters.trees import Tree, init_adapter
from lfm_jax.config import ModelConfig
from lfm_jax.convert.families import family_of
from lfm_jax.convert.hf import new_directory
from lfm_jax.convert.safetensors_io import read_json, read_tensors
from lfm_jax.problems import raise_problems

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_READ = ("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "rank_pattern",
         "alpha_pattern")
_ABOUT = ("base_model_name_or_path", "revision", "task_type", "inference_mode", "auto_mapping", "peft_version",
          "layers_pattern")
"""Keys that say nothing of the numbers, or nothing by themselves."""
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bias": ("none",), "init_lora_weights": (True, False, "gaussian", "orthogonal"),
    "megatron_core": ("megatron.core",), "qalora_group_size": (16,),
}
"""Values under which other keys mean nothing; of all of them also what is empty, false or null."""


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter of a model."""

    model: ModelConfig
    lora: LoRAConfig
    weights: Tree
    """See `adapters.trees`; not stacked."""


def save_adapter(adapter: Adapter, path: str | os.PathLike, *, base: str | None = None) -> None:
    """Writes a directory that PEFT puts on the model of `transformers`.

    It appears whole or not at all.

    Args:
      path: a new or empty directory.
      base: where the model is, a Hub id or a path, for those who look for it in adapter_config.json.

    Raises:
      ValueError: `transformers` has no such model, or the path is not empty.
    """
    family_of(adapter.model)
    target, lora = Path(path), adapter.lora
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{path} is a file or not empty, and nothing is overwritten; choose a new directory")
    tensors: dict[str, np.ndarray] = {}
    written = []
    for name, leaf_path in modules(adapter.model).dense.items():
        ab = _at(adapter.weights, leaf_path)
        if ab is None:
            continue
        written.append(name)
        a, b = np.asarray(ab["a"]), np.asarray(ab["b"])
        tensors |= {_tensor(name, "A"): np.ascontiguousarray(a.reshape(len(a), -1)),
                    _tensor(name, "B"): np.ascontiguousarray(b.reshape(-1, b.shape[-1]))}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if adapter.model.causal else "FEATURE_EXTRACTION",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rslora,
        "target_modules": _shortest(adapter.model, lora, written),
        "rank_pattern": dict(lora.rank_pattern),
        "alpha_pattern": dict(lora.alpha_pattern),
        "bias": "none",
        "use_dora": False,
        "fan_in_fan_out": False,
        "modules_to_save": None,
    }
    with new_directory(target) as directory:
        (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, directory / TENSORS, metadata={"format": "pt"})


def load_adapter(path: str | os.PathLike, model: ModelConfig) -> Adapter:
    """Reads an adapter of PEFT.

    Raises:
      ValueError: it is not whole, not finite, not of this model, or of a kind that is not supported (DoRA, trained
        biases, modules saved whole, ...); one message lists everything.
    """
    directory = Path(path)
    raw, problems = read_json(directory, CONFIG)
    tensors, found = read_tensors(directory, TENSORS)
    problems += found
    if not (directory / CONFIG).exists():
        problems.append("an adapter is what PEFT writes; of a run of `lfm tune`, `lfm export RUN DIR --format peft` "
                        "writes it")
    lora, found = _config(raw, model) if raw else (None, [])
    problems += found
    weights: Tree = {}
    if lora is not None and tensors:
        weights, found = _weights(lora, model, tensors)
        problems += found
    raise_problems(f"cannot load the adapter {path}", problems, most=None)
    assert lora is not None  # Else there were problems.
    return Adapter(model, lora, weights)


def _config(raw: Mapping[str, Any], model: ModelConfig) -> tuple[LoRAConfig | None, list[str]]:
    """The config of a file, or None; and what of it is not supported or does not fit."""
    problems = [f"{CONFIG}: {key} is {value!r}, which is not supported" for key, value in raw.items()
                if key not in (*_READ, *_ABOUT) and value and value not in _NEUTRAL.get(key, ())]
    if raw.get("peft_type") != "LORA":
        return None, [f"{CONFIG}: peft_type is {raw.get('peft_type')!r}; only LORA is supported", *problems]
    given = raw.get("target_modules")
    there = modules(model).dense
    if isinstance(given, str) and given != "all-linear":
        try:
            chosen = [name for name in there if re.fullmatch(given, name)]
        except re.error as error:
            return None, [*problems, f"{CONFIG}: target_modules is no regular expression: {error}"]
        if not chosen:
            problems.append(f"{CONFIG}: target_modules {given!r} names no matrix of the model")
        targets = tuple(chosen)
    else:
        listed = there if given == "all-linear" else given if isinstance(given, list) else ()
        # PEFT passes over names that only modules of other families have.
        targets = tuple(target for target in listed
                        if isinstance(target, str) and any(ends_with(name, target) for name in there))
        chosen = [name for name in there if any(ends_with(name, target) for target in targets)]
        if listed and not targets:
            problems.append(f"{CONFIG}: target_modules {given!r} names no matrix of the model")
        elif not targets:
            problems.append(f"{CONFIG}: target_modules is {given!r}; expected names or a regular expression")
    lora = None
    try:
        lora = LoRAConfig(
            rank=raw.get("r", 8), alpha=raw.get("lora_alpha", 8), dropout=raw.get("lora_dropout") or 0.0,
            rslora=bool(raw.get("use_rslora")), targets=targets or ("none",),
            rank_pattern=raw.get("rank_pattern") or {}, alpha_pattern=raw.get("alpha_pattern") or {},
        )
        if targets and list(named_targets(model, lora)) != chosen:  # Names of ours are not PEFT's.
            lora = dataclasses.replace(lora, targets=tuple(chosen))
    except (ValueError, TypeError, AttributeError) as error:
        problems.append(f"{CONFIG}: {error}")
    return (lora if targets else None), problems


def _weights(lora: LoRAConfig, model: ModelConfig, tensors: Mapping[str, np.ndarray]) -> tuple[Tree, list[str]]:
    """The adapter in tensors, and what is missing, unexpected, not finite, or of a wrong shape or dtype."""
    shapes = jax.eval_shape(lambda: init_adapter(model, lora, jax.random.key(0)))
    problems, tree, known = [], {}, set()
    for name, path in named_targets(model, lora).items():
        like = _at(shapes, path)
        assert like is not None  # The tree has exactly these.
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        for part in ("A", "B"):
            tensor, shape = _tensor(name, part), like[part.lower()].shape
            merged = (shape[0], math.prod(shape[1:])) if part == "A" else (math.prod(shape[:-1]), shape[-1])
            known.add(tensor)
            if tensor not in tensors:
                problems.append(f"missing: {tensor} {list(merged)}")
                continue
            array = tensors[tensor]
            if array.shape != merged:
                problems.append(f"wrong shape: {tensor} is {list(array.shape)}; expected {list(merged)}")
            elif array.dtype.name not in ("float32", "bfloat16", "float16"):
                problems.append(f"wrong dtype: {tensor} is {array.dtype}; expected float32, bfloat16 or float16")
            elif not np.isfinite(widened := array.astype(np.float32)).all():
                problems.append(f"not finite: {tensor} holds NaN or infinity; its training or its file is broken")
            else:
                node[part.lower()] = widened.reshape(shape)
    problems += [f"unexpected: {name} {list(array.shape)}" for name, array in tensors.items() if name not in known]
    return tree, problems


def _shortest(model: ModelConfig, lora: LoRAConfig, written: list[str]) -> list[str]:
    """The targets as they were given, or whole names where those would mean other modules to PEFT."""
    given = [target for target in lora.targets if any(ends_with(name, target) for name in written)]
    meant = [name for name in modules(model).dense if any(ends_with(name, target) for target in given)]
    return given if meant == written else written


def _tensor(module: str, part: str) -> str:
    return f"{_PREFIX}{module}.lora_{part}.weight"


def _at(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        if key not in tree:
            return None
        tree = tree[key]
    return tree
