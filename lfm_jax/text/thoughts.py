"""Thoughts: what a model writes before its answer, between `<think>` and `</think>`.

The marks are added tokens of some tokenizers and plain text to others; a reply's text is the same either way. Where
they are tokens, only the token opens a thought, and `<think>` that is spelled out is text.
"""

from __future__ import annotations

import codecs
import copy
import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal, NamedTuple

from lfm_jax.text.codec import encoded, token_bytes

if TYPE_CHECKING:
    from tokenizers import Tokenizer

OPEN, CLOSE = "<think>", "</think>"
BLANKS = " \t\r\n"
"""What is dropped around a thought, and between it and the answer."""

Stage = Literal["start", "thought", "answer"]
"""Where a reply goes on: before its first word, so that a thought may begin; inside of a thought; after it."""


@dataclasses.dataclass(frozen=True)
class Thinking:
    """How a model writes thoughts; `thinking` makes it."""

    token_ids: tuple[int, ...]
    """Of the two marks, where they are added tokens; otherwise they are plain text, and there are none."""
    close_ids: tuple[int, ...]
    """The tokens that end a thought, as the tokenizer writes its mark."""


def thinking(tokenizer: Tokenizer, template: str | None) -> Thinking | None:
    """Returns how a model writes thoughts, or None where nothing says that it may.

    It may where its tokenizer has the two marks as added tokens, or its chat template names the mark that ends one. A
    template that only strips the thoughts of past turns is enough: those of LFM2.5 are alike for releases that think
    (LFM2.5-1.2B-Thinking, whose tokenizer lacks the marks) and for those that do not, and neither opens a thought in
    the generation prompt. No file tells them apart, so both may think; a reply that does not is read as it is.
    """
    added = {token.content: i for i, token in tokenizer.get_added_tokens_decoder().items()}
    if OPEN in added and CLOSE in added:
        return Thinking((added[OPEN], added[CLOSE]), (added[CLOSE],))
    if CLOSE in (template or ""):
        return Thinking((), tuple(encoded(tokenizer, CLOSE, add_special_tokens=False).ids))
    return None


def stage(begun: str, *, marked: bool = True) -> Stage:
    """Returns where a reply goes on of which this text is there already, written by a template or a client.

    Args:
      marked: its marks are marks; False: they are spelled out, where a tokenizer has tokens for them.
    """
    begun = begun.lstrip(BLANKS)
    if marked and begun.startswith(OPEN):
        return "answer" if CLOSE in begun else "thought"
    return "answer" if begun else "start"


@dataclasses.dataclass(frozen=True)
class Thought:
    """A piece of a thought."""

    text: str


class Split(NamedTuple):
    """A reply, or a piece of one."""

    thought: str
    answer: str


class ThoughtSplitter:
    """Splits a reply that arrives in pieces into its thought and its answer; how it is cut makes no difference.

    A thought comes first or not at all, with nothing but blanks before it; it ends at the first `</think>`, or with
    the reply. Later marks are text of the answer. Blanks around a thought are dropped.

    Args:
      begin: where the reply goes on (see `stage`): inside of a thought where the prompt has opened it.
    """

    def __init__(self, begin: Stage = "start"):
        self.stage: Stage = begin
        self._held = ""
        """What may still become a mark, or blanks that may still be dropped."""
        self._is_first = True
        """Nothing of the thought, or of the answer after one, has been given yet."""
        self._is_after = False
        """A thought has come before the answer."""

    def skip(self) -> None:
        """Takes a reply that has not begun with a thought for the answer (`ThoughtCounter.none`)."""
        if self.stage == "start":
            self.stage = "answer"

    def push(self, text: str) -> Split:
        """Returns what has become certain with this piece."""
        thought, self._held = "", self._held + text
        if self.stage == "start":
            begun = self._held.lstrip(BLANKS)
            if len(begun) < len(OPEN) and OPEN.startswith(begun):
                return Split("", "")
            self.stage = "thought" if begun.startswith(OPEN) else "answer"
            self._held = begun.removeprefix(OPEN) if self.stage == "thought" else self._held
        if self.stage == "thought":
            body, closed, rest = self._held.partition(CLOSE)
            if not closed:
                return Split(self._of_thought(body), "")
            thought, self._held = self._begun(body.rstrip(BLANKS)), rest
            self.stage, self._is_first, self._is_after = "answer", True, True
        answer, self._held = self._held, ""
        return Split(thought, self._begun(answer) if self._is_after else answer)

    def _of_thought(self, body: str) -> str:
        """Gives what there is of an open thought, but for an end that may belong to its mark or be dropped."""
        mark = next((n for n in range(len(CLOSE) - 1, 0, -1) if body.endswith(CLOSE[:n])), 0)
        given = body[: len(body) - mark].rstrip(BLANKS)
        self._held = body[len(given) :]
        return self._begun(given)

    def _begun(self, text: str) -> str:
        """Drops the blanks before the first word."""
        if self._is_first:
            text = text.lstrip(BLANKS)
            self._is_first = not text
        return text

    def finish(self) -> Split:
        """Returns the rest of a reply that ends here."""
        held, self._held = self._held, ""
        return Split(self._begun(held.rstrip(BLANKS)), "") if self.stage == "thought" else Split("", held)


def split_thought(text: str, begin: Stage = "start") -> Split:
    """Splits a whole reply into thought and answer, as `ThoughtSplitter` does."""
    splitter = ThoughtSplitter(begin)
    first, rest = splitter.push(text), splitter.finish()
    return Split(first.thought + rest.thought, first.answer + rest.answer)


class ThoughtCounter:
    """Counts the tokens of a reply's thought, its marks among them.

    Args:
      how: the model writes thoughts; None: not at all.
      begin: as for `ThoughtSplitter`.
    """

    def __init__(self, tokenizer: Tokenizer, how: Thinking | None, begin: Stage):
        self._tokenizer, self._splitter = tokenizer, ThoughtSplitter(begin if how else "answer")
        self._open_ids = how.token_ids[:1] if how else ()
        self._seen = 0
        self.tokens = 0
        """Tokens of the thought so far."""
        self.inside = 0
        """Those of them after the mark that begins it."""

    @property
    def open(self) -> bool:
        """Whether a thought has begun and not ended."""
        return self._splitter.stage == "thought"

    @property
    def undecided(self) -> bool:
        """Whether a thought may still begin."""
        return self._splitter.stage == "start"

    @property
    def none(self) -> bool:
        """Whether the reply has begun without a thought, as tokens alone tell: its text may spell the mark out."""
        return bool(self._open_ids) and self._splitter.stage == "answer" and not self.tokens

    def push(self, ids: Iterable[int]) -> None:
        """Takes tokens in."""
        for i in ids:
            before = self._splitter.stage
            if before == "answer":
                return
            # Bytes as characters: the marks are ASCII, and a token may hold half a character.
            text = token_bytes(self._tokenizer, i).decode("latin-1")
            if before == "start" and self._open_ids and i not in self._open_ids and text.strip(BLANKS):
                self._splitter.skip()
            self._splitter.push(text)
            self._seen += 1
            if "thought" in (before, self._splitter.stage):
                self.tokens = self._seen
                self.inside += before == "thought"

    def copy(self) -> ThoughtCounter:
        """Returns another counter at the same place."""
        other = copy.copy(self)
        other._splitter = copy.copy(self._splitter)
        return other


class ThoughtLimit:
    """Follows a reply token by token, and says which tokens must come so that its thought ends in time.

    Args:
      how: the model writes thoughts.
      begin: as for `ThoughtSplitter`.
      most: tokens of the thought, without its marks.
    """

    def __init__(self, tokenizer: Tokenizer, how: Thinking, begin: Stage, most: int):
        self._tokenizer, self._counter = tokenizer, ThoughtCounter(tokenizer, how, begin)
        self._close_ids, self._most = how.close_ids, most
        self._closing = 0
        """Tokens of the mark that were forced so far."""
        self._half = b""
        """What there is of a character that is not complete."""

    @property
    def forced(self) -> int | None:
        """The token that must come next; None: any may, as where half a character stands open."""
        if not self._counter.open or self._counter.inside < self._most or self._half:
            return None
        return self._close_ids[self._closing]

    def push(self, token: int) -> None:
        """Takes the next token in."""
        self._closing = self._closing + 1 if token == self.forced else 0
        self._counter.push([token])
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        decoder.decode(self._half + token_bytes(self._tokenizer, token))
        self._half = decoder.getstate()[0]

    def copy(self) -> ThoughtLimit:
        """Returns another limit at the same place."""
        other = copy.copy(self)
        other._counter = self._counter.copy()
        return other
