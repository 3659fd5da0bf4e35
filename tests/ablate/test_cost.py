"""Costs of a model: what is returned, state bytes against the formula, and that decoding attends to its context.

No test looks at a time.
"""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lfm_jax.ablate import cost
from lfm_jax.ablate.cost import full_state, measure_cost
from lfm_jax.operators.attention import KV
from lfm_jax.state import at_context
from lfm_jax.testing import tiny_config, tiny_model
from lfm_jax.train.optimizer import OptimizerConfig

CONTEXTS = (32, 64)
BASE = tiny_config(layer_types=("conv", "full_attention"), max_position=64)
OTHER = BASE.replace(layer_types=("sliding_attention",), sliding_window=48)


def measure(config, base=BASE, **changes):
    fields = dict(train_shape=(2, 16), optimizer=OptimizerConfig(), contexts=CONTEXTS, prefill_length=16, repeats=1)
    return measure_cost(config, base, **fields | changes)


@pytest.fixture(scope="module")
def costs():
    return {"base": measure(BASE), "other": measure(OTHER)}


@pytest.mark.parametrize(("name", "config"), [("base", BASE), ("other", OTHER)])
def test_what_is_returned(costs, name, config):
    found = costs[name]
    assert json.loads(json.dumps(found)) == found
    assert found["params"] == config.num_params()
    assert found["train_flops_per_token"] == 3 * config.flops_per_token(16)
    assert found["state_bytes"] == {str(T): config.state_bytes(T) for T in CONTEXTS}
    relative = found["relative"]
    assert set(relative) == {"train", "prefill", "decode"}
    assert set(found["decode_tokens_per_second"]) == set(relative["decode"]) == {"32", "64"}
    speeds = [found["train_tokens_per_second"], found["prefill_tokens_per_second"], relative["train"],
              relative["prefill"], *found["decode_tokens_per_second"].values(), *relative["decode"].values()]
    assert all(type(x) is float and 0 < x < math.inf for x in speeds)
    assert found["shape"] == "train 2 x 16, prefill 1 x 16, decode batch 1"
    assert "jax" in found["conditions"]


def test_the_base_beside_itself_is_exactly_one(costs):
    assert costs["base"]["relative"] == {"train": 1.0, "prefill": 1.0, "decode": {"32": 1.0, "64": 1.0}}


def test_programs_of_the_base_are_kept_from_point_to_point(costs):
    again = BASE.replace()
    assert cost._decode_program(again) is cost._decode_program(BASE)
    # One of each context, beside whatever point was measured in between.
    assert cost._decode_program(BASE)._cache_size() == len(CONTEXTS)
    assert cost._prefill_program(BASE)._cache_size() == 1


@pytest.mark.parametrize("config", [BASE, OTHER])
def test_a_decoded_token_attends_to_the_whole_context_and_itself(config):
    """Counted as the old slots whose value moves the logits; the slot of the token itself is overwritten."""
    model = tiny_model(**{f: getattr(config, f) for f in ("layer_types", "max_position", "sliding_window")})
    state = full_state(config, 40, room=8)
    at = next(i for i, layer in enumerate(state.layers) if isinstance(layer, KV))

    def logit(v_BSKH):
        layers = [*state.layers]
        layers[at] = layers[at].__class__(layers[at].k_BSKH, v_BSKH, layers[at].start_B, layers[at].end_B)
        ones_B1 = jnp.ones((1, 1), jnp.int32)
        logits_B1V, _ = model(5 * ones_B1, None, ones_B1, state.__class__(tuple(layers), state.position_B), "last",
                              padding="right")
        return logits_B1V[0, 0, 3]

    moved_S = np.any(np.asarray(jax.jit(jax.grad(logit))(state.layers[at].v_BSKH))[0] != 0, axis=(1, 2))
    assert moved_S.tolist() == [True] * 40 + [False] * 8


def test_decoding_goes_on_from_its_context_each_time():
    config, steps = BASE, 3
    params = nnx.to_pure_dict(nnx.split(tiny_model(layer_types=BASE.layer_types, max_position=64), nnx.Param)[1])
    decode = cost._decode_program(config)
    token_B, state = jnp.zeros((1,), jnp.int32), full_state(config, 32, cost.DECODE_STEPS[1])
    oldest = np.asarray(state.layers[1].k_BSKH[0, :32])
    first_B, state = decode(params, token_B, state, jnp.int32(32), jnp.int32(steps))
    assert state.position_B.tolist() == state.layers[1].end_B.tolist() == [32 + steps]
    assert np.array_equal(state.layers[1].k_BSKH[0, :32], oldest)  # The context itself stays.
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))
    # A conv tail goes on instead, so the token may differ; the place must not.
    second_B, state = decode(params, first_B, state, jnp.int32(32), jnp.int32(steps))
    assert state.position_B.tolist() == [32 + steps]
    assert 0 <= int(second_B[0]) < config.vocab_size
    assert at_context(state, 32).layers[1].start_B.tolist() == [0]


def test_longest_context_leaves_room_to_decode():
    state = full_state(BASE, BASE.max_position, room=8)
    assert state.layers[1].k_BSKH.shape[1] == BASE.max_position + 8


def test_decoding_takes_fewer_steps_where_a_step_is_long():
    least, most = cost.DECODE_STEPS
    assert cost._decode_steps(BASE, 1024) == cost._decode_steps(OTHER, 32768) == most
    assert cost._decode_steps(BASE, 32768) == least


def test_bad_lengths_are_named_together():
    with pytest.raises(ValueError, match=r"(?s)prefill_length is 0.*contexts has 65, over config\.max_position 64"):
        measure(BASE, contexts=(32, 65), prefill_length=0)
    with pytest.raises(ValueError, match=r"contexts has 64, over base\.max_position 32"):
        measure(BASE, BASE.replace(max_position=32))
    with pytest.raises(ValueError, match="repeats is 0"):
        measure(BASE, repeats=0)
