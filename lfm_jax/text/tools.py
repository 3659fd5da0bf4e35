"""Parses and writes the tool calls of a model.

LFM2 writes `<|tool_call_start|>[f(a="x", b=1), g()]<|tool_call_end|>`, or JSON where it is asked for JSON. Calls are
data: a small parser reads them in linear time, and nothing is evaluated.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

from lfm_jax.text.argument_writer import ArgumentWriter
from lfm_jax.text.call_literals import ESCAPE, MAX_DEPTH, SURROGATE, NotACall, is_name, is_pythonic, number_of, unescape
from lfm_jax.text.tool_schemas import Tool, tool_schemas

START, END = "<|tool_call_start|>", "<|tool_call_end|>"
@dataclasses.dataclass(frozen=True)
class ToolCall:
    """A call of a tool: its name, perhaps dotted, and its arguments by name."""

    name: str
    arguments: dict[str, Any]
    """JSON types only: texts, whole and finite numbers, booleans, None, lists, dicts with texts as keys."""


@dataclasses.dataclass(frozen=True)
class Content:
    """A piece of a reply outside its calls."""

    text: str


@dataclasses.dataclass(frozen=True)
class CallStart:
    """A call has begun, and its name is known."""

    index: int
    """Of the reply's calls."""
    name: str


@dataclasses.dataclass(frozen=True)
class CallPiece:
    """A piece of the arguments of a call that has begun, as JSON text."""

    index: int
    text: str


@dataclasses.dataclass(frozen=True)
class CallCut:
    """What had begun as a call is none, or was cut: its pieces stay as they are."""

    index: int


Event = Content | ToolCall | CallStart | CallPiece | CallCut


def parse_tool_calls(text: str, tools: Sequence[Tool] = ()) -> tuple[str, list[ToolCall]]:
    """Returns the joined content of a reply, and its calls in order, as `ToolCallParser` finds them.

    Raises:
      ValueError: `tools` are not valid. No text raises anything.
    """
    parser = ToolCallParser(tools)
    events = [*parser.push(text), *parser.finish()]
    content = "".join(e.text for e in events if isinstance(e, Content))
    return content, [e for e in events if isinstance(e, ToolCall)]


class ToolCallParser:
    """Splits a reply that arrives in pieces into content and calls; how it is cut makes no difference.

    - The markers are special tokens wherever they stand: either ends the block before it, even inside a string
      literal (`render_call` escapes them there).
    - A block is a list of calls, or calls one after the other. Each is Pythonic, or a JSON object with `name` and
      `arguments` (or `parameters`; an object, or the JSON text of one) and perhaps `id` and `type`, which are ignored.
      Literals are those of Python and of JSON in any mixture; a tuple becomes a list. The end marker may be missing,
      and so may the bracket that closes the list.
    - A call is given as soon as its last bracket is there, and never taken back. At the first fault what follows the
      last call becomes content, up to and with the end marker, and with the start marker where there was no call.
    - Faults: syntax that neither Python nor JSON allows (line breaks in string literals are accepted), positional
      arguments (but see `tools`), an argument given twice, keys that are not strings, values that are not JSON (NaN,
      1e999, sets, bytes, integers too long for Python to print), nesting beyond MAX_DEPTH.
    - A lone surrogate, escaped or not, becomes U+FFFD: every text can be encoded.

    Args:
      tools: as for `tool_schemas`. Positional arguments get the names of the properties, in the schema's order. Whether
        a tool exists and its arguments fit is not looked at.
      at_start: a reply that does not begin with the start marker is content as a whole, markers and all.
      growing: tell of calls while they are written too. A `CallStart` and each `CallPiece` come as soon as they are
        certain; then the `ToolCall`, whose arguments are what its pieces make when joined and read as JSON, or a
        `CallCut`. The pieces are what `json.dumps` writes, but that a key may come twice, where the last counts. What
        is unusual (positional arguments, tuples, literals in a row, arguments before the name) is told of at the end.

    Raises:
      ValueError: on construction, for `tools` that are not valid. No text raises anything.
    """

    def __init__(self, tools: Sequence[Tool] = (), *, at_start: bool = False, growing: bool = False):
        self._parameters = {t["name"]: list(t["parameters"].get("properties", ())) for t in tool_schemas(tools)}
        self._at_start, self._growing = at_start, growing
        self._index = 0  # Of the call that is told of, or of the next.
        self._is_told = False  # Its name is.
        self._writer: ArgumentWriter | None = None
        self._is_content: bool | None = None
        """The reply is content as a whole; None while that is not known."""
        self._events: list[Event] = []
        self._content: list[str] = []  # In pieces, not yet an event.
        self._tail = ""  # What may still become a marker.
        self._state = "content"  # Or "call", inside of one, or a key of _STEPS.
        self._listed = False
        self._held: list[str] = []  # The block since its start or its last call, in pieces.
        self._lead = 0  # How many characters of it come before the call that is being read.
        self._ends = _extent()

    def push(self, text: str) -> list[Event]:
        """The events that have become certain with this piece."""
        text, self._tail = self._tail + SURROGATE.sub("\ufffd", text), ""
        if self._is_content is None and (not self._at_start or len(text) >= len(START) or not START.startswith(text)):
            self._is_content = self._at_start and not text.startswith(START)
        if self._is_content is None:
            self._tail = text
        elif self._is_content:
            self._content.append(text)
        else:
            self._split(text)
        return self._taken()

    def finish(self, *, cut: bool = False) -> list[Event]:
        """The rest of the events, of a reply that ends here. The parser can then take another.

        Args:
          cut: the reply was not ended by who wrote it: what was begun of a block and is no call is left out.
        """
        if cut and self._state != "content":
            self._held, self._tail = [], ""
            self._give_back("")
        self._read(self._tail)
        self._close("")
        self._tail, self._is_content = "", None
        events, self._index = self._taken(), 0
        return events

    def _taken(self) -> list[Event]:
        self._tell()
        self._give()
        events, self._events = self._events, []
        return events

    def _split(self, text: str) -> None:
        """Takes text, all but an end of it that may still become a marker."""
        begun = _BEGUN.search(text)
        cut = begun.start() if begun else len(text)
        self._tail = text[cut:]
        for part in _MARKER.split(text[:cut]):
            if part in (START, END):
                self._close("" if part == START else END)
                if part == START:
                    self._state, self._listed, self._held = "start", False, [START]
            else:
                self._read(part)

    def _close(self, marker: str) -> None:
        """Ends the block; without one, the marker is content."""
        after_comma = self._state == "list" and self._held[0] != START
        if after_comma or self._state in ("after", "bare", "done"):
            self._state, self._held = "content", []
        else:
            self._give_back(marker)

    def _give_back(self, text: str) -> None:
        """What is held, and then `text`, is content."""
        self._tell()
        self._break_off()
        self._content += [*self._held, text]
        self._state, self._held = "content", []

    def _give(self, *calls: ToolCall) -> None:
        """Makes events of the content so far, and of `calls` after it."""
        if text := "".join(self._content):
            self._events.append(Content(text))
        self._events += calls
        self._content = []

    def _tell(self, call: ToolCall | None = None) -> None:
        """Makes events of what is known of the call that is being written, or of all of a call that is complete."""
        if self._writer is None:
            return
        rest = self._writer.take()
        if call is not None:
            more = self._writer.rest(call.name, call.arguments)
            rest += more or ""
            if more is None:  # Of a key that came twice the first was told of.
                self._break_off()
                rest = json.dumps(call.arguments, ensure_ascii=False)
        name = self._writer.name if call is None else call.name
        if name is not None and not self._is_told:
            self._give()
            self._events.append(CallStart(self._index, name))
            self._is_told = True
        if rest:
            self._events.append(CallPiece(self._index, rest))
        if call is not None:
            self._index, self._is_told, self._writer = self._index + 1, False, None

    def _break_off(self) -> None:
        """Ends the call that is being written, of which nothing more is told."""
        if self._is_told:
            self._events.append(CallCut(self._index))
            self._index, self._is_told = self._index + 1, False
        self._writer = None

    def _read(self, text: str) -> None:
        """Takes text without markers."""
        start = 0  # Of the text that is neither held nor handled.
        for i, c in enumerate(text):
            if self._state == "content":
                break
            if self._state == "call":
                if self._writer is not None:
                    self._writer.send(c)
                if self._ends.send(c):
                    call = _read_call("".join([*self._held, text[start : i + 1]])[self._lead :], self._parameters)
                    if call is None:
                        break
                    self._tell(call)
                    self._give(call)
                    self._state, self._held, start = "after" if self._listed else "bare", [], i + 1
            elif not c.isspace():
                state = _STEPS[self._state].get("f" if c == "{" or c.isidentifier() else c)
                if state is None:
                    break
                if state == "call":
                    self._lead = sum(map(len, self._held)) + i - start
                    self._ends = _extent()
                    next(self._ends)
                    self._ends.send(c)
                    if self._growing:
                        self._writer = ArgumentWriter()
                        self._writer.send(c)
                elif state == "done":
                    self._held, start = [], i + 1
                self._state, self._listed = state, self._listed or c == "["
        else:
            self._held += [text[start:]] if start < len(text) else []
            return
        self._give_back(text[start:])


_MARKER = re.compile(f"({re.escape(START)}|{re.escape(END)})")
_BEGUN = re.compile(f"(?:{'|'.join({re.escape(m[:n]) for m in (START, END) for n in range(1, len(m))})})\\Z")
_STEPS: dict[str, dict[str, str]] = {
    "start": {"[": "list", "f": "call"},
    "list": {"f": "call", "]": "done"},
    "after": {",": "list", "]": "done"},
    "bare": {",": "bare", "f": "call"},
    "done": {},
}
"""What may follow in a block, blanks apart: by state, then by character, "f" for any that may begin a call."""


def _extent() -> Generator[bool, str]:
    """Receives a call character by character and yields whether it was the last: the bracket that closes the first.

    Brackets in string literals do not count. Nothing is read twice, so that pieces of any size take linear time.
    """
    depth, c = 0, (yield False)
    while True:
        if c in "\"'":
            quote, opening, closing = c, 1, 0
            while opening < 3 and (c := (yield False)) == quote:
                opening += 1
            if opening == 2:  # An empty literal, and c comes after it.
                continue
            if opening == 3:
                c = yield False
            while (closing := closing + 1 if c == quote else 0) < opening:
                if c == "\\":
                    yield False
                c = yield False
        depth += (c in "([{") - (c in ")]}")
        c = yield c in ")]}" and depth <= 0


def _read_call(text: str, parameters: Mapping[str, Sequence[str]]) -> ToolCall | None:
    """Parses a whole text as one call, or returns None; `parameters` are names by tool, for positional arguments."""
    try:
        reader = _Reader(text)
        call = _json_call(reader.value()) if text.startswith("{") else reader.call(parameters)
        reader.need(r"\Z")
        return call
    except NotACall:
        return None


def _json_call(value: dict[str, Any]) -> ToolCall:
    name = value.get("name")
    keys = value.keys() - {"name", "id", "type"}
    if not isinstance(name, str) or not name or len(keys) > 1 or not keys <= {"arguments", "parameters"}:
        raise NotACall
    arguments = value[keys.pop()] if keys else None
    if isinstance(arguments, str):
        reader = _Reader(arguments)
        arguments = reader.value()
        reader.need(r"\Z")
    if not isinstance(arguments, dict | None):
        raise NotACall
    return ToolCall(name, arguments or {})


class _Reader:
    """Recursive descent over a whole text; every method continues where the last one stopped, after blanks."""

    def __init__(self, text: str):
        self._text, self._at = text, 0

    def take(self, pattern: str) -> re.Match[str] | None:
        match = re.compile(rf"\s*+{pattern}", re.DOTALL).match(self._text, self._at)
        self._at = match.end() if match else self._at
        return match

    def need(self, pattern: str) -> re.Match[str]:
        if match := self.take(pattern):
            return match
        raise NotACall

    def call(self, parameters: Mapping[str, Sequence[str]]) -> ToolCall:
        """Reads a call in Python's syntax."""
        name = self.need(r"([\w.]+)\s*\(")[1]
        if not is_name(name):
            raise NotACall
        positional = iter(parameters.get(name, ()))
        arguments: dict[str, Any] = {}
        for keyword, value in self._items(r"\)", self._argument):
            if keyword:
                positional = iter(())  # None may follow a keyword.
            key = keyword or next(positional, None)
            if key is None or key in arguments:
                raise NotACall
            arguments[key] = value
        return ToolCall(name, arguments)

    def _argument(self) -> tuple[str | None, Any]:
        keyword = self.take(r"(\w+)\s*=")
        if keyword and not keyword[1].isidentifier():
            raise NotACall
        return keyword and keyword[1], self.value()

    def _items[T](self, close: str, item: Callable[[], T]) -> Iterator[T]:
        """Reads items up to `close`, with commas between them and perhaps after the last."""
        while not self.take(close):
            yield item()
            if not self.take(","):
                self.need(close)
                return

    def value(self, depth: int = 0) -> Any:
        """Reads a literal of Python or JSON."""

        def inner() -> Any:
            return self.value(depth + 1)

        def entry() -> tuple[str, Any]:
            key = self._string()
            self.need(":")
            return key, inner()

        if depth > MAX_DEPTH:
            raise NotACall
        if bracket := self.take(r"([\[{(])"):
            if bracket[1] == "[":
                return list(self._items(r"\]", inner))
            if bracket[1] == "{":
                return dict(self._items(r"\}", entry))
            if self.take(r"\)"):
                return []
            first = inner()
            if self.take(r"\)"):  # A tuple of one has a comma; this is a value in parentheses.
                return first
            self.need(",")
            return [first, *self._items(r"\)", inner)]
        if number := self.take(r"([-+]?)\s*(\.?[0-9](?:[eE][-+]|[0-9A-Za-z_.])*)"):
            return number_of(number[1], number[2])
        if word := self.take(r"(True|true|False|false|None|null)\b"):
            return {"t": True, "f": False, "n": None}[word[1][0].lower()]
        return self._string()

    def _string(self) -> str:
        literal, pieces = self.need(_STRING), []
        while literal:  # Those that follow each other are one, as in Python.
            pieces.append(ESCAPE.sub(unescape, literal[2]))
            literal = self.take(_STRING)
        # Two surrogates are one character, as in JSON.
        return "".join(pieces).encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


_STRING = r"""((?>"{3}|'{3}|"|'))((?:(?!\1)[^\\]|\\.)*+)\1"""
def render_call(call: ToolCall) -> str:
    """Writes a call as LFM2 does, `f(a="x", b=1)`, or as a JSON object if its name or a key is not an identifier.

    In string literals `<|` is escaped, so that no argument contains a special token.

    Raises:
      ValueError: the name is empty, or arguments are not JSON types or nested beyond MAX_DEPTH.
    """
    if not call.name:
        raise ValueError("a tool call must have a name")
    if is_pythonic(call.name, call.arguments):
        return f"{call.name}({', '.join(f'{key}={_literal(value)}' for key, value in call.arguments.items())})"
    # The object itself is one level.
    return f'{{"name": {_literal(call.name)}, "arguments": {_literal(call.arguments, _JSON, 1)}}}'


def render_calls(calls: Iterable[ToolCall]) -> str:
    """Writes the block of these calls with its markers; `parse_tool_calls` reads them back.

    Raises:
      ValueError: as `render_call`.
    """
    return f"{START}[{', '.join(map(render_call, calls))}]{END}"


_PYTHON, _JSON = ("None", "True", "False"), ("null", "true", "false")


def _literal(value: Any, words: tuple[str, str, str] = _PYTHON, depth: int = 0) -> str:
    if depth > MAX_DEPTH:
        raise ValueError(f"arguments may be nested at most {MAX_DEPTH} deep")
    match value:
        case None | True | False:
            return words[0 if value is None else 1 if value else 2]
        case str() | int() | float():
            return json.dumps(value, ensure_ascii=False, allow_nan=False).replace("<|", r"<\u007c")
        case list() | tuple():
            return f"[{', '.join(_literal(item, words, depth + 1) for item in value)}]"
        case dict() if all(isinstance(key, str) for key in value):
            items = (f"{_literal(key)}: {_literal(item, words, depth + 1)}" for key, item in value.items())
            return f"{{{', '.join(items)}}}"
    raise ValueError(f"arguments must be made of JSON types, not {value!r}")
