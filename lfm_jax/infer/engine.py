"""The batched engine: many requests in fixed slots, one sequential loop, everything heavy on the device.

Each turn of the loop admits what waits, takes in one chunk of prompts, and generates some tokens for all that are under
way. What a request gets does not depend on its neighbours, its slot, its time of arrival or on what the prefix cache
holds: chunks of a prompt begin at multiples of `chunk`, programs have fixed shapes, and random numbers come from seed
and position.

Dimensions: as in `slots.py`.
"""

from __future__ import annotations

import collections
import dataclasses
import threading
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from lfm_jax.infer.engine_config import DEFAULT, EngineConfig
from lfm_jax.infer.placement import check_memory, device_memory, place_replicas
from lfm_jax.infer.prefix_cache import PrefixCache
from lfm_jax.infer.request import EngineFullError, Event, Finish, Listener, Request, TokenLogprob
from lfm_jax.infer.sampling import to_arrays
from lfm_jax.infer.slots import NOWHERE, Asked, Slots, SlotShape, Told, programs
from lfm_jax.model import LFM

if TYPE_CHECKING:
    from lfm_jax.infer.grammar import Matcher


class Ticket:
    """A request that the engine has taken."""

    def __init__(self, request: Request, listener: Listener, expires: float | None):
        self.request, self.listener, self.expires = request, listener, expires
        self.runs: list[_Run] = []
        """One for each continuation once it has slots."""
        self.ended: set[int] = set()
        """Continuations that have had their last event."""

    @property
    def done(self) -> bool:
        return len(self.ended) == self.request.n

    def say(self, event: Event) -> None:
        if event.finish is not None:
            self.ended.add(event.choice)
        self.listener(event)


class _Run:
    """One continuation in its slot."""

    def __init__(self, ticket: Ticket, choice: int, pool: _Pool, row: int, matcher: Matcher | None):
        self.ticket, self.choice, self.pool, self.row, self.matcher = ticket, choice, pool, row, matcher
        self.made = 0
        """Tokens delivered."""
        self.taken_in = 0
        """Tokens of the prompt in the state, if this is the first of its ticket."""
        self.scores: list[TokenLogprob] = []
        """Of the prompt, until the first event."""
        self.over = False

    @property
    def request(self) -> Request:
        return self.ticket.request


class _Pool:
    """Slots of one length on one replica of the model, with what runs in them."""

    def __init__(self, graphdef: Any, params: Any, mesh: Mesh, shape: SlotShape, cache: PrefixCache):
        self.params, self.mesh, self.shape, self.cache = params, mesh, shape, cache
        self.programs = programs(graphdef, shape)
        with jax.set_mesh(mesh):
            self.slots: Slots = shape.init()
        self.rows: list[_Run | None] = [None] * shape.slots
        self.prefilling: list[_Run] = []
        """Runs whose prompts are being taken in, oldest first."""
        self.live: set[_Run] = set()
        """Runs that generate."""
        number = shape.slots
        sizes = {number}
        while (smallest := min(sizes)) > 4:
            sizes.add(-(-smallest // 4))
        self.row_counts = sorted(sizes)
        """How many rows a dispatch may have."""

    def free(self) -> list[int]:
        return [i for i, run in enumerate(self.rows) if run is None]

    def rows_in_use(self) -> int:
        """Rows that a dispatch must have to reach all that generate."""
        highest = max(run.row for run in self.live) + 1
        return next(n for n in self.row_counts if n >= highest)


@dataclasses.dataclass
class _Pending:
    """Tokens under way from the device."""

    told: Told
    runs: list[tuple[int, _Run]]
    """(row of `told`, its run)."""


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
        graphdef, params = nnx.split(model, nnx.Param)
        replicas = place_replicas(nnx.to_pure_dict(params), model.config, mesh)
        self.memory = config.memory(model.config, mesh)
        """Bytes on a device, by what they are for."""
        check_memory(self.memory, config.memory_bytes or device_memory())
        self._pools = [
            _Pool(graphdef, params, mesh, shape, PrefixCache(config.chunk, config.prefix_cache_bytes // len(shapes)))
            for params, mesh in replicas for shape in shapes
        ]
        self._lengths = [shape.length for shape in shapes]
        self.longest = self._lengths[-1]
        """Tokens of the longest slot."""
        self.slots = sum(len(pool.rows) for pool in self._pools)
        """How many there are."""
        self._lock = threading.Lock()
        self._news = threading.Condition(self._lock)
        self._arrived: list[Ticket] = []
        self._cancelled: list[tuple[Ticket, int | None]] = []
        self._waiting: collections.deque[Ticket] = collections.deque()
        self._pending: collections.deque[_Pending] = collections.deque()
        self._closing = False
        self._thread: threading.Thread | None = None
        self.counts = collections.Counter[str]()
        """prompt_tokens, cached_tokens, tokens, steps (row steps that made them), requests by their finish."""

    # ---------------------------------------------------------------- from any thread

    def submit(self, request: Request, listener: Listener) -> Ticket:
        """Queues a request; `listener` hears of it from the engine's thread.

        Raises:
          ValueError: the request fits no slot, names ids that the model lacks, or asks for more than the engine grants.
          EngineFullError: `max_queue` requests wait.
          RuntimeError: the engine is closed.
        """
        self._check(request)
        expires = None if request.deadline is None else time.monotonic() + request.deadline
        ticket = Ticket(request, listener, expires)
        with self._news:
            if self._closing:
                raise RuntimeError("the engine is closed")
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
        config = self.config
        stop_ids = self._stop_ids(request)
        problems = []
        if request.size > self.longest:
            problems.append(f"prompt has {len(request.prompt)} tokens, with max_new_tokens {request.max_new_tokens} "
                            f"more than the longest slot, {self.longest}; shorten one of them")
        elif request.n > len(self._pools_for(request)[0].rows):
            problems.append(f"n is {request.n}; there are {len(self._pools_for(request)[0].rows)} slots of its length")
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

    def _stop_ids(self, request: Request) -> tuple[int, ...]:
        return tuple(self.model_config.eos_ids if request.stop_ids is None else request.stop_ids)

    def _pools_for(self, request: Request) -> list[_Pool]:
        """One on each replica."""
        length = next(length for length in self._lengths if length >= request.size)
        return [pool for pool in self._pools if pool.shape.length == length]

    # ---------------------------------------------------------------- the loop

    def serve(self) -> None:
        """Starts a thread that does the work until `close`."""
        assert self._thread is None
        self._thread = threading.Thread(target=self._serve, name="lfm-engine", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            with self._news:
                while not (self._arrived or self._cancelled or self._closing or self._busy()):
                    self._news.wait()
                if self._closing and not (self._busy() or self._arrived):
                    return
            self.step()

    def close(self, *, drain: bool = True) -> None:
        """Takes no more requests; ends what runs (`drain` False), or lets it end, and waits for the thread."""
        with self._news:
            self._closing = True
            if not drain:
                tickets = {run.ticket for pool in self._pools for run in pool.rows if run is not None}
                self._cancelled += [(ticket, None) for ticket in (*tickets, *self._waiting, *self._arrived)]
            self._news.notify()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        while self.step():
            pass

    def _busy(self) -> bool:
        return bool(self._waiting or self._pending or any(pool.prefilling or pool.live for pool in self._pools))

    def step(self) -> bool:
        """One turn; whether there is more to do."""
        self._listen()
        self._admit()
        begun = len(self._pending)
        for pool in self._pools:
            with jax.set_mesh(pool.mesh):
                if pool.prefilling:
                    self._take_in_chunk(pool)
                if pool.live:
                    self._generate(pool)
        # What was sent off before this turn is handed out now, while the device is at the new work.
        self._deliver(begun if len(self._pending) > begun else len(self._pending))
        with self._lock:
            return bool(self._arrived or self._cancelled) or self._busy()

    def _listen(self) -> None:
        with self._lock:
            arrived, self._arrived = self._arrived, []
            cancelled, self._cancelled = self._cancelled, []
            self._waiting.extend(arrived)
        for ticket, choice in cancelled:
            self._end_early(ticket, "cancelled", choice)
        now = time.monotonic()
        running = {run.ticket for pool in self._pools for run in pool.rows if run is not None}
        for ticket in (*running, *self._waiting):
            if ticket.expires is not None and now >= ticket.expires:
                self._end_early(ticket, "deadline")

    def _end_early(self, ticket: Ticket, finish: Finish, choice: int | None = None) -> None:
        choices = range(ticket.request.n) if choice is None else [choice]
        for i in choices:
            if i in ticket.ended:
                continue
            if ticket.runs:
                self._release(ticket.runs[i], stop=True)
            self.counts[finish] += 1
            ticket.say(Event(i, [], finish=finish))
        if ticket.done and ticket in self._waiting:
            self._waiting.remove(ticket)

    def _release(self, run: _Run, *, stop: bool) -> None:
        """Frees a slot; the device need not be told where the row came to its end there."""
        run.over = True
        pool = run.pool
        if stop and run in pool.live:
            with jax.set_mesh(pool.mesh):
                pool.slots = pool.programs.stop(pool.slots, np.array([run.row], np.int32))
        pool.live.discard(run)
        pool.rows[run.row] = None
        if run in pool.prefilling:
            pool.prefilling.remove(run)
            # Others of its ticket were to be forked from it; one of them begins anew.
            heir = next((other for other in run.ticket.runs if not other.over), None)
            if heir is not None:
                pool.prefilling.append(heir)

    def _admit(self) -> None:
        """Gives slots to requests in the order in which they came, for each length by itself."""
        full: set[int] = set()
        for ticket in list(self._waiting):
            pool = max(self._pools_for(ticket.request), key=lambda pool: len(pool.free()))
            free = pool.free()
            wanted = [i for i in range(ticket.request.n) if i not in ticket.ended]
            if pool.shape.length in full or len(free) < len(wanted):
                full.add(pool.shape.length)  # Nobody overtakes.
                continue
            self._waiting.remove(ticket)
            grammar = ticket.request.grammar
            ticket.runs = []
            for i in range(ticket.request.n):
                run = _Run(ticket, i, pool, free.pop(0) if i in wanted else NOWHERE,
                           None if grammar is None else grammar.copy())
                run.over = i not in wanted
                if i in wanted:
                    pool.rows[run.row] = run
                ticket.runs.append(run)
            first = ticket.runs[wanted[0]]
            pool.prefilling.append(first)
            with jax.set_mesh(pool.mesh):
                self._restore(first)

    def _restore(self, run: _Run) -> None:
        """Puts what the cache has of the prompt into the slot."""
        pool, prompt = run.pool, run.request.prompt
        self.counts["prompt_tokens"] += len(prompt)
        if run.request.prompt_logprobs:  # They must be computed.
            return
        for part in pool.cache.find(prompt):
            tokens_C = np.asarray(prompt[run.taken_in : run.taken_in + self.config.chunk], np.int32)
            pool.slots = pool.programs.restore(
                pool.slots, np.int32(run.row), np.int32(run.taken_in), part, tokens_C
            )
            run.taken_in += self.config.chunk
        self.counts["cached_tokens"] += run.taken_in

    # ---------------------------------------------------------------- prompts

    def _take_in_chunk(self, pool: _Pool) -> None:
        """One chunk of the oldest prompt under way, and of others that share its shape."""
        shape = self._chunk_shape(pool.prefilling[0])
        runs = [run for run in pool.prefilling if self._chunk_shape(run) == shape][: self.config.prefill_rows]
        width, scored = shape
        R = self.config.prefill_rows
        rows_R, length_R = np.full(R, NOWHERE, np.int32), np.zeros(R, np.int32)
        tokens_RC, targets_RC = np.zeros((R, width), np.int32), np.zeros((R, width), np.int32)
        fresh_R = np.zeros(R, bool)
        for r, run in enumerate(runs):
            prompt, begin = run.request.prompt, run.taken_in
            part = prompt[begin : begin + self.config.chunk]
            rows_R[r], length_R[r], fresh_R[r] = run.row, len(part), begin == 0
            tokens_RC[r, : len(part)] = part
            following = prompt[begin + 1 : begin + 1 + len(part)]
            targets_RC[r, : len(following)] = following
            run.taken_in += len(part)
        args = (pool.params, pool.slots, rows_R, tokens_RC, length_R, fresh_R)
        if scored:
            pool.slots, logits_RV, told = pool.programs.score(*args, targets_RC)
            told = jax.tree.map(lambda x: np.asarray(x)[None], told)
            for r, run in enumerate(runs):
                # Nothing follows the prompt's last token.
                known = length_R[r] - (run.taken_in == len(run.request.prompt))
                known_1C = np.arange(width)[None] < known
                run.scores += _logprobs(told, r, known_1C, run.request.logprobs)
        else:
            pool.slots, logits_RV = pool.programs.prefill(*args)
        for run in runs:
            self._snapshot(run)
        finished = [(r, run) for r, run in enumerate(runs) if run.taken_in == len(run.request.prompt)]
        if finished:
            self._begin(pool, logits_RV, finished)

    def _chunk_shape(self, run: _Run) -> tuple[int, bool]:
        """(tokens, whether they are scored) of the dispatch that takes in the next chunk of a prompt."""
        left = len(run.request.prompt) - run.taken_in
        return chunk_width(left, self.config.chunk), run.request.prompt_logprobs

    def _snapshot(self, run: _Run) -> None:
        """Keeps the block that has just been taken in, if it is whole."""
        C, prompt = self.config.chunk, run.request.prompt
        pool = run.pool
        if run.taken_in % C == 0 and pool.cache.wants(prompt, run.taken_in // C):
            part = pool.programs.snapshot(pool.slots, np.int32(run.row), np.int32(run.taken_in - C), length=C)
            pool.cache.add(prompt, run.taken_in // C, part)

    def _begin(self, pool: _Pool, logits_RV: jax.Array, finished: Sequence[tuple[int, _Run]]) -> None:
        """Chooses the first tokens of continuations whose prompts have been taken in."""
        starts: list[tuple[int, _Run]] = []
        for r, first in finished:
            pool.prefilling.remove(first)
            runs = [run for run in first.ticket.runs if not run.over]
            rows = [run.row for run in runs if run is not first]
            for some in _groups(rows, self.config.prefill_rows):
                rows_R = _filled(some, self.config.prefill_rows, NOWHERE)
                pool.slots = pool.programs.fork(pool.slots, np.int32(first.row), rows_R)
            for run in runs:
                run.scores = first.scores
            starts += [(r, run) for run in runs]
        for some in _groups(starts, self.config.prefill_rows):
            R = self.config.prefill_rows
            asked = self._asked([run for _, run in some], R, pool.shape)
            source_R = _filled([r for r, _ in some], R, 0)
            rows_R = _filled([run.row for _, run in some], R, NOWHERE)
            masks_RW = _masks([run.matcher for _, run in some], R, pool.shape.mask_words)
            pool.slots, told = pool.programs.start(pool.slots, logits_RV, source_R, rows_R, asked, masks_RW)
            self._send(_as_one_step(told), list(enumerate(run for _, run in some)))
            pool.live.update(run for _, run in some)

    def _asked(self, runs: Sequence[_Run], R: int, shape: SlotShape) -> Asked:
        """What requests ask for, as arrays of R rows."""
        requests = [run.request for run in runs]
        V, M, P = shape.config.vocab_size, shape.max_stop_ids, shape.max_biases
        samplings = [run.request.choice_sampling(run.choice) for run in runs]
        params, _ = to_arrays(samplings + [samplings[0]] * (R - len(runs)), V)
        stop_ids_RM, bias_ids_RP = np.full((R, M), -1, np.int32), np.full((R, P), V, np.int32)
        bias_RP = np.zeros((R, P), np.float32)
        for r, request in enumerate(requests):
            ids = self._stop_ids(request)
            stop_ids_RM[r, : len(ids)] = ids
            bias_ids_RP[r, : len(request.logit_bias)] = list(request.logit_bias)
            bias_RP[r, : len(request.logit_bias)] = list(request.logit_bias.values())
        return Asked(
            sampling=params, budget_B=_filled([q.max_new_tokens for q in requests], R, 0),
            least_B=_filled([q.min_new_tokens for q in requests], R, 0), stop_ids_BM=jnp.asarray(stop_ids_RM),
            bias_ids_BP=jnp.asarray(bias_ids_RP), bias_BP=jnp.asarray(bias_RP),
            draft_B=_filled([q.grammar is None and q.sampling.repetition_penalty == 1 for q in requests], R, False),
            logprobs_B=_filled([q.logprobs is not None for q in requests], R, False),
        )

    # ---------------------------------------------------------------- tokens

    def _generate(self, pool: _Pool) -> None:
        """Some steps of all that generate in a pool."""
        if any(run.matcher is not None for run in pool.live):
            self._generate_matching(pool)
            return
        rows = pool.rows_in_use()
        pool.slots, told = pool.programs.decode(
            pool.params, pool.slots, np.int32(self.config.steps), rows=rows,
            plain=all(_is_plain(run.request) for run in pool.live),
        )
        self._send(told, [(run.row, run) for run in pool.live])

    def _generate_matching(self, pool: _Pool) -> None:
        """One step, with masks that the host makes while the device takes in the tokens chosen last."""
        self._deliver(len(self._pending))  # The masks need every token so far.
        if not pool.live:
            return
        rows = pool.rows_in_use()
        pool.slots, logits_bV = pool.programs.advance(pool.params, pool.slots, rows=rows)
        by_row = {run.row: run for run in pool.live}
        matchers = [by_row[row].matcher if row in by_row else None for row in range(rows)]
        masks_bW = _masks(matchers, rows, pool.shape.mask_words)
        pool.slots, told = pool.programs.choose(pool.slots, logits_bV, masks_bW, rows=rows)
        self._send(_as_one_step(told), [(run.row, run) for run in pool.live])

    def _send(self, told: Told, runs: list[tuple[int, _Run]]) -> None:
        for leaf in jax.tree.leaves(told):
            leaf.copy_to_host_async()
        self._pending.append(_Pending(told, runs))

    def _deliver(self, count: int) -> None:
        """Hands out the tokens of the oldest `count` dispatches."""
        for _ in range(min(count, len(self._pending))):
            pending = self._pending.popleft()
            told = jax.tree.map(np.asarray, pending.told)
            for row, run in pending.runs:
                if not run.over:
                    self._hand_out(run, told, row)

    def _hand_out(self, run: _Run, told: Told, row: int) -> None:
        token_NT = np.asarray(told.token)[:, row]
        real_NT = token_NT >= 0
        tokens = token_NT[real_NT].tolist()
        self.counts["tokens"] += len(tokens)
        self.counts["steps"] += int(real_NT.any(axis=1).sum())
        if not tokens:
            return
        request = run.request
        logprobs = None if request.logprobs is None else _logprobs(told, row, real_NT, request.logprobs)
        if run.matcher is not None:
            for token in tokens:
                run.matcher.consume(token)
        first, run.made = run.made == 0, run.made + len(tokens)
        finish: Finish | None = None
        if run.matcher is not None and run.matcher.error is not None:
            finish = "failed"
        elif tokens[-1] in self._stop_ids(request):
            finish = "stop"
        elif run.made >= request.max_new_tokens:
            finish = "length"
        if finish is not None:
            self._release(run, stop=finish == "failed")
            self.counts[finish] += 1
        scores = run.scores if first and request.prompt_logprobs else None
        run.ticket.say(Event(run.choice, tokens, logprobs, scores, finish))

    # ---------------------------------------------------------------- conveniences

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

    def warm_up(self) -> int:
        """Compiles all programs, with no effect on what runs; how many there are."""
        count = 0
        R = self.config.prefill_rows
        nowhere_R, no_R = np.full(R, NOWHERE, np.int32), np.zeros(R, np.int32)
        for pool in self._pools:
            run, shape = pool.programs, pool.shape
            with jax.set_mesh(pool.mesh):
                logits_RV = None
                for width in chunk_widths(min(self.config.chunk, shape.length), self.config.chunk):
                    tokens_RC = np.zeros((R, width), np.int32)
                    args = (nowhere_R, tokens_RC, no_R, no_R != 0)
                    pool.slots, logits_RV = run.prefill(pool.params, pool.slots, *args)
                    count += 1
                    if self.config.max_logprobs:
                        pool.slots, logits_RV, _ = run.score(pool.params, pool.slots, *args, tokens_RC)
                        count += 1
                masks_RW = _masks([None] * R, R, shape.mask_words)
                pool.slots, _ = run.start(pool.slots, logits_RV, no_R, nowhere_R, shape.asked(R), masks_RW)
                pool.slots = run.fork(pool.slots, np.int32(0), nowhere_R)
                pool.slots = run.stop(pool.slots, nowhere_R[:1])
                count += 3
                for rows in pool.row_counts:
                    for plain in (False, True):
                        pool.slots, _ = run.decode(pool.params, pool.slots, np.int32(0), rows=rows, plain=plain)
                    pool.slots, logits_bV = run.advance(pool.params, pool.slots, rows=rows)
                    masks_bW = _masks([None] * rows, rows, shape.mask_words)
                    pool.slots, _ = run.choose(pool.slots, logits_bV, masks_bW, rows=rows)
                    count += 4
                if self.config.prefix_cache_bytes and self.config.chunk < shape.length:
                    C = self.config.chunk
                    part = run.snapshot(pool.slots, np.int32(0), np.int32(0), length=C)
                    pool.slots = run.restore(
                        pool.slots, np.int32(NOWHERE), np.int32(0), part, np.zeros(C, np.int32)
                    )
                    count += 2
        jax.block_until_ready([pool.slots for pool in self._pools])
        return count

    def waiting(self) -> int:
        """Requests without a slot."""
        with self._lock:
            return len(self._waiting) + len(self._arrived)

    def running(self) -> int:
        """Slots in use."""
        return sum(run is not None for pool in self._pools for run in pool.rows)


def _collect(texts: list[list[int]]) -> Listener:
    return lambda event: texts[event.choice].extend(event.tokens)


def _is_plain(request: Request) -> bool:
    return (request.sampling.temperature == 0 and request.sampling.repetition_penalty == 1 and not request.logit_bias
            and not request.min_new_tokens and request.logprobs is None)


def chunk_width(tokens: int, chunk: int) -> int:
    """The shape that the next `tokens` tokens of a prompt are taken in with: a power of 2 from 16 to `chunk`."""
    return min(chunk, max(16, 1 << (tokens - 1).bit_length()))


def chunk_widths(most: int, chunk: int) -> list[int]:
    """All shapes of prompts up to `most` tokens."""
    return sorted({chunk_width(n, chunk) for n in (*(1 << i for i in range(most.bit_length())), most)})


def _groups[X](items: Sequence[X], size: int) -> Iterable[Sequence[X]]:
    return (items[i : i + size] for i in range(0, len(items), size))


def _filled(values: Sequence[Any], size: int, filler: Any) -> Any:
    return np.array([*values, *[filler] * (size - len(values))], bool if isinstance(filler, bool) else np.int32)


def _masks(matchers: Sequence[Matcher | None], rows: int, words: int) -> np.ndarray:
    """Bits of the tokens that each row may have next; all of them where no grammar says."""
    masks_BW = np.full((rows, words), 0xFFFFFFFF, np.uint32)
    at = [(row, matcher) for row, matcher in enumerate(matchers) if matcher is not None]
    if at:
        from lfm_jax.infer.grammar import fill_masks

        part = np.zeros((len(at), words), np.uint32)
        fill_masks([matcher for _, matcher in at], part)
        masks_BW[[row for row, _ in at]] = part
    return masks_BW


def _as_one_step(told: Told) -> Told:
    return jax.tree.map(lambda x: x[None], told)


def _logprobs(told: Told, row: int, real_NT: np.ndarray, most: int | None) -> list[TokenLogprob]:
    """What was told of a row's tokens, [steps, rows, tokens], where they are real."""

    def of_row(x: Any) -> list[Any]:
        assert x is not None  # The engine refuses requests for what its programs do not tell.
        return np.asarray(x)[:, row][real_NT].tolist()

    columns = zip(of_row(told.token), of_row(told.logprob), of_row(told.best), of_row(told.best_logprob), strict=True)
    return [
        TokenLogprob(token, logprob, tuple(zip(best[:most], best_logprob[:most], strict=True)))
        for token, logprob, best, best_logprob in columns
    ]
