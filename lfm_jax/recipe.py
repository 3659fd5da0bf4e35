"""Recipes: a YAML file and dotted overrides become one frozen dataclass, every key checked.

A YAML key `optimizer: {peak_lr: 1e-3}` and a flag `--optimizer.peak-lr 1e-3` are the same thing: the file
is turned into flags that stand before the user's own, and tyro parses them all. An unknown key is thus
one kind of error, with the nearest name.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import GenericAlias
from typing import Any, Literal, get_args

import tyro
import yaml
from tyro import constructors

from lfm_jax.config import ModelConfig
from lfm_jax.kinds import Table

PRESET = "--model.preset"
_RULES = constructors.ConstructorRegistry()


@_RULES.primitive_rule
def _names_of_a_table(info: constructors.PrimitiveTypeInfo) -> Any:
    """A tuple of names that a table of kinds holds (`config.LayerType`): the choices are those there are now."""
    item = next(iter(get_args(info.type)), None)
    table = next((x for x in getattr(item, "__metadata__", ()) if isinstance(x, Table)), None)
    if table is None:
        return None
    literal: Any = Literal
    names: Any = GenericAlias(tuple, (literal[tuple(table)], ...))
    return constructors.ConstructorRegistry.get_primitive_spec(constructors.PrimitiveTypeInfo.make(names, info.markers))


def load_recipe[C](
    cls: type[C], path: str | Path | Sequence[str | Path] | None, overrides: Sequence[str] = (), *, prog: str = "lfm",
    description: str | None = None,
) -> C:
    """Builds `cls` from YAML files and command-line flags; later files and flags win.

    `model: {preset: NAME}`, or `--model.preset NAME`, stands for all fields of that preset; fields named beside it win.
    A class may have `class_for(flags)`, which gives the class to build instead, and `flags_before(flags)`, which gives
    the flags that stand before all others.

    Args:
      prog: the command, as its help names it.
      description: what its help begins with; the docstring of `cls` if left out.

    Raises:
      ValueError: the file cannot be read or is not a mapping.
      SystemExit: an unknown key or a bad value; tyro has printed what and where, with the nearest name.
    """
    paths = [] if path is None else [path] if isinstance(path, (str, Path)) else path
    flags = [flag for each in paths for flag in _file_flags(each)]
    flags = [*flags, *overrides]
    if hasattr(cls, "class_for"):
        cls = cls.class_for(flags)
    if hasattr(cls, "flags_before") and not {"-h", "--help"} & set(flags):
        flags = [*cls.flags_before(flags), *flags]
    with _RULES:
        return tyro.cli(cls, args=_expand_preset(flags), prog=prog, description=description,
                        config=(tyro.conf.FlagConversionOff,))


def _file_flags(path: str | Path) -> list[str]:
    try:
        content = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"recipe {path} cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"recipe {path} is not valid YAML: {error}") from None
    if not isinstance(content, Mapping):
        raise ValueError(f"recipe {path} holds {type(content).__name__}; expected keys with values")
    return _flags(content)


def _flags(content: Mapping[str, Any], prefix: str = "") -> list[str]:
    flags: list[str] = []
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flags += _flags(value, f"{name}.")
        elif isinstance(value, (list, tuple)):
            # A mapping in a list is one argument, in YAML again.
            flags += [f"--{name}", *(_flow(v) if isinstance(v, Mapping) else str(v) for v in value)]
        else:
            flags += [f"--{name}", str(value)]
    return flags


def _flow(value: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(value), default_flow_style=True, width=math.inf, sort_keys=False).strip()


def _expand_preset(flags: list[str]) -> list[str]:
    """`--model.preset NAME` (the last one, if several) turned into the flags of its fields, before all others."""
    preset: list[str] = []
    while PRESET in flags[:-1]:
        at = flags.index(PRESET)
        preset = model_flags(ModelConfig.preset(flags[at + 1]))
        flags = flags[:at] + flags[at + 2 :]
    return preset + flags


def model_flags(model: ModelConfig) -> list[str]:
    """The flags of all fields of a model."""
    return _flags({"model": dataclasses.asdict(model)})


def dump_recipe(config: Any) -> str:
    """The YAML text of a config dataclass; `load_recipe` reads it back to an equal one."""
    return yaml.safe_dump(to_plain(config), sort_keys=False)


def to_plain(config: Any) -> dict[str, Any]:
    """A config dataclass as dicts, lists and scalars, as JSON and YAML hold them."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(v) for key, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value

    return plain(dataclasses.asdict(config))
