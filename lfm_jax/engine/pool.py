"""The slots of one length on one replica of the model, the requests that run in them, and their dispatches.

Dimensions: as in `slots.py`.
"""

from __future__ import annotations

import dataclasses
import heapq
import traceback
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Mesh

from lfm_jax.engine.adapters import Loaded
from lfm_jax.engine.config import EngineConfig
from lfm_jax.engine.prefix_cache import PrefixCache
from lfm_jax.engine.request import LOGITS_NOT_FINITE, Event, Listener, Request, TokenLogprob
from lfm_jax.engine.slots import NOWHERE, Asked, Slots, SlotShape, Told, programs
from lfm_jax.engine.variants import Variant, cache_variants, chunk_widths, general_decode, lower
from lfm_jax.sampling import Sampling, counts_matter, to_arrays

if TYPE_CHECKING:
    from lfm_jax.structured.grammar import Matcher


LOOKED_AT = 8
"""How many waiting prompts a dispatch considers for each of its rows."""


class Ticket:
    """A request that the engine has accepted."""

    def __init__(self, request: Request, listener: Listener, expires: float | None):
        self.request, self.listener, self.expires = request, listener, expires
        self.runs: list[Running] = []
        """One for each continuation, in order, once they have slots."""
        self.ended: set[int] = set()
        """Continuations that got their last event."""
        self.adapter: Loaded | None = None

    @property
    def done(self) -> bool:
        """Whether every continuation has ended."""
        return len(self.ended) == self.request.n

    @property
    def place(self) -> int:
        """That of its adapter; 0: none."""
        return 0 if self.adapter is None else self.adapter.place

    @property
    def weights(self) -> int:
        """Whose weights compute it, as the prefix cache tells them apart."""
        return 0 if self.adapter is None else self.adapter.number

    def say(self, event: Event) -> None:
        """Calls the listener; an exception it raises is printed and ignored."""
        if event.finish is not None:
            self.ended.add(event.choice)
            if self.done and self.adapter is not None:
                self.adapter.users.discard(self)
        try:
            self.listener(event)
        except Exception:
            traceback.print_exc()


class Running:
    """One continuation in its slot; `over` from the start if it was cancelled while it waited."""

    def __init__(self, ticket: Ticket, choice: int, pool: Pool, row: int | None):
        self.ticket, self.choice, self.pool = ticket, choice, pool
        self.row = NOWHERE if row is None else row
        self.over = row is None
        grammar = ticket.request.grammar
        self.matcher: Matcher | None = None if grammar is None else grammar.copy()
        self.made = 0
        """Tokens handed out."""
        self.promised = 0
        """Tokens generated so far, and those that dispatches under way will generate unless the text ends first."""
        self.taken_in = 0
        """Tokens of the prompt in the state, if this is the one of its ticket that takes it in."""
        self.cached = 0
        """Those of them that came from the prefix cache; of the prompt, once it has been taken in."""
        self.scores: list[TokenLogprob] = []
        """Log-probabilities of the prompt, until the first event."""

    @property
    def request(self) -> Request:
        return self.ticket.request


@dataclasses.dataclass(eq=False)
class Sent:
    """Tokens on their way from the device."""

    told: Told
    runs: list[tuple[int, Running]]
    """(row of `told`, its run) pairs, at least one."""

    @property
    def pool(self) -> Pool:
        """The pool that they come from."""
        return self.runs[0][1].pool


class Pool:
    """Slots and their runs; methods that start dispatches return the tokens to come."""

    def __init__(
        self, graphdef: Any, params: Any, mesh: Mesh, shape: SlotShape, config: EngineConfig, cache: PrefixCache,
        counts: Counter[str],
    ):
        self.mesh, self.shape, self.cache, self._counts = mesh, shape, cache, counts
        self.params, self._config = params, config
        """Another thread may put others here which are the same to every request under way."""
        self._programs = programs(graphdef, shape)
        with jax.set_mesh(mesh):
            self._slots: Slots = shape.init()
        self._shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding if x.committed else None), self._slots
        )
        self.ready: set[Variant] | None = None
        """Programs to be called where there is a choice, and those that were called where there was none. None: what
        suits best is called, and compiled where that is its first time."""
        self.rows: list[Running | None] = [None] * shape.slots
        self._free = list(range(shape.slots))
        """Slots without a run, as a heap: low ones are used first, because a dispatch takes all up to the highest in
        use."""
        self.prefilling: list[Running] = []
        """Runs whose prompts are being taken in, oldest first."""
        self.live: set[Running] = set()
        """Runs that generate."""
        self.ended: list[tuple[Running, str | None]] = []
        """Runs that end with their prompts, and why they fail, until the engine has said so: those that were to
        generate nothing, and those with scores that are not finite."""
        self._batch = self._rows_taken_in(config.chunk)[0]
        """Rows of a dispatch that copies or stops rows; one that takes in prompts has at least as many."""
        self._shortest_first = False
        """Whether the prompt with the fewest tokens left is next, and not the oldest."""

    @property
    def busy(self) -> bool:
        return bool(self.prefilling or self.live)

    @property
    def matching(self) -> bool:
        """Whether a generating run follows a grammar."""
        return any(run.matcher is not None for run in self.live)

    @property
    def free(self) -> int:
        """The number of slots without a run."""
        return len(self._free)

    def use(self, params: Any) -> None:
        """Goes on with other weights, and as a new pool would: the order in which it takes in prompts begins again."""
        self.params, self._shortest_first = params, False
        self.cache.clear()

    def admit(self, ticket: Ticket) -> None:
        """Gives slots, enough of which must be free, to a ticket."""
        for i in range(ticket.request.n):
            run = Running(ticket, i, self, None if i in ticket.ended else heapq.heappop(self._free))
            if not run.over:
                self.rows[run.row] = run
            ticket.runs.append(run)
        first = next(run for run in ticket.runs if not run.over)
        self.prefilling.append(first)
        self._restore(first)

    def release(self, run: Running, *, stop: bool) -> None:
        """Ends a run; `stop` makes its row idle on the device too, where it has not ended by itself."""
        run.over = True
        if stop and run in self.live:
            with jax.set_mesh(self.mesh):
                self._slots = self._programs.stop(self._slots, _filled([run.row], self._batch, NOWHERE))
        self._vacate(run)
        if run in self.prefilling:
            self.prefilling.remove(run)
            # Other runs of its ticket were to be copied from it; one of them starts again.
            heir = next((other for other in run.ticket.runs if not other.over), None)
            if heir is not None:
                self.prefilling.append(heir)

    def abandon(self) -> None:
        """Drops all runs."""
        for run in self.rows:
            if run is not None:
                self._vacate(run)
        self.prefilling.clear()
        self.live.clear()
        self.ended.clear()

    def _vacate(self, run: Running) -> None:
        """Frees a run's slot, if it still has it."""
        self.live.discard(run)
        if run.row != NOWHERE and self.rows[run.row] is run:
            self.rows[run.row] = None
            heapq.heappush(self._free, run.row)

    # ---------------------------------------------------------------- prompts

    def _restore(self, run: Running) -> None:
        """Restores cached blocks of the rest of the prompt into the slot."""
        C, prompt = self._config.chunk, run.request.prompt
        if run.request.prompt_logprobs:  # They must be computed.
            return
        with jax.set_mesh(self.mesh):
            for part in self.cache.find(prompt, run.taken_in // C, run.ticket.weights):
                tokens_C = np.asarray(prompt[run.taken_in : run.taken_in + C], np.int32)
                self._slots = self._programs.restore(
                    self._slots, np.int32(run.row), np.int32(run.taken_in), part, tokens_C, fresh=run.taken_in == 0
                )
                run.taken_in += C
                run.cached += C
                self._counts["cached_tokens"] += C

    def take_in(self) -> list[Sent]:
        """Takes in a turn's worth of prompts, `chunk` tokens for each of `_batch` rows.

        The oldest prompt, so that it gets done, and the one with the fewest tokens left, so that a short prompt need
        not wait for a long one, take turns.
        """
        left, sent = self._batch * self._config.chunk, []
        while self.prefilling:
            chosen = self.prefilling[0]
            if self._shortest_first:
                chosen = min(self.prefilling, key=lambda run: len(run.request.prompt) - run.taken_in)
            self._restore(chosen)  # Blocks that another prompt has added since.
            runs, R = self._beside(chosen)
            left -= R * self._chunk_shape(chosen)[1]
            if left < 0:
                break
            self._shortest_first = not self._shortest_first
            sent += self._take_in(runs, R)
        return sent

    def _rows_taken_in(self, width: int) -> list[int]:
        """Returns the numbers of prompts of `width` tokens that a dispatch may take in, in ascending order."""
        return self._config.prompts_at_once((self.shape.slots, self.shape.length), width)

    def _rows_ready(self, name: str, width: int) -> list[int]:
        """Those for which the programs are ready."""
        return [R for R in self._rows_taken_in(width) if self._is_ready(Variant(name, R, width), Variant("start", R))]

    def _beside(self, chosen: Running) -> tuple[list[Running], int]:
        """Returns a prompt with others whose next chunk has the same shape, and the number of rows of their
        dispatch."""
        shape = self._chunk_shape(chosen)
        counts, runs = self._rows_ready(*shape) or self._rows_taken_in(shape[1])[:1], [chosen]
        for run in self.prefilling[: LOOKED_AT * counts[-1]]:
            if len(runs) == counts[-1]:
                break
            if run is not chosen and self._chunk_shape(run) == shape:
                self._restore(run)
                if self._chunk_shape(run) == shape and not self._is_coming(run, runs):
                    runs.append(run)
        R = counts[-1] if 2 * len(runs) > counts[-1] else counts[0]
        return runs[:R], R

    def _take_in(self, runs: Sequence[Running], R: int) -> list[Sent]:
        """One chunk of each of these prompts, which must have one shape, in a dispatch of R rows."""
        C, (name, width) = self._config.chunk, self._chunk_shape(runs[0])
        self._choose([(Variant(name, R, width), Variant("start", R))])
        rows_R, length_R, fresh_R = np.full(R, NOWHERE, np.int32), np.zeros(R, np.int32), np.zeros(R, bool)
        tokens_RC, targets_RC = np.zeros((R, width), np.int32), np.zeros((R, width), np.int32)
        for r, run in enumerate(runs):
            prompt, begin = run.request.prompt, run.taken_in
            part, following = prompt[begin : begin + C], prompt[begin + 1 : begin + 1 + C]
            rows_R[r], length_R[r], fresh_R[r] = run.row, len(part), begin == 0
            tokens_RC[r, : len(part)], targets_RC[r, : len(following)] = part, following
            run.taken_in += len(part)
        adapter_R = _filled([run.ticket.place for run in runs], R, 0) if self.shape.adapters else None
        args = (self.params, self._slots, rows_R, tokens_RC, length_R, fresh_R, adapter_R)
        if name == "score":
            self._slots, logits_RV, told = self._programs.score(*args, targets_RC)
            told = jax.tree.map(np.asarray, told)
            for r, run in enumerate(runs):
                # Nothing follows the prompt's last token.
                known_1T = np.arange(width)[None] < length_R[r] - (run.taken_in == len(run.request.prompt))
                run.scores += logprobs(told, r, known_1T, run.request.logprobs)
                if not all(np.isfinite(x[:, r][known_1T]).all() for x in (told.logprob, told.best_logprob)):
                    self.prefilling.remove(run)
                    self.ended += [(one, LOGITS_NOT_FINITE) for one in run.ticket.runs if not one.over]
        else:
            self._slots, logits_RV = self._programs.prefill(*args)
        good = [(r, run) for r, run in enumerate(runs) if run in self.prefilling]
        for _, run in good:
            self._keep(run)
        return self._begin(logits_RV, [(r, run) for r, run in good if run.taken_in == len(run.request.prompt)])

    def _chunk_shape(self, run: Running) -> tuple[str, int]:
        """(program, tokens) of the dispatch that takes in the next chunk of a prompt."""
        name = "score" if run.request.prompt_logprobs else "prefill"
        left = min(len(run.request.prompt) - run.taken_in, self._config.chunk)
        widths = [width for width in chunk_widths(self.shape.length, self._config.chunk) if width >= left]
        return name, next((width for width in widths if self._rows_ready(name, width)), widths[-1])

    def _is_coming(self, run: Running, runs: Sequence[Running]) -> bool:
        """Returns whether the cache is about to get the next block of a prompt from another of `runs`."""
        after, prompt = run.taken_in + self._config.chunk, run.request.prompt
        return (
            after < len(prompt) and not run.request.prompt_logprobs and self._wants(run, after)
            and any(other.taken_in == run.taken_in and other.ticket.weights == run.ticket.weights
                    and other.request.prompt[:after] == prompt[:after] for other in runs)
        )

    def _wants(self, run: Running, after: int) -> bool:
        """The cache is to get the block of a run's prompt that ends after so many tokens."""
        return self._is_ready(*cache_variants(self._config)) and self.cache.wants(
            run.request.prompt, after // self._config.chunk, run.ticket.weights)

    def _keep(self, run: Running) -> None:
        """Adds the block that was just taken in to the cache, if it is whole."""
        C = self._config.chunk
        if run.taken_in % C == 0 and self._wants(run, run.taken_in):
            part = self._programs.snapshot(self._slots, np.int32(run.row), np.int32(run.taken_in - C), length=C)
            self.cache.add(run.request.prompt, run.taken_in // C, part, run.ticket.weights)

    def _begin(self, logits_RV: jax.Array, finished: Sequence[tuple[int, Running]]) -> list[Sent]:
        """Starts the continuations whose prompts have been taken in, with their first tokens."""
        R, n = len(logits_RV), self._batch
        starts: list[tuple[int, Running]] = []
        for r, first in finished:
            self.prefilling.remove(first)
            runs = [run for run in first.ticket.runs if not run.over]
            for run in runs:
                run.scores, run.cached = first.scores, first.cached
            if not first.request.max_new_tokens:
                self.ended += [(run, None) for run in runs]
                continue
            if first.request.logit_bias:
                self._slots = self._programs.bias(self._slots, np.int32(first.row), _bias(first.request, self.shape))
            for some in _groups([run.row for run in runs if run is not first], n):
                source_R, rows_R = np.full(n, first.row, np.int32), _filled(some, n, NOWHERE)
                self._slots = self._programs.copy(self._slots, source_R, rows_R)
            starts += [(r, run) for run in runs]
        sent = []
        for some in _groups(starts, R):
            runs = [run for _, run in some]
            source_R, rows_R = _filled([r for r, _ in some], R, 0), _filled([run.row for run in runs], R, NOWHERE)
            masks_RW = _masks([run.matcher for run in runs], R, self.shape.mask_words)
            asked = _asked(runs, R, self.shape)
            self._slots, told = self._programs.start(self._slots, logits_RV, source_R, rows_R, asked, masks_RW)
            sent.append(_send(told, list(enumerate(runs))))
            self.live.update(runs)
            for run in runs:
                self.promise(run, 1)
        return sent

    # ---------------------------------------------------------------- generation

    def generate(self, *, wanted: bool) -> Sent:
        """Runs some steps of all generating runs.

        It runs a single step while prompts are still to be taken in, since each adds a row to all later steps, and
        while a run follows a grammar: then every token so far must have been handed out, and the host makes the masks
        while the device takes in the tokens chosen last.

        Args:
          wanted: requests wait for a slot; the steps end where `_batch` budgets have ended.
        """
        steps = 1 if self.prefilling or self.matching else self._config.steps
        if wanted:
            left = sorted(run.request.max_new_tokens - run.promised for run in self.live)
            steps = min(steps, left[min(self._batch, len(left)) - 1])
        self._close_up()
        highest = max(run.row for run in self.live) + 1
        counts = [n for n in self.shape.row_counts if n >= highest]
        if self.matching:
            rows = self._choose([(Variant("advance", n), Variant("choose", n)) for n in counts]).rows
            self._slots, logits_bV = self._programs.advance(self.params, self._slots, rows=rows)
            by_row = {run.row: run.matcher for run in self.live}
            masks_bW = _masks([by_row.get(row) for row in range(rows)], rows, self.shape.mask_words)
            self._slots, told = self._programs.choose(self._slots, logits_bV, masks_bW, rows=rows)
        else:
            draft = self._drafted()
            plain = all(_is_plain(run.request) for run in self.live)
            options = [Variant("decode", n, plain=p, draft=d) for n in counts
                       for p in sorted({plain, False}, reverse=True) for d in sorted({draft, 0}, reverse=True)]
            chosen = self._choose([(option,) for option in [*options, general_decode(self.shape)]])
            self._slots, told = self._programs.decode(
                self.params, self._slots, np.int32(steps), rows=chosen.rows, plain=chosen.plain, draft=chosen.draft
            )
        sent = _send(told, [(run.row, run) for run in self.live])
        for run in list(self.live):
            self.promise(run, steps)
        return sent

    def _close_up(self) -> None:
        """Moves generating runs to lower slots if their steps then take fewer rows."""
        high: list[Running] = []
        for rows in (n for n in self.shape.row_counts if n >= len(self.live)):
            high = sorted((run for run in self.live if run.row >= rows), key=lambda run: run.row)
            if len(high) <= sum(row < rows for row in self._free):
                break  # Prompts, and the runs to be copied from them, block fewer rows than this.
        for some in _groups(high, self._batch):
            from_R = _filled([run.row for run in some], self._batch, NOWHERE)
            for run in some:
                row = heapq.heappop(self._free)
                self._vacate(run)
                self.rows[row], run.row = run, row
                self.live.add(run)
            to_R = _filled([run.row for run in some], self._batch, NOWHERE)
            self._slots = self._programs.stop(self._programs.copy(self._slots, from_R, to_R), from_R)

    def _drafted(self) -> int:
        """Returns the tokens to draft per step: none if no request may have drafts, since each costs as much as a
        row."""
        wanted = self.shape.fixed_rows or any(_may_draft(run.request) for run in self.live)
        return self.shape.draft if wanted else 0

    def promise(self, run: Running, tokens: int) -> None:
        """Counts tokens that are generated or sure to be, and frees the slot if they are the last."""
        run.promised += tokens
        if run.promised >= run.request.max_new_tokens:
            self._vacate(run)

    # ---------------------------------------------------------------- programs

    def compile(self, variant: Variant) -> None:
        """Compiles a program before it is called; in any thread."""
        with jax.set_mesh(self.mesh):
            lower(self._programs, variant, self.params, self._shapes, self.shape).compile()

    def _is_ready(self, *needed: Variant) -> bool:
        return self.ready is None or self.ready.issuperset(needed)

    def _choose(self, options: Sequence[tuple[Variant, ...]]) -> Variant:
        """The first of those that are ready, the best one coming first; or else the last one, which does for all and
        is compiled for that. Of several programs the first, by whose shape the others go."""
        chosen = next((option for option in options if self._is_ready(*option)), options[-1])
        if self.ready is not None:
            self.ready.update(chosen)
        return chosen[0]


def _send(told: Told, runs: list[tuple[int, Running]]) -> Sent:
    for leaf in jax.tree.leaves(told):
        leaf.copy_to_host_async()
    return Sent(told, runs)


def _is_plain(request: Request) -> bool:
    return (request.sampling.temperature == 0 and not _looks_back(request.sampling) and not request.logit_bias
            and not request.min_new_tokens and request.logprobs is None)


def _may_draft(request: Request) -> bool:
    """What is chosen next may depend on the tokens just before only by way of the model."""
    return request.grammar is None and not _looks_back(request.sampling)


def _looks_back(sampling: Sampling) -> bool:
    """The tokens so far change the logits."""
    return sampling.repetition_penalty != 1 or counts_matter(sampling)


def _asked(runs: Sequence[Running], R: int, shape: SlotShape) -> Asked:
    """Returns the options of requests as arrays of R rows."""
    requests = [run.request for run in runs]
    V, M = shape.config.vocab_size, shape.max_stop_ids
    samplings = [run.request.choice_sampling(run.choice) for run in runs]
    params, _ = to_arrays(samplings + [samplings[0]] * (R - len(runs)), V)
    # NumPy arrays: the programs take them as they are, and nothing else is compiled for them.
    stop_ids_RM: Any = np.full((R, M), -1, np.int32)
    for r, request in enumerate(requests):
        ids = request.stop_ids or ()
        stop_ids_RM[r, : len(ids)] = ids
    return Asked(
        sampling=params, budget_B=_filled([q.max_new_tokens for q in requests], R, 0),
        least_B=_filled([q.min_new_tokens for q in requests], R, 0), stop_ids_BM=stop_ids_RM,
        biased_B=_filled([bool(q.logit_bias) for q in requests], R, False),
        draft_B=_filled([_may_draft(q) for q in requests], R, False),
        logprobs_B=_filled([q.logprobs is not None for q in requests], R, False),
        adapter_B=_filled([run.ticket.place for run in runs], R, 0) if shape.adapters else None,
    )


def _bias(request: Request, shape: SlotShape) -> np.ndarray:
    """What a request adds to the logit of each token."""
    bias_V = np.zeros(shape.config.vocab_size, np.float32)
    # At most what float32 holds with a logit added.
    bias_V[list(request.logit_bias)] = np.minimum(list(request.logit_bias.values()), 1e30)
    return bias_V


def _groups[X](items: Sequence[X], size: int) -> Iterable[Sequence[X]]:
    return (items[i : i + size] for i in range(0, len(items), size))


def _filled(values: Sequence[Any], size: int, filler: Any) -> Any:
    return np.array([*values, *[filler] * (size - len(values))], bool if isinstance(filler, bool) else np.int32)


def _masks(matchers: Sequence[Matcher | None], rows: int, words: int) -> np.ndarray:
    """Returns the bits of the tokens that each row may have next: all of them for rows without a grammar."""
    masks_BW = np.full((rows, words), 0xFFFFFFFF, np.uint32)
    if any(matcher is not None for matcher in matchers):
        from lfm_jax.structured.grammar import fill_masks

        fill_masks(matchers, masks_BW[: len(matchers)])
    return masks_BW


def logprobs(told: Told, row: int, real_NT: np.ndarray, most: int | None) -> list[TokenLogprob]:
    """Returns the log-probabilities of a row's real tokens."""

    def of_row(x: Any) -> list[Any]:
        assert x is not None  # The engine refuses requests for log-probabilities that its programs do not compute.
        return np.asarray(x)[:, row][real_NT].tolist()

    columns = zip(of_row(told.token), of_row(told.logprob), of_row(told.best), of_row(told.best_logprob), strict=True)
    return [
        TokenLogprob(token, logprob, tuple(zip(best[:most], best_logprob[:most], strict=True)))
        for token, logprob, best, best_logprob in columns
    ]
