"""What calls of tools are made of, in the syntax of Python and of JSON: names, numbers, escapes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

MAX_DEPTH = 64
"""How deep lists and dicts may stand inside each other in the arguments of a call."""
SURROGATE = re.compile("[\ud800-\udfff]")


class NotACall(Exception):
    """A text is no call of a tool."""


ESCAPE = re.compile(r"\\(?:x(H{2})|u(H{4})|U(H{8})|([0-7]{1,3})|(.))".replace("H", "[0-9a-fA-F]"), re.DOTALL)
_LETTERS: dict[str, str] = dict(zip("abfnrtv\\'\"/\n", [*"\a\b\f\n\r\t\v\\'\"/", ""], strict=True))


def unescape(match: re.Match[str]) -> str:
    """What an escape stands for, which may be half of a surrogate pair.

    Raises:
      NotACall: Python knows no such escape.
    """
    hexadecimal, octal, other = match[1] or match[2] or match[3], match[4], match[5]
    if other:
        if other in "xuUN":
            raise NotACall
        return _LETTERS.get(other, match[0])  # Python keeps the backslash where it escapes nothing.
    code = int(hexadecimal, 16) if hexadecimal else int(octal, 8)
    if code > 0x10FFFF:
        raise NotACall
    return chr(code)


def number_of(sign: str, digits: str) -> int | float:
    """A number that JSON can hold.

    Raises:
      NotACall: it is none.
    """
    is_float = bool(set(digits) & set(".eE")) and digits[1:2] not in ("x", "X")
    try:
        number = float(digits) if is_float else int(digits, 0)
        str(number)  # Python refuses to print what is too long, and then JSON cannot hold it.
    except ValueError:
        raise NotACall from None
    if number == math.inf:
        raise NotACall
    return -number if sign == "-" else number


def is_name(name: str) -> bool:
    """Whether a call may have this name in Python's syntax: identifiers, dots between them."""
    return all(_is_word(part) for part in name.split("."))


def is_pythonic(name: str, keys: Iterable[Any]) -> bool:
    """Whether a call is written in Python's syntax: its name, perhaps dotted, and its keys are identifiers.

    Those with combining marks are not: letters of their own make a word for the parser.
    """
    return is_name(name) and all(isinstance(key, str) and _is_word(key) for key in keys)


def _is_word(name: str) -> bool:
    return name.isidentifier() and re.fullmatch(r"\w+", name) is not None
