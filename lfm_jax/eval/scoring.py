"""Scores continuations of contexts: their log-probability, and whether greedy decoding would write them.

A context goes through the model once, in chunks, and each of its continuations goes on from its state, as requests do
in the engine. The shapes of dispatches follow from a context with all that continues it and not from other contexts, so
that few programs are compiled and a score depends on no other context.

Dimensions: B rows, G contexts of a batch, R continuations side by side, T tokens, C tokens of a chunk, D width,
X = targets of a row.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from lfm_jax.engine.placement import place_replicas
from lfm_jax.engine.request import LOGITS_NOT_FINITE
from lfm_jax.kernels.logprobs import token_scores
from lfm_jax.model import LFM
from lfm_jax.problems import raise_problems
from lfm_jax.sharding import on_mesh
from lfm_jax.state import State

LEAST_ROOM, STEP = 64, 8
"""The fewest slots of a row's state, and tokens of a continuation in a dispatch."""
LONG = 64
"""Continuations of more tokens go in steps as long as those of contexts."""
MOST_SLOTS = 131072
"""Slots for keys and values that continuations have together, at most; and 32 for each token of a dispatch."""

Tokens = Sequence[int]


class Score(NamedTuple):
    """What is known of a continuation."""

    logprob: float
    """Its log-probability after the context, in nats."""
    greedy: bool
    """Each of its tokens is the likeliest at its place, the first of several."""


class Scorer:
    """Scores (context, continuation) pairs of token ids.

    Args:
      model: with its parameters.
      max_length: the most tokens that the model reads at once. Of a longer pair, tokens at the left are left out; as
        its last token is read by nobody, a pair may have one more.
      batch_tokens: tokens of a dispatch, padding included; at least 8 of each row. None: 512 on a CPU, else 16,384.
      mesh: batches of contexts go to the model's copies along `data` in turn, each split over `tensor`; None: one
        device.

    Raises:
      ValueError: max_length is below 1 or above the model's max_position, or batch_tokens is below 1.
    """

    def __init__(self, model: LFM, max_length: int, batch_tokens: int | None = None, mesh: Mesh | None = None):
        model.config.need_causal("scoring continuations")
        most = model.config.max_position
        if batch_tokens is None:
            batch_tokens = 512 if jax.default_backend() == "cpu" else 16384
        if not 1 <= max_length <= most:
            raise ValueError(f"max_length is {max_length}; the model reads 1 to {most} tokens")
        if batch_tokens < 1:
            raise ValueError(f"batch_tokens is {batch_tokens}; it must be at least 1")
        self.max_length, self._batch_tokens, self._model, self._mesh = max_length, batch_tokens, model, mesh
        graphdef, params = nnx.split(model, nnx.Param)
        self._programs, self._params = _programs(graphdef), nnx.to_pure_dict(params)

    def score(self, pairs: Sequence[tuple[Tokens, Tokens]]) -> Iterator[tuple[int, Score]]:
        """Yields the number and the score of each pair as it is done, the longest pairs first.

        Raises:
          ValueError: a context or a continuation is empty, a continuation is longer than max_length, or the logits are
            not finite.
        """
        problems = []
        for i, (context, continuation) in enumerate(pairs):
            if not len(context) or not len(continuation):
                problems.append(f"pair {i} has no {'continuation' if len(context) else 'context'}")
            elif len(continuation) > self.max_length:
                problems.append(f"pair {i} has a continuation of {len(continuation)} tokens; the model reads "
                                f"{self.max_length}")
        raise_problems("cannot score", problems)
        by_shape = collections.defaultdict(list)
        for group in _groups(pairs, self.max_length):
            by_shape[group.shape].append(group)
        batches = [(shape, batch) for shape, groups in sorted(by_shape.items(), reverse=True)
                   for batch in _parts(groups, self._rows(shape))]
        copies = place_replicas(self._params, self._model.config, self._mesh)  # Of many, only while they are needed.
        streams = [self._on_copy(copy, batches[i :: len(copies)]) for i, copy in enumerate(copies)]
        running: collections.deque[_Dispatched] = collections.deque()
        while streams:
            for stream in list(streams):
                if (dispatched := next(stream, None)) is None:
                    streams.remove(stream)
                else:
                    running.append(dispatched)
            while len(running) > 2 * len(streams):  # The devices work on the newest meanwhile.
                yield from _told(running.popleft())

    def _rows(self, shape: _Shape) -> int:
        """Contexts of a batch."""
        return max(1, self._batch_tokens // shape.chunk)

    def _on_copy(
        self, copy: tuple[Any, Mesh], batches: list[tuple[_Shape, list[_Group]]]
    ) -> Iterator[_Dispatched]:
        """Runs batches of contexts on a copy of the model; yields what each dispatch will tell."""
        params, mesh = copy
        for shape, given in itertools.groupby(batches, key=lambda each: each[0]):
            yield from _under(mesh, self._batches(params, [batch for _, batch in given], shape))

    def _batches(self, params: Any, batches: list[list[_Group]], shape: _Shape) -> Iterator[_Dispatched]:
        """Takes in the contexts of each batch at once, then their continuations, `lanes` side by side: each lane
        begins the next one when its own has ended, so that few tokens of a dispatch are padding."""
        chunk, step, rows = shape.chunk, shape.step, self._rows(shape)
        most = min(32 * self._batch_tokens, MOST_SLOTS)
        lanes = max(1, min(self._batch_tokens // step, most // shape.room))
        room = min(shape.room, self._model.config.max_position)
        empty = functools.partial(self._model.init_state, max_len=room)
        hidden = functools.partial(jnp.zeros, dtype=self._model.config.dtype)
        width, programs = self._model.config.hidden_size, self._programs
        state, last_RD = empty(lanes), hidden((lanes, width))
        busy: list[_Run | None] = [None] * lanes
        for batch in batches:
            tokens_GT, length_G = _table([group.context for group in batch], rows)
            bank, last_GD = empty(rows), hidden((rows, width))
            for start in range(0, tokens_GT.shape[1], chunk):
                chunk_GC = tokens_GT[:, start : start + chunk]
                chunk_GC = np.pad(chunk_GC, ((0, 0), (0, chunk - chunk_GC.shape[1])))
                last_GD, bank = programs.begin(params, last_GD, bank, chunk_GC, length_G - start)
            runs = [(g, _Run(line)) for g, group in enumerate(batch) for line in group.lines]
            for part in _parts([each for each in runs if each[1].line.scored == 1], lanes):
                group_R = _filled([g for g, _ in part], lanes)
                target_R1, _ = _table([run.take(1) for _, run in part], lanes, 1, fill=-1)
                yield [(run, True) for _, run in part], programs.first(params, last_GD, group_R, target_R1)
            waiting = collections.deque(each for each in runs if each[1].line.scored > 1)
            while waiting:
                free = [lane for lane, run in enumerate(busy) if run is None][: len(waiting)]
                groups = []
                for lane in free:
                    group, busy[lane] = waiting.popleft()
                    groups.append(group)
                last_RD, state = programs.fill(
                    last_RD, state, last_GD, bank, _filled(free, lanes), _filled(groups, lanes), np.int32(len(free)))
                if waiting:
                    last_RD, state, dispatched = self._step(params, last_RD, state, busy, step)
                    yield dispatched
        while any(busy):
            last_RD, state, dispatched = self._step(params, last_RD, state, busy, step)
            yield dispatched

    def _step(
        self, params: Any, last_RD: jax.Array, state: State, busy: list[_Run | None], step: int
    ) -> tuple[jax.Array, State, _Dispatched]:
        """Scores the next `step` tokens of every lane's continuation, and frees the lanes where it ends."""
        lanes = len(busy)
        targets = [run.take(step) if run else () for run in busy]
        targets_RC, length_R = _table(targets, lanes, step, fill=-1)
        read_R = length_R - [run is not None and run.is_done for run in busy]  # Nobody reads the last one.
        last_RD, state, told = self._programs.step(params, last_RD, state, targets_RC, read_R)
        parts = [None if run is None else (run, run.is_done) for run in busy]
        busy[:] = [None if run is None or run.is_done else run for run in busy]
        return last_RD, state, (parts, told)


# -------------------------------------------------------------------- on the host


@dataclasses.dataclass(frozen=True)
class _Line:
    """A context and its continuation, cut at the left."""

    tokens: tuple[int, ...]
    scored: int
    """Tokens of the continuation."""
    numbers: list[int]
    """Of the pairs that are the same."""


class _Shape(NamedTuple):
    room: int
    """Slots that are enough for a context and each of its continuations."""
    chunk: int
    """Tokens of a context in a dispatch."""
    step: int
    """Tokens of a continuation in a dispatch."""


@dataclasses.dataclass(frozen=True)
class _Group:
    """A context and everything that continues it."""

    context: tuple[int, ...]
    lines: list[_Line]

    @property
    def shape(self) -> _Shape:
        """Of its dispatches: rounded up to few sizes, since each is compiled."""
        longest = max(line.scored for line in self.lines)
        read = len(self.context) + longest - 1
        room = max(LEAST_ROOM, 1 << (read - 1).bit_length())
        return _Shape(room, room // 4, STEP if longest <= LONG else room // 4)


@dataclasses.dataclass
class _Run:
    """A line whose continuation is being scored: how many of its tokens are taken, and what is known of these."""

    line: _Line
    taken: int = 0
    logprob: float = 0.0
    greedy: bool = True

    @property
    def is_done(self) -> bool:
        return self.taken == self.line.scored

    def take(self, count: int) -> Tokens:
        """The next tokens of the continuation, at most `count`."""
        first = len(self.line.tokens) - self.line.scored + self.taken
        self.taken = min(self.taken + count, self.line.scored)
        return self.line.tokens[first : first + count]


_Dispatched = tuple[Sequence[tuple[_Run, bool] | None], tuple[jax.Array, jax.Array]]
"""The line of each row and whether it ends here; the log-probability of each row's targets, and whether they are the
likeliest ones."""


def _groups(pairs: Sequence[tuple[Tokens, Tokens]], max_length: int) -> list[_Group]:
    """Brings together what begins with the same context, the longest first, each pair once."""
    lines: dict[tuple[tuple[int, ...], int], _Line] = {}
    for number, (context, continuation) in enumerate(pairs):
        tokens = (*context, *continuation)[-(max_length + 1) :]
        key = tokens, len(continuation)
        lines.setdefault(key, _Line(*key, [])).numbers.append(number)
    by_context = collections.defaultdict(list)
    for line in sorted(lines.values(), key=lambda line: -len(line.tokens)):
        by_context[line.tokens[: -line.scored]].append(line)
    return [_Group(context, lines) for context, lines in by_context.items()]


def _parts[T](items: list[T], size: int) -> Iterator[list[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _under(mesh: Mesh, dispatches: Iterator[_Dispatched]) -> Iterator[_Dispatched]:
    """Dispatches on a mesh; between them other work may have another one."""
    while True:
        with jax.set_mesh(mesh):
            dispatched = next(dispatches, None)
        if dispatched is None:
            return
        yield dispatched


def _filled(numbers: Sequence[int], count: int) -> np.ndarray:
    """Numbers as an array of a fixed length."""
    return np.array([*numbers, *[0] * (count - len(numbers))], np.int32)


def _table(
    rows: Sequence[Tokens], count: int, width: int | None = None, fill: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Returns rows of ids, int32 [count, width], filled up at the right and below, and the length of each; the width is
    that of the longest if none is given."""
    width = max(map(len, rows)) if width is None else width
    table, lengths = np.full((count, width), fill, np.int32), np.zeros(count, np.int32)
    for i, row in enumerate(rows):
        table[i, : len(row)] = row
        lengths[i] = len(row)
    return table, lengths


def _told(dispatched: _Dispatched) -> Iterator[tuple[int, Score]]:
    """Adds what a dispatch tells of its lines; yields the scores of those that it ends."""
    parts, scores = dispatched
    for part, logprob, greedy in zip(parts, *(np.asarray(x).tolist() for x in scores), strict=False):
        if part is None:
            continue
        if not math.isfinite(logprob):
            raise ValueError(LOGITS_NOT_FINITE)
        run, ends = part
        run.logprob, run.greedy = run.logprob + logprob, run.greedy and greedy
        if ends:
            yield from ((number, Score(run.logprob, run.greedy)) for number in run.line.numbers)


# -------------------------------------------------------------------- on the device


class _Programs(NamedTuple):
    """The compiled functions of one model structure."""

    begin: Any
    first: Any
    fill: Any
    step: Any


@functools.lru_cache(maxsize=8)
def _programs(graphdef: Any) -> _Programs:
    def hidden(
        params: Any, tokens_BT: jax.Array, length_B: jax.Array, state: State
    ) -> tuple[jax.Array, State | None]:
        tokens_BT, length_B = on_mesh(tokens_BT), on_mesh(length_B)
        segment_ids_BT = (jnp.arange(tokens_BT.shape[1]) < length_B[:, None]).astype(jnp.int32)
        return nnx.merge(graphdef, params)(tokens_BT, None, segment_ids_BT, state, None, padding="right")

    def newest(hidden_BTD: jax.Array, length_B: jax.Array, last_BD: jax.Array) -> jax.Array:
        index_B11 = jnp.clip(length_B - 1, 0, hidden_BTD.shape[1] - 1)[:, None, None]
        return jnp.where(length_B[:, None] > 0, jnp.take_along_axis(hidden_BTD, index_B11, axis=1)[:, 0], last_BD)

    def scores(params: Any, hidden_BXD: jax.Array, targets_BX: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the log-probability of each row's targets, [B], and whether they are the likeliest ones."""
        targets_BX = on_mesh(targets_BX)
        found = token_scores(hidden_BXD, nnx.merge(graphdef, params).head_VD, targets_BX)
        return jnp.sum(found.logprob_BT, axis=1), jnp.all((found.likeliest_BT == targets_BX) | (targets_BX < 0), axis=1)

    @functools.partial(jax.jit, donate_argnums=(1, 2))
    def begin(
        params: Any, last_GD: jax.Array, state: State, tokens_GC: jax.Array, length_G: jax.Array
    ) -> tuple[jax.Array, State | None]:
        """Takes in a chunk; returns the hidden state of each row's last token (`last_GD` if it has none here) and the
        state."""
        hidden_GCD, new_state = hidden(params, tokens_GC, length_G, state)
        return newest(hidden_GCD, length_G, last_GD), new_state

    @jax.jit
    def first(
        params: Any, last_GD: jax.Array, group_R: jax.Array, target_R1: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Scores the token that follows each of the contexts `group_R`."""
        return scores(params, last_GD[group_R][:, None], target_R1)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def fill(
        last_RD: jax.Array, state: State, last_GD: jax.Array, bank: State, lane_R: jax.Array, group_R: jax.Array,
        count: jax.Array
    ) -> tuple[jax.Array, State]:
        """Puts the contexts `group_R[:count]` into the rows `lane_R[:count]`, one by one, so that no more is copied."""

        def one(i: jax.Array, rows: tuple[jax.Array, State]) -> tuple[jax.Array, State]:
            return jax.tree.map(lambda x, context: x.at[lane_R[i]].set(context[group_R[i]]), rows, (last_GD, bank))

        return jax.lax.fori_loop(0, count, one, (last_RD, state))

    @functools.partial(jax.jit, donate_argnums=(1, 2))
    def step(
        params: Any, last_RD: jax.Array, state: State, targets_RC: jax.Array, read_R: jax.Array
    ) -> tuple[jax.Array, State | None, tuple[jax.Array, jax.Array]]:
        """Scores the targets of each row, and reads `read_R` of them."""
        hidden_RCD, new_state = hidden(params, jnp.maximum(targets_RC, 0), read_R, state)
        before_RCD = jnp.concatenate([last_RD[:, None], hidden_RCD[:, :-1]], axis=1)
        return newest(hidden_RCD, read_R, last_RD), new_state, scores(params, before_RCD, targets_RC)

    return _Programs(begin, first, fill, step)
