"""Tools that are not strict: what can be promised is, the rest is left out and said; too much work is refused."""

import functools
import random

import pytest
from grammars import END, PING, SMALL, START, WEATHER, accepts, faults, samples

from lfm_jax.structured.call_grammar import _sayable
from lfm_jax.structured.grammar import Grammar
from lfm_jax.structured.relaxed import relaxed
from lfm_jax.structured.schema import GrammarError, plain
from lfm_jax.text.tools import ToolCall, parse_tool_calls, render_calls


def tool(x, **others):
    return {"name": "f", "parameters": {"type": "object", "properties": {"x": x}, "required": ["x"]} | others}


def left_of(parameters):
    left_out = []
    left, places = relaxed(plain(parameters, left_out), functools.partial(_sayable, bounds=SMALL))
    return left, [*left_out, *places]


STRINGS = {"type": "string"}
CASES = [  # A schema; what is left of it; what is gone; a value that fits both, and one that fits neither.
    ({"type": "object", "propertyNames": {"pattern": "^[a-z]+$"}, "additionalProperties": STRINGS},
     {"type": "object", "additionalProperties": STRINGS}, ["propertyNames"], {"a": "b"}, {"a": 1}),
    ({"type": "string", "not": {"const": "a"}}, STRINGS, ["not"], "b", 1),
    ({"type": "array", "items": {"type": "boolean"}, "uniqueItems": True, "contains": {}, "minContains": 1},
     {"type": "array", "items": {"type": "boolean"}}, ["uniqueItems", "contains", "minContains"], [True], [1]),
    ({"type": "string", "pattern": "^(?!b)a", "minLength": 2}, {"type": "string", "minLength": 2}, ["pattern"],
     "ab", "a"),
    ({"type": "string", "format": "phone", "maxLength": 3}, {"type": "string", "maxLength": 3}, ["format"],
     "110", "1100"),
    ({"type": "array", "prefixItems": [STRINGS, {"type": "boolean"}], "minItems": 2, "maxItems": 2},
     {"type": "array", "items": {"anyOf": [STRINGS, {"type": "boolean"}]}, "minItems": 2, "maxItems": 2},
     ["prefixItems"], ["a", True], ["a", 1]),
    ({"type": "array", "items": [STRINGS, STRINGS], "additionalItems": False},
     {"type": "array", "items": STRINGS, "maxItems": 2}, ["items"], ["a"], ["a", "a", "a"]),
    ({"allOf": [{"$ref": "#/$defs/r0"}, {"properties": {"b": {"type": "null"}}, "required": ["b"]}]},
     {"type": "object", "properties": {"a": STRINGS, "b": {"type": "null"}}, "required": ["a", "b"]}, [],
     {"a": "x", "b": None}, {"b": None}),
    ({"anyOf": [STRINGS, {"type": "boolean"}], "minLength": 2}, {"anyOf": [STRINGS, {"type": "boolean"}]},
     ["minLength"], "ab", 1),
    ({"type": ["string", "null"], "anyOf": [{"maxLength": 2}, {"type": "string", "pattern": "^abc$"}]},
     {"anyOf": [{"type": ["string", "null"], "maxLength": 2}, {"type": "string", "pattern": "^abc$"}]}, [],
     "abc", "abd"),
    ({"oneOf": [STRINGS, {"type": ["string", "null"], "maxLength": 3}]},
     {"anyOf": [STRINGS, {"type": ["string", "null"], "maxLength": 3}]}, ["oneOf"], "abcd", True),
    ({"patternProperties": {"^a": STRINGS}, "additionalProperties": {"type": "null"}, "type": "object"},
     {"additionalProperties": {"anyOf": [STRINGS, {"type": "null"}]}, "type": "object"}, ["patternProperties"],
     {"a": "b", "b": None}, {"a": 1}),
    ({"type": "object", "properties": {"a": STRINGS, "b": STRINGS}, "anyOf": [{"required": ["a"]}], "minProperties": 1,
      "if": {}, "then": {}, "dependentRequired": {}},
     {"type": "object", "properties": {"a": STRINGS, "b": STRINGS}},
     ["if", "then", "dependentRequired", "anyOf", "minProperties"], {"b": "x"}, {"a": 1}),
    ({"type": "array", "items": {"type": "object", "properties": {"a": {"type": "str"}, "b": {"type": "null"}}}},
     {"type": "array", "items": {"type": "object", "properties": {"a": {}, "b": {"type": "null"}}}},
     ["items/properties/a/type"], [{"a": 1, "b": None}], [{"b": 1}]),
    ({"type": "string", "enum": [1]}, STRINGS, ["enum"], "a", 1),
    ({"type": "integer", "multipleOf": 100_000, "maximum": 5}, {"type": "integer", "maximum": 5}, ["multipleOf"], 0, 6),
    ({"type": "string", "required": True, "maxLength": 1}, {"type": "string", "maxLength": 1}, ["required"], "a", "ab"),
    ({"type": "object", "properties": {"a": False, "b": {"type": "null"}}, "not": {}},
     {"type": "object", "properties": {"b": {"type": "null"}}}, ["not"], {"b": None}, {"a": 1}),
    ({"type": "array", "items": [], "minItems": 0, "maxItems": 0},
     {"type": "array", "items": {}, "minItems": 0, "maxItems": 0}, ["items"], [], [1]),
    ({"type": "array", "prefixItems": [], "items": False}, {"type": "array", "items": {}, "maxItems": 0},
     ["prefixItems"], [], [1]),
    ({"type": "array", "prefixItems": []}, {"type": "array", "items": {}}, ["prefixItems"], [1], {"a": 1}),
    ({"allOf": [{"type": "integer", "minimum": 3, "exclusiveMinimum": True}, {"minimum": 5, "maximum": 9}]},
     {"type": "integer", "exclusiveMinimum": 3, "minimum": 5, "maximum": 9}, [], 5, 4),
    (False, {}, [""], [{"a": 1}], None),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "left", "gone", "good", "bad"), CASES)
def test_what_is_left_of_a_schema(schema, left, gone, good, bad):
    definitions = {"r0": {"type": "object", "properties": {"a": STRINGS}, "required": ["a"]}}
    given = tool(schema, **{"$defs": definitions})
    found, places = left_of(given["parameters"])
    assert found["properties"]["x"] == left
    assert places == [f"#/properties/x/{place}".removesuffix("/") for place in gone]
    grammar = Grammar.tool_calls([given], required=True, bounds=SMALL)
    assert list(grammar.relaxed) == [f"tool 'f': parameters{place[1:]}" for place in places]
    assert accepts(grammar, render_calls([ToolCall("f", {"x": good})]))
    if bad is not None:
        assert not accepts(grammar, render_calls([ToolCall("f", {"x": bad})]))
    if gone:
        with pytest.raises(GrammarError, match="tool 'f': parameters"):
            Grammar.tool_calls([given | {"strict": True}], required=True, bounds=SMALL)


def test_a_strict_tool_is_refused_for_a_keyword_that_its_author_wrote():
    for items in ([], [STRINGS]):
        with pytest.raises(GrammarError, match="tool 'f': parameters/properties/x/items is not supported here"):
            Grammar.tool_calls([tool({"type": "array", "items": items, "maxItems": 1}) | {"strict": True}])


def test_only_the_tools_that_need_it_are_relaxed():
    grammar = Grammar.tool_calls([WEATHER, tool({"not": {}}), PING, tool({"type": "null"}) | {"name": "g"}])
    assert grammar.relaxed == ("tool 'f': parameters/properties/x/not",)
    strict = Grammar.tool_calls([WEATHER | {"strict": True}], bounds=SMALL)
    assert strict == Grammar.tool_calls([WEATHER], bounds=SMALL)
    assert strict.relaxed == ()


def test_parameters_as_a_whole_are_relaxed():
    nodes = {"type": "array", "items": {"$ref": "#/$defs/n"}}
    node = {"type": "object", "properties": {"v": {"type": "null"}, "c": nodes}}
    given = {"name": "f", "parameters": {"$ref": "#/$defs/n", "$defs": {"n": node | {"not": {}}}}}
    grammar = Grammar.tool_calls([given], required=True)
    assert grammar.relaxed == ("tool 'f': parameters/not", "tool 'f': parameters/$defs/n/not")
    assert accepts(grammar, f"{START}[f(v=None, c=[{{\"c\": [{{}}]}}])]{END}")
    choice = tool({"type": "null"}, oneOf=[{"required": ["x"]}, {"required": ["y"]}])
    assert Grammar.tool_calls([choice]).relaxed == ("tool 'f': parameters/oneOf",)


def test_a_schema_that_holds_itself_where_schemas_meet_is_not_written_out_for_ever():
    node = {"type": "object", "properties": {
        "v": {"type": "null"}, "c": {"allOf": [{"$ref": "#/$defs/n"}, {"not": {}}]}}}
    left, places = left_of({"type": "object", "properties": {"x": {"$ref": "#/$defs/n"}}, "$defs": {"n": node}})
    assert left["$defs"]["r0"]["properties"]["c"]["properties"] == {"v": {"type": "null"}, "c": {"$ref": "#/$defs/r0"}}
    assert len(places) < 6


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "string", "pattern": "^((a{1,99}){1,99}){1,99}$", "not": {}}, "repetitions"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
         "leads nowhere"),
        ({"type": "string", "allOf": [{"pattern": f"a{i}.*b"} for i in range(9)], "not": {}}, "patterns"),
        ({"$ref": "http://127.0.0.1/schema"}, "leads nowhere"),
    ],
)
def test_too_much_work_and_what_is_no_schema_are_refused_always(schema, message):
    with pytest.raises(GrammarError, match=rf"^tool 'f': parameters.*({message})"):
        Grammar.tool_calls([tool(schema)])


def test_looking_at_keywords_one_by_one_has_an_end(monkeypatch):
    monkeypatch.setattr("lfm_jax.structured.relaxed.MAX_ALONE", 20)
    odd = {f"a{i}": {"type": "string", "pattern": "(?=a)", "minLength": i} for i in range(9)}
    fine = {f"b{i}": {"type": "string", "not": {}, "minLength": i} for i in range(40)}
    assert len(Grammar.tool_calls([tool({"type": "object", "properties": fine})]).relaxed) == 40
    with pytest.raises(GrammarError, match=r"more than 20 keywords .*at #/properties/x/properties/a6"):
        Grammar.tool_calls([tool({"type": "object", "properties": odd})])


ODD = [
    {"not": {"const": 1}}, {"uniqueItems": True}, {"pattern": "(?=a)b"}, {"format": "phone"}, {"propertyNames": {}},
    {"if": {}, "then": {"minLength": 1}}, {"contains": {"type": "null"}}, {"minProperties": 3}, {"const": 2**60},
    {"patternProperties": {"^a": {"type": "null"}}}, {"prefixItems": [{"type": "string"}, False]}, {"oneOf": [{}, {}]},
    {"allOf": [{"maxLength": 3}, {"minLength": 1}]}, {"anyOf": [{"required": ["a"]}, {"maxItems": 2}]},
    {"items": False}, {"minLength": "3"}, {"maxItems": 1.5}, {"type": "any"}, {"required": "a"}, {"enum": []},
    {"$ref": "#/$defs/d"}, {"minimum": 3, "maximum": 2}, {"exclusiveMinimum": True}, {"additionalProperties": False},
    {"required": ["z"]}, {}, {"items": []}, {"prefixItems": [], "items": False},
    {"minimum": "3", "exclusiveMinimum": True}, {"minimum": 3, "exclusiveMinimum": True},
]  # fmt: skip


def random_schema(rng, depth=0):
    kinds = ["string", "integer", "null", "boolean"] + ["object", "array", "choice"] * (depth < 3)
    kind, inner = rng.choice(kinds), functools.partial(random_schema, rng, depth + 1)
    node = {"type": kind}
    if kind == "object":
        node["properties"] = {name: inner() for name in rng.sample("abc", rng.randint(0, 2))}
        node["required"] = [name for name in node["properties"] if rng.random() < 0.5]
    if kind == "array":
        node |= {"items": inner(), "maxItems": 2}
    if kind == "choice":
        node = {rng.choice(["anyOf", "oneOf", "allOf"]): [inner() for _ in range(rng.randint(1, 2))]}
    for _ in range(rng.randint(0, 2)):
        node |= rng.choice(ODD)
    return node


@pytest.mark.parametrize("seed", range(25))
def test_calls_fit_what_is_left_of_any_schema(seed):
    rng = random.Random(seed)
    turns = {"type": "array", "items": {"$ref": "#/$defs/d"}, "maxItems": 1, "uniqueItems": True}
    given = tool(random_schema(rng), **{"$defs": {"d": turns}})
    grammar = Grammar.tool_calls([given], required=True, parallel=False, bounds=SMALL)
    left, places = left_of(given["parameters"])
    assert places or not grammar.relaxed
    blocks = [block for block in samples(grammar, 4, seed, limit=400) if block is not None]
    for block in blocks:
        content, [call] = parse_tool_calls(block)
        assert content == ""
        assert faults(left, call.arguments) == [], (left, block)
        assert accepts(grammar, render_calls([call]))
