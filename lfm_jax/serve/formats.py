"""Answers in the two formats of OpenAI's API, whole or in the chunks of a stream."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import aclosing
from typing import Any

from lfm_jax.engine.request import Request, TokenLogprob
from lfm_jax.engine.service import Piece, Service
from lfm_jax.serve.errors import broken
from lfm_jax.serve.protocol import ChatBody, CompletionBody
from lfm_jax.text.codec import Detokenizer, token_bytes
from lfm_jax.text.tools import Content, ToolCallParser


class Choice:
    """What one continuation has produced so far."""

    def __init__(self) -> None:
        self.text = ""
        self.tokens = 0
        self.logprobs: list[TokenLogprob] = []
        self.prompt_logprobs: list[TokenLogprob] | None = None
        self.finish: str | None = None
        self.calls: list[dict[str, Any]] = []

    def note(self, piece: Piece) -> None:
        """Adds a piece, except its text, which the format splits."""
        self.tokens += len(piece.tokens)
        self.logprobs += piece.logprobs or []
        if piece.prompt_logprobs is not None:
            self.prompt_logprobs = piece.prompt_logprobs
        self.finish = piece.finish


async def whole_answer(form: TextFormat | ChatFormat, pieces: AsyncGenerator[Piece], asked: Sequence[Request]) -> Any:
    """Returns the body of an answer that is not streamed.

    Raises:
      RefusalError: a continuation ended without an answer.
    """
    choices: dict[int, Choice] = {}
    async with aclosing(pieces):
        async for piece in pieces:
            choice = choices.setdefault(piece.choice, Choice())
            if (refusal := broken(piece)) is not None:
                raise refusal
            choice.note(piece)
            for _ in form.deltas(piece, choice):  # To split the text into content and calls.
                pass
    return form.whole(choices, asked)


async def streamed_answer(
    form: TextFormat | ChatFormat, pieces: AsyncGenerator[Piece], asked: Sequence[Request], *, usage: bool
) -> AsyncIterator[str]:
    """Yields an answer as server-sent events; a continuation that ends without an answer ends it with an error.

    Args:
      usage: report token counts at the end.
    """
    choices: dict[int, Choice] = {}

    def event(chunk: dict[str, Any]) -> str:
        return f"data: {json.dumps(chunk | ({'usage': None} if usage else {}), ensure_ascii=False)}\n\n"

    async with aclosing(pieces):
        async for piece in pieces:
            if piece.choice not in choices:
                choices[piece.choice] = Choice()
                for chunk in form.opening(piece.choice):
                    yield event(chunk)
            if (refusal := broken(piece)) is not None:
                yield f"data: {json.dumps(refusal.body())}\n\n"
                return
            choice = choices[piece.choice]
            choice.note(piece)
            for chunk in form.deltas(piece, choice):
                yield event(chunk)
    if usage:
        yield f"data: {json.dumps(form.frame([]) | {'usage': _usage(choices, asked)})}\n\n"
    yield "data: [DONE]\n\n"


def _usage(choices: dict[int, Choice], asked: Sequence[Request]) -> dict[str, int]:
    prompt, made = sum(len(one.prompt) for one in asked), sum(choice.tokens for choice in choices.values())
    return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}


class TextFormat:
    """Answers of /v1/completions."""

    keeps_markers = False

    def __init__(self, service: Service, name: str, body: CompletionBody, prompts: list[list[int]]):
        self._tokenizer, self._name, self._body, self._prompts = service.tokenizer, name, body, prompts
        self._id, self._created = f"cmpl-{secrets.token_hex(12)}", int(time.time())
        self._skip = body.skip_special_tokens is not False
        self._places: dict[int, tuple[Detokenizer, int]] = {}
        """By continuation: its detokenizer, and where in the text its next token begins."""

    def frame(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self._id, "object": "text_completion", "created": self._created, "model": self._name,
                "choices": choices}

    def _echoed(self, choice: int) -> str:
        if not self._body.echo:
            return ""
        return self._tokenizer.decode(self._prompts[choice // (self._body.n or 1)], skip_special_tokens=self._skip)

    def opening(self, choice: int) -> Iterator[dict[str, Any]]:
        if text := self._echoed(choice):
            yield self.frame([{"index": choice, "text": text, "logprobs": None, "finish_reason": None}])

    def deltas(self, piece: Piece, choice: Choice) -> Iterator[dict[str, Any]]:
        choice.text += piece.text
        logprobs = None
        if piece.logprobs is not None:
            told = (piece.prompt_logprobs or []) + piece.logprobs
            logprobs = self._logprobs(piece.choice, told, first=piece.prompt_logprobs is not None)
        if piece.text or piece.finish or logprobs:
            yield self.frame([{"index": piece.choice, "text": piece.text, "logprobs": logprobs,
                               "finish_reason": piece.finish}])

    def whole(self, choices: dict[int, Choice], asked: Sequence[Request]) -> dict[str, Any]:
        entries = []
        for i, choice in sorted(choices.items()):
            logprobs = None
            if self._body.logprobs is not None:
                told = (choice.prompt_logprobs or []) + choice.logprobs
                self._places.pop(i, None)
                logprobs = self._logprobs(i, told, first=choice.prompt_logprobs is not None)
            entries.append({"index": i, "text": self._echoed(i) + choice.text, "logprobs": logprobs,
                            "finish_reason": choice.finish})
        return self.frame(entries) | {"usage": _usage(choices, asked)}

    def _logprobs(self, choice: int, told: list[TokenLogprob], *, first: bool) -> dict[str, Any]:
        """Returns log-probabilities as parallel lists, the format of completions; the prompt's first token has none."""
        ids = [t.token for t in told]
        values: list[float | None] = [t.logprob for t in told]
        best: list[dict[str, float] | None] = [{self._token(token): p for token, p in t.best} for t in told]
        if first:
            ids.insert(0, self._prompts[choice // (self._body.n or 1)][0])
            values.insert(0, None)
            best.insert(0, None)
        new = Detokenizer(self._tokenizer, skip_special_tokens=self._skip), 0 if first else len(self._echoed(choice))
        (detokenizer, at), offsets = self._places.get(choice, new), []
        for token in ids:
            offsets.append(at)
            at += len(detokenizer.push([token]))
        self._places[choice] = detokenizer, at
        return {"tokens": [*map(self._token, ids)], "token_logprobs": values, "top_logprobs": best,
                "text_offset": offsets}

    def _token(self, token: int) -> str:
        """Returns a token's text, or its bytes as OpenAI's API writes them where they are part of a character: as
        U+FFFD, different tokens would be equal."""
        raw = token_bytes(self._tokenizer, token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


class ChatFormat:
    """Answers of /v1/chat/completions."""

    def __init__(self, service: Service, name: str, body: ChatBody):
        self._tokenizer, self._name, self._body = service.tokenizer, name, body
        self._id, self._created = f"chatcmpl-{secrets.token_hex(12)}", int(time.time())
        self.keeps_markers = body.calls_tools
        """Whether special tokens stay in the text: calls are found by their markers, which are special tokens."""
        self._schemas = body.schemas or [] if body.calls_tools else []
        self._parsers: dict[int, ToolCallParser] = {}

    def frame(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self._id, "object": "chat.completion.chunk", "created": self._created, "model": self._name,
                "choices": choices}

    def _chunk(self, choice: int, delta: dict[str, Any], finish: str | None = None, logprobs: Any = None) -> Any:
        return self.frame([{"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": finish}])

    def opening(self, choice: int) -> Iterator[dict[str, Any]]:
        yield self._chunk(choice, {"role": "assistant", "content": ""})

    def deltas(self, piece: Piece, choice: Choice) -> Iterator[dict[str, Any]]:
        text, calls = self._split(piece)
        choice.text += text
        logprobs = None if piece.logprobs is None else {"content": [self._logprob(t) for t in piece.logprobs]}
        if text or logprobs:
            yield self._chunk(piece.choice, {"content": text}, logprobs=logprobs)
        for call in calls:
            entry = {"id": f"call_{secrets.token_hex(12)}", "type": "function",
                     "function": {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)}}
            yield self._chunk(piece.choice, {"tool_calls": [{"index": len(choice.calls)} | entry]})
            choice.calls.append(entry)
        if piece.finish is not None:
            yield self._chunk(piece.choice, {}, self._reason(choice))

    def _reason(self, choice: Choice) -> str | None:
        return "tool_calls" if choice.calls and choice.finish == "stop" else choice.finish

    def _split(self, piece: Piece) -> tuple[str, list[Any]]:
        """Returns the text and the calls of a piece; text that may still become a call is held back."""
        if not self._body.calls_tools:
            return piece.text, []
        parser = self._parsers.setdefault(piece.choice, ToolCallParser(self._schemas))
        events = parser.push(piece.text)
        if piece.finish is not None:
            events = [*events, *parser.finish()]
        text = "".join(e.text for e in events if isinstance(e, Content))
        return text, [e for e in events if not isinstance(e, Content)]

    def whole(self, choices: dict[int, Choice], asked: Sequence[Request]) -> dict[str, Any]:
        entries = []
        for i, choice in sorted(choices.items()):
            message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
            if choice.calls:
                message |= {"content": choice.text or None, "tool_calls": choice.calls}
            logprobs = {"content": [self._logprob(t) for t in choice.logprobs]} if self._body.logprobs else None
            entries.append({"index": i, "message": message, "logprobs": logprobs,
                            "finish_reason": self._reason(choice)})
        return self.frame(entries) | {"object": "chat.completion", "usage": _usage(choices, asked)}

    def _logprob(self, told: TokenLogprob) -> dict[str, Any]:
        def entry(token: int, logprob: float) -> dict[str, Any]:
            raw = token_bytes(self._tokenizer, token)
            return {"token": raw.decode(errors="replace"), "logprob": logprob, "bytes": list(raw)}

        return entry(told.token, told.logprob) | {"top_logprobs": [entry(*best) for best in told.best]}
