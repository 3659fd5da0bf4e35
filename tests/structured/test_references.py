"""References lead where RFC 6901 says, in answers and in calls; what would take too much work is refused before."""

import functools
import json
import tracemalloc
from urllib.parse import unquote

import jsonschema
import numpy as np
import pytest
from grammars import SMALL, accepts, faults, matcher, written

from lfm_jax.structured.grammar import Grammar
from lfm_jax.structured.schema import GrammarError, nodes, plain
from lfm_jax.structured.size import check_size

SIZE = {"anyOf": [{"type": "string", "maxLength": 3}, {"type": "null"}]}
LED = {
    "through a list": ({"size": SIZE}, "#/properties/size/anyOf/0"),
    "by a slash and a tilde": ({"a/b~c": SIZE}, "#/properties/a~1b~0c/anyOf/0"),
    "percent-encoded": ({"a b": SIZE}, "#/properties/a%20b/anyOf/0"),
    "into the parts of a list": ({"pair": {"type": "array", "prefixItems": [SIZE], "minItems": 1, "maxItems": 1}},
                                 "#/properties/pair/prefixItems/0/anyOf/0"),
    "into an intersection": ({"both": {"allOf": [SIZE, {"type": "string"}]}}, "#/properties/both/allOf/0/anyOf/0"),
}
"""Properties of an object, and a reference to the text of up to three characters in them."""


def schema_of(properties, reference):
    return {"type": "object", "properties": properties | {"again": {"$ref": reference}}, "required": ["again"],
            "additionalProperties": False}


@pytest.mark.parametrize("case", LED)
def test_a_reference_of_an_answer_is_followed(case):
    schema = schema_of(*LED[case])
    grammar = Grammar.json_schema(schema, bounds=SMALL)
    assert accepts(grammar, '{"again": "abc"}')
    assert not accepts(grammar, '{"again": "abcd"}')
    assert not accepts(grammar, '{"again": null}')
    for seed in range(3):
        text = written(matcher(grammar), np.random.default_rng(seed))
        jsonschema.validate(json.loads(text), schema)


@pytest.mark.parametrize("case", ["through a list", "by a slash and a tilde", "percent-encoded"])
def test_a_reference_of_a_tool_is_followed(case):
    """Calls have neither intersections of choices nor prefixItems."""
    tool = {"name": "pick", "parameters": schema_of(*LED[case])}
    grammar = Grammar.tool_calls([tool], required=True, bounds=SMALL)
    pythonic = all(name.isidentifier() for name in tool["parameters"]["properties"])
    call = "[pick(again={})]" if pythonic else '[{{"name": "pick", "arguments": {{"again": {}}}}}]'
    start, end = "<|tool_call_start|>", "<|tool_call_end|>"
    assert accepts(grammar, start + call.format('"abc"') + end)
    assert not accepts(grammar, start + call.format('"abcd"') + end)


TEXT, NUMBER = {"type": "string", "maxLength": 3}, {"type": "integer"}


def two(a, b, rest=()):
    return {"type": "object", "properties": {"a": a, "b": b}, "required": ["a", "b"]} | dict(rest)


def defs(**schemas):
    return {"$defs": schemas}


def old(draft, a, b, definitions, rest=()):
    """Before 2019 nothing counts beside a `$ref`."""
    schema = f"http://json-schema.org/draft-0{draft}/schema#"
    return two({"allOf": [a]}, {"allOf": [b]}, {"$schema": schema, "definitions": definitions} | dict(rest))


LED_BY_NAME = {
    "anchors": two({"$ref": "#text"}, {"$ref": "#number"}, defs(
        x=TEXT | {"$anchor": "text"}, y=NUMBER | {"$anchor": "number"})),
    "an anchor of the root": {"$anchor": "pair", "type": "array", "maxItems": 1, "items": {
        "anyOf": [two(TEXT, NUMBER), {"$ref": "#pair"}]}},
    "URLs into embedded schemas": two({"$ref": "http://e.org/x#/$defs/t"}, {"$ref": "other/x#/$defs/t"}, defs(
        x={"$id": "x"} | defs(t=TEXT), y={"$id": "other/x"} | defs(t=NUMBER)) | {"$id": "http://e.org/root"}),
    "one URL relative to two": two({"$id": "http://e.org/in/a", "$ref": "x"}, {"$ref": "x"}, defs(
        x=TEXT | {"$id": "in/x"}, y=NUMBER | {"$id": "x"}) | {"$id": "http://e.org/root"}),
    "one anchor of two embedded schemas": two(
        {"$id": "http://e.org/a", "$ref": "#t"} | defs(t=TEXT | {"$anchor": "t"}),
        {"$id": "http://e.org/b", "$ref": "#t"} | defs(t=NUMBER | {"$anchor": "t"})),
    "an anchor beside an id": two({"$ref": "http://e.org/a#t"}, {"$ref": "#t"}, defs(
        x=TEXT | {"$id": "http://e.org/a", "$anchor": "t"}, y=NUMBER | {"$anchor": "t"})),
    "one pointer within two schemas": two(
        {"$id": "http://e.org/a", "$ref": "#/$defs/t"} | defs(t=TEXT), {"$ref": "#/$defs/t"}, defs(t=NUMBER)),
    "a URI that is no URL": two({"$id": "urn:e:a", "$ref": "#/$defs/t"} | defs(t=TEXT), {"$ref": "urn:e:b"}, defs(
        t=NUMBER | {"$id": "urn:e:b"})),
    "ids of draft 7 that are anchors": old(7, {"$ref": "#t"}, {"$ref": "http://e.org/b#t"}, {
        "x": TEXT | {"$id": "#t"}, "y": {"$id": "http://e.org/b", "definitions": {"t": NUMBER | {"$id": "#t"}}}}),
    "an id of draft 7 beside a reference": old(
        7, {"$id": "http://e.org/a", "$ref": "#/definitions/t", "definitions": {"t": NUMBER}},
        {"$ref": "#/definitions/u"}, {"t": TEXT, "u": NUMBER}),
    "ids of draft 4": old(4, {"$ref": "a#/definitions/t"}, {"id": "b", "allOf": [{"$ref": "#t"}]}, {
        "x": {"id": "a", "definitions": {"t": TEXT}}, "y": {"id": "b", "definitions": {"t": NUMBER | {"id": "#t"}}},
    }, {"id": "http://e.org/root"}),
    "an id of draft 4 in a later one": two(
        TEXT, {"id": "http://e.org/b", "$ref": "#/$defs/t"} | defs(t=TEXT), defs(t=NUMBER)),
    "an unknown keyword": two({"$ref": "#/components/schemas/t"}, {"$ref": "#/components/schemas/u/items"}, {
        "components": {"schemas": {"t": TEXT, "u": {"items": {"$ref": "#/components/schemas/n"}}, "n": NUMBER}}}),
    "an unknown keyword of two embedded schemas": two(
        {"$id": "http://e.org/a", "components": {"t": TEXT}, "$ref": "#/components/t"},
        {"$id": "http://e.org/b", "components": {"t": {"$ref": "#/components/u"}, "u": NUMBER},
         "$ref": "#/components/t"}),
    "ids under an unknown keyword": two({"$ref": "#/components/t"}, {"$ref": "#/components/u"}, {"components": {
        "t": {"$id": "http://e.org/a", "$ref": "#/components/x", "components": {"x": NUMBER}},
        "u": NUMBER | {"$id": "u"}, "x": TEXT}}),
    "an enumeration": two(
        {"enum": ["x", {"type": "integer", "$id": "y"}, {"anyOf": [True]}]}, {"$ref": "#/properties/a/enum/1"}),
    "names that are taken": two({"$ref": "#/x/t"}, {"$ref": "#/x/u"}, {
        "$defs": {"lfm_jax.1.#/x/t": TEXT, "lfm_jax.3.#/x/u": NUMBER},
        "x": {"t": {"$ref": "#/$defs/lfm_jax.1.%23~1x~1t"}, "u": {"$ref": "#/$defs/lfm_jax.3.%23~1x~1u"}}}),
    "a target that holds others": two({"$ref": "#/x/anyOf/0/anyOf/0"}, {"$ref": "#/x/anyOf/1"}, defs(
        y={"$ref": "#/x"}, z={"$ref": "#/x/anyOf/0"}) | {"x": {"anyOf": [{"anyOf": [TEXT]}, NUMBER]}}),
    "true": two(TEXT | {"$ref": "#/$defs/all"}, NUMBER | {"$ref": "#/x/all"}, defs(all=True) | {"x": {"all": True}}),
}
"""Only a text as `a` and a number as `b` fit, or also what fits by a wider reference."""


@pytest.mark.parametrize("case", LED_BY_NAME)
def test_references_lead_where_another_validator_follows_them(case):
    schema = LED_BY_NAME[case]
    grammar = Grammar.json_schema(schema, bounds=SMALL)
    values = [{"a": a, "b": b} for a in ("x", 1) for b in ("x", 1)]
    values = [[value] for value in values] if schema["type"] == "array" else values
    fitting = [value for value in values if not faults(schema, value)]
    assert values[1] in fitting
    assert len(fitting) < 4
    assert [value for value in values if accepts(grammar, json.dumps(value))] == fitting
    for seed in range(3):
        assert faults(schema, json.loads(written(matcher(grammar), np.random.default_rng(seed)))) == []


@pytest.mark.parametrize("case", LED_BY_NAME)
def test_references_of_a_plain_schema_are_pointers_of_its_schemas(case):
    found = nodes(plain(LED_BY_NAME[case]))
    assert {unquote(node["$ref"]) for _, node in found if "$ref" in node} <= {place for place, _ in found}
    assert not {"$id", "id", "$anchor"} & {key for _, node in found for key in node}


def test_a_pointer_that_leads_nowhere_in_its_embedded_schema_is_one_from_the_root():
    """Generators write such, which the standard does not allow."""
    schema = two({"$id": "http://e.org/a", "$ref": "#/$defs/t"}, NUMBER, defs(t=TEXT))
    grammar = Grammar.json_schema(schema, bounds=SMALL)
    assert accepts(grammar, '{"a": "x", "b": 1}')
    assert not accepts(grammar, '{"a": 1, "b": 1}')


def test_a_name_of_two_schemas_is_refused_where_it_is_referred_to():
    twice = defs(x=TEXT | {"$anchor": "t"}, y=NUMBER | {"$anchor": "t"})
    assert accepts(Grammar.json_schema(two(TEXT, NUMBER, twice), bounds=SMALL), '{"a": "x", "b": 1}')
    with pytest.raises(GrammarError, match="2 schemas are called '#t'"):
        Grammar.json_schema(two(TEXT, {"$ref": "#t"}, twice))


def test_objects_met_through_a_list_are_merged():
    schema = {"allOf": [{"$ref": "#/$defs/some/oneOf/0"}, {"properties": {"b": {"type": "boolean"}}}],
              "$defs": {"some": {"oneOf": [{"type": "object", "properties": {"a": {"type": "integer"}},
                                            "required": ["a"]}]}}}
    grammar = Grammar.json_schema(schema, bounds=SMALL)
    assert accepts(grammar, '{"a": 12}')
    assert not accepts(grammar, '{"b": true}')


def test_a_schema_may_hold_itself_with_a_value_between():
    tree = {"type": "object", "properties": {"kids": {"type": "array", "items": {"$ref": "#"}, "maxItems": 2}},
            "additionalProperties": False}
    grammar = Grammar.json_schema(tree, bounds=SMALL)
    assert accepts(grammar, '{"kids": [{"kids": []}, {}]}')
    assert not accepts(grammar, '{"kids": [1]}')


PATTERNS = {"anyOf": [{"pattern": f".*{letter}0.{{3}}.*"} for letter in "abcdefghijkl"]}
MET = [{"$ref": f"#/$defs/all/anyOf/{i}"} for i in range(12)]
ITEMS = functools.reduce(lambda inner, _: {"items": inner}, range(100), {"anyOf": [{}] * 300})
INNER = ["#/x" + "/items" * i for i in range(100)]
CHAIN = {f"d{i}": {"type": "object", "properties": {"x": {"$ref": f"#/$defs/d{i + 1}"}}} for i in range(2000)}
TOO_MUCH = {
    "itself": ({"$ref": "#"}, "leads back to itself"),
    "each other": ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
                   "leads back to itself"),
    "itself among choices": (
        {"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/a"}]}}},
        "leads back to itself"),
    "patterns behind references": (
        {"type": "object", "properties": {"q": {"type": "string", "allOf": MET}}, "$defs": {"all": PATTERNS}},
        "12 patterns and formats for one text; at most 8"),
    "repetitions": ({"type": "string", "pattern": "^((a{1,1000}){1,1000}){1,1000}$"},
                    "make more than 10000 characters"),
    "repetitions with blanks": ({"type": "string", "pattern": "^((a{ 1,1000}){1 , 1000 }){ 1,1000}$"},
                                "make more than 10000 characters"),
    "repetitions with noughts": ({"type": "string", "pattern": "^((a{0000001000}){0000001000}){0,0000001000}$"},
                                 "make more than 10000 characters"),
    "a repetition without end": ({"type": "string", "pattern": f"^a{{1{'0' * 30}}}$"},
                                 "make more than 10000 characters"),
    "a repetition of many digits": ({"type": "string", "pattern": f"^a{{{'9' * 5000}}}$"},
                                    "make more than 10000 characters"),
    "repetitions with comments": ({"type": "string", "pattern": "(?ix)^ ((a{1 000}) {1 000 # )\n}) {10 00}$"},
                                  "the flag x of pattern"),
    "repetitions after a bracket in a name": ({"type": "string", "pattern": "^(?P<a[>((b{1000}){1000}){1000}])$"},
                                              "make more than 10000 characters"),
    "repetitions after classes in classes": ({"type": "string", "pattern": "^(a{1000}[[])x]]){1000}$"},
                                             "make more than 10000 characters"),
    "repetitions after a class that begins with its end": (
        {"type": "string", "pattern": "^(a{1000}[])[b]]){1000}$"}, "make more than 10000 characters"),
    "a brace that repeats nothing": ({"type": "string", "pattern": "^((a{1000}){x}){1000}$"},
                                     "make more than 10000 characters"),
    "one long repetition": ({"type": "string", "pattern": "^(a|[^b-y]z){2,6000}$"}, "make more than 10000 characters"),
    "repetitions in a key": ({"type": "object", "patternProperties": {"^(ab{200}){200}$": {"type": "null"}}},
                             "make more than 10000 characters"),
    "choices of choices": (
        {"allOf": [{"anyOf": [{"type": "object", "properties": {f"{i}{j}": {"type": "integer"}}} for j in range(6)]}
                   for i in range(12)]}, "more than 20000 schemas where they combine"),
    "a long list behind many references": (
        {"$defs": {"b": {"allOf": [{}] * 1000}},
         "properties": {f"a{i}": {"$ref": "#/$defs/b", "minLength": 1} for i in range(30)}},
        "more than 20000 schemas where they combine"),
    "many objects that combine": ({"allOf": [{"properties": {f"a{i}": {}}} for i in range(200)]},
                                  "more than 20000 schemas where they combine"),
    "many arrays that combine": ({"allOf": [{"prefixItems": [{}] * 200}, *[{"minItems": 1}] * 200]},
                                 "more than 20000 schemas where they combine"),
    "many names beside many patterns": (
        {"properties": {f"a{i}": {} for i in range(200)}, "patternProperties": {f"^b{i}": {} for i in range(200)}},
        "more than 20000 schemas where they combine"),
    "many choices beside many schemas": ({"allOf": [{"minLength": 1}] * 200, "anyOf": [{}] * 200},
                                         "more than 20000 schemas where they combine"),
    "references into each other's targets": ({"x": ITEMS, "anyOf": [{"$ref": reference} for reference in INNER]},
                                             "more than 20000 schemas where they combine"),
    "a name of 32 KB in many places": (
        {"properties": {"n" * 32_000: {"anyOf": [{}] * 8000}}}, "more than 5000000 bytes"),
    "a name of 32 KB in many references": (
        {"anyOf": [{"$ref": "#l"}] * 2000, "$defs": {"n" * 32_000: {"$anchor": "l"}}}, "more than 5000000 bytes"),
    "a base of 30 KB for many schemas": (
        {"$id": f"http://e.org/{'a' * 30_000}/", "anyOf": [{"$id": f"{i}"} for i in range(2000)]},
        "more than 5000000 bytes"),
    "a long chain": ({"$ref": "#/$defs/d0", "$defs": CHAIN | {"d2000": {"type": "null"}}}, "lie within each other"),
    "nowhere": ({"type": "object", "properties": {"a": {"$ref": "#/properties/b/anyOf/7"}}}, "leads nowhere"),
}
"""Schemas that would take llguidance seconds, gigabytes or its stack, and what is said of each."""


@pytest.mark.parametrize("case", TOO_MUCH)
def test_what_would_take_too_much_is_refused_before_it_is_compiled(case, monkeypatch):
    """By counting, so in no time: llguidance never sees it."""
    schema, message = TOO_MUCH[case]
    from lfm_jax.structured import json_schema

    monkeypatch.setattr(json_schema, "accepted", lambda text: pytest.fail("it was compiled"))
    with pytest.raises(GrammarError, match=message):
        Grammar.json_schema(schema)


@pytest.mark.parametrize("case", [case for case in TOO_MUCH if "KB" in case])
def test_what_is_refused_takes_little_memory(case):
    tracemalloc.start()
    with pytest.raises(GrammarError):
        Grammar.json_schema(TOO_MUCH[case][0])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6


def test_what_references_share_is_copied_once():
    """Whichever comes first."""
    for order in (INNER, INNER[::-1]):
        root = plain({"x": ITEMS, "anyOf": [{"$ref": reference} for reference in order]})
        assert len(nodes(root)) < 700


def test_schemas_of_daily_use_are_not_too_many():
    wide = {"type": "object", "required": ["p0"], "properties": {f"p{i}": {"type": "string"} for i in range(300)}}
    wide |= {"patternProperties": {f"^x{i}-": {"type": "null"} for i in range(10)}}
    arguments = {f"a{j}": {"type": "integer"} for j in range(16)}
    tools = [{"type": "object", "properties": {"name": {"const": f"f{i}"}} | arguments} for i in range(128)]
    base = {"type": "object", "properties": {f"b{i}": {"type": "number"} for i in range(30)}}
    derived = [{"allOf": [{"$ref": "#/$defs/base"}, {"properties": {f"c{i}": {"type": "null"}}}]} for i in range(40)]
    for schema in (wide, {"oneOf": tools}, {"oneOf": derived, "$defs": {"base": base}}):
        check_size(plain(schema))


@pytest.mark.parametrize("pattern", ["((a{1,1000}){1,1000}){1,1000}", "((a{ 1,1000}){ 1,1000}){ 1,1000}"])
def test_a_regular_expression_by_itself_is_counted_too(pattern):
    with pytest.raises(GrammarError, match="make more than 10000 characters"):
        Grammar.regex(pattern)


@pytest.mark.parametrize(("pattern", "fits", "fails"), [
    (r"^[a-z]{2,30}(-[a-z0-9]{1,20}){0,9}$", '"ab-c1"', '"a"'), (r"^\d{4}-\d{2}$", '"2026-11"', '"20261"'),
    (r"^(a{1,30}b){5}$", f'"{"aab" * 5}"', '"ab"'), (r"^[[:alpha:]]{2,30}\{\(?x\)?$", '"ab{(x)"', '"ab{(x"y'),
    ("^(?P<word>[a-z&&[^x]]{1,9}){1,5}$", '"abc"', '"axc"'),
])
def test_repetitions_of_daily_use_are_not_too_many(pattern, fits, fails):
    grammar = Grammar.json_schema({"type": "string", "pattern": pattern}, bounds=SMALL)
    assert accepts(grammar, fits)
    assert not accepts(grammar, fails)
