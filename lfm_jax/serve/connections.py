"""Connections of the server: uvicorn's, with a time limit on the head of a request."""

from __future__ import annotations

import asyncio
import resource

from uvicorn.protocols.http.h11_impl import H11Protocol

OTHER_FILES = 64
"""Files that a process has open besides its connections."""


def with_head_timer(seconds: float) -> type[H11Protocol]:
    """Makes a protocol that closes a connection if the head of a request takes longer than this to arrive.

    uvicorn's own timer runs only between two requests: a connection that has sent nothing, or half a head, would stay
    open and count towards the limit on connections.
    """

    class Timed(H11Protocol):
        _timer: asyncio.TimerHandle | None = None

        # uvicorn narrows the transport's type in the same way.
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._set_or_drop_timer()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self._set_or_drop_timer()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._drop_timer()

        def _set_or_drop_timer(self) -> None:
            if self.cycle is not None and not self.cycle.response_complete:  # A request is running.
                self._drop_timer()
            elif self._timer is None:
                self._timer = self.loop.call_later(seconds, self.transport.close)

        def _drop_timer(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    return Timed


def room_for(connections: int) -> int:
    """Returns the number of connections, or fewer if the system allows fewer; raises this process's limit as needed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + OTHER_FILES
    if resource.RLIM_INFINITY != soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return connections if soft == resource.RLIM_INFINITY else max(1, min(connections, soft - OTHER_FILES))
