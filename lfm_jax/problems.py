"""Errors that list everything that is wrong at once."""

from __future__ import annotations

from collections.abc import Sequence

MAX_PROBLEMS = 20
"""How many problems one error spells out."""


def raise_problems(what: str, problems: Sequence[str]) -> None:
    """Raises a ValueError of one line a problem, MAX_PROBLEMS at most, if there are any."""
    if problems:
        shown = [f"  - {problem}" for problem in problems[:MAX_PROBLEMS]]
        if len(problems) > MAX_PROBLEMS:
            shown.append(f"  ... and {len(problems) - MAX_PROBLEMS} more")
        raise ValueError(f"{what}:\n" + "\n".join(shown))
