"""Chat templates: programs in Jinja that came with the weights, run in a sandbox and within bounds.

The environment is that of `transformers`. What one rendering may do is bounded: its time, by a look at the clock at
each turn of a loop, call, filter and operator; and its memory, by the sizes of what these make, which are counted, and
of what they work on. Sizes are in characters and elements.
"""

from __future__ import annotations

import contextvars
import functools
import itertools
import json
import re
import time
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from datetime import datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Template, nodes

MAX_TEMPLATE = 2**18
"""Most characters of a template."""
MAX_SECONDS = 5.0
"""Most time of a processor for one rendering."""
MAX_SIZE = 2**24
"""Most that one rendering makes, beside SIZE_FACTOR times what it is given."""
SIZE_FACTOR = 128
MAX_BITS = 4096
"""Most bits of a whole number."""
STEP, LOOK = 64, 2**17
"""What a turn counts beside the size of what it works on, and after how much of this there is a look at the clock."""
GENERATION_OPENS, GENERATION_CLOSES = "generation_opens", "generation_closes"
"""Variables of a template with `{% generation %}` blocks: texts to write where one begins and ends, in prompts none."""

_WIDTHS = {"center", "ljust", "rjust", "zfill", "expandtabs", "indent", "batch", "slice", "tojson", "to_bytes", "round",
           "translate"}
"""Filters and methods that make up to as many times what they are given as an argument says."""
_QUADRATIC = {"urlize", "pprint", "wordwrap", "striptags"}
"""Filters that may take the square of what they are given."""
_WORK: contextvars.ContextVar[_Work] = contextvars.ContextVar("work")


def check_template(template: str) -> None:
    """Refuses a chat template that cannot be read, so that it need not fail at the first conversation.

    Raises:
      ValueError: no valid Jinja, or too long or nested too deep.
    """
    compiled_template(template)


def render(template: str, given: Mapping[str, Any]) -> str:
    """The text of a template, with variables.

    Raises:
      ValueError: a broken template, or one that fails, or does more than the bounds allow.
    """
    compiled, _ = compiled_template(template)
    try:
        token = _WORK.set(_Work(given))
        try:
            return compiled.render(given)
        finally:
            _WORK.reset(token)
    except Exception as error:  # Whatever code from outside raises, the caller gets one kind of error.
        raise ValueError(f"the chat template failed on these messages: {type(error).__name__}: {error}") from error


class TooMuchWorkError(Exception):
    """A template does more than one rendering may."""


class _Work:
    """What one rendering has done so far."""

    def __init__(self, given: Mapping[str, Any]):
        self._ends = time.thread_time() + MAX_SECONDS
        self._sizes: dict[int, tuple[Any, int]] = {}
        """Of lists and dicts, which no template can change, by identity."""
        self._made = 0
        self._unseen = 0
        """What it worked on since the last look at the clock, which takes longer than a turn."""
        self._most = MAX_SIZE + SIZE_FACTOR * self.size(dict(given))

    def step(self, size: int = 0) -> None:
        """Counts a turn, a call or an operation on values of some size."""
        self._unseen += size + STEP
        if self._unseen > LOOK:
            self._unseen = 0
            if time.thread_time() > self._ends:
                raise TooMuchWorkError(f"it takes more than {MAX_SECONDS:g} seconds")

    def size(self, value: Any) -> int:
        """How large a value is with all that is in it; what it holds twice counts twice, as where it is printed."""
        if isinstance(value, str | bytes):
            return len(value)
        if isinstance(value, list | tuple | dict):
            if id(value) not in self._sizes:
                inner = itertools.chain(*value.items()) if isinstance(value, dict) else value
                self._sizes[id(value)] = value, 1 + len(value) + sum(map(self.size, inner))
            return self._sizes[id(value)][1]
        if isinstance(value, range):
            return len(value)
        if isinstance(value, int):
            if value.bit_length() > MAX_BITS:
                raise TooMuchWorkError(f"it has whole numbers of more than {MAX_BITS} bits")
        elif value is not None and isinstance(value, _namespace()):  # They may hold each other.
            raise TooMuchWorkError("it works on a namespace as a whole")
        return 1

    def check(self, size: int) -> None:
        """Refuses the size of what one operation works on or makes, or of all that was made, if it is too much."""
        if size > self._most:
            raise TooMuchWorkError(f"it makes more than {self._most} characters")

    def made[T](self, value: T, size: int | None = None) -> T:
        """Counts what was made; what is in a list was counted by itself."""
        if size is None:
            size = len(value) if isinstance(value, str | bytes | list | tuple | dict) else 1
        self._made += size
        if self._made > self._most:
            self.check(self._made)
        self.step(size)
        return value

    def operands(self, *values: Any) -> int:
        """Counts an operation on values, before it is done, and gives their size."""
        size = sum(map(self.size, values))
        self.check(size)
        self.step(size)
        return size

    def call(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Counts a call of a filter, or of a method whose text is the first argument, before it is done."""
        values = (*args, *kwargs.values())
        self.operands(*values)
        first, rest = values[0] if values else "", values[1:]
        if name in _WIDTHS:
            times = max((abs(value) if isinstance(value, int) else self.size(value) for value in rest), default=1)
            self.check((self.size(first) + 1) * times ** (6 if name == "round" else 1))
        elif name in _QUADRATIC or (name in ("encode", "decode") and rest):
            self.check(self.size(first) ** 2)
        elif name == "replace" and len(rest) > 1:
            self.check(self.size(first) + (str(first).count(str(rest[0])) + 1) * self.size(rest[1]))
        elif name == "join" and rest:
            items, between = (rest[0], first) if isinstance(first, str | bytes) else (first, rest[0])
            self.check(self.size(items) * (1 + self.size(between)))
        elif name in ("format", "format_map"):
            self.formatting(str(first), rest)
        elif name == "sum" and any(isinstance(value, list | tuple) for value in rest):
            raise TooMuchWorkError("it sums lists")

    def formatting(self, text: str, values: tuple[Any, ...]) -> None:
        """Counts a formatting of values by a text: each place may take all of them, and have a width."""
        width = max((int(digits[:9]) for digits in re.findall(r"\d+", text)), default=0)
        places = text.count("{") + text.count("%")
        self.check(len(text) + places * (width + sum(map(self.size, values))))
        if re.search(r"%[^%a-zA-Z]*\*|\{[^{}]+\{", text):
            raise TooMuchWorkError("it formats to a width that comes from elsewhere")


# -------------------------------------------------------------------- Jinja's environment


def _counted(name: str, function: Callable[..., Any], is_test: bool = False) -> Callable[..., Any]:
    """A filter or a test that counts, and gives lists in place of generators."""
    skip = 1 if getattr(function, "jinja_pass_arg", None) else 0
    alone = 1 + skip if is_test else -1

    @functools.wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        if len(args) == alone and not kwargs:  # A question about a value as it is.
            return function(*args)
        work = _WORK.get()
        work.call(name, args[skip:], kwargs)
        return work.made(_listed(function(*args, **kwargs)))

    return counted


def _listed(result: Any) -> Any:
    """A list in place of what can be gone through and has no size of its own."""
    return list(result) if isinstance(result, Iterator | ItemsView | KeysView | ValuesView) else result


@functools.cache
def _namespace() -> type:
    from jinja2.utils import Namespace

    return Namespace


def _turns(values: Iterable[Any]) -> Iterator[Any]:
    """What a loop goes through."""
    work = _WORK.get()
    for value in values:
        work.step()
        yield value


def _written(value: Any) -> Any:
    """A part of the output."""
    work = _WORK.get()
    return work.made(value, len(value) if isinstance(value, str) else work.operands(value))


def _compared(value: Any) -> Any:
    if not isinstance(value, str):
        _WORK.get().operands(value)
    return value


@functools.lru_cache(maxsize=1)
def _environment() -> Any:
    import jinja2
    import jinja2.ext
    import jinja2.nodes
    import jinja2.parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks what training learns from: its text, between two variables that a prompt has not."""

        tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

        def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            opens, closes = (jinja2.nodes.Output([jinja2.nodes.Name(name, "load")], lineno=line)
                             for name in (GENERATION_OPENS, GENERATION_CLOSES))
            return [opens, jinja2.nodes.Scope(body, lineno=line), closes]

    class Bounded(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%", "**"])

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            work = _WORK.get()
            if operator == "+" and isinstance(left, str) and isinstance(right, str):
                return work.made(left + right)
            work.operands(left, right)
            numbers = [value for value in (left, right) if isinstance(value, int)]
            if operator == "*" and len(numbers) == 1:
                (times,) = numbers
                work.check(max(times, 0) * work.size(right if left is times else left))
            elif operator == "**" and len(numbers) == 2 and left.bit_length() * abs(right) > MAX_BITS:
                raise TooMuchWorkError(f"it has whole numbers of more than {MAX_BITS} bits")
            elif operator == "%" and isinstance(left, str):
                work.formatting(left, (right,))
            return work.made(super().call_binop(context, operator, left, right))

        def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
            work = _WORK.get()
            method = getattr(function, "__wrapped__", function)
            owner = getattr(method, "__self__", None)
            if isinstance(owner, str | bytes | int | float):
                work.call(method.__name__, (owner, *args), kwargs)
            else:
                work.operands(*(value for value in (*args, *kwargs.values()) if not isinstance(value, _namespace())))
            return work.made(_listed(super().call(context, function, *args, **kwargs)))

    environment = Bounded(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols], optimized=False
    )
    environment.filters["tojson"] = _tojson
    environment.filters = {name: _counted(name, filter) for name, filter in environment.filters.items()}
    environment.tests = {name: _counted(name, test, is_test=True) for name, test in environment.tests.items()}
    environment.filters |= {f"lfm_jax{function.__name__}": function for function in (_turns, _written, _compared)}
    del environment.globals["lipsum"]
    return environment


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


@functools.lru_cache(maxsize=16)
def compiled_template(template: str) -> tuple[Template, frozenset[str]]:
    """The compiled template and the names of its variables.

    Raises:
      ValueError: see `check_template`.
    """
    import jinja2.meta

    if len(template) > MAX_TEMPLATE:
        raise ValueError(f"the chat template has {len(template)} characters; at most {MAX_TEMPLATE}")
    functions = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    try:
        tree = _environment().parse(template)
        variables = jinja2.meta.find_undeclared_variables(tree)
        return _environment().from_string(_counting(tree), globals=functions), frozenset(variables)
    except RecursionError:
        raise ValueError("the chat template is nested too deep") from None
    except Exception as error:  # Of the parsers and the compiler of two languages.
        raise ValueError(f"the chat template is not valid Jinja: {error}") from error


def _counting(tree: nodes.Template) -> nodes.Template:
    """The template with what counts put around loops, outputs and comparisons."""
    from jinja2 import nodes

    def through(function: Callable[..., Any], node: Any) -> Any:
        if isinstance(node, nodes.TemplateData):
            node = nodes.Const(node.data, lineno=node.lineno)
        return nodes.Filter(node, f"lfm_jax{function.__name__}", [], [], None, None, lineno=node.lineno)

    for loop in tree.find_all(nodes.For):
        loop.iter = through(_turns, loop.iter)
    for joined in tree.find_all((nodes.Output, nodes.Concat)):
        joined.nodes = [through(_written, node) for node in joined.nodes]
    for comparison in tree.find_all(nodes.Compare):
        comparison.expr = through(_compared, comparison.expr)
        for operand in comparison.ops:
            operand.expr = through(_compared, operand.expr)
    tree.set_environment(_environment())
    return tree
