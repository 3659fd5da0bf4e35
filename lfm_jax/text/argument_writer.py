"""The arguments of a call of a tool as JSON, while the call is being written."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Mapping
from typing import Any

from lfm_jax.text.call_literals import ESCAPE, MAX_DEPTH, SURROGATE, NotACall, is_name, number_of, unescape


class ArgumentWriter:
    """Writes the arguments of a call as JSON while the call arrives, character by character, as `json.dumps` would.

    It stops where that is not certain, as at what may be no call. Nothing is read twice, so that time is linear.
    """

    def __init__(self):
        self.name: str | None = None
        """Of the call, once it is known."""
        self._written: list[str] = []
        self._taken = 0  # How many of them were taken.
        self._done = False
        self._steps: Generator[None, str] | None = self._call()
        next(self._steps)

    def send(self, c: str) -> None:
        """Goes on by a character."""
        if self._steps is None:
            return
        try:
            self._steps.send(c)
        except StopIteration:
            self._steps, self._done = None, True
        except NotACall:
            self._steps = None

    def take(self) -> str:
        """What was written since the last time."""
        text = "".join(self._written[self._taken :])
        self._taken = len(self._written)
        return text

    def rest(self, name: str, arguments: Mapping[str, Any]) -> str | None:
        """What is still to be written of the call that it was; None where what was written is not how it begins."""
        if self._done:
            return ""
        if self.name not in (None, name):
            return None
        written, whole = "".join(self._written), json.dumps(arguments, ensure_ascii=False)
        return whole[len(written) :] if whole.startswith(written) else None

    def _call(self) -> Generator[None, str]:
        c = yield
        if c == "{":
            yield from self._json_call()
            return
        name, c = yield from _word(c, "_.")
        c = yield from _blanks(c)
        if c != "(" or not is_name(name):
            raise NotACall
        self.name = name
        self._write("{")
        c, keywords = (yield from _blanks((yield))), set()
        while c != ")":
            keyword, c = yield from _word(c, "_")
            c = yield from _blanks(c)
            if c != "=" or not keyword.isidentifier() or keyword in keywords:
                raise NotACall
            self._write((", " if keywords else "") + json.dumps(keyword, ensure_ascii=False) + ": ")
            keywords.add(keyword)
            c = yield from self._value((yield from _blanks((yield))))
            c = yield from _next(c, ")")
        self._write("}")

    def _json_call(self) -> Generator[None, str]:
        """A call as an object: its name first, then its arguments, an object."""
        c = yield from _blanks((yield))
        for key in ("name", "arguments"):
            found, c = yield from self._key(c)
            if found != key and (key, found) != ("arguments", "parameters"):
                raise NotACall
            if key == "name":
                self.name, c = yield from self._key(c, "")
                if c != "," or not self.name:
                    self.name = None
                    raise NotACall
                c = yield from _blanks((yield))
        if c != "{":
            raise NotACall
        c = yield from self._value(c, 1)
        if (yield from _blanks(c)) != "}":
            raise NotACall

    def _key(self, c: str, colon: str = ":") -> Generator[None, str, tuple[str, str]]:
        """A string that is not written, then a colon, and what comes after both."""
        pieces: list[str] = []
        c = yield from self._string(c, pieces.append)
        if colon:
            if c != colon:
                raise NotACall
            c = yield from _blanks((yield))
        return json.loads("".join(pieces)), c

    def _write(self, text: str) -> None:
        self._written.append(text)

    def _value(self, c: str, depth: int = 0) -> Generator[None, str, str]:
        """A literal that begins with `c`; what comes after it is given back."""
        if depth > MAX_DEPTH:
            raise NotACall
        if c in "\"'":
            return (yield from self._string(c, self._write))
        if c in "[{":
            return (yield from self._items(c, depth))
        if c in "+-." or c.isdecimal():
            sign = c if c in "+-" else ""
            c = (yield from _blanks((yield))) if sign else c
            number, c = yield from _digits(c)
            self._write(json.dumps(number_of(sign, number)))
            return c
        word, c = yield from _word(c, "_")
        if word not in _WORDS:
            raise NotACall
        self._write(_WORDS[word])
        return c

    def _items(self, c: str, depth: int) -> Generator[None, str, str]:
        close, comma = "]" if c == "[" else "}", ""
        self._write(c)
        c = yield from _blanks((yield))
        while c != close:
            self._write(comma)
            comma = ", "
            if close == "}":
                c = yield from self._string(c, self._write)
                if c != ":":
                    raise NotACall
                self._write(": ")
                c = yield from _blanks((yield))
            c = yield from self._value(c, depth + 1)
            c = yield from _next(c, close)
        self._write(close)
        return (yield)

    def _string(self, quote: str, write: Callable[[str], None]) -> Generator[None, str, str]:
        """A string literal; gives back what comes after it, blanks skipped: another literal would be part of it."""
        if quote not in ("'", '"'):
            raise NotACall
        write('"')
        c, high = (yield), ""
        while c != quote:
            text, after = (yield from _escaped()) if c == "\\" else (c, "")
            if high and "\udc00" <= text <= "\udfff":  # Two surrogates are one character, as in JSON.
                high, text = "", (high + text).encode("utf-16-le", "surrogatepass").decode("utf-16-le")
            elif high:
                write("\ufffd")
                high = ""
            if "\ud800" <= text <= "\udbff":
                high, text = text, ""
            write(json.dumps(SURROGATE.sub("\ufffd", text), ensure_ascii=False)[1:-1])
            c = after or (yield)
        c = yield from _blanks((yield))
        if c in "\"'":
            raise NotACall
        write("\ufffd" * bool(high) + '"')
        return c


_WORDS = {"True": "true", "true": "true", "False": "false", "false": "false", "None": "null", "null": "null"}
_OCTAL = "01234567"


def _blanks(c: str) -> Generator[None, str, str]:
    while c.isspace():
        c = yield
    return c


def _word(c: str, others: str) -> Generator[None, str, tuple[str, str]]:
    letters = []
    while c.isalnum() or c in others:
        letters.append(c)
        c = yield
    return "".join(letters), c


def _digits(c: str) -> Generator[None, str, tuple[str, str]]:
    digits: list[str] = []
    while (c.isascii() and c.isalnum()) or c in "_." or (c in "+-" and digits and digits[-1] in "eE"):
        digits.append(c)
        c = yield
    if not "".join(digits[:2]).removeprefix(".")[:1].isdecimal():
        raise NotACall
    return "".join(digits), c


def _next(c: str, close: str) -> Generator[None, str, str]:
    """What comes after a comma, blanks around it skipped, or the closing bracket."""
    c = yield from _blanks(c)
    if c == ",":
        return (yield from _blanks((yield)))
    if c != close:
        raise NotACall
    return c


def _escaped() -> Generator[None, str, tuple[str, str]]:
    """What an escape after its backslash stands for, and what comes after it, where that had to be read."""
    text, after = (yield), ""
    if text in _OCTAL:  # Up to three digits.
        while (after := (yield)) in _OCTAL and len(text) < 3:
            text += after
    else:
        for _ in range({"x": 2, "u": 4, "U": 8}.get(text, 0)):
            text += yield
    match = ESCAPE.fullmatch(f"\\{text}")
    if match is None:
        raise NotACall
    return unescape(match), after
