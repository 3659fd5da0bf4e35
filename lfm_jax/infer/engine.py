"""The batched engine: many requests in fixed slots, one sequential loop, everything heavy on the device.

Each turn of the loop admits what waits, takes in one chunk of prompts, and generates some tokens for all that are under
way. What a request gets does not depend on its neighbours, its slot, its time of arrival or on what the prefix cache
holds: chunks of a prompt begin at multiples of `chunk`, programs have fixed shapes, and random numbers come from seed
and position.
"""

from __future__ import annotations

import collections
import dataclasses
import threading
import time
import traceback
from collections.abc import Iterable

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from lfm_jax.infer.engine_config import DEFAULT, EngineConfig
from lfm_jax.infer.placement import check_memory, device_memory, place_replicas
from lfm_jax.infer.pool import Pool, Run, Sent, Ticket, logprobs
from lfm_jax.infer.prefix_cache import PrefixCache
from lfm_jax.infer.request import EngineFullError, Event, Finish, Listener, Request
from lfm_jax.infer.slots import Told
from lfm_jax.model import LFM


class Engine:
    """Runs requests through a model.

    `step` does one turn; `serve` does them in a thread of its own until `close`. `submit` and `cancel` may be called
    from any thread.

    Args:
      model: with its parameters.
      config: shape and limits.
      mesh: axes `data` and `tensor` of `make_mesh`: a replica of the model for each place along `data`, split over
        `tensor`. None: one device.

    Raises:
      ValueError: a slot longer than the model's context, what the model's layers or the mesh cannot do, or more memory
        than there is.
    """

    def __init__(self, model: LFM, config: EngineConfig = DEFAULT, mesh: Mesh | None = None):
        self.config, self.model_config = config, model.config
        shapes = config.shapes(model.config)
        self.memory = config.memory(model.config, mesh)
        """Bytes on a device, by what they are for."""
        check_memory(self.memory, config.memory_bytes or device_memory())
        graphdef, params = nnx.split(model, nnx.Param)
        self._pools = [
            Pool(graphdef, placed, part, shape, config,
                 PrefixCache(config.chunk, config.prefix_cache_bytes // len(shapes)))
            for placed, part in place_replicas(nnx.to_pure_dict(params), model.config, mesh) for shape in shapes
        ]
        self._lengths = [shape.length for shape in shapes]
        self.longest = self._lengths[-1]
        """Tokens of the longest slot."""
        self.slots = sum(len(pool.rows) for pool in self._pools)
        """How many there are."""
        self._news = threading.Condition()
        """Guards what other threads reach: what has arrived, what was cancelled, whether to close."""
        self._arrived: list[Ticket] = []
        self._cancelled: list[tuple[Ticket, int | None]] = []
        self._closing = self._abandoned = False
        self._waiting: collections.deque[Ticket] = collections.deque()
        self._sent: collections.deque[Sent] = collections.deque()
        self._thread: threading.Thread | None = None
        self.failure: str | None = None
        """Why the thread has ended before its time."""
        self.counts = collections.Counter[str]()
        """prompt_tokens, cached_tokens, tokens, steps (row steps that made them), continuations by their finish."""

    # ---------------------------------------------------------------- from any thread

    def submit(self, request: Request, listener: Listener) -> Ticket:
        """Queues a request; `listener` hears of it from the engine's thread.

        Raises:
          ValueError: the request fits no slot, names ids that the model lacks, or asks for more than the engine grants.
          EngineFullError: `max_queue` requests wait.
          RuntimeError: the engine is closed, or has failed.
        """
        if request.stop_ids is None:
            request = dataclasses.replace(request, stop_ids=self.model_config.eos_ids)
        self._check(request)
        expires = None if request.deadline is None else time.monotonic() + request.deadline
        ticket = Ticket(request, listener, expires)
        with self._news:
            if self._closing:
                raise RuntimeError("the engine is closed" if self.failure is None else "the engine has failed")
            if len(self._arrived) + len(self._waiting) >= self.config.max_queue:
                raise EngineFullError(f"{self.config.max_queue} requests wait already; try again later")
            self._arrived.append(ticket)
            self._news.notify()
        return ticket

    def cancel(self, ticket: Ticket, choice: int | None = None) -> None:
        """Ends a request, or one continuation of it; its slot is free at the next turn."""
        with self._news:
            self._cancelled.append((ticket, choice))
            self._news.notify()

    def _check(self, request: Request) -> None:
        request.check(self.model_config)
        config, stop_ids = self.config, request.stop_ids or ()
        problems = []
        if request.size > self.longest:
            problems.append(f"prompt has {len(request.prompt)} tokens, with max_new_tokens {request.max_new_tokens} "
                            f"more than the longest slot, {self.longest}; shorten one of them")
        elif request.n > (slots := self._pools_for(request)[0].shape.slots):
            problems.append(f"n is {request.n}; there are {slots} slots of its length")
        if len(stop_ids) > config.max_stop_ids:
            problems.append(f"stop_ids names {len(stop_ids)} tokens; max_stop_ids is {config.max_stop_ids}")
        if len(request.logit_bias) > config.max_biases:
            problems.append(f"logit_bias has {len(request.logit_bias)} tokens; max_biases is {config.max_biases}")
        if request.logprobs is not None and (request.logprobs > config.max_logprobs or not config.max_logprobs):
            problems.append(f"logprobs is {request.logprobs}; the engine's max_logprobs is {config.max_logprobs}")
        if request.grammar is not None and request.grammar.tokenizer.vocab_size != self.model_config.vocab_size:
            problems.append(f"grammar is for {request.grammar.tokenizer.vocab_size} ids; the model has "
                            f"{self.model_config.vocab_size}")
        if problems:
            raise ValueError("the engine cannot take this request:\n" + "\n".join(f"  - {p}" for p in problems))

    def _pools_for(self, request: Request) -> list[Pool]:
        """One on each replica."""
        length = next(length for length in self._lengths if length >= request.size)
        return [pool for pool in self._pools if pool.shape.length == length]

    def waiting(self) -> int:
        """Requests without a slot."""
        with self._news:
            return len(self._waiting) + len(self._arrived)

    def running(self) -> int:
        """Slots in use."""
        return sum(run is not None for pool in self._pools for run in pool.rows)

    # ---------------------------------------------------------------- the thread

    def warm_up(self) -> int:
        """Compiles all programs, before anything runs; how many there are."""
        return sum(pool.warm_up() for pool in self._pools)

    def serve(self) -> None:
        """Starts a thread that does the work until `close`."""
        assert self._thread is None
        self._thread = threading.Thread(target=self._serve, name="lfm-engine", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        try:
            while True:
                with self._news:
                    while not (self._arrived or self._cancelled or self._closing or self._busy()):
                        self._news.wait()
                    if self._closing and not (self._busy() or self._arrived):
                        return
                self.step()
        except Exception as error:  # Whoever waits must hear of it, and nobody must wait from now on.
            traceback.print_exc()
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        with self._news:
            self.failure, self._closing = f"{type(error).__name__}: {error}", True
            tickets = {*self._running(), *self._waiting, *self._arrived}
            self._arrived.clear()
            self._waiting.clear()
        self._sent.clear()
        for ticket in tickets:
            for i in sorted({*range(ticket.request.n)} - ticket.ended):
                self.counts["failed"] += 1
                ticket.say(Event(i, [], finish="failed", reason="the engine has failed"))
        for pool in self._pools:
            pool.rows = [None] * len(pool.rows)
            pool.prefilling.clear()
            pool.live.clear()

    def close(self, *, drain: bool = True) -> None:
        """Takes no more requests; ends what runs (`drain` False), or lets it end, and waits for the thread."""
        with self._news:
            self._closing, self._abandoned = True, not drain
            self._news.notify()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        while self.step():
            pass

    def _busy(self) -> bool:
        return bool(self._waiting or self._sent or any(pool.busy for pool in self._pools))

    def _running(self) -> set[Ticket]:
        return {run.ticket for pool in self._pools for run in pool.rows if run is not None}

    # ---------------------------------------------------------------- a turn

    def step(self) -> bool:
        """One turn; whether there is more to do."""
        self._listen()
        self._admit()
        before = len(self._sent)
        for pool in self._pools:
            with jax.set_mesh(pool.mesh):
                if pool.prefilling:
                    self._sent += pool.take_in()
                if pool.matching:  # The next masks need every token so far.
                    self._deliver(len(self._sent))
                    before = 0
                if pool.live:
                    self._sent.append(pool.generate())
        # What was sent off before this turn is handed out now, while the device is at the new work.
        self._deliver(before if len(self._sent) > before else len(self._sent))
        with self._news:
            return bool(self._arrived or self._cancelled) or self._busy()

    def _listen(self) -> None:
        """Takes what has arrived, and ends what is to end early."""
        with self._news:
            self._waiting.extend(self._arrived)
            self._arrived.clear()
            cancelled, self._cancelled = self._cancelled, []
            abandoned = self._abandoned
        for ticket, choice in cancelled:
            self._end_early(ticket, "cancelled", choice)
        now = time.monotonic()
        for ticket in (*self._running(), *self._waiting):
            if abandoned:
                self._end_early(ticket, "cancelled")
            elif ticket.expires is not None and now >= ticket.expires:
                self._end_early(ticket, "deadline")

    def _end_early(self, ticket: Ticket, finish: Finish, choice: int | None = None) -> None:
        for i in range(ticket.request.n) if choice is None else [choice]:
            if i in ticket.ended:
                continue
            if ticket.runs:
                ticket.runs[i].pool.release(ticket.runs[i], stop=True)
            self.counts[finish] += 1
            ticket.say(Event(i, [], finish=finish))
        if ticket.done and ticket in self._waiting:
            self._waiting.remove(ticket)

    def _admit(self) -> None:
        """Gives slots to requests in the order in which they came, for each length by itself."""
        full: set[int] = set()
        for ticket in list(self._waiting):
            pool = max(self._pools_for(ticket.request), key=lambda pool: len(pool.free()))
            if pool.shape.length in full or len(pool.free()) < ticket.request.n - len(ticket.ended):
                full.add(pool.shape.length)  # Nobody overtakes.
                continue
            self._waiting.remove(ticket)
            self.counts["prompt_tokens"] += len(ticket.request.prompt)
            self.counts["cached_tokens"] += pool.admit(ticket)

    def _deliver(self, count: int) -> None:
        """Hands out the tokens of the oldest `count` dispatches."""
        for _ in range(count):
            sent = self._sent.popleft()
            told = jax.tree.map(np.asarray, sent.told)
            for row, run in sent.runs:
                if not run.over:
                    self._hand_out(run, told, row)

    def _hand_out(self, run: Run, told: Told, row: int) -> None:
        token_NT = np.asarray(told.token)[:, row]
        real_NT = token_NT >= 0
        tokens = token_NT[real_NT].tolist()
        if not tokens:
            return
        request, first = run.request, run.made == 0
        run.made += len(tokens)
        self.counts["tokens"] += len(tokens)
        self.counts["steps"] += int(real_NT.any(axis=1).sum())
        if run.matcher is not None:
            for token in tokens:
                run.matcher.consume(token)
        finish: Finish | None = None
        reason = None if run.matcher is None else run.matcher.error
        if reason is not None:
            finish = "failed"
        elif tokens[-1] in (request.stop_ids or ()):
            finish = "stop"
        elif run.made >= request.max_new_tokens:
            finish = "length"
        if finish is not None:
            run.pool.release(run, stop=finish == "failed")
            self.counts[finish] += 1
        run.ticket.say(Event(
            run.choice, tokens, None if request.logprobs is None else logprobs(told, row, real_NT, request.logprobs),
            run.scores if first and request.prompt_logprobs else None, finish, reason,
        ))

    # ---------------------------------------------------------------- offline

    def complete(self, requests: Iterable[Request]) -> list[list[list[int]]]:
        """Runs requests to their end, in this thread: the tokens of each continuation of each request.

        Raises:
          ValueError: see `submit`.
        """
        results: list[list[list[int]]] = []
        todo = collections.deque(requests)
        for request in todo:
            self._check(request)
        while todo or self._busy():
            while todo and len(self._waiting) < self.config.max_queue:
                request = todo.popleft()
                results.append([[] for _ in range(request.n)])
                self.submit(request, _collect(results[-1]))
                self._listen()
            self.step()
        return results


def _collect(texts: list[list[int]]) -> Listener:
    return lambda event: texts[event.choice].extend(event.tokens)
