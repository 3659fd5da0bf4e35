"""Messages of a chat, as clients send them and as templates take them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from lfm_jax.serve.fields import CACHE, ECHO, Body, FieldError, Ignored, Refused, one_of


class TextPart(Body):
    """A part of a content."""

    type: Literal["text", "input_text", "output_text"]
    text: str
    annotations: Annotated[Any, Ignored(ECHO)] = None
    logprobs: Annotated[Any, Ignored(ECHO)] = None
    prompt_cache_breakpoint: Annotated[Any, Ignored(CACHE)] = None
    cache_control: Annotated[Any, Ignored(CACHE)] = None


class RefusalPart(Body):
    """What another model gave instead of an answer."""

    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        return self.refusal


_FOREIGN = {"image_url": "images", "input_image": "images", "image": "images", "input_audio": "audio",
            "audio_url": "audio", "video_url": "video", "file": "files", "input_file": "files"}


class ForeignPart(Body):
    """A part that the model cannot read."""

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, value: Any) -> Any:
        kind = value.get("type") if isinstance(value, Mapping) else None
        if isinstance(kind, str) and kind in _FOREIGN:
            raise ValueError(f"{_FOREIGN[kind]} are not supported; the model reads text only")
        raise ValueError(f'a part has the type "text" and a text, not {json.dumps(kind)[:40]}')

    text: str = ""


def _part_kind(value: Any) -> str:
    kind = value.get("type") if isinstance(value, Mapping) else getattr(value, "type", None)
    tags = {"text": "(text)", "input_text": "(text)", "output_text": "(text)", "refusal": "(refusal)"}
    return tags.get(str(kind), "(other)")


Part = Annotated[
    Annotated[TextPart, Tag("(text)")] | Annotated[RefusalPart, Tag("(refusal)")]
    | Annotated[ForeignPart, Tag("(other)")],
    Discriminator(_part_kind),
]
Content = Annotated[
    Annotated[str, Tag("(text)")] | Annotated[list[Part], Field(max_length=1024, fail_fast=True), Tag("(parts)")],
    one_of(lambda value: "(text)" if isinstance(value, str) else "(parts)" if isinstance(value, list) else None,
           "a text or a list of parts"),
]


def joined(content: str | Sequence[Any] | None) -> str | None:
    """The text of a content."""
    return content if content is None or isinstance(content, str) else "".join(part.text for part in content)


class CalledFunction(Body):
    """The function of a call."""

    name: str
    arguments: str | dict[str, Any] | None = None
    parsed_arguments: Annotated[Any, Ignored(ECHO)] = None

    def plain(self) -> dict[str, Any]:
        """Name and arguments as templates take them."""
        arguments: Any = self.arguments
        if not isinstance(arguments, dict):
            try:
                arguments = json.loads(arguments or "{}")
            except (ValueError, RecursionError):
                arguments = None
        if not isinstance(arguments, dict):
            raise ValueError(f"arguments of the call of {self.name!r} are not a JSON object")
        return {"name": self.name, "arguments": arguments}


class CalledTool(Body):
    """A call in a message."""

    id: str | None = None
    type: Literal["function"] | None = None
    function: CalledFunction
    index: Annotated[Any, Ignored(ECHO)] = None


class ChatMessage(Body):
    """A message of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"] = Field(
        description="`developer` is `system`, `function` is `tool`")
    content: Content | None = Field(None, description="a text, or parts of type `text` (or `refusal`)")
    name: str | None = None
    tool_calls: Annotated[list[CalledTool], Field(max_length=128, fail_fast=True)] | None = None
    tool_call_id: str | None = None
    function_call: CalledFunction | None = Field(None, description="as one of `tool_calls`")
    refusal: str | None = Field(None, description="the content, where there is none")
    reasoning_content: str | None = Field(
        None, description="of the assistant: its thought; the chat template's own rule says whether the prompt has it")
    prefix: bool | None = Field(None, description="of the last message: the answer continues it")
    audio: Annotated[Any, Refused("the model reads text only")] = None
    annotations: Annotated[Any, Ignored(ECHO)] = None
    parsed: Annotated[Any, Ignored(ECHO)] = None
    reasoning: Annotated[Any, Ignored(ECHO)] = None
    provider_specific_fields: Annotated[Any, Ignored(ECHO)] = None
    id: Annotated[Any, Ignored(ECHO)] = None
    index: Annotated[Any, Ignored(ECHO)] = None
    tool_name: Annotated[Any, Ignored(ECHO)] = None
    tokens: Annotated[Any, Ignored(ECHO)] = None
    status: Annotated[Any, Ignored(ECHO)] = None

    def plain(self) -> dict[str, Any]:
        """As templates take it: text for content, calls with parsed arguments.

        Raises:
          ValueError: calls that are none, or of another role than the assistant's.
        """
        calls = [{"id": call.id, **call.function.plain()} for call in self.tool_calls or ()]
        calls += [self.function_call.plain()] if self.function_call is not None else []
        content = joined(self.content)
        if content is None:
            content = self.refusal or ""
            if self.role in ("system", "developer", "user"):
                raise ValueError(f"a message of role {self.role} has no content")
        role = {"developer": "system", "function": "tool"}.get(self.role, self.role)
        message: dict[str, Any] = {"role": role, "content": content}
        if calls:
            if self.role != "assistant":
                raise ValueError(f"a message of role {self.role} has tool_calls; only the assistant's may")
            message["tool_calls"] = [{key: value for key, value in call.items() if value is not None}
                                     for call in calls]
        thought = self.reasoning_content if self.role == "assistant" else None
        given = {"name": self.name, "tool_call_id": self.tool_call_id, "reasoning_content": thought or None}
        return message | {key: value for key, value in given.items() if value is not None}


def plain_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """As `Service.encode_chat` takes them.

    Raises:
      FieldError: the first message that is not valid, by its number.
    """
    plain = []
    for i, message in enumerate(messages):
        try:
            plain.append(message.plain())
        except ValueError as error:
            raise FieldError(f"messages[{i}]", f"messages[{i}]: {error}") from None
    return plain
