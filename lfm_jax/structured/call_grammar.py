"""Lark rules for tool calls as `tools.render_call` writes them, from the JSON schemas of their parameters.

The structure is spelled out here, with the words of Python or JSON for true, false and null; each string and each
number is a small JSON schema of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from lfm_jax.structured.json_schema import ANY_VALUE, MALFORMED, OPTIONS, Bounds, bounded, compiled, refusal
from lfm_jax.structured.kept import Kept
from lfm_jax.structured.relaxed import relaxed
from lfm_jax.structured.schema import IN_PLACE, KEYWORDS, OF_TYPE, GrammarError, Schema, plain, resolved, types
from lfm_jax.structured.size import check_size
from lfm_jax.text.call_literals import is_pythonic

_PYTHON = {None: "None", True: "True", False: "False"}
_JSON = {None: "null", True: "true", False: "false"}
_CHARACTER, _LAST = r"(?:[^<]|<{1,8}[^<|])", "<{0,8}$"
"""Of a string without `<|`, which would read as a marker."""


class CallRules:
    """Collects the rules of calls; each method that makes a rule returns its name.

    Raises:
      GrammarError: from `call`, see `Grammar.tool_calls`.
    """

    def __init__(self, bounds: Bounds):
        self.bodies: dict[str, str] = {}
        """Right-hand sides by name."""
        self.relaxed: list[str] = []
        """Places of what tools ask for that is not strict and cannot be said."""
        self._bounds = bounds
        self._names: dict[str, str] = {}
        self._references: dict[str, str] = {}
        self._todo: list[tuple[str, str]] = []
        """References whose rules have a name and no body yet, each with its place."""
        self._words = _PYTHON

    def call(self, tool: Mapping[str, Any]) -> str:
        """A call of a tool, given as `tool_schemas` gives it; of one that is not `strict`, as far as can be said."""
        name, parameters, before = tool["name"], tool["parameters"], (dict(self.bodies), dict(self._names))
        place = f"tool {name!r}: parameters"
        try:
            try:
                return self._call(name, parameters, place)
            except (GrammarError, *MALFORMED):
                if tool.get("strict"):
                    raise
            self.bodies, self._names = before
            left_out: list[str] = []
            root = plain(parameters, left_out)
            check_size(root)
            left, places = relaxed(root, functools.partial(_sayable, bounds=self._bounds))
            self.relaxed += [f"{place}{at.removeprefix('#')}" for at in dict.fromkeys([*left_out, *places])]
            return self._call(name, left, place)
        except MALFORMED as error:
            raise GrammarError(f"{place} are malformed: {type(error).__name__}: {error}") from None
        except RecursionError:
            raise GrammarError(f"{place} are nested too deeply") from None
        except GrammarError as error:
            raise error if str(error).startswith(place) else GrammarError(f"{place}: {error}") from None

    def _call(self, name: str, parameters: Schema, place: str) -> str:
        self._todo = []
        compiled(parameters, self._bounds)
        # Of strings without a limit of their own see `_string`.
        root = bounded({"properties": {}} | parameters, dataclasses.replace(self._bounds, string=None))
        self._only(root, {"type"} | OF_TYPE["object"] - {"patternProperties"}, place)
        pythonic = is_pythonic(name, [*root["properties"], *root.get("required", ())])
        self._references, self._words = {}, _PYTHON if pythonic else _JSON
        if pythonic:
            rule = self._rule(f'"{name}(" {self._members(root, place, keywords=True)} ")"')
        else:
            opening = f'{{"name": "{name}", "arguments": {{'
            rule = self._rule(f"{json.dumps(opening)} {self._members(root, place)} \"}}}}\"")
        while self._todo:
            reference, place = self._todo.pop()
            self.bodies[self._references[reference]] = self._value(resolved(root, reference), place)
        return rule

    def _rule(self, body: str) -> str:
        if body not in self._names:
            self._names[body] = f"r{len(self.bodies)}"
            self.bodies[self._names[body]] = body
        return self._names[body]

    def _choice(self, choices: Sequence[str], place: str) -> str:
        if not choices:
            raise GrammarError(f"{place}: nothing fits")
        return self._rule(" | ".join(choices))

    def _only(self, node: Schema, supported: set[str], place: str) -> None:
        if refused := sorted(node.keys() & KEYWORDS - supported):
            # Beside a list of items, which its author wrote, `bounded` puts additionalItems.
            key = "items" if refused[0] == "additionalItems" else refused[0]
            raise GrammarError(f"{place}/{key} is not supported here")

    def _members(self, node: Schema, place: str, *, keywords: bool = False) -> str:
        """Named values in order, commas between them; those not required may be left out."""
        required, named = node.get("required", []), node.get("properties", {})
        named = named | {name: node["additionalProperties"] for name in required if name not in named}
        if node.get("minProperties", 0) > len(required) or node.get("maxProperties", len(named)) < len(named):
            raise GrammarError(f"{place}: minProperties and maxProperties are not supported beside properties")
        first = rest = '""'
        for name, child in reversed(named.items()):
            key = json.dumps(f"{name}=" if keywords else f"{self._literal(name)}: ")
            item = f"{key} {self._value(child, f'{place}/properties/{name}')}"
            if name in required:
                first, rest = self._rule(f"{item} {rest}"), self._rule(f'", " {item} {rest}')
            else:
                first, rest = self._rule(f"{item} {rest} | {first}"), self._rule(f'(", " {item})? {rest}')
        return first

    def _value(self, node: Any, place: str) -> str:
        """A literal that fits a schema."""
        if not isinstance(node, dict):
            raise GrammarError(f"{place}: the schema false is not supported")
        in_place = node.keys() & IN_PLACE
        if in_place & {"const", "enum"}:
            self._only(node, {"const", "enum", "type"}, place)
            values = [v for v in node.get("enum", [node.get("const")]) if v == node.get("const", v)]
            return self._choice([json.dumps(self._literal(v)) for v in values if _is_of(v, types(node))], place)
        if in_place:
            (key, *_) = sorted(in_place)
            self._only(node, {key}, place)
            if key == "$ref":
                return self._reference(node[key], place)
            if key == "allOf" and len(node[key]) > 1:
                raise GrammarError(f"{place}/allOf is not supported where it combines schemas")
            return self._choice([self._value(child, f"{place}/{key}/{i}") for i, child in enumerate(node[key])], place)
        self._only(node, KEYWORDS - {"patternProperties", "prefixItems", "additionalItems"}, place)
        if not types(node):
            return self._reference(ANY_VALUE["$ref"], place)
        return self._choice([self._of_type(kind, node, place) for kind in types(node)], place)

    def _reference(self, reference: str, place: str) -> str:
        if reference not in self._references:
            name = self._references[reference] = f"r{len(self.bodies)}"
            self.bodies[name] = ""  # Takes the name, which may be needed inside.
            self._todo.append((reference, f"{place} ({reference})"))
        return self._references[reference]

    def _of_type(self, kind: str, node: Schema, place: str) -> str:
        if kind == "null":
            return json.dumps(self._words[None])
        if kind == "boolean":
            return f'"{self._words[True]}" | "{self._words[False]}"'
        if kind == "string":
            return self._string(node, place)
        if kind == "array":
            item = self._value(node.get("items", {}), f"{place}/items")
            return self._repeated("[]", item, node.get("minItems", 0), node["maxItems"], place)
        if kind != "object":
            return self._leaf({"type": kind} | {key: node[key] for key in node.keys() & OF_TYPE["number"]}, place)
        if node.get("properties") or node.get("required") or node["additionalProperties"] is False:
            return f'"{{" {self._members(node, place)} "}}"'
        value = self._value(node["additionalProperties"], f"{place}/additionalProperties")
        item = f'{self._string({}, place)} ": " {value}'
        return self._repeated("{}", item, node.get("minProperties", 0), node["maxProperties"], place)

    def _repeated(self, brackets: str, item: str, low: int, high: int, place: str) -> str:
        if low > high:
            raise GrammarError(f"{place}: no number of items is within the limits")
        more = f'(", " {item}){{{max(low - 1, 0)},{high - 1}}}' if high > 1 else ""
        some = f"{item} {more}" if high else ""
        return f'"{brackets[0]}" {some if low or not high else f"({some})?"} "{brackets[1]}"'

    def _string(self, node: Schema, place: str) -> str:
        said = {key: node[key] for key in node.keys() & OF_TYPE["string"]}
        low, limit = node.get("minLength", 0), self._bounds.string
        if limit is not None and said.keys() <= {"minLength"}:
            # One regex for characters and length: masks take a tenth of the time that they take with two.
            pattern = f"^{_CHARACTER}{{{low},{max(low, limit)}}}{_LAST}"
            return self._leaf({"type": "string", "pattern": pattern}, place)
        leaf = {"type": "string", "allOf": [{"pattern": f"^{_CHARACTER}*{_LAST}"}]} | said
        limited = leaf if limit is None else {"maxLength": max(low, limit)} | leaf
        return self._leaf(leaf if refusal(_json_rule(limited)) else limited, place)

    def _leaf(self, schema: Schema, place: str) -> str:
        body = _json_rule(schema).removeprefix("start: ")
        if body not in self._names and (why := refusal(f"start: {body}")):
            raise GrammarError(f"{place}: {why}")
        return self._rule(body)

    def _literal(self, value: Any) -> str:
        if value is None or isinstance(value, bool):
            return self._words[value]
        if isinstance(value, list):
            return f"[{', '.join(map(self._literal, value))}]"
        if isinstance(value, dict):
            return f"{{{', '.join(f'{self._literal(k)}: {self._literal(v)}' for k, v in value.items())}}}"
        return json.dumps(value, ensure_ascii=False).replace("<|", "<\\u007c")


_SAYABLE: Kept[bool] = Kept(4096, 2**22, lambda text, _: len(text))


def _sayable(parameters: Schema, bounds: Bounds) -> bool:
    """Whether calls can promise arguments that fit these parameters; most schemas stand in many tools."""
    return _SAYABLE.get(json.dumps([parameters, dataclasses.astuple(bounds)]), lambda: _is_said(parameters, bounds))


def _is_said(parameters: Schema, bounds: Bounds) -> bool:
    try:
        CallRules(bounds).call({"name": "f", "parameters": parameters, "strict": True})
    except GrammarError:
        return False
    return True


def _json_rule(schema: Schema) -> str:
    return f"start: %json {json.dumps(schema | {'x-guidance': OPTIONS})}"


_NAMES = {bool: {"boolean"}, int: {"integer", "number"}, float: {"number"}, str: {"string"}, list: {"array"},
          dict: {"object"}}


def _is_of(value: Any, kinds: Sequence[str]) -> bool:
    """Whether a value is of one of some types; with none it is."""
    return not kinds or not _NAMES.get(type(value), {"null"}).isdisjoint(kinds)
