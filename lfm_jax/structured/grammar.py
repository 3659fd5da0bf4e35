"""Constrained decoding: which tokens may come next so that the text fits a JSON schema, a regex or a tool's signature.

A `Grammar` is text that llguidance compiles; a `Matcher` follows one request through it and says, as a packed bitmask,
which tokens may come next. llguidance is the optional extra `lfm_jax[grammar]`.

Dimensions: B batch, V vocabulary, W = ceil(V / 32) words of a bitmask.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lfm_jax.structured.call_grammar import CallRules
from lfm_jax.structured.json_schema import Bounds, accepted, compiled, llguidance, one_line
from lfm_jax.structured.kept import Kept
from lfm_jax.structured.schema import GrammarError
from lfm_jax.structured.size import check_pattern
from lfm_jax.structured.trial import tried
from lfm_jax.text.thoughts import CLOSE, OPEN, Stage, Thinking, ThoughtLimit
from lfm_jax.text.tokenizer import without_limits, without_specials
from lfm_jax.text.tool_schemas import Tool, tool_schemas
from lfm_jax.text.tools import END, START

if TYPE_CHECKING:
    from tokenizers import Tokenizer

DEAD_END = "no token can go on"
MAX_CALLS = 8
"""Most calls of one reply."""
BOUNDS = Bounds()
STEP_FUEL = 500_000
"""Most work for a mask, about 35 ms; a matcher that needs more fails. With 200,000 a few real schemas do."""

# Tokens of such characters only are looked at together; without `<|` they suit the strings of tool calls too.
_SLICES = [r'[^"\\<|\x00-\x1F\x7F]{1,10}', r'[^"\\<|\x00-\x1F\x7F]{1,30}']


@dataclasses.dataclass(frozen=True)
class Grammar:
    """A grammar for any tokenizer. The class methods make one, checked; what was made last is kept.

    Raises:
      GrammarError: from each class method, for what llguidance refuses.
      ImportError: llguidance is not installed.
    """

    text: str
    """As llguidance takes it."""
    relaxed: tuple[str, ...] = ()
    """Places of what tools that are not strict ask for and their calls do not promise, each with the tool's name."""

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | bool | str, *, bounds: Bounds = BOUNDS) -> Grammar:
        """JSON that fits `schema`, given as data or JSON text, with at most one blank after each comma and colon.

        Keys come in the order of `properties`. What is accepted fits the schema; not all that fits is accepted, see
        `json_schema.bounded`.

        Raises:
          GrammarError: keywords and formats that llguidance does not support (none is ignored), `oneOf` whose choices
            are not provably distinct, numbers that a float cannot hold, a schema that nothing fits.
        """
        return _kept("schema", [schema, dataclasses.astuple(bounds)], lambda: cls(compiled(schema, bounds)))

    @classmethod
    def json_object(cls, *, bounds: Bounds = BOUNDS) -> Grammar:
        """Any JSON object."""
        return cls.json_schema({"type": "object"}, bounds=bounds)

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """Text that the whole of `pattern` matches, in the syntax of Rust's `regex` without lookaround and flag `x`."""
        check_pattern(pattern)
        return _kept("regex", pattern, lambda: cls(accepted(llguidance().LLMatcher.grammar_from_regex(pattern))))

    @classmethod
    def lark(cls, text: str) -> Grammar:
        """Text of the rule `start` in llguidance's variant of Lark, where `<|name|>` is a special token.

        It is compiled in a process of its own first, see `trial.py`.
        """
        return _kept("lark", text, lambda: cls(tried(text)))

    @classmethod
    def choice(cls, choices: Sequence[str]) -> Grammar:
        """One of these texts."""
        if isinstance(choices, str) or not choices or not all(isinstance(c, str) for c in choices):
            raise GrammarError(f"choices is {choices!r:.60}; expected a list of at least one text")
        text = f"start: {' | '.join(map(json.dumps, choices))}"
        return _kept("choice", text, lambda: cls(accepted(text)))

    @classmethod
    def tool_calls(
        cls, tools: Sequence[Tool], *, required: bool = False, parallel: bool = True, name: str | None = None,
        answer: Mapping[str, Any] | bool | str | None = None, bounds: Bounds = BOUNDS,
    ) -> Grammar:
        """Calls that fit the tools, as LFM2 writes them: `<|tool_call_start|>[f(a="x", b=1), g()]<|tool_call_end|>`.

        Arguments are Python literals; they come in the order of `properties`, and the optional ones may be left out.
        Where the name of the tool (`get-weather`) or of an argument is no identifier, a call is a JSON object,
        `{"name": "f", "arguments": {...}}`. Objects have no keys beyond their `properties`, where they have any. No
        string holds `<|`, lest it read as a marker.

        A tool may be `strict` (a key beside its name). Of one that is not, what cannot be promised is left out:
        keywords that llguidance lacks, `patternProperties`, tuples, and some where schemas meet (`allOf`, siblings of
        `anyOf`, `oneOf` and `$ref`). `Grammar.relaxed` says which.

        Args:
          tools: as for `tool_schemas`.
          required: calls and nothing else. Otherwise free text, then calls if the model begins them, then text again.
          parallel: up to MAX_CALLS calls instead of one.
          name: of the only tool that may be called; implies `required`.
          answer: instead of free text, the JSON schema of what is written where nothing is called; calls are then all
            that a reply holds. Its strings may hold the letters of markers: read replies by `ToolCallParser(tools,
            at_start=True)`. With `required` it is checked and nothing else.
          bounds: as for `json_schema`.

        Raises:
          GrammarError: no tool, or none of that name; parameters that are no schema, or too much work; something that
            a strict tool asks for and that cannot be promised; an answer that `json_schema` refuses. It names the
            tool, the place and the keyword.
          ValueError: see `tool_schemas`.
        """
        chosen = [tool for tool in tool_schemas(tools) if name in (None, tool["name"])]
        if not chosen:
            raise GrammarError("there are no tools" if name is None else f"there is no tool {name!r}")
        otherwise = None if answer is None else cls.json_schema(answer, bounds=bounds)
        if required or name is not None:
            form, rules = "{block}", []
        elif otherwise is None:
            # Markers that are spelled out would be read like the tokens, and as calls that nothing has checked.
            form = "TEXT ({block} TEXT)?"
            rules = [r"TEXT: /(?s:.*)/ & ~/(?s:.*)<\|tool_call_(start|end)\|>(?s:.*)/"]
        else:
            (compiled_answer,) = json.loads(otherwise.text)["grammars"]
            form, rules = "{block} | answer", [f"answer: %json {json.dumps(compiled_answer['json_schema'])}"]
        return _kept("tools", [chosen, form, rules, parallel, dataclasses.astuple(bounds)],
                     lambda: _of_calls(chosen, form, rules, parallel, bounds))

    def after_thought(self, how: Thinking, begin: Stage = "start") -> Grammar:
        """The same text, with a thought and up to four blanks before it.

        Args:
          how: the model writes thoughts.
          begin: where the text goes on: at the `start` a thought may come, inside of a `thought` it must end, and in
            the `answer` none comes.
        """
        if begin == "answer":
            return self
        # The form for added tokens fails where the marks are plain text, and the other way round.
        if how.token_ids:
            thought = rf"FREE {CLOSE} BLANKS"
            opened = f"{OPEN} {thought}"
            rules = [r"FREE: /(?s:.*)/ & ~/(?s:.*)<\/think>(?s:.*)/"]
        else:
            thought = "free BLANKS"
            opened = f'"{OPEN}" {thought}'
            rules = [r"free[lazy]: /(?s:.*)<\/think>/"]
        form = f"({opened})?" if begin == "start" else thought
        first = "\n".join([f"start: {form} @answer", *rules, r"BLANKS: /[ \t\r\n]{0,4}/"])
        if self.text.lstrip().startswith("{"):
            answer, *others = json.loads(self.text)["grammars"]
        else:
            answer, others = {"lark_grammar": self.text}, []
        grammars = [{"lark_grammar": first}, answer | {"name": "answer"}, *others]
        return dataclasses.replace(self, text=json.dumps({"grammars": grammars}))


def _of_calls(
    tools: Sequence[Mapping[str, Any]], form: str, others: Sequence[str], parallel: bool, bounds: Bounds
) -> Grammar:
    """A grammar of the form, which has a place for a block of calls and may name other rules."""
    rules = CallRules(bounds)
    calls = [rules.call(tool) for tool in tools]
    more = f'(", " call){{0,{MAX_CALLS - 1}}}' if parallel else ""
    block = f'{START} "[" call {more} "]" {END}'
    text = "\n".join([
        f"start: {form.format(block=block)}",
        f"call: {' | '.join(calls)}",
        *others,
        *(f"{rule}: {body}" for rule, body in rules.bodies.items()),
    ])
    return Grammar(accepted(text), tuple(rules.relaxed))


_GRAMMARS: Kept[Grammar] = Kept(256, 2**24, lambda _, grammar: len(grammar.text) + sum(map(len, grammar.relaxed)))


def _kept(kind: str, content: Any, make: Callable[[], Grammar]) -> Grammar:
    """The grammar of some content, made once; the order of keys counts, for calls and answers follow it."""
    try:
        key = json.dumps([kind, content])
    except (TypeError, ValueError, RecursionError):  # No JSON; it is refused with better words.
        return make()
    return _GRAMMARS.get(hashlib.sha256(key.encode()).hexdigest(), make)


# -------------------------------------------------------------------- following a request


class GrammarTokenizer:
    """What llguidance needs to know of a tokenizer. Making one takes a second; see `grammar_tokenizer`.

    Args:
      tokenizer: byte-level; its special tokens come only where a grammar names them.
      vocab_size: of the model; ids that the tokenizer lacks are never allowed.
      eos_ids: tokens that end a request, the model's and the request's own. They are allowed where the text so far is
        complete, nowhere else, and where it cannot go on nothing else is.

    Raises:
      ValueError: no eos_ids, ids beyond vocab_size, or a tokenizer with more ids than that.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Sequence[int]):
        ids = sorted(tokenizer.get_vocab(with_added_tokens=True).values())
        if ids[-1] >= vocab_size:
            raise ValueError(f"the tokenizer has ids up to {ids[-1]}, the model's vocab_size is {vocab_size}")
        if not eos_ids or not 0 <= min(eos_ids) <= max(eos_ids) < vocab_size:
            raise ValueError(f"eos_ids is {tuple(eos_ids)}; a grammar needs at least one, within 0..{vocab_size - 1}")
        self.vocab_size, self.eos_ids = vocab_size, tuple(eos_ids)
        text = without_limits(tokenizer).to_str()
        self.handle = llguidance().LLTokenizer(text, vocab_size, list(eos_ids), _SLICES)
        self.known_W = _packed([*ids, *eos_ids], vocab_size)
        self.eos_W = _packed(eos_ids, vocab_size)
        added = tokenizer.get_added_tokens_decoder()
        self.special_W = _packed([i for i, token in added.items() if token.special], vocab_size)
        self._plain = without_specials(tokenizer)
        self._matchers: Kept[Matcher] = Kept(64, 2**20, lambda text, _: len(text))

    def matcher(self, grammar: Grammar | None) -> Matcher:
        """A matcher at the start of the grammar, of which the last ones are kept and copied.

        Without a grammar every token of the tokenizer is allowed, and eos need not end the text: only a `Matcher.limit`
        says more.

        Raises:
          GrammarError: the grammar names a special token that the tokenizer lacks, or is too large.
        """
        if grammar is None:
            return Matcher(self, None)
        return self._matchers.get(grammar.text, lambda: self._compiled(grammar)).copy()

    def first_of(self, text: bytes) -> int:
        """The first token of a text in which names of special tokens are text."""
        return self._plain.encode(text.decode(errors="ignore"), add_special_tokens=False).ids[0]

    def _compiled(self, grammar: Grammar) -> Matcher:
        limits = llguidance().LLParserLimits(step_lexer_fuel=STEP_FUEL, verbose_errors=False)
        matcher = llguidance().LLMatcher(self.handle, grammar.text, log_level=0, limits=limits)
        if matcher.is_error():
            raise GrammarError(one_line(matcher.get_error()))
        return Matcher(self, matcher)


@functools.lru_cache(maxsize=4)
def grammar_tokenizer(tokenizer: Tokenizer, vocab_size: int, eos_ids: tuple[int, ...]) -> GrammarTokenizer:
    """A `GrammarTokenizer`, made once for each tokenizer object (which must not change), size and set of ids."""
    return GrammarTokenizer(tokenizer, vocab_size, eos_ids)


class Matcher:
    """One request on its way through a grammar; `GrammarTokenizer.matcher` makes one."""

    def __init__(self, tokenizer: GrammarTokenizer, matcher: Any):
        self.tokenizer = tokenizer
        self.handle = matcher
        self.limit: ThoughtLimit | None = None
        """Of the thought before the text: where it is reached only the tokens that end the thought are allowed."""
        self.error: str | None = None
        """Why the grammar can be followed no further, as when it needs too much work; only eos is allowed then."""

    @property
    def free(self) -> bool:
        """There is no grammar, so that the text need not end by an eos of the tokenizer."""
        return self.handle is None

    @property
    def accepts_eos(self) -> bool:
        """The text so far is complete."""
        return self.free or (self.error is None and self.handle.is_accepting())

    @property
    def done(self) -> bool:
        """The text is complete and cannot go on: only eos is allowed, or has come."""
        return not self.free and self.accepts_eos and self.handle.is_stopped()

    def mask(self, out_W: np.ndarray) -> None:
        """Writes the mask of the next token, uint32: bit `i % 32` of word `i // 32` is 1 where token i is allowed."""
        fill_masks([self], out_W[None])

    def as_text(self, mask_W: np.ndarray) -> None:
        """Mends a mask whose only token is a special one that cannot come.

        Where text is forced, llguidance takes the first token that the tokenizer makes of it: for the name of a special
        token that token, which is no text, and would end one if it is eos.
        """
        if not (mask_W & self.tokenizer.special_W).any() or np.bitwise_count(mask_W).sum() > 1:
            return
        if self.handle.is_error() or self.handle.is_accepting():
            return
        (token,) = np.flatnonzero(np.unpackbits(mask_W.view(np.uint8), bitorder="little"))
        if not self.handle.validate_tokens([int(token)]):
            token = self.tokenizer.first_of(self.handle.compute_ff_bytes())
            mask_W[:] = 0
            mask_W[token // 32] = np.uint32(1 << token % 32)

    def consume(self, token: int) -> None:
        """Goes on by a token; a matcher with an `error` stays where it is.

        Raises:
          ValueError: the token is not allowed; the matcher is of no use any more.
        """
        if not self.free and self.error is None and not self.handle.consume_token(token):
            why = one_line(self.handle.get_error())
            if re.search("doesn't satisfy|out of range|parser stopped", why):
                raise ValueError(f"token {token} is not allowed by the grammar: {why}")
            self.error = why
        if self.limit is not None:
            self.limit.push(token)

    def rollback(self, tokens: int) -> None:
        """Takes the last tokens back.

        Raises:
          ValueError: there are not as many, or the matcher has a limit of its thought.
        """
        if self.limit is not None:
            raise ValueError("cannot take back tokens of a matcher with a limit of its thought")
        if tokens and not self.free and not self.handle.rollback(tokens):
            raise ValueError(f"cannot take back {tokens} tokens: {one_line(self.handle.get_error())}")

    def copy(self) -> Matcher:
        """Another matcher at the same place."""
        copy = Matcher(self.tokenizer, None if self.free else self.handle.deep_copy())
        copy.error, copy.limit = self.error, self.limit and self.limit.copy()
        return copy


def fill_masks(matchers: Sequence[Matcher | None], masks_BW: np.ndarray) -> None:
    """Writes a row of `masks_BW`, uint32 and contiguous, for each matcher, several at once; None allows every token.

    A matcher that fails has its `error` set and allows eos; the others know nothing of it.

    Raises:
      ValueError: an array of another shape or dtype.
    """
    words = {len(m.tokenizer.known_W) for m in matchers if m is not None} or {masks_BW.shape[-1]}
    if masks_BW.dtype != np.uint32 or words != {masks_BW.shape[-1]} or masks_BW.shape[:-1] != (len(matchers),):
        shape = [len(matchers), *words]
        raise ValueError(f"masks_BW is {masks_BW.dtype}{list(masks_BW.shape)}; expected uint32{shape}")
    live = [(m.handle, row) for row, m in enumerate(matchers) if m is not None and not m.free]
    if len(live) > 1:
        from llguidance.numpy import fill_next_token_bitmask_par

        fill_next_token_bitmask_par(_executor(), live, masks_BW.view(np.int32))
    elif live:
        from llguidance.numpy import fill_next_token_bitmask

        ((handle, row),) = live
        fill_next_token_bitmask(handle, masks_BW.view(np.int32), row)
    for matcher, mask_W in zip(matchers, masks_BW, strict=True):
        if matcher is None or matcher.free:
            mask_W[:] = 0xFFFFFFFF
        if matcher is None:
            continue
        mask_W &= matcher.tokenizer.known_W  # A grammar may name ids that are no token.
        if not matcher.free:
            matcher.as_text(mask_W)
        if not matcher.free and matcher.handle.is_error():
            matcher.error = one_line(matcher.handle.get_error()).replace("NoExtensionBias", DEAD_END)
        elif not mask_W.any():
            matcher.error = DEAD_END
        if matcher.error is not None:
            mask_W[:] = matcher.tokenizer.eos_W
        elif matcher.limit is not None and (token := matcher.limit.forced) is not None:
            bit = np.uint32(1 << token % 32)
            # Not in an answer that a grammar lets begin with the letters of the mark.
            if mask_W[token // 32] & bit:
                mask_W[:] = 0
                mask_W[token // 32] = bit


def _packed(ids: Sequence[int], vocab_size: int) -> np.ndarray:
    allowed = np.zeros(-(-vocab_size // 32) * 32, bool)
    allowed[np.asarray(ids)] = True
    return np.packbits(allowed, bitorder="little").view(np.uint32)


@functools.cache
def _executor() -> Any:
    return llguidance().LLExecutor()
