"""Chats as they lie in files: JSON lines in OpenAI's form, checked line by line before anything is made of them.

A line is one of

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}], "tools": [...]}
    {"prompt": ..., "completion": ..., "tools": [...]}

`tools` may be missing. Prompt and completion are lists of messages, or texts: one message of the user, one of the
assistant. Nothing is learnt from a prompt.
"""

from __future__ import annotations

import codecs
import difflib
import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lfm_jax.data.sources import SourceFile

OPENERS: dict[str, Callable[..., Any]] = {".jsonl": open, ".jsonl.gz": gzip.open, ".jsonl.xz": lzma.open}
"""How files are read, by the end of their name."""

_MESSAGE = ("role", "content", "tool_calls", "tool_call_id", "name", "reasoning_content")
_CALL, _FUNCTION = ("id", "type", "function", "index"), ("name", "arguments")
_ROLES = ("system", "user", "assistant", "tool")


class Chat(NamedTuple):
    """One chat."""

    messages: list[dict[str, Any]]
    """As templates take them: contents are texts or None, the arguments of calls objects."""
    tools: list[dict[str, Any]] | None
    prompt: int
    """How many of the messages are a prompt, from which nothing is learnt."""
    path: Path
    line: int

    def __str__(self) -> str:
        return f"{self.path}, line {self.line}"

    @property
    def text(self) -> str:
        """All of it in one text, which equal chats share."""
        return json.dumps([self.messages, self.tools, self.prompt], ensure_ascii=False, sort_keys=True)


def read_chats(files: Sequence[SourceFile], ignore: Sequence[str], problems: list[str]) -> list[Chat]:
    """Reads and checks all chats of some files, in their order; see `read_records`."""
    return read_records(files, ignore, problems, _chat)


def read_records[R](
    files: Sequence[SourceFile], ignore: Sequence[str], problems: list[str],
    made: Callable[[Mapping[str, Any], Path, int], R],
) -> list[R]:
    """What is made of each object in some files, in their order; empty lines are passed over.

    Args:
      ignore: keys of objects that are left out.
      problems: gets a line for each file or line that cannot be used.
      made: of an object without nulls, the path of its file and its line; raises ValueError.
    """
    records = []
    for file in files:
        try:
            for line, raw in _lines(file.path):
                try:
                    parsed = {key: x for key, x in _parsed(raw).items() if x is not None and key not in ignore}
                    records.append(made(parsed, file.path, line))
                except ValueError as error:
                    problems.append(f"{file.path}, line {line}: {error}")
        except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
            problems.append(f"{file.path}: cannot be read ({getattr(error, 'strerror', None) or error})")
    return records


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    opener = next(opener for end, opener in OPENERS.items() if path.name.lower().endswith(end))
    with opener(path, "rb") as handle:
        for number, raw in enumerate(handle, 1):
            line = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
            if line.strip():
                yield number, line


def _parsed(raw: bytes) -> Mapping[str, Any]:
    try:
        value = json.loads(raw.decode())
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {raw[error.start]:#04x}); convert the file with iconv") from None
    except UnicodeEncodeError:
        raise ValueError("it holds half a surrogate pair, which is not text; mend or drop the line") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg}, column {error.colno}); put one whole object on each line") from None
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if not isinstance(value, dict):
        raise ValueError(f"it is {_short(value)}; expected an object, such as one with messages")
    return value


def _chat(record: Mapping[str, Any], path: Path, line: int) -> Chat:
    if "messages" in record:
        check_keys(record, ("messages", "tools"))
        messages, prompt = messages_of("messages", record["messages"]), 0
    elif "prompt" in record and "completion" in record:
        check_keys(record, ("prompt", "completion", "tools"))
        given = messages_of("prompt", record["prompt"], role="user")
        answer = messages_of("completion", record["completion"], role="assistant")
        if answer[0]["role"] != "assistant":
            raise ValueError(f"the completion begins with the role {answer[0]['role']}; it must be the assistant's")
        messages, prompt = [*given, *answer], len(given)
    else:
        keys = ", ".join(map(repr, record)) or "none"
        raise ValueError(f"its keys are {keys}; expected messages, or prompt and completion")
    check_order(messages)
    if not any(message["role"] == "assistant" for message in messages[prompt:]):
        raise ValueError("it has no message of the assistant, so that nothing is learnt from it; drop the line")
    return Chat(messages, tools_of(record.get("tools")), prompt, path, line)


def check_keys(
    given: Mapping[str, Any], known: Sequence[str], advice: str = "name it in data.ignore if it may be left out"
) -> None:
    """Refuses a key that is not known.

    Raises:
      ValueError: names it and the nearest.
    """
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            nearest = f"; the nearest is {near[0]!r}" if near else f"; known are {', '.join(known)}"
            raise ValueError(f"the key {key!r} is not known{nearest} ({advice})")


def messages_of(name: str, value: Any, role: str | None = None) -> list[dict[str, Any]]:
    """The messages of a field, checked one by one; a text is one message of `role`, where that is given.

    Raises:
      ValueError: it holds no messages.
    """
    if role is not None and isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list) or not value:
        raise ValueError(f"{name} is {_short(value)}; expected a list of messages{' or a text' if role else ''}")
    messages = []
    for i, message in enumerate(value):
        try:
            messages.append(_message(message))
        except ValueError as error:
            raise ValueError(f"{name}[{i}]: {error}") from None
    return messages


def _message(given: Any) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise ValueError(f"it is {_short(given)}; expected an object with role and content")
    message = {key: value for key, value in given.items() if value is not None}
    check_keys(message, _MESSAGE, "take it out of the message")
    role, calls = message.get("role"), message.get("tool_calls")
    if role not in _ROLES:
        raise ValueError(f"its role is {_short(role)}; expected {', '.join(_ROLES)}")
    if "content" in message:
        message["content"] = _content(message["content"])
    elif not (role == "assistant" and calls):
        raise ValueError("it has no content" + (" and no tool_calls" if role == "assistant" else ""))
    for key, owner in (("tool_calls", "assistant"), ("reasoning_content", "assistant"), ("tool_call_id", "tool")):
        if key in message and role != owner:
            raise ValueError(f"it has {key}, which only a message of role {owner} may")
    if calls is not None:
        if not isinstance(calls, list):
            raise ValueError(f"its tool_calls is {_short(calls)}; expected a list")
        message["tool_calls"] = [_call(call) for call in calls]
    for key in ("tool_call_id", "name", "reasoning_content"):
        if not isinstance(message.get(key, ""), str):
            raise ValueError(f"its {key} is {_short(message[key])}; expected a text")
    return message


def _content(content: Any) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [None]
    if all(isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
           for part in parts):
        return "".join(part["text"] for part in parts)
    raise ValueError(f"its content is {_short(content)}; expected a text, or parts of type text (write data as JSON "
                     "text)")


def _call(given: Any) -> dict[str, Any]:
    if not isinstance(given, dict) or not isinstance(given.get("function"), dict):
        raise ValueError(f'its call is {_short(given)}; expected {{"function": {{"name": ..., "arguments": ...}}}}')
    check_keys(given, _CALL, "take it out of the call")
    function = given["function"]
    check_keys(function, _FUNCTION, "take it out of the function")
    name, arguments = function.get("name"), function.get("arguments")
    if not isinstance(name, str) or not name:
        raise ValueError(f"its call has the name {_short(name)}; expected a text")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            raise ValueError(f"the arguments of its call of {name!r} are no JSON: {_short(arguments)}") from None
    if not isinstance(arguments, dict):
        raise ValueError(f"the arguments of its call of {name!r} are no JSON object: {_short(arguments)}")
    return dict(given) | {"function": {"name": name, "arguments": arguments}}


def tools_of(tools: Any) -> list[dict[str, Any]] | None:
    """The tools of a chat; None where there are none.

    Raises:
      ValueError: they are no list of tools.
    """
    if tools is None:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"tools is {_short(tools)}; expected a list of objects")
    for tool in tools:
        function = tool.get("function", tool)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f"a tool is {_short(tool)}; expected an object with a name, or with it in its function")
    return tools or None


def check_order(messages: Sequence[Mapping[str, Any]]) -> None:
    """The order that a chat has where the assistant answers and tools answer its calls.

    Raises:
      ValueError: roles out of order, or a tool's answer without its call.
    """
    before: Mapping[str, Any] = {"role": "nothing"}
    open_calls: list[str | None] = []
    for i, message in enumerate(messages):
        role = message["role"]
        if role == "system" and i:
            raise ValueError(f"message {i} has the role system; only the first one may")
        if role == "assistant" and before["role"] == "assistant":
            raise ValueError(f"message {i} is of the assistant, and so is the one before it; make them one, or put "
                             "between them what was said or returned")
        if role == "tool":
            if not open_calls:
                raise ValueError(f"message {i} is a tool's, but no call of the assistant is left that it could answer")
            asked = message.get("tool_call_id")
            if asked in open_calls:
                open_calls.remove(asked)
            elif asked is None or None in open_calls:
                open_calls.pop(0)
            else:
                raise ValueError(f"message {i} has the tool_call_id {asked!r}; the calls before it are {open_calls}")
        elif open_calls:
            raise ValueError(f"message {i} has the role {role}, but {len(open_calls)} of the calls before it have no "
                             "answer of a tool yet")
        open_calls = [call.get("id") for call in message.get("tool_calls", ())] or open_calls
        before = message


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
