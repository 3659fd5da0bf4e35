"""JSON schemas as data: their keywords, the schemas within one, what references point to."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import quote, unquote, urljoin

Schema = dict[str, Any]

OF_TYPE = {
    "object": {"properties", "required", "additionalProperties", "patternProperties", "minProperties", "maxProperties"},
    "array": {"items", "prefixItems", "additionalItems", "minItems", "maxItems"},
    "string": {"minLength", "maxLength", "pattern", "format"},
    "number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"},
}
"""Keywords that speak of one type only."""
IN_PLACE = {"const", "enum", "allOf", "anyOf", "oneOf", "$ref"}
KEYWORDS = {"type", *IN_PLACE}.union(*OF_TYPE.values())
"""All that llguidance supports, annotations apart."""
MAPS = {"properties", "patternProperties", "$defs", "definitions"}
"""Keywords that hold schemas by name."""
MAX_PARTS = 200
"""Limit on the parts of the place of a schema."""
MAX_PLACES = 5_000_000
"""Limit on the bytes of the places of all schemas, of the references to them and of the base URIs that they set, all
together. Of 9,557 real schemas none needs more than 1,200,000."""

_LISTS = {"allOf", "anyOf", "oneOf", "prefixItems"}
_SINGLE = {"items", "additionalItems", "additionalProperties"}
_SHAPES: dict[str, tuple[Any, set[str]]] = {
    "an object": (dict, MAPS),
    "a list": (list, {"enum", "required", *_LISTS}),
    "a text": (str, {"$ref", "$id", "$anchor", "pattern", "format"}),
    "a whole number": (int, {"minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"}),
    "a number": ((int, float), OF_TYPE["number"]),
}
_EXCLUSIVE = {"exclusiveMinimum": "minimum", "exclusiveMaximum": "maximum"}
"""In draft 4 these are true or false, and about the others."""


class GrammarError(ValueError):
    """A grammar that is not valid, or that asks for what cannot be promised; the message says what and where."""


def plain(schema: Any, left_out: list[str] | None = None) -> Schema:
    """Copies a schema, given as data or JSON text, to one that is easier to read.

    - Each schema in it is another object; true is `{}`. Keywords have values of the types that they need.
    - Each `$ref` is the JSON pointer (RFC 6901, in a URI's fragment) of a schema that `nodes` lists. What it points to
      under keywords that hold no schemas is copied to `$defs`.
    - The keywords that set base URIs and anchors are removed.
    - Exclusive limits are numbers, also where draft 4 has a truth value beside the limit.

    Args:
      left_out: where given, keywords whose value is of another type are left out, and their places added to it.

    Raises:
      GrammarError: no schema, one nested too deeply or with too long names, a keyword whose value is of another type,
        or a reference that leads nowhere within it.
    """
    try:
        data = json.loads(schema) if isinstance(schema, str) else schema
        data = json.loads(json.dumps(data, allow_nan=False, ensure_ascii=False).encode())
    except (TypeError, ValueError, RecursionError) as error:
        raise GrammarError(f"it is not JSON: {error}") from None
    if not isinstance(data, dict) and data is not True:
        raise GrammarError(f"it is {data!r:.60}; expected an object, or true")
    return _Document(data, left_out).root


def replaced(node: Schema, function: Callable[[Any, str], Any]) -> Schema:
    """The schema with `function(child, place)` for each schema directly inside it; places are JSON pointers."""
    new = dict(node)
    for key, value in node.items():
        if key in MAPS:
            new[key] = {name: function(child, f"{key}/{_escaped(name)}") for name, child in value.items()}
        elif key in _LISTS or (key == "items" and isinstance(value, list)):
            new[key] = [function(child, f"{key}/{i}") for i, child in enumerate(value)]
        elif key in _SINGLE:
            new[key] = function(value, key)
    return new


def children(node: Schema) -> list[tuple[str, Schema]]:
    """The schemas directly inside a schema, each after its place there."""
    found: list[tuple[str, Any]] = []
    replaced(node, lambda child, part: found.append((part, child)))
    return [(part, child) for part, child in found if isinstance(child, dict)]


def nodes(root: Schema) -> list[tuple[str, Schema]]:
    """All schemas within a schema, itself included, each after its place."""
    found = [("#", root)]
    for place, node in found:  # Grows on the way.
        found += [(f"{place}/{part}", child) for part, child in children(node)]
    return found


def types(node: Schema) -> list[str]:
    """The types that a schema is about: none where schemas in its place say it, or where it has no keywords."""
    kinds = node.get("type", [])
    if not kinds and not node.keys() & IN_PLACE:
        return [name for name, keywords in OF_TYPE.items() if keywords & node.keys()]
    return [kinds] if isinstance(kinds, str) else kinds


def _misshapen(node: Schema) -> dict[str, str]:
    """The keywords of a schema whose values are of another type, and what was expected of each."""
    wrong = {
        key: name for name, (kind, keywords) in _SHAPES.items() for key in node.keys() & keywords
        if not isinstance(node[key], kind) or (isinstance(node[key], bool) and _EXCLUSIVE.get(key) not in node)
    }
    for key, expected in (("type", "a type or a list of types"), ("required", "a list of texts")):
        values = node.get(key, [])
        values = [values] if key == "type" and isinstance(values, str) else values
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            wrong[key] = expected
    return wrong


# -------------------------------------------------------------------- references


def resolved(root: Schema, reference: str) -> Any:
    """What a `$ref` of a plain schema points to."""
    return _way(root, unquote(reference.removeprefix("#")))[-1]


def _way(start: Any, pointer: str) -> list[Any]:
    """What a JSON pointer leads through, its target last, which is None where there is none."""
    way = [start]
    for part in pointer.split("/")[1:]:
        here, part = way[-1], part.replace("~1", "/").replace("~0", "~")
        if isinstance(here, dict):
            way.append(here.get(part))
        else:
            index = int(part) if isinstance(here, list) and re.fullmatch("0|[1-9][0-9]{0,8}", part) else None
            way.append(here[index] if index is not None and index < len(here) else None)
    return way


def _escaped(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")


_DRAFT = re.compile(r"https?://json-schema\.org/draft[-/]([0-9-]+)/schema#?")


class _Document:
    """Makes the plain copy of a schema. References are followed in the schema itself, and lead from copy to copy."""

    def __init__(self, data: Any, left_out: list[str] | None):
        self._data, self._left_out = data, left_out
        self._named: dict[tuple[str, str], list[Schema]] = {("", ""): [data]}
        """Schemas by base URI and anchor, which is empty for the one that sets the base."""
        self._bases: dict[int, str] = {}
        """The base URI of a schema, by the id of the object."""
        self._places: dict[int, str] = {}
        """The place of the copy of a schema, by the id of the object."""
        self._references: list[tuple[Schema, str, str]] = []
        """Copies with a `$ref`, each with its place and its base."""
        self._bytes = 0
        """Of places, references and URIs so far."""
        self.root: Schema = self._copied(data, "#", "", "2020-12")
        self._follow()

    def _copied(self, node: Any, place: str, base: str, draft: str | None) -> Any:
        """Copies a schema to a place.

        Args:
          base: the URI around it.
          draft: of the standard, which says what sets base URIs and anchors. Under keywords that hold no schemas it is
            None, and nothing does.
        """
        if not isinstance(node, dict):
            return {} if node is True else node
        if id(node) in self._places:  # What copies share is copied once.
            return {"$ref": self._pointer(node)}
        if place.count("/") > MAX_PARTS:
            raise GrammarError(f"it is nested too deeply, at {place:.60}...")
        self._count(place)
        wrong = _misshapen(node)
        if wrong and self._left_out is None:
            key, expected = next(iter(wrong.items()))
            raise GrammarError(f"{key} is {node[key]!r:.40}; expected {expected} (at {place})")
        if draft is not None:
            base, draft = self._named_by(node, base, draft)
        self._places[id(node)], self._bases[id(node)] = place, base
        shaped = {key: value for key, value in node.items() if key not in wrong}
        for key, limit in _EXCLUSIVE.items():
            if isinstance(shaped.get(key), bool) and shaped.pop(key) and limit in shaped:
                shaped[key] = shaped.pop(limit)
        if self._left_out is not None:
            self._left_out += [f"{place}/{key}" for key in wrong]
        copy = replaced(shaped, lambda child, part: self._copied(child, f"{place}/{part}", base, draft))
        for key in ("$id", "id", "$anchor"):
            if isinstance(copy.get(key), str):
                del copy[key]
        if "$ref" in copy:
            self._references.append((copy, place, base))
        return copy

    def _pointer(self, node: Any) -> str:
        """The reference to the copy of a schema."""
        pointer = f"#{quote(self._places[id(node)].removeprefix('#'), safe='/~$')}"
        self._count(pointer)
        return pointer

    def _count(self, text: str) -> None:
        self._bytes += len(text.encode())
        if self._bytes > MAX_PLACES:
            raise GrammarError(f"the places of its schemas take more than {MAX_PLACES} bytes (a long one: {text:.60})")

    def _named_by(self, node: Schema, base: str, draft: str) -> tuple[str, str]:
        """Notes the base URI and the anchor that a schema sets; returns the base and the draft within it."""
        texts = {key: value for key, value in node.items() if isinstance(value, str)}
        if found := _DRAFT.fullmatch(texts.get("$schema", "")):
            draft = found[1]
        old = draft < "2019"  # Then an anchor is written as an id, and an id beside a `$ref` is ignored.
        uri = texts.get("$id" if draft >= "06" else "id", "")
        anchor = texts.get("$anchor", "")
        if old:
            anchor = uri[1:] if uri.startswith("#") else ""
        if uri and not uri.startswith("#") and not (old and "$ref" in node):
            base = _joined(base, uri).partition("#")[0]
            self._count(base)
            self._named.setdefault((base, ""), []).append(node)
        if anchor:
            self._named.setdefault((base, anchor), []).append(node)
        return base, draft

    def _follow(self) -> None:
        """Makes each `$ref` the pointer of a copy. A target without one is copied to `$defs`."""
        numbers = itertools.count(1)
        for copy, place, base in self._references:  # Grows on the way.
            reference = copy["$ref"]
            target, around = self._target(reference, base)
            if not isinstance(target, dict | bool):
                why = "leads nowhere within the schema; lfm does not fetch others" if target is None else "is no schema"
                raise GrammarError(f"$ref {reference!r:.80} {why} (at {place})")
            if id(target) not in self._places:
                copies = self.root.setdefault("$defs", {})
                name = next(name for i in numbers if (name := f"lfm_jax.{i}.{reference:.40}") not in copies)
                moved = f"#/$defs/{_escaped(name)}"
                copies[name] = self._copied(target, moved, around, None)
                self._places[id(target)] = moved  # Of true and false too.
            copy["$ref"] = self._pointer(target)

    def _target(self, reference: str, base: str) -> tuple[Any, str]:
        """What a reference leads to, or None, and the base there."""
        here = reference.startswith("#")
        url, _, fragment = (f"{base}{reference}" if here else _joined(base, reference)).partition("#")
        fragment = unquote(fragment)
        if not fragment.startswith("/"):
            return self._called(url, fragment), url
        # Generators write pointers from the root of the document, whatever base is set around them.
        for start in (self._called(url), self._data if here else None):
            way = _way(start, fragment)
            if way[-1] is not None:
                return way[-1], next(self._bases[id(step)] for step in reversed(way) if id(step) in self._bases)
        return None, url

    def _called(self, url: str, anchor: str = "") -> Schema | None:
        found = self._named.get((url, anchor), [])
        if len(found) > 1:
            raise GrammarError(f"{len(found)} schemas are called {f'{url}#{anchor}'!r:.80}")
        return found[0] if found else None


def _joined(base: str, url: str) -> str:
    try:
        return urljoin(base, url)
    except ValueError:  # No URL at all.
        return url
