"""Functions that a request offers to the model, and which of them it may or must call."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, ModelWrapValidatorHandler, PrivateAttr, Tag, model_validator

from lfm_jax.serve.fields import Body, one_of


class FunctionTool(Body):
    """A function that the model may call."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="a JSON schema; none, or `{}`, means no parameters")
    strict: bool | None = Field(
        None, description="true: refused where the schema cannot be kept; else what cannot be kept is relaxed")
    _keys: tuple[str, ...] = PrivateAttr(())

    @model_validator(mode="wrap")
    @classmethod
    def _remember_order(cls, given: Any, build: ModelWrapValidatorHandler[Self]) -> Self:
        made = build(given)
        made._keys = tuple(given)
        return made

    def plain(self) -> dict[str, Any]:
        """What the client wrote, in the client's order."""
        shown = {"name": self.name, "description": self.description, "parameters": self.parameters or None,
                 "strict": self.strict}
        return {key: shown[key] for key in self._keys if shown.get(key) is not None}


def _tool_kind(value: Any) -> str:
    kind = value.get("type", "function") if isinstance(value, Mapping) else getattr(value, "type", None)
    return "(function)" if kind in ("function", None) else "(other)"


class ToolEntry(Body):
    """An entry of `tools`."""

    type: Literal["function"] | None = None
    function: FunctionTool


class ForeignTool(Body):
    """A tool that is no function."""

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, value: Any) -> Any:
        kind = value.get("type") if isinstance(value, Mapping) else None
        raise ValueError(f"tools of type {json.dumps(kind)[:40]} are not supported; describe a function instead")

    function: Any = None


Tool = Annotated[
    Annotated[ToolEntry, Tag("(function)")] | Annotated[ForeignTool, Tag("(other)")], Discriminator(_tool_kind)
]


class NamedFunction(Body):
    """The function of a choice."""

    name: str


class NamedTool(Body):
    """A choice of one tool."""

    type: Literal["function"]
    function: NamedFunction


class AllowedTools(Body):
    """Tools that may be called, of all that are shown."""

    mode: Literal["auto", "required"] | None = None
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=128)]


class AllowedChoice(Body):
    """A choice among some tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


def _choice_kind(value: Any) -> str | None:
    if isinstance(value, str):
        return "(word)"
    kind = value.get("type") if isinstance(value, Mapping) else getattr(value, "type", None)
    return {"function": "(function)", "allowed_tools": "(allowed)"}.get(str(kind))


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("(word)")] | Annotated[NamedTool, Tag("(function)")]
    | Annotated[AllowedChoice, Tag("(allowed)")],
    one_of(_choice_kind, 'none, auto, required, {"type": "function", ...} or {"type": "allowed_tools", ...}'),
]
