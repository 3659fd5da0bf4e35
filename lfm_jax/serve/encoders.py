"""The web application of an encoder: /v1/embeddings as OpenAI's clients ask for it, and /v1/rerank as those of vLLM,
Jina and Cohere do.

Requests run one after the other, each as batches of its own texts. No text of a request is logged.
"""

from __future__ import annotations

import asyncio
import base64
import secrets
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BeforeValidator, Field

from lfm_jax.infer.embed import Encoder, NotFiniteError, Ranked
from lfm_jax.serve.app import about, bare_app, check_model, errors
from lfm_jax.serve.errors import RefusalError
from lfm_jax.serve.fields import ACCOUNT, Body, Ignored, Refused, UnknownFieldLog
from lfm_jax.serve.gate import REQUEST_ID
from lfm_jax.serve.limits import LIMITS, Limits
from lfm_jax.serve.metrics import Metrics

MAX_TEXTS = 2048
"""Texts of one request, as in OpenAI's API."""
Texts = Annotated[list[str], Field(min_length=1, max_length=MAX_TEXTS)]


def _several(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class EmbeddingsBody(Body):
    """The body of POST /v1/embeddings."""

    model: str
    input: Annotated[Texts, BeforeValidator(_several, json_schema_input_type=str | list[str])] = Field(
        description=f"a text, or up to {MAX_TEXTS}; no token ids")
    encoding_format: Literal["float", "base64"] | None = None
    input_type: Literal["query", "document"] | None = Field(
        None, description="which prefix comes before a text; `document` if left out")
    dimensions: Annotated[Any, Refused("vectors have one width; leave it out")] = None
    user: Annotated[Any, Ignored(ACCOUNT)] = None


class RerankBody(Body):
    """The body of POST /v1/rerank."""

    model: str
    query: str
    documents: Texts = Field(description=f"up to {MAX_TEXTS} texts")
    top_n: Annotated[int, Field(ge=1)] | None = Field(None, description="how many of the best; all if left out")
    return_documents: bool | None = Field(None, description="puts the text of each document into the answer")
    user: Annotated[Any, Ignored(ACCOUNT)] = None


def make_encoder_app(
    encoder: Encoder, name: str, *, api_key: str | None = None, limits: Limits = LIMITS,
    cors_origins: Sequence[str] = (),
) -> FastAPI:
    """Makes the application for an encoder; arguments as those of `app.make_app`."""
    metrics = Metrics()
    app = bare_app(None, metrics, api_key, limits, cors_origins)
    app.include_router(about(name, metrics, encoder.max_tokens, lambda: None))
    app.include_router(_endpoints(_Desk(encoder, name, limits)))
    return app


def _endpoints(desk: _Desk) -> APIRouter:
    router = APIRouter()
    refused = errors(400, 401, 404, 408, 413, 429, 500)

    @router.post("/v1/embeddings", responses=refused)
    async def embeddings(body: EmbeddingsBody, request: Request) -> JSONResponse:
        return await desk.embed(body, request)

    @router.post("/v1/rerank", responses=refused)
    async def rerank(body: RerankBody, request: Request) -> JSONResponse:
        return await desk.rerank(body, request)

    return router


class _Desk:
    """Turns bodies into calls of the encoder, and what it returns into answers."""

    def __init__(self, encoder: Encoder, name: str, limits: Limits):
        self._encoder, self._name, self._limits = encoder, name, limits
        self._turn, self._waiting = asyncio.Lock(), 0
        self._unknown = UnknownFieldLog()

    async def embed(self, body: EmbeddingsBody, request: Request) -> JSONResponse:
        """Answers POST /v1/embeddings."""
        check_model(body.model, self._name)
        encoder = self._encoder

        def work() -> tuple[np.ndarray, int]:
            texts = encoder.prepare(body.input, body.input_type or "document", encoder.max_tokens)
            return encoder.vectors(texts), texts.tokens

        vectors, tokens = await self._in_turn(work)
        data = [{"object": "embedding", "index": i, "embedding": _written(vector, body.encoding_format)}
                for i, vector in enumerate(vectors)]
        answer = {"object": "list", "data": data, "model": self._name, "usage": _usage(tokens)}
        return JSONResponse(answer, headers=self._unknown.headers(body, request.scope[REQUEST_ID]))

    async def rerank(self, body: RerankBody, request: Request) -> JSONResponse:
        """Answers POST /v1/rerank."""
        check_model(body.model, self._name)
        encoder = self._encoder

        def work() -> tuple[list[Ranked], int]:
            query = encoder.prepare(body.query, "query", encoder.max_tokens)
            documents = encoder.prepare(body.documents, "document", encoder.max_tokens)
            return encoder.rank(query, documents), query.tokens + documents.tokens

        ranked, tokens = await self._in_turn(work)
        results: list[dict[str, Any]] = [
            {"index": one.index, "relevance_score": one.score}
            | ({"document": {"text": body.documents[one.index]}} if body.return_documents else {})
            for one in ranked[: body.top_n]
        ]
        answer = {"id": f"rerank-{secrets.token_hex(12)}", "model": self._name, "results": results,
                  "usage": _usage(tokens)}
        return JSONResponse(answer, headers=self._unknown.headers(body, request.scope[REQUEST_ID]))

    async def _in_turn[T](self, work: Callable[[], T]) -> T:
        """Calls a function in a thread, one at a time: a device does no two things at once."""
        if self._waiting >= self._limits.prepared:
            raise RefusalError(429, f"{self._waiting} requests are waiting already", "queue_full")
        self._waiting += 1
        try:
            async with self._turn:
                return await asyncio.to_thread(work)
        except NotFiniteError as error:  # No fault of the client.
            raise RefusalError(500, str(error)) from None
        except ValueError as error:
            raise RefusalError(400, str(error)) from None
        finally:
            self._waiting -= 1


def _written(vector_D: np.ndarray, form: str | None) -> list[float] | str:
    """A vector as JSON: numbers, or the bytes of little-endian float32 in base64."""
    return base64.b64encode(vector_D.astype("<f4").tobytes()).decode() if form == "base64" else vector_D.tolist()


def _usage(tokens: int) -> dict[str, int]:
    return {"prompt_tokens": tokens, "total_tokens": tokens}
