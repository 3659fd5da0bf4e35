"""What tests share: models as compiled functions, loud weights, layouts of documents, wheels of PyPI that some look
into."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import nnx
from hypothesis import strategies as st

from lfm_jax import LFM
from lfm_jax.data.batch import LOSS_IGNORE
from lfm_jax.model import param_traits
from lfm_jax.testing import tiny_config
from lfm_jax.train.optimizer import make_optimizer

KINDS = {
    "hybrid": {},
    "two-taps-bias": dict(layer_types=("full_attention", "conv", "conv"), conv_taps=2, conv_bias=True),
    "seven-taps": dict(layer_types=("conv", "full_attention"), conv_taps=7, num_kv_heads=1),
    "one-tap": dict(layer_types=("conv", "full_attention"), conv_taps=1, conv_impl="lax"),
    "all-conv": dict(layer_types=("conv", "conv"), conv_bias=True, conv_impl="lax"),
    "all-attention": dict(layer_types=("full_attention", "full_attention"), num_kv_heads=4),
    "sandwich": dict(
        layer_types=("conv", "full_attention"), post_norm=True, qk_norm=False, head_dim=6, conv_bias=True, conv_taps=4
    ),
    "every-operator": dict(
        layer_types=("recurrence", "conv", "sliding_attention", "full_attention"), sliding_window=5, conv_gates="input"
    ),
    "liquid": dict(layer_types=("recurrence", "sliding_attention"), recurrence="liquid", sliding_window=3),
    "lti": dict(layer_types=("recurrence", "recurrence"), recurrence="lti"),
    "one-gate": dict(layer_types=("conv", "sliding_attention"), conv_gates="output", sliding_window=1, conv_bias=True),
    "lfm3": dict(
        layer_types=("conv", "sliding_attention", "full_attention"), conv_taps=7, sliding_window=5, post_norm=True,
        attention_gate=True, rope_fraction=0.5, sliding_rope_theta=1e4,
    ),
    "no-gate": dict(layer_types=("conv", "full_attention"), conv_gates="none", conv_impl="associative",
                    attention_impl="blockwise"),
    "moe": dict(ffn_types=("swiglu", "moe", "moe"), num_experts=6, active_experts=2, expert_size=20),
}
"""Models that the properties run on; from `one-tap` on most are what `transformers` cannot express."""

TESTED = ("hybrid", "sandwich", "every-operator", "seven-taps", "liquid", "no-gate", "lfm3", "moe")
"""All implementations and recurrences. The other kinds, of `make test-long`, differ in settings that tests/operators
compares with float64 for each operator by itself; there they meet the other layers of a model."""


def core(*values):
    """Parameters with which a test is part of `make check`, whatever it takes."""
    return pytest.param(*values, marks=pytest.mark.core)


def long(*values):
    """Parameters of a test that are for `make test-long`; its docstring says what they add."""
    return pytest.param(*values, marks=pytest.mark.long)


every_kind = pytest.mark.parametrize(
    "kind", [core(kind) if kind == "hybrid" else kind if kind in TESTED else long(kind) for kind in KINDS]
)


def rel_err(actual, expected):
    """Largest difference relative to the largest expected value."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"{actual.shape} is not {expected.shape}"
    return np.abs(actual - expected).max() / np.abs(expected).max()


def loud(params, seed):
    """Random norm weights around 1 and random biases, so that none of them can be left out unnoticed."""
    rng = np.random.default_rng(seed)

    def leaf(path, x):
        name = jax.tree_util.keystr(path)
        if "norm" in name:
            return jnp.asarray(1 + 0.4 * rng.standard_normal(x.shape), x.dtype)
        if "rate" in name or "gate_bias" in name:  # Of a recurrence: where they begin matters.
            return x + jnp.asarray(rng.standard_normal(x.shape), x.dtype)
        if "bias" in name:
            return jnp.asarray(0.5 * rng.standard_normal(x.shape), x.dtype)
        return x

    return jax.tree_util.tree_map_with_path(leaf, params)


def assert_place_in_the_batch_is_nothing(run, width, rows=6, times=400):
    """`run` gives each of several equal tokens x_B1D the same, to the bit, also behind the last whole vector of rows,
    where a CPU takes other instructions. They seldom differ: hence so many times."""
    for seed in range(times):
        x_11D = np.random.default_rng(seed).standard_normal((1, 1, width)).astype(np.float32)
        y_B1D = np.asarray(run(np.repeat(x_11D, rows, axis=0)))
        np.testing.assert_array_equal(y_B1D, np.repeat(y_B1D[:1], rows, axis=0))


class Net:
    """A tiny model as compiled functions of (params, arrays); every shape compiles once a session."""

    def __init__(self, seed=0, **changes):
        self.config = tiny_config(**changes)
        self.graphdef, state = nnx.split(LFM(self.config, rngs=nnx.Rngs(seed)), nnx.Param)
        self.params = loud(nnx.to_pure_dict(state), seed)
        self.params64 = jax.tree.map(lambda x: np.asarray(x, np.float64), self.params)

        @functools.partial(jax.jit, static_argnames=("logits", "padding"))
        def call(params, tokens, positions, segment_ids, state, logits, padding):
            model = nnx.merge(self.graphdef, params)
            return model(tokens, positions, segment_ids, state, logits, padding=padding)

        @jax.jit
        def embed_grad(params, tokens, segment_ids, weight_BTD):
            def loss(embed):
                model = nnx.merge(self.graphdef, params | {"embed": embed})
                return jnp.sum(weight_BTD * model(tokens, None, segment_ids, None, None)[0])

            return jax.grad(loss)(params["embed"])

        self._call, self._embed_grad = call, embed_grad

    def __call__(self, tokens, positions=None, segment_ids=None, state=None, logits=None, padding="any"):
        arrays = [None if x is None else np.asarray(x, np.int32) for x in (tokens, positions, segment_ids)]
        out, state = self._call(self.params, *arrays, state, logits, padding)
        return np.asarray(out), state

    def embed_grad(self, tokens, segment_ids, weight_BTD):
        """Gradient of `sum(weight * hidden)` by the embedding table."""
        return np.asarray(self._embed_grad(self.params, tokens, segment_ids, weight_BTD))

    def init_state(self, batch, max_len):
        return nnx.merge(self.graphdef, self.params).init_state(batch, max_len)

    def reference(self, tokens_T, positions_T=None):
        """Normed hidden states of one document in float64 numpy."""
        return reference.hidden(self.config, self.params64, np.asarray(tokens_T), positions_T)


def optimizer_for(model, optimizer, steps=10):
    """The optimizer of a run of so many steps, of a ModelConfig and an OptimizerConfig."""
    return make_optimizer(optimizer, steps, param_traits(model, stacked=model.scan_layers))


@functools.cache
def net(kind):
    return Net(**KINDS[kind])


def documents(segment_ids_T):
    """Indices of each document's tokens: padding is skipped, a change of id starts a new one."""
    groups, last = [], None
    for i, segment in enumerate(segment_ids_T):
        if segment == 0:
            continue
        if segment != last:
            groups.append([])
        groups[-1].append(i)
        last = segment
    return groups


def layouts(T):
    """Segment ids of one row of T tokens: documents, padding and empty rows in any arrangement."""
    run = st.tuples(st.integers(0, 3), st.integers(1, max(1, T // 3)))

    def row(runs):
        ids = [segment for segment, length in runs for _ in range(length)]
        return (ids + [0] * T)[:T]

    return st.lists(run, max_size=8).map(row)


def batches(B, T):
    return st.lists(layouts(T), min_size=B, max_size=B).map(lambda rows: np.asarray(rows, np.int32))


def tokens_like(shape, seed, low=1, high=97):
    return np.random.default_rng(seed).integers(low, high, shape).astype(np.int32)


def reference_cross_entropy(hidden_BTD, table_VD, targets_BT):
    """The total of `train.loss.cross_entropy` without a z-loss, with all logits in memory."""
    logits_BTV = jnp.einsum(
        "BTD,VD->BTV", hidden_BTD, table_VD.astype(hidden_BTD.dtype), preferred_element_type=jnp.float32
    )
    log_p_BTV = jax.nn.log_softmax(logits_BTV, axis=-1)
    picked_BT = jnp.take_along_axis(log_p_BTV, jnp.maximum(targets_BT, 0)[:, :, None], axis=-1)[:, :, 0]
    return -jnp.sum(jnp.where(targets_BT != LOSS_IGNORE, picked_BT, 0.0))


def fetched_wheel(requirement, directory):
    """A wheel of PyPI that a test looks into, which no environment installs; the test is skipped without a network."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(directory), requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{requirement} cannot be fetched: {done.stderr.strip().splitlines()[-1:]}")
    return next(directory.glob("*.whl"))
