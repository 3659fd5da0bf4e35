"""An engine with a tokenizer and a chat template, which answers in text, for asyncio.

Tokens are decoded in the event loop, so that the engine's thread does nothing but keep the device busy.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from jax.sharding import Mesh

from lfm_jax.engine.config import DEFAULT, EngineConfig
from lfm_jax.engine.engine import Engine
from lfm_jax.engine.pool import Ticket
from lfm_jax.engine.request import Event, Finish, Request, TokenLogprob
from lfm_jax.model import LFM
from lfm_jax.structured.grammar import Grammar, Matcher, grammar_tokenizer
from lfm_jax.text.chat import Message, encode_chat, reply_stage, turn_stop_ids
from lfm_jax.text.codec import ReplyText, check_tokenizer, encode
from lfm_jax.text.thoughts import Stage, thinking

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True)
class Piece:
    """New text of one continuation, or its end."""

    choice: int
    """Number of the continuation among those of all requests submitted together."""
    text: str
    tokens: list[int]
    """New tokens, a stop id included; their text may come with a later piece."""
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob] | None = None
    cached_tokens: int | None = None
    """As with `Event`."""
    finish: Finish | None = None
    reason: str | None = None
    """As with `Event`."""


class Service:
    """Runs requests and returns text.

    Args:
      model, tokenizer: as `lfm.load` returns them.
      template: chat template; None means DEFAULT_TEMPLATE.
      config, mesh: as for `Engine`.
      plain_contents: as for `chat.encode_chat`.

    Raises:
      ValueError: see `Engine`, or the tokenizer has more ids than the model.
    """

    def __init__(
        self, model: LFM, tokenizer: Tokenizer, template: str | None = None, config: EngineConfig = DEFAULT,
        mesh: Mesh | None = None, *, plain_contents: bool = False,
    ):
        check_tokenizer(tokenizer, model.config)
        self.tokenizer, self.config = tokenizer, model.config
        self._template, self._plain_contents = template, plain_contents
        self.engine = Engine(model, config, mesh)
        self.stop_ids = turn_stop_ids(tokenizer, model.config)
        """Tokens that end a continuation."""
        self.thinking = thinking(tokenizer, template)
        """How the model writes thoughts in chats; None: it has none."""

    def encode(self, text: str) -> list[int]:
        """Returns the token ids of a prompt, with bos."""
        return encode(self.tokenizer, text, self.config.bos_id)

    def encode_chat(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None, **options: Any
    ) -> list[int]:
        """Encodes a conversation; options as those of `chat.encode_chat`."""
        return encode_chat(self.tokenizer, self.config, self._template, messages, tools,
                           plain_contents=self._plain_contents, **options)

    def stage(self, prompt: Sequence[int], begun: str = "") -> Stage:
        """Returns where the reply to the prompt of a chat goes on; see `reply_stage`."""
        return reply_stage(self.tokenizer, self.thinking, prompt, begun)

    def matcher(self, grammar: Grammar | None) -> Matcher:
        """Returns a matcher for `Request.grammar`; without a grammar, one for a limit of the thought alone.

        Raises:
          GrammarError: see `GrammarTokenizer.matcher`.
        """
        return grammar_tokenizer(self.tokenizer, self.config.vocab_size, self.stop_ids).matcher(grammar)

    def submit(
        self, requests: Sequence[Request], stop: Sequence[str] = (), *, skip_special_tokens: bool = True,
        shown: Collection[int] = (),
    ) -> Answers:
        """Queues requests, all or none, from a running event loop.

        Args:
          stop: strings before which a continuation ends; special tokens may be among them.
          skip_special_tokens: leaves special tokens out of the text.
          shown: those that the text has all the same.

        Raises:
          ValueError, EngineFullError, RuntimeError: see `Engine.submit`.
        """
        return Answers(self, requests, stop, skip_special_tokens=skip_special_tokens, shown=shown)


class Answers:
    """The continuations of some requests, as they arrive."""

    def __init__(
        self, service: Service, requests: Sequence[Request], stop: Sequence[str], *, skip_special_tokens: bool,
        shown: Collection[int],
    ):
        self._engine, self._loop = service.engine, asyncio.get_running_loop()
        self._news: asyncio.Queue[tuple[int, Event] | None] = asyncio.Queue()
        self._tickets: list[Ticket] = []
        self._firsts: list[int] = []
        """The number of the first continuation of each request."""
        self._replies: dict[int, ReplyText] = {}
        """By continuation, of those that have not ended."""
        most = self._engine.config.max_queue
        if len(requests) > most:
            raise ValueError(f"{len(requests)} prompts at once; at most {most} may wait (max_queue)")
        try:
            for request in requests:
                ids = service.stop_ids if request.stop_ids is None else request.stop_ids
                self._firsts.append(len(self._replies))
                for _ in range(request.n):
                    self._replies[len(self._replies)] = ReplyText(
                        service.tokenizer, stop, ids, skip_special_tokens=skip_special_tokens, shown=shown
                    )
                listener = partial(self._listen, len(self._tickets))
                self._tickets.append(self._engine.submit(dataclasses.replace(request, stop_ids=ids), listener))
        except BaseException:
            self.cancel()
            raise

    def _listen(self, number: int, event: Event) -> None:
        """Passes an event from the engine's thread to the event loop."""
        with suppress(RuntimeError):  # The loop is closed, so nothing waits for the event.
            self._loop.call_soon_threadsafe(self._news.put_nowait, (number, event))

    def cancel(self) -> None:
        """Ends the continuations that still run, and `pieces`; their slots are free at the engine's next turn."""
        for ticket in self._tickets:
            if not ticket.done:
                self._engine.cancel(ticket)
        self._news.put_nowait(None)

    async def pieces(self) -> AsyncGenerator[Piece]:
        """Yields the pieces of all continuations; the last one of each has a `finish`. Cancels what runs if left
        early."""
        try:
            while self._replies:
                news = await self._news.get()
                if news is None:
                    return
                number, event = news
                choice = self._firsts[number] + event.choice
                reply = self._replies.get(choice)
                if reply is None:  # A stop string ended it while the engine went on.
                    continue
                text, taken, finish = "", 0, event.finish
                while taken < len(event.tokens) and not reply.stopped:
                    text += reply.push(event.tokens[taken : taken + 1])
                    taken += 1
                if reply.stopped:
                    if finish is None:
                        self._engine.cancel(self._tickets[number], event.choice, "stop")
                    finish = "stop"
                elif finish is not None:
                    text += reply.finish()
                if finish is not None:
                    del self._replies[choice]
                # Tokens after those of the stop string are not part of the answer.
                logprobs = None if event.logprobs is None else event.logprobs[:taken]
                yield Piece(choice, text, event.tokens[:taken], logprobs, event.prompt_logprobs, event.cached_tokens,
                            finish, event.reason)
        finally:
            self.cancel()
