"""Chats to learn from: rendered by the checkpoint's own template, packed into rows, the assistant's tokens learnt.

Everything is read, checked and packed when a corpus is opened, so that a bad line ends a run before it begins. Which
chats share a row is fixed by the seed; the order of the rows is new in each epoch.

Dimensions: B rows of a batch, T time.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from itertools import batched
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

from lfm_jax.config import ModelConfig
from lfm_jax.data.batch import Batch, batches_of
from lfm_jax.data.chats import OPENERS, Chat, read_chats
from lfm_jax.data.config import ChatData
from lfm_jax.data.corpora.corpus import check_rows
from lfm_jax.data.encoding import Tokens
from lfm_jax.data.filling import fill_rows
from lfm_jax.data.heldout import is_heldout
from lfm_jax.data.records import SPANS_FORMAT, RowCodec
from lfm_jax.data.sources import find_files
from lfm_jax.problems import raise_problems
from lfm_jax.text.chat import DEFAULT_TEMPLATE, special_tokens, with_calls
from lfm_jax.text.conversation import Span, render_conversation, token_spans
from lfm_jax.text.templates import compiled_template
from lfm_jax.text.tokenizer import without_limits

if TYPE_CHECKING:
    import grain

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

    def __call__(self, chats: Sequence[Chat], problems: list[str]) -> Iterator[Tokens]:
        """The tokens of each chat.

        Args:
          problems: gets a line for each chat that cannot be used, which is passed over.
        """
        for some in batched(chats, BATCH_CHATS):
            rendered, kept = [], []
            for chat in some:
                try:
                    rendered.append(self.render(chat))
                except ValueError as error:
                    problems.append(f"{chat}: {error}")
                else:
                    kept.append(chat)
            for chat, tokens in zip(kept, self.encode(rendered), strict=True):
                if tokens.learnt()[1:].any():
                    yield tokens
                else:
                    problems.append(f"{chat}: nothing of it is learnt, since the first token of all has none before it")


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


class ChatCorpus:
    """The chats of `config.sources`; as a `Corpus`, but that what is held out is measured by the token.

    Raises:
      ValueError: on construction: one message that lists every file and line that cannot be used, or nothing is left to
        learn from or to hold out.
    """

    def __init__(self, config: ChatData, tokenizer: Tokenizer, model: ModelConfig, template: str | None):
        self._config = config
        encoder = ChatEncoder(tokenizer, model, template, config.date)
        problems: list[str] = []
        train, heldout = _split(config, problems)
        codec = RowCodec(SPANS_FORMAT, np.dtype("<u2" if model.vocab_size <= 2**16 else "<u4"))
        self._train = _Packed(encoder, train, config, codec, problems)
        self._heldout = _Packed(encoder, heldout, config, codec, problems)
        raise_problems("chats cannot be used", problems)
        for side, name in ((self._train, "sources"), (self._heldout, "heldout")):
            if side.chats and not side.records:
                raise ValueError(f"{name}: every chat is longer than seq_len {config.seq_len}; raise seq_len, or set "
                                 "too_long to cut")

    @property
    def batch_size(self) -> int:
        return self._config.batch_size

    @property
    def rows(self) -> int:
        """Training rows of one epoch."""
        return len(self._train.records)

    def steps(self, epochs: float) -> int:
        """Batches of so many epochs; the last one goes on into the next epoch."""
        return math.ceil(epochs * self.rows / self.batch_size)

    def __str__(self) -> str:
        parts = [f"{self._train}, {self.rows:,} rows an epoch"]
        return "; held out: ".join(parts + ([str(self._heldout)] if self._heldout.records else []))

    def train_batches(self, rows: np.ndarray | None = None) -> grain.DatasetIterator:
        """Endless batches; see `Corpus.train_batches`."""
        config, codec = self._config, self._train.codec
        check_rows(rows, config.batch_size)
        import grain

        from lfm_jax.data.guarded import GuardedIterator
        from lfm_jax.data.shards import batches

        # Grain shuffles epoch e with seed + e, so seeds as close as 0 and 1 would share their orders.
        order_seed = int(np.random.SeedSequence(config.seed).generate_state(1)[0])
        source = grain.MapDataset.source(self._train.records)
        decoded = source.map(lambda record: codec.decode(record, config.seq_len))
        found = batches(decoded.shuffle(seed=order_seed).repeat(), config.batch_size, rows, config.prefetch)
        fingerprint = f"{self._train.digest()}-{config.seq_len}-{config.batch_size}-{config.seed}"
        return GuardedIterator(found, fingerprint)

    def heldout_batches(self) -> Iterator[Batch]:
        """One pass over the held-out chats, always in the same batches; none where nothing is held out."""
        codec, T = self._heldout.codec, self._config.seq_len
        return batches_of((codec.decode(record, T) for record in self._heldout.records), self._config.batch_size)


class _Packed:
    """Some chats as packed rows, and what became of them."""

    def __init__(
        self, encoder: ChatEncoder, chats: Sequence[Chat], config: ChatData, codec: RowCodec, problems: list[str]
    ):
        self.codec, self.chats, self._T = codec, len(chats), config.seq_len
        self._cuts = config.too_long == "cut"
        self._cut, self._dropped, self._tokens, self._learnt = 0, 0, 0, 0
        kept = [tokens for tokens in map(self._fitted, encoder(chats, problems)) if tokens is not None]
        rows = fill_rows([len(tokens.ids) - 1 for tokens in kept], config.seq_len, config.seed)
        # Rows begin with the longest chats; readers shuffle them.
        self.records = [codec.encode([kept[i] for i in row]) for row in rows]

    def _fitted(self, tokens: Tokens) -> Tokens | None:
        """A chat of at most T pairs; None where it is dropped."""
        ids, spans = tokens.ids.astype(self.codec.dtype), tokens.spans
        assert spans is not None
        longer = len(ids) > self._T + 1
        fitted = Tokens(ids[: self._T + 1], np.clip(spans, 0, self._T + 1))
        learnt = int(fitted.learnt()[1:].sum())
        if longer and not (self._cuts and learnt):
            self._dropped += 1
            return None
        self._cut += longer
        self._tokens += len(fitted.ids) - 1
        self._learnt += learnt
        return fitted

    def digest(self) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for record in self.records:
            digest.update(hashlib.blake2b(record, digest_size=16).digest())
        return digest.hexdigest()

    def __str__(self) -> str:
        full = f", rows {self._tokens / (len(self.records) * self._T):.0%} full" if self.records else ""
        over = "".join(f", {count:,} longer than {self._T:,} tokens {what}"
                       for count, what in ((self._cut, "cut"), (self._dropped, "dropped")) if count)
        return f"{self.chats:,} chats{over}, {self._tokens:,} tokens, {self._learnt:,} of them learnt{full}"


def _split(config: ChatData, problems: list[str]) -> tuple[list[Chat], list[Chat]]:
    """(training chats, held-out chats)."""
    found = find_files(config.sources, suffixes=tuple(OPENERS))
    if config.heldout:
        held = find_files(config.heldout, suffixes=tuple(OPENERS))
        paths = {file.path for file in held}
        files = [file for file in found if file.path not in paths]
        if not files:
            raise ValueError(f"heldout {list(config.heldout)} takes every file of sources; name fewer, or add sources")
        sides = read_chats(files, config.ignore, problems), read_chats(held, config.ignore, problems)
    else:
        chats = read_chats(found, config.ignore, problems)
        sides = [], []
        for chat in chats:
            sides[is_heldout(chat.text, config.heldout_fraction)].append(chat)
    raise_problems("chats cannot be used", problems)
    if not sides[0]:
        raise ValueError(f"sources {list(config.sources)}: no chat is left to learn from; name files with chats")
    if not sides[1] and (config.heldout or config.heldout_fraction > 0):
        raise ValueError(
            f"heldout: no chat in {list(config.heldout)}" if config.heldout else
            f"heldout_fraction {config.heldout_fraction} of {len(sides[0])} chats leaves none held out; name files in "
            "`heldout`, raise heldout_fraction, or set it to 0 to hold out none")
    return sides
