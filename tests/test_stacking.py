"""Repeated layers: the pattern as runs, trees stacked and back, a stacked model, and what it saves the compiler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import Net, optimizer_for, rel_err, tokens_like
from hypothesis import given
from hypothesis import strategies as st

from lfm_jax import ModelConfig
from lfm_jax.config import repeated_units
from lfm_jax.model import abstract_model
from lfm_jax.pretrain.objective import next_token_training
from lfm_jax.stacking import runs, stack_layers, unit_layers, unstack_layers
from lfm_jax.testing import tiny_config
from lfm_jax.train.optimizer import OptimizerConfig
from lfm_jax.train.state import restacked, unstacked

C, A, R = "conv", "full_attention", "recurrence"
OPTIMIZER = OptimizerConfig(peak_lr=1e-2, warmup_steps=0, schedule="constant", eps=1e-3, algorithm="muon")


def test_the_runs_of_the_published_patterns():
    assert repeated_units(ModelConfig().layer_types) == [((C, C, A), 3), ((C, A), 3), ((C,), 1)]
    larger = repeated_units(ModelConfig.preset("lfm2-2.6b").layer_types)
    assert sum(len(unit) for unit, _ in larger) == 10
    assert repeated_units((C,) * 7) == [((C,), 7)]
    assert repeated_units((C, A, R)) == [((C, A, R), 1)]


@given(st.lists(st.sampled_from([C, A, R]), min_size=1, max_size=14).map(tuple))
def test_runs_are_the_pattern_and_trees_come_back(pattern):
    assert sum((unit * repeats for unit, repeats in repeated_units(pattern)), ()) == pattern
    config = tiny_config(layer_types=pattern)
    assert sum(run.length for run in runs(config)) == len(unit_layers(config)) <= len(pattern)
    tree = (7, {"embed": np.ones(2), "blocks": {i: {kind: np.full((2,), i)} for i, kind in enumerate(pattern)}})
    there = stack_layers(tree, config, lambda *x: np.stack(x))
    assert len(there[1]["blocks"]) == len(unit_layers(config))
    # Of some layers there is nothing in the tree, where all their weights are frozen.
    part = {"blocks": {i: block for i, block in tree[1]["blocks"].items() if pattern[i] != C}}
    for whole in (tree, part):
        back = unstack_layers(stack_layers(whole, config, lambda *x: np.stack(x)), config)
        assert jax.tree.structure(back) == jax.tree.structure(whole)
        jax.tree.map(np.testing.assert_array_equal, back, whole)


SCANNED = dict(layer_types=(C, A) * 2 + (R,) * 2)


def test_a_step_on_stacked_layers_is_a_step():
    batch = dict(tokens=tokens_like((2, 12), 0), targets=tokens_like((2, 12), 1),
                 segment_ids=np.ones((2, 12), np.int32), positions=np.tile(np.arange(12, dtype=np.int32), (2, 1)))
    results = []
    for scan in (False, True):
        net = Net(**SCANNED, scan_layers=scan)
        training = next_token_training(net.config, optimizer_for(net.config, OPTIMIZER), loss_chunk=8)
        state = training.placed_state(jax.tree.map(np.asarray, net.params))
        assert len(state.params["blocks"]) == (3 if scan else 6)
        state, metrics = training.compiled_step()(state, batch)
        sums, _ = training.compiled_evaluate()((state.params, state.frozen), batch)
        plain = unstacked(state, net.config)
        results.append((plain, metrics, sums["loss"]))
        again = restacked(plain, net.config)
        jax.tree.map(np.testing.assert_array_equal, again, state)
        shapes = unstacked(training.abstract_state(), net.config)
        assert jax.tree.map(jnp.shape, plain) == jax.tree.map(jnp.shape, shapes)
    (one, metrics1, loss1), (two, metrics2, loss2) = results
    assert rel_err(loss2, loss1) < 1e-5
    assert metrics1.keys() == metrics2.keys()
    for name in metrics1:
        assert rel_err(metrics2[name] + 1, metrics1[name] + 1) < 1e-5, name
    for a, b in zip(jax.tree.leaves(two.params), jax.tree.leaves(one.params), strict=True):
        assert rel_err(a, b) < 1e-4  # Newton-Schulz enlarges what rounding left.


def test_three_times_the_layers_are_no_larger_a_program():
    """What is compiled, forward, backward and optimizer, does not grow with the repeats of a unit."""
    sizes = []
    for repeats in (3, 9):
        config = tiny_config(layer_types=(C, C, A) * repeats + (C,), scan_layers=True, remat="full")
        batch = {name: jax.ShapeDtypeStruct((2, 8), jnp.int32) for name in
                 ("tokens", "targets", "segment_ids", "positions")}
        training = next_token_training(config, optimizer_for(config, OPTIMIZER))
        lowered = training.compiled_step().lower(training.abstract_state(), batch)
        sizes.append(len(lowered.as_text().splitlines()))
    assert sizes[1] < 1.01 * sizes[0]


@pytest.mark.parametrize("pattern", [(C, C, A), (C, A)], ids=["repeated", "nothing-repeated"])
def test_a_stacked_model_refuses_a_state(pattern):
    config = tiny_config(layer_types=pattern)
    graphdef, shapes = abstract_model(config, stacked=True)
    model = nnx.merge(graphdef, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes))
    with pytest.raises(ValueError, match="runs without a state"):
        model(np.ones((1, 2), np.int32), state=model.init_state(1, 4))
