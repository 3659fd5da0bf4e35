"""Errors that list all problems at once."""

from __future__ import annotations

from collections.abc import Sequence

MAX_PROBLEMS = 20
"""The most problems that one error lists by default."""


def raise_problems(what: str, problems: Sequence[str], most: int | None = MAX_PROBLEMS) -> None:
    """Raises a ValueError with a line for each problem, `most` of them (None: all), if there are any."""
    if problems:
        shown = [f"  - {problem}" for problem in problems[:most]]
        if len(shown) < len(problems):
            shown.append(f"  ... and {len(problems) - len(shown)} more")
        raise ValueError(f"{what}:\n" + "\n".join(shown))
