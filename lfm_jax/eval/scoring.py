"""Scores continuations of contexts: their log-probability, and whether greedy decoding would write them.

A context with several continuations goes through the model once where that is less work, and its state is then
continued by each. Every dispatch has one of few shapes, which depend on what is scored and not on its neighbours, so
that few programs are compiled and a pair has the same score in any company.

Dimensions: B rows, G contexts of a batch, R continuations of a batch, T tokens, C tokens of a chunk, D width,
X = targets of a row.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
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

CHUNK = 512
"""Tokens of a context that go through the model at a time where its state is kept."""
LEAST_MORE = 32
"""Slots behind a context, at least, for what is read of its continuations: states of one size for all short ones."""
KEPT_TOKENS = 16384
"""The most slots for keys and values of one batch of continuations, all rows together."""

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
      batch_tokens: tokens of a dispatch, padding included. None: 2,048 on a CPU, else 16,384.
      mesh: batches go to the model's copies along `data` in turn, each split over `tensor`; None: one device.

    Raises:
      ValueError: max_length is below 1 or above the model's max_position, or batch_tokens is below 1.
    """

    def __init__(self, model: LFM, max_length: int, batch_tokens: int | None = None, mesh: Mesh | None = None):
        model.config.need_causal("scoring continuations")
        most = model.config.max_position
        if batch_tokens is None:
            batch_tokens = 2048 if jax.default_backend() == "cpu" else 16384
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
        running: collections.deque[tuple[list[_Line], tuple[jax.Array, jax.Array]]] = collections.deque()
        # Of many copies, only while they are needed.
        copies = place_replicas(self._params, self._model.config, self._mesh)
        for batch in self._dispatch(_groups(pairs, self.max_length), copies):
            running.append(batch)
            if len(running) > len(copies):  # The devices work on the new batches meanwhile.
                yield from _told(*running.popleft())
        for batch in running:
            yield from _told(*batch)

    def _dispatch(
        self, groups: list[_Group], copies: Sequence[tuple[Any, Mesh]]
    ) -> Iterator[tuple[list[_Line], tuple[jax.Array, jax.Array]]]:
        """Runs batches of lines, those of one shape after the other, on the copies in turn."""
        whole, shared = collections.defaultdict(list), collections.defaultdict(list)
        for group in groups:
            if group.is_shared:
                shared[group.shape].append(group)
            else:
                for line in group.lines:
                    whole[line.shape].append(line)
        turn = itertools.cycle(copies)
        for shape in sorted({*whole, *shared}, reverse=True):
            rows = max(1, self._batch_tokens // shape[0])
            for batch in _parts(whole[shape], rows):
                params, mesh = next(turn)
                with jax.set_mesh(mesh):
                    told = self._whole(params, batch, rows, *shape)
                yield batch, told
            for part in _parts(shared[shape], rows):
                params, mesh = next(turn)
                with jax.set_mesh(mesh):
                    found = list(self._shared(params, part, rows, *shape))
                yield from found

    def _whole(self, params: Any, lines: list[_Line], rows: int, length: int, most: int) -> tuple[jax.Array, jax.Array]:
        """Scores the last tokens of lines, at most `most` of each."""
        tokens_BT, length_B = _table([line.tokens[:-1] for line in lines], rows, length)
        targets_BX, _ = _table([line.tokens[-line.scored :] for line in lines], rows, most, fill=-1)
        return self._programs.whole(params, tokens_BT, length_B, targets_BX)

    def _shared(
        self, params: Any, groups: list[_Group], rows: int, length: int, more: int
    ) -> Iterator[tuple[list[_Line], tuple[jax.Array, jax.Array]]]:
        """Takes in contexts of at most `length` tokens, and scores continuations of which at most `more` are read."""
        config = self._model.config
        room = min(length + max(more, LEAST_MORE), config.max_position)
        last_GD = jnp.zeros((rows, config.hidden_size), config.dtype)
        state = self._model.init_state(rows, room)
        tokens_GT, length_G = _table([group.context for group in groups], rows, length)
        for start in range(0, length, CHUNK):
            chunk_GC = tokens_GT[:, start : start + CHUNK]
            last_GD, state = self._programs.begin(params, last_GD, state, chunk_GC, length_G - start)
        at_once = max(1, min(self._batch_tokens // max(4 * more, 16), KEPT_TOKENS // room))
        lines = [(g, line) for g, group in enumerate(groups) for line in group.lines]
        for part in _parts(lines, at_once):
            targets_RX, _ = _table([line.tokens[-line.scored :] for _, line in part], at_once, more + 1, fill=-1)
            group_R = np.zeros(at_once, np.int32)
            group_R[: len(part)] = [g for g, _ in part]
            told = self._programs.follow(params, last_GD, state if more else None, group_R, targets_RX)
            yield [line for _, line in part], told


# -------------------------------------------------------------------- on the host


@dataclasses.dataclass(frozen=True)
class _Line:
    """A context and its continuation, cut at the left."""

    tokens: tuple[int, ...]
    scored: int
    """Tokens of the continuation."""
    numbers: list[int]
    """Of the pairs that are the same."""

    @property
    def shape(self) -> tuple[int, int]:
        """(tokens that are read, tokens that are scored), rounded up."""
        read = _size(len(self.tokens) - 1)
        most = 16
        while most < self.scored:
            most *= 4
        return read, min(most, read)


@dataclasses.dataclass(frozen=True)
class _Group:
    """A context and everything that continues it."""

    context: tuple[int, ...]
    lines: list[_Line]

    @property
    def shape(self) -> tuple[int, int]:
        """(tokens of the context, further tokens that are read of a continuation), rounded up."""
        more = max(line.scored for line in self.lines) - 1
        return _size(len(self.context)), _size(more, 8) if more else 0

    @property
    def is_shared(self) -> bool:
        """Whether it is less work to take in the context once."""
        length, more = self.shape
        return length + len(self.lines) * more < sum(line.shape[0] for line in self.lines)


def _size(n: int, least: int = 16) -> int:
    """Rounds up to few sizes, since each is compiled: to powers of 2 up to 64, then to two for each power."""
    power = max(least, 1 << (n - 1).bit_length())
    step = power if power <= 64 else power // 4
    return -(-n // step) * step


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


def _table(rows: Sequence[Tokens], count: int, width: int, fill: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Returns rows of ids, int32 [count, width], filled up at the right and below, and the length of each."""
    table, lengths = np.full((count, width), fill, np.int32), np.zeros(count, np.int32)
    for i, row in enumerate(rows):
        table[i, : len(row)] = row
        lengths[i] = len(row)
    return table, lengths


def _told(lines: list[_Line], scores: tuple[jax.Array, jax.Array]) -> Iterator[tuple[int, Score]]:
    logprob_B, greedy_B = (np.asarray(x) for x in scores)
    if not np.isfinite(logprob_B[: len(lines)]).all():
        raise ValueError(LOGITS_NOT_FINITE)
    for line, logprob, greedy in zip(lines, logprob_B.tolist(), greedy_B.tolist(), strict=False):
        yield from ((number, Score(logprob, greedy)) for number in line.numbers)


# -------------------------------------------------------------------- on the device


class _Programs(NamedTuple):
    """The compiled functions of one model structure."""

    whole: Any
    begin: Any
    follow: Any


@functools.lru_cache(maxsize=8)
def _programs(graphdef: Any) -> _Programs:
    def hidden(
        params: Any, tokens_BT: jax.Array, length_B: jax.Array, state: State | None
    ) -> tuple[jax.Array, State | None]:
        tokens_BT, length_B = on_mesh(tokens_BT), on_mesh(length_B)
        segment_ids_BT = (jnp.arange(tokens_BT.shape[1]) < length_B[:, None]).astype(jnp.int32)
        return nnx.merge(graphdef, params)(tokens_BT, None, segment_ids_BT, state, None, padding="right")

    def scores(params: Any, hidden_BXD: jax.Array, targets_BX: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the log-probability of each row's targets, [B], and whether they are the likeliest ones."""
        targets_BX = on_mesh(targets_BX)
        found = token_scores(hidden_BXD, nnx.merge(graphdef, params).head_VD, targets_BX)
        return jnp.sum(found.logprob_BT, axis=1), jnp.all((found.likeliest_BT == targets_BX) | (targets_BX < 0), axis=1)

    @jax.jit
    def whole(
        params: Any, tokens_BT: jax.Array, length_B: jax.Array, targets_BX: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Scores the targets that follow the last tokens of each row."""
        hidden_BTD, _ = hidden(params, tokens_BT, length_B, None)
        first_B = length_B - jnp.sum(targets_BX >= 0, axis=1)
        index_BX = jnp.clip(first_B[:, None] + jnp.arange(targets_BX.shape[1]), 0, tokens_BT.shape[1] - 1)
        return scores(params, jnp.take_along_axis(hidden_BTD, index_BX[:, :, None], axis=1), targets_BX)

    @jax.jit
    def begin(
        params: Any, last_GD: jax.Array, state: State | None, tokens_GC: jax.Array, length_G: jax.Array
    ) -> tuple[jax.Array, State | None]:
        """Takes in a chunk; returns the hidden state of each row's last token (`last_GD` if it has none here) and the
        state."""
        hidden_GCD, state = hidden(params, tokens_GC, length_G, state)
        index_G11 = jnp.clip(length_G - 1, 0, tokens_GC.shape[1] - 1)[:, None, None]
        newest_GD = jnp.take_along_axis(hidden_GCD, index_G11, axis=1)[:, 0]
        return jnp.where(length_G[:, None] > 0, newest_GD, last_GD), state

    @jax.jit
    def follow(
        params: Any, last_GD: jax.Array, state: State | None, group_R: jax.Array, targets_RX: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Scores continuations of the contexts `group_R`; without a state, of one token each."""
        hidden_RXD = last_GD[group_R][:, None]
        if state is not None:
            of_rows = jax.tree.map(lambda x: x.at[group_R].get(mode="fill", fill_value=0), state)
            read_RT, length_R = jnp.maximum(targets_RX[:, :-1], 0), jnp.sum(targets_RX >= 0, axis=1) - 1
            more_RTD, _ = hidden(params, read_RT, length_R, of_rows)
            hidden_RXD = jnp.concatenate([hidden_RXD, more_RTD], axis=1)
        return scores(params, hidden_RXD, targets_RX)

    return _Programs(whole, begin, follow)
