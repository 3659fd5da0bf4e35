"""How verbs report bad input."""

from __future__ import annotations

import os

from lfm_jax.files import say

FAILED = 2
"""Exit status of a verb for bad input."""


def refuse(error: Exception) -> int:
    """Prints the message of an error and returns the exit status; LFM_TRACEBACK=1 raises the error instead."""
    if os.environ.get("LFM_TRACEBACK"):
        raise error
    say(str(error))
    return FAILED
