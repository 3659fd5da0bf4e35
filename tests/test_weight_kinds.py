"""A weight may be a pytree that stands for an array: a toy kind through all that a model's weights go through."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import rel_err, tokens_like
from scaled import Scaled, dense, scaled

from lfm_jax import LFM, save_hf, to_state_dict
from lfm_jax.engine.config import EngineConfig
from lfm_jax.engine.engine import Engine
from lfm_jax.engine.placement import memory_needed
from lfm_jax.engine.request import Request
from lfm_jax.infer.generate import generate_tokens
from lfm_jax.model import abstract_model
from lfm_jax.stacking import stack_layers, unstack_layers
from lfm_jax.testing import tiny_config
from lfm_jax.train.checkpoint import CheckpointManager
from lfm_jax.train.loss import cross_entropy
from lfm_jax.train.state import new_state

EVERY_PARAMETER = dict(
    layer_types=("recurrence", "conv", "sliding_attention", "full_attention"), sliding_window=5, conv_bias=True,
    post_norm=True, tie_embedding=False,
)


@functools.cache
def made(**changes):
    """(config, graphdef, parameters all of which are of the toy kind)."""
    config = tiny_config(**changes)
    graphdef, params = nnx.split(LFM(config, rngs=nnx.Rngs(0)), nnx.Param)
    return config, graphdef, scaled(nnx.to_pure_dict(params))


def models():
    """The model, and the one of the arrays that its weights stand for."""
    _, graphdef, params = made()
    return nnx.merge(graphdef, params), nnx.merge(graphdef, dense(params))


def test_logits_loss_and_gradient_of_every_parameter():
    _, graphdef, params = made(**EVERY_PARAMETER)
    tokens, targets = tokens_like((2, 9), 0), tokens_like((2, 9), 1)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def run(params):
        model = nnx.merge(graphdef, params)
        first, state = model(tokens[:, :8], state=model.init_state(2, 16), logits=None)
        hidden = jnp.concatenate([first, model(tokens[:, 8:], state=state, logits=None)[0]], axis=1)
        return cross_entropy(hidden, model.head_VD, targets, chunk=8).total, model.project(hidden)

    assert isinstance(nnx.merge(graphdef, params).embed[...], Scaled)
    ((loss, logits), grads), ((expected, array_logits), array_grads) = run(params), run(dense(params))
    assert rel_err(logits, array_logits) < 1e-5  # Two programs, which may add in other orders.
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    _, pull = jax.vjp(jax.jit(dense), params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4), grads, pull(array_grads)[0])


def test_stacked_layers():
    config, graphdef, params = made(layer_types=("conv", "conv"))
    stacked_graphdef, _ = abstract_model(config, stacked=True)
    stacked = stack_layers(params, config)
    assert stacked["blocks"][0]["operator"]["conv"].s.shape == (2,)
    jax.tree.map(np.testing.assert_array_equal, unstack_layers(stacked, config), params)
    tokens = tokens_like((2, 9), 0)
    run = jax.jit(lambda graphdef, params: nnx.merge(graphdef, params)(tokens)[0], static_argnums=0)
    assert rel_err(run(stacked_graphdef, stacked), run(graphdef, dense(params))) < 1e-5


def test_generation_by_batch_and_by_engine():
    config = EngineConfig(slots=((2, 32),), chunk=16)
    ours, theirs = models()
    [expected] = generate_tokens(theirs, [[1, 2, 3]], max_new_tokens=8, stop_ids=())
    assert generate_tokens(ours, [[1, 2, 3]], max_new_tokens=8, stop_ids=()) == [expected]
    engine = Engine(ours, config)
    [[answer]] = engine.complete([Request(prompt=[1, 2, 3], max_new_tokens=8, stop_ids=())])
    assert answer.tokens == expected.tokens
    of_arrays = memory_needed(config, ours.config, abstract_model(ours.config)[1])["parameters"]
    assert engine.memory["parameters"] == of_arrays + 4 * len(jax.tree.leaves(made()[2])) // 2


def test_checkpoints_keep_the_kinds(tmp_path):
    _, _, params = made()
    state = new_state(params, {}, optax.adam(1e-3))
    manager = CheckpointManager(tmp_path, keep=1)
    manager.save(1, state, {}, {})
    manager.close()
    reader = CheckpointManager(tmp_path, keep=None)
    restored, _ = reader.restore(jax.eval_shape(lambda: state))
    alone = reader.restore_params(jax.eval_shape(lambda: params))
    reader.close()
    assert isinstance(restored.opt_state[0].mu["embed"], Scaled)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    jax.tree.map(np.testing.assert_array_equal, alone, params)


def test_files_for_transformers_hold_the_arrays(tmp_path):
    both = models()
    for model, name in zip(both, ("ours", "theirs"), strict=True):
        save_hf(model, tmp_path / name)
    first, second = (sorted((tmp_path / name).iterdir()) for name in ("ours", "theirs"))
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    for ours, theirs in zip(*(to_state_dict(model).values() for model in both), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_kind_is_read_whole():
    with pytest.raises(TypeError, match=r"Scaled is indexed with 3; read it with \[...\]"):
        Scaled(jnp.ones((4, 2)), jnp.ones(()))[3]
