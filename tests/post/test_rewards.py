import json
import sys

import numpy as np
import pytest

from lfm_jax.post.rewards import REWARDS, Rewards, find_reward
from lfm_jax.structured import validation
from lfm_jax.text.tools import ToolCall, render_calls


def reward(name, completion, **example):
    return Rewards({name: 1.0})(completion, example).total


CALLS = [{"name": "a.b", "arguments": {"x": 1, "y": [True, None, {"z": "ü"}]}},
         {"type": "function", "function": {"name": "g", "arguments": '{"q": -0.5}'}}]
MADE = ToolCall("a.b", {"y": [True, None, {"z": "ü"}], "x": 1.0}), ToolCall("g", {"q": -0.5})


@pytest.mark.parametrize(("calls", "worth"), [
    (MADE, 1), (MADE[::-1], 1), (MADE[:1], 0), ((*MADE, MADE[1]), 0), ((MADE[0], ToolCall("h", {"q": -0.5})), 0),
    ((MADE[0], ToolCall("g", {"q": 0.5})), 0), ((MADE[0], ToolCall("g", {"q": -0.5, "r": 1})), 0),
    ((ToolCall("a.b", {"x": True, "y": [True, None, {"z": "ü"}]}), MADE[1]), 0),
    ((ToolCall("a.b", {"x": "1", "y": [True, None, {"z": "ü"}]}), MADE[1]), 0),
    ((ToolCall("a.b", {"x": 1, "y": [None, True, {"z": "ü"}]}), MADE[1]), 0),
])
def test_tool_call(calls, worth):
    assert reward("tool_call", "Let me see. " + render_calls(calls) + " Done.", tool_calls=CALLS) == worth


def test_tool_call_of_texts_that_are_none():
    assert reward("tool_call", "a.b(x=1)", tool_calls=CALLS) == 0
    assert reward("tool_call", "Hello.", tool_calls=[]) == 1
    assert reward("tool_call", render_calls(MADE[1:]), tool_calls=[]) == 0
    assert reward("tool_call", "<|tool_call_start|>[g(q=-0.5", tool_calls=CALLS[1:]) == 0


def test_positional_arguments_count_with_the_tools_at_hand():
    tools = [{"name": "g", "parameters": {"type": "object", "properties": {"q": {"type": "number"}}}}]
    text = "<|tool_call_start|>[g(-0.5)]<|tool_call_end|>"
    assert reward("tool_call", text, tool_calls=CALLS[1:], tools=tools) == 1
    assert reward("tool_call", text, tool_calls=CALLS[1:]) == 0


SCHEMA = {"type": "object", "properties": {"n": {"$ref": "#/$defs/n"}}, "required": ["n"],
          "$defs": {"n": {"minimum": 3}}}


@pytest.mark.parametrize(("completion", "worth"), [
    ('{"n": 3}', 1), (' {"n": 3, "m": []}\n', 1), ('{"n": 2}', 0), ("{}", 0), ('{"n": 3} ', 1), ('{"n": 3}}', 0),
    ('Here: {"n": 3}', 0), ('{"n": NaN}', 0), ("", 0), ("[" * 100_000, 0), ('{"n": ' + "9" * 10_000 + "}", 0),
])
def test_json_schema(completion, worth):
    assert reward("json_schema", completion, schema=SCHEMA) == worth
    assert reward("json_schema", completion, schema=json.dumps(SCHEMA)) == worth


def test_a_reference_that_leads_nowhere_is_found_by_whatever_answer():
    """The empty one too, with which prompts are tried before a run begins."""
    schema = {"properties": {"n": {"anyOf": [{"$ref": "#/$defs/n"}, {"$ref": "#/$defs/m"}]}}, "$defs": {"n": {}}}
    with pytest.raises(ValueError, match=r"a reference that leads out of it: #/\$defs/m"):
        reward("json_schema", "", schema=schema)
    inner = {"$id": "http://here/inner", "$defs": {"k": {"$anchor": "k"}}, "items": {"$ref": "#k"}}
    kept = {"$defs": {"m": {"const": {"$ref": "#/no/reference"}}, "inner": inner}, "$ref": "http://here/inner",
            "properties": {"$ref": {"$ref": "#"}, "of": {"$ref": "https://json-schema.org/draft/2020-12/schema"}}}
    assert reward("json_schema", "", schema=kept) == 0
    assert reward("json_schema", "[1]", schema=kept) == 1


@pytest.mark.parametrize(("completion", "right", "worth"), [
    ("She has 3 + 15 = 18 eggs.\n#### 18", "9 * 2 = 18\n#### 18", 1), ("The answer is $1,234.50.", 1234.5, 1),
    ("It is 18, not 19", "18", 0), ("18", 18, 1), ("18.0", "18", 1), ("eighteen", "18", 0), ("", 18, 0),
    ("x = -7", "-7", 1), ("10-7", "-7", 0), ("10-7", 7, 1), ("\u22127", -7, 1), ("of H2O", 2, 0), ("1,2,3", 3, 1),
    ("1,2,3", 123, 0), ("it costs -$5", "-$5", 1), ("75%", "75%", 1), (".5", 0.5, 1), ("0.1", 0.1, 1),
    ("9" * 40, int("9" * 39 + "8"), 0), ("-" + "9" * 40, -int("9" * 40), 1),
    (" Paris.\n", "paris", 1), ("**Paris**", "Paris", 1), ("The  Hague", "the hague", 1), ("Paris or Rome", "Paris", 0),
    ("In 1066", "Hastings", 0), ("Straße", "STRASSE", 1), ("C", "C++", 0), ("2 cats", "2 cats", 1),
    ("3 cats", "2 cats", 0), ("0.00001", 1e-5, 1), ("about 10,000,000,000,000,000", 1e16, 1), ("1.5e3", 1500, 1),
    ("1e3", 1, 0), ("1.5E-3", "1.5e-3", 1), ("2e3x", 2, 1), ("1e" + "9" * 30, 2, 0),
])
def test_answer(completion, right, worth):
    assert reward("answer", completion, answer=right) == worth


def test_regex():
    pattern = r"^\d{4}-\d\d$"
    assert [reward("regex", text, pattern=pattern) for text in ("2026-11", "in 2026-11", "2026")] == [1, 0, 0]
    assert reward("regex", "in 2026-11", pattern=r"\d{4}-\d\d") == 1


@pytest.mark.parametrize(("name", "completion", "example"), [
    ("regex", "a" * 60 + "b", {"pattern": "^(a|a)*$"}),
    ("json_schema", json.dumps("a" * 60 + "b"), {"schema": {"pattern": "^(a|a)*$"}}),
])
def test_a_pattern_that_takes_for_ever_is_worth_nothing_and_told(name, completion, example, monkeypatch, capsys):
    monkeypatch.setattr(validation, "SECONDS", 2.0)
    assert reward("regex", "ab", pattern="b") == 1  # Its process has begun.
    assert reward(name, completion, **example) == 0
    assert "an answer is worth 0 to " in (said := capsys.readouterr().err)
    assert "took more than 2 s" in said
    assert reward("regex", "ab", pattern="b") == 1


def test_numbers_that_no_float_holds_are_worth_nothing():
    assert reward("json_schema", "9" * 400, schema={"multipleOf": 0.5}) == 0


def test_length():
    bounds = dict(min_length=2, max_length=4)
    assert [reward("length", "ä" * n, **bounds) for n in range(1, 6)] == [0, 1, 1, 1, 0]
    assert [reward("length", "a" * n, max_length=1) for n in range(3)] == [1, 1, 0]
    assert [reward("length", "a" * n, min_length=1) for n in range(3)] == [0, 1, 1]


@pytest.mark.parametrize(("name", "example", "message"), [
    ("tool_call", {}, "no field 'tool_calls'; expected a list"),
    ("tool_call", {"tool_calls": [{"name": "f"}]}, "must have a name and arguments"),
    ("tool_call", {"tool_calls": [{"name": "f", "arguments": "[1]"}]}, "'f' are .1.; expected an object"),
    ("json_schema", {"schema": {"type": "text"}}, "no JSON schema: 'text'"),
    ("json_schema", {"schema": {"$ref": "http://localhost:1/x"}}, "leads out of it: http://localhost:1/x"),
    ("json_schema", {"schema": "{"}, "JSONDecodeError"),
    ("answer", {"answer": None}, "is None; expected a text or a number"),
    ("answer", {"answer": True}, "is True; expected a text or a number"),
    ("answer", {"answer": "#### ."}, "is '#### .'"),
    ("answer", {"answer": float("nan")}, "is nan; expected a text or a number"),
    ("regex", {"pattern": "("}, "unterminated"), ("regex", {"pattern": 3}, "'pattern' of the example is 3"),
    ("length", {}, "neither 'min_length' nor 'max_length'"),
    ("length", {"max_length": "9"}, "is '9'; expected a number"),
])
def test_an_example_that_does_not_fit_is_named(name, example, message):
    with pytest.raises(ValueError, match=f"(?s)^reward '{name}' raised .*{message}.*prompts.jsonl:7"):
        Rewards({name: 1.0})("1", {**example, "file": "prompts.jsonl", "line": 7})


MINE = '''
from __future__ import annotations

import dataclasses


@dataclasses.dataclass
class Place:  # Looks for its module.
    line: int


def short(completion, example):
    return -len(completion) / example["most"]


def given(completion, example):
    return example["value"]


nothing = None
'''


def test_rewards_of_ones_own_are_weighted_with_the_others(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    in_file, in_module = f"{tmp_path}/my_rewards.py:short", "my_rewards:given"
    rewards = Rewards({"answer": 2.0, in_file: 0.5, in_module: -1.0}, {"most": 4, "value": 7})
    found = rewards("18", {"answer": 18, "value": np.float32(0.25)})
    assert found.by_name == {"answer": 1.0, in_file: -0.5, in_module: 0.25}
    assert found.total == 2 - 0.25 - 0.25
    assert find_reward(in_file) is find_reward(in_file)
    sys.modules.pop("my_rewards")


@pytest.mark.parametrize(("value", "shown"), [
    (float("nan"), "nan"), (float("inf"), "inf"), (None, "None"), ("1", "'1'"), ([1], r"\[1\]"), (10**400, "1000"),
])
def test_what_is_no_finite_number_is_named_with_reward_and_example(tmp_path, value, shown):
    (tmp_path / "mine.py").write_text(MINE)
    rewards = Rewards({f"{tmp_path}/mine.py:given": 1.0})
    message = rf"mine.py:given' returned {shown}.*; expected a finite number"
    with pytest.raises(ValueError, match=rf"{message} \(prompts.jsonl:3\)"):
        rewards("x", {"value": value, "file": "prompts.jsonl", "line": 3})
    with pytest.raises(ValueError, match=rf"{message} \(example \{{'value'"):
        rewards("x", {"value": value})


def test_a_reward_that_raises_keeps_its_cause(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    with pytest.raises(ValueError, match=r"mine.py:short' raised KeyError: 'most'") as caught:
        Rewards({f"{tmp_path}/mine.py:short": 1.0})("x", {})
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize(("name", "message"), [
    ("tool_cal", "did you mean tool_call"), ("judge", f"there are {', '.join(REWARDS)}; or name module:function"),
    (":f", "no reward ':f'"), ("no_such_module:f", "importing no_such_module raised ModuleNotFoundError"),
    ("no/such.py:f", "importing no/such.py raised FileNotFoundError"),
    ("json:nothing", "json has no function 'nothing'"),
    ("{dir}/mine.py:nothing", "has no function 'nothing'"), ("{dir}/broken.py:f", "raised ZeroDivisionError"),
])
def test_a_reward_that_is_not_there(tmp_path, name, message):
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "broken.py").write_text("1 / 0\n")
    for _ in range(2):  # A file that failed is not taken for one that was run.
        with pytest.raises(ValueError, match=message):
            Rewards({name.format(dir=tmp_path): 1.0})


def test_weights_are_finite_and_there_are_some():
    with pytest.raises(ValueError, match="there are no rewards"):
        Rewards({})
    with pytest.raises(ValueError, match=r"(?s)no finite weight.*answer: nan.*regex: None"):
        Rewards({"answer": float("nan"), "regex": None, "length": 1})


def test_without_jsonschema_it_is_said_at_once(monkeypatch):
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    with pytest.raises(ImportError, match=r"pip install 'lfm_jax\[post\]'"):
        Rewards({"json_schema": 1.0})
