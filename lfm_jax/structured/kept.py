"""What takes time to make, kept for the next who asks."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable


class Kept[T]:
    """Values by key, the last ones asked for, as many as the limits let stay. Threads may share it.

    Args:
      entries: most values.
      size: most that they weigh together; what weighs more by itself is made each time.
      weigh: what a value and its key weigh.
    """

    def __init__(self, entries: int, size: int, weigh: Callable[[str, T], int]):
        self._entries, self._size, self._weigh = entries, size, weigh
        self._lock = threading.Lock()
        self._values: OrderedDict[str, T] = OrderedDict()
        self._weight = 0
        self._making: dict[str, threading.Lock] = {}
        """Whoever makes the value of a key holds its lock: the others wait instead of making it too."""

    def get(self, key: str, make: Callable[[], T]) -> T:
        """The value of a key, which `make` gives where none is kept; what it raises is not kept."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
            making = self._making.setdefault(key, threading.Lock())
        with making:
            with self._lock:
                if key in self._values:
                    return self._values[key]
            try:
                value = make()
                self._keep(key, value)
            finally:
                with self._lock:
                    self._making.pop(key, None)
        return value

    def _keep(self, key: str, value: T) -> None:
        weight = self._weigh(key, value)
        with self._lock:
            if weight > self._size or key in self._values:
                return
            self._values[key] = value
            self._weight += weight
            while len(self._values) > self._entries or self._weight > self._size:
                self._weight -= self._weigh(*self._values.popitem(last=False))
