"""Prompts in files: what is taken, what is kept for those who judge, what is refused."""

import pytest
from chats import write

from lfm_jax.data.prompts import read_prompts
from lfm_jax.data.sources import find_files

TOOLS = [{"name": "weather", "parameters": {"type": "object"}}]
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}


def read(tmp_path, *records, ignore=("id",)):
    path, problems = write(tmp_path / "prompts.jsonl", records), []
    return read_prompts(find_files([str(path)], suffixes=(".jsonl",)), ignore, problems), problems


def test_a_text_is_a_message_of_the_user_and_other_keys_are_kept(tmp_path):
    (first, second), problems = read(
        tmp_path, {"prompt": "2 + 2?", "answer": 4, "id": 7, "tools": None},
        {"prompt": [{"role": "user", "content": "Oslo?"}, {"role": "assistant", "tool_calls": [CALL]},
                    {"role": "tool", "content": "12"}], "tools": TOOLS, "tool_calls": []})
    assert problems == []
    assert first[:3] == ([{"role": "user", "content": "2 + 2?"}], None, {"answer": 4})
    assert second.messages[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Oslo"}
    assert (second.tools, second.rest, second.line) == (TOOLS, {"tool_calls": []}, 2)
    assert len({first.text, second.text}) == 2


@pytest.mark.parametrize(("record", "says"), [
    ({"messages": [], "answer": 1}, "it has no prompt: its keys are 'messages', 'answer'"),
    ({"prompt": []}, "prompt is []; expected a list of messages or a text"),
    ({"prompt": [{"role": "assistant", "content": "x"}]}, "ends with a message of role assistant"),
    ({"prompt": [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}]}, "only the first one may"),
    ({"prompt": "x", "tools": "y"}, 'tools is "y"; expected a list of objects'),
])
def test_what_cannot_be_asked_is_refused(tmp_path, record, says):
    found, [problem] = read(tmp_path, {"prompt": "x"}, record)
    assert len(found) == 1
    assert "line 2" in problem
    assert says in problem
