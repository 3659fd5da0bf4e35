"""Rewards that a program can verify: what an answer is worth, by its text and by the example that was asked.

A reward is a function `(completion, example) -> float`. Those of `REWARDS` give 1 or 0, and read of the example:

- `tool_call`: `tool_calls`, the calls that are right, each with `name` and `arguments`, itself or in its `function`;
  `tools`, their schemas, where positional arguments shall count.
- `json_schema`: `schema` of the answer, as data or as JSON text.
- `answer`: `answer`, a text or a number; of a solution as in GSM8K what follows ####.
- `regex`: `pattern`, in Python's syntax.
- `length`: `min_length` and `max_length`, characters of the answer; one may be left out.

All but `tool_call` and `answer` want the whole completion to be the answer: a thought before it is to be taken off.
"""

from __future__ import annotations

import collections
import difflib
import functools
import importlib
import importlib.util
import json
import math
import numbers
import re
import sys
import unicodedata
from collections.abc import Callable, Mapping
from decimal import Decimal
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from lfm_jax.files import say
from lfm_jax.problems import raise_problems
from lfm_jax.structured.validation import UnjudgedError, check_schema, is_found, is_valid, missing_reference, parsed
from lfm_jax.text.tools import parse_tool_calls

Example = Mapping[str, Any]
Reward = Callable[[str, Example], float]


class Rewarded(NamedTuple):
    """What one completion is worth."""

    total: float
    """The weighted sum."""
    by_name: dict[str, float]
    """Each reward, unweighted."""


class Rewards:
    """Several weighted rewards as one.

    Args:
      weights: by the name of a reward: one of `REWARDS`, or a function of one's own, as `module:function` of a module
        that Python can import, or `path/of/file.py:function`.
      defaults: fields of examples that do not have them, such as `max_length`.

    Raises:
      ValueError: on construction: no rewards, rewards that are not found, weights that are not finite.
      ImportError: on construction: a reward needs a library that is not installed.
    """

    def __init__(self, weights: Mapping[str, float], defaults: Example | None = None):
        if not weights:
            raise ValueError(f"there are no rewards; name some of {', '.join(REWARDS)}, or module:function")
        raise_problems("these rewards have no finite weight", [
            f"{name}: {weight!r}" for name, weight in weights.items() if not _is_finite(weight)
        ])
        self._weights, self._defaults = dict(weights), dict(defaults or {})
        self._rewards = {name: find_reward(name) for name in weights}

    def __call__(self, completion: str, example: Example) -> Rewarded:
        """What a completion is worth. An example may say where it stands, in `file` and `line`.

        Raises:
          ValueError: a reward raised something, or returned what is not a finite number; it says which reward, of which
            example, and what.
        """
        example = {**self._defaults, **example}
        by_name = {name: _called(name, reward, completion, example) for name, reward in self._rewards.items()}
        return Rewarded(sum(weight * by_name[name] for name, weight in self._weights.items()), by_name)


def find_reward(name: str) -> Reward:
    """The reward that a name means (`Rewards`).

    Raises:
      ValueError: there is none, or what is there cannot be called.
      ImportError: it needs a library that is not installed.
    """
    if name == "json_schema":
        _need_jsonschema()
    if name in REWARDS:
        return REWARDS[name]
    where, colon, attribute = name.rpartition(":")
    if not (colon and where and attribute):
        near = difflib.get_close_matches(name, REWARDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(REWARDS)}; or name module:function"
        raise ValueError(f"there is no reward {name!r}; {hint}")
    try:
        module = _module_of_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    except Exception as error:
        raise ValueError(f"reward {name!r}: importing {where} raised {type(error).__name__}: {error}") from error
    found = getattr(module, attribute, None)
    if not callable(found):
        raise ValueError(f"reward {name!r}: {where} has no function {attribute!r}")
    return found


def _module_of_file(path: Path) -> ModuleType:
    """Runs a file as a module, once."""
    name = str(path.resolve())
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no module")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _called(name: str, reward: Reward, completion: str, example: Example) -> float:
    try:
        value = reward(completion, example)
    except Exception as error:
        raise ValueError(f"reward {name!r} raised {type(error).__name__}: {error}{_place(example)}") from error
    if not _is_finite(value):
        raise ValueError(f"reward {name!r} returned {value!r:.80}; expected a finite number{_place(example)}")
    return float(value)


def _is_finite(value: Any) -> bool:
    try:
        return isinstance(value, numbers.Real) and math.isfinite(value)
    except OverflowError:  # An int that no float can hold.
        return False


def _place(example: Example) -> str:
    if "file" not in example:
        return f" (example {dict(example)!r:.200})"
    return f" ({example['file']}:{example['line']})" if "line" in example else f" ({example['file']})"


def _field(example: Example, name: str, kind: type | tuple[type, ...], expected: str) -> Any:
    if name not in example:
        raise ValueError(f"the example has no field {name!r}; expected {expected}")
    if not isinstance(example[name], kind) or isinstance(example[name], bool):
        raise ValueError(f"the field {name!r} of the example is {example[name]!r:.80}; expected {expected}")
    return example[name]


# -------------------------------------------------------------------- calls of tools


def tool_call(completion: str, example: Example) -> float:
    """Whether the calls of a reply are the right ones, in whatever order; their arguments are compared as JSON values,
    and what the reply says besides does not matter. Where no call is right, a reply without calls is.

    Raises:
      ValueError: `tool_calls` is not a list of calls.
    """
    right = [_reference_call(call) for call in _field(example, "tool_calls", (list, tuple), "a list of calls")]
    _, calls = parse_tool_calls(completion, example.get("tools") or ())
    made = [_as_text(call.name, call.arguments) for call in calls]
    return float(collections.Counter(made) == collections.Counter(right))


def _reference_call(call: Any) -> str:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not (isinstance(function.get("name"), str) and "arguments" in function):
        raise ValueError(f"each of tool_calls must have a name and arguments, itself or in its function: {call!r:.80}")
    arguments = function["arguments"]
    arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    if not isinstance(arguments, Mapping):
        raise ValueError(f"the arguments of a call of {function['name']!r} are {arguments!r:.80}; expected an object")
    return _as_text(function["name"], arguments)


def _as_text(name: str, arguments: Mapping[str, Any]) -> str:
    """A text that calls share if and only if they are the same."""
    return json.dumps([name, _as_value(arguments)], sort_keys=True)


def _as_value(value: Any) -> Any:
    """JSON knows no difference between 1 and 1.0."""
    if isinstance(value, Mapping):
        return {key: _as_value(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_as_value(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


# -------------------------------------------------------------------- JSON of a schema


def json_schema(completion: str, example: Example) -> float:
    """Whether a completion is JSON, and nothing else, that a schema allows. References are followed within the schema.

    Raises:
      ValueError: `schema` is no schema, or has a reference that leads out of it.
    """
    schema = _field(example, "schema", (Mapping, str), "a JSON schema, as an object or as text")
    schema = _schema(schema if isinstance(schema, str) else json.dumps(schema))
    try:
        value = parsed(completion)
    except (ValueError, RecursionError):  # Of what the model wrote nothing is an error.
        return 0.0
    return _judged(is_valid, value, schema)


@functools.lru_cache(256)
def _schema(text: str) -> Any:
    """The schema that a text is."""
    schema = json.loads(text)
    if (wrong := check_schema(schema)) is not None:
        raise ValueError(f"the field 'schema' of the example is no JSON schema: {wrong:.200}")
    # Else only an answer that comes to it would show it, hours after the run began.
    if (where := missing_reference(schema)) is not None:
        raise ValueError(f"the field 'schema' of the example has a reference that leads out of it: {where:.200}")
    return schema


def _need_jsonschema() -> None:
    if importlib.util.find_spec("jsonschema") is None:
        raise ImportError("the reward json_schema needs jsonschema: pip install 'lfm_jax[post]'")


def _judged(judge: Callable[..., bool], *question: Any) -> float:
    """What the process of `structured.validation` says; nothing is worth an answer that it did not come back from."""
    try:
        return float(judge(*question))
    except UnjudgedError as error:
        if error.at_fault:
            raise ValueError(str(error)) from None
        say(f"an answer is worth 0 to {judge.__name__}: {error}")
        return 0.0


# -------------------------------------------------------------------- answers


_NUMBER = re.compile(
    r"(?P<minus>(?<![\w)])-)?[$€£]?(?<!\w)"
    r"(?P<digits>(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
    r"(?:[eE][-+]?[0-9]{1,3}(?!\w))?)"  # Decimal refuses some longer exponents, and no float has one.
)
_SPACE = re.compile(r"\s+")
_AROUND = " .,;:!?\"'`*\u2018\u2019\u201c\u201d"


def answer(completion: str, example: Example) -> float:
    """Whether a completion gives the answer. Of a number it is the last number that counts, whatever is said around it,
    as GSM8K is scored; a text must be the whole completion, but for case, blanks, and punctuation around it.

    Raises:
      ValueError: `answer` is neither a number nor a text of more than punctuation.
    """
    given = _field(example, "answer", (str, int, float), "a text or a number")
    right = str(given).rpartition("####")[2]
    expected, text = _the_number(right), _normal(right)
    if expected is not None:
        return float(_last_number(completion) == expected)
    if not text or not isinstance(given, str):  # NaN and infinity are no numbers.
        raise ValueError(f"the field 'answer' of the example is {example['answer']!r}; expected a text or a number")
    return float(_normal(completion) == text)


def _the_number(text: str) -> Decimal | None:
    """The number that a text is, or None."""
    match = _NUMBER.fullmatch(_with_minus(text).strip().removesuffix("%").removesuffix("."))
    return _value(match) if match else None


def _last_number(text: str) -> Decimal | None:
    matches = [*_NUMBER.finditer(_with_minus(text))]
    return _value(matches[-1]) if matches else None


def _with_minus(text: str) -> str:
    return text.replace("\u2212", "-")


def _value(match: re.Match[str]) -> Decimal:
    value = Decimal(match["digits"].replace(",", ""))
    return value.copy_negate() if match["minus"] else value


def _normal(text: str) -> str:
    return _SPACE.sub(" ", unicodedata.normalize("NFKC", text).casefold()).strip(_AROUND)


# -------------------------------------------------------------------- form


def regex(completion: str, example: Example) -> float:
    """Whether a pattern is found in a completion; `^` and `$` hold it to the ends.

    Raises:
      re.error: `pattern` is none.
      ValueError: it is no text.
    """
    pattern = _field(example, "pattern", str, "a regular expression")
    re.compile(pattern)
    return _judged(is_found, pattern, completion)


def length(completion: str, example: Example) -> float:
    """Whether a completion has at least `min_length` and at most `max_length` characters.

    Raises:
      ValueError: neither is given, or they are not numbers.
    """
    given = [name for name in ("min_length", "max_length") if name in example]
    if not given:
        raise ValueError("the example has neither 'min_length' nor 'max_length'; expected a number of characters")
    bounds = {name: _field(example, name, (int, float), "a number of characters") for name in given}
    return float(bounds.get("min_length", 0) <= len(completion) <= bounds.get("max_length", math.inf))


REWARDS: dict[str, Reward] = {
    "tool_call": tool_call, "json_schema": json_schema, "answer": answer, "regex": regex, "length": length,
}
"""By the name that a recipe gives them."""
