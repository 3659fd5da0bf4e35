"""Calls that are reported while they are written."""

import pytest
from replies import grown, whole

from lfm_jax.text.tools import END, START, CallCut, CallPiece, CallStart, Content, ToolCall, ToolCallParser


def test_a_call_is_told_of_as_it_is_written():
    parser = ToolCallParser(growing=True)
    for piece, events in [
        (f"Let me. {START}[get", [Content("Let me. ")]),
        ("_it", []),
        ('(city="', [CallStart(0, "get_it"), CallPiece(0, '{"city": "')]),
        ("Pa", [CallPiece(0, "Pa")]),
        ("ris\\", [CallPiece(0, "ris")]),
        ('n\\u00e9\\"', [CallPiece(0, '\\né\\"')]),
        ('"', []),  # Another literal would be part of it.
        (", n=[1", [CallPiece(0, '", "n": [')]),
        ("2, Tr", [CallPiece(0, "12, ")]),
        ("ue], o={'a': None, ", [CallPiece(0, 'true], "o": {"a": null')]),
        ("})", [CallPiece(0, "}}"), ToolCall("get_it", {"city": 'Paris\né"', "n": [12, True], "o": {"a": None}})]),
        (', {"name": "g-h"', []),
        (', "arguments": {"a": fal', [CallStart(1, "g-h"), CallPiece(1, '{"a": ')]),
        ("se}}", [CallPiece(1, "false}"), ToolCall("g-h", {"a": False})]),
        (f", p()]{END}", [CallStart(2, "p"), CallPiece(2, "{}"), ToolCall("p", {})]),
        (f"{START}q(a='b", [CallStart(3, "q"), CallPiece(3, '{"a": "b')]),
    ]:
        assert parser.push(piece) == events
    assert parser.finish(cut=True) == [CallCut(3)]
    assert parser.push(f"{START}q(") == [CallStart(0, "q"), CallPiece(0, "{")]  # Of the next reply.
    assert parser.finish() == [CallCut(0), Content(f"{START}q(")]


@pytest.mark.parametrize(
    ("call", "told"),
    [
        ("f(a=1, a=2)", ['{"a": 1']),
        ("f(a=1 b", ['{"a": 1']),
        ("f(a='\\N{DASH}')", ['{"a": "']),
        ("f(a={1: 2})", ['{"a": {']),
        ("f(a=1 if", ['{"a": 1']),
        (f"f(a='{END}')", ['{"a": "']),
    ],
)
def test_what_turns_out_to_be_no_call_is_cut(call, told):
    text = START + call
    order, pieces = grown(text)
    assert order == [*text]
    assert ["".join(each) for each in pieces] == told


@pytest.mark.parametrize(
    ("call", "told"),
    [
        ("f(a='x' 'y', b=(1, 2), c=0x10)", ['{"a": "xy", "b": [1, 2], "c": 16}']),
        ("f('x', 'y', c=1)", ['{"a": "x", "b": "y", "c": 1}']),
        ("f(a={'k': 1, 'l': 2, 'k': 3})", ['{"a": {"k": 1, "l": 2, "k": 3}}']),
        ("f(a={'k': 1, 'k': 3}, b=())", ['{"a": {"k": 1, "k": 3}, "b": ', '{"a": {"k": 3}, "b": []}']),
        ('{"arguments": {"a": 1}, "name": "f"}', ['{"a": 1}']),
        ('{"name": "f", "arguments": "{\\"a\\": 1}"}', ['{"a": 1}']),
        ('{"name": "f", "arguments": {"a": 1}, "id": "x"}', ['{"a": 1}']),
        ('{"name": "g", "arguments": {"a": 1}, "name": "f"}', ['{"a": 1}', '{"a": 1}']),
    ],
)
def test_unusual_calls_are_told_of_too(call, told):
    tools = [{"name": "f", "parameters": {"properties": {"a": {}, "b": {}}}}]
    text = START + call
    for pieces, expected in (([text], told[-1:]), (text, told)):
        order, found = grown(pieces, tools)
        assert order == whole([text], tools)
        assert isinstance(order[0], ToolCall)
        assert ["".join(each) for each in found] == expected
