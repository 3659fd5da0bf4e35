"""The queue of an encoder: the texts of requests that wait at one time are computed in common batches.

Requests take turns. Each batch has the padded length of the shortest text of the request whose turn it is, and room in
it goes round, a text at a time, among all requests that have texts of this length. So a request with few texts waits
for no more batches than there are requests, whatever they hold, and one with many fills what the others leave free.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from lfm_jax.infer.embed import Encoder, Row, checked, rows_of_batch, shape_of_batch
from lfm_jax.serve.errors import RefusalError


class _Asked:
    """The texts of one request, and what is made of their vectors."""

    def __init__(self, rows: Sequence[Row], reduce: Callable[[np.ndarray], Any]):
        self.rows, self.reduce = rows, reduce
        self.waiting: dict[int, deque[int]] = defaultdict(deque)
        """Numbers of the rows that no batch has taken, by padded length."""
        for i, row in enumerate(rows):
            self.waiting[row.padded].append(i)
        self.found: dict[int, Any] = {}
        self.all: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()

    def take(self, T: int) -> int:
        """Returns the number of a row of this padded length, which waits no more."""
        i = self.waiting[T].popleft()
        if not self.waiting[T]:
            del self.waiting[T]
        return i

    def put(self, i: int, value: Any) -> None:
        """Notes what came of a row; an exception fails the request."""
        if isinstance(value, Exception):
            self.fail(value)
            return
        self.found[i] = value
        if len(self.found) == len(self.rows) and not self.all.done():
            self.all.set_result([self.found[i] for i in range(len(self.rows))])

    def fail(self, error: Exception) -> None:
        self.waiting.clear()
        if not self.all.done():
            self.all.set_exception(error)


class EncoderQueue:
    """Computes the vectors of texts of several requests, a batch at a time, in a thread of its own.

    All but the computation happens in the event loop of the requests.
    """

    def __init__(self, encoder: Encoder):
        self._compute = encoder.program()
        self._turns: deque[_Asked] = deque()
        """Requests with rows that wait, the one whose turn it is first."""
        self._device = ThreadPoolExecutor(1, "encoder")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._worker: asyncio.Task[None] | None = None
        self._closed = False
        self.counts: Counter[str] = Counter()
        """Of what was computed: texts, batches, prompt_tokens, and padded_tokens, padding included."""

    def waiting(self) -> int:
        """Returns the number of texts that wait for a batch."""
        return sum(len(rows) for asked in tuple(self._turns) for rows in tuple(asked.waiting.values()))

    async def compute[T](self, rows: Sequence[Row], reduce: Callable[[np.ndarray], T]) -> list[T]:
        """Computes the vectors of prepared texts; if it is cancelled, no further batch holds any of them.

        Args:
          reduce: what is kept of the vectors of a text, [1, D], or [S, O] with late interaction; called in a thread.
            They are a view of those of the whole batch, which a view of them would keep.

        Raises:
          NotFiniteError: vectors of one of these texts are not finite.
          RefusalError: `close` was called.
        """
        if self._closed:
            raise _closing()
        if not rows:
            return []
        self._loop = asyncio.get_running_loop()
        asked = _Asked(rows, reduce)
        self._turns.append(asked)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        try:
            return await asked.all
        finally:
            asked.waiting.clear()
            self._drop_finished()

    def close(self) -> None:
        """Ends what waits with an error, and refuses what comes; from any thread."""
        self._closed = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._fail_all)

    def _fail_all(self) -> None:
        for asked in self._turns:
            asked.fail(_closing())
        self._drop_finished()

    def _drop_finished(self) -> None:
        self._turns = deque(asked for asked in self._turns if asked.waiting)

    async def _work(self) -> None:
        """Computes batches until nothing waits."""
        while self._turns:
            batch = self._next()
            try:
                values = await asyncio.get_running_loop().run_in_executor(self._device, self._values, batch)
            except Exception as error:  # The device's: nothing is known of any row.
                values = [error] * len(batch)
            for (asked, i), value in zip(batch, values, strict=True):
                asked.put(i, value)
            self._drop_finished()

    def _next(self) -> list[tuple[_Asked, int]]:
        """Takes the rows of the next batch, and passes the turn on."""
        T = min(self._turns[0].waiting)
        sharers = deque(asked for asked in self._turns if T in asked.waiting)
        batch: list[tuple[_Asked, int]] = []
        while sharers and len(batch) < rows_of_batch(T):
            asked = sharers.popleft()
            batch.append((asked, asked.take(T)))
            if T in asked.waiting:
                sharers.append(asked)
        self._turns.rotate(-1)
        self._drop_finished()
        return batch

    def _values(self, batch: Sequence[tuple[_Asked, int]]) -> list[Any]:
        """What is kept of each row of a batch, or the exception that came of it alone."""
        rows = [asked.rows[i] for asked, i in batch]
        values = []
        for (asked, _), x_SO in zip(batch, self._compute(rows), strict=True):
            try:
                values.append(asked.reduce(checked(x_SO)))
            except Exception as error:
                values.append(error)
        B, T = shape_of_batch(rows)
        tokens = sum(len(row.ids) for row in rows)
        self.counts.update(texts=len(rows), batches=1, prompt_tokens=tokens, padded_tokens=B * T)
        return values


def _closing() -> RefusalError:
    return RefusalError(503, "the server is closing")
