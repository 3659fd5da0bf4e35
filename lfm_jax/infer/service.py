"""A model that answers in text: an engine with a tokenizer and a chat template, for asyncio.

Text is made where it is waited for, so that the engine's thread does nothing but keep the device at work.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from jax.sharding import Mesh

from lfm_jax.infer.chat import DEFAULT_TEMPLATE, END_OF_TURN, Message, render_chat, special_tokens
from lfm_jax.infer.engine import Engine
from lfm_jax.infer.engine_config import DEFAULT, EngineConfig
from lfm_jax.infer.grammar import Grammar, Matcher, grammar_tokenizer
from lfm_jax.infer.request import Event, Finish, Request, TokenLogprob
from lfm_jax.infer.text import Reply, check_tokenizer, encode
from lfm_jax.infer.tools import ToolCall, render_calls
from lfm_jax.model import LFM

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True)
class Piece:
    """News of one continuation, in text."""

    choice: int
    text: str
    tokens: list[int]
    """New tokens, a stop id included; their text may come with a later piece."""
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob] | None = None
    finish: Finish | None = None


class Service:
    """Runs requests and gives text.

    Args:
      model, tokenizer: as `lfm.load` gives them.
      template: chat template; None means DEFAULT_TEMPLATE.
      config, mesh: as for `Engine`.

    Raises:
      ValueError: see `Engine`; or a tokenizer with more ids than the model.
    """

    def __init__(
        self, model: LFM, tokenizer: Tokenizer, template: str | None = None, config: EngineConfig = DEFAULT,
        mesh: Mesh | None = None,
    ):
        check_tokenizer(tokenizer, model.config)
        self.tokenizer, self.template, self.config = tokenizer, template or DEFAULT_TEMPLATE, model.config
        self.engine = Engine(model, config, mesh)
        turn = tokenizer.token_to_id(END_OF_TURN)
        self.stop_ids = tuple(sorted({*model.config.eos_ids, *([] if turn is None else [turn])}))
        """Tokens that end a continuation."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with bos."""
        return encode(self.tokenizer, text, self.config.bos_id)

    def encode_chat(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None) -> list[int]:
        """Token ids of a conversation, up to the opening of the assistant's turn.

        Calls in earlier turns (`tool_calls`, each with `name` and `arguments`) are written as the model writes them,
        unless the template does it.

        Raises:
          ValueError: see `render_chat`.
        """
        if "tool_calls" not in self.template:
            messages = [_with_calls_as_text(message) for message in messages]
        text = render_chat(self.template, messages, tools=tools, **special_tokens(self.tokenizer, self.config))
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def matcher(self, grammar: Grammar) -> Matcher:
        """A matcher for `Request.grammar`.

        Raises:
          GrammarError: see `GrammarTokenizer.matcher`.
        """
        return grammar_tokenizer(self.tokenizer, self.config.vocab_size, self.stop_ids).matcher(grammar)

    async def run(
        self, request: Request, stop: Sequence[str] = (), *, skip_special_tokens: bool = True
    ) -> AsyncGenerator[Piece]:
        """Runs a request and yields news of its continuations; the last one of each has a `finish`.

        Left early, it ends the request, and its slots are free.

        Args:
          stop: texts before which a continuation ends.
          skip_special_tokens: leave special tokens out of texts.

        Raises:
          ValueError, EngineFullError, RuntimeError: see `Engine.submit`.
        """
        loop = asyncio.get_running_loop()
        news: asyncio.Queue[Event] = asyncio.Queue()

        def listen(event: Event) -> None:
            with suppress(RuntimeError):  # The loop is closed: nobody waits any more.
                loop.call_soon_threadsafe(news.put_nowait, event)

        ids = self.stop_ids if request.stop_ids is None else request.stop_ids
        request = dataclasses.replace(request, stop_ids=ids)
        replies = {i: Reply(self.tokenizer, stop, ids, skip_special_tokens=skip_special_tokens)
                   for i in range(request.n)}
        ticket = self.engine.submit(request, listen)
        try:
            while replies:
                event = await news.get()
                reply = replies.get(event.choice)
                if reply is None:  # Ended by a stop text; the engine had gone on.
                    continue
                text, finish = reply.push(event.tokens), event.finish
                if reply.stopped:
                    if finish is None:
                        self.engine.cancel(ticket, event.choice)
                    finish = "stop"
                elif finish is not None:
                    text += reply.finish()
                if finish is not None:
                    del replies[event.choice]
                yield Piece(event.choice, text, event.tokens, event.logprobs, event.prompt_logprobs, finish)
        finally:
            if not ticket.done:
                self.engine.cancel(ticket)


def _with_calls_as_text(message: Message) -> Message:
    calls = message.get("tool_calls")
    if not calls:
        return message
    text = render_calls(ToolCall(call["name"], call["arguments"]) for call in calls)
    rest = {key: value for key, value in message.items() if key != "tool_calls"}
    return rest | {"content": (message.get("content") or "") + text}
