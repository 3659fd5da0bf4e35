"""Random schemas and real ones: whatever is written fits its schema, and what cannot be promised is refused."""

import functools
import json
import random
import re
import tarfile
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from grammars import SMALL, TREE, accepts, faults, matcher, samples, written
from helpers import long

from lfm_jax.structured.grammar import Grammar
from lfm_jax.structured.json_schema import GrammarError, bounded

BENCH = Path(__file__).parents[3] / "shared/data/eval/jsonschemabench.tar.xz"


def random_schema(rng, depth=3):
    """A schema that something fits, of every keyword that is supported."""
    scalars = ["string", "number", "integer", "enum", "const", "scalar"]
    nested = ["object", "map", "array", "tuple"] * 2 + ["any of", "one of", "ref", "all of", "any"]
    kind = rng.choice(scalars + nested if depth else scalars)
    inner = functools.partial(random_schema, rng, depth - 1)
    low = rng.randint(-30, 30)
    if kind == "string":
        return {"type": "string"} | rng.choice([
            {}, {"minLength": 3}, {"minLength": 1, "maxLength": 4}, {"pattern": "^[a-c]{2}(x|é)*$"}, {"pattern": "q+"},
            {"format": rng.choice(["ipv4", "ipv6", "uuid", "email", "date", "time"])},
            {"pattern": "^\\S{3,}$", "maxLength": 5},
        ])
    if kind == "number":
        return {"type": "number"} | rng.choice([
            {}, {"minimum": low / 7}, {"exclusiveMinimum": low, "maximum": low + 0.5}, {"exclusiveMaximum": low / 100},
            {"minimum": 1e-2, "exclusiveMaximum": 0.3}, {"multipleOf": 0.5}, {"maximum": 123.4567}, {"minimum": -0.125},
        ])
    if kind == "integer":
        return {"type": "integer"} | rng.choice([
            {}, {"minimum": low}, {"minimum": low, "maximum": low + 3}, {"exclusiveMinimum": low / 3},
            {"multipleOf": 7}, {"exclusiveMaximum": low, "multipleOf": 1000}, {"minimum": 2**53 - 9},
            {"maximum": 2**63 - 1},
        ])
    if kind == "enum":
        return {"enum": rng.sample(["a", 'q"\\\n', "é", 1, -2.5, True, None, [1, {"x": None}], {"k": [False]}], 4)}
    if kind == "const":
        return {"const": rng.choice(["a", 0, 1e-20, -2.5e9, 123456.789012345, False, [[]], {"a": {"b": "c"}}])}
    if kind == "scalar":
        return {"type": rng.sample(["null", "boolean", "integer", "string"], 2), "maxLength": 3}
    if kind == "object":
        names = rng.sample(["a", "b", "c c", 'd"', "é", "required"], rng.randint(1, 4))
        rest = rng.choice([{}, {}, {"additionalProperties": inner()}, {"patternProperties": {"^x[0-9]$": inner()}}])
        required = [n for n in [*names, "more"] if rng.random() < 0.4]
        return {"type": "object", "properties": {n: inner() for n in names}, "required": required} | rest
    if kind == "map":
        return {"type": "object", "minProperties": 1, "additionalProperties": inner()}
    if kind == "array":
        return {"type": "array", "items": inner()} | rng.choice([{}, {"minItems": 2}, {"minItems": 1, "maxItems": 2}])
    if kind == "tuple":
        return {"type": "array", "prefixItems": [inner(), inner()], "minItems": 2}
    if kind == "ref":
        return {"$ref": "#/$defs/tree"}
    if kind == "all of":
        first = {"properties": {"a": {"type": "string"}, "b": {"minimum": 3}}, "required": ["a"]}
        return {"type": "object", "allOf": [first, {"properties": {"b": {"type": "integer"}, "c": inner()}}]}
    if kind == "one of":
        return {"oneOf": [{"type": "null"}, {"type": "array", "items": inner()}, {"type": "string"}]}
    return {"anyOf": [inner(), inner()]} if kind == "any of" else {"description": "anything"}


@pytest.mark.parametrize("seed", range(8))
def test_random_text_fits_its_schema(seed):
    rng = random.Random(seed)
    finished = 0
    for i in range(20):
        schema = {"$defs": {"tree": TREE}, **random_schema(rng)}
        jsonschema.Draft202012Validator.check_schema(schema)
        for text in samples(Grammar.json_schema(schema, bounds=SMALL), 3, seed=i):
            if text is not None:
                finished += 1
                assert faults(schema, json.loads(text)) == [], (schema, text)
    assert finished > 55


def test_the_random_schemas_use_every_keyword():
    rng = random.Random(0)
    text = json.dumps([random_schema(rng) for _ in range(400)])
    for word in ("oneOf", "$ref", "patternProperties", "prefixItems", "exclusiveMinimum", "format", "anyOf", "const"):
        assert f'"{word}"' in text


@functools.cache
def bench():
    if not BENCH.exists():
        pytest.skip("jsonschemabench.tar.xz is not on this machine")
    with tarfile.open(BENCH) as archive:
        return [json.load(archive.extractfile(m)) for m in sorted(archive.getmembers(), key=lambda m: m.name)
                if m.name.endswith(".json")]


def test_random_text_fits_real_schemas():
    """The validator divides floats, which makes 0.07 no multiple of 0.01; nothing else may fail."""
    accepted = finished = 0
    for i, schema in enumerate(random.Random(0).sample(bench(), 200)):
        try:
            start = matcher(Grammar.json_schema(schema, bounds=SMALL))
        except GrammarError:
            continue
        accepted += 1
        if (text := written(start, np.random.default_rng(i))) is not None:
            finished += 1
            found = [f for f in faults(schema, json.loads(text)) if "is not a multiple of 0." not in f]
            assert found == [], text
    assert accepted > 160
    assert finished > 0.95 * accepted


@pytest.mark.parametrize("number", [1000, long(9557)])
def test_most_real_schemas_are_accepted_and_the_rest_refused(number):
    """In `make test-long` all that there are."""
    refused = []
    for schema in random.Random(1).sample(bench(), number):
        try:
            Grammar.json_schema(schema)
        except GrammarError as error:
            refused.append(str(error))
    assert len(bench()) == 9557
    assert 0 < len(refused) < 0.15 * number
    assert {error.partition(":")[0] for error in refused} == {"the JSON schema is refused"}


def test_sizes_are_bounded():
    kinds = {"s": "string", "n": "number", "i": "integer", "l": "array", "m": "object", "b": "boolean"}
    schema = {"properties": {name: {"type": kind} for name, kind in kinds.items()}, "required": list(kinds)}
    texts = [text for text in samples(Grammar.json_schema(schema, bounds=SMALL), 40) if text is not None]
    assert len(texts) > 30
    for text in texts:
        value = json.loads(text)
        assert list(value) == schema["required"]
        assert len(value["s"]) <= 9
        assert len(value["l"]) <= 3
        assert len(value["m"]) <= 3
        assert abs(value["n"]) <= 10**4
        assert abs(value["i"]) <= 10**4
        assert not re.search(r"\.\d{3}", text)


@pytest.mark.parametrize(
    ("schema", "fitting", "unfitting"),
    [
        ({"type": "string", "minLength": 12}, ['"0123456789ab"'], ['"0123456789"', '"0123456789abc"']),
        ({"type": "string", "format": "uuid"}, [f'"{"a" * 8}-{"-".join(["1234"] * 3)}-{"b" * 12}"'], ['"a"']),
        ({"type": "array", "minItems": 4, "items": {"type": "null"}}, ["[null,null,null,null]"], ["[null,null,null]"]),
        ({"type": "integer", "minimum": 20_000}, ["20000", "30000"], ["19999", "-20001"]),
        ({"type": "integer", "maximum": -20_000}, ["-20000"], ["-19999", "20001"]),
        ({"type": "integer", "minimum": 0, "exclusiveMinimum": True}, ["1"], ["0"]),
        ({"type": "number", "exclusiveMinimum": 0, "maximum": 0.05}, ["0.01", "0.05"], ["0", "0.0", "0.06", "0.001"]),
        ({"type": "number"}, ["-1.5", "0"], ["1e9999", "01", "NaN"]),
        (
            {"type": "number", "maximum": 1.7e308, "minimum": -(2**63)},
            ["-1.5", "9007199254740992"], ["9007199254740993", "1e16"],
        ),
        ({"type": "number", "multipleOf": 2.5}, ["5", "-7.5"], ["6"]),
        # Several types, each with its keywords; no type, and keywords of one.
        ({"type": ["string", "array"], "maxLength": 1}, ['"a"', "[]"], ['"ab"', "1"]),
        ({"properties": {"a": {"minLength": 1}}}, ['{"a":"b"}', "{}"], ['{"a":1}', "1", '{"b":1}']),
        # Objects are closed, but not where that would take away what another schema brings.
        ({"type": "object", "required": ["a"]}, ['{"a":1}'], ["{}"]),
        ({"properties": {"b": {}}, "required": ["a"]}, ['{"a":1}', '{"b":2,"a":1}'], ["{}", '{"a":1,"c":1}']),
        ({"properties": {"b": {}}, "additionalProperties": {"type": "null"}}, ['{"b":1,"c":null}'], ['{"c":1}']),
        ({"patternProperties": {"^x": {"type": "null"}}}, ['{"x":null}'], ['{"x":1}', '{"y":null}']),
        (
            {"allOf": [{"$ref": "#/$defs/a"}, {"properties": {"b": {}}, "required": ["b"]}],
             "$defs": {"a": {"type": "object", "properties": {"a": {"type": "null"}}}}},
            ['{"a":null,"b":1}'], ['{"a":null}', '{"a":1,"b":1}'],
        ),
        (
            {"type": "object", "properties": {"a": {}, "b": {}}, "anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
            ['{"a":1}', '{"b":1}'], ["{}"],
        ),
        (
            {"properties": {"a": {"properties": {"x": {"type": "null"}}}},
             "patternProperties": {".": {"required": ["y"]}}},
            ['{"a":{"x":null,"y":1}}'], ['{"a":{"x":null}}'],
        ),
        # An `$id` within moves where references start from.
        ({"properties": {"a": {"$id": "http://x.org/a", "properties": {"b": {}}}}}, ['{"a":{"b":[1]}}'], []),
        # What would set options of llguidance does not.
        ({"x-guidance": {"whitespace_pattern": "[ ]+", "lenient": True}, "type": "array"}, ["[1]"], ["[  1]"]),
        # At most one blank, after a comma or colon.
        (
            {"type": "object"},
            ['{"a":1,"b":[1,2]}', '{"a": 1, "b": [1, 2]}'], ['{"a":  1}', '{ "a":1}', '{"a" :1}', '{"a":1} '],
        ),
        (True, ["null", '[{"a":[]}]'], ["", "nul"]),
        ('{"type": "null"}', ["null"], ["1"]),
        # A taken key under another spelling would not meet its schema.
        (
            {"properties": {"a": {"type": "null"}}, "additionalProperties": True},
            ['{"a":null,"b":1}'], ['{"\\u0061":1}'],
        ),
    ],
)
def test_schemas_mean_what_they_say(schema, fitting, unfitting):
    grammar = Grammar.json_schema(schema, bounds=SMALL)
    assert [text for text in fitting if not accepts(grammar, text)] == []
    assert [text for text in unfitting if accepts(grammar, text)] == []


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"not": {}}, r'Unimplemented keys: \["not"\] \(at #/properties/x\)'),
        ({"type": "array", "uniqueItems": True}, r"uniqueItems.*\(at #/properties/x\)"),
        ({"if": {"type": "null"}, "then": False}, "if"),
        ({"type": "string", "format": "zip"}, r"format: zip \(at #/properties/x\)"),
        ({"type": "string", "pattern": "(?=a)b"}, "look-ahead"),
        ({"oneOf": [{"type": "string"}, {"maxLength": 3}]}, r"oneOf .*\(at #/properties/x\)"),
        # Once closed, the second no longer fits what the first does.
        ({"oneOf": [{"properties": {"a": {}, "b": {}}, "required": ["a"]}, {"properties": {"b": {}}}]}, "oneOf"),
        ({"type": "number", "exclusiveMinimum": 0, "maximum": 1e-7}, r"no number .*\(at #/properties/x\)"),
        ({"type": "number", "multipleOf": 10.01}, r"multipleOf 10.01 .*\(at #/properties/x\)"),
        ({"enum": [1, 1e30]}, r"1e.30 has too many digits \(at #/properties/x\)"),
        ({"type": "integer", "minimum": 2**60}, r"beyond .*\(at #/properties/x\)"),
        ({"type": "number", "maximum": -1e22}, r"beyond .*\(at #/properties/x\)"),
        ({"const": 1e-30}, "1e-30 has too many digits"),
        ({"enum": [0.12345678901234567]}, "0.12345678901234566 has too many digits"),
        ({"const": [{"a": 2**53 + 1}]}, r"9007199254740993 has too many digits \(at #/properties/x\)"),
        ({"type": "object", "minProperties": 2}, r"minProperties .*\(at #/properties/x\)"),
        ({"type": "string", "minLength": "1"}, r"minLength is '1'; expected a whole number \(at #/properties/x\)"),
        ({"required": True}, "required is True; expected a list"),
        ({"type": "text"}, "Invalid type: text"),
        ({"$ref": "#/$defs/none"}, "/\\$defs/none"),
        ({"$ref": "file:///etc/hostname"}, "does not fetch"),
        ({"type": "string", "minLength": 3, "maxLength": 2}, "unsatisfiable"),
    ],
)
def test_what_cannot_be_promised_is_refused(schema, message):
    with pytest.raises(GrammarError, match=message):
        Grammar.json_schema({"type": "object", "properties": {"x": schema}, "required": ["x"]})


@pytest.mark.parametrize(
    "schema", [False, 3, "{", "3", {"const": float("nan")}, {"const": "\ud800"}, {"const": object()}]
)
def test_what_is_no_schema_is_refused(schema):
    with pytest.raises(GrammarError, match="the JSON schema is"):
        Grammar.json_schema(schema)


def test_a_schema_may_not_nest_without_end():
    schema = functools.reduce(lambda inner, _: {"items": inner}, range(400), {})
    with pytest.raises(GrammarError, match="nested too deeply"):
        Grammar.json_schema(schema)
    with pytest.raises(GrammarError, match="JSON"):
        Grammar.json_schema("[" * 100_000)


def test_json_object():
    grammar = Grammar.json_object(bounds=SMALL)
    texts = [text for text in samples(grammar, 30) if text is not None]
    assert len(texts) > 25
    assert all(isinstance(json.loads(text), dict) for text in texts)
    assert accepts(grammar, '{"a":{"b":[{"c":null}]}}')


def test_bounded_is_a_schema_of_its_own():
    """What fits it fits the original, by the word of another validator; the original is left alone."""
    schema = {"type": "object", "properties": {"a": {"type": "string"}, "b": {}}, "required": ["a"]}
    copy = json.loads(json.dumps(schema))
    new = bounded(schema, SMALL)
    assert schema == copy
    assert faults(new, {"a": "x" * 9, "b": [1, 2, 3]}) == []
    large = ([1] * 4, [1e9], "x" * 10, {"k": 0.001}, {str(i): i for i in range(4)})
    for value in ({"a": "x" * 10}, {"a": "", "c": 1}, *({"a": "", "b": b} for b in large)):
        assert faults(new, value)
        assert faults(schema, value) == []
