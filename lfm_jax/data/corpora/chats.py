"""Chats to learn from: rendered by the checkpoint's own template, packed into rows, the assistant's tokens learnt.

Dimensions: T time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from itertools import batched
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from lfm_jax.config import ModelConfig
from lfm_jax.data.chats import Chat, read_chats
from lfm_jax.data.config import ChatData
from lfm_jax.data.corpora.packed import Group, PackedCorpus, shortened
from lfm_jax.data.encoding import Tokens
from lfm_jax.data.sources import SourceFile
from lfm_jax.text.chat import DEFAULT_TEMPLATE, special_tokens, with_calls
from lfm_jax.text.conversation import Span, render_conversation, token_spans
from lfm_jax.text.templates import compiled_template
from lfm_jax.text.tokenizer import without_limits

BATCH_CHATS = 64
"""Chats encoded at a time, in parallel where there are cores."""


class ChatEncoder:
    """Renders and encodes whole chats, with the spans that are learnt.

    Args:
      template: None means DEFAULT_TEMPLATE.
      date: the day that the template writes, as 2026-01-31; None where it writes none.

    Raises:
      ValueError: the template is not valid, or it writes the date and none is given.
    """

    def __init__(self, tokenizer: Tokenizer, model: ModelConfig, template: str | None, date: str | None):
        self._tokenizer = without_limits(tokenizer)
        self._template = template or DEFAULT_TEMPLATE
        self._given: dict[str, Any] = special_tokens(tokenizer, model)
        if "strftime_now" in compiled_template(self._template)[1]:
            if date is None:
                raise ValueError("the chat template writes the date, and a run must not learn another one each day; "
                                 "name one in data.date, such as 2026-01-31")
            self._given["strftime_now"] = datetime.fromisoformat(date).strftime

    def render(self, chat: Chat) -> tuple[str, list[Span]]:
        """The text of a chat, and the spans of characters that are learnt.

        Raises:
          ValueError: the template refuses the chat or leaves its calls out, what the assistant wrote is not known, or
            nothing of it is learnt.
        """
        messages = with_calls(self._template, chat.messages)
        text, spans = render_conversation(self._template, messages, tools=chat.tools, **self._given)
        spans = [(a, b) for a, b in spans if a < b]
        _check_calls(chat, "\n".join(text[a:b] for a, b in spans))
        if any(message["role"] == "assistant" for message in chat.messages[: chat.prompt]):
            prompt, _ = render_conversation(
                self._template, messages[: chat.prompt], tools=chat.tools, **self._given)
            if not text.startswith(prompt):
                raise ValueError("the chat template writes the prompt otherwise once the completion follows, so that "
                                 "what is learnt is not known; write messages instead of prompt and completion")
            spans = [(a, b) for a, b in spans if a >= len(prompt)]
        if not spans:
            raise ValueError("nothing of it is learnt: the chat template marks nothing in it as the assistant's")
        return text, spans

    def encode(self, rendered: Sequence[tuple[str, list[Span]]]) -> list[Tokens]:
        """The tokens of rendered chats: a token is learnt if any of its characters is."""
        encodings = self._tokenizer.encode_batch([text for text, _ in rendered], add_special_tokens=False)
        return [
            Tokens(np.array(encoding.ids), np.array(token_spans(encoding.offsets, spans), np.int64).reshape(-1, 2))
            for encoding, (_, spans) in zip(encodings, rendered, strict=True)
        ]

    def __call__(self, chats: Iterable[Chat], problems: list[str]) -> Iterator[Tokens | None]:
        """The tokens of each chat; None where it cannot be used.

        Args:
          problems: gets a line for each chat that cannot be used.
        """
        for some in batched(chats, BATCH_CHATS):
            rendered: list[tuple[str, list[Span]] | None] = []
            for chat in some:
                try:
                    rendered.append(self.render(chat))
                except ValueError as error:
                    problems.append(f"{chat}: {error}")
                    rendered.append(None)
            encoded = iter(self.encode([found for found in rendered if found is not None]))
            for chat, found in zip(some, rendered, strict=True):
                tokens = None if found is None else next(encoded)
                if tokens is not None and not tokens.learnt()[1:].any():
                    problems.append(f"{chat}: nothing of it is learnt, since the first token of all has none before it")
                    tokens = None
                yield tokens


_WORD = re.compile(r"[A-Za-z0-9_]+")


def _check_calls(chat: Chat, learnt: str) -> None:
    """Refuses a template that leaves out calls: whatever its form, all words of their names, keys and values must be in
    what is learnt.

    Raises:
      ValueError: words are missing.
    """
    for message in chat.messages[chat.prompt :]:
        for call in message.get("tool_calls", ()):
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            missing = [word for word in _words([name, arguments]) if word not in learnt]
            if missing:
                raise ValueError(f"the chat template leaves {missing[0]!r}, of the call of {name!r}, out of what the "
                                 "assistant writes; use a template that writes tool_calls, or one that does not name "
                                 "them: calls are then written as LFM2 does")


def _words(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list):
        for item in value:
            yield from _words(item)
    elif value is not None and not isinstance(value, bool):
        yield from _WORD.findall(value if isinstance(value, str) else json.dumps(value))


class ChatCorpus(PackedCorpus[Chat]):
    """The chats of `config.sources`, a piece of a row each.

    Args:
      all_learnt: whether every token of a chat is learnt, not the assistant's alone.

    Raises:
      ValueError: see `PackedCorpus` and `ChatEncoder`.
    """

    noun = "chat"

    def __init__(
        self, config: ChatData, tokenizer: Tokenizer, model: ModelConfig, template: str | None, *,
        all_learnt: bool = False,
    ):
        self._encode = ChatEncoder(tokenizer, model, template, config.date)
        self._all_learnt = all_learnt
        super().__init__(config, model.vocab_size)

    def read(self, files: Sequence[SourceFile], ignore: Sequence[str], problems: list[str]) -> list[Chat]:
        return read_chats(files, ignore, problems)

    def encoded(self, lines: Sequence[Chat], problems: list[str]) -> Iterator[Group]:
        for found in self._encode(lines, problems):
            if found is not None:
                yield (found._replace(spans=np.array([[0, len(found.ids)]])) if self._all_learnt else found,)

    def cut(self, group: Group, T: int) -> Group | None:
        fitted = shortened(group[0], T)
        return (fitted,) if fitted.learnt()[1:].any() else None
