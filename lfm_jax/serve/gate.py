"""Checks of key, host and size before a request is parsed, and the metrics of how it ended."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import secrets
import time
import traceback

from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lfm_jax.files import say
from lfm_jax.serve.errors import RefusalError
from lfm_jax.serve.limits import Limits
from lfm_jax.serve.metrics import Metrics

REQUEST_ID = "x-request-id"
"""Header of every answer with a name that the log calls the request by, and its key in the ASGI scope."""
OPEN = ("/", "/health")
"""Paths that need no key."""
ADMIN = ("/v1/load_lora_adapter", "/v1/unload_lora_adapter")
"""Paths that need the key of whoever runs the server: they read files of its machine."""


class Named:
    """ASGI middleware that names each request, in its scope and in the header of its answer."""

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        name = scope[REQUEST_ID] = f"req_{secrets.token_hex(12)}"

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                message.setdefault("headers", []).append((REQUEST_ID.encode(), name.encode()))
            await send(message)

        await self._app(scope, receive, named)


class Gate:
    """ASGI middleware, inside `Named`.

    Args:
      api_key: the bearer token that clients must send. With None they need none, but must name this machine as the
        host: otherwise any page in a browser could reach the server through a name that resolves to this machine.
      limits: the largest body, and how long it may take to arrive.
      admin_key: the same for paths of ADMIN, where this server has them.
    """

    def __init__(self, app: ASGIApp, api_key: str | None, limits: Limits, metrics: Metrics, admin_key: str | None):
        self._app, self._key, self._limits, self._metrics = app, api_key, limits, metrics
        self._admin_key = admin_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status, size, whole = time.monotonic(), 0, 0, False
        name = scope[REQUEST_ID]

        async def told(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        async def counted() -> Message:
            nonlocal size, whole
            try:
                async with asyncio.timeout_at(None if whole else arrived + self._limits.body_seconds):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, f"the body took longer than {self._limits.body_seconds:g} s") from None
            whole = not message.get("more_body", False)
            size += len(message.get("body", b""))
            if size > self._limits.body_bytes:
                raise HTTPException(413, self._too_large())  # FastAPI passes on exceptions of this class only.
            return message

        arrived = asyncio.get_running_loop().time()
        try:
            refusal = self._refusal(scope)
            if refusal is None:
                await self._app(scope, counted, told)
            else:
                await JSONResponse(refusal.body(), refusal.status, refusal.headers)(scope, receive, told)
        except Exception as error:
            # Its message may hold text of a user; its traceback does not.
            where = "".join(traceback.format_tb(error.__traceback__))
            say(f"request {name} has failed: {type(error).__name__}\n{where}")
            if not status:
                refusal = RefusalError(500, f"the server has failed at request {name}; its log says where")
                await JSONResponse(refusal.body(), refusal.status)(scope, receive, told)
        finally:
            self._metrics.request(scope["path"], status, time.monotonic() - began)

    def _refusal(self, scope: Scope) -> RefusalError | None:
        headers = dict(scope["headers"])
        if self._key is None:
            host = headers.get(b"host", b"localhost").decode("latin-1")
            if not _is_here(host):
                return RefusalError(400, f"host {host[:100]!r} is not this machine; without an API key only its own "
                                         "names are answered: localhost, 127.0.0.1")
        needed = self._admin_key if scope["path"] in ADMIN and self._admin_key else self._key
        if needed is not None and scope["path"] not in OPEN:
            given = [value for name, value in scope["headers"] if name == b"authorization"]
            if len(given) > 1:
                return self._unauthorised(f"there are {len(given)} Authorization headers; send one")
            scheme, _, key = (given[0] if given else b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(key.strip(), needed.encode()):
                return self._unauthorised("the API key is missing or wrong; send it as a bearer token")
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._limits.body_bytes:
            return RefusalError(413, self._too_large())
        return None

    def _unauthorised(self, message: str) -> RefusalError:
        return RefusalError(401, message, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    def _too_large(self) -> str:
        return f"the body is larger than {self._limits.body_bytes} bytes"


def _is_here(host: str) -> bool:
    """Returns whether a Host header names the loopback interface."""
    name = host[1 : host.find("]")] if host.startswith("[") else host.split(":")[0]
    try:
        return name.lower() == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False
