"""Schemas of the functions that a model may call: made from Python functions, or given as data and checked.

A schema is plain data, `{"name", "description", "parameters", "strict"}`, its parameters a JSON schema of an object.
"""

from __future__ import annotations

import enum
import inspect
import json
import re
import textwrap
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, NotRequired, Required

from lfm_jax.problems import raise_problems

Tool = Mapping[str, Any] | Callable[..., Any]


def tool_schemas(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Returns the schemas `{"name", "description", "parameters"}` of tools, as copies made of JSON types.

    Keys keep their order, at every level: prompts show tools as they were written.

    Args:
      tools: Python functions (see `function_schema`), such schemas, or those in OpenAI's
        `{"type": "function", "function": schema}`. A tool without `parameters`, or with none in them, takes none.

    Raises:
      ValueError: one message that lists every problem.
    """
    schemas, problems = [], []
    for i, tool in enumerate(tools):
        try:
            schema = _schema(tool)
        except ValueError as error:
            problems.append(f"tool {i}: {error}")
            continue
        schemas.append(schema)
        problems += [f"tool {i}: {problem}" for problem in _schema_problems(schema)]
        if schema.get("name") in [other.get("name", "") for other in schemas[:-1]]:
            problems.append(f"tool {i}: another tool has the name {schema['name']!r}")
    raise_problems("tools are not valid", problems)
    return schemas


def _schema(tool: Tool) -> dict[str, Any]:
    if callable(tool):
        return function_schema(tool)
    try:
        schema = json.loads(json.dumps(tool, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"it must be a function or a schema of plain data: {error}") from error
    if isinstance(schema, dict) and "function" in schema and schema.get("type", "function") == "function":
        schema = schema["function"]
    if not isinstance(schema, dict):
        raise ValueError(f"it must be a function or a schema, not {schema!r}")
    if schema.get("parameters") in (None, {}):
        schema["parameters"] = {"type": "object", "properties": {}}
    return schema


def _schema_problems(schema: Mapping[str, Any]) -> Iterator[str]:
    name, parameters = schema.get("name"), schema["parameters"]
    if not isinstance(name, str) or not name or not f"_{re.sub('[.-]', '', name)}".isidentifier():
        yield f"its name is {name!r}; it must be made of letters, digits, _, - and dots"
    if not isinstance(schema.get("description", ""), str):
        yield "its description must be a text"
    if not isinstance(schema.get("strict"), bool | None):
        yield f"strict is {schema['strict']!r:.40}; it must be true or false"
    if not isinstance(parameters, dict) or parameters.get("type", "object") != "object":
        yield 'its parameters must be a JSON schema with "type": "object"'
        return
    properties, required = parameters.get("properties", {}), parameters.get("required", [])
    if not isinstance(properties, dict) or not all(isinstance(p, dict | bool) for p in properties.values()):
        yield "the properties of its parameters must be schemas by name"
    if not isinstance(required, list) or not all(isinstance(r, str) for r in required):
        yield "the required of its parameters must be a list of names"


def function_schema(function: Callable[..., Any]) -> dict[str, Any]:
    """Makes the schema `{"name", "description", "parameters"}` of a Python function.

    Types come from the hints: str, int, float, bool, None, Any, list, dict, Literal, Enum, unions, Annotated and
    TypedDict. Parameters without a default are required. Descriptions come from the docstring: its first
    paragraph, and the entries under `Args:` in Google style.

    Raises:
      ValueError: JSON cannot express some parameters, which the message lists: `*args`, `**kwargs`, positional-only
        ones, and those without a hint or with another type.
    """
    name = getattr(function, "__name__", repr(function))
    try:
        signature = inspect.signature(function, eval_str=True)
    except Exception as error:  # Hints are code, and may raise anything.
        raise ValueError(f"the signature of {name} cannot be read: {error}") from error
    description, notes = _descriptions(inspect.getdoc(function) or "")
    properties, required, problems = {}, [], []
    for p in signature.parameters.values():
        try:
            if p.kind not in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY):
                raise ValueError(f"is {p.kind.description}, but tools are called with arguments by name")
            if p.annotation is p.empty:
                raise ValueError("has no type hint")
            properties[p.name] = _hint_schema(p.annotation) | _note(notes.get(p.name))
        except ValueError as error:
            problems.append(f"parameter {p.name!r} {error}")
        if p.default is p.empty:
            required.append(p.name)
    if problems:
        raise ValueError(f"{name} cannot be a tool: {'; '.join(problems)}")
    return {"name": name, "description": description, "parameters": _object(properties, required)}


def _descriptions(doc: str) -> tuple[str, dict[str, str]]:
    """Returns the first paragraph of a docstring, and its description of each parameter."""
    section = re.search(r"^(?:Args|Arguments|Parameters):[ \t]*\n((?:[ \t].*\n?|\n)*)", doc, re.MULTILINE)
    summary = (doc[: section.start()] if section else doc).strip().partition("\n\n")[0]
    entries = textwrap.dedent(section[1] if section else "")
    found = re.findall(r"^(\w[\w, ]*?) *(?:\(.*?\))?:(.*(?:\n(?:[ \t].*)?)*)", entries, re.MULTILINE)
    notes = {name.strip(): " ".join(text.split()) for names, text in found for name in names.split(",")}
    return " ".join(summary.split()), notes


_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", types.NoneType: "null", None: "null"}


def _hint_schema(hint: Any, within: tuple[Any, ...] = ()) -> dict[str, Any]:
    """Returns the JSON schema of a type hint; `within` are the classes whose fields contain it."""
    origin, args = typing.get_origin(hint) or hint, typing.get_args(hint)
    if hint is Any:
        return {}
    if origin in (Annotated, Required, NotRequired):
        return _hint_schema(args[0], within) | _note(next((note for note in args[1:] if isinstance(note, str)), None))
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [_hint_schema(arg, within) for arg in args]}
    if origin in (list, Sequence):
        return {"type": "array"} | ({"items": _hint_schema(args[0], within)} if args else {})
    if origin in (dict, Mapping) and (not args or args[0] is str):
        return {"type": "object"} | ({"additionalProperties": _hint_schema(args[1], within)} if args else {})
    if origin is Literal:
        return _enum(hint, args)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return _enum(hint, [member.value for member in hint])
    if typing.is_typeddict(hint) and hint not in within:
        return _typed_dict(hint, (*within, hint))
    if hint is None or (isinstance(hint, type) and hint in _TYPES):
        return {"type": _TYPES[hint]}
    raise ValueError(f"has the type {hint}, of which there is no JSON schema" + " (it holds itself)" * (hint in within))


def _enum(hint: Any, values: Sequence[Any]) -> dict[str, Any]:
    kinds = {_TYPES.get(type(value)) for value in values}
    if None in kinds:
        raise ValueError(f"has the type {hint}, with values that are not JSON")
    return ({"type": kinds.pop()} if len(kinds) == 1 else {}) | {"enum": list(values)}


def _typed_dict(cls: Any, within: tuple[Any, ...]) -> dict[str, Any]:
    hints = typing.get_type_hints(cls, include_extras=True)
    # If annotations are strings, the class itself does not see NotRequired in them.
    required = [k for k in hints if k in cls.__required_keys__ and typing.get_origin(hints[k]) is not NotRequired]
    return _object({name: _hint_schema(hint, within) for name, hint in hints.items()}, required)


def _note(text: str | None) -> dict[str, str]:
    return {"description": text} if text else {}


def _object(properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    return {"type": "object", "properties": properties} | ({"required": required} if required else {})
