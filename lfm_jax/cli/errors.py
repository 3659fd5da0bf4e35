"""How a verb refuses."""

from __future__ import annotations

import os

from lfm_jax.files import say

FAILED = 2
"""Exit status of a verb that was given what it cannot use."""


def refuse(error: Exception) -> int:
    """One clear message; LFM_TRACEBACK=1 shows where it comes from."""
    if os.environ.get("LFM_TRACEBACK"):
        raise error
    say(str(error))
    return FAILED
