"""Limits of requests to the server."""

from __future__ import annotations

import dataclasses

from lfm_jax.problems import raise_problems


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of one request, and of the number of requests that are prepared at a time."""

    body_bytes: int = 2**20
    schema_bytes: int = 2**17
    """Size of a response schema, or of all tools together, as JSON."""
    body_seconds: float = 30.0
    """Time for the head of a request to arrive, and then for its whole body."""
    seconds: float = 600.0
    """Time from submission to the last token."""
    tokens: int = 1024
    """The most tokens of an answer to a chat that sets no limit itself."""
    choices: int = 16
    """The most continuations of one request: prompts times n."""
    prepared: int = 64
    """The most requests whose texts and schemas are prepared for the engine at a time; further ones get status 429."""

    def __post_init__(self) -> None:
        problems = [f"{field.name} is {getattr(self, field.name)!r}; it must be above 0"
                    for field in dataclasses.fields(self) if not getattr(self, field.name) > 0]
        raise_problems("Limits are not valid", problems)


LIMITS = Limits()
OFFLINE = Limits(body_bytes=2**26, schema_bytes=2**20, seconds=float("inf"), choices=128, prepared=2**20)
"""For `lfm batch`, whose requests come from the user's own file and wait only for each other."""
