"""Bodies of requests, as OpenAI's clients send them, and their translation for the engine.

A field that is unknown, or has a value that the engine cannot honour, is refused: nothing is ignored.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ModelWrapValidatorHandler, PrivateAttr, model_validator

from lfm_jax.sampling import Sampling
from lfm_jax.structured.grammar import Grammar
from lfm_jax.text.tool_schemas import tool_schemas

MAX_STOPS = 8
MAX_TOP_LOGPROBS = 20

Stop = Annotated[str, Field(min_length=1, max_length=256)]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class StreamOptions(_Body):
    include_usage: bool = False
    include_obfuscation: Literal[False, None] = None


class _Shared(_Body):
    """Fields that both kinds of completion share."""

    model: str
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    seed: Seed | None = None
    temperature: Annotated[float, Field(ge=0, le=10, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    logit_bias: dict[str, Bias] | None = None
    # Extensions that other servers of open models have too.
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=10, allow_inf_nan=False)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    skip_special_tokens: bool | None = None
    # These do not change the answer.
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    # Accepted only with the value that changes nothing.
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None

    @model_validator(mode="after")
    def _streaming(self) -> _Shared:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        if self.logit_bias and not all(key.isascii() and key.isdigit() and len(key) < 10 for key in self.logit_bias):
            raise ValueError("logit_bias must map token ids (as texts) to numbers")
        return self

    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def biases(self) -> dict[int, float]:
        """Returns the biases by token id; as in OpenAI's API, -100 forbids a token."""
        return {int(key): -float("inf") if value == -100 else value for key, value in (self.logit_bias or {}).items()}

    def sampling(self, default: Sampling, seed: int) -> Sampling:
        """Returns the sampling parameters: those of the body, else of `default`, and `seed` where the body has none."""
        given: dict[str, Any] = {
            "temperature": self.temperature, "top_p": self.top_p, "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty, "top_k": None if self.top_k is None else max(self.top_k, 0),
            "seed": seed if self.seed is None else self.seed % 2**32,
        }
        fields: dict[str, Any] = {name: getattr(default, name) for name in Sampling.__dataclass_fields__}
        return Sampling(**fields | {name: value for name, value in given.items() if value is not None})


Ids = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1, fail_fast=True)]
"""Fails fast, because collecting an error for every element of a long list takes seconds."""


class CompletionBody(_Shared):
    """POST /v1/completions."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=256, fail_fast=True)] | Ids | Annotated[
        list[Ids], Field(min_length=1, max_length=256, fail_fast=True)]
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    best_of: int | None = None
    suffix: Literal[""] | None = None

    @model_validator(mode="after")
    def _one_of_each(self) -> CompletionBody:
        if self.best_of not in (None, self.n or 1):
            raise ValueError("best_of must equal n: every continuation is returned")
        return self

    def prompts(self) -> list[str | list[int]]:
        """Returns the prompts, texts or lists of ids."""
        prompt: Any = self.prompt
        return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else list(prompt)


class TextPart(_Body):
    type: Literal["text"]
    text: str


class CalledFunction(_Body):
    name: str
    arguments: str


class CalledTool(_Body):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(_Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(max_length=1024, fail_fast=True)] | None = None
    name: str | None = None
    tool_calls: Annotated[list[CalledTool], Field(max_length=128, fail_fast=True)] | None = None
    tool_call_id: str | None = None
    refusal: None = None
    # Clients send back the messages that they got.
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None

    def plain(self) -> dict[str, Any]:
        """Returns the message as templates take it: text for content, calls with parsed arguments."""
        content = self.content
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        if content is None and not self.tool_calls:
            raise ValueError(f"a message of role {self.role} has no content")
        message: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role,
                                   "content": content or ""}
        if self.tool_calls:
            if self.role != "assistant":
                raise ValueError(f"a message of role {self.role} has tool_calls; only the assistant's may")
            message["tool_calls"] = [
                {"id": call.id, "name": call.function.name, "arguments": _arguments(call.function)}
                for call in self.tool_calls
            ]
        rest = {"name": self.name, "tool_call_id": self.tool_call_id}
        return message | {key: value for key, value in rest.items() if value is not None}


def _arguments(function: CalledFunction) -> dict[str, Any]:
    try:
        arguments = json.loads(function.arguments or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise ValueError(f"arguments of the call of {function.name!r} are not a JSON object")
    return arguments


class FunctionTool(_Body):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    _keys: tuple[str, ...] = PrivateAttr(())

    @model_validator(mode="wrap")
    @classmethod
    def _remember_order(cls, given: Any, build: ModelWrapValidatorHandler[Self]) -> Self:
        made = build(given)
        made._keys = tuple(given)
        return made

    def plain(self) -> dict[str, Any]:
        """Returns the tool as the template shows it: the fields that the client sent, in the client's order."""
        shown = self.model_dump(exclude_none=True, exclude={"strict"})
        return {key: shown[key] for key in self._keys if key in shown}


class ToolEntry(_Body):
    type: Literal["function"]
    function: FunctionTool


class NamedFunction(_Body):
    name: str


class NamedTool(_Body):
    type: Literal["function"]
    function: NamedFunction


class JsonSchemaFormat(_Body):
    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | bool = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(_Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("response_format must have json_schema if its type is json_schema, and only then")
        return self


class ChatBody(_Shared):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096, fail_fast=True)]
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    tools: Annotated[list[ToolEntry], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    modalities: list[Literal["text"]] | None = None

    @model_validator(mode="after")
    def _fits_together(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise ValueError("tool_choice asks for a tool, but there are no tools")
        if self.calls_tools and self.response_format is not None and self.response_format.type != "text":
            raise ValueError("tools and response_format can be combined only with tool_choice none")
        return self

    @property
    def calls_tools(self) -> bool:
        """Whether a tool may be called."""
        return bool(self.tools) and self.tool_choice != "none"

    @functools.cached_property
    def schemas(self) -> list[dict[str, Any]] | None:
        """The schemas of the tools as the template shows them, None without tools."""
        tools = [tool.function.plain() for tool in self.tools or ()]
        return tool_schemas(tools) if tools else None

    def grammar(self) -> Grammar | None:
        """Returns the grammar that the answer must follow, if any.

        Raises:
          GrammarError: a schema or a tool is not supported.
        """
        if self.calls_tools:
            name = self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None
            return Grammar.tool_calls(self.schemas or (), required=self.tool_choice == "required", name=name,
                                      parallel=self.parallel_tool_calls is not False)
        form = self.response_format
        if form is None or form.type == "text":
            return None
        if form.json_schema is None:
            return Grammar.json_object()
        return Grammar.json_schema(form.json_schema.schema_)


def plain_messages(messages: Sequence[ChatMessage]) -> list[Mapping[str, Any]]:
    """Returns messages as `Service.encode_chat` takes them.

    Raises:
      ValueError: a message has no content, or its calls are not valid.
    """
    return [message.plain() for message in messages]
