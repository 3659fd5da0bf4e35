"""What requests may ask of the server."""

from __future__ import annotations

import dataclasses

from lfm_jax.problems import raise_problems


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request may ask for, and how many may do so at one time."""

    body_bytes: int = 2**20
    schema_bytes: int = 2**16
    """Of a response schema or all tools together, as JSON."""
    body_seconds: float = 30.0
    """For the head of a request to come, and then for all of its body."""
    seconds: float = 600.0
    """From its place in the queue to the last token."""
    tokens: int = 1024
    """Of the answer to a chat that does not say how long it may be."""
    choices: int = 16
    """Continuations of one request: prompts times n."""
    prepared: int = 64
    """Requests whose texts and schemas are made ready for the engine at one time; further ones get status 429."""

    def __post_init__(self) -> None:
        problems = [f"{field.name} is {getattr(self, field.name)!r}; it must be above 0"
                    for field in dataclasses.fields(self) if not getattr(self, field.name) > 0]
        raise_problems("Limits are not valid", problems)


LIMITS = Limits()
OFFLINE = Limits(body_bytes=2**26, schema_bytes=2**20, seconds=float("inf"), choices=128, prepared=2**20)
"""For files of requests that one has written oneself: what waits there waits for its own work."""
