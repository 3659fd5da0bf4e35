"""References lead where RFC 6901 says, in answers and in calls; what would take too much work is refused before."""

import json

import jsonschema
import numpy as np
import pytest
from grammars import SMALL, accepts, matcher, written

from lfm_jax.structured.grammar import Grammar
from lfm_jax.structured.schema import GrammarError

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
    "one long repetition": ({"type": "string", "pattern": "^(a|[^b-y]z){2,6000}$"}, "make more than 10000 characters"),
    "repetitions in a key": ({"type": "object", "patternProperties": {"^(ab{200}){200}$": {"type": "null"}}},
                             "make more than 10000 characters"),
    "choices of choices": (
        {"allOf": [{"anyOf": [{"type": "object", "properties": {f"{i}{j}": {"type": "integer"}}} for j in range(6)]}
                   for i in range(12)]}, "more than 20000 schemas where they combine"),
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


def test_a_regular_expression_by_itself_is_counted_too():
    with pytest.raises(GrammarError, match="make more than 10000 characters"):
        Grammar.regex("((a{1,1000}){1,1000}){1,1000}")


@pytest.mark.parametrize(("pattern", "fits", "fails"), [
    (r"^[a-z]{2,30}(-[a-z0-9]{1,20}){0,9}$", '"ab-c1"', '"a"'), (r"^\d{4}-\d{2}$", '"2026-11"', '"20261"'),
    (r"^(a{1,30}b){5}$", f'"{"aab" * 5}"', '"ab"'),
])
def test_repetitions_of_daily_use_are_not_too_many(pattern, fits, fails):
    grammar = Grammar.json_schema({"type": "string", "pattern": pattern}, bounds=SMALL)
    assert accepts(grammar, fits)
    assert not accepts(grammar, fails)
