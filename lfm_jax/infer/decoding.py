"""The decode loop: a batch of prompts that advances by many tokens per dispatch, all on the device.

Dimensions: B batch (one prompt a row), C tokens of one prefill chunk, N tokens of one dispatch, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lfm_jax.config import ModelConfig
from lfm_jax.engine.request import LOGITS_NOT_FINITE
from lfm_jax.engine.slots import NOT_FINITE
from lfm_jax.model import LFM
from lfm_jax.problems import raise_problems
from lfm_jax.sampling import Features, Sampling, SamplingArrays, sample, to_arrays
from lfm_jax.state import State

PREFILL_CHUNK = 512
"""Prompt tokens of a row that go through the model at a time; bounds the memory of a long prompt."""
DISPATCH = 32
"""The most tokens that one dispatch generates for a row."""


class Decoding:
    """A batch of prompts, prefilled on construction and then advanced by some tokens at a time.

    Args:
      model, prompts, sampling, max_new_tokens: as in `generate`, prompts as token ids.
      stop_ids: tokens that finish their row.

    Raises:
      ValueError: see `generate`.
    """

    def __init__(
        self,
        model: LFM,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling | Sequence[Sampling],
        max_new_tokens: int,
        stop_ids: Sequence[int],
    ):
        config = model.config
        samplings = check(prompts, sampling, max_new_tokens, config)
        graphdef, params = nnx.split(model, nnx.Param)
        self._programs = _programs(graphdef)
        self._model_params = nnx.to_pure_dict(params)
        self._params, self._features = to_arrays(samplings, config.vocab_size)
        # Padded with an id that no token has, so that few different shapes occur.
        self._stop_ids = jnp.asarray([*stop_ids] + [-1] * (8 - len(stop_ids) % 8), jnp.int32)

        longest = max(map(len, prompts))
        state = model.init_state(len(prompts), min(bucket(longest + max_new_tokens), config.max_position))
        logits_BV = jnp.zeros((len(prompts), config.vocab_size), config.logits_dtype)
        for tokens_BC, segment_ids_BC in chunks(prompts, PREFILL_CHUNK):
            state, logits_BV = self._programs.prefill(self._model_params, state, logits_BV, tokens_BC, segment_ids_BC)
        self._carry = _Carry(
            state=state,
            token_B=jnp.zeros((len(prompts),), jnp.int32),
            left_B=jnp.full((len(prompts),), max_new_tokens, jnp.int32),
            seen_BV=_seen(prompts, config.vocab_size) if self._features.repetition_penalty else None,
            count_BV=jnp.zeros(logits_BV.shape, jnp.int32) if self._features.counts else None,
        )
        self._spoilt: set[int] = set()
        """Rows whose logits were not finite; `advance` raises, once it has returned what they had before."""
        self._first_B: jax.Array | None
        """The first token of each row, until `advance` returns it."""
        self._carry, self._first_B = self._programs.first(
            self._carry, logits_BV, self._params, self._stop_ids, features=self._features
        )

    @property
    def done(self) -> bool:
        """Whether every row has met a stop id, used up its tokens or been stopped, and `advance` has returned its
        tokens."""
        return self._first_B is None and not self._spoilt and not np.asarray(self._carry.left_B).any()

    def advance(self, steps: int) -> list[list[int]]:
        """Returns the next tokens of each row: one right after the prompts, then up to `steps` (at most DISPATCH).

        Raises:
          ValueError: the logits of a row were not finite; the call before has returned its last tokens.
        """
        if self._spoilt:
            raise ValueError(LOGITS_NOT_FINITE)
        if self._first_B is not None:
            tokens_NB, self._first_B = np.asarray(self._first_B)[None], None
        else:
            self._carry, tokens_NB = self._programs.decode(
                self._model_params, self._carry, self._params, self._stop_ids, min(steps, DISPATCH),
                features=self._features,
            )
        columns = np.asarray(tokens_NB).T
        self._spoilt = {row for row, column in enumerate(columns) if NOT_FINITE in column}
        return [column[column >= 0].tolist() for column in columns]

    def stop(self, row: int) -> None:
        """Finishes a row: it generates nothing more, and what spoilt it after its end does not matter."""
        self._spoilt.discard(row)
        self._carry = dataclasses.replace(self._carry, left_B=self._carry.left_B.at[row].set(0))


# -------------------------------------------------------------------- on the device


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Carry:
    """The state of the loop between tokens. A finished row does not change."""

    state: State
    token_B: jax.Array
    """The token sampled last, which is not in the state yet."""
    left_B: jax.Array
    """Tokens that the row may still generate; 0 if it is finished."""
    seen_BV: jax.Array | None
    """Tokens of the prompt and of the text so far; None when no row has a repetition penalty."""
    count_BV: jax.Array | None
    """How often each token was generated; None when no row has a frequency or presence penalty."""


class _Programs(NamedTuple):
    """The compiled functions of one model structure; parameters are arguments."""

    prefill: Callable[..., tuple[State, jax.Array]]
    first: Callable[..., tuple[_Carry, jax.Array]]
    decode: Callable[..., tuple[_Carry, jax.Array]]


@functools.lru_cache(maxsize=8)  # The oldest structure's executables go when more models than this are in use.
def _programs(graphdef: nnx.GraphDef[LFM]) -> _Programs:

    @functools.partial(jax.jit, donate_argnames=("state", "logits_BV"))
    def prefill(
        params: Any, state: State, logits_BV: jax.Array, tokens_BC: jax.Array, segment_ids_BC: jax.Array
    ) -> tuple[State, jax.Array]:
        """Takes in a chunk; keeps the logits of rows that ended in an earlier chunk."""
        model = nnx.merge(graphdef, params)
        new_BV, state = _run(model, tokens_BC, segment_ids_BC, state)
        return state, jnp.where(segment_ids_BC[:, :1] != 0, new_BV, logits_BV)

    @functools.partial(jax.jit, static_argnames="features", donate_argnames="carry")
    def first(
        carry: _Carry, logits_BV: jax.Array, params: SamplingArrays, stop_ids: jax.Array, *, features: Features
    ) -> tuple[_Carry, jax.Array]:
        """Samples the first token of each row."""
        return _choose(carry, logits_BV, params, stop_ids, features)

    @functools.partial(jax.jit, static_argnames="features", donate_argnames="carry")
    def decode(
        model_params: Any, carry: _Carry, params: SamplingArrays, stop_ids: jax.Array, steps: jax.Array, *,
        features: Features,
    ) -> tuple[_Carry, jax.Array]:
        """Generates up to `steps` tokens for each row: tokens_NB, told as by `_choose`. Ends early when all rows are
        finished."""
        model = nnx.merge(graphdef, model_params)

        def unfinished(loop: tuple[jax.Array, _Carry, jax.Array]) -> jax.Array:
            n, carry, _ = loop
            return (n < steps) & jnp.any(carry.left_B > 0)

        def body(loop: tuple[jax.Array, _Carry, jax.Array]) -> tuple[jax.Array, _Carry, jax.Array]:
            n, carry, tokens_NB = loop
            live_B1 = (carry.left_B > 0).astype(jnp.int32)[:, None]  # A finished row gets padding.
            logits_BV, state = _run(model, carry.token_B[:, None], live_B1, carry.state)
            carry, token_B = _choose(dataclasses.replace(carry, state=state), logits_BV, params, stop_ids, features)
            return n + 1, carry, tokens_NB.at[n].set(token_B)

        tokens_NB = jnp.full((DISPATCH, carry.token_B.shape[0]), -1, jnp.int32)
        _, carry, tokens_NB = jax.lax.while_loop(unfinished, body, (jnp.int32(0), carry, tokens_NB))
        return carry, tokens_NB

    return _Programs(prefill, first, decode)


def _run(model: LFM, tokens_BC: jax.Array, segment_ids_BC: jax.Array, state: State) -> tuple[jax.Array, State]:
    """Returns the logits after each row's last real token, logits_BV, and the state there."""
    logits_B1V, new_state = model(tokens_BC, None, segment_ids_BC, state, "last", padding="right")
    assert new_state is not None  # It is None only when none was given.
    return logits_B1V[:, 0], new_state


def _choose(
    carry: _Carry, logits_BV: jax.Array, params: SamplingArrays, stop_ids: jax.Array, features: Features
) -> tuple[_Carry, jax.Array]:
    """Samples the next token of every unfinished row.

    Returns:
      The carry after it, which holds tokens of the vocabulary only, and the token that is told: -1 for finished rows,
      NOT_FINITE where that is what the logits are, which finishes a row too.
    """
    live_B = carry.left_B > 0
    # The token will follow all that the state holds.
    seen_BV, count_BV, rows_B = carry.seen_BV, carry.count_BV, jnp.arange(carry.token_B.shape[0])
    count = None if count_BV is None else lambda: count_BV
    token_B = sample(logits_BV, params, features, carry.state.position_B, seen_BV, count)
    finite_B = jnp.all(jnp.isfinite(logits_BV), axis=1)
    stopped_B = jnp.any(token_B[:, None] == stop_ids, axis=1) | ~finite_B
    # Marking the token of a finished row is harmless: nothing reads what it holds again.
    if seen_BV is not None:
        seen_BV = seen_BV.at[rows_B, token_B].set(True)
    if count_BV is not None:
        count_BV = count_BV.at[rows_B, token_B].add(1)
    left_B = jnp.where(live_B & ~stopped_B, carry.left_B - 1, 0)
    told_B = jnp.where(live_B, jnp.where(finite_B, token_B, NOT_FINITE), -1)
    return _Carry(carry.state, token_B, left_B, seen_BV, count_BV), told_B


# -------------------------------------------------------------------- on the host


def bucket(n: int) -> int:
    """Rounds `n` up so that few different shapes occur: to multiples of 16, then to four sizes per power of 2."""
    step = max(16, (1 << (n - 1).bit_length()) // 8)
    return -(-n // step) * step


def chunks(rows: Sequence[Sequence[int]], size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields token ids and segment ids (1, or 0 for padding at the right), both int32 [B, C], C at most `size`."""
    for start in range(0, max(map(len, rows)), size):
        parts = [row[start : start + size] for row in rows]
        real_BC = np.arange(min(size, bucket(max(map(len, parts))))) < np.array([len(part) for part in parts])[:, None]
        tokens_BC = np.zeros(real_BC.shape, np.int32)
        tokens_BC[real_BC] = np.concatenate([np.asarray(part, np.int32) for part in parts])
        yield tokens_BC, real_BC.astype(np.int32)


def _seen(prompts: Sequence[Sequence[int]], vocab_size: int) -> jax.Array:
    seen_BV = np.zeros((len(prompts), vocab_size), bool)
    for row, prompt in enumerate(prompts):
        seen_BV[row, np.asarray(prompt)] = True
    return jnp.asarray(seen_BV)


def resolve_stop_ids(stop_ids: Sequence[int] | None, config: ModelConfig) -> tuple[int, ...]:
    """Returns the ids that finish a row; None means `config.eos_ids`. Raises ValueError for ids that the model
    lacks."""
    ids = config.eos_ids if stop_ids is None else tuple(stop_ids)
    bad = [i for i in ids if not 0 <= i < config.vocab_size]
    if bad:
        raise ValueError(f"stop_ids has {bad}; token ids lie in 0..{config.vocab_size - 1}")
    return ids


def check(
    prompts: Sequence[Sequence[int]], sampling: Sampling | Sequence[Sampling], max_new_tokens: int, config: ModelConfig
) -> list[Sampling]:
    """Returns the sampling of each prompt; raises ValueError, with all problems, for arguments that cannot run."""
    config.need_causal("generation")
    if isinstance(prompts, str) or not len(prompts):
        raise ValueError(f"prompts is {prompts!r}; expected a list with at least one prompt")
    samplings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
    problems = []
    if type(max_new_tokens) is not int or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens!r}; it must be a whole number of at least 1")
    if len(samplings) != len(prompts):
        problems.append(f"sampling has {len(samplings)} entries for {len(prompts)} prompts; give one, or one for each")
    for i, prompt in enumerate(prompts):
        ids = np.asarray(prompt)
        if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
            problems.append(f"prompts[{i}] is {prompt!r:.60}; expected a list of token ids")
            continue
        if not ids.size:
            problems.append(f"prompts[{i}] has no tokens; begin it with bos (id {config.bos_id})")
            continue
        if ids.min() < 0 or ids.max() >= config.vocab_size:
            problems.append(f"prompts[{i}] has ids {ids.min()}..{ids.max()}; they lie in 0..{config.vocab_size - 1}")
        if ids.size + max_new_tokens > config.max_position:
            problems.append(
                f"prompts[{i}] has {ids.size} tokens, with max_new_tokens {max_new_tokens} more than "
                f"config.max_position {config.max_position}; shorten one of them"
            )
    raise_problems("cannot generate", problems)
    return samplings
