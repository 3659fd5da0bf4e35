"""OpenAI's Responses API: its bodies, which ask for the same as a chat, and the form of its answers."""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from lfm_jax.engine.request import Request
from lfm_jax.engine.service import Piece, Service
from lfm_jax.serve.errors import RefusalError
from lfm_jax.serve.fields import ACCOUNT, CACHE, ECHO, HINT, STORAGE, Body, Ignored, Refused, one_of
from lfm_jax.serve.formats import (
    ChatReply,
    Choice,
    Choices,
    dumped,
    logprob_entry,
    marks_of_thoughts,
    usage_of,
)
from lfm_jax.serve.messages import Content, joined
from lfm_jax.serve.protocol import MAX_ID, MAX_TOP_LOGPROBS, ChatBody
from lfm_jax.serve.tools import ForeignTool, FunctionTool
from lfm_jax.text.thoughts import Stage, Thought
from lfm_jax.text.tools import CallCut, CallPiece, CallStart, ToolCall
from lfm_jax.text.tools import Content as Text

ONE_AT_A_TIME = "nothing is stored; send the whole conversation in input"


class InputItem(Body):
    """An item of an input: what earlier answers gave it is ignored."""

    id: Annotated[Any, Ignored(ECHO)] = None
    status: Annotated[Any, Ignored(ECHO)] = None


class InputMessage(InputItem):
    """A message among the items of an input."""

    type: Literal["message"] | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: Content
    phase: Annotated[Any, Ignored(ECHO)] = None


class FunctionCall(InputItem):
    """A call that the model made before."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    parsed_arguments: Annotated[Any, Ignored(ECHO)] = None


class FunctionOutput(InputItem):
    """What came of a call."""

    type: Literal["function_call_output"]
    call_id: str
    output: Content


class ReasoningText(Body):
    """A part of a thought."""

    type: Literal["summary_text", "reasoning_text"] | None = None
    text: str


def _of_thought(value: Any) -> Any:
    """What a list has of a thought's parts; other servers have others, or no list."""
    parts = value if isinstance(value, list) else []
    return [part for part in parts if isinstance(part, ReasoningText)
            or (isinstance(part, dict) and part.get("type") in (None, "summary_text", "reasoning_text"))]


ReasoningTexts = Annotated[list[ReasoningText], BeforeValidator(_of_thought)]


class ReasoningItem(InputItem):
    """The thought before the assistant's message or calls that follow."""

    type: Literal["reasoning"]
    summary: ReasoningTexts | None = None
    content: ReasoningTexts | None = None
    encrypted_content: Annotated[Any, Ignored(ECHO)] = None


class ForeignItem(Body):
    """An item that the server cannot take."""

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, value: Any) -> Any:
        kind = value.get("type") if isinstance(value, dict) else None
        hint = f": {ONE_AT_A_TIME}" if kind == "item_reference" else ""
        raise ValueError(f"items of type {json.dumps(kind)[:40]} are not supported{hint}")


def _item_kind(value: Any) -> str:
    kind = (value.get("type") if isinstance(value, dict) else getattr(value, "type", None)) or "message"
    known = ("message", "function_call", "function_call_output", "reasoning")
    return f"({kind})" if kind in known else "(other)"


Item = Annotated[
    Annotated[InputMessage, Tag("(message)")] | Annotated[FunctionCall, Tag("(function_call)")]
    | Annotated[FunctionOutput, Tag("(function_call_output)")] | Annotated[ReasoningItem, Tag("(reasoning)")]
    | Annotated[ForeignItem, Tag("(other)")],
    Discriminator(_item_kind),
]


class ResponseTool(FunctionTool):
    """A function that the model may call."""

    type: Literal["function"]


class NamedChoice(Body):
    """A choice of one function."""

    type: Literal["function"]
    name: str


class AllowedChoice(Body):
    """A choice among some functions."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"] | None = None
    tools: Annotated[list[NamedChoice], Field(min_length=1, max_length=128)]


class TextFormat(Body):
    """The form of the text."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def _schema(self) -> TextFormat:
        if self.type == "json_schema" and self.schema_ is None:
            raise ValueError("schema is missing; a format of type json_schema has it")
        return self


class TextConfig(Body):
    """How the text is to be."""

    format: TextFormat | None = None
    verbosity: Annotated[Any, Ignored(HINT)] = None


class StreamOptions(Body):
    """How an answer is streamed."""

    include_obfuscation: Annotated[Any, Ignored("streams are not padded")] = None


def _tool_kind(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return "(function)" if kind == "function" else "(other)"


class ResponsesBody(Body):
    """POST /v1/responses."""

    model: str
    input: Annotated[
        Annotated[str, Tag("(text)")]
        | Annotated[list[Item], Field(min_length=1, max_length=4096, fail_fast=True), Tag("(items)")],
        one_of(lambda v: "(text)" if isinstance(v, str) else "(items)" if isinstance(v, list) else None,
               "a text or a list of items"),
    ] = Field(description="a text, or messages, calls, outputs of calls and reasoning (thoughts of earlier turns)")
    instructions: str | None = Field(None, description="a system message before the input")
    max_output_tokens: Annotated[int, Field(ge=1, lt=MAX_ID)] | None = Field(
        None, description="ends as incomplete where the context ends")
    temperature: Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = Field(
        None, description="with `include: [\"message.output_text.logprobs\"]`")
    include: list[str] | None = Field(None, description="`message.output_text.logprobs`; others have nothing to show")
    text: TextConfig | None = Field(None, description="`format`: text, json_object or json_schema")
    tools: Annotated[
        list[Annotated[Annotated[ResponseTool, Tag("(function)")] | Annotated[ForeignTool, Tag("(other)")],
                       Discriminator(_tool_kind)]], Field(max_length=128, fail_fast=True),
    ] | None = Field(None, description="functions")
    tool_choice: Annotated[
        Annotated[Literal["none", "auto", "required"], Tag("(word)")] | Annotated[NamedChoice, Tag("(function)")]
        | Annotated[AllowedChoice, Tag("(allowed)")],
        one_of(lambda v: "(word)" if isinstance(v, str) else {"function": "(function)", "allowed_tools": "(allowed)"}
               .get(str(v.get("type"))) if isinstance(v, dict) else None,
               'none, auto, required, {"type": "function", ...} or {"type": "allowed_tools", ...}'),
    ] | None = Field(None, description="`none`, `auto`, `required`, one function, or `allowed_tools`")
    parallel_tool_calls: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_thinking_tokens: Annotated[int, Field(ge=0, lt=MAX_ID)] | None = Field(
        None, description="this server's own: the most tokens of a thought, which is then closed")
    previous_response_id: Annotated[Any, Refused(ONE_AT_A_TIME)] = None
    conversation: Annotated[Any, Refused(ONE_AT_A_TIME)] = None
    prompt: Annotated[Any, Refused("the server has no stored prompts; send instructions and input")] = None
    background: Annotated[Any, Refused("wait for the answer, or stream it")] = None
    background_options: Annotated[Any, Refused("wait for the answer, or stream it")] = None
    context_management: Annotated[Any, Refused("shorten the input yourself")] = None
    truncation: Annotated[Any, Refused("shorten the input yourself", "disabled")] = None
    moderation: Annotated[Any, Refused("the server moderates nothing")] = None
    image: Annotated[Any, Refused("the model answers in text")] = None
    access_programs: Annotated[Any, Refused("the server runs nothing")] = None
    reasoning: Annotated[Any, Ignored(HINT)] = None
    max_tool_calls: Annotated[Any, Ignored("it is about tools that a server runs; this one runs none")] = None
    metadata: dict[str, Any] | None = Field(None, description="comes back in the answer")
    store: Annotated[Any, Ignored(STORAGE)] = None
    service_tier: Annotated[Any, Ignored(ACCOUNT)] = None
    safety_identifier: Annotated[Any, Ignored(ACCOUNT)] = None
    user: Annotated[Any, Ignored(ACCOUNT)] = None
    prompt_cache_key: Annotated[Any, Ignored(CACHE)] = None
    prompt_cache_options: Annotated[Any, Ignored(CACHE)] = None
    prompt_cache_retention: Annotated[Any, Ignored(CACHE)] = None

    def _messages(self) -> list[tuple[dict[str, Any], str]]:
        """The messages of a chat that holds the same, each with the field that it comes from."""
        found: list[tuple[dict[str, Any], str]] = []
        if self.instructions is not None:
            found.append(({"role": "system", "content": self.instructions}, "instructions"))
        if isinstance(self.input, str):
            return [*found, ({"role": "user", "content": self.input}, "input")]
        thought: dict[str, str] = {}  # Of the assistant's next message.
        for i, item in enumerate(self.input):
            if isinstance(item, ReasoningItem):
                text = joined(item.content or item.summary)
                if text:
                    thought = {"reasoning_content": "\n".join([*thought.values(), text])}
                continue
            if isinstance(item, InputMessage):
                own = thought if item.role == "assistant" else {}
                found.append(({"role": item.role, "content": joined(item.content), **own}, f"input[{i}]"))
            elif isinstance(item, FunctionCall):
                if thought or not (found and found[-1][0]["role"] == "assistant"):
                    found.append(({"role": "assistant", "content": "", **thought}, f"input[{i}]"))
                found[-1][0].setdefault("tool_calls", []).append(
                    {"id": item.call_id, "type": "function",
                     "function": {"name": item.name, "arguments": item.arguments}})
            elif isinstance(item, FunctionOutput):
                found.append(({"role": "tool", "tool_call_id": item.call_id, "content": joined(item.output)},
                              f"input[{i}]"))
            thought = {}
        return found

    def in_own_words(self, about_chat: str) -> str:
        """A field of the chat, or a message about it, with the names of this body's fields."""
        if about_chat == "messages":
            return "input"
        sources = {f"messages[{i}]": source for i, (_, source) in enumerate(self._messages())}
        # A message may quote what the client wrote, such as the number of a message that is not there.
        text = re.sub(r"\bmessages\[\d+\]", lambda found: sources.get(found[0], found[0]), about_chat)
        names = {"response_format": "text.format", "max_completion_tokens": "max_output_tokens"}
        return re.sub("|".join(names), lambda found: names[found[0]], text)

    def as_chat(self) -> ChatBody:
        """The chat that asks for the same.

        Raises:
          RefusalError: an input without a message.
          ValidationError: see `ChatBody`.
        """
        messages = [message for message, _ in self._messages()]
        if not messages:
            raise RefusalError(400, "input has no message", param="input")
        shown = self.include or ()
        given = {
            "tools": [{"type": "function", "function": tool.plain()}
                      for tool in self.tools or () if isinstance(tool, ResponseTool)] or None,
            "tool_choice": self._choice(), "parallel_tool_calls": self.parallel_tool_calls,
            "response_format": self._format(), "max_completion_tokens": self.max_output_tokens,
            "max_thinking_tokens": self.max_thinking_tokens,
            "temperature": self.temperature, "top_p": self.top_p, "stream": self.stream,
        }
        if "message.output_text.logprobs" in shown:
            given |= {"logprobs": True, "top_logprobs": self.top_logprobs or 0}
        return ChatBody.model_validate({"model": self.model, "messages": messages}
                                       | {key: value for key, value in given.items() if value is not None})

    def _choice(self) -> Any:
        def named(choice: NamedChoice) -> dict[str, Any]:
            return {"type": "function", "function": {"name": choice.name}}

        if isinstance(self.tool_choice, NamedChoice):
            return named(self.tool_choice)
        if isinstance(self.tool_choice, AllowedChoice):
            return {"type": "allowed_tools", "allowed_tools": {
                "mode": self.tool_choice.mode, "tools": [named(tool) for tool in self.tool_choice.tools]}}
        return self.tool_choice

    def _format(self) -> dict[str, Any] | None:
        form = None if self.text is None else self.text.format
        if form is None:
            return None
        if form.type == "json_schema":
            return {"type": form.type, "json_schema": {"schema": form.schema_, "strict": form.strict}}
        return {"type": form.type} | ({"schema": form.schema_} if form.type == "json_object" else {})


# -------------------------------------------------------------------- answers


class ResponsesForm:
    """Answers of /v1/responses.

    The output is one thought, if there is one, then one message, then calls, as they come; text after a call makes
    another message.
    """

    end = ""

    def __init__(self, service: Service, name: str, body: ResponsesBody, chat: ChatBody, begin: Stage):
        self._tokenizer, self._body = service.tokenizer, body
        self.keeps_markers, self.shown = chat.calls_tools, marks_of_thoughts(service, begin)
        self._reply = ChatReply(service, chat, begin)
        self._logprobs = bool(chat.logprobs)
        self._untold: list[dict[str, Any]] = []
        """Log-probabilities of tokens whose text, or its place, is not known yet."""
        self._items: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None
        """The item that is being written."""
        self._number = 0
        self._frame = {
            "id": _id("resp"), "object": "response", "created_at": int(time.time()), "status": "in_progress",
            "error": None, "incomplete_details": None, "instructions": body.instructions, "model": name, "output": [],
            "max_output_tokens": body.max_output_tokens, "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None, "reasoning": {"effort": None, "summary": None}, "store": False,
            "temperature": body.temperature, "text": {"format": self._format()}, "top_p": body.top_p,
            "tool_choice": "auto" if body.tool_choice is None else _plain(body.tool_choice),
            "tools": [_plain(tool) for tool in body.tools or ()], "truncation": "disabled", "usage": None,
            "metadata": body.metadata or {},
        }
        for field, value in self._frame.items():  # Before the work, not after it.
            try:
                dumped(value).encode()
            except ValueError:
                raise RefusalError(400, f"{field} comes back in the answer and holds what JSON cannot: NaN, an "
                                   "infinity, or half a surrogate pair", param=field) from None

    def _format(self) -> Any:
        form = None if self._body.text is None else self._body.text.format
        return {"type": "text"} if form is None else _plain(form)

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        event = {"type": f"response.{kind}", "sequence_number": self._number} | fields
        self._number += 1
        return event

    def event(self, chunk: dict[str, Any], choices: Choices, asked: Sequence[Request]) -> str:
        del choices, asked
        return f"event: {chunk['type']}\ndata: {dumped(chunk)}\n\n"

    def failure(self, refusal: RefusalError) -> str:
        error = {"code": refusal.code or "server_error", "message": refusal.message}
        failed = self._frame | {"status": "failed", "error": error, "output": self._items}
        return self.event(self._event("failed", response=failed), {}, [])

    def opening(self, choice: int) -> Iterator[dict[str, Any]]:
        del choice
        yield self._event("created", response=dict(self._frame))
        yield self._event("in_progress", response=dict(self._frame))

    def deltas(self, piece: Piece, choice: Choice) -> Iterator[dict[str, Any]]:
        if self._logprobs:
            self._untold += [logprob_entry(self._tokenizer, told) for told in piece.logprobs or ()]
        before = choice.thought_tokens
        events = self._reply.push(piece, choice)
        # Those of a thought, the first tokens of all, have no place in the answer.
        del self._untold[: choice.thought_tokens - before]
        for event in events:
            if isinstance(event, Thought):
                yield from self._thought(event.text)
            elif isinstance(event, Text):
                choice.text += event.text
                yield from self._text(event.text)
            elif isinstance(event, CallStart):
                yield from self._begin_call(event.name)
            elif isinstance(event, CallPiece) and self._open is not None:
                self._open["arguments"] += event.text
                yield self._event("function_call_arguments.delta", **self._place(), delta=event.text)
            elif isinstance(event, (ToolCall, CallCut)):
                yield from self._close("completed" if isinstance(event, ToolCall) else "incomplete")
        if piece.finish is not None:
            if not self._items and self._open is None:  # An answer without a word is a message too.
                yield from self._text("")
            yield from self._close("completed" if choice.finish == "stop" else "incomplete")

    def _thought(self, text: str) -> Iterator[dict[str, Any]]:
        if self._open is None:
            self._open = {"id": _id("rs"), "type": "reasoning", "status": "in_progress", "summary": []}
            yield self._event("output_item.added", output_index=len(self._items), item=dict(self._open))
            part = {"type": "summary_text", "text": ""}
            yield self._event("reasoning_summary_part.added", **self._place(), summary_index=0, part=dict(part))
            self._open["summary"] = [part]
        self._open["summary"][0]["text"] += text
        yield self._event("reasoning_summary_text.delta", **self._place(), summary_index=0, delta=text)

    def _text(self, text: str) -> Iterator[dict[str, Any]]:
        if self._open is not None and self._open["type"] == "reasoning":
            yield from self._close("completed")
        if self._open is None:
            self._open = {"id": _id("msg"), "type": "message", "role": "assistant", "status": "in_progress",
                          "content": []}
            yield self._event("output_item.added", output_index=len(self._items), item=dict(self._open))
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            yield self._event("content_part.added", **self._place(), content_index=0, part=dict(part))
            self._open["content"] = [part]
        part = self._open["content"][0]
        part["text"] += text
        if text:
            logprobs, self._untold = self._untold, []
            part["logprobs"] += logprobs
            yield self._event("output_text.delta", **self._place(), content_index=0, delta=text, logprobs=logprobs)

    def _begin_call(self, name: str) -> Iterator[dict[str, Any]]:
        yield from self._close("completed")
        self._open = {"id": _id("fc"), "type": "function_call", "call_id": _id("call"), "name": name, "arguments": "",
                      "status": "in_progress"}
        yield self._event("output_item.added", output_index=len(self._items), item=dict(self._open))

    def _place(self) -> dict[str, Any]:
        assert self._open is not None
        return {"item_id": self._open["id"], "output_index": len(self._items)}

    def _close(self, status: str) -> Iterator[dict[str, Any]]:
        """Ends the item that is being written."""
        item = self._open
        if item is None:
            return
        item["status"] = status
        if item["type"] == "reasoning":
            [part] = item["summary"]
            yield self._event("reasoning_summary_text.done", **self._place(), summary_index=0, text=part["text"])
            yield self._event("reasoning_summary_part.done", **self._place(), summary_index=0, part=part)
        elif item["type"] == "message":
            [part] = item["content"]
            part["logprobs"] += self._untold
            yield self._event("output_text.done", **self._place(), content_index=0, text=part["text"],
                              logprobs=part["logprobs"])
            yield self._event("content_part.done", **self._place(), content_index=0, part=part)
        else:
            yield self._event("function_call_arguments.done", **self._place(), name=item["name"],
                              arguments=item["arguments"])
        yield self._event("output_item.done", output_index=len(self._items), item=item)
        self._items.append(item)
        self._open = None
        if item["type"] != "reasoning":  # After which come the tokens of the answer.
            self._untold = []

    def closing(self, choices: Choices, asked: Sequence[Request]) -> Iterator[dict[str, Any]]:
        answer = self.whole(choices, asked)
        yield self._event("completed" if answer["status"] == "completed" else "incomplete", response=answer)

    def whole(self, choices: Choices, asked: Sequence[Request]) -> dict[str, Any]:
        cut = choices[0].finish != "stop"
        used = usage_of(choices, asked)
        usage = {"input_tokens": used["prompt_tokens"], "input_tokens_details": used["prompt_tokens_details"],
                 "output_tokens": used["completion_tokens"], "output_tokens_details": used["completion_tokens_details"],
                 "total_tokens": used["total_tokens"]}
        # Programs read the arguments of every call there is: one that was cut is none.
        output = [item for item in self._items if item["type"] != "function_call" or item["status"] == "completed"]
        return self._frame | {
            "status": "incomplete" if cut else "completed", "output": output, "usage": usage,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        }


def _id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(12)}"


def _plain(value: Any) -> Any:
    return value if isinstance(value, str) else value.model_dump(by_alias=True, exclude_none=True)
