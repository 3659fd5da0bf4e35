"""The batched engine: many requests in fixed slots, one sequential loop, everything heavy on the device.

Each turn of the loop gives free slots to waiting requests, takes in a chunk's worth of prompts, and generates some
tokens for all running requests: a single one while more prompts wait, so that slots fill up soon. What a request gets
does not depend on its neighbours, its slot, its time of arrival or the prefix cache: chunks of a prompt begin at
multiples of `chunk`, programs have fixed shapes, and random numbers come from seed and position. There is one
exception. The number of rows of a dispatch, and whether it drafts tokens, depend on the running requests and can change
the rounding of a sum (about 1e-6 in float32). `EngineConfig.fixed_rows` rules this out, except that a request with a
grammar stops the drafts of others.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import math
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from lfm_jax.engine.adapters import Adapters
from lfm_jax.engine.config import DEFAULT, EngineConfig
from lfm_jax.engine.placement import (
    check_memory,
    device_memory,
    fit_slots,
    give_back_memory,
    joined_weights,
    joins,
    memory_needed,
    place_replicas,
)
from lfm_jax.engine.pool import Pool, Running, Sent, Ticket, logprobs
from lfm_jax.engine.prefix_cache import PrefixCache
from lfm_jax.engine.request import (
    LOGITS_NOT_FINITE,
    ContextLengthError,
    Continuation,
    EngineFullError,
    Event,
    Finish,
    Listener,
    Request,
    TokenLogprob,
)
from lfm_jax.engine.slots import NOT_FINITE, Told, slot_shapes
from lfm_jax.engine.variants import STAGES, Variant, variants
from lfm_jax.model import LFM
from lfm_jax.problems import raise_problems

if TYPE_CHECKING:
    from lfm_jax.adapters.peft import Adapter
    from lfm_jax.adapters.trees import Tree
    from lfm_jax.structured.grammar import Matcher


class Engine:
    """Runs requests through a model.

    `step` runs one turn; `serve` runs turns in a thread of its own until `close`. `submit` and `cancel` may be called
    from any thread.

    Args:
      model: with its parameters.
      config: shape and limits.
      mesh: axes `data` and `tensor` of `make_mesh`: a replica of the model for each place along `data`, split over
        `tensor`. None: one device.

    Raises:
      ValueError: the model is an encoder, a slot is longer than the model's context, the model's layers or the mesh do
        not support the config, or the memory is too small.
    """

    def __init__(self, model: LFM, config: EngineConfig = DEFAULT, mesh: Mesh | None = None):
        model.config.need_causal("an engine")
        graphdef, state = nnx.split(model, nnx.Param)
        params = nnx.to_pure_dict(state)
        limit = config.memory_bytes or device_memory()
        config = fit_slots(config, model.config, params, mesh, limit)
        self.config, self.model_config = config, model.config
        shapes = slot_shapes(config, model.config)
        self.memory = memory_needed(config, model.config, params, mesh)
        """Bytes on a device, by what they are for."""
        check_memory(self.memory, limit)
        self.counts = collections.Counter[str]()
        """prompt_tokens, cached_tokens, tokens, steps (row steps that made them), drafted_tokens, accepted_tokens (of
        the drafted ones), continuations by their finish, not_finite (those among the failed ones whose logits were
        not)."""
        self._mesh, self._kinds = mesh, _kinds(params)
        self._joins = joins(model) if config.joined else []
        if self._joins and mesh is not None:
            raise ValueError("joined is for one device: a mesh splits the heads of each weight; set it to False")
        self.adapters = Adapters(config)
        """Those that requests may name."""
        if config.adapters:  # Imported where it is used: it brings the tables of families, and benchmarks have none.
            from lfm_jax.adapters.trees import with_places

            params = with_places(model.config, params, config.adapters, config.adapter_rank)
        params = joined_weights(params, self._joins)
        self._pools = [
            Pool(graphdef, placed, part, shape, config,
                 PrefixCache(config.chunk, config.prefix_cache_bytes // len(shapes)), self.counts)
            for placed, part in place_replicas(params, model.config, mesh) for shape in shapes
        ]
        self._by_length = {
            shape.length: [pool for pool in self._pools if pool.shape is shape] for shape in shapes
        }
        if config.adapters:  # Its program is compiled here, so that none is when an adapter comes.
            from lfm_jax.adapters.trees import empty_places

            self._fill(jax.tree.map(np.asarray, empty_places(model.config, 1, config.adapter_rank)), 1)
        self.longest = max(self._by_length)
        """The number of tokens of the longest slot."""
        self.slots = sum(len(pool.rows) for pool in self._pools)
        """The number of slots."""
        self._news = threading.Condition()
        """Guards what other threads change: the requests that arrived or were cancelled, and whether to close."""
        self._arrived: list[Ticket] = []
        self._cancelled: list[tuple[Ticket, int | None, Finish]] = []
        self._closing = self._abandoned = False
        self._waiting: collections.deque[Ticket] = collections.deque()
        self._admitted: set[Ticket] = set()
        self._sent: collections.deque[Sent] = collections.deque()
        self._thread: threading.Thread | None = None
        self._compiler: threading.Thread | None = None
        self._uncompiled: collections.deque[tuple[Pool, Variant]] = collections.deque()
        self._compiled: collections.deque[tuple[Pool, Variant]] = collections.deque()
        """Ready, and not yet known to their pools."""
        self._tell: Callable[[str], None]
        self.failure: str | None = None
        """The error that ended the thread, if one did."""

    # ---------------------------------------------------------------- from any thread

    def submit(self, request: Request, listener: Listener) -> Ticket:
        """Queues a request; the engine's thread calls `listener` with its events.

        Raises:
          ContextLengthError: the request fits no slot.
          UnknownAdapterError: it names an adapter that the engine does not have.
          ValueError: it names ids that the model lacks, or asks for more than the engine grants.
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
            self.adapters.begin(ticket)
            self._arrived.append(ticket)
            self._news.notify()
        return ticket

    def cancel(self, ticket: Ticket, choice: int | None = None, finish: Finish = "cancelled") -> None:
        """Ends a request, or one continuation of it; its slot is free at the next turn.

        Args:
          finish: the finish to record; `stop` where only the caller knows that the text has ended.

        Raises:
          ValueError: the request has no such continuation.
        """
        if choice is not None and not 0 <= choice < ticket.request.n:
            raise ValueError(f"choice is {choice}; the request has continuations 0..{ticket.request.n - 1}")
        with self._news:
            if ticket.done:
                return
            self._cancelled.append((ticket, choice, finish))
            self._news.notify()

    def _check(self, request: Request) -> None:
        request.check(self.model_config)
        self.adapters.check(request.adapter)
        config, stop_ids = self.config, request.stop_ids or ()
        if request.size > self.longest:
            raise ContextLengthError(self.longest, len(request.prompt), request.max_new_tokens)
        problems = []
        if request.n > (slots := self._pools_for(request)[0].shape.slots):
            problems.append(f"n is {request.n}; there are {slots} slots of its length")
        if len(stop_ids) > config.max_stop_ids:
            problems.append(f"stop_ids names {len(stop_ids)} tokens; max_stop_ids is {config.max_stop_ids}")
        forbidden = {token for token, bias in request.logit_bias.items() if bias == -math.inf}
        if len(forbidden) == self.model_config.vocab_size:
            problems.append("logit_bias forbids every token; leave one")
        elif request.min_new_tokens and len(forbidden | set(stop_ids)) == self.model_config.vocab_size:
            problems.append(f"min_new_tokens is {request.min_new_tokens}, but logit_bias leaves stop ids only")
        if request.logprobs is not None and (request.logprobs > config.max_logprobs or not config.max_logprobs):
            problems.append(f"logprobs is {request.logprobs}; the engine's max_logprobs is {config.max_logprobs}")
        if request.grammar is not None and request.grammar.tokenizer.vocab_size != self.model_config.vocab_size:
            problems.append(f"grammar is for {request.grammar.tokenizer.vocab_size} ids; the model has "
                            f"{self.model_config.vocab_size}")
        elif not (request.grammar is None or request.grammar.free
                  or set(request.grammar.tokenizer.eos_ids) <= set(stop_ids)):
            problems.append(f"grammar ends texts with {request.grammar.tokenizer.eos_ids}; stop_ids {tuple(stop_ids)} "
                            "must name these too")
        raise_problems("the engine cannot take this request", problems)

    def _pools_for(self, request: Request) -> list[Pool]:
        """Returns the pools that can take a request, one on each replica."""
        return next(pools for length, pools in self._by_length.items() if length >= request.size)

    def longest_for(self, continuations: int) -> int:
        """Returns the number of tokens of the longest slots of which there are as many; 0: there are not."""
        return max((length for length, pools in self._by_length.items() if pools[0].shape.slots >= continuations),
                   default=0)

    def waiting(self) -> int:
        """Returns the number of requests without a slot."""
        with self._news:
            return len(self._waiting) + len(self._arrived)

    def running(self) -> int:
        """Returns the number of slots in use."""
        return sum(run is not None for pool in self._pools for run in pool.rows)

    def use(self, params: Any) -> None:
        """Takes other weights of the same model, such as those of a later training step, and empties the prefix cache.
        What is asked from now on is answered as by a new engine.

        Args:
          params: a plain dict, as `nnx.to_pure_dict` gives it. Without a mesh nothing is copied, except with
            `EngineConfig.joined`; over a mesh, nothing that `placement.gathered` gives. Whoever donates the arrays
            hands over others before the next request.

        Raises:
          ValueError: they are not those of this model in names, shapes or dtypes.
          RuntimeError: requests are under way, or the engine serves in a thread of its own.
        """
        if self._thread is not None or self.waiting() or self._busy():
            raise RuntimeError("an engine takes other weights only between requests, and not while it serves")
        if _kinds(params) != self._kinds:
            raise ValueError("these are not weights of the engine's model: names, shapes or dtypes differ")
        replicas = place_replicas(params, self.model_config, self._mesh)
        placed = [params for params, _ in replicas for _ in self._by_length]
        if self.config.adapters:
            from lfm_jax.adapters.trees import rebased

            placed = [rebased(pool.params, params) for pool, params in zip(self._pools, placed, strict=True)]
        for pool, params in zip(self._pools, placed, strict=True):
            pool.use(joined_weights(params, self._joins))

    def load_adapter(self, name: str, adapter: Adapter, source: str = "") -> None:
        """Takes an adapter of the model into a free place, whatever is under way; nothing is compiled. From any thread.

        Args:
          name: what requests call it.
          source: where it comes from, for those who ask.

        Raises:
          ValueError: the name is taken, no place is free, the adapter's rank is larger than the places' or its shapes
            are not the model's, or its numbers are not finite.
        """
        from lfm_jax.adapters.trees import for_place

        part = functools.partial(for_place, self.model_config, adapter.lora, adapter.weights)
        self.adapters.load(name, source, lambda place: self._fill(part(self.config.adapter_rank), place))

    def unload_adapter(self, name: str) -> None:
        """Forgets an adapter: no request may name it from now on, and its place is free once those that did have ended.
        From any thread.

        Raises:
          UnknownAdapterError: there is none of this name.
        """
        self.adapters.unload(name)

    def _fill(self, part: Tree, place: int) -> None:
        from lfm_jax.adapters.trees import fill_place

        # Dispatches with the old arrays may be under way, or follow in another thread: none of their rows reads this
        # place.
        for pools in zip(*self._by_length.values(), strict=True):  # Those of one replica have the same weights.
            with jax.set_mesh(pools[0].mesh):
                params = fill_place(pools[0].params, part, place)
            for pool in pools:
                pool.params = params

    # ---------------------------------------------------------------- the thread

    def warm_up(self, *, everything: bool = True, tell: Callable[[str], None] = lambda _: None) -> int:
        """Compiles programs before anything runs.

        Args:
          everything: all of them, as always with `fixed_rows`. Else those that a first, short request needs: `serve`
            compiles the others beside its work. Until a program is ready, a wider one does its work; one without a
            substitute is compiled by whoever needs it first.
          tell: hears what is compiled, a line each, from here or from a thread of its own.

        Returns:
          How many are ready.
        """
        pools = sorted(self._pools, key=lambda pool: pool.shape.length)
        of_pools = [(pool, variants(pool.shape, self.config)) for pool in pools]
        stages = [[(pool, variant) for pool, of_pool in of_pools for variant in of_pool[n]] for n in range(STAGES)]
        for pool in pools:
            pool.ready = set()
        self._uncompiled, self._tell = collections.deque(itertools.chain(*stages)), tell
        needed = sum(pool.shape.length == pools[0].shape.length for pool, _ in stages[0])
        count = len(self._uncompiled) if everything or self.config.fixed_rows else needed
        for _ in range(count):
            self._compile_next()
        self._take_over()
        give_back_memory()
        return count

    def _compile_next(self) -> None:
        pool, variant = self._uncompiled.popleft()
        self._tell(f"compiling {variant} for slots of {pool.shape.length} tokens, {len(self._uncompiled)} more to come")
        pool.compile(variant)
        self._compiled.append((pool, variant))

    def _compile_rest(self) -> None:
        try:
            while self._uncompiled and not self._closing:
                self._compile_next()
            if not self._uncompiled:
                give_back_memory()
                self._tell("every program is compiled")
        except Exception:  # What is not ready now is compiled where it is called.
            traceback.print_exc()

    def _take_over(self) -> None:
        """Lets pools use what has been compiled; by the thread that runs them, so that a turn has one choice."""
        while self._compiled:
            pool, variant = self._compiled.popleft()
            if pool.ready is not None:
                pool.ready.add(variant)

    def serve(self) -> None:
        """Starts a thread that does the work until `close`, and one that compiles what `warm_up` has left."""
        assert self._thread is None
        self._thread = threading.Thread(target=self._serve, name="lfm-engine", daemon=True)
        self._thread.start()
        if self._uncompiled:
            self._compiler = threading.Thread(target=self._compile_rest, name="lfm-compile", daemon=True)
            self._compiler.start()

    def _serve(self) -> None:
        try:
            while True:
                with self._news:
                    while not (self._arrived or self._cancelled or self._closing or self._busy()):
                        self._news.wait()
                    if self._closing and not (self._busy() or self._arrived):
                        return
                self.step()
        except Exception as error:  # All listeners must learn of it, and no request may wait from now on.
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
            pool.abandon()

    def close(self, *, drain: bool = True) -> None:
        """Takes no more requests, lets the running ones finish or ends them (`drain` False), and waits for the thread.

        A second call with `drain` False may end the requests that a first call waits for.
        """
        with self._news:
            self._closing, self._abandoned = True, self._abandoned or not drain
            self._news.notify()
            thread = self._thread
        if thread is not None:
            thread.join()
            self._thread = None
        if self._compiler is not None:  # To the end of the program that it is at: it cannot be stopped within.
            self._compiler.join()
            self._compiler = None
        while self.failure is None and self.step():
            pass

    def _busy(self) -> bool:
        return bool(self._waiting or self._sent or any(pool.busy for pool in self._pools))

    def _running(self) -> set[Ticket]:
        """Returns the requests that got slots and have not ended; the slots may be in other hands already, while tokens
        are on their way from the device."""
        self._admitted = {ticket for ticket in self._admitted if not ticket.done}
        return self._admitted

    # ---------------------------------------------------------------- a turn

    def step(self) -> bool:
        """One turn; whether there is more to do."""
        self._take_over()
        self._listen()
        self._admit()
        before = list(self._sent)
        for pool in self._pools:
            with jax.set_mesh(pool.mesh):
                if pool.prefilling:
                    self._sent += pool.take_in()
                    for run, reason in pool.ended:
                        self._say(run, [], finish="length" if reason is None else "failed", reason=reason)
                    pool.ended.clear()
                self._generate(pool)
        # Tokens of earlier turns are handed out now, while the device does the new work.
        old = [sent for sent in self._sent if sent in before]
        self._deliver(old if len(self._sent) > len(old) else list(self._sent))
        with self._news:
            return bool(self._arrived or self._cancelled) or self._busy()

    def _generate(self, pool: Pool) -> None:
        """Generates some tokens in a pool: with one dispatch, or with one per token while a request has a grammar."""
        for _ in range(self.config.steps):
            if pool.matching:  # The next masks need every token so far.
                self._deliver([sent for sent in self._sent if sent.pool is pool])
            matching = pool.matching
            if pool.live:
                self._sent.append(pool.generate(wanted=self._wanted(pool)))
            # Requests that wait for a slot, or for the rest of their prompt, wait for the end of a turn.
            if not matching or pool.prefilling or (pool.free and self._wanted(pool)):
                return

    def _wanted(self, pool: Pool) -> bool:
        """Returns whether a request waits for a slot of this pool."""
        return any(pool in self._pools_for(ticket.request) for ticket in self._waiting)

    def _listen(self) -> None:
        """Queues the requests that arrived, and ends those that were cancelled or ran out of time."""
        with self._news:
            self._waiting.extend(self._arrived)
            self._arrived.clear()
            cancelled, self._cancelled = self._cancelled, []
            abandoned = self._abandoned
        for ticket, choice, finish in cancelled:
            self._end_early(ticket, finish, choice)
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
        """Gives slots to requests in the order of their arrival, separately for each length."""
        open_ = {length for length, pools in self._by_length.items() if any(pool.free for pool in pools)}
        for ticket in list(self._waiting):
            if not open_:
                return
            pools = self._pools_for(ticket.request)
            if pools[0].shape.length not in open_:
                continue
            pool = max(pools, key=lambda pool: pool.free)
            if pool.free < ticket.request.n - len(ticket.ended):
                open_.remove(pool.shape.length)  # No request overtakes another.
                continue
            self.counts["prompt_tokens"] += len(ticket.request.prompt)
            self._admitted.add(ticket)
            pool.admit(ticket)
            self._waiting.remove(ticket)

    def _deliver(self, ready: Sequence[Sent]) -> None:
        """Hands out the tokens of some dispatches."""
        for sent in ready:
            self._sent.remove(sent)
            told = jax.tree.map(np.asarray, sent.told)
            # For all rows at once: thousands of them wait for this thread.
            real_NBT, spoilt_NBT = np.asarray(told.token) >= 0, np.asarray(told.token) == NOT_FINITE
            stepped_NB = real_NBT.any(axis=2)
            tokens_B = np.asarray(told.token).swapaxes(0, 1).reshape(real_NBT.shape[1], -1).tolist()
            steps_B, spoilt_B = stepped_NB.sum(axis=0).tolist(), spoilt_NBT.any(axis=(0, 2)).tolist()
            drafted_B = None if told.drafted is None else (told.drafted * stepped_NB).sum(axis=0).tolist()
            for row, run in sent.runs:
                if run.over or not (steps_B[row] or spoilt_B[row]):
                    continue
                tokens = [token for token in tokens_B[row] if token >= 0]
                self.counts["tokens"] += len(tokens)
                self.counts["steps"] += steps_B[row]
                if drafted_B is not None:
                    self.counts["drafted_tokens"] += drafted_B[row]
                    self.counts["accepted_tokens"] += len(tokens) - steps_B[row]
                    run.pool.promise(run, len(tokens) - steps_B[row])
                self._hand_out(run, tokens, told, row, spoilt=spoilt_B[row])

    def _hand_out(self, run: Running, tokens: list[int], told: Told, row: int, *, spoilt: bool) -> None:
        request = run.request
        finish: Finish | None = None
        reason = None if run.matcher is None else _follow(run.matcher, tokens)
        if reason is None and spoilt:
            reason = LOGITS_NOT_FINITE
        if reason is not None:
            finish = "failed"
        elif run.matcher is not None and run.matcher.error is not None:
            finish, reason = "grammar", run.matcher.error
        elif tokens[-1] in (request.stop_ids or ()):
            finish = "stop"
        elif run.made + len(tokens) >= request.max_new_tokens:
            finish = "length"
        found = None if request.logprobs is None else logprobs(
            told, row, np.asarray(told.token)[:, row] >= 0, request.logprobs
        )
        self._say(run, tokens, found, finish, reason)

    def _say(
        self, run: Running, tokens: list[int], found: list[TokenLogprob] | None = None, finish: Finish | None = None,
        reason: str | None = None,
    ) -> None:
        """Tells of new tokens, and of the end if this is it."""
        first = run.made == 0
        scores = run.scores if first and run.request.prompt_logprobs and reason is None else None
        run.made += len(tokens)
        if finish is not None:
            run.pool.release(run, stop=reason is not None)
            self.counts[finish] += 1
            if reason == LOGITS_NOT_FINITE:
                self.counts["not_finite"] += 1
        run.ticket.say(Event(run.choice, tokens, found, scores, run.cached if first else None, finish, reason))

    # ---------------------------------------------------------------- offline

    def complete(self, requests: Iterable[Request]) -> list[list[Continuation]]:
        """Runs requests to their end in this thread, and returns the continuations of each, in order.

        Raises:
          ValueError: see `submit`.
          RuntimeError: the engine serves in a thread of its own, or is closed.
        """
        if self._thread is not None:
            raise RuntimeError("the engine serves in a thread of its own; submit requests to it")
        ends: list[list[Continuation]] = []
        todo = collections.deque(requests)
        for request in todo:
            self._check(request)
        while todo or self._busy():
            while todo and len(self._waiting) < self.config.max_queue:
                request = todo.popleft()
                ends.append([Continuation([], "cancelled") for _ in range(request.n)])
                self.submit(request, functools.partial(_collect, ends[-1]))
                self._listen()
            self.step()
        return ends


def _kinds(params: Any) -> Any:
    """What weights of the same model share."""
    return jax.tree.map(lambda x: (x.shape, x.dtype), params)


def _follow(matcher: Matcher, tokens: Sequence[int]) -> str | None:
    """Advances a matcher by tokens; returns why one of them is not allowed, which no mask should let happen."""
    try:
        for token in tokens:
            matcher.consume(token)
    except ValueError as error:
        return str(error)
    return None


def _collect(ends: list[Continuation], event: Event) -> None:
    before = ends[event.choice]
    found = before.logprobs if event.logprobs is None else [*(before.logprobs or []), *event.logprobs]
    ends[event.choice] = Continuation(
        [*before.tokens, *event.tokens], event.finish or "cancelled", event.reason, found)
