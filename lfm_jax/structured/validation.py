"""Whether values are valid against JSON schemas, by `jsonschema`, and whether patterns are found in texts.

A regular expression, by itself or in a schema, may take for ever on some texts, and holds Python's lock meanwhile: they
are looked at in a process of its own, which is killed where that takes too long.
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

from lfm_jax.worker import EndedError, TooSlowError, Worker

SECONDS = 10.0
"""Most time for one value or text; nearly all take less than a millisecond."""

_PROCESS = Path(__file__).with_name("validator_process.py")


class UnjudgedError(Exception):
    """The validator says nothing of a value or a text.

    Attributes:
      problem: why, in words that many values share.
      at_fault: the schema or the pattern is the reason, and not what was looked at.
    """

    def __init__(self, problem: str, message: str = "", *, at_fault: bool = False):
        super().__init__(f"{problem}: {message}" if message else problem)
        self.problem, self.at_fault = problem, at_fault


def parsed(text: str) -> Any:
    """The value that a JSON text is.

    Raises:
      ValueError: it is no JSON; Python's own `NaN` and `Infinity` are none.
      RecursionError: it is nested too deeply.
    """
    return json.loads(text, parse_constant=_refused)


def _refused(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def is_valid(value: Any, schema: Any) -> bool:
    """Whether a value is valid, formats included, by the draft that the schema names; nothing is fetched.

    Raises:
      UnjudgedError: the schema is not valid itself, or has a reference that leads out of it; or the validator took more
        than SECONDS, or ended.
    """
    return _verdict({"value": value, "schema": schema})


def is_found(pattern: str, text: str) -> bool:
    """Whether a regular expression of Python matches somewhere in a text.

    Raises:
      UnjudgedError: it is none; or it took more than SECONDS, or the process ended.
    """
    return _verdict({"pattern": pattern, "text": text})


def _verdict(question: dict[str, Any]) -> bool:
    try:
        verdict = _worker().ask(question, SECONDS)
    except TooSlowError as error:
        raise UnjudgedError(f"the validator {error}") from None
    except EndedError as error:
        raise UnjudgedError(f"the validator ended with status {error.status}", error.said) from None
    except (TypeError, ValueError, RecursionError) as error:
        raise UnjudgedError(f"the validator raised {type(error).__name__}", str(error)) from None
    if "raised" in verdict:
        raise UnjudgedError(f"the validator raised {verdict['raised']}", verdict["message"],
                            at_fault=verdict["at_fault"])
    return verdict["yes"]


@functools.cache
def _worker() -> Worker:
    # -P: the modules beside the process do not hide others of their names.
    return Worker([sys.executable, "-P", str(_PROCESS), str(round(2 * SECONDS))])


def check_schema(schema: Any) -> str | None:
    """Why a schema is none, by the draft that it names; None: it is one."""
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import Draft202012Validator, validator_for

    try:
        validator_for(schema, default=Draft202012Validator).check_schema(schema)
    except SchemaError as error:
        return error.message
    return None


def missing_reference(schema: Any) -> str | None:
    """The first reference of a schema that leads to nothing within it; None: there is none."""
    from jsonschema_specifications import REGISTRY
    from referencing import Resource
    from referencing.exceptions import Unresolvable
    from referencing.jsonschema import DRAFT202012

    root = Resource.from_contents(schema, default_specification=DRAFT202012)
    left = [(root, REGISTRY.resolver_with_root(root))]
    while left:
        part, resolver = left.pop()
        names = part.contents if isinstance(part.contents, dict) else {}
        for key in ("$ref", "$dynamicRef"):
            if isinstance(names.get(key), str):
                try:
                    resolver.lookup(names[key])
                except Unresolvable:
                    return names[key]
        left += [(inner, resolver.in_subresource(inner)) for inner in part.subresources()]
    return None
