"""How much work a JSON schema asks for, counted before llguidance sees it; what is too much is refused.

llguidance has limits of its own, but they do not see the copies that it makes of schemas that hold for one value, and
it goes into references by recursion.
"""

from __future__ import annotations

import functools
import graphlib
import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from lfm_jax.structured.schema import KEYWORDS, OF_TYPE, GrammarError, Schema, children, nodes, resolved

MAX_SCHEMAS = 20_000
"""Limit on the number of schemas once references with siblings and combinations of choices are expanded."""
MAX_DEPTH = 500
"""Most schemas within each other, references followed. llguidance needs 5 KB of the stack for each."""
MAX_PATTERNS = 8
"""Most patterns and formats that one text may have to fit: whether any does takes twice as long with each."""
MAX_PATTERN = 10_000
"""Most characters of a pattern, its repetitions written out: `(a{1,30}b){5}` has 155."""

_CHOICES = ("anyOf", "oneOf")
_COMBINING = {"$ref", "allOf", *_CHOICES}
_SAID = KEYWORDS - _COMBINING
_NOT_OF_PARTS = {"$defs", "definitions", *_COMBINING}

Follow = Callable[[str], Any]
"""What a `$ref` leads to."""


def check_size(root: Schema) -> None:
    """Refuses a schema, as `plain` gives it, that would take too much time, memory or stack to compile.

    Raises:
      GrammarError: a reference that leads back to itself without a value between, too deep a nesting, too large a
        pattern, too many patterns for one text, or too many schemas where they combine.
    """
    known = nodes(root)
    follow = functools.cache(functools.partial(resolved, root))
    _check_circles(follow, known)
    _check_depth(follow, known)
    for place, node in known:
        for pattern in [node.get("pattern", ""), *node.get("patternProperties", {})]:
            check_pattern(pattern, f" (at {place})")
    _check_combinations(root, follow)


def _check_circles(follow: Follow, known: Sequence[tuple[str, Schema]]) -> None:
    places = {id(node): place for place, node in known}
    try:
        graphlib.TopologicalSorter({
            id(node): [id(other) for other in _in_place(follow, node)] for _, node in known
        }).prepare()
    except graphlib.CycleError as error:
        circle = ", ".join(dict.fromkeys(places[key] for key in error.args[1][:4]))
        raise GrammarError(f"a $ref leads back to itself without a value between (at {circle})") from None


def _in_place(follow: Follow, node: Schema) -> list[Schema]:
    """The schemas that speak of the same value."""
    inner = itertools.chain(*(node.get(key, []) for key in ("allOf", *_CHOICES)))
    return _schemas([*inner, *([follow(node["$ref"])] if "$ref" in node else [])])


def _check_depth(follow: Follow, known: Sequence[tuple[str, Schema]]) -> None:
    """Takes schemas that lie within each other in a circle as if each lay within all others."""
    if len(known) <= MAX_DEPTH:
        return
    import numpy as np
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    numbers = {id(node): i for i, (_, node) in enumerate(known)}
    edges = [(numbers[id(node)], numbers[id(other)]) for _, node in known
             for other in [*_of_parts(node), *_in_place(follow, node)]]
    outer, inner = np.array(edges, int).reshape(-1, 2).T
    graph = coo_array((np.ones(len(edges)), (outer, inner)), shape=(len(known), len(known)))
    _, circles = connected_components(graph, directed=True, connection="strong")
    sizes = np.bincount(circles)
    within: dict[int, set[int]] = {circle: set() for circle in range(len(sizes))}
    for one, other in zip(circles[outer].tolist(), circles[inner].tolist(), strict=True):
        within[one] |= {other} - {one}
    depths: dict[int, int] = {}
    for circle in graphlib.TopologicalSorter(within).static_order():
        depths[circle] = int(sizes[circle]) + max((depths[other] for other in within[circle]), default=0)
    if (depth := max(depths.values())) > MAX_DEPTH:
        raise GrammarError(f"{depth} schemas lie within each other, references followed; at most {MAX_DEPTH}")


def _of_parts(node: Schema) -> list[Schema]:
    """The schemas that speak of the keys' values and items of a value."""
    return [child for _, child in children({key: node[key] for key in node.keys() - _NOT_OF_PARTS})]


# -------------------------------------------------------------------- patterns


_COUNT = r"\{\s*+(?P<least>[0-9]++)\s*+(?:,\s*+(?P<most>[0-9]*+)\s*+)?\}"
_TOKEN = re.compile(rf"""
    \\(?:[pPxuU]\{{[^{{}}\\]*+\}}|.) | \[\^?+\]?+(?:\\.|[^\[\]\\])*+\] | \((?:\?P?<[^<>]*+>)? | {_COUNT} | .
""", re.VERBOSE | re.DOTALL)
_FLAGS = re.compile(r"(?<!\\)(?:\\\\)*+\(\?([a-zA-Z-]++)[:)]")


def check_pattern(pattern: str, place: str = "") -> None:
    """Refuses a pattern, in the syntax of Rust's `regex`, of more than MAX_PATTERN characters once written out.

    Raises:
      GrammarError: it is too large, or has the flag `x`, with which blanks and comments may stand anywhere.
    """
    if any("x" in flags for flags in _FLAGS.findall(pattern)):
        raise GrammarError(f"the flag x of pattern {pattern!r:.40} is not supported{place}")
    if _written_out(pattern) > MAX_PATTERN:
        raise GrammarError(f"the repetitions of pattern {pattern!r:.40} make more than {MAX_PATTERN} characters{place}")


def _written_out(pattern: str) -> int:
    """Characters and classes of a pattern whose bounded repetitions are written out; some number above MAX_PATTERN."""
    sizes, last = [0], 0  # Of the groups that are open, and of what a repetition would repeat.
    for token in _TOKEN.finditer(pattern):
        if token["least"]:
            times = _times(token)
            sizes[-1], last = sizes[-1] + last * (times - 1), last * times
        elif token[0] in "[{":  # Classes within each other, or a mistake: as if each count repeated the whole.
            return len(pattern) * math.prod(map(_times, re.finditer(_COUNT, pattern)))
        elif token[0].startswith("("):
            sizes.append(0)
        elif token[0] == ")" and len(sizes) > 1:
            last = sizes.pop()
            sizes[-1] += last
        elif token[0] not in "*+?|^$":
            sizes[-1], last = sizes[-1] + 1, 1
        if sizes[-1] > MAX_PATTERN:
            break
    return sum(sizes)


def _times(count: re.Match[str]) -> int:
    """How often a count repeats; some number above MAX_PATTERN where it has many digits."""
    return int((count["most"] or count["least"]).lstrip("0")[:9] or 1)


# -------------------------------------------------------------------- combinations


def _check_combinations(root: Schema, follow: Follow) -> None:
    """Counts the schemas that are left when those that hold for one value are merged, as llguidance does."""
    left = MAX_SCHEMAS
    defined: set[str] = set()
    todo: list[tuple[str, list[Schema], int]] = [("#", [root], 1)]
    """Places, the schemas that hold there together, and how often the place is copied."""

    def count(schemas: int, place: str) -> None:
        nonlocal left
        left -= schemas
        if left < 0:
            raise GrammarError(f"more than {MAX_SCHEMAS} schemas where they combine (many near {place:.80})")

    while todo:
        place, together, copies = todo.pop()
        own, choices, reference, more = _merged(follow, together)
        count(copies * more, place)
        if reference and reference not in defined:
            defined.add(reference)
            todo.append((reference, _schemas([follow(reference)]), 1))
        elif choices:
            (key, options), *others = choices
            rest = [*own, *({key: options} for key, options in others)]
            count(copies * len(options) * (1 + len(rest)), place)
            todo += [(f"{place}/{key}/{i}", [option, *rest], copies) for i, option in enumerate(options)
                     if isinstance(option, dict)]
        elif own:
            count(copies * (_patterns(own, place) + _comparisons(own)), place)
            copies *= math.prod(len(node["enum"]) for node in own if node.get("enum"))
            inner = [(f"{place}/{part}", parts, copies) for part, parts in _parts(own) if parts]
            count(copies * sum(len(parts) for _, parts, _ in inner), place)
            todo += inner


def _merged(
    follow: Follow, together: Sequence[Schema]
) -> tuple[list[Schema], list[tuple[str, list[Any]]], str, int]:
    """Of schemas that hold together: what they say themselves and the choices that they leave, or one reference alone.

    The number is of the schemas beyond them that were looked at.
    """
    own, choices, references, todo, seen = [], [], [], [*together], set()
    while todo or references:
        if not todo:
            if len(references) == 1 and not own and not choices:
                return [], [], references[0], 0
            todo, references = _schemas([follow(reference) for reference in references]), []
        node = todo.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        said = {key: value for key, value in node.items() if key in _SAID}
        own += [said] if said else []
        choices += [(key, node[key]) for key in _CHOICES if node.get(key)]
        references += [node["$ref"]] if "$ref" in node else []
        todo += _schemas(node.get("allOf", []))
    return own, choices, "", len(seen.difference(map(id, together)))


def _patterns(own: Sequence[Schema], place: str) -> int:
    """The work for patterns and formats, as a number of schemas.

    Raises:
      GrammarError: there are too many.
    """
    found = sum(len({"pattern", "format"} & node.keys()) for node in own)
    if found > MAX_PATTERNS:
        raise GrammarError(f"{found} patterns and formats for one text; at most {MAX_PATTERNS} (at {place})")
    return 20 * found


def _comparisons(own: Sequence[Schema]) -> int:
    """How often the name or index of a part is compared with what another schema says, or with a pattern."""
    objects, arrays = _about(own, "object"), _about(own, "array")
    names = {name for node in objects for name in node.get("properties", {})}
    patterns = [pattern for node in objects for pattern in node.get("patternProperties", {})]
    longest = max((len(_items(node)[0]) for node in arrays), default=0)
    return (len(names) * len(patterns) + max(len(objects) - 1, 0) * (len(names) + len(patterns))
            + max(len(arrays) - 1, 0) * longest)


def _parts(own: Sequence[Schema]) -> Iterator[tuple[str, list[Schema]]]:
    """The parts of a value that schemas speak of, each with those that hold there together."""
    objects = _about(own, "object")
    for name in dict.fromkeys(name for node in objects for name in node.get("properties", {})):
        yield f"properties/{name}", _schemas([part for node in objects for part in _of_key(node, name)])
    for pattern in dict.fromkeys(pattern for node in objects for pattern in node.get("patternProperties", {})):
        inner = [node.get("patternProperties", {}).get(pattern, node.get("additionalProperties")) for node in objects]
        yield f"patternProperties/{pattern}", _schemas(inner)
    yield "additionalProperties", _schemas([node.get("additionalProperties") for node in objects])
    arrays = [_items(node) for node in _about(own, "array")]
    for i in range(max((len(first) for first, _ in arrays), default=0)):
        yield f"prefixItems/{i}", _schemas([first[i] if i < len(first) else rest for first, rest in arrays])
    yield "items", _schemas([rest for _, rest in arrays])


def _about(own: Sequence[Schema], kind: str) -> list[Schema]:
    """The schemas that say something of objects, or of arrays."""
    return [node for node in own if node.keys() & OF_TYPE[kind]]


def _of_key(node: Schema, name: str) -> list[Any]:
    """What an object's schema may say of the value of a key."""
    named = node.get("properties", {})
    patterns = [part for pattern, part in node.get("patternProperties", {}).items() if _may_match(pattern, name)]
    return [named[name] if name in named else node.get("additionalProperties"), *patterns]


def _may_match(pattern: str, name: str) -> bool:
    """False where a pattern begins with a character that the name does not begin with; to try it may take for ever."""
    first = re.match(r"\^\(*([^\\[\](){}.*+?|^$])(?![*?{])", pattern)
    return first is None or "|" in pattern or name.startswith(first[1])


def _items(node: Schema) -> tuple[list[Any], Any]:
    """What an array's schema says of the first items, and of the rest."""
    if isinstance(node.get("items"), list):
        return node["items"], node.get("additionalItems")
    return node.get("prefixItems", []), node.get("items")


def _schemas(parts: Sequence[Any]) -> list[Schema]:
    return [part for part in parts if isinstance(part, dict)]
