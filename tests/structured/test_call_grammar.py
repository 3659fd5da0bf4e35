"""Random calls fit their tools and read back; what calls cannot have is refused."""

import ast
import json

import pytest
from grammars import (
    END,
    EOS,
    PING,
    PLANT,
    SMALL,
    START,
    TOOLS,
    WEATHER,
    accepts,
    allowed,
    faults,
    matcher,
    samples,
    tokenizer,
)

from lfm_jax.structured.grammar import MAX_CALLS, Grammar
from lfm_jax.structured.json_schema import GrammarError
from lfm_jax.text.tools import Content, ToolCall, ToolCallParser, parse_tool_calls, render_calls

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


@pytest.mark.parametrize("name", ["get-weather", "mcp.server-1.do_it", "7zip", "-", "straße-1"])
def test_a_tool_whose_name_is_no_identifier_is_called_by_that_name(name):
    tools = [WEATHER | {"name": name}, PING]
    blocks = samples(Grammar.tool_calls(tools, required=True, bounds=SMALL), 40)
    seen = set()
    for block in filter(None, blocks):
        content, calls = parse_tool_calls(block, tools)
        assert content == ""
        for call in calls:
            seen.add(call.name)
            assert faults(WEATHER["parameters"] if call.name == name else {"maxProperties": 0}, call.arguments) == []
    assert seen == {name, "ping"}
    grammar = Grammar.tool_calls([*tools, {"name": "a-b"}], name="a-b", parallel=False)
    assert set(samples(grammar, 3)) == {render_calls([ToolCall("a-b", {})])}
    call = ToolCall(name, {"city": "Bern", "unit": True, "days": 2})
    assert accepts(Grammar.tool_calls(tools), render_calls([call, ToolCall("ping", {})]))
    assert not accepts(Grammar.tool_calls(tools), f'{START}[{name}(city="Bern", unit=True, days=2)]{END}')


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
def test_parameters_that_calls_cannot_have_are_refused_of_a_strict_tool(schema, message):
    with pytest.raises(GrammarError, match=f"tool 'f': parameters.*{message}"):
        Grammar.tool_calls([
            {"name": "f", "parameters": {"type": "object", "properties": {"x": schema}}, "strict": True}])


ANSWER = {"type": "object", "required": ["text", "done"], "additionalProperties": False, "properties": {
    "text": {"type": "string", "maxLength": 60}, "done": {"type": "boolean"}}}


def test_calls_or_an_answer_that_fits():
    grammar = Grammar.tool_calls(TOOLS, answer=ANSWER, bounds=SMALL)
    m = matcher(grammar)
    assert not m.accepts_eos
    assert {"{", START} == {tokenizer().id_to_token(i) for i in allowed(m)}
    kinds = set()
    for text in filter(None, samples(grammar, 60)):
        kinds.add(text.startswith(START))
        if text.startswith(START):
            assert_fits(text)
        else:
            assert faults(ANSWER, json.loads(text)) == []
    assert kinds == {True, False}
    call = f"{START}[ping(), ping()]{END}"
    assert accepts(grammar, call)
    answer = '{"text": "a", "done": true}'
    assert accepts(grammar, answer)
    for text in ("", "a", answer + call, call + answer, '{"text": "a"}'):
        assert not accepts(grammar, text)
    assert not accepts(Grammar.tool_calls(TOOLS, answer=ANSWER, parallel=False), call)


def test_the_letters_of_a_marker_in_an_answer_are_no_call():
    grammar = Grammar.tool_calls([PING], answer=ANSWER)
    m, text = matcher(grammar), json.dumps({"text": f"{START}[ping()]{END}", "done": True})
    ids = [i for c in text for i in tokenizer().encode(c, add_special_tokens=False).ids]
    for i in ids:
        m.consume(i)
    assert m.done
    parser = ToolCallParser([PING], at_start=True)
    assert parser.push(text) + parser.finish() == [Content(text)]


def test_an_answer_is_checked_and_needed_calls_leave_no_room_for_it():
    for options in ({"required": True}, {"name": "ping"}):
        plain, with_answer = (Grammar.tool_calls(TOOLS, **options, **more) for more in ({}, {"answer": ANSWER}))
        assert plain == with_answer
    with pytest.raises(GrammarError, match="the JSON schema is refused"):
        Grammar.tool_calls([PING], answer={"not": {}})
    assert accepts(Grammar.tool_calls([PING], answer=True), '["{}"]')


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"type": "array", "items": {"type": "null"}, "maxItems": 1}, ([], [None]), ([None, None],)),
        ({"type": "array", "items": {"type": "null"}, "minItems": 1, "maxItems": 1}, ([None],), ([], [None, None])),
        ({"type": "array", "maxItems": 0}, ([],), ([None],)),
        ({"type": "object", "additionalProperties": {"type": "null"}, "maxProperties": 1},
         ({}, {"a": None}), ({"a": None, "b": None},)),
        ({"type": "object", "required": ["z"]}, ({"z": [1]},), ({}, {"y": 1})),
        ({"type": "object", "required": ["z"], "additionalProperties": {"type": "null"}},
         ({"z": None},), ({}, {"z": 1})),
    ],
)  # fmt: skip
def test_few_items_and_keys_that_are_required_only(schema, good, bad):
    parameters = {"type": "object", "properties": {"x": schema}, "required": ["x"]}
    grammar = Grammar.tool_calls([{"name": "f", "parameters": parameters, "strict": True}], required=True)
    for value in good:
        assert accepts(grammar, render_calls([ToolCall("f", {"x": value})]))
    for value in bad:
        assert not accepts(grammar, render_calls([ToolCall("f", {"x": value})]))
