"""A model that draws among the allowed tokens: whatever it writes fits; and what cannot be promised is refused."""

import ast
import functools
import json
import random
import re
import sys
import tarfile
from pathlib import Path

import jax
import jsonschema
import numpy as np
import pytest

from lfm_jax.infer.grammar import (
    MAX_CALLS,
    Bounds,
    Grammar,
    GrammarError,
    GrammarTokenizer,
    Matcher,
    fill_masks,
    grammar_tokenizer,
    unpack,
)
from lfm_jax.infer.json_schema import bounded
from lfm_jax.infer.tools import parse_tool_calls
from lfm_jax.testing import tiny_tokenizer

V = 333  # More ids than the tokenizer has, and no multiple of 32.
EOS = (7, 2)
START, END = "<|tool_call_start|>", "<|tool_call_end|>"
SMALL = Bounds(string=9, items=3, digits=4, decimals=2)
FORMATS = jsonschema.FormatChecker(("ipv4", "ipv6", "uuid", "email"))
BENCH = Path(__file__).parents[3] / "shared/data/eval/jsonschemabench.tar.xz"

tokenizer = functools.cache(tiny_tokenizer)


def matcher(grammar):
    return grammar_tokenizer(tokenizer(), V, EOS).matcher(grammar)


def allowed(m):
    mask_W = np.zeros(-(-V // 32), np.uint32)
    m.mask(mask_W)
    return np.flatnonzero(np.unpackbits(mask_W.view(np.uint8), bitorder="little"))


def pick(ids, rng):
    return int(ids[rng.integers(len(ids))])


def written(m, rng, limit=2000):
    """What a random model writes from where a matcher stands, or None when it needs more than `limit` tokens."""
    m, ids = m.copy(), []
    while len(ids) < limit:
        token = pick(allowed(m), rng)
        m.consume(token)
        assert m.error is None
        if token in EOS:
            return tokenizer().decode(ids, skip_special_tokens=False)
        ids.append(token)
    return None


def samples(grammar, n, seed=0, limit=2000):
    start, rng = matcher(grammar), np.random.default_rng(seed)
    return [written(start, rng, limit) for _ in range(n)]


def accepts(grammar, text):
    """Whether the whole of a text fits; special tokens in it are tokens."""
    m = matcher(grammar)
    try:
        for token in tokenizer().encode(text, add_special_tokens=False).ids:
            assert (token in allowed(m)) == m.copy().handle.consume_token(token)
            m.consume(token)
    except ValueError:
        return False
    return m.accepts_eos


def faults(schema, value):
    validator = jsonschema.validators.validator_for(schema)(schema, format_checker=FORMATS)
    return [e.message for e in validator.iter_errors(value)]


# ------------------------------------------------------------------ JSON schemas


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


TREE = {"type": "object", "required": ["value"], "properties": {
    "value": {"type": "boolean"}, "children": {"type": "array", "maxItems": 2, "items": {"$ref": "#/$defs/tree"}},
}}


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


@pytest.mark.slow
def test_most_real_schemas_are_accepted_and_the_rest_refused():
    refused = []
    for schema in bench():
        try:
            Grammar.json_schema(schema)
        except GrammarError as error:
            refused.append(str(error))
    assert len(bench()) == 9557
    assert len(refused) < 0.15 * len(bench())
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


# ------------------------------------------------------------------ other grammars


@pytest.mark.parametrize("pattern", [r"[a-f]{3}-[0-9]{1,2}", r"(yes|no)( or (yes|no)){0,3}", r"é[^\x00-\x7f]{2}"])
def test_regex(pattern):
    assert all(re.fullmatch(pattern, text) for text in samples(Grammar.regex(pattern), 20))


def test_choice():
    choices = ["the", "them", 'a "b"\n', "é/"]
    assert set(samples(Grammar.choice(choices), 60)) == set(choices)


def test_lark():
    grammar = Grammar.lark('start: sum\nsum: NUMBER (" + " NUMBER){1,3}\nNUMBER: /[1-9][0-9]{0,2}/')
    assert all(re.fullmatch(r"\d+( \+ \d+){1,3}", text) for text in samples(grammar, 20))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Grammar.regex("a("), lambda: Grammar.regex(r"a(?=b)"), lambda: Grammar.lark("start: x"),
        lambda: Grammar.lark(""), lambda: Grammar.choice([]), lambda: Grammar.choice("ab"), lambda: Grammar.choice([1]),
        lambda: matcher(Grammar.lark("start: <|no_such_token|>")), lambda: Grammar.tool_calls([]),
    ],
)
def test_broken_grammars_are_refused(make):
    with pytest.raises(GrammarError, match=r"\w{3}"):
        make()


def test_without_llguidance_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ImportError, match=re.escape("pip install lfm_jax[grammar]")):
        Grammar.json_object()


# ------------------------------------------------------------------ tool calls

WEATHER = {"name": "get_weather", "description": "Weather", "parameters": {
    "type": "object", "required": ["city", "days"],
    "properties": {
        "city": {"type": "string"},
        "unit": {"enum": ["C", "F", None, True, "a<|b\"'\\", 1.5, [True, {"k": None}]]},
        "days": {"type": "integer", "exclusiveMinimum": 0, "maximum": 5},
        "flags": {"type": "array", "items": {"type": ["boolean", "null", "number", "string"]}, "minItems": 1},
        "where": {"anyOf": [{"type": "null"}, {"type": "object", "required": ["here"], "properties": {
            "here": {"type": "boolean"}, "at": {"type": "string", "pattern": "^[a-z]{2,}$"}}}]},
        "pick": {"oneOf": [{"const": False}, {"type": "string", "format": "date"}]},
    },
}}
PLANT = {"type": "function", "function": {"name": "trees.plant", "parameters": {
    "type": "object", "required": ["root", "named"],
    "properties": {
        "root": {"$ref": "#/$defs/tree"},
        "anything": {},
        "named": {"type": "object", "minProperties": 1, "additionalProperties": {"type": ["boolean", "null"]}},
        "code": {"type": "string", "minLength": 2, "maxLength": 6},
        "kind": {"allOf": [{"$ref": "#/$defs/kind"}], "default": "oak"},
    },
    "$defs": {"tree": TREE, "kind": {"type": "string", "enum": ["oak", "elm", 3]}},
}}}
PING = {"name": "ping"}
TOOLS = [WEATHER, PLANT, PING]
PARAMETERS = {
    "get_weather": WEATHER["parameters"], "trees.plant": PLANT["function"]["parameters"], "ping": {"properties": {}},
}


def calls_in(block):
    """Names and arguments of a block, read by Python itself."""
    assert block.startswith(START)
    assert block.endswith(END)
    (expression,) = ast.parse(block.removeprefix(START).removesuffix(END)).body
    assert isinstance(expression.value, ast.List)
    for call in expression.value.elts:
        assert not call.args
        yield ast.unparse(call.func), {k.arg: ast.literal_eval(k.value) for k in call.keywords}


def assert_fits(block):
    calls = list(calls_in(block))
    for name, arguments in calls:
        assert faults(PARAMETERS[name], arguments) == [], block
        assert not arguments.keys() - PARAMETERS[name]["properties"].keys()
    content, parsed = parse_tool_calls(block, TOOLS)
    assert (content, [(call.name, call.arguments) for call in parsed]) == ("", calls)
    return calls


def test_random_calls_fit_the_tools():
    blocks = samples(Grammar.tool_calls(TOOLS, required=True, bounds=SMALL), 150)
    calls = [assert_fits(block) for block in blocks if block is not None]
    assert len(calls) > 140
    assert {name for block in calls for name, _ in block} == set(PARAMETERS)
    assert 1 < max(map(len, calls)) <= MAX_CALLS
    seen = [arguments for block in calls for _, arguments in block]
    optional = {"unit", "flags", "where", "pick", "anything", "code", "kind"}
    assert {name for arguments in seen for name in arguments} >= optional
    assert not any(optional <= arguments.keys() for arguments in seen)
    assert len({json.dumps(a["unit"]) for a in seen if "unit" in a}) == 7


def test_one_call_of_a_named_tool():
    blocks = samples(Grammar.tool_calls(TOOLS, parallel=False, name="get_weather", bounds=SMALL), 30)
    assert [[name for name, _ in assert_fits(block)] for block in blocks] == [["get_weather"]] * 30
    with pytest.raises(GrammarError, match="no tool 'other'"):
        Grammar.tool_calls(TOOLS, name="other")


def test_the_model_decides_between_text_and_calls():
    grammar = Grammar.tool_calls(TOOLS, bounds=SMALL)
    m = matcher(grammar)
    assert m.accepts_eos
    assert set(allowed(m)) & set(range(14)) == {*EOS, 10}
    call = f"{START}[ping(), ping()]{END}"
    assert accepts(grammar, "the text [ping()] <|")
    assert accepts(grammar, call)
    assert accepts(grammar, f"the lazy dog{call} jumps")
    assert not accepts(grammar, f"the lazy dog{START}[ping()]")
    assert not accepts(grammar, f"the{START}the")
    assert not accepts(grammar, call + call)
    # The letters of a marker would be read like the token.
    for marker in (START, END):
        ids = [i for c in marker for i in tokenizer().encode(c, add_special_tokens=False).ids]
        assert len(ids) == len(marker)
        for id in ids[:-1]:
            m.consume(id)
        assert ids[-1] not in allowed(m)
        m.rollback(len(ids) - 1)
    found = 0
    for text in samples(grammar, 60):
        content, block = text.partition(START)[::2]
        found += bool(block)
        assert parse_tool_calls(text, TOOLS)[0] == content + block.partition(END)[2]
    assert 0 < found < 60


def test_strings_of_calls_hold_no_marker():
    tool = {"name": "f", "parameters": {"type": "object", "required": ["a"], "properties": {
        "a": {"type": "string"}, "b": {"type": "string", "maxLength": 9}, "c": {"type": "string", "pattern": "<"},
        "d": {"const": "<|x|>"}, "e": {"type": "object", "additionalProperties": {"const": 1}}}}}
    grammar = Grammar.tool_calls([tool], required=True)
    assert accepts(grammar, f'{START}[f(a="<<a<", b="<b>", c="<", d="<\\u007cx|>", e={{"<k": 1}})]{END}')
    for text in ('a="<|"', 'a="<<|"', 'a="", b="<|"', 'a="", c="<|"', 'a="", d="<|x|>"', 'a="", e={"<|": 1}'):
        assert not accepts(grammar, f"{START}[f({text})]{END}")


def test_a_name_that_is_no_identifier_makes_a_json_object():
    tool = {"name": "f", "parameters": {"type": "object", "properties": {"a-b": {"type": ["boolean", "null"]}}}}
    grammar = Grammar.tool_calls([tool, PING], required=True)
    blocks = set(samples(Grammar.tool_calls([tool], required=True, parallel=False), 60))
    values = ('"a-b": true', '"a-b": false', '"a-b": null', "")
    assert blocks == {f'{START}[{{"name": "f", "arguments": {{{value}}}}}]{END}' for value in values}
    assert accepts(grammar, f'{START}[ping(), {{"name": "f", "arguments": {{}}}}]{END}')
    assert [c.arguments for b in sorted(blocks) for c in parse_tool_calls(b)[1]] == [
        {"a-b": False}, {"a-b": None}, {"a-b": True}, {},
    ]


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"not": {}}, r'Unimplemented keys: \["not"\] \(at #/properties/x\)'),
        ({"oneOf": [{"type": "string"}, {"maxLength": 3}]}, "oneOf"),
        ({"allOf": [{"type": "string"}, {"maxLength": 3}]}, "/properties/x/allOf"),
        ({"anyOf": [{"type": "string"}], "maxLength": 3}, "/properties/x/maxLength"),
        ({"type": "array", "items": {"patternProperties": {"a": {}}}}, "x/items/patternProperties"),
        ({"type": "array", "prefixItems": [{}]}, "x/prefixItems"),
        ({"type": "string", "pattern": r"^<\|$"}, "/properties/x"),
        ({"type": "object", "properties": {"a": {}, "b": {}}, "minProperties": 1}, "/properties/x: minProperties"),
        ({"type": "array", "minItems": 3, "maxItems": 2}, "/properties/x"),
        ({"enum": [1], "type": "string"}, "/properties/x: nothing fits"),
        (False, "/properties/x"),
    ],
)
def test_parameters_that_calls_cannot_have_are_refused(schema, message):
    with pytest.raises(GrammarError, match=f"tool 'f': parameters.*{message}"):
        Grammar.tool_calls([{"name": "f", "parameters": {"type": "object", "properties": {"x": schema}}}])


# ------------------------------------------------------------------ matchers and masks


def test_nothing_beyond_the_tokenizer_is_allowed():
    size = tokenizer().get_vocab_size()
    assert size < V
    for grammar in (Grammar.lark("start: <[*]>"), Grammar.lark("start: <[^0]>{1,3}"), Grammar.regex("(?s:.*)")):
        ids = allowed(matcher(grammar))
        assert len(ids) > 200
        assert ids.max() < size


def test_a_complete_text_allows_every_eos_and_nothing_else():
    grammar = Grammar.choice(["a", "ab"])
    m = matcher(grammar)
    a, b = (tokenizer().token_to_id(c) for c in "ab")
    assert (m.accepts_eos, m.done) == (False, False)
    assert set(allowed(m)) == {a}
    m.consume(a)
    assert (m.accepts_eos, m.done) == (True, False)
    assert set(allowed(m)) == {*EOS, b}
    m.consume(b)
    assert m.done
    assert set(allowed(m)) == set(EOS)
    m.consume(EOS[1])
    assert m.done
    assert set(allowed(m)) == set(EOS)


def test_special_tokens_are_no_text():
    m = matcher(Grammar.json_schema({"type": "string"}))
    m.consume(tokenizer().token_to_id('"'))
    for id in tokenizer().encode(f"{START} fox", add_special_tokens=False).ids[1:]:
        m.consume(id)
    assert not set(allowed(m)) & set(range(14))
    # Their letters are.
    for c in "<|im_end|>":
        m.consume(tokenizer().token_to_id(c))
    assert not m.accepts_eos
    m.consume(tokenizer().token_to_id('"'))
    assert m.done


def test_a_token_that_is_not_allowed_raises():
    m = matcher(Grammar.choice(["ab"]))
    with pytest.raises(ValueError, match="token 7 is not allowed"):
        m.copy().consume(7)
    with pytest.raises(ValueError, match="token 40 is not allowed"):
        m.consume(40)


def test_copies_are_independent():
    rng = np.random.default_rng(0)
    schema = {"type": "array", "items": {"enum": ["the", 17, None]}, "minItems": 3}
    m = matcher(Grammar.json_schema(schema, bounds=SMALL))
    for _ in range(4):
        m.consume(pick(allowed(m), rng))
    before = allowed(m)
    texts = {written(m, rng) for _ in range(20)}
    assert len(texts) > 5
    np.testing.assert_array_equal(allowed(m), before)


def test_rollback_takes_tokens_back():
    rng = np.random.default_rng(0)
    m = matcher(Grammar.json_schema({"type": "array", "items": {"type": ["boolean", "null"]}, "minItems": 300}))
    masks = [allowed(m)]
    for n in (1, 0, 7, 30):
        for _ in range(30):
            m.consume(pick(np.setdiff1d(masks[-1], EOS), rng))
            masks.append(allowed(m))
        m.rollback(n)
        del masks[len(masks) - n :]
        np.testing.assert_array_equal(allowed(m), masks[-1])
    with pytest.raises(ValueError, match="cannot take back 99"):
        m.rollback(99)


def test_many_masks_at_once_are_those_of_each():
    rng = np.random.default_rng(0)
    grammars = [Grammar.json_object(), Grammar.regex("a*b"), Grammar.tool_calls(TOOLS), Grammar.choice(["x"])]
    matchers = [matcher(g) for g in grammars for _ in range(3)]
    for m in matchers[::2]:
        m.consume(pick(np.setdiff1d(allowed(m), EOS), rng))
    rows = [*matchers[:5], None, *matchers[5:]]
    masks_BW = rng.integers(0, 2**32, (len(rows), -(-V // 32)), np.uint32)
    fill_masks(rows, masks_BW)
    mask_BV = np.asarray(jax.jit(unpack, static_argnums=1)(masks_BW, V))
    assert mask_BV.shape == (len(rows), V)
    assert mask_BV.dtype == bool
    for row, m in zip(mask_BV, rows, strict=True):
        np.testing.assert_array_equal(np.flatnonzero(row), np.arange(V) if m is None else allowed(m))


@pytest.mark.parametrize(
    ("limit", "message"), [("step_max_items", "Too many items"), ("max_items_in_row", "max is 20")]
)
def test_a_grammar_too_complex_ends_its_own_request_only(limit, message):
    """Whether it shows while a mask is made or while a token is taken in."""
    import llguidance

    tools, x = grammar_tokenizer(tokenizer(), V, EOS), tokenizer().token_to_id("x")
    grammar = Grammar.lark('start: a{0,50}\na: "x" | "x" "y" | "x" a')
    limits = llguidance.LLParserLimits(**{limit: 20})
    failing = Matcher(tools, llguidance.LLMatcher(tools.handle, grammar.text, log_level=0, limits=limits))
    other = matcher(Grammar.choice(["xy"]))
    masks_BW = np.zeros((2, -(-V // 32)), np.uint32)
    for _ in range(6):
        fill_masks([failing, other], masks_BW)
        failing.consume(x)
    fill_masks([failing, other], masks_BW)
    assert message in failing.error
    assert (failing.accepts_eos, failing.done) == (False, False)
    mask_BV = np.asarray(unpack(masks_BW, V))
    assert set(np.flatnonzero(mask_BV[0])) == set(EOS)
    assert set(np.flatnonzero(mask_BV[1])) == {x}
    assert failing.copy().error == failing.error
    failing.consume(EOS[0])
    if limit == "max_items_in_row":
        hasty = Matcher(tools, llguidance.LLMatcher(tools.handle, grammar.text, log_level=0, limits=limits))
        for _ in range(6):
            hasty.consume(x)
        assert message in hasty.error


@pytest.mark.parametrize("rest", ["a\na: a", "<[320]>", "A\nA: /y/ & /z/"])
def test_a_grammar_without_a_way_on_fails_where_it_ends(rest):
    m = matcher(Grammar.lark(f'start: "x" {rest}'))
    assert set(allowed(m)) == {tokenizer().token_to_id("x")}
    m.consume(tokenizer().token_to_id("x"))
    assert set(allowed(m)) == set(EOS)
    assert m.error == "no token can go on"


def test_masks_of_another_shape_are_refused():
    m = matcher(Grammar.json_object())
    for masks in (np.zeros((2, 11), np.uint32), np.zeros((1, 11), np.int32), np.zeros((1, 9), np.uint32)):
        with pytest.raises(ValueError, match="expected uint32"):
            fill_masks([m], masks)


def test_the_tokenizer_is_made_once():
    assert grammar_tokenizer(tokenizer(), V, EOS) is grammar_tokenizer(tokenizer(), V, EOS)
    with pytest.raises(ValueError, match="the model's vocab_size is 100"):
        GrammarTokenizer(tokenizer(), 100, EOS)
    for eos_ids in ((), (-1,), (V,)):
        with pytest.raises(ValueError, match="eos_ids"):
            GrammarTokenizer(tokenizer(), V, eos_ids)


def test_padding_and_truncation_do_not_matter():
    other = tiny_tokenizer()
    other.enable_padding(length=8)
    other.enable_truncation(2)
    m = grammar_tokenizer(other, V, EOS).matcher(Grammar.choice(["the lazy dog"]))
    for id in tokenizer().encode("the lazy dog", add_special_tokens=False).ids:
        m.consume(id)
    assert m.done
    assert other.padding is not None


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
