"""How formats describe and store models; `families.FAMILIES` has a row for each family of published models."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from lfm_jax.config import ModelConfig
from lfm_jax.convert.weights import Weight


@dataclasses.dataclass(frozen=True, kw_only=True)
class Format:
    """Which models a kind of file can hold, and how it describes and stores them."""

    name: str
    """The name in messages."""
    features: Mapping[str, tuple[Any, ...]]
    """The only values that some fields of ModelConfig may have, or their elements if they are tuples. The other fields
    are written, or do not belong there."""
    also_lacks: Callable[[ModelConfig], list[str]] = lambda config: []
    """What else of a model cannot be expressed."""
    read: Callable[[Mapping[str, Any]], dict[str, Any]]
    """The description -> fields of ModelConfig. Raises ValueError if it cannot read it."""
    write: Callable[[ModelConfig], dict[str, Any]]
    """ModelConfig with supported features -> the description."""
    weights: tuple[Weight, ...]
    """The table of tensors, in the order of a file."""

    def lacks(self, config: ModelConfig) -> list[str]:
        """Returns the features of the model that cannot be expressed."""
        found = []
        for field, allowed in self.features.items():
            value = getattr(config, field)
            values = sorted(set(value)) if isinstance(value, tuple) else [value]
            found += [f"{one} layers" if field == "layer_types" else f"{field}={one}"
                      for one in values if one not in allowed]
        return found + self.also_lacks(config)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family(Format):
    """How the models of one family are described in a `config.json`, without `model_type` and `architectures`, and
    stored in safetensors."""

    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    """A checkpoint is of this family if its `model_type` is one of `model_types` and its `architectures` has one of
    these; the first of each is written."""
    state_dict: tuple[Weight, ...] = ()
    """The table of a `state_dict()` in PyTorch; empty if it is `weights`."""

    @property
    def in_memory(self) -> tuple[Weight, ...]:
        """The table of a `state_dict()` in PyTorch."""
        return self.state_dict or self.weights
