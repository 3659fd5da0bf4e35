"""Chats in files: what is read, and that every bad line is named with its file and number, all in one error."""

import gzip
import json
import lzma
import re

import pytest
from chats import drawn, turns, write

from lfm_jax.data.chats import OPENERS, read_chats
from lfm_jax.data.sources import find_files


def read(*paths, ignore=("id",)):
    problems = []
    chats = read_chats(find_files(map(str, paths), suffixes=tuple(OPENERS)), ignore, problems)
    return chats, problems


def call(arguments, **more):
    return {"id": "a", "type": "function", "function": {"name": "f", "arguments": arguments}} | more


def asks(*calls):
    return [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": list(calls)}]


ANSWER = {"role": "tool", "tool_call_id": "a", "content": "1"}


def test_messages_are_read_as_templates_take_them(tmp_path):
    record = {"id": 7, "tools": [{"name": "f"}], "messages": [
        {"role": "system", "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "brief"}]},
        *asks(call('{"x": 1}'), call({"y": [2]}, id="b")), ANSWER, ANSWER | {"tool_call_id": "b"},
        {"role": "assistant", "content": "two", "reasoning_content": "hm"}]}
    [chat], problems = read(write(tmp_path / "a.jsonl", [record]))
    assert not problems
    assert chat.tools == [{"name": "f"}]
    assert chat.messages[0]["content"] == "be brief"
    assert [c["function"]["arguments"] for c in chat.messages[2]["tool_calls"]] == [{"x": 1}, {"y": [2]}]
    assert "content" not in chat.messages[2], "what is null is not there"
    assert str(chat) == f"{tmp_path / 'a.jsonl'}, line 1"


def test_prompt_and_completion_are_texts_or_messages(tmp_path):
    path = write(tmp_path / "a.jsonl", [
        {"prompt": "q", "completion": "a"},
        {"prompt": turns("q", "a", "r")["messages"], "completion": [{"role": "assistant", "content": "b"}]}])
    chats, problems = read(path)
    assert not problems
    assert [chat.messages for chat in chats] == [turns("q", "a")["messages"], turns("q", "a", "r", "b")["messages"]]
    assert [chat.prompt for chat in chats] == [1, 3]


def test_files_lie_in_directories_packed_or_not(tmp_path):
    records = drawn(3)
    lines = [json.dumps(record).encode() + b"\n" for record in records]
    (tmp_path / "data").mkdir()
    (tmp_path / "README.md").write_text("not a chat")
    (tmp_path / "data" / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines[0] + b"\n")
    (tmp_path / "data" / "b.jsonl.gz").write_bytes(gzip.compress(lines[1]))
    (tmp_path / "data" / "c.jsonl.xz").write_bytes(lzma.compress(lines[2]))
    chats, problems = read(tmp_path)
    assert not problems
    assert [len(chat.messages) for chat in chats] == [len(record["messages"]) for record in records]
    with pytest.raises(ValueError, match=r"type not known; expected one of .jsonl, .jsonl.gz, .jsonl.xz"):
        read(tmp_path / "README.md")


BAD = {
    '{"messages": [': "not JSON",
    '"hi"': "expected an object, such as one with messages",
    '{"text": "hi"}': "its keys are 'text'; expected messages, or prompt and completion",
    '{"prompt": "hi"}': "expected messages, or prompt and completion",
    '{"messages": [], "tools": []}': r"messages is \[\]; expected a list of messages",
    json.dumps(turns("q", "a") | {"source": "web"}): r"'source' is not known.*data.ignore",
    json.dumps(turns("q")): "no message of the assistant",
    json.dumps({"prompt": turns("q", "a")["messages"], "completion": [{"role": "user", "content": "b"}]}):
        "completion begins with the role user",
    json.dumps({"messages": [*turns("q", "a")["messages"], {"role": "system", "content": "s"}]}):
        "message 2 has the role system; only the first one may",
    json.dumps({"messages": [*turns("q", "a")["messages"], {"role": "assistant", "content": "b"}]}):
        "message 2 is of the assistant, and so is the one before it",
    json.dumps({"messages": [*turns("q", "a")["messages"], ANSWER]}): "no call of the assistant is left",
    json.dumps({"messages": [*asks(call({})), ANSWER | {"tool_call_id": "z"}]}):
        r"'z'; the calls before it are \['a'\]",
    json.dumps({"messages": [*asks(call({})), {"role": "user", "content": "r"}]}): "have no answer of a tool yet",
    json.dumps({"messages": [{"role": "robot", "content": "q"}]}): r'messages\[0\]: its role is "robot"',
    json.dumps({"messages": [{"role": "user", "content": 1}]}): "its content is 1; expected a text",
    json.dumps({"messages": [{"role": "user"}]}): "it has no content",
    json.dumps({"messages": [{"role": "user", "content": "q", "tool_call": {}}]}):
        "'tool_call' is not known; the nearest is 'tool_calls'",
    json.dumps({"messages": asks(call("{x}"))}): r"messages\[1\]: the arguments of its call of 'f' are no JSON: ",
    json.dumps({"messages": asks(call("[1]"))}): "are no JSON object",
    json.dumps({"messages": asks({"name": "f", "arguments": {}})}): "its call is",
    json.dumps(turns("q", "a") | {"tools": [{"type": "function"}]}): "a tool is",
    json.dumps(turns("\ud800", "a")): "half a surrogate pair",
}


def test_every_bad_line_is_named(tmp_path):
    good = json.dumps(turns("q", "a"))
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join(f"{good}\n\n{line}" for line in BAD))
    (tmp_path / "latin.jsonl").write_bytes(b'{"messages": "caf\xe9"}')
    (tmp_path / "torn.jsonl.gz").write_bytes(gzip.compress(good.encode() * 50)[:-9])
    chats, problems = read(path, tmp_path / "latin.jsonl", tmp_path / "torn.jsonl.gz")
    assert len(chats) == len(BAD)
    assert len(problems) == len(BAD) + 2
    for i, (problem, says) in enumerate(zip(problems, BAD.values(), strict=False)):
        assert problem.startswith(f"{path}, line {3 * i + 3}: ")
        assert re.search(says, problem), problem
    assert problems[-2].startswith(f"{tmp_path / 'latin.jsonl'}, line 1: not UTF-8 (byte 0xe9)")
    assert problems[-1].startswith(f"{tmp_path / 'torn.jsonl.gz'}: cannot be read")
