"""Tool calls against Python's own parser, in any pieces, from any text."""

import ast
import gc
import json
import math
import re
import time
import warnings
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from replies import grown, pieces_of, whole

from lfm_jax.text.tools import (
    END,
    MAX_DEPTH,
    START,
    Content,
    ToolCall,
    ToolCallParser,
    parse_tool_calls,
    render_call,
    render_calls,
)

FORMS = {
    '[f(a="x", b=1), g()]': [("f", {"a": "x", "b": 1}), ("g", {})],
    "f(a=1)": [("f", {"a": 1})],
    "[f(),]": [("f", {})],
    "[]": [],
    "f(), g()": [("f", {}), ("g", {})],
    "f()\ng()": [("f", {}), ("g", {})],
    " \n[ f ( a = 1 ,\n\tb = 2 , ) , ]\n ": [("f", {"a": 1, "b": 2})],
    "[api.users.get(id=7)]": [("api.users.get", {"id": 7})],
    "[f(a=True, b=true, c=False, d=false, e=None, f=null)]": [
        ("f", {"a": True, "b": True, "c": False, "d": False, "e": None, "f": None})
    ],
    "[f(a=-1, b=+2, c=-.5, d=5., e=1e-3, g=-2E+5, h=1_000, i=0x1E, j=-0.0)]": [
        ("f", {"a": -1, "b": 2, "c": -0.5, "d": 5.0, "e": 0.001, "g": -2e5, "h": 1000, "i": 30, "j": -0.0})
    ],
    '[f(a=[1, [2, {"k": (3, "x"),}], ], b={}, c={\'p\': {"q": []}}, d=(), e=(1,), g=(1))]': [
        ("f", {"a": [1, [2, {"k": [3, "x"]}]], "b": {}, "c": {"p": {"q": []}}, "d": [], "e": [1], "g": 1})
    ],
    "[f(from=1, class='x', true=2, straße=3)]": [("f", {"from": 1, "class": "x", "true": 2, "straße": 3})],
    """[f(a='it"s', b="it's", c=')],([{', d="a, b=c", e='', g="")]""": [
        ("f", {"a": 'it"s', "b": "it's", "c": ")],([{", "d": "a, b=c", "e": "", "g": ""})
    ],
    r"""[f(a="\"q\" \\ \/ \n\t\r\b\f", b='\'q\' \x41 \101 \u00e9 \U0001f98a', c="\d+ \w", d="\\")]""": [
        ("f", {"a": '"q" \\ / \n\t\r\b\f', "b": "'q' A A é 🦊", "c": "\\d+ \\w", "d": "\\"})
    ],
    r'[f(a="\ud83e\udd8a", b="\ud83e!", c="\udd8a\ud83e")]': [("f", {"a": "🦊", "b": "\ufffd!", "c": "\ufffd\ufffd"})],
    '[f(a="line\nline", b="nul\0", c="a\\\nb")]': [("f", {"a": "line\nline", "b": "nul\0", "c": "ab"})],
    '[f(a="""x"y""z)\n\\"""", b=\'\'\'it\'s\'\'\', c="""""")]': [("f", {"a": 'x"y""z)\n"', "b": "it's", "c": ""})],
    "[f(a='x' \"y\"\n'''z''', b=('p' 'q'))]": [("f", {"a": "xyz", "b": "pq"})],
    '{"name": "f", "arguments": {"a": [1, true, null]}}': [("f", {"a": [1, True, None]})],
    '[{"name": "f", "parameters": {"a": -1.5e3}}, {"arguments": {}, "name": "g"}]': [("f", {"a": -1500.0}), ("g", {})],
    '{"id": "0", "type": "function", "name": "x-y z", "arguments": "{\\"k k\\": \\"\\\\n)\\"}"}': [
        ("x-y z", {"k k": "\n)"})
    ],
    '{"name": "f"}\n{"name": "g", "arguments": null}': [("f", {}), ("g", {})],
    '[{"name": "f", "arguments": {"a": 1}}, g(b=2)]': [("f", {"a": 1}), ("g", {"b": 2})],
}


@pytest.mark.parametrize("block", FORMS)
def test_every_form_of_a_call(block):
    calls = [ToolCall(name, arguments) for name, arguments in FORMS[block]]
    expected = ["a", "<", *calls, "\n", "b"]
    for pieces in ([f"a<{START}{block}{END}\nb"], f"a<{START}{block}{END}\nb"):
        found = whole(pieces)
        assert found == expected
        # Equality lets True pass for 1 and 1.0.
        assert repr(found) == repr(expected)
    if calls:
        assert whole([f"a{START}{block}"]) == ["a", *calls]  # No end marker.


NO_CALLS = [
    "", " ", "prose, with commas (and brackets).", "f", "f(", "f(a", "f(a=", "f(a=1", "[", "[,f()]", "[[f()]]",
    "(f())", "f)", "f(a=1]", "[f(a=(1]))", "f[a=1]", "f(1)", "f(a=1, 2)", "f(,)", "f(a=1,,b=2)", "f(a=1 b=2)", "f(a)",
    "f(*a)", "f(**{})", "f(a=1, a=1)", "f(a==1)", "f(a=1+1)", "f(a=g())", "f(a=x)", "f(a=x for x in y)",
    "f(a=1 if b else 2)", "f(a=lambda: 0)", "f(a=not True)", "f(a=Truex)", "f(a=-True)", "f(a=--1)", "f(a=(1 2))",
    "f(a=[1)", "f(a={1})", "f(a={1: 2})", "f(a={k: 2})", 'f(a={"k"})', 'f(a={"k": 1 "l": 2})', "f(a={**b})",
    "f(a=nan)", "f(a=NaN)", "f(a=Infinity)", "f(a=-inf)", "f(a=1e999)", "f(a=-1e999)", "f(a=1j)", "f(a=007)",
    "f(a=1__0)", "f(a=1.2.3)", "f(a=0x)", "f(a=٣)", "f(a=...)", "f(a=" + "9" * 5000 + ")",
    "f(a=0x" + "f" * 5000 + ")", 'f(a=b"x")', 'f(a=f"{x}")', 'f(a=r"x")', 'f(a="x)', "f(a='x\")", 'f(a="""x")',
    r'f(a="\x4")', r'f(a="\u12g4")', r'f(a="\U00110000")', r'f(a="\UFFFFFFFF")', r'f(a="\N{DASH}")', "1f(a=1)",
    "f.(a=1)", ".f(a=1)", "f..g()", "f-g(a=1)", "²(a=1)", "f(²=1)", "x = f()", "await f()", '"f"(a=1)', "{}",
    '{"name": 1, "arguments": {}}', '{"name": ""}', '{"arguments": {}}', '{"name": "f", "arguments": []}',
    '{"name": "f", "arguments": "[]"}', '{"name": "f", "arguments": "{"}', '{"name": "f", "arguments": "{} {}"}',
    '{"name": "f", "arguments": ""}', '{"name": "f", "arguments": {}, "parameters": {}}',
    '{"name": "f", "arguments": "{\\"a\\": \'\'\'b\'}"}', '{"name": "f", "unit": {}}',
    '{"name": "f", "arguments": {}', '{"name": "f" "arguments": {}}', '{"f", "g"}',
    '{"name": "f", "arguments": "' + "[" * 5000 + '"}', 'f(a="""', "f(a=" + "[" * 5000 + "]" * 5000 + ")",
]  # fmt: skip


@pytest.mark.parametrize("block", NO_CALLS)
def test_what_is_no_call_comes_back_as_content(block):
    for text in (f"a{START}{block}{END}b", f"a{START}{block}", f"a{START}{START}{block}{END}"):
        assert parse_tool_calls(text) == (text, [])
        assert whole(text) == list(text)
    # It does not spoil what comes after it.
    assert whole([f"{START}{block}{START}[f()]{END}"]) == [*f"{START}{block}", ToolCall("f", {})]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f"{START}[f(), ???, g()]{END}.", [ToolCall("f", {}), *f", ???, g()]{END}."]),
        (f"{START}[f(), g(a={END}.", [ToolCall("f", {}), *f", g(a={END}."]),
        (f"{START}[f(), g(1)]{END}", [ToolCall("f", {}), *f", g(1)]{END}"]),
        (f"{START}f().g(){END}", [ToolCall("f", {}), *f".g(){END}"]),
        (f"{START}[f()] so{END}", [ToolCall("f", {}), *f" so{END}"]),
        (f"{START}[f()]]{END}", [ToolCall("f", {}), *f"]{END}"]),
        (f"{START}[f()], [g()]{END}", [ToolCall("f", {}), *f", [g()]{END}"]),
        (f"{START}[f()]{END[:-1]}", [ToolCall("f", {}), *END[:-1]]),
        (f"{START}[f(), ", [ToolCall("f", {})]),
        (f"{START}[f(){START}g(){END}", [ToolCall("f", {}), ToolCall("g", {})]),
        (f"{START}f(a='{END}')", [*f"{START}f(a='{END}')"]),
        (f"{START}f(a='{START}f(){END}')", [*f"{START}f(a='", ToolCall("f", {}), *"')"]),
        (f"{END}f(){END}", [*f"{END}f(){END}"]),
        (f"{START[:-1]}f(){END}<|im_end|>", [*f"{START[:-1]}f(){END}<|im_end|>"]),
        ("a\ud83e\udd8a" + f"{START}f(a='\ud83e'){END}", [*"a\ufffd\ufffd", ToolCall("f", {"a": "\ufffd"})]),
    ],
)
def test_faults_after_a_call_and_markers_in_odd_places(text, expected):
    assert whole([text]) == whole(text) == expected
    content, calls = parse_tool_calls(text)
    assert [*content, *calls] == sorted(expected, key=lambda e: isinstance(e, ToolCall))


def test_events_come_as_soon_as_they_are_certain():
    parser = ToolCallParser()
    for piece, events in [
        ("Let me <", [Content("Let me ")]),
        ("b> <|tool_call_", [Content("<b> ")]),
        ("x <|tool_call_st", [Content("<|tool_call_x ")]),
        ("<|", [Content("<|tool_call_st")]),
        ("tool_call_start|>[f(a", []),
        ("='x)'", []),
        (")", [ToolCall("f", {"a": "x)"})]),
        (", g(b=(1, 2)), h(", [ToolCall("g", {"b": [1, 2]})]),
        (")]<|tool_call_end|", [ToolCall("h", {})]),
        (">then", [Content("then")]),
        (f"{START}[f(), ", [ToolCall("f", {})]),
        ("? and", [Content(", ? and")]),
        (f" so on{END}.{START}g(){END}.", [Content(f" so on{END}."), ToolCall("g", {}), Content(".")]),
        (f"{START}f) and", [Content(f"{START}f) and")]),
        (f"{START}f(a='", []),
    ]:
        assert parser.push(piece) == events
    assert parser.finish() == [Content(f"{START}f(a='")]
    # Nothing is left over for the next reply.
    assert parser.push("a') <") == [Content("a') ")]
    assert parser.finish() == [Content("<")]
    assert parser.finish() == []


@pytest.mark.parametrize("block", FORMS)
def test_of_a_reply_that_is_cut_the_calls_stay_and_what_was_begun_goes(block):
    text = f"a<{START}{block}{END}\nb<|tool_call_st"
    calls = [ToolCall(name, arguments) for name, arguments in FORMS[block]]
    start, end = text.index(START), text.index(END)
    for at in range(len(text) + 1):
        parser = ToolCallParser()
        events = [event for piece in text[:at] for event in parser.push(piece)] + parser.finish(cut=True)
        content = "".join(event.text for event in events if isinstance(event, Content))
        found = [event for event in events if isinstance(event, ToolCall)]
        assert [e for e in grown(text[:at], cut=True)[0] if isinstance(e, ToolCall)] == found
        assert found == calls[: len(found)]
        if start + len(START) <= at < end + len(END):  # Markers are tokens, which are not cut.
            assert content == "a<"
        elif at <= start or at >= end + len(END):
            assert content == text[:at] if at <= start else content == "a<" + text[end + len(END) : at]
            assert found == ([] if at <= start else calls)
        assert whole([f"b{START}[f()]{END}"]) == ["b", ToolCall("f", {})]  # And of what comes next everything.
        assert parser.push("b") == [Content("b")]


def test_what_was_no_call_before_the_cut_stays_content():
    parser = ToolCallParser()
    for text in (f"{START}?{END} and <|tool", f"{START}[f(1)", "<"):
        events = parser.push(text) + parser.finish(cut=True)
        assert "".join(event.text for event in events) == text


def replies_at_start(pieces):
    parser = ToolCallParser(at_start=True)
    return [e for piece in pieces for e in parser.push(piece)] + parser.finish()


@given(st.lists(st.sampled_from([START, END, "[f()]", "{", "<", START[:7], " ", "x"]), max_size=6), st.data())
def test_at_the_start_or_nowhere(parts, data):
    text = "".join(parts)
    for pieces in ([text], text, pieces_of(text, data)):
        found = replies_at_start(pieces)
        calls = [e for e in found if isinstance(e, ToolCall)]
        content = "".join(e.text for e in found if isinstance(e, Content))
        assert (content, calls) == (parse_tool_calls(text) if text.startswith(START) else (text, []))


def test_every_reply_has_its_own_start():
    parser = ToolCallParser(at_start=True)
    for text, events in ((f"a{START}[f()]", None), (f"{START}[f()]{END}", [ToolCall("f", {})]), (START[:5], None)) * 2:
        assert parser.push(text) + parser.finish() == (events or [Content(text)])


fragments = st.lists(
    st.sampled_from([
        START, END, START[:9], END[5:], "<|tool_call_", "<", "<|im_end|>", "[", "]", "(", ")", "{", "}", ",", ":",
        "=", ".", "-", "f", "g.h", "a=", "f(", "f()", "[f()", '[f(a="', '"', "'", '"""', "'''", "\\", "\\u", "ud83e",
        "\ud83e", "\udd8a", "\0", "1", "9" * 30, "1e9", "true", "None", "null", '"name"', '"arguments"',
        '{"name": "f", "arguments": {', " ", "\n", "é", "🦊", "f(a=1)", "f(a='x', b=[{}])", ", ",
    ]),
    max_size=25,
).map("".join)  # fmt: skip
anything = st.one_of(fragments, fragments.map(lambda t: START + t), st.text(max_size=30))


@settings(max_examples=400)
@given(anything, st.data())
def test_any_text_in_any_pieces_gives_what_the_whole_gives(text, data):
    found = whole([text])
    assert whole(pieces_of(text, data)) == whole(text) == found
    for pieces in (text, pieces_of(text, data)):
        assert repr(grown(pieces)[0]) == repr(found)
    content, calls = parse_tool_calls(text)
    assert content == "".join(e for e in found if isinstance(e, str))
    assert calls == [e for e in found if isinstance(e, ToolCall)]
    content.encode()
    json.dumps([[c.name, c.arguments] for c in calls], allow_nan=False, ensure_ascii=False).encode()
    # Content is the text with something left out, and that only in blocks with calls or empty lists.
    clean = re.sub("[\ud800-\udfff]", "\ufffd", text)
    left = iter(clean)
    assert all(c in left for c in content)
    assert content.startswith(clean.partition(START)[0])
    if not calls and not re.search(re.escape(START) + r"\s*\[\s*\]", clean):
        assert content == clean


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**40), 10**40)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
    | st.sampled_from([START, END, "<|", "<|im_end|>", "'", '"', "\\", "'''", '"""', ")", "\\ud83e", "\n", "\0", "🦊"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)
names = st.sampled_from(["f", "get_weather", "api.users.get", "straße", "if", "None", "ﬁ"])
keys = st.sampled_from(["a", "b", "location", "from", "true", "ß", "ﬁ", "_1"])
calls_of = st.builds(
    ToolCall,
    names | st.text(min_size=1, max_size=8),
    st.dictionaries(keys, values, max_size=4) | st.dictionaries(keys | st.text(max_size=5), values, max_size=3),
)


@settings(max_examples=150)
@given(st.lists(calls_of, max_size=4), st.data())
def test_rendered_calls_come_back(calls, data):
    text = render_calls(calls)
    assert (text.count("<|"), text.count(START), text.count(END)) == (2, 1, 1)
    text = f"before{text}after"
    assert parse_tool_calls(text) == ("beforeafter", calls)
    assert repr(parse_tool_calls(text)[1]) == repr(calls)  # True is not 1 there, nor 0.0 -0.0.
    assert whole(pieces_of(text, data)) == [*"before", *calls, *"after"]
    for pieces in ([text], pieces_of(text, data)):
        order, told = grown(pieces)
        assert order == [*"before", *calls, *"after"]
        assert ["".join(each) for each in told] == [json.dumps(c.arguments, ensure_ascii=False) for c in calls]
    for call in calls:
        assert parse_tool_calls(START + render_call(call)) == ("", [call])
        if render_call(call).startswith("{"):
            assert json.loads(render_call(call)) == {"name": call.name, "arguments": call.arguments}


def test_calls_are_written_as_lfm2_writes_them():
    call = ToolCall("api.get", {"a": 'x"\n', "b": [1, -2.5, None, (True,)], "from": {"k": False}})
    assert render_call(call) == r'''api.get(a="x\"\n", b=[1, -2.5, None, [True]], from={"k": False})'''
    assert render_calls([ToolCall("f", {"a": "<|im_end|>é"}), ToolCall("g", {})]) == (
        START + r'[f(a="<\u007cim_end|>é"), g()]' + END
    )
    assert render_call(ToolCall("f", {"a b": [None, True, 1]})) == (
        '{"name": "f", "arguments": {"a b": [null, true, 1]}}'
    )
    assert render_call(ToolCall("get-x", {})) == '{"name": "get-x", "arguments": {}}'


@pytest.mark.parametrize("name", ["get-weather", "mcp.server-1.do_it", "7zip", "-", "straße-1"])
def test_a_name_that_is_no_identifier_comes_back(name):
    calls = [ToolCall(name, {"city": 'Bern "<|x|>"', "now": True}), ToolCall("f", {"a": None}), ToolCall(name, {})]
    text = render_calls(calls)
    assert text.startswith(f'{START}[{{"name": "{name}", "arguments": {{"city": ')
    assert text.endswith(f', f(a=None), {{"name": "{name}", "arguments": {{}}}}]{END}')
    assert parse_tool_calls(text, [{"name": name}, {"name": "f"}]) == ("", calls)
    assert whole([text]) == whole(text) == calls


def nested(depth):
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("key", ["a", "a b"])
def test_as_deep_as_can_be_written_can_be_read(key):
    deep = MAX_DEPTH - (key == "a b") * 2
    calls = [ToolCall("f", {key: nested(deep)})]
    assert parse_tool_calls(render_calls(calls)) == ("", calls)
    with pytest.raises(ValueError, match=f"nested at most {MAX_DEPTH} deep"):
        render_call(ToolCall("f", {key: nested(deep + 1)}))
    text = render_calls(calls).replace("1]", "[1]]")
    assert parse_tool_calls(text) == (text, [])


@pytest.mark.parametrize("value", [math.nan, -math.inf, b"x", {1}, 1j, {1: 2}, object(), [10**5000], [[{"a": b""}]]])
@pytest.mark.parametrize("key", ["a", "a b"])
def test_what_json_has_not_is_not_written(value, key):
    with pytest.raises(ValueError, match=r"JSON|limit"):
        render_call(ToolCall("f", {key: value}))


def test_a_call_without_a_name_is_not_written():
    with pytest.raises(ValueError, match="name"):
        render_calls([ToolCall("", {})])


def plain(value):
    """Tuples as lists, and only what JSON has."""
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, dict) and all(isinstance(k, str) for k in value):
        return {k: plain(v) for k, v in value.items()}
    if value is None or isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise ValueError(value)


def python_calls(source):
    """What Python makes of a list of calls with literals as arguments; None for anything else."""
    try:
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(source, mode="eval").body
        assert isinstance(tree, ast.List)
        assert all(isinstance(e, ast.Call) and isinstance(e.func, ast.Name) and not e.args for e in tree.elts)
        return [ToolCall(e.func.id, {k.arg: plain(ast.literal_eval(k.value)) for k in e.keywords}) for e in tree.elts]
    except (SyntaxError, ValueError, AssertionError, TypeError):
        return None


literals = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-1000, 1000)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8", exclude_characters="/#"), max_size=6)
    | st.text("'\"\\x1\n", max_size=6)
    | st.binary(max_size=1),
    lambda inner: (
        st.lists(inner, max_size=3) | st.tuples(inner) | st.dictionaries(st.text("ab'", max_size=2), inner, max_size=2)
    ),
    max_leaves=6,
)
sources = st.lists(st.dictionaries(st.sampled_from("abc"), literals, max_size=3), max_size=3).map(
    lambda calls: ", ".join(f"f({', '.join(f'{k}={v!r}' for k, v in call.items())})" for call in calls)
)


@settings(max_examples=500)
@given(sources, st.lists(st.tuples(st.integers(0, 999), st.sampled_from(["", *"()[]{}\"'\\,:=.- ab1e_"])), max_size=2))
@example("f(a='x''y\"', b='')", [])
@example("f(a='''''')", [(6, "'")])
def test_python_agrees_about_its_own_literals(source, changes):
    for at, c in changes:  # Put a character somewhere, or take one away.
        at %= len(source) + 1
        source = source[:at] + c + source[at + (not c) :]
    source = f"[{source}]"
    expected = python_calls(source)
    content, calls = parse_tool_calls(START + source + END)
    assert repr(grown(START + source + END)[0]) == repr([*calls, *content])
    if expected is not None:
        assert (content, repr(calls)) == ("", repr(expected))
    else:  # The calls before the fault, and everything from there on.
        consumed = (START + source + END).removesuffix(content)
        assert content.endswith(END)
        assert bool(consumed) == bool(calls) or source.replace(" ", "").startswith("[]")
        assert parse_tool_calls(consumed) == ("", calls)


some_calls = st.lists(calls_of, min_size=1, max_size=2)


def faulty(calls, fault):
    return render_calls(calls).removesuffix("]" + END) + fault + END, [*calls, *fault.removeprefix("]"), *END]


segments = st.one_of(
    st.text("ab <|\n", max_size=6).map(lambda t: (t, [*t])),
    some_calls.map(lambda calls: (render_calls(calls), calls)),
    some_calls.map(lambda calls: (START + "\n".join(map(render_call, calls)) + END, calls)),
    st.builds(faulty, some_calls, st.sampled_from([", ?", ", f(", ",,", "])", ")", ', g(a="', "] so"])),
    st.sampled_from(["?", "[", "f(1)", "f(a=", "{}"]).map(lambda t: (START + t + END, [*START, *t, *END])),
)


@settings(max_examples=100)
@given(st.lists(segments, max_size=6), st.data())
def test_every_character_is_content_or_part_of_a_call(parts, data):
    text = "".join(t for t, _ in parts)
    expected = [e for _, events in parts for e in events]
    assert whole([text]) == whole(pieces_of(text, data)) == expected


N = 60_000
LONG = {
    "string": lambda n: "[f(a='" + "x" * n + "')]",
    "escapes": lambda n: "[f(a='" + "\\n" * n + "')]",
    "backslashes": lambda n: "[f(a='" + "\\" * n,
    "strings": lambda n: "[f(a=" + "'x' " * (n // 2) + ")]",
    "quotes": lambda n: "f(a=" + '"' * n,
    "lists": lambda n: "[" * n,
    "open": lambda n: "f(a=" + "[" * n + "]" * n + ")",
    "brackets": lambda n: "f(a=" + "(" * n + ")" * n + ")",
    "dicts": lambda n: 'f(a={"a":' * (n // 8),
    "blanks": lambda n: "f(" + " " * n + "a=1",
    "name": lambda n: "a" * n + "(a=1)",
    "dots": lambda n: "a." * n + "(",
    "keyword": lambda n: "f(" + "a" * n + ")",
    "digits": lambda n: "f(a=" + "1" * n + ")",
    "fraction": lambda n: "f(a=0." + "1" * n + ")",
    "hexadecimal": lambda n: "f(a=0x" + "1" * n + ")",
    "calls": lambda n: "[" + "f()," * (n // 4),
    "items": lambda n: "f(a=[" + "1," * (n // 8) + "])",
    "names": lambda n: r"f(a='" + r"\N{" * n + "')",
    "starts": lambda n: (START + "?") * (n // 8),
    "angles": lambda n: "<" * n,
    "commas": lambda n: "f()" + "," * n,
}


@pytest.mark.parametrize(
    ("form", "growing"), [*((form, False) for form in LONG), *((form, True) for form in ("escapes", "digits", "items"))]
)
def test_time_is_linear_in_the_text_and_in_the_number_of_pieces(form, growing):
    def seconds(n, size):
        text = START + LONG[form](n)
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        parser = ToolCallParser(growing=growing)
        start = time.process_time()
        for piece in pieces:
            parser.push(piece)
        parser.finish()
        return time.process_time() - start

    # Sixteen times the text would take 256 times as long if time were quadratic: at every try, whatever else disturbs
    # one. Not so the collector, which goes over all that other tests left.
    gc.disable()
    try:
        for size in (3, 10**9):
            short = max(min(seconds(N // 16, size) for _ in range(3)), 0.002)
            assert any(seconds(N, size) < 64 * short for _ in range(5))
    finally:
        gc.enable()


def test_a_megabyte_in_one_argument():
    text = "x)'\n" * 250_000
    assert parse_tool_calls(render_calls([ToolCall("f", {"a": text})])) == ("", [ToolCall("f", {"a": text})])


SCHEMA = {
    "name": "f",
    "parameters": {"type": "object", "properties": {"b": {"type": "string"}, "a": {"type": "integer"}}},
}


@pytest.mark.parametrize(
    ("block", "arguments"),
    [
        ("f('x')", {"b": "x"}),
        ("f('x', 1)", {"b": "x", "a": 1}),
        ("f('x', a=1)", {"b": "x", "a": 1}),
        ("f(a=1, b='x')", {"a": 1, "b": "x"}),
        ("f(c=1)", {"c": 1}),
        ("f('x', 1, 2)", None),
        ("f('x', b=1)", None),
        ("f(b='x', 1)", None),
        ("f(a=1, 'x')", None),
        ("g('x')", None),
    ],
)
def test_positional_arguments_get_the_names_of_the_schema(block, arguments):
    text = START + block + END
    expected = (text, []) if arguments is None else ("", [ToolCall("f", arguments)])
    assert parse_tool_calls(text, [SCHEMA, {"name": "h"}]) == expected


def test_positional_arguments_of_a_function():
    def f(city: str, days: int = 1) -> None: ...

    assert parse_tool_calls(f"{START}[f('Bern', 3)]{END}", [f]) == ("", [ToolCall("f", {"city": "Bern", "days": 3})])
    with pytest.raises(ValueError, match="tools are not valid"):
        ToolCallParser([f, f])


@pytest.mark.parametrize("word", ["मौसम", "e\u0301cole", "a·b", "größe", "x"])
def test_words_of_any_script_come_back(word):
    for call in (ToolCall(word, {"a": 1}), ToolCall("f", {word: 1})):
        assert parse_tool_calls(render_calls([call])) == ("", [call])
