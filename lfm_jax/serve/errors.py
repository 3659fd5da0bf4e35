"""Errors in the form of OpenAI's API."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lfm_jax.engine.service import Piece

ERROR_TYPES = {
    400: "invalid_request_error", 401: "authentication_error", 404: "not_found_error", 405: "invalid_request_error",
    408: "timeout_error", 413: "invalid_request_error", 429: "rate_limit_error", 500: "server_error",
    499: "client_closed_request", 503: "server_error", 504: "timeout_error",
}
"""The `type` of an error, by status."""


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Returns what a route's document says of its errors."""
    return {status: {"description": ERROR_TYPES[status]} for status in statuses}


class RefusalError(Exception):
    """A request that gets an error instead of an answer.

    Args:
      code: a word that programs look for.
      param: the field that the error is about.
      headers: of the answer.
    """

    def __init__(
        self, status: int, message: str, code: str | None = None, *, param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.headers = status, message, code, param, headers

    def body(self) -> dict[str, Any]:
        """As clients read it."""
        kind = ERROR_TYPES.get(self.status, "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def broken(piece: Piece) -> RefusalError | None:
    """Returns the error of a continuation that ended without an answer, None for one that has or still runs."""
    if piece.finish == "deadline":
        return RefusalError(504, "the answer took too long")
    if piece.finish == "grammar":
        return RefusalError(400, f"the answer cannot follow its grammar to an end: {piece.reason}")
    if piece.finish == "failed":
        return RefusalError(500, f"the answer cannot be finished: {piece.reason}")
    if piece.finish == "cancelled":
        return RefusalError(503, "the server is closing")
    return None
