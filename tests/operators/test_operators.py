"""Each operator by itself against float64 numpy, and the interface that all of them share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import nnx
from helpers import assert_place_in_the_batch_is_nothing, loud, rel_err

from lfm_jax import state as state_lib
from lfm_jax.kinds import OPERATORS
from lfm_jax.testing import tiny_config

B, T, D = 2, 9, 32
CONFIGS = {
    "conv": tiny_config(),
    "conv-bias-lax": tiny_config(conv_bias=True, conv_taps=4, conv_impl="lax"),
    "conv-no-gate": tiny_config(conv_gates="none", conv_bias=True),
    "conv-input-gate": tiny_config(conv_gates="input"),
    "conv-output-gate": tiny_config(conv_gates="output", conv_taps=7, conv_impl="associative"),
    "recurrence-rglru": tiny_config(recurrence="rglru"),
    "recurrence-liquid": tiny_config(recurrence="liquid", scan_impl="sequential"),
    "recurrence-lti": tiny_config(recurrence="lti", scan_impl="associative"),
    "sliding_attention": tiny_config(sliding_window=3),
    "sliding_attention-wide": tiny_config(sliding_window=100, attention_impl="blockwise"),
    "sliding_attention-own-theta": tiny_config(sliding_window=4, rope_fraction=0.5, sliding_rope_theta=20.0),
    "full_attention": tiny_config(),
    "full_attention-gate": tiny_config(attention_gate=True, rope_fraction=0.7, rope_theta=30.0, sliding_rope_theta=2.0),
    "full_attention-no-norm": tiny_config(qk_norm=False, num_kv_heads=1, head_dim=10, rope_theta=100.0),
}
X = np.random.default_rng(0).standard_normal((B, T, D)).astype(np.float32)
POSITIONS = np.stack([np.arange(T), 5 + 3 * np.arange(T)]).astype(np.int32)


def make(name):
    config, kind = CONFIGS[name], name.split("-")[0]
    graphdef, params = nnx.split(OPERATORS[kind].find_module()(config, rngs=nnx.Rngs(0)), nnx.Param)
    params = loud(nnx.to_pure_dict(params), 0)

    @jax.jit
    def run(params, x, positions, segment_ids, state):
        operator = nnx.merge(graphdef, params)
        return operator(x, positions_BT=positions, segment_ids_BT=segment_ids, state=state)

    def expected(x_TD, positions_T):
        p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
        return reference.OPERATORS[kind](p, x_TD.astype(np.float64), positions_T, config)

    empty = state_lib.init_state(config.replace(layer_types=(kind,)), B, T).layers[0]
    return params, run, expected, empty


@pytest.mark.parametrize("name", CONFIGS)
def test_full_pass_chunks_and_numpy_agree(name):
    params, run, expected, state = make(name)
    whole, none = run(params, X, POSITIONS, None, None)
    assert none is None
    parts = []
    for chunk in (slice(0, 4), slice(4, 5), slice(5, 9)):
        out, state = run(params, X[:, chunk], POSITIONS[:, chunk], None, state)
        parts.append(out)
    for row in range(B):
        reference_TD = expected(X[row], POSITIONS[row])
        assert rel_err(whole[row], reference_TD) < 1e-5
        assert rel_err(np.concatenate(parts, axis=1)[row], reference_TD) < 1e-5


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_rows_and_an_idle_row(name):
    """Rows are aligned: documents numbered from 1, padding at the right end; row 1 is idle."""
    params, run, expected, state = make(name)
    ids = np.asarray([[1, 1, 1, 2, 2, 2, 2, 0, 0], [0] * 9], np.int32)
    positions = np.asarray([[0, 1, 2, 0, 1, 2, 3, 4, 5], [0] * 9], np.int32)
    for given in (None, state):
        out, after = run(params, X, positions, ids, given)
        for where in (slice(0, 3), slice(3, 7)):
            assert rel_err(out[0, where], expected(X[0, where], positions[0, where])) < 1e-5
    for x, y in zip(jax.tree.leaves(after), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(x[1], y[1])
    # What goes on from here is document 2.
    out, _ = run(params, X[:, 7:8], np.full((B, 1), 4), np.ones((B, 1), np.int32), after)
    assert rel_err(out[0], expected(X[0, 3:8], np.arange(5))[-1:]) < 1e-5


@pytest.mark.parametrize("name", CONFIGS)
def test_dtype_of_activations_is_the_input_s(name):
    params, run, _, state = make(name)
    out, after = run(params, jnp.asarray(X, jnp.bfloat16), POSITIONS, None, state)
    assert out.dtype == jnp.bfloat16
    assert [x.dtype for x in jax.tree.leaves(after)] == [x.dtype for x in jax.tree.leaves(state)]


def test_a_row_s_gate_does_not_depend_on_its_place():
    config = tiny_config(attention_gate=True, hidden_size=256, num_heads=16, head_dim=32, init_std=0.06)
    graphdef, params = nnx.split(OPERATORS["full_attention"].find_module()(config, rngs=nnx.Rngs(0)))

    @jax.jit
    def run(x_BTD):
        positions_BT = jnp.zeros(x_BTD.shape[:2], jnp.int32)
        return nnx.merge(graphdef, params)(x_BTD, positions_BT=positions_BT, segment_ids_BT=None, state=None)[0]

    assert_place_in_the_batch_is_nothing(run, 256)
