"""The web application: its endpoints, and how it turns HTTP requests into requests to the engine.

No text of a request is logged. Requests share only the model and the states of equal prompt prefixes.
"""

from __future__ import annotations

import asyncio
import functools
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from lfm_jax.engine import request as engine_request
from lfm_jax.engine.placement import give_back_memory
from lfm_jax.engine.request import EngineFullError, UnknownAdapterError
from lfm_jax.engine.service import Answers, Piece, Service
from lfm_jax.sampling import GREEDY, Sampling
from lfm_jax.serve.adapters import OFF, adapter_routes
from lfm_jax.serve.errors import RefusalError, errors
from lfm_jax.serve.fields import (
    RELAXED_HEADER,
    UNKNOWN_HEADER,
    Body,
    FieldError,
    UnknownFieldLog,
    blamed,
    place,
    relaxed_header,
)
from lfm_jax.serve.formats import ChatForm, Form, TextForm, dumped, streamed_answer, whole_answer
from lfm_jax.serve.gate import ADMIN, REQUEST_ID, Gate, Named
from lfm_jax.serve.limits import LIMITS, Limits
from lfm_jax.serve.messages import plain_messages
from lfm_jax.serve.metrics import EngineCounts, Metrics
from lfm_jax.serve.protocol import ChatBody, CompletionBody, Shared
from lfm_jax.serve.responses import ResponsesBody, ResponsesForm
from lfm_jax.structured.grammar import Grammar, Matcher
from lfm_jax.text.chat import is_marked
from lfm_jax.text.codec import encoded
from lfm_jax.text.thoughts import BLANKS, OPEN, Stage, ThoughtLimit, split_thought

TIDY_SECONDS = 60
"""How often free memory goes back to the system."""
GENERATING = ("/v1/completions", "/v1/chat/completions", "/v1/responses")
ENCODING = ("/v1/embeddings", "/v1/rerank", "/v2/rerank")
"""Paths that causal models answer, and those that encoders do."""


def make_app(
    service: Service, name: str, *, api_key: str | None = None, admin_key: str | None = None,
    sampling: Sampling = GREEDY, limits: Limits = LIMITS, cors_origins: Sequence[str] = (),
) -> FastAPI:
    """Makes the application for a service.

    Args:
      service: its engine serves in a thread of its own while the app is up; what runs at the end is let end.
      name: of the model; requests may name one of the engine's adapters instead.
      api_key: what clients must send as a bearer token; None: nothing.
      admin_key: what those must send who add and remove adapters; None: nobody can.
      sampling: for what requests do not say.
      limits: of one request.
      cors_origins: origins whose pages may read answers; "*": any.
    """
    metrics = Metrics(EngineCounts(service.engine))

    async def tidy() -> None:
        # Neither the engine nor grammars grow by themselves, and yet a process under a mixed load did: what the
        # allocator keeps of freed arrays is the likely rest.
        while True:
            await asyncio.sleep(TIDY_SECONDS)
            await asyncio.to_thread(give_back_memory)

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        del app
        service.engine.serve()
        tidying = asyncio.ensure_future(tidy())
        yield
        tidying.cancel()
        await asyncio.to_thread(service.engine.close)

    def check_health() -> None:
        if service.engine.failure is not None:
            raise RefusalError(503, "the engine has failed")

    elsewhere = f"{name!r} is a causal model, whose tokens see no later ones; serve an encoder, LFM2.5-Embedding"
    manages = admin_key is not None and service.engine.config.adapters > 0
    missing = dict.fromkeys(ENCODING, elsewhere) | ({} if manages else dict.fromkeys(ADMIN, OFF))
    app = bare_app(life, metrics, api_key, limits, cors_origins, missing, admin_key if manages else None)
    app.include_router(_page())
    app.include_router(about(name, metrics, service.engine.longest, check_health, service.engine.adapters.sources))
    if manages:
        app.include_router(adapter_routes(service.engine, name))
    app.include_router(_completions(_Desk(service, name, sampling, limits, metrics)))
    return app


def bare_app(
    lifespan: Any, metrics: Metrics, api_key: str | None, limits: Limits, cors_origins: Sequence[str],
    elsewhere: Mapping[str, str], admin_key: str | None = None,
) -> FastAPI:
    """Makes an application without endpoints, with its checks and the form of its errors.

    Args:
      elsewhere: paths that its model cannot answer, and why.

    The others are those of `make_app`.
    """
    app = FastAPI(title="lfm_jax", version="1", lifespan=lifespan, docs_url=None, redoc_url=None,
                  redirect_slashes=False)
    app.add_middleware(Gate, api_key=api_key, limits=limits, metrics=metrics, admin_key=admin_key)
    if cors_origins:
        # Around the gate: a browser asks first, without the key, what it may send.
        app.add_middleware(CORSMiddleware, allow_origins=list(cors_origins), allow_methods=["*"], allow_headers=["*"],
                           expose_headers=[REQUEST_ID, UNKNOWN_HEADER, RELAXED_HEADER])
    app.add_middleware(Named)
    app.add_exception_handler(RefusalError, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.openapi = functools.partial(_document, app)
    app.state.elsewhere = elsewhere
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
    return JSONResponse(error.body(), error.status, error.headers)


async def _invalid(request: Request, error: Any) -> Response:
    return await _refused(request, _refusal([_problem(problem, error.body) for problem in error.errors()[:8]]))


def _refusal(
    problems: Sequence[tuple[str | None, str]], named: Callable[[str], str] = lambda text: text
) -> RefusalError:
    """The error of some problems, each with its field; `named` gives fields other names."""
    field = next((field for field, _ in problems if field), None)
    message = "; ".join(what if not where or what.startswith(where) else f"{where}: {what}" for where, what in problems)
    return RefusalError(400, named(message), param=field and named(field))


def _problem(problem: Mapping[str, Any], body: Any) -> tuple[str | None, str]:
    """The field that an error of validation is about, and what is wrong."""
    kind, location = problem["type"], problem["loc"][1:]
    if isinstance(error := problem.get("ctx", {}).get("error"), FieldError):
        return place([*location, error.field]), str(error)
    if kind == "json_invalid":
        at, text = location[0], body if isinstance(body, str) else ""
        line, column = text.count("\n", 0, at) + 1, at - text.rfind("\n", 0, at)
        return None, f"the body is not JSON: {problem['ctx']['error']} at line {line}, column {column}"
    if not location and kind == "missing":
        return None, "the body is missing; send a JSON object"
    if not location and kind in ("model_attributes_type", "model_type", "dict_type"):
        return None, "the body is not a JSON object; send one, with the header content-type: application/json"
    what = "is missing" if kind == "missing" else problem["msg"].removeprefix("Value error, ")
    return place(location) or None, what


async def _http(request: Request, error: Any) -> Response:
    message = str(error.detail)
    if error.status_code in (404, 405):
        there = ", ".join(f"{method.upper()} {path}" for path, methods in _document(request.app)["paths"].items()
                          for method in methods)
        why = f": {why}" if (why := request.app.state.elsewhere.get(request.url.path)) else ""
        message = f"there is no {request.method} {request.url.path[:100]}{why}; this server has {there}"
    return await _refused(request, RefusalError(error.status_code, message, headers=error.headers))


def _page() -> APIRouter:
    """Makes the route of the page."""
    router = APIRouter()

    @router.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> str:
        return (files("lfm_jax.serve") / "page.html").read_text(encoding="utf-8")

    return router


def about(
    name: str, metrics: Metrics, longest: int, check_health: Callable[[], None],
    adapters: Callable[[], Mapping[str, str]] = dict,
) -> APIRouter:
    """Makes the routes of health, metrics, the model and its adapters.

    Args:
      longest: tokens of the longest request.
      check_health: raises RefusalError if the server is not well.
      adapters: returns where each one comes from, by name.
    """
    router = APIRouter()
    began = int(time.time())

    def entries() -> dict[str, dict[str, Any]]:
        """By name; `root` and `parent` as vLLM has them."""
        made = [(name, name, None), *((one, source, name) for one, source in adapters().items())]
        return {one: {"id": one, "object": "model", "created": began, "owned_by": "lfm_jax", "root": root,
                      "parent": parent, "max_model_len": longest} for one, root, parent in made}

    @router.get("/health", responses=errors(400, 503))
    async def health() -> dict[str, str]:
        check_health()
        return {"status": "ok"}

    @router.get("/metrics", response_class=PlainTextResponse, responses=errors(400, 401))
    async def metrics_page() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @router.get("/v1/models", responses=errors(400, 401))
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [*entries().values()]}

    @router.get("/v1/models/{model:path}", responses=errors(400, 401, 404))
    async def model(model: str) -> dict[str, Any]:
        there = entries()
        check_model(model, there)
        return there[model]

    return router


def check_model(wanted: str, names: Collection[str]) -> None:
    if wanted not in names:
        raise RefusalError(404, f"there is no model {wanted[:100]!r}; this server has {', '.join(map(repr, names))}",
                           "model_not_found", param="model")


def _completions(desk: _Desk) -> APIRouter:
    """The endpoints that generate."""
    router = APIRouter()
    refused = errors(400, 401, 404, 408, 413, 429, 500, 503, 504)

    @router.post("/v1/completions", responses=refused)
    async def completions(body: CompletionBody, request: Request) -> Response:
        return await desk.complete(body, request)

    @router.post("/v1/chat/completions", responses=refused)
    async def chat(body: ChatBody, request: Request) -> Response:
        return await desk.chat(body, request)

    @router.post("/v1/responses", responses=refused)
    async def responses(body: ResponsesBody, request: Request) -> Response:
        return await desk.respond(body, request)

    return router


class _Desk:
    """Turns bodies into requests to the engine, and their continuations into answers."""

    def __init__(self, service: Service, name: str, sampling: Sampling, limits: Limits, metrics: Metrics):
        self._service, self._name, self._sampling = service, name, sampling
        self._limits, self._metrics = limits, metrics
        self._preparing = 0
        self._unknown = UnknownFieldLog()

    async def complete(self, body: CompletionBody, request: Request) -> Response:
        """Answers POST /v1/completions."""
        arrived = time.monotonic()
        self._check(body, len(body.prompts()))

        def prepare() -> list[engine_request.Request]:
            grammar = self._grammar(body, [one.value for one in body.constraints()])
            matcher = None if grammar is None else self._service.matcher(grammar)
            with blamed("prompt"):
                prompts = [self._service.encode(p) if isinstance(p, str) else p for p in body.prompts()]
            most = 16 if body.max_tokens is None else body.max_tokens
            return [self._ask(prompt, body, most, body.logprobs, matcher, "prompt",
                              prompt_logprobs=bool(body.echo and body.logprobs is not None)) for prompt in prompts]

        asked = await self._in_thread(prepare)
        form = TextForm(self._service, body.model, body, [list(one.prompt) for one in asked])
        return await self._answer(form, asked, body, body, request, arrived)

    async def chat(self, body: ChatBody, request: Request) -> Response:
        """Answers POST /v1/chat/completions."""
        arrived = time.monotonic()
        self._check(body, 1)
        asked = await self._in_thread(lambda: [self._ask_chat(body)])
        form = ChatForm(self._service, body.model, body, self._service.stage(asked[0].prompt))
        return await self._answer(form, asked, body, body, request, arrived)

    async def respond(self, body: ResponsesBody, request: Request) -> Response:
        """Answers POST /v1/responses, as the chat that it stands for."""
        arrived = time.monotonic()
        try:
            chat = body.as_chat()
            self._check(chat, 1)
            asked = await self._in_thread(lambda: [self._ask_chat(chat)])
        except ValidationError as error:
            raise _refusal([_problem({**e, "loc": ("body", *e["loc"])}, None) for e in error.errors()[:8]],
                           body.in_own_words) from None
        except RefusalError as error:
            error.message = body.in_own_words(error.message)
            error.param = error.param and body.in_own_words(error.param)
            raise
        form = ResponsesForm(self._service, body.model, body, chat, self._service.stage(asked[0].prompt))
        return await self._answer(form, asked, chat, body, request, arrived)

    def _ask_chat(self, body: ChatBody) -> engine_request.Request:
        given = [*(tool.function.plain() for tool in body.function_tools),
                 *(one.value for one in body.constraints())]
        grammar = self._grammar(body, given)
        tools = body.schemas if body.tool_choice != "none" else None
        messages = plain_messages(body.messages)
        with blamed("messages"):
            prompt = self._service.encode_chat(messages, tools, continue_final=body.continues,
                                               variables=body.chat_template_kwargs)
        begun = messages[-1]["content"] if body.continues else ""
        begin = self._service.stage(prompt, begun)
        matcher = self._chat_matcher(grammar, body, begin, begun)
        with blamed("messages"):
            if matcher is not None and begin != "thought":
                how = self._service.thinking
                marked = how is not None and is_marked(self._service.tokenizer, how, prompt)
                self._follow(matcher, split_thought(begun).answer if marked else begun)
        most = body.max_completion_tokens or body.max_tokens or self._limits.tokens
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        return self._ask(prompt, body, most, logprobs, matcher, "messages")

    def _chat_matcher(self, grammar: Grammar | None, body: ChatBody, begin: Stage, begun: str) -> Matcher | None:
        """A matcher of the answer and of a thought before it, where one may come.

        Args:
          begin: where the reply goes on.
          begun: what the client wrote of it.
        """
        how, most = self._service.thinking, body.max_thinking_tokens
        if how is None or begin == "answer" or (begin == "start" and grammar is not None and most == 0):
            return None if grammar is None else self._service.matcher(grammar)
        if grammar is None and most is None:
            return None
        matcher = self._service.matcher(grammar and grammar.after_thought(how, begin))
        if most is not None:
            if begin == "thought":
                text = begun.lstrip(BLANKS).removeprefix(OPEN)
                most = max(most - len(encoded(self._service.tokenizer, text, add_special_tokens=False).ids), 0)
            matcher.limit = ThoughtLimit(self._service.tokenizer, how, begin, most)
        return matcher

    def _follow(self, matcher: Matcher, text: str) -> None:
        """Advances a matcher by the beginning of the answer, which the client has written."""
        try:
            for token in encoded(self._service.tokenizer, text, add_special_tokens=False).ids:
                matcher.consume(token)
        except ValueError:
            raise ValueError("the last message, which is to be continued, does not begin as the answer must") from None

    async def _in_thread(self, prepare: Callable[[], list[engine_request.Request]]) -> list[engine_request.Request]:
        """Prepares requests in a thread, because long texts and large schemas take a while."""
        if self._preparing >= self._limits.prepared:
            raise RefusalError(429, f"{self._preparing} requests are being prepared already", "queue_full")
        self._preparing += 1
        try:
            return await asyncio.to_thread(_carried, prepare)
        except ValueError as error:
            raise RefusalError(400, str(error), param=getattr(error, "field", None)) from None
        except RecursionError:
            raise RefusalError(400, "the body is nested too deep") from None
        finally:
            self._preparing -= 1

    def _check(self, body: Shared, prompts: int) -> None:
        check_model(body.model, self._models())
        if prompts * (body.n or 1) > self._limits.choices:
            raise RefusalError(400, f"n is {body.n or 1} for {prompts} prompts; at most {self._limits.choices} "
                                    "continuations in all", param="n")

    def _models(self) -> list[str]:
        return [self._name, *self._service.engine.adapters.sources()]

    def _grammar(self, body: Shared, given: Sequence[Any]) -> Grammar | None:
        """What the answer must follow; `given` is what the client sent of it."""
        size = len(json.dumps(given))
        if size > self._limits.schema_bytes:
            field = "tools" if isinstance(body, ChatBody) and body.tools else body.constraints()[0].field
            raise FieldError(field, f"schemas take {size} bytes; at most {self._limits.schema_bytes}")
        return body.grammar

    def _ask(
        self, prompt: list[int], body: Shared, most: int, logprobs: int | None, matcher: Matcher | None, param: str, *,
        prompt_logprobs: bool = False,
    ) -> engine_request.Request:
        """A request of the engine; it ends where the context does."""
        engine, V, n = self._service.engine, self._service.config.vocab_size, body.n or 1
        if not (longest := engine.longest_for(n)):
            raise FieldError("n", f"n is {n}; the server has not as many slots of one length")
        room = longest - len(prompt)
        if room < min(most, 1):
            error = engine_request.ContextLengthError(longest, len(prompt), most)
            raise RefusalError(400, str(error), "context_length_exceeded", param=param)
        most = min(most, room)
        own = () if body.ignore_eos and (matcher is None or matcher.free) else self._service.stop_ids
        stop_ids = tuple(dict.fromkeys([*own, *(body.stop_token_ids or ())]))
        for field, ids in (("stop_token_ids", stop_ids), ("logit_bias", body.logit_bias or {})):
            if strange := [token for token in ids if token >= V]:
                raise FieldError(field, f"{field} names {strange[0]}; token ids lie in 0..{V - 1}")
        if len(stop_ids) > engine.config.max_stop_ids:
            raise FieldError("stop_token_ids", f"stop_token_ids and the model's own make {len(stop_ids)} ids; at most "
                             f"{engine.config.max_stop_ids} can end an answer")
        return engine_request.Request(
            prompt=prompt, max_new_tokens=most, min_new_tokens=min(body.min_tokens or 0, most),
            sampling=body.sampling(self._sampling, secrets.randbits(32)), n=n, stop_ids=stop_ids,
            logit_bias=body.logit_bias or {},
            logprobs=logprobs, prompt_logprobs=prompt_logprobs, grammar=matcher, deadline=self._limits.seconds,
            adapter=None if body.model == self._name else body.model,
        )

    async def _answer(
        self, form: Form, asked: Sequence[engine_request.Request], body: Shared, sent: Body, request: Request,
        arrived: float,
    ) -> Response:
        """Runs requests and answers whole or as a stream; cancels them when the client disconnects."""
        skip = body.skip_special_tokens is not False and not form.keeps_markers
        try:
            answers = self._service.submit(asked, body.stop or (), skip_special_tokens=skip, shown=form.shown)
        except EngineFullError as error:
            raise RefusalError(429, str(error), "queue_full") from None
        except RuntimeError as error:
            raise RefusalError(503, str(error)) from None
        except UnknownAdapterError as error:  # It has gone since the request came.
            raise RefusalError(404, str(error), "model_not_found", param="model") from None
        except ValueError as error:
            raise RefusalError(400, str(error)) from None
        # Started here, so that a disconnect is noticed while the request waits for a slot too.
        leaving = asyncio.ensure_future(_cancel_when_gone(request, answers))
        pieces = self._observed(answers, leaving, arrived)
        headers = self._unknown.headers(sent, request.scope[REQUEST_ID])
        headers |= relaxed_header(body.grammar.relaxed if body.grammar else ())
        if body.stream:
            return StreamingResponse(streamed_answer(form, pieces, asked), media_type="text/event-stream",
                                     headers=headers | {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        answer = await whole_answer(form, pieces, asked)
        return Response(dumped(answer), media_type="application/json", headers=headers)

    async def _observed(
        self, answers: Answers, leaving: asyncio.Future[None], arrived: float
    ) -> AsyncGenerator[Piece]:
        """The pieces; records the time to the first piece, and stops watching the client after the last one."""
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


def _carried[T](function: Callable[[], T]) -> T:
    """Calls a function in a thread. No future can carry StopIteration: whoever waits for it would wait for ever."""
    try:
        return function()
    except StopIteration as error:
        raise RuntimeError("an iterator has ended early") from error


async def _cancel_when_gone(request: Request, answers: Answers) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    answers.cancel()
