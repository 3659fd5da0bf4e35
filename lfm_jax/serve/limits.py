"""What one request may ask of the server."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request may ask for."""

    body_bytes: int = 2**20
    schema_bytes: int = 2**16
    """Of a response schema or all tools together, as JSON."""
    seconds: float = 600.0
    """From arrival to the last token."""
    tokens: int = 1024
    """Of the answer to a chat that does not say how long it may be."""
    choices: int = 16
    """Continuations of one request: prompts times n."""

    def __post_init__(self) -> None:
        problems = [f"{field.name} is {getattr(self, field.name)!r}; it must be above 0"
                    for field in dataclasses.fields(self) if not getattr(self, field.name) > 0]
        if problems:
            raise ValueError("Limits are not valid:\n" + "\n".join(f"  - {p}" for p in problems))


LIMITS = Limits()
