"""Progress of an evaluation on standard error, with the time that is left."""

from __future__ import annotations

import time

from lfm_jax.files import say
from lfm_jax.units import clock

EVERY = 10.0
"""Seconds between two lines."""


class Progress:
    """Says how far some requests are.

    Args:
      what: the requests, as `loglikelihood`.
      total: how many there are.
      work: of what is not known yet, in any unit.
      known: how many are known already.
    """

    def __init__(self, what: str, total: int, work: float, known: int = 0):
        self._what, self._total, self._done = what, total, known
        self._work, self._worked = work, 0.0
        self._begin = self._said = time.monotonic()
        if total:
            say(f"{what}: {total} requests{f', {known} of them answered before' if known else ''}")

    def add(self, work: float) -> None:
        """Counts a request as done."""
        self._done += 1
        self._worked += work
        now = time.monotonic()
        last = self._done == self._total
        if last or now - self._said >= EVERY:
            self._said = now
            left = (now - self._begin) * (self._work - self._worked) / max(self._worked, 1e-9)
            say(f"{self._what}: {self._done} of {self._total}, " + (
                f"done in {clock(now - self._begin)}" if last else f"{clock(left)} left"))

