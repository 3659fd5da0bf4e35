"""The table of families, and `config.json` both ways: a file names its family, a model gets the first that fits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lfm_jax.config import ModelConfig
from lfm_jax.convert.families.family import Family
from lfm_jax.convert.families.lfm2 import LFM2
from lfm_jax.convert.families.lfm2_encoder import LFM2_ENCODER
from lfm_jax.convert.families.lfm2_moe import LFM2_MOE
from lfm_jax.convert.families.lfm3 import LFM3

FAMILIES: list[Family] = [LFM2, LFM2_MOE, LFM3, LFM2_ENCODER]
"""In order of preference, for files that name only a model_type and for models that several can express."""


def config_from_hf(hf: Mapping[str, Any], **overrides: Any) -> ModelConfig:
    """Reads the dict of a Hugging Face `config.json`, in the old style or the new.

    Keys that do not change the network are ignored, as in `transformers`.

    Args:
      hf: the parsed config.json. Its family is the one with its `model_type` and one of its `architectures`; without
        `architectures`, the first one with its `model_type`.
      **overrides: ModelConfig fields that win over the file, for example `dtype`.

    Raises:
      ValueError: no family has that model_type or architecture, a size is missing, or a field is not supported or not
        valid.
    """
    return ModelConfig(**(named_family(hf).read(hf) | overrides))


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    """Returns the dict of a config.json that `transformers` loads.

    Raises:
      ValueError: no family can express the model; the message lists what the nearest one lacks.
    """
    family = family_of(config)
    return {"architectures": [family.architectures[0]], "model_type": family.model_types[0]} | family.write(config)


def families_of(config: ModelConfig) -> list[Family]:
    """Returns all families that can express the model, in order of preference."""
    return [family for family in FAMILIES if not family.lacks(config)]


def family_of(config: ModelConfig) -> Family:
    """Returns the first family that can express the model.

    Raises:
      ValueError: no family can; the message lists what the nearest one lacks.
    """
    lacks = {family.name: family.lacks(config) for family in FAMILIES}
    nearest = min(FAMILIES, key=lambda family: len(lacks[family.name]))
    if found := lacks[nearest.name]:
        raise ValueError(f"{nearest.name} in transformers has no {', '.join(found)}; such a model cannot be exported")
    return nearest


def named_family(hf: Mapping[str, Any]) -> Family:
    """Returns the family that a config.json names.

    Raises:
      ValueError: no family has its model_type, or one of its architectures.
    """
    model_type, architectures = hf.get("model_type"), hf.get("architectures")
    by_type = [family for family in FAMILIES if model_type in family.model_types]
    if not by_type:
        known = ", ".join(f"{name!r} ({family.name})" for family in FAMILIES for name in family.model_types)
        raise ValueError(f"model_type is {model_type!r}; expected {known}")
    if not architectures:
        return by_type[0]
    if isinstance(architectures, list):
        for family in by_type:
            if any(name in family.architectures for name in architectures):
                return family
    known = ", ".join(name for family in by_type for name in family.architectures)
    raise ValueError(f"architectures is {architectures!r}; expected a list with {known} for model_type {model_type!r}")
