"""Steps that compute with rounded weights: what they compute, what is trained, and what a file of the run holds."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import tokens_like

import lfm_jax as lfm
from lfm_jax.cli import main
from lfm_jax.convert.gguf.models import load_gguf
from lfm_jax.model import abstract_model, param_traits
from lfm_jax.pretrain.objective import next_token_training
from lfm_jax.stacking import unstack_layers
from lfm_jax.testing import tiny_config
from lfm_jax.train import checkpoint, rounding
from lfm_jax.train.optimizer import OptimizerConfig, make_optimizer
from lfm_jax.train.rounding import rounded_weights
from lfm_jax.weight_kinds import WeightKind

WIDE = dict(hidden_size=256, ffn_size=256, num_heads=8, head_dim=32, vocab_size=97,
            layer_types=("conv", "full_attention"))
MOE = dict(ffn_types=("swiglu", "moe"), num_experts=4, active_experts=2,
           expert_size=256)


def config_of(**changes):
    return tiny_config(**WIDE | changes)


def weights_of(config):
    rng = np.random.default_rng(0)
    _, abstract = abstract_model(config, stacked=config.scan_layers)
    return jax.tree.map(lambda w: jnp.asarray(rng.standard_normal(w.shape) * 0.06, w.dtype), abstract)


def model_of(config):
    return nnx.merge(abstract_model(config)[0], weights_of(config))


@functools.cache
def trained(**changes):
    """The state after a step, and the one before."""
    config = config_of(**changes)
    optimizer = make_optimizer(OptimizerConfig(schedule="constant", warmup_steps=0), 10,
                               param_traits(config, stacked=config.scan_layers))
    training = next_token_training(config, optimizer)
    state = training.new_state(weights_of(config))
    tokens = tokens_like((2, 16), 0)
    batch = dict(tokens=tokens, targets=jnp.roll(tokens, -1, axis=1), segment_ids=None,
                 positions=jnp.broadcast_to(jnp.arange(16), (2, 16)))
    return training, batch, state, *jax.jit(training.step)(state, batch)


def widened(model):
    return jax.tree.map(lambda w: w.astype(jnp.float32), nnx.to_pure_dict(nnx.state(model, nnx.Param)),
                        is_leaf=lambda w: isinstance(w, WeightKind))


def equal(x, y):
    jax.tree.map(np.testing.assert_array_equal, x, y)


@pytest.mark.parametrize("changes", [dict(quantize="int8"), dict(quantize="int4:32"), MOE | dict(quantize="int4")],
                         ids=["int8", "int4:32", "moe"])
def test_kinds_of_quantize_are_those_of_a_model_in_memory(changes):
    config = config_of(**changes)
    model = model_of(config)
    kind, _, group = config.quantize.partition(":")
    equal(rounded_weights(config, nnx.to_pure_dict(nnx.state(model, nnx.Param))),
          widened(lfm.quantize(model, kind, int(group) if group else None)))


@pytest.mark.parametrize("changes", [dict(quantize="Q4_0"), dict(quantize="Q8_0"), MOE | dict(quantize="Q8_0")],
                         ids=["Q4_0", "Q8_0", "moe"])
def test_types_of_files_are_those_of_a_file(tmp_path, changes):
    """Q4_0 has its table in Q6_K, which rounding again would move; everything else is a fixed point."""
    config = config_of(**changes)
    model = model_of(config)
    weights = rounded_weights(config, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    lfm.save_gguf(nnx.merge(nnx.graphdef(model), weights), tmp_path / "m.gguf", type=config.quantize)
    loaded = widened(load_gguf(tmp_path / "m.gguf", "float32")[0])
    if not rounding.is_fixed(config):
        lfm.save_gguf(model, tmp_path / "trained.gguf", type=config.quantize)
        loaded["embed"] = widened(load_gguf(tmp_path / "trained.gguf", "float32")[0])["embed"]
    equal(weights, loaded)


@pytest.mark.parametrize("name", ["Q4_0", "int4:32"])
def test_a_step_computes_with_rounded_weights_and_trains_the_others(name):
    training, batch, before, after, metrics = trained(quantize=name)
    plain, _, _, plain_after, plain_metrics = trained()
    rounded = plain.new_state(rounded_weights(training.model, before.params))
    _, expected = jax.jit(plain.step)(rounded, batch)
    np.testing.assert_array_equal(metrics["loss"], expected["loss"])
    np.testing.assert_allclose(metrics["grad_norm"], expected["grad_norm"], rtol=1e-6)
    assert metrics["loss"] != plain_metrics["loss"]
    kept = after.params["blocks"][0]["feed_forward"]["w1"]
    assert not np.array_equal(kept, rounded_weights(training.model, after.params)["blocks"][0]["feed_forward"]["w1"])
    equal(jax.tree.map(jnp.shape, after.params), jax.tree.map(jnp.shape, plain_after.params))
    sums, weight = training.compiled_evaluate()((before.params, before.frozen), batch)
    np.testing.assert_allclose(sums["loss"] / weight, metrics["loss"], rtol=1e-6)


def test_stacked_layers_are_rounded_alike():
    changes = dict(layer_types=("conv", "conv", "full_attention"), quantize="Q4_K_M")
    config = config_of(scan_layers=True, **changes)
    _, _, state, _, metrics = trained(scan_layers=True, **changes)
    flat = unstack_layers(state.params, config)
    equal(unstack_layers(rounded_weights(config, state.params), config),
          rounded_weights(config.replace(scan_layers=False), flat))
    assert np.isfinite(metrics["loss"])


@pytest.mark.parametrize(("changes", "match"), [
    (dict(quantize="Q3_K"), "choose one of F32, .*Q4_0, int8, int8:32, .*int4:128$"),
    (dict(quantize="int4:64"), "choose one of"), (dict(quantize="w8a8"), "choose one of"),
    (dict(quantize="int8:128", ffn_size=200), "quantise to int8:128; choose another group(.|\n)*w2 has 200 inputs"),
    (dict(quantize="Q4_0", conv_bias=True), "model.quantize Q4_0: lfm2 in llama.cpp has no conv_bias"),
    (dict(quantize="Q8_0", param_dtype="bfloat16"), "param_dtype is bfloat16, which does not hold numbers of Q8_0"),
])
def test_what_cannot_be_trained_so_is_refused(changes, match):
    [problem] = rounding.problems(config_of(**changes))
    assert re.search(match, problem)


def test_no_rounding_is_no_work():
    config = config_of()
    weights = {"embed": object()}
    assert rounded_weights(config, weights) is weights
    assert rounding.problems(config) == []


@pytest.mark.parametrize("name", ["Q4_K_M", "Q8_0", "int4:32"])
def test_what_is_loaded_and_exported_of_a_run_is_what_its_steps_computed_with(tmp_path, monkeypatch, capsys, name):
    """Also where rounding twice would move weights, and a file of the run is made of them."""
    config = config_of(quantize=name)

    class Manager:
        """Of a run whose last checkpoint has these weights."""

        def __init__(self, run_dir, keep):
            pass

        def latest_step(self):
            return 1

        def metadata(self):
            return {"config": {"model": dataclasses.asdict(config)}}

        def restore_params(self, abstract_params):
            return weights_of(config)

        def close(self):
            pass

    monkeypatch.setattr(checkpoint, "CheckpointManager", Manager)
    (tmp_path / "checkpoints").mkdir()
    expected = rounded_weights(config, weights_of(config))
    model, _ = lfm.load(tmp_path)
    equal(widened(model), expected)
    assert model.config.quantize == ""
    if name.startswith("Q"):
        with pytest.raises(SystemExit, match=r"^0$"):
            main(["export", str(tmp_path), str(tmp_path / "m.gguf")])
        equal(widened(load_gguf(tmp_path / "m.gguf", "float32")[0]), expected)
        with pytest.raises(SystemExit, match=r"^2$"):
            main(["export", str(tmp_path), str(tmp_path / "other.gguf"), "--imatrix", "some.gguf"])
        assert "rounded without importance" in capsys.readouterr().err
