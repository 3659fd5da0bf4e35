"""The description of a family of published models; `families.FAMILIES` has a row for each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from lfm_jax.config import ModelConfig
from lfm_jax.convert.weights import Weight


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """How the models of one family are described in a `config.json` and stored in safetensors."""

    name: str
    """The name in messages."""
    model_types: tuple[str, ...]
    architectures: tuple[str, ...]
    """A checkpoint is of this family if its `model_type` is one of `model_types` and its `architectures` has one of
    these; the first of each is written."""
    features: Mapping[str, tuple[Any, ...]]
    """The only values that some fields of ModelConfig may have, or their elements if they are tuples. The other fields
    are written to config.json, or do not belong there."""
    also_lacks: Callable[[ModelConfig], list[str]] = lambda config: []
    """What else of a model with these features the family cannot express."""
    read: Callable[[Mapping[str, Any]], dict[str, Any]]
    """config.json -> fields of ModelConfig. Raises ValueError if it cannot read the file."""
    write: Callable[[ModelConfig], dict[str, Any]]
    """ModelConfig with supported features -> config.json without `model_type` and `architectures`."""
    weights: tuple[Weight, ...]
    """The table of tensors, in the order of a file."""
    state_dict: tuple[Weight, ...] = ()
    """The table of a `state_dict()` in PyTorch; empty if it is `weights`."""

    @property
    def in_memory(self) -> tuple[Weight, ...]:
        """The table of a `state_dict()` in PyTorch."""
        return self.state_dict or self.weights

    def lacks(self, config: ModelConfig) -> list[str]:
        """Returns the features of the model that this family cannot express."""
        found = []
        for field, allowed in self.features.items():
            value = getattr(config, field)
            values = sorted(set(value)) if isinstance(value, tuple) else [value]
            found += [f"{one} layers" if field == "layer_types" else f"{field}={one}"
                      for one in values if one not in allowed]
        return found or self.also_lacks(config)
