"""JSON schemas as data: their keywords, the schemas within one, what references point to."""

from __future__ import annotations

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
MAX_PLACE = 200
"""Most parts of the place of a schema."""

_LISTS = {"allOf", "anyOf", "oneOf", "prefixItems", "items"}
_SINGLE = {"items", "additionalItems", "additionalProperties"}
_NAMES = ("$anchor", "$id", "id")
"""Keywords that name what references may start from; none is left in a plain schema."""


class GrammarError(ValueError):
    """A grammar that is not valid, or that asks for what cannot be promised; the message says what and where."""


def plain(schema: Any) -> Schema:
    """A schema, given as data or JSON text, as data of its own.

    Each schema in it is another object; true is `{}`. Each `$ref` is the JSON pointer (RFC 6901, in a URI's fragment)
    of a schema that `nodes` lists. What it points to under keywords that hold no schemas is copied to `$defs`.

    Raises:
      GrammarError: no schema, one nested too deeply, or a reference that leads nowhere within it.
    """
    try:
        data = json.loads(schema) if isinstance(schema, str) else schema
        data = json.loads(json.dumps(data, allow_nan=False, ensure_ascii=False).encode())
    except (TypeError, ValueError, RecursionError) as error:
        raise GrammarError(f"the JSON schema is not JSON: {error}") from None
    if not isinstance(data, dict) and data is not True:
        raise GrammarError(f"the JSON schema is {data!r:.60}; expected an object, or true")
    root = _opened(data, "#")
    _localise(root)
    return root


def _opened(node: Any, place: str) -> Any:
    if place.count("/") > MAX_PLACE:
        raise GrammarError(f"the JSON schema is nested too deeply, at {place:.60}...")
    if isinstance(node, dict):
        return replaced(node, lambda child, part: _opened(child, f"{place}/{part}"))
    return {} if node is True else node


def replaced(node: Schema, function: Callable[[Any, str], Any]) -> Schema:
    """The schema with `function(child, place)` for each schema directly inside it; places are JSON pointers."""
    new = dict(node)
    for key, value in node.items():
        if key in MAPS and isinstance(value, dict):
            new[key] = {name: function(child, f"{key}/{_escaped(name)}") for name, child in value.items()}
        elif key in _LISTS and isinstance(value, list):
            new[key] = [function(child, f"{key}/{i}") for i, child in enumerate(value)]
        elif key in _SINGLE:
            new[key] = function(value, key)
    return new


def nodes(node: Any, place: str = "#") -> list[tuple[str, Schema]]:
    """All schemas within a schema, itself included, each after its place."""
    found = [(place, node)] if isinstance(node, dict) else []
    for _, own in found[:]:
        replaced(own, lambda child, part: found.extend(nodes(child, f"{place}/{part}")))
    return found


def listed(node: Schema, key: str) -> list[Any]:
    """The value of a keyword where it is a list, else an empty one."""
    value = node.get(key, [])
    return value if isinstance(value, list) else []


def types(node: Schema) -> list[str]:
    """The types that a schema is about: none where schemas in its place say it, or where it has no keywords."""
    kinds = node.get("type", [])
    if not kinds and not node.keys() & IN_PLACE:
        return [name for name, keywords in OF_TYPE.items() if keywords & node.keys()]
    return [kinds] if isinstance(kinds, str) else kinds


# -------------------------------------------------------------------- references


def resolved(root: Any, reference: str) -> Any:
    """What a JSON pointer in a URI's fragment (`#/a/0/b~1c%20d`) points to, or None."""
    pointer = unquote(reference.removeprefix("#"))
    if not reference.startswith("#") or (pointer and not pointer.startswith("/")):
        return None
    for part in pointer.split("/")[1:]:
        part = part.replace("~1", "/").replace("~0", "~")
        if isinstance(root, list) and re.fullmatch("0|[1-9][0-9]{0,8}", part):
            root = root[int(part)] if int(part) < len(root) else None
        else:
            root = root.get(part) if isinstance(root, dict) else None
    return root


def _escaped(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")


def _fragment(place: str) -> str:
    return f"#{quote(place.removeprefix('#'), safe='/~$')}"


def _localise(root: Schema) -> None:
    """Makes each `$ref` the pointer of a schema that `nodes` lists, and takes out the names that they start from."""
    known = nodes(root)
    places = {id(node): place for place, node in known}
    targets = _Targets(known)
    for place, node in known:  # Grows on the way.
        if not isinstance(reference := node.get("$ref"), str):
            continue
        target = targets.of(reference, place)
        if not isinstance(target, dict | bool):
            why = "leads nowhere within the schema; lfm does not fetch others" if target is None else "is no schema"
            raise GrammarError(f"the JSON schema is refused: $ref {reference!r:.80} {why} (at {place})")
        if id(target) not in places:
            name = f"lfm_jax.{reference}"
            moved = f"#/$defs/{_escaped(name)}"
            definitions = root.setdefault("$defs", {})
            if not isinstance(definitions, dict):
                raise GrammarError(f"the JSON schema is refused: $defs is {definitions!r:.40}; expected an object")
            definitions[name] = _opened(target, moved)
            inner = nodes(definitions[name], moved)
            known += inner
            places |= {id(target): moved} | {id(node): where for where, node in inner}
        node["$ref"] = _fragment(places[id(target)])
    for _, node in known:
        for name in _NAMES:
            if isinstance(node.get(name), str):
                del node[name]


class _Targets:
    """What references lead to within a schema: pointers and names, from its root and from schemas with an `$id`."""

    def __init__(self, known: list[tuple[str, Schema]]):
        self._bases: dict[str, tuple[str, Schema]] = {}
        """What pointers start from, by place: a URI and its schema."""
        self._anchors: dict[str, Schema] = {}
        for place, node in known:
            anchor, uri, old = (text if isinstance(text := node.get(key), str) else "" for key in _NAMES)
            for name in (f"#{anchor}", uri, old):
                if len(name) > 1 and name.startswith("#"):
                    self._anchors[name[1:]] = node
            if place == "#":
                self._bases[place] = uri or old, node
            elif uri and not uri.startswith("#"):
                self._bases[place] = _joined(self._around(place)[0][0], uri), node

    def _around(self, place: str) -> list[tuple[str, Schema]]:
        """The bases of a place, the innermost first."""
        found = []
        while place:
            found += [self._bases[place]] if place in self._bases else []
            place = place.rpartition("/")[0]
        return found

    def of(self, reference: str, place: str) -> Any:
        """What a reference leads to that stands at a place, or None."""
        url, _, fragment = reference.partition("#")
        starts = self._around(place)
        if url:
            wanted = _joined(starts[0][0], url)
            starts = [(uri, node) for uri, node in self._bases.values() if uri.partition("#")[0] == wanted]
        if fragment and not fragment.startswith("/"):
            return self._anchors.get(unquote(fragment)) if starts else None
        found = (resolved(node, f"#{fragment}") for _, node in starts)
        return next((target for target in found if target is not None), None)


def _joined(base: str, url: str) -> str:
    try:
        return urljoin(base, url)
    except ValueError:  # No URL at all.
        return url
