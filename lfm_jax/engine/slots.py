"""The device side of the engine: slots of one length, and the compiled programs that work on them.

A slot is a row of every array in `Slots`. Programs have fixed shapes and take the numbers of rows as data, so that
requests come and go without a compilation. The values of a row never depend on other rows; only their rounding may
depend on the number of rows in a dispatch.

Dimensions: B slots, S tokens of a slot, R rows and C tokens of a prefill, b <= B slots and N steps of a dispatch, T
tokens of a step (1, and those drafted), V vocabulary, W = ceil(V / 32) words of a mask, M stop ids, L likeliest tokens
of which log-probabilities are told.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from lfm_jax import state as state_lib
from lfm_jax.config import ModelConfig
from lfm_jax.engine.config import SHORT, STEPS, EngineConfig
from lfm_jax.model import LFM, Logits
from lfm_jax.sampling import (
    ANYTHING,
    GREEDY,
    Features,
    SamplingArrays,
    filter_logits,
    penalise_logits,
    sample,
    to_arrays,
)
from lfm_jax.sharding import on_mesh, reshard
from lfm_jax.state import State

NGRAM = 2
"""How many last tokens must have occurred before, for the tokens after them to be drafted."""
GREEDY_FEATURES = Features(*[False] * len(Features._fields))
NOT_FINITE = -2
"""Told in place of a token where the logits are not finite."""
NOWHERE = 2**30
"""An index beyond every array: writes to it are dropped."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Asked:
    """The options of requests, one row each."""

    sampling: SamplingArrays
    budget_B: jax.Array
    """Tokens to generate at most; int32 like what follows."""
    least_B: jax.Array
    """The number of tokens before the first stop id."""
    stop_ids_BM: jax.Array
    """-1 fills up."""
    biased_B: jax.Array
    """bool; the row's `Slots.bias_BV` counts."""
    draft_B: jax.Array
    """bool; whether tokens may be drafted for the row."""
    logprobs_B: jax.Array
    """bool; whether log-probabilities are wanted."""
    adapter_B: jax.Array | None
    """The place of the row's adapter; 0 for the base alone. None: the engine has no places."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """All slots of one length. A slot with no tokens left to generate is idle and does not change."""

    state: State
    asked: Asked
    token_B: jax.Array
    """The token sampled last, which is not in the state yet."""
    left_B: jax.Array
    """Tokens that the slot may still generate."""
    seen_BV: jax.Array
    """bool; tokens of the prompt and the text so far."""
    history_BS: jax.Array
    """Tokens of prompt and text so far, by position."""
    bias_BV: jax.Array | None
    """float32, added to the logits of rows that are `biased_B`; stale in others. None within programs that leave it be:
    so much is not to be copied at each dispatch."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Told:
    """Chosen tokens and their log-probabilities, [steps, rows, tokens]."""

    token: jax.Array
    """-1 where there is none, or NOT_FINITE: the end of its row."""
    drafted: jax.Array | None
    """int32 [steps, rows], the number of drafted tokens; None in programs without drafts."""
    logprob: jax.Array | None
    """Log-probability of the token (`EngineConfig.logprobs_of`); None in programs that do not compute it."""
    best: jax.Array | None
    """The L likeliest tokens, [..., L]."""
    best_logprob: jax.Array | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SlotShape:
    """The shape that programs are compiled for."""

    config: ModelConfig
    slots: int
    """B."""
    length: int
    """S."""
    draft: int = 0
    """Tokens drafted per step; 0 drafts none."""
    max_logprobs: int = 0
    """L."""
    sampled_logprobs: bool = False
    """Whether log-probabilities of generated tokens are by the distribution that they are drawn from."""
    max_stop_ids: int = 8
    fixed_rows: bool = False
    """Whether every dispatch that generates takes all slots."""
    int8_kv: bool = False
    adapters: bool = False
    """Whether the weights have places for adapters."""

    @functools.cached_property
    def row_counts(self) -> list[int]:
        """The numbers of rows, from the first on, that a dispatch may have when it generates, in ascending order.

        They are all rows, a quarter, a sixteenth and so on. On a CPU, where 16 rows take 1.7 times as long as 8, they
        are halves, unless slots are long: a dispatch of fewer than all rows copies them. Each number needs compiled
        programs.
        """
        halves = jax.default_backend() == "cpu" and self.length <= SHORT
        counts, part = {self.slots}, 2 if halves else 4
        while (smallest := min(counts)) > 4 and not self.fixed_rows:
            counts.add(-(-smallest // part))
        return sorted(counts)

    def asked(self, rows: int) -> Asked:
        """Returns the options of idle rows."""

        def full(value: Any, *shape: int, dtype: Any = jnp.int32) -> jax.Array:
            return jnp.full((rows, *shape), value, dtype)

        return Asked(
            sampling=_greedy(rows), budget_B=full(0), least_B=full(0), stop_ids_BM=full(-1, self.max_stop_ids),
            biased_B=full(False, dtype=bool), draft_B=full(False, dtype=bool), logprobs_B=full(False, dtype=bool),
            adapter_B=full(0) if self.adapters else None,
        )

    def init(self) -> Slots:
        """Returns empty slots."""
        B, V = self.slots, self.config.vocab_size
        return Slots(
            state=state_lib.init_state(self.config, B, self.length, rollback=self.draft, int8_kv=self.int8_kv),
            asked=self.asked(B),
            token_B=jnp.zeros((B,), jnp.int32), left_B=jnp.zeros((B,), jnp.int32),
            seen_BV=jnp.zeros((B, V), bool), history_BS=jnp.zeros((B, self.length), jnp.int32),
            bias_BV=jnp.zeros((B, V), jnp.float32),
        )

    @property
    def mask_words(self) -> int:
        """W."""
        return -(-self.config.vocab_size // 32)


def slot_shapes(engine: EngineConfig, model: ModelConfig) -> list[SlotShape]:
    """Returns the shape of each kind of slot, shortest first.

    Raises:
      ValueError: slots are longer than the model's context, or the state of the model cannot go back behind drafts.
    """
    longest = max(length for _, length in engine.slots)
    if longest > model.max_position:
        raise ValueError(f"slots of {longest} tokens exceed the model's max_position {model.max_position}")
    if engine.draft and model.cannot_roll_back:
        raise ValueError("draft needs layers whose state can go back, and that of "
                         f"{', '.join(model.cannot_roll_back)} cannot; leave draft at 0")
    return [
        SlotShape(config=model, slots=number, length=length, draft=engine.draft, max_logprobs=engine.max_logprobs,
                  sampled_logprobs=engine.logprobs_of == "sampled",
                  max_stop_ids=engine.max_stop_ids, fixed_rows=engine.fixed_rows, int8_kv=engine.kv == "int8",
                  adapters=engine.adapters > 0)
        for number, length in sorted(engine.slots, key=lambda kind: kind[1])
    ]


class Programs:
    """The compiled functions of one `SlotShape`; parameters of the model are arguments, and slots are donated.

    `prefill`, `score`, `bias`, `start`, `decode`, `advance`, `choose`, `copy`, `stop`, `snapshot`, `restore`: see the
    methods.
    """

    def __init__(self, graphdef: nnx.GraphDef[LFM], shape: SlotShape):
        self._graphdef, self._shape = graphdef, shape
        jit = functools.partial(jax.jit, donate_argnames="slots")
        self.prefill, self.score = jit(self._prefill), jit(self._score)
        self.start, self.bias = jit(self._start), jit(self._bias)
        self.copy, self.stop = jit(self._copy), jit(self._stop)
        self.decode = jit(self._decode, static_argnames=("rows", "plain", "draft"))
        self.advance = jit(self._advance, static_argnames="rows")
        self.choose = jit(self._choose, static_argnames="rows")
        self.snapshot = jax.jit(self._snapshot, static_argnames="length")
        self.restore = jit(self._restore, static_argnames="fresh")

    # ---------------------------------------------------------------- prompts

    def _prefill(
        self, params: Any, slots: Slots, rows_R: jax.Array, tokens_RC: jax.Array, length_R: jax.Array,
        fresh_R: jax.Array, adapter_R: jax.Array | None,
    ) -> tuple[Slots, jax.Array]:
        """Takes in a chunk of a prompt for each row and returns logits_RV after it. Rows in `fresh_R` are emptied
        first; `adapter_R` is as `Asked.adapter_B`."""
        slots, logits_R1V = self._take_in(params, slots, rows_R, tokens_RC, length_R, fresh_R, adapter_R, "last")
        return slots, logits_R1V[:, 0]

    def _score(
        self, params: Any, slots: Slots, rows_R: jax.Array, tokens_RC: jax.Array, length_R: jax.Array,
        fresh_R: jax.Array, adapter_R: jax.Array | None, targets_RC: jax.Array,
    ) -> tuple[Slots, jax.Array, Told]:
        """Does as `prefill`, and returns the log-probability of the token after each one, as one step."""
        slots, logits_RCV = self._take_in(params, slots, rows_R, tokens_RC, length_R, fresh_R, adapter_R, "all")
        last_R1 = jnp.maximum(length_R - 1, 0)[:, None, None]
        told = _tell(lambda: logits_RCV, targets_RC, self._shape.max_logprobs)
        return slots, jnp.take_along_axis(logits_RCV, last_R1, axis=1)[:, 0], _as_one_step(told)

    def _take_in(
        self, params: Any, slots: Slots, rows_R: jax.Array, tokens_RC: jax.Array, length_R: jax.Array,
        fresh_R: jax.Array, adapter_R: jax.Array | None, logits: Logits,
    ) -> tuple[Slots, jax.Array]:
        state = state_lib.reset(_take(slots.state, rows_R), fresh_R)
        slots = _remember(_forget(slots, rows_R, fresh_R), rows_R, state.position_B, tokens_RC, length_R)
        out, state = self._run(params, tokens_RC, length_R, adapter_R, state, logits)
        return dataclasses.replace(slots, state=_put(slots.state, rows_R, state)), out

    def _run(
        self, params: Any, tokens_RC: jax.Array, length_R: jax.Array, adapter_R: jax.Array | None, state: State,
        logits: Logits,
    ) -> tuple[jax.Array, State]:
        if adapter_R is not None:
            from lfm_jax.adapters.trees import for_rows

            params = for_rows(params, on_mesh(adapter_R))
        model = nnx.merge(self._graphdef, params)
        tokens_RC, length_R = on_mesh(tokens_RC), on_mesh(length_R)
        segment_ids_RC = (jnp.arange(tokens_RC.shape[1]) < length_R[:, None]).astype(jnp.int32)
        out, new_state = model(tokens_RC, None, segment_ids_RC, state, logits, padding="right")
        assert new_state is not None  # It is None only when none was given.
        return reshard(out, P()), new_state

    def _start(
        self, slots: Slots, logits_RV: jax.Array, source_R: jax.Array, rows_R: jax.Array, asked: Asked,
        mask_RW: jax.Array,
    ) -> tuple[Slots, Told]:
        """Starts to generate in some rows: sets their options and chooses the first token from `logits[source]`."""
        part = dataclasses.replace(_take(_light(slots), rows_R), asked=asked, left_B=asked.budget_B)
        bias = functools.partial(_take, slots.bias_BV, rows_R)
        part, told = _next_tokens(part, logits_RV[source_R][:, None], None, ANYTHING, self._shape, mask_RW, bias)
        return _heavy(_put(_light(slots), rows_R, part), slots), _as_one_step(told)

    def _bias(self, slots: Slots, row: jax.Array, bias_V: jax.Array) -> Slots:
        """Sets what is added to a row's logits."""
        assert slots.bias_BV is not None
        return dataclasses.replace(slots, bias_BV=slots.bias_BV.at[row].set(bias_V))

    # ---------------------------------------------------------------- generation

    def _decode(
        self, params: Any, slots: Slots, steps: jax.Array, *, rows: int, plain: bool, draft: int
    ) -> tuple[Slots, Told]:
        """Runs up to `steps` (at most STEPS) steps of the first `rows` slots; ends early when all of them are idle.

        Args:
          plain: whether all of these rows are greedy without penalty, bias, minimum of tokens and log-probabilities.
          draft: tokens drafted per step for the rows that may have drafts: the shape's number, or 0 if no row may.
        """
        shape = self._shape
        features, most = (GREEDY_FEATURES, 0) if plain else (ANYTHING, shape.max_logprobs)
        told_shape = dataclasses.replace(shape, max_logprobs=most)
        bias = functools.partial(_first, slots.bias_BV, rows)

        def unfinished(loop: tuple[jax.Array, Slots, Told]) -> jax.Array:
            n, part, _ = loop
            return (n < steps) & jnp.any(part.left_B > 0)

        def body(loop: tuple[jax.Array, Slots, Told]) -> tuple[jax.Array, Slots, Told]:
            n, part, told = loop
            live_b, tokens_bT, drafts, length_b = part.left_B > 0, part.token_B[:, None], None, jnp.int32(1)
            if draft:
                drafts = _draft(part, draft)
                tokens_bT, length_b = jnp.concatenate([tokens_bT, drafts[0]], axis=1), 1 + drafts[1]
            logits_bTV, state = self._run(
                params, tokens_bT, jnp.where(live_b, length_b, 0), part.asked.adapter_B, part.state,
                "all" if draft else "last",
            )
            part = dataclasses.replace(part, state=state)
            part, new = _next_tokens(part, logits_bTV, drafts, features, told_shape, None, bias)
            return n + 1, part, jax.tree.map(lambda all_, x: all_.at[n].set(x), told, new)

        lean = dataclasses.replace(slots, bias_BV=None)
        part = _first(lean, rows)
        logits = jax.ShapeDtypeStruct((rows, 1 + draft, shape.config.vocab_size), jnp.float32)
        tokens = jax.ShapeDtypeStruct((rows, 1 + draft), jnp.int32)
        told = jax.eval_shape(lambda x, y: _tell(lambda: x, y, most), logits, tokens)
        if draft:
            told = dataclasses.replace(told, drafted=jax.ShapeDtypeStruct((rows,), jnp.int32))
        told = jax.tree.map(lambda x: jnp.full((STEPS, *x.shape), -1, x.dtype), told)
        _, part, told = jax.lax.while_loop(unfinished, body, (jnp.int32(0), part, told))
        return dataclasses.replace(_put_first(lean, part), bias_BV=slots.bias_BV), told

    def _advance(self, params: Any, slots: Slots, *, rows: int) -> tuple[Slots, jax.Array]:
        """The first half of one step of the first `rows` slots: takes in their tokens; logits_bV."""
        part, adapter_b = _first((slots.state, slots.asked.adapter_B), rows)
        live_b = (slots.left_B[:rows] > 0).astype(jnp.int32)
        logits_b1V, part = self._run(params, slots.token_B[:rows, None], live_b, adapter_b, part, "last")
        return dataclasses.replace(slots, state=_put_first(slots.state, part)), logits_b1V[:, 0]

    def _choose(self, slots: Slots, logits_bV: jax.Array, mask_bW: jax.Array, *, rows: int) -> tuple[Slots, Told]:
        """The second half: chooses among the tokens that `mask_bW` allows."""
        part = _first(_light(slots), rows)
        bias = functools.partial(_first, slots.bias_BV, rows)
        part, told = _next_tokens(part, logits_bV[:, None], None, ANYTHING, self._shape, mask_bW, bias)
        return _heavy(_put_first(_light(slots), part), slots), _as_one_step(told)

    # ---------------------------------------------------------------- rows

    def _copy(self, slots: Slots, source_R: jax.Array, rows_R: jax.Array) -> Slots:
        """Copies rows to others."""
        return _put(slots, rows_R, _take(slots, source_R))

    def _stop(self, slots: Slots, rows_R: jax.Array) -> Slots:
        """Makes rows idle."""
        return dataclasses.replace(slots, left_B=slots.left_B.at[rows_R].set(0, mode="drop"))

    def _snapshot(self, slots: Slots, row: jax.Array, first: jax.Array, *, length: int) -> State:
        """Returns what a row's newest tokens, [first, first + length), added to its state; see `state.snapshot`."""
        return state_lib.snapshot(slots.state, row, first, length)

    def _restore(
        self, slots: Slots, row: jax.Array, first: jax.Array, part: State, tokens_C: jax.Array, *, fresh: bool
    ) -> Slots:
        """Puts a snapshot of `tokens_C` back into a row, which the first one of a prompt (`fresh`) clears before."""
        rows_1, state = row[None], slots.state
        if fresh:  # The others must not write the whole row for one block.
            state = _put(state, rows_1, state_lib.reset(_take(state, rows_1), jnp.array([True])))
            slots = _forget(slots, rows_1, jnp.array([True]))
        length_1 = jnp.full((1,), tokens_C.shape[0], jnp.int32)
        slots = _remember(slots, rows_1, first[None], tokens_C[None], length_1)
        return dataclasses.replace(slots, state=state_lib.restore(state, row, first, part))


@functools.lru_cache(maxsize=32)
def programs(graphdef: nnx.GraphDef[LFM], shape: SlotShape) -> Programs:
    """Returns the `Programs`, compiled once for all engines of a process that share them."""
    return Programs(graphdef, shape)


# -------------------------------------------------------------------- rows


def _take(tree: Any, rows_R: jax.Array) -> Any:
    return jax.tree.map(lambda x: x.at[rows_R].get(mode="fill", fill_value=0), tree)


def _put(tree: Any, rows_R: jax.Array, part: Any) -> Any:
    return jax.tree.map(lambda x, new: x.at[rows_R].set(new, mode="drop"), tree, part)


def _first(tree: Any, rows: int) -> Any:
    return jax.tree.map(lambda x: x[:rows], tree)


def _put_first(tree: Any, part: Any) -> Any:
    return jax.tree.map(lambda x, new: new if new.shape == x.shape else x.at[: new.shape[0]].set(new), tree, part)


def _light(slots: Slots) -> Slots:
    """The slots without what choosing a token does not change: what layers keep, and the bias."""
    return dataclasses.replace(slots, state=State((), slots.state.position_B), bias_BV=None)


def _heavy(light: Slots, slots: Slots) -> Slots:
    """The light ones with what `slots` have beside."""
    return dataclasses.replace(light, state=slots.state, bias_BV=slots.bias_BV)


def _forget(slots: Slots, rows_R: jax.Array, fresh_R: jax.Array) -> Slots:
    """Clears the seen tokens of the fresh rows."""
    seen_RV = jnp.where(fresh_R[:, None], False, _take(slots.seen_BV, rows_R))
    return dataclasses.replace(slots, seen_BV=_put(slots.seen_BV, rows_R, seen_RV))


def _remember(
    slots: Slots, rows_R: jax.Array, first_R: jax.Array, tokens_RC: jax.Array, length_R: jax.Array
) -> Slots:
    """Records tokens as seen, at positions from `first_R` on."""
    index_C = jnp.arange(tokens_RC.shape[1], dtype=jnp.int32)
    real_RC = index_C < length_R[:, None]
    rows_R1 = rows_R[:, None]
    position_RC = jnp.where(real_RC, first_R[:, None] + index_C, NOWHERE)
    return dataclasses.replace(
        slots,
        seen_BV=slots.seen_BV.at[rows_R1, jnp.where(real_RC, tokens_RC, NOWHERE)].set(True, mode="drop"),
        history_BS=slots.history_BS.at[rows_R1, position_RC].set(tokens_RC, mode="drop"),
    )


# -------------------------------------------------------------------- tokens


def _next_tokens(
    slots: Slots, logits_BTV: jax.Array, drafts: tuple[jax.Array, jax.Array] | None, features: Features,
    shape: SlotShape, mask_BW: jax.Array | None, bias: Callable[[], jax.Array],
) -> tuple[Slots, Told]:
    """Chooses the next tokens of every live row, and returns the slots after them.

    Args:
      logits_BTV: after the row's last token, and after each drafted one.
      drafts: (drafts_BK, how many of them are in the state already), K = T - 1. A draft counts as far as it is what is
        chosen anyway; the state goes back behind the others.
      shape: says which log-probabilities are told.
      mask_BW: bits of the tokens that may be chosen. Where bias or the ban on stop ids leave none of them, they yield.
      bias: gives `Slots.bias_BV` of these rows, which do not have it; called upon where one is biased.
    """
    B, T, V = logits_BTV.shape
    asked, live_B = slots.asked, slots.left_B > 0
    drafts_BK, drafted_B = drafts or (jnp.zeros((B, 0), jnp.int32), jnp.zeros((B,), jnp.int32))
    first_B = slots.state.position_B - drafted_B
    position_BT = first_B[:, None] + jnp.arange(T, dtype=jnp.int32)
    allowed_BTV = logits_BTV.astype(jnp.float32)
    if features == ANYTHING:
        made_BT = (asked.budget_B - slots.left_B)[:, None] + jnp.arange(T, dtype=jnp.int32)
        allowed_BTV = _biased(allowed_BTV, asked.biased_B & live_B, bias)
        allowed_BTV = _without_stop_ids(allowed_BTV, asked, live_B[:, None] & (made_BT < asked.least_B[:, None]))
    if mask_BW is not None:
        may_B1V = unpack(mask_BW, V)[:, None]
        free_BTV, allowed_BTV = (jnp.where(may_B1V, x, -jnp.inf) for x in (logits_BTV.astype(jnp.float32), allowed_BTV))
        allowed_BTV = jnp.where(jnp.any(allowed_BTV > -jnp.inf, axis=2, keepdims=True), allowed_BTV, free_BTV)
    # Rows that have ended keep their options, which must not cost the others a filter or a penalty.
    sampling = jax.tree.map(lambda x_B, idle_B: jnp.where(live_B, x_B, idle_B), asked.sampling, _greedy(B))
    # Rows whose tokens depend on those just before have no drafts: what they hold is right for T = 1.
    seen_XV = slots.seen_BV if features.repetition_penalty else None
    if T > 1:
        sampling, seen_XV = jax.tree.map(lambda x: jnp.repeat(x, T, axis=0), (sampling, seen_XV))
    allowed_XV = allowed_BTV.reshape(B * T, V)
    looked_back = seen_XV, lambda: jnp.repeat(_generated(slots, first_B), T, axis=0)
    token_X = sample(allowed_XV, sampling, features, position_BT.reshape(-1), *looked_back)
    finite_BT = jnp.all(jnp.isfinite(logits_BTV), axis=2)
    token_BT = jnp.where(finite_BT, token_X.reshape(B, T), NOT_FINITE)
    stops_BT = jnp.any(token_BT[:, :, None] == asked.stop_ids_BM[:, None], axis=2) | ~finite_BT
    right_BK = (token_BT[:, :-1] == drafts_BK) & ~stops_BT[:, :-1]
    right_BK &= jnp.arange(T - 1) < drafted_B[:, None]
    right_B = jnp.sum(jnp.cumprod(right_BK.astype(jnp.int32), axis=1), axis=1, dtype=jnp.int32)
    made_B = jnp.where(live_B, right_B + 1, 0)

    def drawn_from() -> jax.Array:
        penalised_XV = penalise_logits(allowed_XV, sampling, features, *looked_back)
        return filter_logits(penalised_XV, sampling, features).reshape(B, T, V)

    by = drawn_from if shape.sampled_logprobs else lambda: logits_BTV
    told = _tell(by, token_BT, shape.max_logprobs, wanted=jnp.any(asked.logprobs_B & live_B))
    told = dataclasses.replace(told, token=jnp.where(jnp.arange(T) < made_B[:, None], token_BT, -1),
                               drafted=None if drafts is None else drafted_B)
    last_B, stopped_B = (jnp.take_along_axis(x, right_B[:, None], axis=1)[:, 0] for x in (token_BT, stops_BT))
    chosen_B = last_B != NOT_FINITE
    slots = _remember(slots, jnp.arange(B), first_B, token_BT, made_B - (live_B & ~chosen_B))
    state = slots.state
    if drafts is not None:
        state = state_lib.rollback(state, jnp.where(live_B, drafted_B - right_B, 0))
    return dataclasses.replace(
        slots, state=state,
        token_B=jnp.where(live_B & chosen_B, last_B, slots.token_B),
        left_B=jnp.where(live_B & ~stopped_B, slots.left_B - made_B, 0),
    ), told


def _greedy(rows: int) -> SamplingArrays:
    """The sampling of rows that ask for nothing."""
    return jax.tree.map(jnp.asarray, to_arrays([GREEDY] * rows, 1)[0])


def _generated(slots: Slots, end_B: jax.Array) -> jax.Array:
    """How often each token was generated before position `end_B`, int32 [B, V]."""
    index_S = jnp.arange(slots.history_BS.shape[1], dtype=jnp.int32)
    first_B = end_B - (slots.asked.budget_B - slots.left_B)
    made_BS = (index_S >= first_B[:, None]) & (index_S < end_B[:, None])
    rows_B1, tokens_BS = jnp.arange(len(end_B))[:, None], jnp.where(made_BS, slots.history_BS, NOWHERE)
    return jnp.zeros(slots.seen_BV.shape, jnp.int32).at[rows_B1, tokens_BS].add(1, mode="drop")


def _tell(
    logits: Callable[[], jax.Array], token_BT: jax.Array, most: int, wanted: jax.Array | bool = True
) -> Told:
    """Returns the tokens with their log-probabilities and those of the `most` likeliest tokens, by the softmax of
    `logits()`, [B, T, V].

    The log-probabilities are zeros unless `wanted`, and None if `most` is 0.
    """
    if not most:
        return Told(token_BT, None, None, None, None)

    def tell() -> Told:
        logits32_BTV = logits().astype(jnp.float32)
        norm_BT = jax.nn.logsumexp(logits32_BTV, axis=2)
        best_BTL, best_id_BTL = jax.lax.top_k(logits32_BTV, most)
        logit_BT = jnp.take_along_axis(logits32_BTV, jnp.maximum(token_BT, 0)[:, :, None], axis=2)[:, :, 0]
        return Told(token_BT, None, logit_BT - norm_BT, best_id_BTL.astype(jnp.int32), best_BTL - norm_BT[:, :, None])

    def zeros() -> Told:
        empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(tell))
        return dataclasses.replace(empty, token=token_BT)

    return jax.lax.cond(wanted, tell, zeros)


def _as_one_step(told: Told) -> Told:
    return jax.tree.map(lambda x: x[None], told)


def _biased(logits_BTV: jax.Array, biased_B: jax.Array, bias: Callable[[], jax.Array]) -> jax.Array:
    def add(logits_BTV: jax.Array) -> jax.Array:
        return jnp.where(biased_B[:, None, None], logits_BTV + bias()[:, None], logits_BTV)

    return jax.lax.cond(jnp.any(biased_B), add, lambda x: x, logits_BTV)


def _without_stop_ids(logits_BTV: jax.Array, asked: Asked, ban_BT: jax.Array) -> jax.Array:
    def ban(logits_BTV: jax.Array) -> jax.Array:
        ids_BM = jnp.where(asked.stop_ids_BM < 0, NOWHERE, asked.stop_ids_BM)
        rows_B1 = jnp.arange(logits_BTV.shape[0])[:, None]
        banned_BTV = logits_BTV.at[rows_B1, :, ids_BM].set(-jnp.inf, mode="drop")
        return jnp.where(ban_BT[:, :, None], banned_BTV, logits_BTV)

    return jax.lax.cond(jnp.any(ban_BT), ban, lambda x: x, logits_BTV)


def unpack(mask_BW: jax.Array, V: int) -> jax.Array:
    """Returns the bits of uint32 words, lowest first, as bool [B, V]."""
    bits_BWb = (mask_BW[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    return bits_BWb.reshape(mask_BW.shape[0], -1)[:, :V] != 0


def _draft(slots: Slots, K: int) -> tuple[jax.Array, jax.Array]:
    """Drafts the tokens that followed the last NGRAM tokens where these occurred before ("prompt lookup").

    Of several places it takes the last one that K tokens follow, or else the one that the most tokens follow. A row
    gets no drafts if it may have none, and none beyond its budget.

    Returns:
      (drafts_BK, the number of them for each row).
    """
    history_BS, length_B = slots.history_BS, slots.state.position_B + 1
    S = history_BS.shape[1]
    index_S = jnp.arange(S, dtype=jnp.int32)
    last_B = length_B - NGRAM
    found_BS = index_S + NGRAM < length_B[:, None]
    for i in range(NGRAM):
        token_B1 = jnp.take_along_axis(history_BS, jnp.maximum(last_B + i, 0)[:, None], axis=1)
        found_BS &= jnp.roll(history_BS, -i, axis=1) == token_B1
    follow_BS = jnp.minimum(K, length_B[:, None] - NGRAM - index_S)
    best_B = jnp.argmax(jnp.where(found_BS, follow_BS * S + index_S, -1), axis=1).astype(jnp.int32)
    any_B = jnp.any(found_BS, axis=1) & slots.asked.draft_B
    index_BK = jnp.minimum(best_B[:, None] + NGRAM + jnp.arange(K), S - 1)
    drafted_B = jnp.where(any_B, jnp.take_along_axis(follow_BS, best_B[:, None], axis=1)[:, 0], 0)
    drafted_B = jnp.clip(jnp.minimum(drafted_B, slots.left_B - 1), 0)
    return jnp.take_along_axis(history_BS, index_BK, axis=1), drafted_B
