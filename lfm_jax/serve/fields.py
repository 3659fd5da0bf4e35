"""What the server does with the fields of a request: one rule, for bodies and for everything inside them.

- null is as good as leaving a field out.
- A field that cannot change the answer, a hint, and what an answer or a client library brings back are accepted.
- An official field that would change the answer and cannot be honoured is refused by name, unless its value is neutral.
- An unknown field is accepted; its name goes to the log, once, and to the header UNKNOWN_HEADER of the answer.

`Ignored` and `Refused` mark the second and the third kind in the models of `protocol` and `responses`; the rest is
honoured. The tables in the docs are made from these models.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Discriminator, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from lfm_jax.files import say

UNKNOWN_HEADER = "x-lfm-unknown-fields"
"""Header of an answer with the names of the request's fields that the server does not know."""
RELAXED_HEADER = "x-lfm-relaxed"
"""Header of an answer with the places of what tools ask for and their calls do not promise."""
MAX_NAMED = 16
"""How many fields or places a header names at most."""
MAX_LOGGED = 256
"""How many unknown fields the log names at most in the life of a process."""

ECHO = "what an answer or a client library brings back"
ACCOUNT = "it is about the client's account, not about the answer"
CACHE = "prompts with a common beginning are cached by themselves"
HINT = "a hint; the model has no such setting"
STORAGE = "nothing is stored"


class Body(BaseModel):
    """A JSON object of a request."""

    model_config = ConfigDict(extra="allow", populate_by_name=True)


class FieldError(ValueError):
    """A request asks for what cannot be.

    Args:
      field: the field that it is about, as `place` names it.
    """

    def __init__(self, field: str, message: str):
        super().__init__(message)
        self.field = field


@dataclasses.dataclass(frozen=True)
class Ignored:
    """Marks a field that is accepted with any value and changes nothing."""

    why: str


class Refused:
    """Marks a field that must be null, empty, false or neutral; another value is an error that says what to do."""

    def __init__(self, instead: str, *neutral: Any):
        self.instead, self.neutral = instead, neutral

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def _check(self, value: Any) -> Any:
        if value and value not in self.neutral:
            raise ValueError(f"not supported: {self.instead}")
        return value


@contextlib.contextmanager
def blamed(field: str) -> Generator[None]:
    """Errors of what a field asks for name the field."""
    try:
        yield
    except FieldError:
        raise
    except ValueError as error:
        raise FieldError(field, str(error)) from None


def one_of(kind: Callable[[Any], str | None], expected: str) -> Discriminator:
    """Chooses the one member of a union that a value is meant to be, so that errors are about that one alone.

    Tags are in brackets: `place` leaves them out.
    """
    return Discriminator(kind, custom_error_type="unexpected", custom_error_message=f"expected {expected}")


def place(location: Sequence[str | int]) -> str:
    """A field as OpenAI's errors name it, `messages[0].content`, from the location of an error."""
    text = ""
    for part in location:
        if isinstance(part, int):
            text += f"[{part}]"
        elif not part.startswith("("):
            text += f".{part}" if text else part
    return text


def unknown_fields(body: Body) -> list[str]:
    """The fields of a request that its models do not have and that are not null, as `messages[].colour`, each once."""
    return list(dict.fromkeys(_unknown(body, "")))


def _unknown(value: Any, place: str) -> Iterator[str]:
    if isinstance(value, Body):
        yield from (f"{place}{_harmless(name)}"
                    for name, extra in (value.model_extra or {}).items() if extra is not None)
        for name in value.model_fields_set:
            yield from _unknown(getattr(value, name, None), f"{place}{name}.")
    elif isinstance(value, list) and value and isinstance(value[0], Body):
        for item in value:
            yield from _unknown(item, f"{place.removesuffix('.')}[].")


def _harmless(name: str) -> str:
    """A name from a stranger, as a header and a log can carry it."""
    return re.sub("[^ -~]", "?", name)[:100]


def relaxed_header(places: Sequence[str]) -> dict[str, str]:
    """The header of an answer whose calls do not promise all that tools ask for (`Grammar.relaxed`)."""
    return {RELAXED_HEADER: "; ".join(_harmless(place) for place in places[:MAX_NAMED])} if places else {}


class UnknownFieldLog:
    """Names unknown fields in the log, each once in the life of a process."""

    def __init__(self) -> None:
        self._named: set[str] = set()

    def headers(self, body: Body, request: str) -> dict[str, str]:
        """The headers of an answer, after naming what is new in the log.

        Args:
          request: the name of the request in the log.
        """
        names = unknown_fields(body)
        for name in names:
            if name not in self._named and len(self._named) < MAX_LOGGED:
                self._named.add(name)
                say(f"request {request} has the unknown field {name}; it is ignored")
        return {UNKNOWN_HEADER: ", ".join(names[:MAX_NAMED])} if names else {}


def described(model: type[Body]) -> list[tuple[str, str]]:
    """The fields of a model, each with what happens to it, in Markdown."""
    rows = []
    for name, field in model.model_fields.items():
        mark = next((m for m in field.metadata if isinstance(m, (Ignored, Refused))), None)
        if isinstance(mark, Ignored):
            what = f"accepted, changes nothing: {mark.why}"
        elif isinstance(mark, Refused):
            values = ["null", *(json.dumps(value) for value in mark.neutral)]
            what = f"{' or '.join(f'`{value}`' for value in values)}, else refused: {mark.instead}"
        else:
            what = f"honoured{f': {field.description}' if field.description else ''}"
        rows.append((field.alias or name, what))
    return rows
