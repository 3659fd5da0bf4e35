"""The mixture of experts by itself: its forms against float64 numpy, its reports, its rule, and how runs treat it.

Dimensions: B rows, T time, E experts.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import nnx
from helpers import Net, assert_place_in_the_batch_is_nothing, optimizer_for, rel_err, tokens_like

from lfm_jax.feed_forward.moe import MoE, balanced
from lfm_jax.pretrain.objective import next_token_training
from lfm_jax.testing import tiny_config
from lfm_jax.train.budget import training_flops_per_token
from lfm_jax.train.optimizer import OptimizerConfig

E, A = 7, 3
SIZES = dict(ffn_types=("moe",), num_experts=E, active_experts=A, expert_size=9, hidden_size=6)


def mixture(**changes):
    """A mixture with a bias that matters, its config, and its parameters in float64."""
    config = tiny_config(**SIZES | changes)
    moe = MoE(config, rngs=nnx.Rngs(0))
    params = nnx.to_pure_dict(nnx.state(moe, nnx.Param))
    if config.expert_bias:
        params["expert_bias"] = jnp.linspace(-0.3, 0.3, E)
        moe.expert_bias[...] = params["expert_bias"]
    return moe, config, {name: np.asarray(w, np.float64) for name, w in params.items()}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("impl", ["dense", "ragged", "blocks"])
@pytest.mark.parametrize("form", [{}, dict(expert_bias=False), dict(normed_weights=False, expert_scale=2.5)], ids=str)
def test_forms_equal_float64(form, impl):
    moe, config, params = mixture(experts_impl=impl, **form)
    x_BTD = normal(2, 11, 6)
    y_BTD, _ = moe(jnp.asarray(x_BTD), segment_ids_BT=None)
    for row in range(2):
        assert rel_err(y_BTD[row], reference.moe(params, x_BTD[row].astype(np.float64), config)) < 1e-5
    assert moe(jnp.asarray(x_BTD, jnp.bfloat16), segment_ids_BT=None)[0].dtype == jnp.bfloat16


def test_a_row_does_not_depend_on_its_place():
    config = tiny_config(**SIZES | dict(num_experts=32, active_experts=4, hidden_size=256, init_std=0.06))
    graphdef, params = nnx.split(MoE(config, rngs=nnx.Rngs(0)))
    run = jax.jit(lambda x_BTD: nnx.merge(graphdef, params)(x_BTD, segment_ids_BT=None)[0])
    assert_place_in_the_batch_is_nothing(run, 256)


def test_of_equal_scores_the_first_experts_are_chosen():
    moe, config, params = mixture(expert_bias=False)
    moe.router[...] = params["router"] = jnp.zeros_like(moe.router[...])
    x_BTD = normal(1, 5, 6)
    y_BTD, reports = moe(jnp.asarray(x_BTD), segment_ids_BT=None)
    np.testing.assert_array_equal(reports["load"][0] > 0, np.broadcast_to(np.arange(E) < A, (5, E)))
    assert rel_err(y_BTD[0], reference.moe({k: np.asarray(v, np.float64) for k, v in params.items()},
                                           x_BTD[0].astype(np.float64), config)) < 1e-5


def test_reports_are_of_real_tokens_only():
    model = Net(layer_types=("conv", "conv"), **SIZES | dict(hidden_size=32, router_z_loss=0.1))
    tokens, ids = tokens_like((2, 10), 0), np.asarray([[1] * 6 + [0] * 4, [1] * 3 + [2] * 7], np.int32)
    built = nnx.merge(model.graphdef, model.params)
    _, packed = built.hidden(tokens, None, jnp.asarray(ids))
    alone = [built.hidden(tokens[row : row + 1, where], None, None)[1].reports
             for row, where in ((0, slice(6)), (1, slice(3)), (1, slice(3, 10)))]
    assert packed.reports["moe/load"].shape == (2, E)
    np.testing.assert_allclose(jnp.sum(packed.reports["moe/load"], axis=-1), 16, rtol=1e-6)
    for name, total in packed.reports.items():
        np.testing.assert_allclose(total, sum(part[name] for part in alone), rtol=1e-5, err_msg=name)
    assert float(packed.loss) == pytest.approx(float(jnp.sum(packed.reports["moe/loss"])))


def test_entropy_and_z_loss_are_their_formulas():
    moe, _, params = mixture(router_z_loss=0.5)
    x_BTD = normal(1, 4, 6)
    _, reports = moe(jnp.asarray(x_BTD), segment_ids_BT=None)
    scores_TE = x_BTD[0].astype(np.float64) @ params["router"].T
    share_TE = 1 / (1 + np.exp(-scores_TE))
    share_TE /= share_TE.sum(-1, keepdims=True)
    np.testing.assert_allclose(reports["entropy"][0], -np.sum(share_TE * np.log(share_TE), axis=-1), rtol=1e-5)
    np.testing.assert_allclose(reports["loss"][0], 0.5 * np.log(np.exp(scores_TE).sum(-1)) ** 2, rtol=1e-5)


def test_the_rule_of_the_bias():
    config = tiny_config(**SIZES | dict(expert_bias_rate=0.25))
    load_E = jnp.asarray([1.0, 1, 1, 1, 1, 1, 2]) / 8
    bias_E = balanced(jnp.arange(E, dtype=jnp.float32), {"load": load_E}, config)
    np.testing.assert_allclose(bias_E, np.arange(E) + 0.25 * np.asarray([1, 1, 1, 1, 1, 1, -1]))


def trained(steps, **changes):
    """The state after some steps on the same tokens, and the metrics of each."""
    model = Net(layer_types=("conv", "conv"), **SIZES | dict(hidden_size=32) | changes)
    optimizer = OptimizerConfig(peak_lr=1e-3, warmup_steps=0, schedule="constant")
    training = next_token_training(model.config, optimizer_for(model.config, optimizer), loss_chunk=64)
    state, step, found = training.placed_state(model.params), training.compiled_step(), []
    for seed in range(steps):
        batch = dict(tokens=tokens_like((4, 16), seed), targets=tokens_like((4, 16), seed + 1), segment_ids=None,
                     positions=None)
        state, metrics = step(state, batch)
        found.append({name: float(x) for name, x in metrics.items()})
    return model, state, found


def test_the_rule_evens_the_load():
    """Weights change too slowly here to do it. Even is 1/7 of the choices for each of 7 experts."""
    even = 1 / E
    (_, _, still), (_, _, ruled) = trained(60, expert_bias_rate=0.0), trained(60, expert_bias_rate=0.02)
    for layer in (0, 1):
        name = f"moe/load/largest/{layer}"
        assert ruled[-1][name] - even < 0.5 * (still[-1][name] - even)
        assert ruled[-1][f"moe/load/least/{layer}"] > still[-1][f"moe/load/least/{layer}"]


def test_the_bias_is_no_business_of_the_optimizer():
    model, state, metrics = trained(2)
    held = [state.frozen["blocks"][i]["feed_forward"]["expert_bias"] for i in (0, 1)]
    for i, bias_E in enumerate(held):
        np.testing.assert_array_equal(bias_E, model.params["blocks"][i]["feed_forward"]["expert_bias"])
    assert all(x.shape != (E,) for x in jax.tree.leaves(state.opt_state))
    assert {"moe/entropy", "moe/entropy/0", "moe/load/largest/1", "moe/load/least/1"} <= metrics[0].keys()
    assert "moe/loss" not in metrics[0]


def test_flops_are_those_of_active_experts_frozen_ones_too():
    config = tiny_config(layer_types=("conv",), **SIZES | dict(hidden_size=32, expert_size=300))
    optimizer = optimizer_for(config, OptimizerConfig(peak_lr=1e-3, warmup_steps=0))
    training = next_token_training(config, optimizer)
    assert training_flops_per_token(training, 8) == 3 * config.flops_per_token(8)
    frozen = dataclasses.replace(training, freeze=("blocks.*.feed_forward.w*",))
    experts = 2 * A * 3 * 32 * 300
    assert training_flops_per_token(frozen, 8) == pytest.approx(3 * config.flops_per_token(8) - experts, rel=1e-3)
