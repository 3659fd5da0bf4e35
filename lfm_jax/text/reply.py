"""A whole reply of a model, taken apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from lfm_jax.text.thoughts import Stage, split_thought
from lfm_jax.text.tool_schemas import Tool
from lfm_jax.text.tools import ToolCall, parse_tool_calls


@dataclasses.dataclass(frozen=True)
class Reply:
    """What a model has written in its turn."""

    text: str
    """The answer, without the thought and the calls."""
    thought: str = ""
    """What it wrote before, between `<think>` and `</think>`; empty where it did not think."""
    calls: tuple[ToolCall, ...] = ()
    """In their order."""


def read_reply(text: str, tools: Sequence[Tool] = (), begin: Stage = "start") -> Reply:
    """Takes the text of a reply apart; give it with its special tokens, since marks may be some.

    Args:
      tools: those that were offered (`tools.ToolCallParser`). Without any, what looks like a call is text.
      begin: where the text goes on (`thoughts.stage`): inside of a thought where the prompt has opened it.

    Raises:
      ValueError: `tools` are not valid. No text raises anything.
    """
    thought, answer = split_thought(text, begin)
    content, calls = parse_tool_calls(answer, tools) if tools else (answer, [])
    return Reply(content, thought, tuple(calls))
