"""The web application of an encoder: /v1/embeddings as OpenAI's clients ask for it, and /v1/rerank as those of vLLM,
Jina and Cohere do.

Texts of requests that wait at one time are computed together (`encoder_queue`). No text of a request is logged.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import secrets
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BeforeValidator, Field, Tag

from lfm_jax.infer.embed import Encoder, NotFiniteError, Row, max_sim, ranking, shortened
from lfm_jax.serve.app import GENERATING, about, bare_app, check_model
from lfm_jax.serve.encoder_queue import EncoderQueue
from lfm_jax.serve.errors import RefusalError, errors
from lfm_jax.serve.fields import ACCOUNT, Body, FieldError, Ignored, Refused, UnknownFieldLog, blamed, one_of
from lfm_jax.serve.gate import REQUEST_ID
from lfm_jax.serve.limits import LIMITS, Limits
from lfm_jax.serve.metrics import EncoderCounts, Metrics
from lfm_jax.serve.protocol import ONE_OF_FOUR, Ids, prompt_kind

MAX_TEXTS = 2048
"""Texts of one request, as in OpenAI's API."""
WRITTEN = 32
"""Vectors that are written as JSON at a time."""


def _text_of(value: Any) -> Any:
    return value["text"] if isinstance(value, dict) and isinstance(value.get("text"), str) else value


Text = Annotated[str, BeforeValidator(_text_of, json_schema_input_type=str | dict[Literal["text"], str])]
Truncate = Annotated[
    bool | Literal["NONE", "END"] | None,
    Field(description="false or `NONE`: a text that is too long is refused; otherwise its end is cut off"),
]


class EmbeddingsBody(Body):
    """The body of POST /v1/embeddings."""

    model: str
    input: Annotated[
        Annotated[str, Tag("(text)")]
        | Annotated[list[str], Field(min_length=1, max_length=MAX_TEXTS, fail_fast=True), Tag("(texts)")]
        | Annotated[Ids, Tag("(ids)")]
        | Annotated[list[Ids], Field(min_length=1, max_length=MAX_TEXTS, fail_fast=True), Tag("(lists)")],
        one_of(prompt_kind, ONE_OF_FOUR),
    ] = Field(description=f"a text or its token ids, or up to {MAX_TEXTS}; to ids nothing is added, neither the prefix "
                          "nor special tokens")
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = Field(
        None, description="keeps so many numbers of a vector, the first ones, and brings them to length 1")
    input_type: Literal["query", "document"] | None = Field(
        None, description="which prefix comes before a text; `document` if left out; not with token ids")
    truncate: Truncate = None
    user: Annotated[Any, Ignored(ACCOUNT)] = None


class RerankBody(Body):
    """The body of POST /v1/rerank."""

    model: str
    query: Text
    documents: Annotated[list[Text], Field(min_length=1, max_length=MAX_TEXTS, fail_fast=True)] = Field(
        description=f'up to {MAX_TEXTS} texts, each a string or `{{"text": "..."}}`')
    top_n: Annotated[int, Field(ge=1)] | None = Field(None, description="how many of the best; all if left out")
    return_documents: bool | None = Field(None, description="puts the text of each document into the answer")
    max_tokens_per_doc: Annotated[int, Field(ge=2)] | None = Field(
        None, description="a document is cut after so many tokens, where the model does not cut it earlier")
    truncate: Truncate = None
    rank_fields: Annotated[Any, Refused("a document is one text; join its fields")] = None
    max_chunks_per_doc: Annotated[Any, Refused("documents are not split; cut them first, or leave it out", 1)] = None
    priority: Annotated[Any, Ignored("requests take turns")] = None
    user: Annotated[Any, Ignored(ACCOUNT)] = None


def make_encoder_app(
    encoder: Encoder, name: str, *, api_key: str | None = None, limits: Limits = LIMITS,
    cors_origins: Sequence[str] = (),
) -> FastAPI:
    """Makes the application for an encoder; arguments as those of `app.make_app`. `app.state.queue` is its
    `EncoderQueue`."""
    queue = EncoderQueue(encoder)
    metrics = Metrics(EncoderCounts(queue))
    elsewhere = f"{name!r} is an encoder, which predicts no next token; serve a causal model, as LFM2.5-350M"
    app = bare_app(None, metrics, api_key, limits, cors_origins, dict.fromkeys(GENERATING, elsewhere))
    app.state.queue = queue
    app.include_router(about(name, metrics, encoder.max_tokens, lambda: None))
    app.include_router(_endpoints(_Desk(encoder, queue, name, limits)))
    return app


def _endpoints(desk: _Desk) -> APIRouter:
    router = APIRouter()
    refused = errors(400, 401, 404, 408, 413, 429, 500, 503, 504)

    @router.post("/v1/embeddings", responses=refused)
    async def embeddings(body: EmbeddingsBody, request: Request) -> Response:
        return await desk.embed(body, request)

    @router.post("/v1/rerank", responses=refused)
    async def rerank(body: RerankBody, request: Request) -> Response:
        return await desk.rerank(body, request)

    @router.post("/v2/rerank", responses=refused)  # Where version 2 of Cohere's API has it.
    async def rerank_2(body: RerankBody, request: Request) -> Response:
        return await desk.rerank(body, request)

    return router


class _Desk:
    """Turns bodies into texts for the queue, and what comes of them into answers."""

    def __init__(self, encoder: Encoder, queue: EncoderQueue, name: str, limits: Limits):
        self._encoder, self._queue, self._name, self._limits = encoder, queue, name, limits
        self._running = 0
        self._unknown = UnknownFieldLog()

    async def embed(self, body: EmbeddingsBody, request: Request) -> Response:
        """Answers POST /v1/embeddings."""
        check_model(body.model, [self._name])

        async def work() -> tuple[list[np.ndarray], int]:
            rows = await asyncio.to_thread(self._rows, body)
            kept = await self._queue.compute(rows, lambda x_SO: shortened(x_SO[0], body.dimensions).copy())
            return kept, _tokens(rows)

        vectors, tokens = await self._limited(work, request)
        written = _written(vectors, body.encoding_format, {"model": self._name, "usage": _usage(tokens)})
        return StreamingResponse(written, media_type="application/json", headers=self._headers(body, request))

    async def rerank(self, body: RerankBody, request: Request) -> Response:
        """Answers POST /v1/rerank."""
        check_model(body.model, [self._name])

        async def work() -> tuple[np.ndarray, int]:
            query, documents = await asyncio.to_thread(self._query_and_documents, body)
            [query_QO] = await self._queue.compute(query, np.copy)
            # The vectors of documents are not kept: those of tokens would take much room.
            scores = await self._queue.compute(documents, lambda x_SO: max_sim(query_QO, x_SO))
            return np.asarray(scores), _tokens(query) + _tokens(documents)

        scores, tokens = await self._limited(work, request)
        results: list[dict[str, Any]] = [
            {"index": one.index, "relevance_score": one.score}
            | ({"document": {"text": body.documents[one.index]}} if body.return_documents else {})
            for one in ranking(scores)[: body.top_n]
        ]
        answer = {"id": f"rerank-{secrets.token_hex(12)}", "model": self._name, "results": results,
                  "usage": _usage(tokens)}
        return JSONResponse(answer, headers=self._headers(body, request))

    def _headers(self, body: Body, request: Request) -> dict[str, str]:
        return self._unknown.headers(body, request.scope[REQUEST_ID])

    def _rows(self, body: EmbeddingsBody) -> list[Row]:
        """The texts or tokens of a request for vectors."""
        encoder, given = self._encoder, body.input
        with blamed("dimensions" if encoder.late is None else "model"):
            encoder.check_dimensions(body.dimensions)
        cuts, kind = body.truncate not in (False, "NONE"), prompt_kind(given)
        with blamed("input"):
            if kind in ("(text)", "(texts)"):
                texts: Any = given
                return encoder.prepare(texts, body.input_type or "document", encoder.max_tokens, cuts=cuts,
                                       name="input")
            if body.input_type is not None:
                raise FieldError("input_type", "input_type puts a prefix before texts, and token ids are taken as they "
                                 "are: begin them with those of bos and of the prefix, and leave it out")
            ids: Any = [given] if kind == "(ids)" else given
            return encoder.prepare_ids(ids, encoder.max_tokens, cuts=cuts, name="input")

    def _query_and_documents(self, body: RerankBody) -> tuple[list[Row], list[Row]]:
        encoder, most = self._encoder, self._encoder.max_tokens
        cuts, shorter = body.truncate not in (False, "NONE"), min(body.max_tokens_per_doc or most, most)
        with blamed("query"):
            query = encoder.prepare(body.query, "query", most, cuts=cuts, name="query")
        with blamed("documents"):
            # Whoever names a length of documents wants them cut there.
            return query, encoder.prepare(body.documents, "document", shorter, name="documents",
                                          cuts=cuts or body.max_tokens_per_doc is not None)

    async def _limited[T](self, work: Callable[[], Awaitable[T]], request: Request) -> T:
        """Does what a request asks for, within the limits and while its client is there."""
        if self._running >= self._limits.prepared:
            raise RefusalError(429, f"{self._running} requests are waiting already", "queue_full")
        self._running += 1
        working = asyncio.create_task(self._in_time(work))
        leaving = asyncio.create_task(_gone(request))
        try:
            await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise RefusalError(499, "the client has closed the connection")
            return working.result()
        except NotFiniteError as error:  # No fault of the client.
            raise RefusalError(500, str(error)) from None
        except ValueError as error:
            raise RefusalError(400, str(error), param=getattr(error, "field", None)) from None
        finally:
            self._running -= 1
            working.cancel()
            leaving.cancel()

    async def _in_time[T](self, work: Callable[[], Awaitable[T]]) -> T:
        try:
            async with asyncio.timeout(self._limits.seconds):
                return await work()
        except TimeoutError:
            raise RefusalError(504, "the answer took too long") from None


async def _gone(request: Request) -> None:
    """Returns when the client has closed the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _written(vectors: Sequence[np.ndarray], form: str | None, rest: dict[str, Any]) -> Iterator[str]:
    """The JSON of an answer with vectors, in pieces: at once it would hold up all other requests for seconds."""
    before = '{"object": "list", "data": ['
    for batch in itertools.batched(enumerate(vectors), WRITTEN):
        entries = [json.dumps({"object": "embedding", "index": i, "embedding": _numbers(vector_D, form)})
                   for i, vector_D in batch]
        yield before + ", ".join(entries)
        before = ", "
    yield f"], {json.dumps(rest)[1:]}"


def _numbers(vector_D: np.ndarray, form: str | None) -> list[float] | str:
    """A vector as JSON: numbers, or the bytes of little-endian float32 in base64."""
    return base64.b64encode(vector_D.astype("<f4").tobytes()).decode() if form == "base64" else vector_D.tolist()


def _tokens(rows: Sequence[Row]) -> int:
    return sum(len(row.ids) for row in rows)


def _usage(tokens: int) -> dict[str, int]:
    return {"prompt_tokens": tokens, "total_tokens": tokens}
