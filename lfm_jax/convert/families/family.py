"""What a family of published models is; `families.FAMILIES` has a row for each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from lfm_jax.config import ModelConfig
from lfm_jax.convert.weights import Weight


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One row: how models of one kind are described in a `config.json` and stored in safetensors."""

    name: str
    """As messages call it."""
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    """A checkpoint is of this family where `model_type` is one of the first and `architectures` has one of the second;
    the first of each is written."""
    features: Mapping[str, tuple[Any, ...]]
    """Fields of ModelConfig that may have these values only, each element of them where they are tuples; a field that
    is not here is written to config.json, or does not concern one."""
    read: Callable[[Mapping[str, Any]], dict[str, Any]]
    """config.json -> fields of ModelConfig. Raises ValueError for what it cannot read."""
    write: Callable[[ModelConfig], dict[str, Any]]
    """ModelConfig, its features found good -> config.json without these two keys."""
    weights: tuple[Weight, ...]
    """Its tensors, in the order of a file."""

    def lacks(self, config: ModelConfig) -> list[str]:
        """What the model has and this family cannot express."""
        found = []
        for field, allowed in self.features.items():
            value = getattr(config, field)
            values = sorted(set(value)) if isinstance(value, tuple) else [value]
            found += [f"{one} layers" if field == "layer_types" else f"{field}={one}"
                      for one in values if one not in allowed]
        return found
