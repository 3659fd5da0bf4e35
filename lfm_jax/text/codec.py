"""Text to tokens and back: encodes prompts, decodes token by token, stops at stop strings."""

from __future__ import annotations

import codecs
import functools
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

from lfm_jax.config import ModelConfig

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer


def check_tokenizer(tokenizer: Tokenizer, config: ModelConfig) -> None:
    """Checks that the model's embedding table has a row for every id of the tokenizer.

    Raises:
      ValueError: the tokenizer has more ids than the model.
    """
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    if size > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {size} ids but the model's vocab_size is {config.vocab_size}; "
            "use the tokenizer that the model was trained with"
        )


def encode(tokenizer: Tokenizer, text: str, bos_id: int) -> list[int]:
    """Encodes a text with the tokenizer's own special tokens, and with bos once.

    A text rendered by a chat template already begins with bos, and the tokenizer would add a second one.
    """
    ids = encoded(tokenizer, text, add_special_tokens=True).ids
    return ids[1:] if ids[:2] == [bos_id, bos_id] else ids


def encoded(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool) -> Encoding:
    """Encodes a whole text, without the tokenizer's truncation and padding (`without_limits`).

    Other threads can run meanwhile.

    Raises:
      ValueError: the text has half of a surrogate pair, which is not a character.
    """
    from lfm_jax.text.tokenizer import without_limits  # Generating from ids must not need `tokenizers`.

    tokenizer = without_limits(tokenizer)
    try:
        # The library releases the interpreter's lock for a batch, but not for a single text.
        return tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)[0]
    except TypeError:
        place = next(i for i, c in enumerate(text) if "\ud800" <= c <= "\udfff")
        raise ValueError(f"the text has half of a surrogate pair, {text[place]!r}, at character {place}") from None


def token_bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """Returns the bytes of one token of a byte-level tokenizer, which may be part of a character."""
    piece = tokenizer.id_to_token(token) or ""
    try:
        return bytes(_byte_of()[c] for c in piece)
    except KeyError:  # The content of a special token is plain text.
        return piece.encode()


@functools.cache
def _byte_of() -> dict[str, int]:
    """Maps characters to bytes, in the alphabet of byte-level tokenizers (GPT-2, `bytes_to_unicode`)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


class Detokenizer:
    """Decodes tokens as they arrive; the pieces joined are the text of all tokens decoded at once.

    A token may hold part of a character: its bytes are held back until the character is complete.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder() if skip_special_tokens else {}
        self._left_out = frozenset(i for i, token in added.items() if token.special)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Iterable[int]) -> str:
        """Returns the text that these tokens complete."""
        shown = (i for i in ids if i not in self._left_out)
        return self._decoder.decode(b"".join(token_bytes(self._tokenizer, i) for i in shown))

    def finish(self) -> str:
        """Returns the rest: bytes of an incomplete character, as U+FFFD."""
        return self._decoder.decode(b"", final=True)


class StopStrings:
    """Passes text through up to the first stop string, holding back only what may still become one.

    Of several stop strings the one that is complete first ends the text, the longest of those that are complete
    at once. How the text is cut into pieces makes no difference.

    Args:
      stop: strings that end the text, matched against the shown text.
      through_hidden: those also matched against the text with hidden tokens included.
    """

    def __init__(self, stop: Sequence[str], through_hidden: Sequence[str] = ()):
        self._stop, self._through_hidden = tuple(stop), tuple(through_hidden)
        self._longest = max(map(len, through_hidden), default=1)
        self._held = ""
        """The end of the shown text that may still become a stop string."""
        self._recent = ""
        """The last characters of the whole text, one fewer than the longest of `through_hidden` has."""
        self._is_shown: list[bool] = []
        """Of each character of `_recent`."""
        self.stopped = False
        """A stop string was met; what follows it is dropped."""

    def push(self, text: str, *, hidden: bool = False) -> str:
        """Returns the text that can be shown now; hidden text is never part of it."""
        if self.stopped or (hidden and not self._through_hidden):
            return ""
        self._held += "" if hidden else text
        self._recent += text
        self._is_shown += [not hidden] * len(text)
        # Every match ends in the new text: the more characters follow it, in either text, the earlier it ends.
        found = [(at + len(s) - len(self._held), at) for s in self._stop if (at := self._held.find(s)) >= 0]
        found += [(at + len(s) - len(self._recent), self._place(at))
                  for s in self._through_hidden if (at := self._recent.find(s)) >= 0]
        if found:
            self.stopped = True
            text, self._held = self._held[: min(found)[1]], ""
            return text
        begun = [len(self._held) - _overlap(self._held, s) for s in self._stop]
        begun += [self._place(len(self._recent) - _overlap(self._recent, s)) for s in self._through_hidden]
        shown = min(begun, default=len(self._held))
        text, self._held = self._held[:shown], self._held[shown:]
        old = max(len(self._recent) - self._longest + 1, 0)
        self._recent, self._is_shown = self._recent[old:], self._is_shown[old:]
        return text

    def _place(self, at: int) -> int:
        """Returns the index in `_held` of the first shown character from `_recent[at]` on."""
        return len(self._held) - sum(self._is_shown[at:])

    def finish(self) -> str:
        """Returns the text that was held back and did not become a stop string."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Returns the length of the longest proper prefix of `stop` that ends `text`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


class ReplyText:
    """Turns the tokens of one row into text: without stop ids, up to a stop string, never half a character.

    A stop string may be or contain special tokens, even where the text leaves them out: it is then also matched against
    the text with them included. A hidden token that occurs in a stop string ends a pending character, which is then
    U+FFFD.

    Args:
      shown: special tokens that the text has even where it leaves out the others.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str], stop_ids: Collection[int], *, skip_special_tokens: bool,
        shown: Collection[int] = (),
    ):
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens=False)
        self._stop_ids = frozenset(stop_ids)
        self._hidden = {
            i: token.content for i, token in tokenizer.get_added_tokens_decoder().items()
            if token.special and ((skip_special_tokens and i not in shown) or i in self._stop_ids)
        }
        through_hidden = [s for s in stop if any(name in s for name in self._hidden.values())]
        self._named = frozenset(i for i, name in self._hidden.items() if any(name in s for s in through_hidden))
        self._strings = StopStrings(stop, through_hidden)

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the text."""
        return self._strings.stopped

    def push(self, ids: Iterable[int]) -> str:
        """Returns the text that can be shown after these tokens."""
        text = ""
        for i in ids:
            if i in self._named:
                text += self._strings.push(self._detokenizer.finish())
            if i in self._hidden:
                text += self._strings.push(self._hidden[i], hidden=True)
            elif i not in self._stop_ids:
                text += self._strings.push(self._detokenizer.push([i]))
        return text

    def finish(self) -> str:
        """Returns the text that was still held back when the tokens ended."""
        return self._strings.push(self._detokenizer.finish()) + self._strings.finish()
