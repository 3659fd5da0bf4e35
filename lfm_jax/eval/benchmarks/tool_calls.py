"""Tool calls in chats of one's own: what the assistant called, and where it called nothing.

A file has chats as `lfm tune` takes them (`data.chats`). Each turn of the assistant that calls is a document; its
context is what comes before it, earlier turns as they are in the file. So are as many turns of the chat that do not
call, drawn by its text (one where none calls): a model that always calls would be right in all the others.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lfm_jax.data.chats import OPENERS, Chat, read_chats
from lfm_jax.data.config import ChatData
from lfm_jax.data.sources import SourceFile
from lfm_jax.eval.benchmarks.chat_task import ChatTask, Document, Metrics, counted
from lfm_jax.eval.shares import share
from lfm_jax.problems import raise_problems
from lfm_jax.structured.grammar import Grammar
from lfm_jax.structured.validation import UnjudgedError, check_schema, is_valid
from lfm_jax.text.tool_schemas import tool_schemas
from lfm_jax.text.tools import ToolCall, parse_tool_calls

NAME = "tool_calls"
MAX_GEN_TOKS = 512
NAMING = frozenset({
    "additionalProperties", "patternProperties", "unevaluatedProperties", "$ref", "$dynamicRef", "allOf", "anyOf",
    "oneOf", "if", "then", "else", "dependentSchemas", "dependencies",
})
"""Keywords of a schema that may allow more than its `properties`; drafts before 2019-09 have no
`unevaluatedProperties` that would look into them."""
METRICS: Metrics = {
    "called": (share, True), "valid": (share, True), "exact": (share, True),
    "argument_values": (share, True), "refrained": (share, True),
    "turns": (counted, None), "errors": (counted, None), "problems": (counted, None),
}


class ToolCalls(ChatTask):
    """Shares of the turns that call, and of those that do not; errors are clustered by chat.

    - `called`: the reply calls something, where the reference does.
    - `valid`: and each call names a tool that is offered, with arguments that fit its schema and no others.
    - `exact`: its calls are those of the reference, in any order, with arguments that are equal as JSON values.
    - `argument_values`: of the reference's arguments to tools that the reply calls too, those that the reply gives
      equal values; one that it leaves out counts as wrong.
    - `refrained`: the reply calls nothing, where the reference does not.

    Args:
      path: the file.
      constrained: calls follow a grammar of the chat's tools; whether to call is left to the model.

    Raises:
      ValueError: one message that lists every line that cannot be used, or there is nothing to ask.
    """

    def __init__(self, path: Path, *, constrained: bool = False):
        super().__init__(_task_name(path), _documents(path, constrained), "1", METRICS, MAX_GEN_TOKS)
        self._constrained = constrained

    def messages(self, doc: Document) -> list[dict[str, Any]]:
        return doc["messages"]

    def tools(self, doc: Document) -> list[dict[str, Any]]:
        return doc["tools"]

    def options(self, doc: Document) -> dict[str, Any]:
        grammar = {"grammar": {"tools": doc["tools"]}} if self._constrained else {}
        return {"skip_special_tokens": False, **grammar}

    def doc_to_target(self, doc: Document) -> str:
        return json.dumps(doc["calls"], ensure_ascii=False)

    def process_results(self, doc: Document, results: list[str]) -> dict[str, Any]:
        _, calls = parse_tool_calls(results[0], doc["tools"])
        wanted = [ToolCall(**call) for call in doc["calls"]]
        problems: list[str] = []
        if not wanted:
            found = {"refrained": not calls}
            error = "called, and the reference does not" if calls else None
        else:
            if _fault(wanted, doc["tools"], []) is not None:
                problems.append("calls of the reference do not fit its tools")
            fault = _fault(calls, doc["tools"], problems)
            exact = _values(calls) == _values(wanted)
            found = {"called": bool(calls), "valid": bool(calls) and fault is None, "exact": exact}
            error = None if exact else fault or _difference(calls, wanted)
        # A turn weighs nothing in the scores that are not about its kind.
        parts = {name: (float(right), 1) for name, right in found.items()}
        parts["argument_values"] = _argument_values(calls, wanted)
        scores = {name: [*parts.get(name, (0.0, 0)), doc["chat"]]
                  for name, (how, _) in METRICS.items() if how is share}
        kind = "with calls (called, valid, exact)" if wanted else "without (refrained)"
        return {**scores, "turns": [kind], "errors": [error] if error else [], "problems": problems}


def has(name: str) -> bool:
    """Whether a task is of this benchmark; `tool_calls` means all of its files."""
    return name == NAME or name.startswith(f"{NAME}_")


def files(data: Path | None) -> dict[str, Path]:
    """The files of chats in `data/tool_calls/`, by the names of their tasks.

    Raises:
      ValueError: there are none.
    """
    folder = None if data is None else data / NAME
    paths = sorted(folder.iterdir()) if folder is not None and folder.is_dir() else []
    found = {_task_name(path): path for path in paths if path.name.lower().endswith(tuple(OPENERS))}
    if not found:
        place = f"DIR/{NAME}" if folder is None else folder
        raise ValueError(f"{NAME} has no data of its own: put chats as `lfm tune` takes them into {place}/NAME.jsonl"
                         f"{'' if data else ' and add --data DIR'}; each file is a task {NAME}_NAME")
    return found


def _task_name(path: Path) -> str:
    end = next(end for end in OPENERS if path.name.lower().endswith(end))
    return f"{NAME}_{path.name[: -len(end)]}"


def _documents(path: Path, constrained: bool) -> list[Document]:
    problems: list[str] = []
    found: list[Document] = []
    for chat in read_chats([SourceFile(path, path.name)], ChatData.ignore, problems):
        try:
            found += _turns(chat, constrained)
        except ValueError as error:
            problems.append(f"{chat}: {error}")
    raise_problems("chats cannot be used", problems)
    if not found:
        raise ValueError(f"{path} has nothing to ask: no chat has tools and an answer of the assistant")
    return found


def _turns(chat: Chat, constrained: bool) -> list[Document]:
    """The documents of a chat; without tools it has none.

    Raises:
      ValueError: calls without tools, tools that are not valid, or that the grammar refuses.
    """
    messages, tools = chat.messages, chat.tools
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i >= max(chat.prompt, 1)]
    calling = [i for i in turns if messages[i].get("tool_calls")]
    if tools is None:
        if calling:
            raise ValueError(f"message {calling[0]} calls a tool, and the chat offers none; add its tools")
        return []
    for tool in tool_schemas(tools):
        if problem := check_schema(tool["parameters"]):
            raise ValueError(f"the parameters of the tool {tool['name']!r} are no JSON schema: {problem}")
    if constrained:
        Grammar.tool_calls(tools)
    others = [i for i in turns if i not in calling]
    drawn = random.Random(chat.text).sample(others, min(len(others), max(len(calling), 1)))
    return [{"chat": chat.line, "turn": i, "tools": tools, "messages": messages[:i],
             "calls": [call["function"] for call in messages[i].get("tool_calls", ())]}
            for i in sorted([*calling, *drawn])]


def _fault(calls: Sequence[ToolCall], tools: Sequence[Mapping[str, Any]], problems: list[str]) -> str | None:
    """What is wrong with calls by themselves: the first fault, if there is one."""
    parameters = {tool["name"]: tool["parameters"] for tool in tool_schemas(tools)}
    for call in calls:
        if call.name not in parameters:
            return "called a tool that is not offered"
        schema = parameters[call.name]
        # Nor does the grammar write arguments beyond those that are named.
        if not NAMING & schema.keys() and call.arguments.keys() - schema.get("properties", {}).keys():
            return "arguments do not fit the schema"
        schema = {"unevaluatedProperties": False, **schema}
        try:
            valid = is_valid(call.arguments, schema)
        except UnjudgedError as error:  # Schemas may have references that lead nowhere.
            problems.append(error.problem)
            valid = False
        if not valid:
            return "arguments do not fit the schema"
    return None


def _difference(calls: Sequence[ToolCall], wanted: Sequence[ToolCall]) -> str:
    if not calls:
        return "called nothing, and the reference does"
    names = [sorted(call.name for call in each) for each in (calls, wanted)]
    if names[0] != names[1]:
        return "called other tools"
    keys = [sorted((call.name, *sorted(call.arguments)) for call in each) for each in (calls, wanted)]
    return "other arguments" if keys[0] != keys[1] else "other values of arguments"


def _argument_values(calls: Sequence[ToolCall], wanted: Sequence[ToolCall]) -> tuple[float, int]:
    """Of the arguments wanted by tools that are called: how many have the value wanted, and how many there are.

    Each call that is wanted takes the nearest of those that are left: of several calls of a tool, any order is right.
    """
    left, right, number = list(calls), 0, 0
    for call in wanted:
        texts = _texts(call)
        ranked = [(len(texts.items() & of.items()), -len(of), -i) for i, of in enumerate(map(_texts, left))
                  if left[i].name == call.name]
        if ranked:
            equal, _, place = max(ranked)
            del left[-place]
            right, number = right + equal, number + len(texts)
    return float(right), number


def _texts(call: ToolCall) -> dict[str, str]:
    """Arguments as texts that are equal where they are as JSON values."""
    return {key: json.dumps(_plain(value), sort_keys=True) for key, value in call.arguments.items()}


def _values(calls: Sequence[ToolCall]) -> list[str]:
    """Calls as texts that are equal where names are, and arguments as JSON values, in an order of their own."""
    return sorted(json.dumps([call.name, _texts(call)], sort_keys=True) for call in calls)


def _plain(value: Any) -> Any:
    """1.0 and 1 are one number in JSON; in Python true and 1 are too, which `json.dumps` tells apart."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
