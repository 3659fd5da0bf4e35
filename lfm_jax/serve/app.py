"""The web application: its endpoints, and how it turns HTTP requests into requests to the engine.

No text of a request is logged. Requests share only the model and the states of equal prompt prefixes.
"""

from __future__ import annotations

import asyncio
import functools
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from lfm_jax.engine import request as engine_request
from lfm_jax.engine.request import EngineFullError
from lfm_jax.engine.service import Answers, Piece, Service
from lfm_jax.sampling import GREEDY, Sampling
from lfm_jax.serve.errors import ERROR_TYPES, RefusalError
from lfm_jax.serve.formats import ChatFormat, TextFormat, streamed_answer, whole_answer
from lfm_jax.serve.gate import Gate
from lfm_jax.serve.limits import LIMITS, Limits
from lfm_jax.serve.metrics import Metrics
from lfm_jax.serve.protocol import ChatBody, CompletionBody, plain_messages


def make_app(
    service: Service, name: str, *, api_key: str | None = None, sampling: Sampling = GREEDY, limits: Limits = LIMITS
) -> FastAPI:
    """Makes the application for a service.

    Args:
      service: its engine runs in a thread of its own while the app is up, and finishes running requests at the end.
      name: the name of the model.
      api_key: the bearer token that clients must send; None asks for none.
      sampling: default sampling parameters.
      limits: limits of one request.
    """
    metrics = Metrics(service.engine)

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        del app
        service.engine.serve()
        yield
        await asyncio.to_thread(service.engine.close)

    app = FastAPI(title="lfm_jax", version="1", lifespan=life, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.add_middleware(Gate, api_key=api_key, limits=limits, metrics=metrics)
    app.add_exception_handler(RefusalError, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.include_router(_about(service, name, metrics))
    app.include_router(_completions(_Desk(service, name, sampling, limits, metrics)))
    app.openapi = functools.partial(_document, app)
    return app


def _document(app: FastAPI) -> dict[str, Any]:
    """Returns the OpenAPI document without FastAPI's status 422: an invalid body gets 400."""
    if app.openapi_schema is None:
        app.openapi_schema = FastAPI.openapi(app)
        for methods in app.openapi_schema["paths"].values():
            for operation in methods.values():
                operation["responses"].pop("422", None)
    return app.openapi_schema


async def _refused(request: Request, error: Any) -> Response:
    del request
    return JSONResponse(error.body(), error.status)


async def _invalid(request: Request, error: Any) -> Response:
    problems = "; ".join(f"{'.'.join(str(x) for x in e['loc'][1:]) or 'body'}: {e['msg']}" for e in error.errors()[:8])
    return await _refused(request, RefusalError(400, problems))


async def _http(request: Request, error: Any) -> Response:
    response = await _refused(request, RefusalError(error.status_code, str(error.detail)))
    response.headers.update(error.headers or {})
    return response


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"description": ERROR_TYPES[status]} for status in statuses}


def _about(service: Service, name: str, metrics: Metrics) -> APIRouter:
    """Makes the routes of the page, health, metrics and the model."""
    router = APIRouter()
    entry = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "lfm_jax"}

    @router.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> str:
        return (files("lfm_jax.serve") / "page.html").read_text(encoding="utf-8")

    @router.get("/health", responses=_errors(400, 503))
    async def health() -> dict[str, str]:
        if service.engine.failure is not None:
            raise RefusalError(503, "the engine has failed")
        return {"status": "ok"}

    @router.get("/metrics", response_class=PlainTextResponse, responses=_errors(400, 401))
    async def metrics_page() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @router.get("/v1/models", responses=_errors(400, 401))
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [entry]}

    @router.get("/v1/models/{model:path}", responses=_errors(400, 401, 404))
    async def model(model: str) -> dict[str, Any]:
        _check_model(model, name)
        return entry

    return router


def _check_model(wanted: str, name: str) -> None:
    if wanted != name:
        raise RefusalError(404, f"there is no model {wanted[:100]!r}; this server has {name!r}", "model_not_found")


def _completions(desk: _Desk) -> APIRouter:
    """Makes the two routes that generate."""
    router = APIRouter()
    errors = _errors(400, 401, 404, 408, 413, 429, 500, 503, 504)

    @router.post("/v1/completions", responses=errors)
    async def completions(body: CompletionBody, request: Request) -> Response:
        return await desk.complete(body, request)

    @router.post("/v1/chat/completions", responses=errors)
    async def chat(body: ChatBody, request: Request) -> Response:
        return await desk.chat(body, request)

    return router


class _Desk:
    """Turns bodies into requests to the engine, and their continuations into answers."""

    def __init__(self, service: Service, name: str, sampling: Sampling, limits: Limits, metrics: Metrics):
        self._service, self._name, self._sampling = service, name, sampling
        self._limits, self._metrics = limits, metrics
        self._preparing = 0

    async def complete(self, body: CompletionBody, request: Request) -> Response:
        """Answers POST /v1/completions."""
        arrived = time.monotonic()
        self._check(body, len(body.prompts()))

        def prepare() -> list[engine_request.Request]:
            prompts = [self._service.encode(p) if isinstance(p, str) else p for p in body.prompts()]
            return [
                self._ask(prompt, body, body.max_tokens or 16, body.logprobs,
                          prompt_logprobs=bool(body.echo and body.logprobs is not None))
                for prompt in prompts
            ]

        asked = await self._in_thread(prepare)
        form = TextFormat(self._service, self._name, body, [list(one.prompt) for one in asked])
        return await self._answer(form, asked, body, request, arrived)

    async def chat(self, body: ChatBody, request: Request) -> Response:
        """Answers POST /v1/chat/completions."""
        arrived = time.monotonic()
        self._check(body, 1)

        def prepare() -> list[engine_request.Request]:
            self._check_schemas(body)
            grammar = body.grammar()
            matcher = None if grammar is None else self._service.matcher(grammar)
            tools = body.schemas if body.tool_choice != "none" else None
            prompt = self._service.encode_chat(plain_messages(body.messages), tools)
            room = self._service.engine.longest - len(prompt)
            most = body.max_completion_tokens or body.max_tokens or max(min(room, self._limits.tokens), 1)
            logprobs = (body.top_logprobs or 0) if body.logprobs else None
            return [self._ask(prompt, body, most, logprobs, matcher=matcher)]

        asked = await self._in_thread(prepare)
        return await self._answer(ChatFormat(self._service, self._name, body), asked, body, request, arrived)

    async def _in_thread(self, prepare: Callable[[], list[engine_request.Request]]) -> list[engine_request.Request]:
        """Prepares requests in a thread, because long texts and large schemas take a while."""
        if self._preparing >= self._limits.prepared:
            raise RefusalError(429, f"{self._preparing} requests are being prepared already", "queue_full")
        self._preparing += 1
        try:
            return await asyncio.to_thread(prepare)
        except ValueError as error:
            raise RefusalError(400, str(error)) from None
        except RecursionError:
            raise RefusalError(400, "the body is nested too deep") from None
        finally:
            self._preparing -= 1

    def _check(self, body: ChatBody | CompletionBody, prompts: int) -> None:
        _check_model(body.model, self._name)
        if prompts * (body.n or 1) > self._limits.choices:
            raise RefusalError(400, f"n is {body.n or 1} for {prompts} prompts; at most {self._limits.choices} "
                                    "continuations in all")

    def _check_schemas(self, body: ChatBody) -> None:
        given: list[Any] = [tool.function.parameters for tool in body.tools or ()]
        if body.response_format is not None and body.response_format.json_schema is not None:
            given.append(body.response_format.json_schema.schema_)
        size = len(json.dumps(given))
        if size > self._limits.schema_bytes:
            raise ValueError(f"schemas take {size} bytes; at most {self._limits.schema_bytes}")

    def _ask(
        self, prompt: list[int], body: ChatBody | CompletionBody, most: int, logprobs: int | None, *,
        prompt_logprobs: bool = False, matcher: Any = None,
    ) -> engine_request.Request:
        return engine_request.Request(
            prompt=prompt, max_new_tokens=most, min_new_tokens=body.min_tokens or 0,
            sampling=body.sampling(self._sampling, secrets.randbits(32)), n=body.n or 1,
            stop_ids=self._service.stop_ids, logit_bias=body.biases(), logprobs=logprobs,
            prompt_logprobs=prompt_logprobs, grammar=matcher, deadline=self._limits.seconds,
        )

    async def _answer(
        self, form: TextFormat | ChatFormat, asked: Sequence[engine_request.Request],
        body: ChatBody | CompletionBody, request: Request, arrived: float,
    ) -> Response:
        """Runs requests and answers whole or as a stream; cancels them when the client disconnects."""
        skip = body.skip_special_tokens is not False and not form.keeps_markers
        try:
            answers = self._service.submit(asked, body.stops(), skip_special_tokens=skip)
        except EngineFullError as error:
            raise RefusalError(429, str(error), "queue_full") from None
        except RuntimeError as error:
            raise RefusalError(503, str(error)) from None
        except ValueError as error:
            raise RefusalError(400, str(error)) from None
        # Started here, so that a disconnect is noticed while the request waits for a slot too.
        leaving = asyncio.ensure_future(_cancel_when_gone(request, answers))
        pieces = self._observed(answers, leaving, arrived)
        if body.stream:
            usage = body.stream_options is not None and body.stream_options.include_usage
            return StreamingResponse(streamed_answer(form, pieces, asked, usage=usage), media_type="text/event-stream",
                                     headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        answer = await whole_answer(form, pieces, asked)
        return JSONResponse(answer)

    async def _observed(
        self, answers: Answers, leaving: asyncio.Future[None], arrived: float
    ) -> AsyncGenerator[Piece]:
        """Yields the pieces, records the time to the first piece, and stops watching the client after the last one."""
        first = True
        try:
            async with aclosing(answers.pieces()) as pieces:
                async for piece in pieces:
                    if first:
                        first = False
                        self._metrics.first_token.observe(time.monotonic() - arrived)
                    yield piece
        finally:
            leaving.cancel()


async def _cancel_when_gone(request: Request, answers: Answers) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    answers.cancel()
