"""JSON schemas for constrained decoding: checked, given finite sizes, compiled by llguidance.

llguidance keeps the promises of a schema that it accepts, all but a few, which are refused or rewritten here: about
numbers of many digits, small exclusive limits, numbers that overflow, large divisors, keys that repeat.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from lfm_jax.structured.schema import (
    IN_PLACE,
    KEYWORDS,
    OF_TYPE,
    GrammarError,
    Schema,
    children,
    nodes,
    plain,
    replaced,
    resolved,
    types,
)
from lfm_jax.structured.size import check_size

ANY_VALUE = {"$ref": "#/$defs/lfm_jax.any"}
"""Stands in a bounded schema for one without keywords."""
MAX_DIVISOR = 1000
"""Largest `multipleOf`, its decimal point left out: with the next ones masks fail."""
MALFORMED = (TypeError, KeyError, AttributeError, ArithmeticError)
"""What reading a schema raises where it is none."""
OPTIONS = {
    "whitespace_flexible": False, "lenient": False, "coerce_one_of": False,
    # Written with an escape, a key that is taken would pass for another; and Python has no pairs of surrogates.
    "json_allowed_escapes": 'nrbtf\\"',
}

_FINITE = sys.float_info.max


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bounds:
    """Sizes for what a schema leaves open: a model that does not stop by itself would fill it for ever."""

    string: int | None = 4096
    """Characters of a string without `maxLength`; None is no limit."""
    items: int = 64
    """Items of an array without `maxItems`; keys of the model's choice in an object without `maxProperties`."""
    digits: int = 15
    """Digits before the point of a number without `minimum` or `maximum`."""
    decimals: int = 6
    """Digits after the point of a number without `multipleOf`."""


def compiled(schema: Any, bounds: Bounds) -> str:
    """The text of llguidance for JSON that fits `bounded(schema, bounds)`.

    Raises:
      GrammarError: see `Grammar.json_schema`.
    """
    root: Schema = {}
    try:
        root = plain(schema)
        check_size(root)
        if '"oneOf"' in json.dumps(root):  # Choices that overlap may seem distinct once they are bounded.
            accepted(_text(root))
        return accepted(_text(bounded(root, bounds), item_separator=", ?", key_separator=": ?"))
    except GrammarError as error:
        raise GrammarError(f"the JSON schema is refused: {error}{_where(root, str(error))}") from None
    except MALFORMED as error:
        raise GrammarError(f"the JSON schema is malformed: {type(error).__name__}: {error}") from None


def bounded(schema: Mapping[str, Any] | bool | str, bounds: Bounds) -> Schema:
    """A schema of finite sizes; whatever fits it fits `schema` too.

    - Strings, arrays and numbers without limits get those of `bounds`; a string whose `pattern` or `format` the limit
      does not suit stays without.
    - Objects that name keys, and do not speak of others, have no others; a map has a limited number of them.
    - A schema without `type` is of the types that its keywords are about; one without keywords is any value, bounded.
    - Where schemas meet (`allOf`, siblings of `anyOf`, `oneOf` or `$ref`, `properties` beside `patternProperties`)
      only strings, arrays and numbers get limits, since each schema may need what another brings.

    Nesting has no bound where a schema is recursive.

    Raises:
      GrammarError: a malformed schema, numbers that a float cannot hold or that have no room within their limits,
        `minProperties` beyond what is required by name.
    """
    root = plain(schema)
    met = _met(root)

    def bound(node: Any, place: str) -> Any:
        if not isinstance(node, dict):
            return node
        _check(node, place)
        new = replaced(node, lambda child, part: bound(child, f"{place}/{part}"))
        alone, kinds = id(node) not in met, types(node)
        if not kinds or {"const", "enum"} & node.keys():
            return new | ANY_VALUE if alone and not node.keys() & KEYWORDS else new
        if "string" in kinds:
            new = _bounded_string(new, bounds)
        if {"number", "integer"} & set(kinds):
            new = _bounded_number(new, "number" not in kinds, bounds, place)
        if "array" in kinds:
            new.setdefault("maxItems", max(new.get("minItems", 0), len(new.get("prefixItems", ())), bounds.items))
        if alone:
            new["type"] = kinds
            if "array" in kinds:
                new.setdefault("additionalItems" if isinstance(node.get("items"), list) else "items", ANY_VALUE)
            if "object" in kinds:
                _close(new, bounds)
        return new

    result = bound(root, "#")
    scalar = bound({"type": ["null", "boolean", "number", "string"]}, "#")
    array = {"type": "array", "items": ANY_VALUE, "maxItems": bounds.items}
    mapping = {"type": "object", "additionalProperties": ANY_VALUE, "maxProperties": bounds.items}
    return result | {"$defs": result.get("$defs", {}) | {"lfm_jax.any": {"anyOf": [scalar, array, mapping]}}}


def _close(new: Schema, bounds: Bounds) -> None:
    """Bans the keys that an object leaves open, or limits their number where llguidance can."""
    required, named = new.get("required", []), new.get("properties", {})
    if "additionalProperties" not in new and {"properties", "patternProperties"} & new.keys():
        new["properties"] = named | {name: {} for name in required if name not in named}
        new["additionalProperties"] = False
    elif named.keys() <= set(required):
        new.setdefault("additionalProperties", ANY_VALUE)
        new.setdefault("maxProperties", max(new.get("minProperties", 0), len(required) + bounds.items))


def _bounded_string(node: Schema, bounds: Bounds) -> Schema:
    """The schema with a limit to the length of strings, if it has none and there are strings within the limit."""
    if bounds.string is None or "maxLength" in node:
        return node
    limited = node | {"maxLength": max(node.get("minLength", 0), bounds.string)}
    return limited if not {"pattern", "format"} & node.keys() or _possible(limited, "string") else node


def _bounded_number(node: Schema, whole: bool, bounds: Bounds, place: str) -> Schema:
    """Makes limits inclusive, since llguidance takes small exclusive ones so, and finite, since 1e999 is not."""
    step = 1 if whole else float(f"1e-{bounds.decimals}")
    divisor = Decimal(str(node.get("multipleOf", step)))
    if divisor * 10 ** max(0, -int(divisor.as_tuple().exponent)) > MAX_DIVISOR:
        raise GrammarError(f"multipleOf {divisor} has more than {MAX_DIVISOR} remainders to follow (at {place})")
    new = {key: value for key, value in node.items() if key not in ("exclusiveMinimum", "exclusiveMaximum")}
    low, high = node.get("minimum", -math.inf), node.get("maximum", math.inf)
    if "exclusiveMinimum" in node:
        low = max(low, _above(node["exclusiveMinimum"], step))
    if "exclusiveMaximum" in node:
        high = min(high, -_above(-node["exclusiveMaximum"], step))
    reach = max(10**bounds.digits, abs(node.get("multipleOf", 0)))
    least = min(high, 0) - (reach if low == -math.inf else max(reach, 2**53))
    most = max(low, 0) + (reach if high == math.inf else max(reach, 2**53))
    new |= {"minimum": _up(max(low, least)), "maximum": -_up(-min(high, most))}
    if not whole:
        new.setdefault("multipleOf", step)
    if max(new["minimum"], -new["maximum"]) > 2**53:
        raise GrammarError(f"the limits of a number are beyond what a float can hold (at {place})")
    if OF_TYPE["number"] & node.keys() and not _possible(new, "integer" if whole else "number"):
        raise GrammarError(f"no number of at most {bounds.decimals} decimals is within the limits (at {place})")
    return new


def _above(x: float, step: float) -> float:
    """The least number that is surely more than `x`; a whole one where `step` is."""
    return math.floor(x) + 1 if isinstance(step, int) else max(x + step, math.nextafter(x, math.inf))


def _up(x: float) -> float:
    """The least number of at least `x` that a float can hold."""
    return x if float(x) == x else float(x) if float(x) > x else math.nextafter(float(x), math.inf)


def _possible(node: Schema, kind: str) -> bool:
    """Whether any string or number fits what the node says of them."""
    keywords = OF_TYPE["string" if kind == "string" else "number"]
    return not refusal(_text({"type": kind} | {key: node[key] for key in node.keys() & keywords}))


def _met(root: Schema) -> set[int]:
    """Ids of the schemas that meet another in an intersection, and of all inside them."""
    met: set[int] = set()
    todo: list[tuple[Any, bool]] = [(root, False)]
    while todo:
        node, meets = todo.pop()
        if not isinstance(node, dict) or id(node) in met:
            continue
        parts = sum(len(node[key]) if key == "allOf" else 1 for key in node.keys() & IN_PLACE)
        meets = meets or parts + bool(node.keys() & (KEYWORDS - IN_PLACE)) > 1
        if meets:
            met.add(id(node))
            todo += [(resolved(root, node["$ref"]), True)] if "$ref" in node else []
        inside = meets or {"properties", "patternProperties"} <= node.keys()
        todo += [(child, inside and not part.startswith(("$defs/", "definitions/"))) for part, child in children(node)]
    return met


def _check(node: Schema, place: str) -> None:
    """Refuses what llguidance would get wrong."""

    def number(text: str) -> None:
        value = Decimal(text).normalize()
        _, digits, exponent = value.as_tuple()
        # Of other numbers llguidance reads, or writes, a neighbour.
        if abs(value) > 2**53 or int(exponent) < -22 or (int(exponent) < 0 and len(digits) > 15):
            raise GrammarError(f"{text:.40} has too many digits (at {place})")

    for key in node.keys() & OF_TYPE["number"]:
        if abs(node[key]) > _FINITE:
            raise GrammarError(f"{key} is {node[key]!r:.40}; expected what a float can hold (at {place})")
    if {"const", "enum"} & node.keys():
        json.loads(json.dumps([node.get("const"), node.get("enum")]), parse_int=number, parse_float=number)
    if node.get("minProperties", 0) - len(node.get("required", ())) > 1:
        raise GrammarError(f"minProperties is not supported: keys of the model's choice may repeat (at {place})")


# -------------------------------------------------------------------- llguidance


def llguidance() -> Any:
    """The module.

    Raises:
      ImportError: it is not installed.
    """
    try:
        import llguidance
    except ImportError:
        raise ImportError("grammars need llguidance: pip install lfm_jax[grammar]") from None
    return llguidance


def refusal(grammar: str) -> str:
    """What llguidance has against a grammar, or nothing."""
    message = llguidance().LLMatcher.validate_grammar(grammar)
    return "" if message.startswith("WARNING") else one_line(message)


def accepted(grammar: str) -> str:
    """The grammar itself.

    Raises:
      GrammarError: llguidance refuses it.
    """
    if why := refusal(grammar):
        raise GrammarError(why)
    return grammar


def one_line(message: str) -> str:
    """A message of llguidance on one line, without its dump of the parser."""
    return " ".join(re.split("<state>|<non-verbose/>", message)[0].split())[:400]


def _text(schema: Schema, **options: Any) -> str:
    schema = {key: value for key, value in schema.items() if key != "x-guidance"}  # It would set options.
    return llguidance().LLMatcher.grammar_from_json_schema(schema, overrides=OPTIONS | options)


def _where(root: Schema, message: str) -> str:
    """The places of the keywords that a message of llguidance is about."""
    if found := re.match(r"Unimplemented keys: (\[.*?\])", message):
        keys = set(json.loads(found[1]))
        places = [place for place, node in nodes(root) if keys <= node.keys()]
    elif found := re.match(r"Unknown format: (.*)", message):
        places = [place for place, node in nodes(root) if node.get("format") == found[1]]
    else:
        places = [place for place, node in nodes(root) if "oneOf" in message and "oneOf" in node]
    return f" (at {', '.join(places[:3])})" if places else ""

