"""Training of an adapter: the model stays as it is to the bit and has no gradient, runs resume, a reference is seen."""

import dataclasses
import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import KINDS, Net, rel_err, tokens_like

from lfm_jax.adapters.config import LoRAConfig
from lfm_jax.adapters.trees import adapter_traits, init_adapter, num_adapter_params
from lfm_jax.kernels.logprobs import token_logprobs
from lfm_jax.pretrain.objective import NextToken, next_token_training
from lfm_jax.quant.weights import Quantized
from lfm_jax.stacking import stack_layers
from lfm_jax.train.budget import budget, training_flops_per_token
from lfm_jax.train.checkpoint import CHECKPOINTS
from lfm_jax.train.metrics import read_metrics
from lfm_jax.train.objective import Terms
from lfm_jax.train.optimizer import OptimizerConfig, make_optimizer
from lfm_jax.train.step import Training

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))

import pairs

LORA = LoRAConfig(rank=4)
B, T = 4, 16


def batch(high=97):
    tokens = tokens_like((B, T + 1), 0, high=high)
    return dict(tokens=tokens[:, :-1], targets=tokens[:, 1:], segment_ids=np.ones((B, T), np.int32),
                positions=np.tile(np.arange(T, dtype=np.int32), (B, 1)))


def training_of(config, lora=LORA, **settings):
    return next_token_training(config, optax.adam(1e-2), loss_chunk=B * T, lora=lora, **settings)


def test_the_model_stays_and_the_adapter_learns():
    """With layers that are scanned, dropout, micro-batches and a mixture, whose buffers stay too."""
    net = Net(layer_types=("conv", "full_attention") * 2, scan_layers=True)
    lora = LoRAConfig(rank=4, dropout=0.2, quantize="int8")
    training = training_of(net.config, lora, micro_batches=2)
    state, step = training.placed_state(jax.tree.map(np.asarray, net.params)), training.compiled_step()
    assert isinstance(state.frozen["blocks"][0]["operator"]["in_proj"], Quantized)
    assert sum(x.size for x in jax.tree.leaves(state.params)) == num_adapter_params(net.config, lora)
    before = jax.tree.map(np.array, state.frozen)
    losses = []
    for _ in range(8):
        state, metrics = step(state, batch())
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.5
    jax.tree.map(np.testing.assert_array_equal, before, state.frozen)
    shapes = {x.shape for x in jax.tree.leaves(state.opt_state) if x.ndim}
    assert shapes == {x.shape for x in jax.tree.leaves(state.params)}


def test_a_mixture_keeps_its_buffers():
    net = Net(**KINDS["moe"])
    training = training_of(net.config)
    state = training.placed_state(jax.tree.map(np.asarray, net.params))
    before = jax.tree.map(np.array, state.frozen)
    state, _ = training.compiled_step()(state, batch())
    jax.tree.map(np.testing.assert_array_equal, before, state.frozen)
    assert "feed_forward" in state.params["blocks"][0]
    assert "feed_forward" not in state.params["blocks"][1]
    with pytest.raises(ValueError, match=r"model\.expert_bias_rate changes a buffer"):
        training_of(net.config.replace(expert_bias_rate=1e-3))


def test_flops_are_those_of_two_passes():
    """Partitioned before differentiation: three passes would be half as much again."""
    sizes = dict(hidden_size=128, ffn_size=256, head_dim=32, vocab_size=512, layer_types=("conv", "full_attention"))
    net = Net(**sizes)
    data = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, batch()))

    def flops(program, *args):
        return program.lower(*args).compile().cost_analysis()["flops"]

    found = {}
    for name, lora in (("adapter", LoRAConfig(rank=2)), ("all", None)):
        training = dataclasses.replace(training_of(net.config, lora), optimizer=optax.sgd(1e-2))
        state = training.abstract_state()
        found[name] = flops(training.compiled_step(), state, data)
        forward = flops(training.compiled_evaluate(), (state.params, state.frozen), data)
        found[name] /= forward
    assert found["adapter"] < 2.3
    assert found["all"] > 2.8
    on_paper = training_flops_per_token(training_of(net.config, LoRAConfig(rank=2)), T) / net.config.flops_per_token(T)
    assert on_paper == pytest.approx(found["adapter"], rel=0.1)


def test_a_step_keeps_sums_and_not_their_parts():
    """The product of the model and that of the adapter, kept both for the way back, would be half as much again."""
    net = Net(hidden_size=64, ffn_size=512, head_dim=16, vocab_size=97, layer_types=("conv",) * 4)
    ones = np.ones((4, 128), np.int32)
    data = dict(tokens=ones, targets=ones, segment_ids=ones, positions=ones)
    compiled = {}
    for name, lora in (("adapter", LoRAConfig(rank=2)), ("all", None)):
        training = training_of(net.config, lora)
        memory = training.compiled_step().lower(training.abstract_state(), data).compile().memory_analysis()
        compiled[name] = memory.temp_size_in_bytes
    assert compiled["adapter"] < compiled["all"]


def test_frozen_weights_have_no_adapter():
    net = Net()
    training = training_of(net.config, freeze=("blocks.0.*", "blocks.*.feed_forward.*"))
    state = training.new_state(net.params)
    assert set(state.params["blocks"]) == {1, 2}
    assert set(state.params["blocks"][2]) == {"operator"}
    _, metrics = training.compiled_step()(jax.tree.map(jnp.copy, state), batch())
    assert metrics["grad_norm/conv"] > 0
    with pytest.raises(ValueError, match="leaves no adapter to train"):
        training_of(net.config, freeze=("blocks.*",)).new_state(net.params)


def test_an_adapter_and_rounded_weights_do_not_go_together():
    with pytest.raises(ValueError, match=r"model\.quantize rounds weights that are trained, and lora trains none"):
        training_of(Net().config.replace(quantize="int8"))
    with pytest.raises(ValueError, match=r"lora\.quantize: cannot quantise to int4:128.*\n.*32 inputs"):
        training_of(Net().config, LoRAConfig(quantize="int4:128"))


@pytest.mark.parametrize("pattern", [dict(rank_pattern={"in_proj": 4}), dict(alpha_pattern={"in_proj": 4.0})])
def test_a_run_has_no_patterns_as_no_recipe_could_hold_them(pattern):
    with pytest.raises(ValueError, match=rf"lora\.{next(iter(pattern))} is of adapters that are read"):
        pairs.config("x", lora=LoRAConfig(rank=2, **pattern))


def test_traits_reach_the_optimizer():
    """A and B decay, and Muon leaves them to AdamW."""
    net = Net()
    for algorithm in ("adamw", "muon"):
        config = OptimizerConfig(algorithm=algorithm, peak_lr=1e-2, warmup_steps=0, schedule="constant")
        optimizer = make_optimizer(config, 10, adapter_traits(net.config, LORA))
        params = init_adapter(net.config, LORA, jax.random.key(0))
        zeros = jax.tree.map(jnp.zeros_like, params)
        updates, _ = optimizer.update(zeros, optimizer.init(params), params)
        jax.tree.map(lambda u, w: np.testing.assert_allclose(u, -1e-3 * w, rtol=1e-5), updates, params)


# ---------------------------------------------------------------- runs


def losses(run_dir):
    return [record["loss"] for record in read_metrics(run_dir) if "loss" in record]


RUN = dict(lora=LoRAConfig(rank=2, dropout=0.3, quantize="int8"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return pairs.run(tmp_path_factory.mktemp("lora") / "whole", **RUN)


def test_a_resumed_run_is_the_same_to_the_bit(whole, tmp_path):
    """Dropout too; a checkpoint does not hold the model, which is made again and must be the same one."""
    half = pairs.run(tmp_path / "half", **RUN | dict(steps=pairs.SAVED))
    assert half.step == pairs.SAVED
    again = pairs.run(tmp_path / "half", **RUN)
    assert losses(again.run_dir) == losses(whole.run_dir)
    assert again.measured == whole.measured
    saved = [path.name for path in (whole.run_dir / CHECKPOINTS / f"{pairs.STEPS}").rglob("*")]
    assert not any("embed" in name for name in saved)
    with pytest.raises(ValueError, match=r"lora\.rank: 2 there, 3 here"):
        pairs.run(whole.run_dir, **RUN | dict(lora=LoRAConfig(rank=3, dropout=0.3, quantize="int8")))


def test_a_run_goes_on_from_the_weights_that_it_began_with(tmp_path, monkeypatch):
    weights = jax.tree.map(np.asarray, pairs.config("x").training().random_state(7).params)
    settings = dict(lora=LORA, steps=2)
    monkeypatch.setattr(pairs.Pairs, "weights", lambda self: weights)
    pairs.run(tmp_path / "run", **settings)
    weights["norm"]["weight"] = weights["norm"]["weight"] + 1e-6
    with pytest.raises(ValueError, match="began with other weights than are there now"):
        pairs.run(tmp_path / "run", **settings | dict(steps=3))


def test_the_budget_counts_neither_moments_nor_gradients_of_the_model():
    full, lora, narrow = (budget(pairs.config("x", lora=found), None) for found in (
        LoRAConfig(rank=0), LoRAConfig(rank=1), LoRAConfig(rank=1, quantize="int8")))
    params = num_adapter_params(pairs.config("x").model, LoRAConfig(rank=1))
    assert (lora.trained_params, lora.num_params) == (params, full.num_params)
    assert lora.parameters == full.parameters + 4 * params
    assert lora.gradients == 4 * params
    assert lora.optimizer < 8 * params + 100
    assert lora.model_flops < full.model_flops
    assert narrow.parameters < 0.4 * lora.parameters
    assert f"({params} trained)" in str(lora)


# ---------------------------------------------------------------- other models


@dataclasses.dataclass(frozen=True)
class NearTo(NextToken):
    """The square of what the log-probability of a token has moved from that of `others`."""

    others: tuple[str, ...] = ("reference",)

    def __call__(self, model, batch, others):
        scores = []
        for one in (model, *(others[name] for name in self.others)):
            hidden_BTD, aux = one.hidden(batch["tokens"], batch["positions"], batch["segment_ids"])
            scores.append((token_logprobs(hidden_BTD, one.head_VD, batch["targets"], chunk=self.loss_chunk), aux))
        (mine_BT, aux), (theirs_BT, _) = scores
        total = jnp.sum((mine_BT - theirs_BT) ** 2)
        return Terms(total, {"loss": total, "theirs": jnp.sum(theirs_BT)}, aux)


@functools.cache
def net():
    return Net()


def near_to(**settings):
    return Training(model=net().config, objective=NearTo(loss_chunk=B * T), optimizer=optax.adam(1e-2), **settings)


def test_the_reference_of_an_adapter_is_the_model_without_it():
    training = near_to(lora=LORA)
    state = training.placed_state(jax.tree.map(np.asarray, net().params))
    state = dataclasses.replace(state, params=jax.tree.map(lambda x: x + 0.05, state.params))
    step, found = training.compiled_step(), []
    for _ in range(3):
        state, metrics = step(state, batch())
        found.append(metrics)
    assert found[2]["loss"] < found[0]["loss"]
    assert found[2]["theirs"] == found[0]["theirs"]


def test_a_reference_beside_a_model_that_is_trained_whole():
    """It stays, is no part of checkpoints, and comes back beside what they hold."""
    training = near_to(others={"reference": net().config.replace(scan_layers=True)})
    weights = jax.tree.map(np.asarray, net().params)
    state = training.placed_state(weights, {"reference": weights})
    expected = stack_layers(net().params, net().config)
    step = training.compiled_step()
    state, first = step(state, batch())
    assert rel_err(first["loss"] + 1, 1.0) < 1e-9
    state = dataclasses.replace(state, params=jax.tree.map(lambda x: 1.01 * x, state.params))
    state, second = step(state, batch())
    assert second["loss"] > 0
    np.testing.assert_allclose(second["theirs"], first["theirs"], rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, state.others["reference"], expected)
    stored = training.stored(state)
    assert not stored.others
    kept = training.remade(weights, {"reference": weights}, 0)
    jax.tree.map(np.testing.assert_array_equal, training.completed(stored, kept), state)


def test_a_model_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="looks at other models, reference, which the run does not have"):
        near_to()
