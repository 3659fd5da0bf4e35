"""What every request meets before anything of it is parsed: key and size; and how it ended is counted."""

from __future__ import annotations

import hmac
import time

from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lfm_jax.serve.errors import RefusalError
from lfm_jax.serve.metrics import Metrics

OPEN = ("/", "/health")
"""Paths that need no key."""


class Guard:
    """ASGI middleware.

    Args:
      api_key: that clients must send as a bearer token; None: nothing.
      body_bytes: largest body.
    """

    def __init__(self, app: ASGIApp, api_key: str | None, body_bytes: int, metrics: Metrics):
        self._app, self._key, self._body_bytes, self._metrics = app, api_key, body_bytes, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status, size = time.monotonic(), 500, 0

        async def told(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._body_bytes:
                raise HTTPException(413, self._too_large())  # The one kind that FastAPI passes on.
            return message

        try:
            refusal = self._refusal(scope)
            if refusal is None:
                await self._app(scope, counted, told)
            else:
                await JSONResponse(refusal.body(), refusal.status)(scope, receive, told)
        finally:
            self._metrics.request(scope["path"], status, time.monotonic() - began)

    def _refusal(self, scope: Scope) -> RefusalError | None:
        headers = dict(scope["headers"])
        if self._key is not None and scope["path"] not in OPEN:
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, b"Bearer " + self._key.encode()):
                return RefusalError(401, "the API key is missing or wrong; send it as a bearer token")
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._body_bytes:
            return RefusalError(413, self._too_large())
        return None

    def _too_large(self) -> str:
        return f"the body is larger than {self._body_bytes} bytes"
