"""Keys and values in int8: how they are rounded, and what a state of them does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Net, rel_err, tokens_like

from lfm_jax import state as state_lib
from lfm_jax.kernels.attention import DIRECT_KEYS, decode_attention
from lfm_jax.kernels.int8_slots import Int8Slots

KINDS = {"full": dict(layer_types=("conv", "full_attention", "full_attention")),
         "window": dict(layer_types=("sliding_attention", "recurrence", "full_attention"), sliding_window=5)}


def drawn(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def test_heads_of_slots_are_rounded_by_half_a_step():
    x = drawn((2, 5, 3, 8)).at[0, 1].set(0).at[1, 2, 1, 4].set(1e4)
    slots = Int8Slots.of(x)
    assert (slots.values_BSKH.dtype, slots.shape) == ("int8", x.shape)
    assert np.all(np.abs(slots.astype("float32") - x) <= 0.5001 * slots.scales_BSK[..., None])
    assert not np.any(slots.astype("float32")[0, 1])
    assert np.isnan(Int8Slots.of(x.at[1, 1, 0, 0].set(jnp.nan)).astype("float32")[1, 1, 0]).all()


@pytest.mark.parametrize("S", [DIRECT_KEYS // 2, 3 * DIRECT_KEYS])
@pytest.mark.parametrize("impl", ["direct", "xla", "pallas_gpu"])
def test_a_step_of_decoding_is_that_with_the_widened_slots(impl, S):
    q = drawn((2, 1, 4, 16))
    k, v = (Int8Slots.of(drawn((2, S, 2, 16), seed)) for seed in (1, 2))
    places = dict(first_B=jnp.array([0, 3]), stop_B=jnp.array([S - 2, 20]), impl=impl, interpret=impl == "pallas_gpu")
    ours = decode_attention(q, k, v, **places)
    assert rel_err(ours, decode_attention(q, k.astype(q.dtype), v.astype(q.dtype), **places)) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_in_chunks_steps_padding_and_resets(kind):
    """Quality is a matter of real weights: here rounding must stay what it is, and nothing else may come in."""
    model, tokens = Net(**KINDS[kind]), tokens_like((2, 21), 0)
    exact, _ = model(tokens)

    def state():
        return state_lib.init_state(model.config, 2, 32, int8_kv=True)

    whole, after = model(tokens, state=state())
    assert 1e-5 < rel_err(whole, exact) < 0.05
    spoilt = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan) if jnp.issubdtype(x.dtype, jnp.floating) else x, after)
    fresh = state_lib.reset(spoilt, jnp.array([True, True]))
    for begin in (state(), fresh):
        parts = []
        for start, stop in ((0, 9), (9, 13), *((i, i + 1) for i in range(13, 21))):
            out, begin = model(tokens[:, start:stop], state=begin)
            parts.append(out)
        assert rel_err(np.concatenate(parts, axis=1), whole) < 0.02, "a number may be rounded to its other neighbour"
    real = np.arange(24) < np.array([[21], [21]])
    padded, _ = model(np.pad(tokens, ((0, 0), (0, 3))), segment_ids=real, state=state())
    assert rel_err(padded[:, :21], whole) < 0.02


def test_snapshots_make_a_row_anew():
    model, rows = Net(**KINDS["window"]), tokens_like((3, 13), 1)
    state, parts = state_lib.init_state(model.config, 3, 16, int8_kv=True), []
    for start in (0, 4, 8):
        _, state = model(rows[:, start : start + 4], state=state)
        parts.append(state_lib.snapshot(state, jnp.int32(1), jnp.int32(start), length=4))
    other = state_lib.init_state(model.config, 3, 16, int8_kv=True)
    for start, part in zip((0, 4, 8), parts, strict=True):
        other = state_lib.restore(other, jnp.int32(0), jnp.int32(start), part)
    ours, theirs = model(rows[[1, 0, 0], 12:], state=other)[0][0], model(rows[:, 12:], state=state)[0][1]
    np.testing.assert_array_equal(ours, theirs)
