"""Connections of the server: uvicorn's, but none keeps its place for long without a request."""

from __future__ import annotations

import asyncio
import resource

from uvicorn.protocols.http.h11_impl import H11Protocol

OTHER_FILES = 64
"""Files that a process has open beside its connections."""


def with_head_timer(seconds: float) -> type[H11Protocol]:
    """The protocol of a connection that is closed where the head of a request takes longer to come than this.

    uvicorn's own timer runs between two requests only: a connection that has sent nothing yet, or half a head, would
    stay, and those that may be open at one time are counted.
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
            if self.cycle is not None and not self.cycle.response_complete:  # A request is at work.
                self._drop_timer()
            elif self._timer is None:
                self._timer = self.loop.call_later(seconds, self.transport.close)

        def _drop_timer(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    return Timed


def room_for(connections: int) -> int:
    """As many connections, or what the system lets this process have; its limit is raised as far as it may be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + OTHER_FILES
    if resource.RLIM_INFINITY != soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return connections if soft == resource.RLIM_INFINITY else max(1, min(connections, soft - OTHER_FILES))
