"""JSON schemas that ask for more than calls of tools can promise: what is left of one without that."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lfm_jax.structured.schema import IN_PLACE, KEYWORDS, GrammarError, Schema, nodes, replaced, resolved

_ORDER = ("type", "enum", "const", "properties", "required", "additionalProperties", "items", "$ref", "anyOf", "oneOf")
"""Keywords that stay before others, where not all can."""
_DEFINITIONS = {"$defs", "definitions"}
MAX_ALONE = 1000
"""Most keywords that are looked at one by one, since a schema cannot have all that it has: a few milliseconds each."""
_SMALLER = ("maxLength", "maxItems", "maxProperties", "maximum", "exclusiveMaximum")
_LARGER = ("minLength", "minItems", "minProperties", "minimum", "exclusiveMinimum")


def relaxed(root: Schema, sayable: Callable[[Schema], bool]) -> tuple[Schema, list[str]]:
    """Of the parameters of a tool, as `plain` gives them and of a size that `check_size` lets pass, what can be said.

    Whatever fits the parameters fits what is left of them, keys apart that an object does not name. Of each schema as
    many keywords stay as can; of tuples and of keys by pattern stay the schemas of their values; schemas that meet
    become one.

    Args:
      sayable: whether parameters can be said as they are.

    Returns:
      The parameters that are left, which can be said, and the places of what is gone: JSON pointers.

    Raises:
      GrammarError: more than MAX_ALONE keywords to look at one by one.
    """
    relaxing = _Relaxing(root, sayable)
    left = relaxing.all()
    choices = [(place, node) for place, node in nodes(left) if "oneOf" in node]
    if choices and not sayable(left):  # Whether choices are provably distinct shows only as a whole.
        for place, node in choices:
            node["anyOf"] = node.pop("oneOf")
            relaxing.places.append(f"{place}/oneOf")
    return left, list(dict.fromkeys(relaxing.places))


class _Relaxing:
    def __init__(self, root: Schema, sayable: Callable[[Schema], bool]):
        self.places: list[str] = []
        self._root, self._sayable = root, sayable
        self._alone = 0
        self._names: dict[str, str] = {}
        """By reference, where its schema stands among the `$defs` of what is left."""

    def all(self) -> Schema:
        left = self._value({"type": "object"} | self._root, "#", (), is_root=True)
        definitions: Schema = {}
        while len(definitions) < len(self._names):  # Each may lead to more.
            reference = [*self._names][len(definitions)]
            definitions[self._names[reference]] = self._value(resolved(self._root, reference), reference, ())
        return left | {"$defs": definitions}

    def _value(self, node: Any, place: str, within: tuple[str, ...], *, is_root: bool = False) -> Schema:
        """What is left of a schema.

        Args:
          within: references that were followed to where it stands: a merged schema must not hold itself for ever.
        """
        if not isinstance(node, dict):  # Nothing fits it, but something must be written.
            self.places.append(place)
            return {}
        node, within = self._met(node, place, within)
        self.places += [f"{place}/{key}" for key in node
                        if key not in KEYWORDS | _DEFINITIONS and not self._can({key: True}, is_root=False)]
        node = {key: value for key, value in node.items() if key in KEYWORDS}
        node = self._of_types(_without_false(self._as_items(self._as_values(node, place), place)), place)
        kept: Schema = node if self._can(node, is_root=is_root) else {}
        if kept is not node:
            for key in sorted(node, key=lambda key: _ORDER.index(key) if key in _ORDER else len(_ORDER)):
                self._alone += 1
                if self._alone > MAX_ALONE:
                    raise GrammarError(f"more than {MAX_ALONE} keywords where not all can be promised (at {place:.80})")
                if self._can(kept | {key: node[key]}, is_root=is_root):
                    kept[key] = node[key]
                else:
                    self.places.append(f"{place}/{key}")
        left = replaced(kept, lambda child, part: (
            child if _closes(child, part) else self._value(child, f"{place}/{part}", within)
        ))
        if "$ref" in left:
            left["$ref"] = f"#/$defs/{self._names.setdefault(left['$ref'], f'r{len(self._names)}')}"
        return left

    def _can(self, node: Schema, *, is_root: bool) -> bool:
        """Whether a schema can be said, whatever stands inside it."""
        shallow = replaced(node, lambda child, part: child if _closes(child, part) else {})
        if "$ref" in shallow:
            shallow["$ref"] = "#/$defs/r"
        if isinstance(shallow.get("oneOf"), list):
            shallow["anyOf"] = shallow.pop("oneOf")
        root = shallow if is_root else {"type": "object", "properties": {"x": shallow}}
        return self._sayable(root | {"$defs": {"r": {}}})

    # ---------------------------------------------------------------- schemas put in other words

    def _met(self, node: Schema, place: str, within: tuple[str, ...]) -> tuple[Schema, tuple[str, ...]]:
        """One schema for all that hold for a value; and `within` with the references that were followed for it."""
        if not ({"allOf", "$ref"} & node.keys()) or not (node.keys() & KEYWORDS - {"$ref"}):
            return node, within
        references: list[str] = []
        together = [*self._together(node, references)]
        if circle := next((reference for reference in references if reference in within), None):
            self.places.append(f"{place}/allOf" if "allOf" in node else place)
            return {"$ref": circle}, within
        if len(together) == 1 or not together:
            return together[0] if together else {}, (*within, *references)
        merged, exact = _merged(together)
        if not exact:
            self.places.append(f"{place}/{'allOf' if 'allOf' in node else '$ref'}")
        return merged, (*within, *references)

    def _together(self, node: Any, references: list[str]) -> Iterator[Schema]:
        """The schemas that hold for one value, references followed and listed."""
        if not isinstance(node, dict):
            return
        own = {key: value for key, value in node.items() if key in KEYWORDS - {"allOf", "$ref"}}
        others = {key: value for key, value in node.items() if key not in KEYWORDS | _DEFINITIONS}
        if own or others:
            yield own | others
        if isinstance(reference := node.get("$ref"), str) and reference not in references:
            references.append(reference)
            yield from self._together(resolved(self._root, reference), references)
        for child in node.get("allOf", []):
            yield from self._together(child, references)

    def _as_values(self, node: Schema, place: str) -> Schema:
        """Keys by pattern as a map whose values fit the schema of some pattern."""
        patterns = node.get("patternProperties")
        if not isinstance(patterns, dict) or node.get("properties"):
            return node
        self.places.append(f"{place}/patternProperties")
        rest = node.get("additionalProperties", False)
        values = [*patterns.values(), *([rest] if rest is not False else [])]
        return {key: value for key, value in node.items() if key != "patternProperties"} | {
            "additionalProperties": _any_of(values) if values else False
        }

    def _as_items(self, node: Schema, place: str) -> Schema:
        """A tuple as a list of items that fit the schema of some place."""
        key = "items" if isinstance(node.get("items"), list) else "prefixItems"
        first = node.get(key)
        if not isinstance(first, list):
            return node
        self.places.append(f"{place}/{key}")
        rest = node.get("additionalItems" if key == "items" else "items", {})
        most = node.get("maxItems")
        new = {name: value for name, value in node.items() if name not in ("items", "prefixItems", "additionalItems")}
        if rest is False:
            new["maxItems"] = min(most, len(first)) if isinstance(most, int) else len(first)
        elif not isinstance(most, int) or most > len(first):
            first = [*first, rest]
        return new | {"items": _any_of(first)}

    def _of_types(self, node: Schema, place: str) -> Schema:
        """A type beside choices as the type of each choice."""
        keys = node.keys() & KEYWORDS
        if len(keys) != 2 or not keys < {"type", "anyOf", "oneOf"} or "type" not in keys:
            return node
        (key,) = keys - {"type"}
        kinds = _kinds(node)
        new, exact = [], True
        for choice in node.get(key, []):
            if isinstance(choice, dict) and "type" not in choice and not choice.keys() & IN_PLACE:
                new.append({"type": node["type"]} | choice)
            else:
                new.append(choice)
                exact = exact and isinstance(choice, dict) and {*_kinds(choice)} <= {*kinds} and "type" in choice
        if not exact:
            self.places.append(f"{place}/type")
        return {name: value for name, value in node.items() if name != "type"} | {key: new}


def _closes(child: Any, part: str) -> bool:
    return child is False and part == "additionalProperties"


def _without_false(node: Schema) -> Schema:
    """Without the schema false, which nothing fits: no such key, no such item, no such choice."""
    new = dict(node)
    if isinstance(named := node.get("properties"), dict) and False in named.values():
        new["properties"] = {name: child for name, child in named.items()
                             if child is not False or name in node.get("required", [])}
    if node.get("items") is False:
        del new["items"]
        new["maxItems"] = 0
    for key in ("anyOf", "oneOf"):
        choices = node.get(key, [])
        if False in choices and any(choices):
            new[key] = [choice for choice in choices if choice is not False]
    return new


def _kinds(node: Schema) -> list[Any]:
    kinds = node.get("type", [])
    return kinds if isinstance(kinds, list) else [kinds]


def _any_of(schemas: Sequence[Any]) -> Schema:
    """What fits one of some schemas, or anything where there are none."""
    different = {json.dumps(schema, sort_keys=True): schema for schema in schemas or [{}]}
    return {"anyOf": [*different.values()]} if len(different) > 1 else next(iter(different.values()))


def _merged(together: Sequence[Schema]) -> tuple[Schema, bool]:
    """A schema that holds where all of some do, and whether it says all that they say."""
    merged, exact = dict(together[0]), True
    for node in together[1:]:
        for key, value in node.items():
            old = merged.setdefault(key, value)
            if old == value or key not in KEYWORDS:
                continue
            try:
                if key == "properties":
                    exact = exact and all(old.get(name, child) == child for name, child in value.items())
                    merged[key] = old | {name: child for name, child in value.items() if name not in old}
                elif key == "required":
                    merged[key] = [*old, *(name for name in value if name not in old)]
                elif key in (*_SMALLER, *_LARGER):
                    merged[key] = (min if key in _SMALLER else max)(old, value)
                elif key in ("enum", "type") and (both := [x for x in _list(old) if x in _list(value)]):
                    merged[key] = both
                else:
                    exact = False
            except (TypeError, AttributeError):  # No keywords of a schema; one of them is left.
                exact = False
    # Of which keys the others are, each schema says by itself.
    return merged, exact and not any({"additionalProperties", "patternProperties"} & node.keys() for node in together)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
