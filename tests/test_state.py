"""Decode state: any way of cutting a stream into calls is the stream, and padding is the identity."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import KINDS, Net, batches, documents, every_kind, net, rel_err, tokens_like
from hypothesis import given, settings
from hypothesis import strategies as st

import lfm_jax as lfm
from lfm_jax import state as state_lib
from lfm_jax.operators.attention import KV
from lfm_jax.testing import tiny_config

B, C, CALLS = 3, 8, 4
SLOTS = C * CALLS
SEEDS = st.integers(0, 2**16)


def rows_of(state, rows):
    return jax.tree.map(lambda x: np.asarray(x)[np.asarray(rows, int)], state)


def assert_same(a, b):
    """Two states equal to the bit."""
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=jax.tree_util.keystr(path))


def assert_close(a, b):
    """Two states that go on alike: everything that a later call can see is equal up to rounding."""
    np.testing.assert_array_equal(a.position_B, b.position_B)
    for x, y in zip(a.layers, b.layers, strict=True):
        if not isinstance(x, KV):
            for one, other in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
                if one.size:
                    np.testing.assert_allclose(one, other, atol=1e-5 * max(1e-3, np.abs(other).max()))
            continue
        np.testing.assert_array_equal(x.end_B - x.start_B, y.end_B - y.start_B)
        for row in range(len(x.end_B)):
            for name in ("k_BSKH", "v_BSKH"):
                mine, other = (held(kv, name, row) for kv in (x, y))
                if mine.size:
                    assert rel_err(mine, other) < 1e-5


def held(kv, name, row):
    """What a later query can see of a row's keys or values, oldest first."""
    slots = getattr(kv, name)[row]
    start, end = int(kv.start_B[row]), int(kv.end_B[row])
    return np.asarray(slots)[np.arange(max(start, end - len(slots)), end) % len(slots)]


class Stream:
    """What one row must give: the documents of all calls so far, each as tokens in order."""

    def __init__(self, model):
        self.model, self.tokens = model, []

    def feed(self, tokens_T, segment_ids_T):
        """Expected hidden states as (indices in this call, values): the first document goes on from the state."""
        expected = []
        for i, where in enumerate(documents(segment_ids_T)):
            if i > 0:
                self.tokens = []
            self.tokens += list(tokens_T[where])
            expected.append((where, self.model.reference(self.tokens)[-len(where) :]))
        return expected


@every_kind
@given(calls=st.lists(batches(B, C), min_size=1, max_size=CALLS), seed=SEEDS)
def test_any_calls_with_padding_idle_rows_and_new_documents(kind, calls, seed):
    """Chunks shorter than the taps, padding inside, idle rows and packed documents, in any mixture."""
    model, state = net(kind), net(kind).init_state(B, SLOTS)
    streams = [Stream(model) for _ in range(B)]
    for i, segment_ids in enumerate(calls):
        tokens = tokens_like((B, C), seed + i)
        hidden, after = model(tokens, segment_ids=segment_ids, state=state)
        idle = [row for row in range(B) if not segment_ids[row].any()]
        assert_same(rows_of(after, idle), rows_of(state, idle))
        for row in range(B):
            for where, expected in streams[row].feed(tokens[row], segment_ids[row]):
                assert rel_err(hidden[row, where], expected) < 1e-5
            assert after.position_B[row] == len(streams[row].tokens)
        state = after


@every_kind
@given(calls=st.lists(batches(B, C), min_size=2, max_size=CALLS), seed=SEEDS)
def test_state_is_that_of_the_last_document_alone(kind, calls, seed):
    model, state = net(kind), net(kind).init_state(B, SLOTS)
    tokens = [tokens_like((B, C), seed + i) for i in range(len(calls))]
    streams = [Stream(model) for _ in range(B)]
    for token, segment_ids in zip(tokens, calls, strict=True):
        _, state = model(token, segment_ids=segment_ids, state=state)
        for row in range(B):
            streams[row].feed(token[row], segment_ids[row])
    rows, where, alone = np.zeros((B, SLOTS), np.int32), np.zeros((B, SLOTS), np.int32), model.init_state(B, SLOTS)
    for row, stream in enumerate(streams):
        rows[row, : len(stream.tokens)], where[row, : len(stream.tokens)] = stream.tokens, 1
    for start in range(0, SLOTS, C):
        _, alone = model(rows[:, start : start + C], segment_ids=where[:, start : start + C], state=alone)
    assert_close(state, alone)


@every_kind
@pytest.mark.parametrize("chunk", [1, 2])
def test_chunks_of_one_size_without_segment_ids(kind, chunk):
    """Chunk 1 is decoding: it equals the full pass, token by token."""
    model, T = net(kind), 20
    tokens = tokens_like((2, T), chunk)
    state = model.init_state(2, T)
    parts = []
    for start in range(0, T, chunk):
        hidden, state = model(tokens[:, start : start + chunk], state=state)
        parts.append(hidden)
    whole, once = model(tokens, state=model.init_state(2, T))
    for row in range(2):
        expected = model.reference(tokens[row])
        for hidden in (np.concatenate(parts, axis=1), whole):
            assert rel_err(hidden[row], expected) < 1e-5
    assert_close(state, once)
    np.testing.assert_array_equal(state.position_B, [T, T])


@pytest.mark.parametrize("kind", ["hybrid", "seven-taps"])
@given(calls=st.lists(batches(B, C), min_size=2, max_size=CALLS), order=st.permutations(range(B)), seed=SEEDS)
def test_permuting_rows_permutes_state_and_a_fork_goes_its_own_way(kind, calls, order, seed):
    model = net(kind)
    state, permuted = model.init_state(B, SLOTS), model.init_state(B, SLOTS)
    for i, segment_ids in enumerate(calls):
        tokens = tokens_like((B, C), seed + i)
        _, state = model(tokens, segment_ids=segment_ids, state=state)
        _, permuted = model(tokens[order], segment_ids=segment_ids[order], state=permuted)
    assert_close(permuted, rows_of(state, order))
    fork = rows_of(state, [0] * B)
    tokens, segment_ids = tokens_like((B, C), seed), np.asarray([[1] * C, [1] * 3 + [0] * 5, [0] * C], np.int32)
    hidden, after = model(tokens, segment_ids=segment_ids, state=fork)
    again, _ = model(tokens[:1].repeat(B, 0), segment_ids=segment_ids[:1].repeat(B, 0), state=fork)
    assert rel_err(again[2], hidden[0]) < 1e-5
    assert_same(rows_of(after, [2]), rows_of(state, [0]))


@given(calls=st.lists(batches(B, C), min_size=1, max_size=2), rows=st.lists(st.booleans(), min_size=B, max_size=B),
       seed=SEEDS)
def test_reset_rows_start_afresh_and_the_others_stay(calls, rows, seed):
    model = net("every-operator")
    state = model.init_state(B, SLOTS)
    for i, segment_ids in enumerate(calls):
        _, state = model(tokens_like((B, C), seed + i), segment_ids=segment_ids, state=state)
    cleared = state_lib.reset(state, jnp.asarray(rows))
    tokens, ones = tokens_like((B, C), seed + 7), np.ones((B, C), np.int32)
    hidden, after = model(tokens, segment_ids=ones, state=cleared)
    fresh, _ = model(tokens, segment_ids=ones, state=model.init_state(B, SLOTS))
    going_on, kept = model(tokens, segment_ids=ones, state=state)
    for row in range(B):
        np.testing.assert_array_equal(hidden[row], (fresh if rows[row] else going_on)[row])
    stay = [row for row in range(B) if not rows[row]]
    assert_same(rows_of(after, stay), rows_of(kept, stay))


def test_a_reset_row_forgets_nan():
    """A slot that once held numbers out of range must serve the next request."""
    model = net("every-operator")
    poisoned = jax.tree.map(
        lambda x: x.at[1].set(jnp.nan) if jnp.issubdtype(x.dtype, jnp.floating) else x, model.init_state(B, SLOTS)
    )
    tokens, ones = tokens_like((B, C), 0), np.ones((B, C), np.int32)
    hidden, _ = model(tokens, segment_ids=ones, state=state_lib.reset(poisoned, jnp.asarray([False, True, False])))
    fresh, _ = model(tokens, segment_ids=ones, state=model.init_state(B, SLOTS))
    np.testing.assert_array_equal(hidden, fresh)


@pytest.mark.parametrize("kind", ["hybrid", "all-attention"])
@given(first=batches(B, C), second=batches(B, C), seed=SEEDS)
def test_a_row_that_outgrows_its_slots_gives_nan_there_and_nowhere_else(kind, first, second, seed):
    model, state = net(kind), net(kind).init_state(B, 6)
    used = np.zeros(B, int)
    for i, segment_ids in enumerate((first, second)):
        hidden, state = model(tokens_like((B, C), seed + i), segment_ids=segment_ids, state=state)
        real = segment_ids != 0
        slot = used[:, None] + np.cumsum(real, axis=1) - 1
        nan = np.isnan(hidden).all(axis=-1)
        assert nan[real & (slot >= 6)].all()
        broken = real & (np.cumsum(real & (slot >= 6), axis=1) > 0)
        assert np.isfinite(hidden[real & ~broken]).all()
        used += real.sum(axis=1)
    full, _ = model(tokens_like((B, C), seed), segment_ids=first, state=model.init_state(B, SLOTS))
    tight, _ = model(tokens_like((B, C), seed), segment_ids=first, state=model.init_state(B, 6))
    fits = (first != 0) & (np.cumsum(first != 0, axis=1) <= 6)
    if fits.any():
        assert rel_err(tight[fits], full[fits]) < 1e-5


@given(seed=SEEDS, lengths=st.lists(st.integers(0, C), min_size=B, max_size=B))
def test_positions_given_by_hand_carry_on(seed, lengths):
    """A call with explicit positions leaves the state at the position after its last real token."""
    model, state = net("hybrid"), net("hybrid").init_state(B, SLOTS)
    segment_ids = np.where(np.arange(C) < np.asarray(lengths)[:, None], 1, 0)
    first, second = tokens_like((B, C), seed), tokens_like((B, C), seed + 1)
    positions = 100 + 3 * np.arange(C, dtype=np.int32)[None].repeat(B, 0)
    _, state = model(first, positions, segment_ids, state)
    np.testing.assert_array_equal(state.position_B, [100 + 3 * (n - 1) + 1 if n else 0 for n in lengths])
    hidden, _ = model(second, segment_ids=np.ones((B, C), np.int32), state=state)
    for row, n in enumerate(lengths):
        start = int(state.position_B[row])
        where = np.concatenate([positions[row, :n], start + np.arange(C)])
        expected = model.reference(np.concatenate([first[row, :n], second[row]]), where)[n:]
        assert rel_err(hidden[row], expected) < 1e-5


def test_right_padding_promised_leaves_the_same_state():
    model = net("hybrid")
    tokens, lengths = tokens_like((B, C), 5), np.asarray([[8], [3], [0]])
    segment_ids = np.where(np.arange(C) < lengths, 1, 0)
    found, state = model(tokens, segment_ids=segment_ids, state=model.init_state(B, SLOTS))
    promised, same = model(tokens, segment_ids=segment_ids, state=model.init_state(B, SLOTS), padding="right")
    assert rel_err(promised[segment_ids != 0], found[segment_ids != 0]) < 1e-5
    assert_close(same, state)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_state_bytes_is_what_init_state_takes(kind, dtype):
    config = tiny_config(**KINDS[kind])
    state = state_lib.init_state(config, 3, 17, dtype)
    assert 3 * config.state_bytes(17, dtype) == sum(x.nbytes for x in jax.tree.leaves(state))
    assert config.state_bytes(17) == config.state_bytes(17, config.dtype)


def test_state_is_a_pytree_of_arrays_led_by_the_batch():
    state = net("hybrid").init_state(B, 5)
    assert all(x.shape[0] == B for x in jax.tree.leaves(state))
    assert isinstance(jax.tree.map(lambda x: x, state), lfm.State)
    with pytest.raises(dataclasses.FrozenInstanceError):
        state.position_B = 0


def test_the_window_is_a_rolling_buffer_of_constant_size():
    """A stream far longer than both window and state goes on without NaN; only full attention needs a slot a token."""
    model = Net(layer_types=("sliding_attention", "recurrence", "conv"), sliding_window=4)
    sizes = {max_len: sum(x.nbytes for x in jax.tree.leaves(model.init_state(1, max_len))) for max_len in (4, 8, 400)}
    assert len(set(sizes.values())) == 1
    tokens, state, parts = tokens_like((1, 30), 2), model.init_state(1, 8), []
    for start, end in ((0, 7), (7, 8), (8, 19), (19, 20), (20, 21), (21, 30)):
        hidden, state = model(tokens[:, start:end], state=state)
        parts.append(hidden)
    assert rel_err(np.concatenate(parts, axis=1)[0], model.reference(tokens[0])) < 1e-5


def test_a_state_shorter_than_the_window_is_refused_with_nan_like_full_attention():
    model = Net(layer_types=("sliding_attention",), sliding_window=6)
    hidden, _ = model(tokens_like((1, 8), 2), state=model.init_state(1, 5))
    assert np.isfinite(hidden[0, :5]).all()
    assert np.isnan(hidden[0, 5:]).all()


def test_a_state_in_bfloat16_serves_a_float32_model():
    model = net("every-operator")
    tokens = tokens_like((B, C), 9)
    state = state_lib.init_state(model.config, B, SLOTS, "bfloat16")
    hidden, after = model(tokens, state=state)
    exact, _ = model(tokens)
    assert [x.dtype for x in jax.tree.leaves(after)] == [x.dtype for x in jax.tree.leaves(state)]
    assert 0 < rel_err(hidden, exact) < 0.05


@pytest.mark.parametrize(("batch", "max_len", "match"), [(0, 5, "batch is 0"), (1, 0, "max_len is 0"),
                                                         (1, 4097, "max_position 4096")])
def test_init_state_refuses(batch, max_len, match):
    with pytest.raises(ValueError, match=match):
        state_lib.init_state(tiny_config(), batch, max_len)


def test_wrong_arguments_are_named():
    model = net("hybrid")
    tokens, ids = np.ones((2, 4), np.int32), np.ones((2, 5), np.int32)
    other = Net(layer_types=("conv",)).init_state(2, 4)
    for match, kwargs in {
        "segment_ids_BT has shape": dict(tokens=tokens, segment_ids=ids),
        "positions_BT has shape": dict(tokens=tokens, positions=ids),
        "logits is 'first'": dict(tokens=tokens, logits="first"),
        "tokens_BT is": dict(tokens=tokens[0]),
        "state holds 3 rows": dict(tokens=tokens, state=model.init_state(3, 4)),
        "state has 1 layers": dict(tokens=tokens, state=other),
        "padding is 'left'": dict(tokens=tokens, segment_ids=tokens, padding="left"),
    }.items():
        with pytest.raises(ValueError, match=match):
            model(**kwargs)


GOING_BACK = {
    "lfm2": dict(), "one tap": dict(conv_taps=1), "seven taps": dict(conv_taps=7),
    "window": dict(layer_types=("conv", "sliding_attention", "full_attention"), sliding_window=3),
}


@functools.cache
def going_back(name):
    return Net(**GOING_BACK[name])




rollback, restore = jax.jit(state_lib.rollback), jax.jit(state_lib.restore)
snapshot = jax.jit(state_lib.snapshot, static_argnames="length")


@pytest.mark.parametrize("name", GOING_BACK)
@settings(max_examples=6)
@given(seed=st.integers(0, 2**32 - 1))
def test_rolled_back_tokens_were_never_there(name, seed):
    model, back = going_back(name), 3
    rng = np.random.default_rng(seed)
    rows = rng.integers(8, 97, (2, 24))
    state, twin = state_lib.init_state(model.config, 2, 32, rollback=back), model.init_state(2, 32)
    at_B = np.zeros(2, np.int32)
    for _ in range(4):
        # Each row takes in some tokens that stay, then some that go back; padding fills up.
        stay_B, go_B = rng.integers(1, 4, 2), rng.integers(0, back + 1, 2)
        tokens_BT = np.take_along_axis(rows, at_B[:, None] + np.arange(6), axis=1)
        together_BT, alone_BT = (np.arange(6) < n_B[:, None] for n_B in (stay_B + go_B, stay_B))
        _, state = model(tokens_BT, segment_ids=together_BT, state=state, padding="right")
        state = rollback(state, go_B.astype(np.int32))
        _, twin = model(tokens_BT, segment_ids=alone_BT, state=twin, padding="right")
        at_B += stay_B.astype(np.int32)
        np.testing.assert_array_equal(state.position_B, at_B)
        token_B1 = np.take_along_axis(rows, at_B[:, None], axis=1)
        ours, _ = model(token_B1, state=state, logits="last")
        theirs, _ = model(token_B1, state=twin, logits="last")
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_rollback_needs_layers_that_can_go_back():
    config = tiny_config(layer_types=("recurrence", "full_attention"))
    with pytest.raises(ValueError, match="leave rollback at 0"):
        state_lib.init_state(config, 1, 8, rollback=1)


@pytest.mark.parametrize("kinds", [
    ("conv", "full_attention", "conv"), ("sliding_attention", "recurrence", "full_attention"),
], ids=str)
def test_snapshots_of_all_parts_make_a_row_anew(kinds):
    model = Net(layer_types=kinds, sliding_window=5)
    rows = np.random.default_rng(0).integers(8, 97, (3, 13))
    state, parts = model.init_state(3, 16), []
    for start in (0, 4, 8):
        _, state = model(rows[:, start : start + 4], state=state)
        parts.append(snapshot(state, 1, start, length=4))
    other = model.init_state(3, 16)
    for start in (9, 5, 1):  # Rows that hold something else.
        _, other = model(rows[:, start : start + 4], state=other)
    other = state_lib.reset(other, jnp.array([True, False, False]))
    for start, part in zip((0, 4, 8), parts, strict=True):
        other = restore(other, 0, start, part)
    ours, _ = model(rows[1:2, 12:].repeat(3, 0), state=other, logits="last")
    theirs, _ = model(rows[:, 12:], state=state, logits="last")
    np.testing.assert_allclose(ours[0], theirs[1], rtol=1e-5, atol=1e-5)
