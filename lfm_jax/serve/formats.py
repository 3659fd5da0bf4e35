"""Answers in the two forms of OpenAI's completions, whole and in chunks of a stream."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Iterator, Sequence
from contextlib import aclosing
from typing import Any, Protocol

from lfm_jax.engine.request import Request, TokenLogprob
from lfm_jax.engine.service import Piece, Service
from lfm_jax.serve.errors import RefusalError, broken
from lfm_jax.serve.protocol import ChatBody, CompletionBody
from lfm_jax.text.codec import Detokenizer, token_bytes
from lfm_jax.text.thoughts import Stage, Thought, ThoughtCounter, ThoughtSplitter
from lfm_jax.text.tools import CallCut, CallPiece, CallStart, Content, Event, ToolCallParser

_BREAKS = {ord(c): f"\\u{ord(c):04x}" for c in "\u0085\u2028\u2029"}
"""Clients that split a stream with `str.splitlines` would break lines at these characters."""


class Choice:
    """What has come of one continuation."""

    def __init__(self) -> None:
        self.text = ""
        self.thought = ""
        self.tokens = 0
        self.thought_tokens = 0
        """Those of them that belong to the thought."""
        self.cached_tokens = 0
        """Tokens of its prompt that the prefix cache had."""
        self.logprobs: list[TokenLogprob] = []
        self.prompt_logprobs: list[TokenLogprob] | None = None
        self.finish: str | None = None
        self.calls: list[dict[str, Any]] = []

    def note(self, piece: Piece) -> None:
        """Counts a piece in; its text is the format's to split."""
        self.tokens += len(piece.tokens)
        self.logprobs += piece.logprobs or []
        if piece.prompt_logprobs is not None:
            self.prompt_logprobs = piece.prompt_logprobs
        self.cached_tokens = piece.cached_tokens or self.cached_tokens
        self.finish = piece.finish


Choices = dict[int, Choice]


class Form(Protocol):
    """The form of an answer."""

    keeps_markers: bool
    """Special tokens are needed in the text."""
    shown: Collection[int]
    """Those that are needed even where the others are not."""

    def whole(self, choices: Choices, asked: Sequence[Request]) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        ...

    def opening(self, choice: int) -> Iterator[dict[str, Any]]:
        """The chunks before the first piece of a continuation."""
        ...

    def deltas(self, piece: Piece, choice: Choice) -> Iterator[dict[str, Any]]:
        """The chunks of a piece."""
        ...

    def closing(self, choices: Choices, asked: Sequence[Request]) -> Iterator[dict[str, Any]]:
        """The chunks after the last piece of all continuations."""
        ...

    def event(self, chunk: dict[str, Any], choices: Choices, asked: Sequence[Request]) -> str:
        """A chunk as a server-sent event."""
        ...

    def failure(self, refusal: RefusalError) -> str:
        """The last event of a stream that ends with an error."""
        ...

    end: str
    """The last event of a stream that ends well."""


async def whole_answer(form: Form, pieces: AsyncGenerator[Piece], asked: Sequence[Request]) -> dict[str, Any]:
    """The body of an answer that is not streamed.

    Raises:
      RefusalError: a continuation came to no answer, or the client has gone.
    """
    choices: Choices = {}
    async with aclosing(pieces):
        async for piece in pieces:
            choice = choices.setdefault(piece.choice, Choice())
            if (refusal := broken(piece)) is not None:
                raise refusal
            choice.note(piece)
            for _ in form.deltas(piece, choice):  # So that text is split into content and calls.
                pass
    if not _ended(choices, asked):
        raise RefusalError(499, "the client has closed the connection")
    return form.whole(choices, asked)


async def streamed_answer(
    form: Form, pieces: AsyncGenerator[Piece], asked: Sequence[Request]
) -> AsyncIterator[str]:
    """Server-sent events of an answer; a continuation that comes to none ends it with an error."""
    choices: Choices = {}
    async with aclosing(pieces):
        async for piece in pieces:
            if piece.choice not in choices:
                choices[piece.choice] = Choice()
                for chunk in form.opening(piece.choice):
                    yield form.event(chunk, choices, asked)
            if (refusal := broken(piece)) is not None:
                yield form.failure(refusal)
                return
            choice = choices[piece.choice]
            choice.note(piece)
            for chunk in form.deltas(piece, choice):
                yield form.event(chunk, choices, asked)
    if not _ended(choices, asked):  # The client has gone.
        return
    for chunk in form.closing(choices, asked):
        yield form.event(chunk, choices, asked)
    if form.end:
        yield form.end


def _ended(choices: Choices, asked: Sequence[Request]) -> bool:
    """Whether every continuation has its end: those of a client that has gone stop anywhere."""
    return sum(choice.finish is not None for choice in choices.values()) == sum(one.n for one in asked)


def dumped(value: Any) -> str:
    """JSON of one line, whatever a client takes for the end of one."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False).translate(_BREAKS)


def usage_of(choices: Choices, asked: Sequence[Request]) -> dict[str, Any]:
    """The numbers of tokens so far."""
    prompt, made = sum(len(one.prompt) for one in asked), sum(choice.tokens for choice in choices.values())
    firsts = range(0, sum(one.n for one in asked), asked[0].n)  # The continuations of a prompt share it.
    cached = sum(choices[i].cached_tokens for i in firsts if i in choices)
    return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made,
            "prompt_tokens_details": {"cached_tokens": cached},
            "completion_tokens_details": {"reasoning_tokens": sum(c.thought_tokens for c in choices.values())}}


def logprob_entry(tokenizer: Any, told: TokenLogprob) -> dict[str, Any]:
    """A token with its log-probability and those of the likeliest ones, as chats have them."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        raw = token_bytes(tokenizer, token)
        return {"token": raw.decode(errors="replace"), "logprob": logprob, "bytes": list(raw)}

    return entry(told.token, told.logprob) | {"top_logprobs": [entry(*best) for best in told.best]}


class _Completion:
    """What both kinds of completion have in common."""

    keeps_markers = False
    shown: Collection[int] = ()
    end = "data: [DONE]\n\n"
    kind: str
    """The object of a chunk."""

    def __init__(self, service: Service, name: str, body: CompletionBody | ChatBody, prefix: str):
        self._tokenizer, self._name = service.tokenizer, name
        self._id, self._created = f"{prefix}-{secrets.token_hex(12)}", int(time.time())
        options = body.stream_options
        self._usage = options is not None and bool(options.include_usage)
        self._usage_always = self._usage and options is not None and bool(options.continuous_usage_stats)

    def frame(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self._id, "object": self.kind, "created": self._created, "model": self._name,
                "choices": choices}

    def event(self, chunk: dict[str, Any], choices: Choices, asked: Sequence[Request]) -> str:
        if self._usage and "usage" not in chunk:
            chunk = chunk | {"usage": usage_of(choices, asked) if self._usage_always else None}
        return f"data: {dumped(chunk)}\n\n"

    def closing(self, choices: Choices, asked: Sequence[Request]) -> Iterator[dict[str, Any]]:
        if self._usage:
            yield self.frame([]) | {"usage": usage_of(choices, asked)}

    def failure(self, refusal: RefusalError) -> str:
        return f"data: {dumped(refusal.body())}\n\n"


class TextForm(_Completion):
    """Answers of /v1/completions."""

    kind = "text_completion"

    def __init__(self, service: Service, name: str, body: CompletionBody, prompts: list[list[int]]):
        super().__init__(service, name, body, "cmpl")
        self._body, self._prompts = body, prompts
        self._skip = body.skip_special_tokens is not False
        self._places: dict[int, tuple[Detokenizer, int]] = {}
        """By continuation: where in the text its next token begins."""

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
        if piece.logprobs is not None or piece.prompt_logprobs is not None:
            told = (piece.prompt_logprobs or []) + (piece.logprobs or [])
            logprobs = self._logprobs(piece.choice, told, first=piece.prompt_logprobs is not None)
        if piece.text or piece.finish or logprobs:
            yield self.frame([{"index": piece.choice, "text": piece.text, "logprobs": logprobs,
                               "finish_reason": piece.finish}])

    def whole(self, choices: Choices, asked: Sequence[Request]) -> dict[str, Any]:
        entries = []
        for i, choice in sorted(choices.items()):
            logprobs = None
            if self._body.logprobs is not None:
                told = (choice.prompt_logprobs or []) + choice.logprobs
                self._places.pop(i, None)
                logprobs = self._logprobs(i, told, first=choice.prompt_logprobs is not None)
            entries.append({"index": i, "text": self._echoed(i) + choice.text, "logprobs": logprobs,
                            "finish_reason": choice.finish})
        return self.frame(entries) | {"usage": usage_of(choices, asked)}

    def _logprobs(self, choice: int, told: list[TokenLogprob], *, first: bool) -> dict[str, Any]:
        """In the old form: parallel lists; the prompt's first token has no probability."""
        ids = [t.token for t in told]
        values: list[float | None] = [t.logprob for t in told]
        # The chosen token is always among them, however unlikely it was.
        best: list[dict[str, float] | None] = [
            {self._token(token): p for token, p in (*t.best, (t.token, t.logprob))} for t in told
        ]
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
        """A token's text; its bytes, as in OpenAI's API, where they are part of a character: else several were one."""
        raw = token_bytes(self._tokenizer, token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


# -------------------------------------------------------------------- chats


class ChatReply:
    """Splits the pieces of one continuation into a thought, text and calls, which are reported as they are written.

    Args:
      body: says which tools may be called; none: all of the answer is text.
      begin: where the continuation begins, see `ThoughtSplitter`.
    """

    def __init__(self, service: Service, body: ChatBody, begin: Stage):
        self._splitter = ThoughtSplitter(begin)
        self._counter = ThoughtCounter(service.tokenizer, service.thinking, begin)
        tools = body.schemas or [] if body.calls_tools else []
        self._parser: ToolCallParser | None = None
        if tools:
            self._parser = ToolCallParser(tools, at_start=body.constraint() is not None, growing=True)

    def push(self, piece: Piece, choice: Choice) -> list[Thought | Event]:
        """The events that have become certain with a piece; text that may still become a call is kept back."""
        self._counter.push(piece.tokens)
        choice.thought_tokens = self._counter.tokens
        if self._counter.none:
            self._splitter.skip()
        thought, text = self._splitter.push(piece.text)
        if piece.finish is not None:
            rest = self._splitter.finish()
            thought, text = thought + rest.thought, text + rest.answer
        choice.thought += thought
        events: list[Thought | Event] = [Thought(thought)] if thought else []
        if self._parser is None:
            return [*events, Content(text)] if text else events
        events += self._parser.push(text)
        # The grammar ends each call: one that is open was cut, by the limit or by a stop text.
        return events if piece.finish is None else [*events, *self._parser.finish(cut=True)]


def marks_of_thoughts(service: Service, begin: Stage) -> Collection[int]:
    """The special tokens by which `ChatReply` finds the thought."""
    return () if service.thinking is None or begin == "answer" else service.thinking.token_ids


class ChatForm(_Completion):
    """Answers of /v1/chat/completions."""

    kind = "chat.completion.chunk"

    def __init__(self, service: Service, name: str, body: ChatBody, begin: Stage):
        super().__init__(service, name, body, "chatcmpl")
        self._service, self._body, self._begin = service, body, begin
        self.shown = marks_of_thoughts(service, begin)
        self.keeps_markers = body.calls_tools
        """Calls are found by their markers, which are special tokens."""
        self._replies: dict[int, ChatReply] = {}

    def _chunk(self, choice: int, delta: dict[str, Any], finish: str | None = None, logprobs: Any = None) -> Any:
        return self.frame([{"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": finish}])

    def opening(self, choice: int) -> Iterator[dict[str, Any]]:
        yield self._chunk(choice, {"role": "assistant", "content": ""})

    def deltas(self, piece: Piece, choice: Choice) -> Iterator[dict[str, Any]]:
        if (reply := self._replies.get(piece.choice)) is None:
            reply = self._replies[piece.choice] = ChatReply(self._service, self._body, self._begin)
        logprobs = None
        if piece.logprobs is not None:
            logprobs = {"content": [logprob_entry(self._tokenizer, told) for told in piece.logprobs]}
        events = reply.push(piece, choice)
        if thought := "".join(event.text for event in events if isinstance(event, Thought)):
            yield self._chunk(piece.choice, {"reasoning_content": thought})
        text = "".join(event.text for event in events if isinstance(event, Content))
        choice.text += text
        if text or logprobs:
            yield self._chunk(piece.choice, {"content": text}, logprobs=logprobs)
        for event in events:
            if isinstance(event, CallStart):
                call = {"id": f"call_{secrets.token_hex(12)}", "type": "function",
                        "function": {"name": event.name, "arguments": ""}}
                choice.calls.append(call)
                delta = call | {"function": dict(call["function"])}
                yield self._chunk(piece.choice, {"tool_calls": [{"index": event.index} | delta]})
            elif isinstance(event, CallPiece):
                choice.calls[-1]["function"]["arguments"] += event.text
                delta = {"index": event.index, "function": {"arguments": event.text}}
                yield self._chunk(piece.choice, {"tool_calls": [delta]})
            elif isinstance(event, CallCut):
                choice.calls.pop()
        if piece.finish is not None:
            yield self._chunk(piece.choice, {}, _reason(choice))

    def whole(self, choices: Choices, asked: Sequence[Request]) -> dict[str, Any]:
        entries = []
        for i, choice in sorted(choices.items()):
            message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
            if choice.calls:
                message |= {"content": choice.text or None, "tool_calls": choice.calls}
            if choice.thought:
                message["reasoning_content"] = choice.thought
            logprobs = None
            if self._body.logprobs:
                logprobs = {"content": [logprob_entry(self._tokenizer, told) for told in choice.logprobs]}
            entries.append({"index": i, "message": message, "logprobs": logprobs, "finish_reason": _reason(choice)})
        return self.frame(entries) | {"object": "chat.completion", "usage": usage_of(choices, asked)}


def _reason(choice: Choice) -> str | None:
    return "tool_calls" if choice.calls and choice.finish == "stop" else choice.finish
