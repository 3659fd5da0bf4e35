"""Prompts as they lie in files: JSON lines, each with what an answer is judged by.

A line is

    {"prompt": ..., "tools": [...], ...}

The prompt is a list of messages, or a text, which is one message of the user; it ends where the assistant is to answer.
`tools` may be missing. All other keys are for those who judge.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lfm_jax.data.chats import check_order, messages_of, read_records, tools_of
from lfm_jax.data.sources import SourceFile


class Prompt(NamedTuple):
    """One prompt."""

    messages: list[dict[str, Any]]
    """As templates take them: contents are texts or None, the arguments of calls objects."""
    tools: list[dict[str, Any]] | None
    rest: dict[str, Any]
    """The other keys."""
    path: Path
    line: int

    def __str__(self) -> str:
        return f"{self.path}, line {self.line}"

    @property
    def text(self) -> str:
        """All of it in one text, which equal prompts share."""
        return json.dumps([self.messages, self.tools, self.rest], ensure_ascii=False, sort_keys=True)


def read_prompts(files: Sequence[SourceFile], ignore: Sequence[str], problems: list[str]) -> list[Prompt]:
    """Reads and checks all prompts of some files, in their order; see `chats.read_records`."""
    return read_records(files, ignore, problems, _prompt)


def _prompt(record: Mapping[str, Any], path: Path, line: int) -> Prompt:
    if "prompt" not in record:
        keys = ", ".join(map(repr, record)) or "none"
        raise ValueError(f"it has no prompt: its keys are {keys}; write the text of the user, or a list of messages")
    messages, tools = messages_of("prompt", record["prompt"], role="user"), tools_of(record.get("tools"))
    check_order(messages)
    if messages[-1]["role"] not in ("user", "tool"):
        raise ValueError(f"its prompt ends with a message of role {messages[-1]['role']}; the assistant can answer one "
                         "of the user or of a tool")
    return Prompt(messages, tools, {k: x for k, x in record.items() if k not in ("prompt", "tools")}, path, line)
