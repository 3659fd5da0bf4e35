"""Which adapters an engine has, and in which of its places each one is."""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from lfm_jax.engine.config import EngineConfig
from lfm_jax.engine.request import UnknownAdapterError

if TYPE_CHECKING:
    from lfm_jax.engine.pool import Ticket


@dataclasses.dataclass(eq=False)
class Loaded:
    """An adapter in its place."""

    name: str
    source: str
    """Where it comes from."""
    place: int
    """From 1 up; `trees.for_rows`."""
    number: int
    """From 1 up, its own for ever: names and places are given again."""
    users: set[Ticket] = dataclasses.field(default_factory=set)
    """Requests that have not ended."""


class Adapters:
    """The table of adapters; all methods may be called from any thread."""

    def __init__(self, config: EngineConfig):
        self._config = config
        self._by_name: dict[str, Loaded] = {}
        self._places: list[Loaded | None] = [None] * config.adapters
        """What each place holds; also what is not to be named any more, as long as it has users."""
        self._numbers = itertools.count(1)
        self._lock, self._loading = threading.Lock(), threading.Lock()

    def sources(self) -> dict[str, str]:
        """Returns where each one comes from, by name, in the order of loading."""
        with self._lock:
            return {name: one.source for name, one in self._by_name.items()}

    def check(self, name: str | None) -> None:
        """Raises UnknownAdapterError if there is none of this name."""
        with self._lock:
            if name is not None:
                self._find(name)

    def begin(self, ticket: Ticket) -> None:
        """Gives a request its adapter, whose place is kept until the request has ended.

        Raises:
          UnknownAdapterError: there is none of this name.
        """
        with self._lock:
            if ticket.request.adapter is not None:
                ticket.adapter = self._find(ticket.request.adapter)
                ticket.adapter.users.add(ticket)

    def load(self, name: str, source: str, fill: Callable[[int], None]) -> None:
        """Finds a place and lets `fill` put the adapter into it; then requests may name it.

        Raises:
          ValueError: the name is taken or empty, or no place is free; or what `fill` raises.
        """
        with self._loading:  # One at a time; requests go on.
            with self._lock:
                place = self._free_place(name)
            fill(place)
            with self._lock:
                one = self._by_name[name] = Loaded(name, source, place, next(self._numbers))
                self._places[place - 1] = one

    def _free_place(self, name: str) -> int:
        if not self._places:
            raise ValueError("the engine has no places for adapters; start it with some (engine.adapters)")
        if not name:
            raise ValueError("the name of an adapter is empty; give it one")
        if name in self._by_name:
            raise ValueError(f"there is an adapter {name!r} already; unload it first, or choose another name")
        for i, one in enumerate(self._places):
            if one is None or (self._by_name.get(one.name) is not one and not one.users):
                return i + 1
        ending = len(self._places) - len(self._by_name)
        raise ValueError(f"all {len(self._places)} places for adapters are taken (engine.adapters); unload one first"
                         + (f": {ending} unloaded ones still have requests that run" if ending else ""))

    def unload(self, name: str) -> None:
        """Forgets a name; the place is free when its last request has ended.

        Raises:
          UnknownAdapterError: there is none of this name.
        """
        with self._lock:
            self._find(name)
            del self._by_name[name]

    def _find(self, name: str) -> Loaded:
        if name not in self._by_name:
            there = ", ".join(map(repr, self._by_name)) or "none"
            raise UnknownAdapterError(f"there is no adapter {name[:100]!r}; the engine has {there}")
        return self._by_name[name]
