"""What strangers wrote in a conversation, kept from passing for the marks of its turns.

The text of a document may hold the names of special tokens, `<|im_end|>` and the like. In a rendered prompt they would
be the tokens. Here contents are rendered with other characters in place of those of the names, from a range for private
use, so that they are known in the prompt and put back when it is encoded.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

from lfm_jax.text.codec import encoded
from lfm_jax.text.tokenizer import without_specials

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_PRIVATE = (*range(0xE000, 0xF900), *range(0xF0000, 0xFFFFE))


class Disguise:
    """Special tokens' names in texts, written in other characters.

    Args:
      names: of the special tokens.
      given: all that holds such texts, as plain data; its characters are not taken.
    """

    def __init__(self, names: Collection[str], given: Any):
        present = set(json.dumps(given, ensure_ascii=False))
        letters = sorted(set("".join(names)))
        free = (chr(i) for i in _PRIVATE if chr(i) not in present)
        there = dict(zip(letters, itertools.islice(free, len(letters)), strict=True))
        self._there, self._back = str.maketrans(there), str.maketrans({c: letter for letter, c in there.items()})
        self._taken = re.compile(f"[{''.join(there.values())}]")
        longest = sorted(names, key=len, reverse=True)
        self.names = re.compile(f"({'|'.join(map(re.escape, longest))})")
        """Finds the names as the tokenizer does: of those that begin at one place the longest."""
        beginnings = sorted({name[:n] for name in names for n in range(1, len(name))}, key=len, reverse=True)
        begun = f"|(?:{'|'.join(map(re.escape, beginnings))})(?=\\s*\\Z)" if beginnings else ""
        self._hidden = re.compile(self.names.pattern + begun)

    def on(self, value: Any) -> Any:
        """Plain data with the names in its texts disguised, and what they end in of one: the rest might come after."""
        if isinstance(value, str):
            return self._hidden.sub(lambda match: match[0].translate(self._there), value)
        if isinstance(value, list):
            return [self.on(item) for item in value]
        if isinstance(value, dict):
            return {self.on(key): self.on(item) for key, item in value.items()}
        return value

    def off(self, text: str) -> str:
        """The text with the names as they were."""
        return text.translate(self._back)

    def is_on(self, text: str) -> bool:
        """Something in the text is disguised."""
        return self._taken.search(text) is not None


def encode_contents_plainly(
    tokenizer: Tokenizer, given: Any, render: Callable[[Callable[[Any], Any]], str]
) -> list[int]:
    """Token ids of a rendered conversation in which special tokens are only those that its template writes.

    Args:
      given: all data that comes from outside.
      render: gives the text, with a function applied to each value from outside.

    Raises:
      ValueError: the template works on the texts that hold such names, so that they cannot be found in the prompt.
    """
    clean = render(lambda value: value)
    names = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special} - {""}
    if not names:
        return encoded(tokenizer, clean, add_special_tokens=False).ids
    disguise = Disguise(names, [given, clean, sorted(names)])
    if disguise.on(given) == given:
        return encoded(tokenizer, clean, add_special_tokens=False).ids
    text = render(disguise.on)
    if disguise.off(text) != clean:
        raise ValueError(
            "a content has the name of a special token, and the chat template does more with contents than to write "
            "them, so that it is not known where the name stands in the prompt; take it out of the content"
        )
    ids: list[int] = []
    run = ""  # Of the template's own marks and of contents without names.
    for part in disguise.names.split(text):
        if disguise.is_on(part):
            ids += encoded(tokenizer, run, add_special_tokens=False).ids if run else []
            ids += encoded(without_specials(tokenizer), disguise.off(part), add_special_tokens=False).ids
            run = ""
        else:
            run += part
    return ids + (encoded(tokenizer, run, add_special_tokens=False).ids if run else [])
