"""Tool calls of chats in `lfm eval`, with replies that are given; errors by chat."""

import json
import math
import re

import numpy as np
import pytest
from chats import write
from running import run

from lfm_jax.eval import benchmarks, lm
from lfm_jax.eval import compare as comparing
from lfm_jax.eval.benchmarks.tool_calls import _argument_values, _fault
from lfm_jax.eval.shares import share, share_error
from lfm_jax.text.tools import ToolCall

TOOLS = [
    {"name": "book", "parameters": {"type": "object", "required": ["city"], "properties": {
        "city": {"type": "string"}, "seats": {"type": "number"}, "quiet": {"type": "boolean"}}}},
    {"type": "function", "function": {"name": "cancel"}},
]


def calls(*given):
    return [{"id": str(i), "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
            for i, (name, arguments) in enumerate(given)]


def chat(question, *given, tools=TOOLS):
    """Asks back once, calls, gets answers of the tools, and says so."""
    return {"id": question, "tools": tools, "messages": [
        {"role": "user", "content": question},
        {"role": "assistant", "content": "Where?"},
        {"role": "user", "content": "There."},
        {"role": "assistant", "tool_calls": calls(*given)},
        *({"role": "tool", "tool_call_id": str(i), "content": "done"} for i in range(len(given))),
        {"role": "assistant", "content": "It is done."}]}


CHATS = [
    chat("First", ("book", {"city": "Oslo", "seats": 2})),
    chat("Second", ("cancel", {}), ("book", {"city": "Rom", "quiet": True})),
    chat("Third", ("book", {"city": "Bonn"})),
    {"tools": TOOLS, "messages": [{"role": "user", "content": "Fourth"}, {"role": "assistant", "content": "Hello."}]},
    {"messages": [{"role": "user", "content": "No tools"}, {"role": "assistant", "content": "None."}]},
]
EXACT = {
    "First": "<|tool_call_start|>[book(seats=2.0, city='Oslo')]<|tool_call_end|>",
    "Second": '<|tool_call_start|>[book(city="Rom", quiet=true), cancel()]<|tool_call_end|>Both.',
    "Third": '<|tool_call_start|>[{"name": "book", "arguments": {"city": "Bonn"}}]<|tool_call_end|>',
}


@pytest.fixture
def evaluate(directory, tmp_path, monkeypatch, loaded):
    """Runs an evaluation in which the model says what `say` gives for a question and the last turn's role."""
    (tmp_path / "data" / "tool_calls").mkdir(parents=True)
    write(tmp_path / "data" / "tool_calls" / "own.jsonl", CHATS)
    write(tmp_path / "data" / "tool_calls" / "one.jsonl", CHATS[:1])

    def make(say, *args, output="out", tasks="tool_calls_own"):
        def scripted(model, tokenizer, wanted, *_):
            for i, task in enumerate(wanted):
                prompt = tokenizer.decode(task.prompt, skip_special_tokens=False)
                asked.append((task, prompt))
                kind = {"There.": "call", "done": "after"}.get(prompt.split("<|im_end|>")[-2].split("\n")[-1], "start")
                yield i, say(next(word for word in ("First", "Second", "Third", "Fourth") if word in prompt), kind)

        asked = []
        monkeypatch.setattr(lm, "run", scripted)
        assert run("eval", directory, "--tasks", tasks, "--output", tmp_path / output, "--data", tmp_path / "data",
                   "--apply-chat-template", "--max-length", "3000", *args) == 0
        results = json.loads((tmp_path / output / "results.json").read_text())
        return results["results"], (tmp_path / output / "report.md").read_text(), asked

    return make


def scores(found):
    return [found[f"{name},none"] for name in ("called", "valid", "exact", "argument_values", "refrained")]


def test_calls_of_the_reference_are_right(evaluate):
    """Also in another order of calls and keys, with 2.0 for 2, and as JSON."""
    results, page, asked = evaluate(lambda which, kind: EXACT[which] if kind == "call" else "Hello.")
    found = results["tool_calls_own"]
    assert scores(found) == [1, 1, 1, 1, 1]
    assert found["turns,none"] == {"with calls (called, valid, exact)": 3, "without (refrained)": 4}
    assert found["errors,none"] == {}
    assert found["exact_stderr,none"] == 0
    assert "| tool_calls_own | turns | without (refrained) | 4 |" in page
    assert not any(task.skip_special_tokens or task.grammar for task, _ in asked)
    _, prompt = next(each for each in asked if "First" in each[1] and each[1].rstrip().endswith("assistant"))
    assert json.dumps(TOOLS) in prompt


def test_calls_that_are_wrong(evaluate):
    wrong = {"First": "book(city='Oslo', seats='2')", "Second": "cancel()", "Third": "book(city='Bonn', wine=1)"}

    def say(which, kind):
        if which == "Fourth":
            return "<|tool_call_start|>[cancel()]<|tool_call_end|>"
        return f"<|tool_call_start|>[{wrong[which]}]<|tool_call_end|>" if kind == "call" else "Hello."

    results, page, _ = evaluate(say)
    assert scores(results["tool_calls_own"]) == [1, 1 / 3, 0, 2 / 3, 3 / 4]  # seats is "2"; nothing of Rom is asked.
    assert results["tool_calls_own"]["errors,none"] == {
        "arguments do not fit the schema": 2, "called other tools": 1, "called, and the reference does not": 1}
    assert "| tool_calls_own | 1 | 0 | 7 | none | refrained ↑ | 0.7500 | 0.2500 |" in page
    wrong |= {"First": "book(city='Oslo', seats=3)", "Second": "cancel(), book(city='Rom', quiet=1)",
              "Third": "look(city='Bonn')"}
    results, _, _ = evaluate(say, output="more")
    assert scores(results["tool_calls_own"]) == [1, 1 / 3, 0, 2 / 4, 3 / 4]
    assert results["tool_calls_own"]["errors,none"] == {
        "other values of arguments": 1, "arguments do not fit the schema": 1, "called a tool that is not offered": 1,
        "called, and the reference does not": 1}


@pytest.mark.parametrize(("schema", "valid"), [
    ({"properties": {"a": {}}}, False),
    ({"properties": {"a": {}}, "$schema": "http://json-schema.org/draft-07/schema#"}, False),
    ({}, False),
    ({"properties": {"a": {}}, "additionalProperties": {"type": "number"}}, True),
    ({"properties": {"a": {}}, "patternProperties": {"^inv": {}}}, True),
    ({"properties": {"a": {}}, "allOf": [{"properties": {"invented": {}}}]}, True),
    ({"properties": {"a": {}}, "allOf": [{"properties": {"b": {}}}]}, False),
])
def test_invented_arguments(schema, valid):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", **schema}}}]
    fault = _fault([ToolCall("f", {"a": 1, "invented": 2})], tools, problems := [])
    assert fault == (None if valid else "arguments do not fit the schema")
    assert problems == []


def test_arguments_of_the_tools_that_are_called():
    """Of several calls of a tool each goes with the nearest, so that their order is free."""
    def call(name, **arguments):
        return ToolCall(name, arguments)

    a, b, more = call("f", x=1), call("f", x=1, y=2), call("f", x=1, y=2, z=None)
    assert _argument_values([b, a], [a, b]) == _argument_values([a, b], [a, b]) == (3, 3)
    assert _argument_values([a], [a, b]) == (1, 1)
    assert _argument_values([a], [b]) == (1, 2)
    assert _argument_values([more], [b]) == (2, 2)  # What is invented is seen by `valid` and `exact`.
    assert _argument_values([call("f", x=True), call("g")], [a]) == (0, 1)
    assert _argument_values([call("f", x=1.0)], [a]) == (1, 1)
    assert _argument_values([call("g", x=1)], [a]) == _argument_values([], [a]) == (0, 0)


def test_files_are_tasks_and_earlier_turns_are_written(evaluate, tmp_path, directory):
    results, page, asked = evaluate(lambda which, kind: "I do not call.", "--constrained", tasks="tool_calls")
    assert results.keys() == {"tool_calls_one", "tool_calls_own"}
    assert scores(results["tool_calls_own"]) == [0, 0, 0, "N/A", 1]
    assert results["tool_calls_own"]["errors,none"] == {"called nothing, and the reference does": 3}
    assert results["tool_calls_one"]["exact_stderr,none"] == "N/A"  # Of one chat.
    assert "| tool_calls_one | 1 | 0 | 2 | none | exact ↑ | 0.0000 |  |" in page
    assert all(task.grammar == {"tools": TOOLS} for task, _ in asked)
    later = [prompt for _, prompt in asked if "done" in prompt]
    # The template of the model does not name calls.
    assert later
    assert all("<|tool_call_start|>[" in prompt for prompt in later)
    results, page, _ = evaluate(lambda which, kind: "", "--limit", "1", output="limited")
    assert scores(results["tool_calls_own"]) == ["N/A", "N/A", "N/A", "N/A", 1]
    assert "| refrained ↑ | 1.0000 |" in page
    assert "called" not in page.partition("## Counted")[0]
    out = tmp_path / "out"
    assert run("eval", "compare", out, out) == 0
    assert run("eval", directory, "--tasks", "tool_calls", "--output", tmp_path / "parts", "--data", tmp_path / "data",
               "--apply-chat-template", "--max-length", "3000", "--shard", "0/2") == 0
    assert (tmp_path / "parts" / "answers-0-of-2.jsonl").read_text()


def test_as_many_turns_without_calls_are_drawn(tmp_path):
    turns = [message for i in range(4) for message in (
        {"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "Yes."})]
    called = chat("x", ("cancel", {}))
    called["messages"] = turns + called["messages"]
    (tmp_path / "tool_calls").mkdir()
    write(tmp_path / "tool_calls" / "own.jsonl", [called, {"prompt": turns[:-1], "completion": "No.", "tools": TOOLS}])
    [task] = benchmarks.load(["tool_calls_own"], tmp_path)
    docs = task.test_docs()
    # Nothing of a prompt is asked.
    assert [(doc["chat"], len(doc["calls"])) for doc in docs] == [(1, 0), (1, 1), (2, 0)]
    assert [doc["turn"] for doc in docs][1:] == [11, 7]
    assert docs[0]["messages"] == called["messages"][: docs[0]["turn"]]
    assert [doc["turn"] for doc in benchmarks.load(["tool_calls"], tmp_path)[0].test_docs()] == [
        doc["turn"] for doc in docs]


@pytest.mark.parametrize(("line", "message"), [
    ({"messages": [{"role": "robot", "content": ""}]}, 'line 2: messages[0]: its role is "robot"'),
    (chat("x", ("cancel", {}), tools=None), "line 2: message 3 calls a tool, and the chat offers none"),
    (chat("x", ("cancel", {}), tools=[TOOLS[1], TOOLS[1]]), "another tool has the name 'cancel'"),
    (chat("x", ("f", {}), tools=[{"name": "f", "parameters": {"properties": {"x": {"type": "dict"}}}}]),
     "line 2: the parameters of the tool 'f' are no JSON schema: 'dict' is not valid"),
])
def test_lines_that_cannot_be_used(line, message, tmp_path):
    (tmp_path / "tool_calls").mkdir()
    write(tmp_path / "tool_calls" / "own.jsonl", [CHATS[0], line])
    with pytest.raises(ValueError, match=re.escape(message)):
        benchmarks.load(["tool_calls_own"], tmp_path)


def test_data_that_are_missing(tmp_path):
    with pytest.raises(ValueError, match=r"into DIR/tool_calls/NAME.jsonl and add --data DIR"):
        benchmarks.load(["tool_calls"])
    (tmp_path / "tool_calls").mkdir()
    with pytest.raises(ValueError, match=r"takes them into .*/tool_calls/NAME.jsonl; each file is a task"):
        benchmarks.load(["tool_calls"], tmp_path)
    write(tmp_path / "tool_calls" / "own.jsonl", CHATS[-1:])
    with pytest.raises(ValueError, match="there is no file of chats for tool_calls_other; there are tool_calls_own"):
        benchmarks.load(["tool_calls_other"], tmp_path)
    with pytest.raises(ValueError, match=r"own\.jsonl has nothing to ask: no chat has tools"):
        benchmarks.load(["tool_calls_own"], tmp_path)


def test_errors_are_by_chat():
    """Against sums of squares written out, and what lm-eval has where every document is a chat."""
    draw = np.random.default_rng(0)
    right, by_chat = draw.integers(0, 2, 40).astype(float), draw.integers(0, 9, 40)
    parts = [[x, 1, int(c)] for x, c in zip(right, by_chat, strict=True)] + [[0.0, 0, 99]]
    mean = right.mean()
    residuals = [(right[by_chat == c] - mean).sum() for c in range(9)]
    assert share(parts) == pytest.approx(mean)
    assert share_error(parts) == pytest.approx(math.sqrt(9 / 8 * sum(r**2 for r in residuals)) / 40)
    assert share_error([[x, 1] for x in right]) == pytest.approx(right.std(ddof=1) / math.sqrt(40))
    # Four copies of each document say no more than one.
    fourfold = [[x, 1, i] for i, x in enumerate(right) for _ in range(4)]
    assert share_error(fourfold) == pytest.approx(right.std(ddof=1) / math.sqrt(40))
    assert share_error([[1.0, 1, 0], [0.0, 1, 0], [0.0, 0, 1]]) == share([[0.0, 0, 1]]) == "N/A"


def test_differences_are_by_chat():
    """Of copies in one chat the interval is that of the chats alone."""
    draw = np.random.default_rng(1)
    one, other = draw.integers(0, 2, (2, 50)).astype(float).tolist()
    metric = ("t", "exact", "none")

    def found(copies, cluster):
        values = [[[x, 1, i] if cluster else [x, 1] for i, x in enumerate(each) for _ in range(copies)]
                  + [[0.0, 0, 99]] * cluster for each in (one, other)]
        return comparing._difference(metric, (np.mean(one), np.mean(other)), values, True)

    alone, clustered, unaware = found(1, False), found(9, True), found(9, False)
    assert (clustered.low, clustered.high) == pytest.approx((alone.low, alone.high))
    assert clustered.high - clustered.low > 2.5 * (unaware.high - unaware.low)
