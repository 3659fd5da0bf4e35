"""The web application: endpoints, limits, errors in OpenAI's form, metrics.

Nothing of a request's text is logged, and nothing is shared between requests but the model and the states of equal
prompt prefixes.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hmac
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lfm_jax.infer import request as engine_request
from lfm_jax.infer.request import EngineFullError, TokenLogprob
from lfm_jax.infer.sampling import GREEDY, Sampling
from lfm_jax.infer.service import Piece, Service
from lfm_jax.infer.text import token_bytes
from lfm_jax.infer.tools import Content, ToolCallParser
from lfm_jax.serve.limits import LIMITS, Limits
from lfm_jax.serve.metrics import Metrics
from lfm_jax.serve.protocol import ChatBody, CompletionBody, plain_messages

OPEN = ("/", "/health")
"""Paths that need no key."""


class RefusalError(Exception):
    """A request that gets an error."""

    def __init__(self, status: int, message: str, code: str | None = None):
        self.status, self.message, self.code = status, message, code


KINDS = {400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error",
         405: "invalid_request_error", 413: "invalid_request_error", 429: "rate_limit_error", 500: "server_error",
         503: "server_error", 504: "timeout_error"}


BROKEN = {"deadline": (504, "the answer took too long"),
          "failed": (500, "the answer became too complex for its schema to be followed; simplify the schema")}
"""Ends of a continuation that are no answer."""


def error_body(status: int, message: str, code: str | None = None) -> dict[str, Any]:
    """An error in OpenAI's form."""
    return {"error": {"message": message, "type": KINDS.get(status, "server_error"), "param": None, "code": code}}


def make_app(
    service: Service, name: str, *, api_key: str | None = None, sampling: Sampling = GREEDY,
    limits: Limits = LIMITS,
) -> FastAPI:
    """The application over a running service.

    Args:
      service: its engine serves in a thread of its own; it is closed, with what runs ended first, when the app ends.
      name: of the model.
      api_key: what clients must send as a bearer token; None: nothing.
      sampling: for what requests do not say.
    """
    metrics = Metrics(service.engine)
    created = int(time.time())

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        del app
        service.engine.serve()
        yield
        await asyncio.to_thread(service.engine.close)

    app = FastAPI(title="lfm_jax", version="1", lifespan=life, docs_url=None, redoc_url=None)
    app.add_middleware(_Guard, api_key=api_key, body_bytes=limits.body_bytes, metrics=metrics)

    @app.exception_handler(RefusalError)
    async def refused(request: Request, error: RefusalError) -> JSONResponse:
        del request
        return JSONResponse(error_body(error.status, error.message, error.code), error.status)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        del request
        problems = "; ".join(f"{'.'.join(str(x) for x in e['loc'][1:]) or 'body'}: {e['msg']}"
                             for e in error.errors()[:8])
        return JSONResponse(error_body(400, problems), 400)

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        del request
        return JSONResponse(error_body(error.status_code, str(error.detail)), error.status_code, error.headers)

    def check_model(wanted: str) -> None:
        if wanted != name:
            raise RefusalError(404, f"there is no model {wanted[:100]!r}; this server has {name!r}", "model_not_found")

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> str:
        return (files("lfm_jax.serve") / "page.html").read_text(encoding="utf-8")

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/metrics", response_class=PlainTextResponse, responses=_errors(401))
    async def metrics_page() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    model_entry = {"id": name, "object": "model", "created": created, "owned_by": "lfm_jax"}

    @app.get("/v1/models", responses=_errors(401))
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model_entry]}

    @app.get("/v1/models/{model}", responses=_errors(401, 404))
    async def model(model: str) -> dict[str, Any]:
        check_model(model)
        return model_entry

    @app.post("/v1/completions", responses=_errors(400, 401, 404, 413, 429, 500, 503, 504))
    async def completions(body: CompletionBody, request: Request) -> Response:
        check_model(body.model)
        prompts = [service.encode(p) if isinstance(p, str) else p for p in body.prompts()]
        n = body.n or 1
        if len(prompts) * n > limits.choices:
            raise RefusalError(400, f"{len(prompts)} prompts with n {n} are more than {limits.choices} continuations")
        asked = [
            _ask(service, limits, prompt, body, sampling, n, body.max_tokens or 16, body.logprobs,
                 prompt_logprobs=bool(body.echo and body.logprobs is not None))
            for prompt in prompts
        ]
        kind = _TextAnswer(service, name, body, prompts)
        return await _answer(kind, service, asked, body, request, metrics)

    @app.post("/v1/chat/completions", responses=_errors(400, 401, 404, 413, 429, 500, 503, 504))
    async def chat(body: ChatBody, request: Request) -> Response:
        check_model(body.model)
        _check_schemas(body, limits)
        if (body.n or 1) > limits.choices:
            raise RefusalError(400, f"n is {body.n}; at most {limits.choices}")

        def prepare() -> tuple[list[int], Any]:  # A large schema takes a while.
            grammar = body.grammar()
            matcher = None if grammar is None else service.matcher(grammar)
            tools = body.schemas() if body.tool_choice != "none" else None
            return service.encode_chat(plain_messages(body.messages), tools), matcher

        try:
            prompt, matcher = await asyncio.to_thread(prepare)
        except ValueError as error:
            raise RefusalError(400, str(error)) from None
        room = service.engine.longest - len(prompt)
        most = body.max_completion_tokens or body.max_tokens or max(min(room, 1024), 1)
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        asked = [_ask(service, limits, prompt, body, sampling, body.n or 1, most, logprobs, matcher=matcher)]
        return await _answer(_ChatAnswer(service, name, body), service, asked, body, request, metrics)

    return app


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"description": KINDS[status]} for status in statuses}


def _check_schemas(body: ChatBody, limits: Limits) -> None:
    given: list[Any] = [tool.function.parameters for tool in body.tools or ()]
    if body.response_format is not None and body.response_format.json_schema is not None:
        given.append(body.response_format.json_schema.schema_)
    size = len(json.dumps(given))
    if size > limits.schema_bytes:
        raise RefusalError(400, f"schemas take {size} bytes; at most {limits.schema_bytes}")


def _ask(
    service: Service, limits: Limits, prompt: list[int], body: ChatBody | CompletionBody, sampling: Sampling, n: int,
    most: int, logprobs: int | None, *, prompt_logprobs: bool = False, matcher: Any = None,
) -> engine_request.Request:
    try:
        return engine_request.Request(
            prompt=prompt, max_new_tokens=most, min_new_tokens=body.min_tokens or 0,
            sampling=body.sampling(sampling, secrets.randbits(32)), n=n, stop_ids=service.stop_ids,
            logit_bias=body.biases(), logprobs=logprobs, prompt_logprobs=prompt_logprobs, grammar=matcher,
            deadline=limits.seconds,
        )
    except ValueError as error:
        raise RefusalError(400, str(error)) from None


# -------------------------------------------------------------------- answering


class _Choice:
    """What has come of one continuation."""

    def __init__(self) -> None:
        self.text = ""
        self.tokens = 0
        self.logprobs: list[TokenLogprob] = []
        self.prompt_logprobs: list[TokenLogprob] | None = None
        self.finish: str | None = None
        self.calls: list[dict[str, Any]] = []


async def _answer(
    kind: _TextAnswer | _ChatAnswer, service: Service, asked: list[engine_request.Request],
    body: ChatBody | CompletionBody, request: Request, metrics: Metrics,
) -> Response:
    """Runs what was asked and answers at once or as a stream; a client that goes away ends it."""
    began = time.monotonic()
    pieces = _merged(service, asked, body, kind.keeps_markers)
    try:
        first = await anext(pieces)  # What the engine refuses is refused before a stream begins.
    except EngineFullError as error:
        raise RefusalError(429, str(error), "queue_full") from None
    except RuntimeError as error:
        raise RefusalError(503, str(error)) from None
    except ValueError as error:
        raise RefusalError(400, str(error)) from None
    metrics.first_token.observe(time.monotonic() - began)

    async def all_pieces() -> AsyncIterator[Piece]:
        async with aclosing(pieces):
            yield first
            async for piece in pieces:
                yield piece

    if body.stream:
        return StreamingResponse(_stream(kind, all_pieces(), body, asked), media_type="text/event-stream",
                                 headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
    collecting = asyncio.ensure_future(_collect(kind, all_pieces()))
    leaving = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({collecting, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not collecting.done():
            return Response(status_code=499)  # Nobody reads it.
        choices = await collecting
    finally:
        for task in (collecting, leaving):
            task.cancel()
        await asyncio.gather(collecting, leaving, return_exceptions=True)
    for choice in choices.values():
        if choice.finish in BROKEN:
            raise RefusalError(*BROKEN[choice.finish])
    return JSONResponse(kind.whole(choices, asked))


async def _merged(
    service: Service, asked: list[engine_request.Request], body: ChatBody | CompletionBody, markers: bool
) -> AsyncGenerator[Piece]:
    """The pieces of several requests as they come; continuation i of request r has number r * n + i."""
    skip = body.skip_special_tokens is not False and not markers
    n = asked[0].n
    if len(asked) == 1:
        async with aclosing(service.run(asked[0], body.stops(), skip_special_tokens=skip)) as pieces:
            async for piece in pieces:
                yield piece
        return
    queue: asyncio.Queue[Piece | Exception | None] = asyncio.Queue()

    async def pump(r: int, one: engine_request.Request) -> None:
        try:
            async with aclosing(service.run(one, body.stops(), skip_special_tokens=skip)) as pieces:
                async for piece in pieces:
                    queue.put_nowait(dataclasses.replace(piece, choice=r * n + piece.choice))
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    tasks = [asyncio.ensure_future(pump(r, one)) for r, one in enumerate(asked)]
    try:
        left = len(asked)
        while left:
            piece = await queue.get()
            if isinstance(piece, Exception):
                raise piece
            if piece is None:
                left -= 1
            else:
                yield piece
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _collect(kind: _TextAnswer | _ChatAnswer, pieces: AsyncIterator[Piece]) -> dict[int, _Choice]:
    choices: dict[int, _Choice] = {}
    async for piece in pieces:
        choice = choices.setdefault(piece.choice, _Choice())
        _note(choice, piece)
        for _ in kind.deltas(piece, choice):  # So that text is split into content and calls.
            pass
    return choices


def _note(choice: _Choice, piece: Piece) -> None:
    choice.tokens += len(piece.tokens)
    choice.logprobs += piece.logprobs or []
    choice.prompt_logprobs = piece.prompt_logprobs or choice.prompt_logprobs
    choice.finish = piece.finish


async def _stream(
    kind: _TextAnswer | _ChatAnswer, pieces: AsyncIterator[Piece], body: ChatBody | CompletionBody,
    asked: list[engine_request.Request],
) -> AsyncIterator[str]:
    usage = body.stream_options is not None and body.stream_options.include_usage
    choices: dict[int, _Choice] = {}

    def event(chunk: dict[str, Any]) -> str:
        return f"data: {json.dumps(chunk | ({'usage': None} if usage else {}), ensure_ascii=False)}\n\n"

    async for piece in pieces:
        if piece.choice not in choices:
            choices[piece.choice] = _Choice()
            for chunk in kind.opening(piece.choice):
                yield event(chunk)
        choice = choices[piece.choice]
        _note(choice, piece)
        for chunk in kind.deltas(piece, choice):
            yield event(chunk)
        if piece.finish in BROKEN:
            yield f"data: {json.dumps(error_body(*BROKEN[piece.finish]))}\n\n"
            return
    if usage:
        yield f"data: {json.dumps(kind.frame([]) | {'usage': _usage(choices, asked)})}\n\n"
    yield "data: [DONE]\n\n"


def _usage(choices: dict[int, _Choice], asked: list[engine_request.Request]) -> dict[str, int]:
    prompt, made = sum(len(one.prompt) for one in asked), sum(choice.tokens for choice in choices.values())
    return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}


def _finish(finish: str | None) -> str | None:
    return "stop" if finish == "cancelled" else finish


class _TextAnswer:
    """Answers of /v1/completions."""

    keeps_markers = False

    def __init__(self, service: Service, name: str, body: CompletionBody, prompts: list[list[int]]):
        self._tokenizer, self._name, self._body, self._prompts = service.tokenizer, name, body, prompts
        self._id, self._created = f"cmpl-{secrets.token_hex(12)}", int(time.time())
        self._skip = body.skip_special_tokens is not False
        self._offsets: dict[int, int] = {}

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

    def deltas(self, piece: Piece, choice: _Choice) -> Iterator[dict[str, Any]]:
        choice.text += piece.text
        logprobs = None
        if piece.logprobs is not None:
            told = (piece.prompt_logprobs or []) + piece.logprobs
            logprobs = self._logprobs(piece.choice, told, first=bool(piece.prompt_logprobs))
        if piece.text or piece.finish or logprobs:
            yield self.frame([{"index": piece.choice, "text": piece.text, "logprobs": logprobs,
                               "finish_reason": _finish(piece.finish)}])

    def whole(self, choices: dict[int, _Choice], asked: list[engine_request.Request]) -> dict[str, Any]:
        entries = []
        for i, choice in sorted(choices.items()):
            logprobs = None
            if self._body.logprobs is not None:
                told = (choice.prompt_logprobs or []) + choice.logprobs
                self._offsets.pop(i, None)
                logprobs = self._logprobs(i, told, first=choice.prompt_logprobs is not None)
            entries.append({"index": i, "text": self._echoed(i) + choice.text, "logprobs": logprobs,
                            "finish_reason": _finish(choice.finish)})
        return self.frame(entries) | {"usage": _usage(choices, asked)}

    def _logprobs(self, choice: int, told: list[TokenLogprob], *, first: bool) -> dict[str, Any]:
        """In the old form: parallel lists; the prompt's first token has no probability."""
        tokens = [self._token(t.token) for t in told]
        values: list[float | None] = [t.logprob for t in told]
        best: list[dict[str, float] | None] = [{self._token(token): p for token, p in t.best} for t in told]
        if first:
            tokens.insert(0, self._token(self._prompts[choice // (self._body.n or 1)][0]))
            values.insert(0, None)
            best.insert(0, None)
        offsets, at = [], self._offsets.get(choice, 0)
        for token in tokens:
            offsets.append(at)
            at += len(token)
        self._offsets[choice] = at
        return {"tokens": tokens, "token_logprobs": values, "top_logprobs": best, "text_offset": offsets}

    def _token(self, token: int) -> str:
        return token_bytes(self._tokenizer, token).decode(errors="replace")


class _ChatAnswer:
    """Answers of /v1/chat/completions."""

    def __init__(self, service: Service, name: str, body: ChatBody):
        self._tokenizer, self._name, self._body = service.tokenizer, name, body
        self._id, self._created = f"chatcmpl-{secrets.token_hex(12)}", int(time.time())
        self.keeps_markers = body.calls_tools
        """Calls are found by their markers, which are special tokens."""
        self._schemas = body.schemas() or []
        self._parsers: dict[int, ToolCallParser] = {}

    def frame(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self._id, "object": "chat.completion.chunk", "created": self._created, "model": self._name,
                "choices": choices}

    def _chunk(self, choice: int, delta: dict[str, Any], finish: str | None = None, logprobs: Any = None) -> Any:
        return self.frame([{"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": finish}])

    def opening(self, choice: int) -> Iterator[dict[str, Any]]:
        yield self._chunk(choice, {"role": "assistant", "content": ""})

    def deltas(self, piece: Piece, choice: _Choice) -> Iterator[dict[str, Any]]:
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

    def _reason(self, choice: _Choice) -> str | None:
        return "tool_calls" if choice.calls and choice.finish == "stop" else _finish(choice.finish)

    def _split(self, piece: Piece) -> tuple[str, list[Any]]:
        """Text and calls; text that may still become a call is kept back."""
        if not self._body.calls_tools:
            return piece.text, []
        parser = self._parsers.setdefault(piece.choice, ToolCallParser(self._schemas))
        events = parser.push(piece.text)
        if piece.finish is not None:
            events = [*events, *parser.finish()]
        text = "".join(e.text for e in events if isinstance(e, Content))
        return text, [e for e in events if not isinstance(e, Content)]

    def whole(self, choices: dict[int, _Choice], asked: list[engine_request.Request]) -> dict[str, Any]:
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


# -------------------------------------------------------------------- limits


class _Guard:
    """Key and size of every request, before anything of it is parsed; how requests ended."""

    def __init__(self, app: ASGIApp, api_key: str | None, body_bytes: int, metrics: Metrics):
        self._app, self._key, self._body_bytes, self._metrics = app, api_key, body_bytes, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path, began = scope["path"], time.monotonic()
        status = 500

        async def told(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            refusal = self._refusal(scope, path)
            if refusal is not None:
                await JSONResponse(error_body(*refusal), refusal[0])(scope, receive, told)
                return
            size = 0

            async def counted() -> Message:
                nonlocal size
                message = await receive()
                size += len(message.get("body", b""))
                if size > self._body_bytes:
                    raise HTTPException(413, self._too_large())  # The one kind that FastAPI passes on.
                return message

            await self._app(scope, counted, told)
        finally:
            self._metrics.request(path, status, time.monotonic() - began)

    def _refusal(self, scope: Scope, path: str) -> tuple[int, str] | None:
        headers = dict(scope["headers"])
        if self._key is not None and path not in OPEN:
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, b"Bearer " + self._key.encode()):
                return 401, "the API key is missing or wrong; send it as a bearer token"
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._body_bytes:
            return 413, self._too_large()
        return None

    def _too_large(self) -> str:
        return f"the body is larger than {self._body_bytes} bytes"
