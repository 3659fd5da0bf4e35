"""Pairs of answers as they lie in files: JSON lines, each with a chosen and a rejected answer to one prompt.

A line is one of

    {"prompt": ..., "chosen": ..., "rejected": ..., "tools": [...]}
    {"chosen": [...], "rejected": [...], "tools": [...]}

`tools` may be missing, and the prompt may be called `messages`. A prompt is a list of messages, or a text, which is one
message of the user; an answer is a list of messages that begins with one of the assistant, or a text. Where chosen and
rejected begin otherwise, they are whole conversations: the prompt is what both begin with, and one that is given beside
them must be the end of that. Nothing is learnt from a prompt.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lfm_jax.data.chats import Chat, check_keys, check_order, messages_of, read_records, tools_of
from lfm_jax.data.sources import SourceFile

Messages = list[dict[str, Any]]


class Pair(NamedTuple):
    """Two answers to one prompt."""

    chosen: Chat
    rejected: Chat

    def __str__(self) -> str:
        return str(self.chosen)

    @property
    def text(self) -> str:
        """The prompt, which equal texts share: all answers to it are held out together, or none is."""
        messages, tools, prompt = self.chosen[:3]
        return json.dumps([messages[:prompt], tools], ensure_ascii=False, sort_keys=True)


def read_pairs(files: Sequence[SourceFile], ignore: Sequence[str], problems: list[str]) -> list[Pair]:
    """Reads and checks all pairs of some files, in their order; see `chats.read_records`."""
    return read_records(files, ignore, problems, _pair)


def _pair(record: Mapping[str, Any], path: Path, line: int) -> Pair:
    missing = [key for key in ("chosen", "rejected") if key not in record]
    if missing:
        keys = ", ".join(map(repr, record)) or "none"
        raise ValueError(f"it has no {' and no '.join(missing)}: its keys are {keys}; expected prompt, chosen and "
                         "rejected")
    check_keys(record, ("prompt", "messages", "chosen", "rejected", "tools"))
    if "prompt" in record and "messages" in record:
        raise ValueError("it has a prompt and messages; name the one that may be left out in data.ignore")
    name = "messages" if "messages" in record else "prompt"
    prompt = messages_of(name, record[name], role="user") if name in record else []
    sides = [messages_of(key, record[key], role="assistant") for key in ("chosen", "rejected")]
    whole = [side[0]["role"] != "assistant" for side in sides]
    if whole[0] != whole[1]:
        raise ValueError("one of chosen and rejected is a whole conversation and the other an answer; write both alike")
    if whole[0]:
        shared = _shared(*sides)
        if prompt != sides[0][max(shared - len(prompt), 0) : shared]:
            raise ValueError(f"its {name} is not what chosen and rejected begin with; take it out, or mend it")
    elif prompt:
        shared, sides = len(prompt), [[*prompt, *side] for side in sides]
    else:
        raise ValueError("it has no prompt; add one, or write chosen and rejected as whole conversations")
    for key, side in zip(("chosen", "rejected"), sides, strict=True):
        _check_answer(key, side, shared)
    if sides[0] == sides[1]:
        raise ValueError("chosen and rejected are equal, so that nothing is learnt from them; drop the line")
    tools = tools_of(record.get("tools"))
    return Pair(*(Chat(side, tools, shared, path, line) for side in sides))


def _shared(chosen: Messages, rejected: Messages) -> int:
    """How many messages two conversations begin with alike.

    Raises:
      ValueError: none, all, or they do not part at an answer.
    """
    shared = next((i for i, pair in enumerate(zip(chosen, rejected, strict=False)) if pair[0] != pair[1]),
                  min(len(chosen), len(rejected)))
    if chosen == rejected:
        raise ValueError("chosen and rejected are equal, so that nothing is learnt from them; drop the line")
    if not shared:
        raise ValueError("chosen and rejected have no common prompt: their first messages differ")
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if shared == len(side):
            raise ValueError(f"{name} has no answer of its own: it is what the other begins with")
        if side[shared]["role"] != "assistant":
            raise ValueError(f"chosen and rejected part at message {shared}, which in {name} has the role "
                             f"{side[shared]['role']}; they must part at an answer of the assistant")
    return shared


def _check_answer(name: str, messages: Messages, prompt: int) -> None:
    try:
        check_order(messages)
    except ValueError as error:
        raise ValueError(f"{name}, after its prompt: {error}") from None
    answers = [message for message in messages[prompt:] if message["role"] == "assistant"]
    if not any(message.get("content", "").strip() or message.get("tool_calls") for message in answers):
        raise ValueError(f"{name} is empty: the assistant writes nothing in it")
