"""Training over meshes equals one device (loss, norms, every updated parameter), and what is exchanged is counted."""

import functools
import math

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import KINDS, Net, long, optimizer_for, rel_err, tokens_like
from jax.sharding import PartitionSpec as P
from meshes import collectives, mesh_of
from steps import ADAMW, B, T, assert_equal_steps, batch, one_step, place

from lfm_jax import ModelConfig
from lfm_jax.model import param_axes
from lfm_jax.pretrain.objective import next_token_training
from lfm_jax.sharding import shardings, spec
from lfm_jax.train.optimizer import OptimizerConfig

DATA_TENSOR, TENSOR_CONTEXT = dict(data=2, fsdp=2, tensor=2), dict(fsdp=2, tensor=2, context=2)
"""Between them every axis is split, and with others."""


EVERY = KINDS["every-operator"] | dict(num_heads=8, num_kv_heads=4, hidden_size=32, vocab_size=104, conv_bias=True)
# Newton-Schulz multiplies by about 3 in each of its steps what rounding left.
MUON = OptimizerConfig(peak_lr=1e-2, warmup_steps=0, schedule="constant", eps=1e-3, algorithm="muon")


@functools.cache
def net(**changes):
    return Net(**(EVERY | changes))


@functools.cache
def on_one_device(optimizer, micro_batches=1, evaluate=False, changes=()):
    return one_step(net(**dict(changes)), optimizer, batch(), micro_batches=micro_batches, evaluate=evaluate)


@pytest.mark.parametrize("sizes", [
    DATA_TENSOR, TENSOR_CONTEXT, long(dict(data=8)), long(dict(fsdp=8)), long(dict(context=8)),
], ids=str)
def test_a_step_of_adamw(sizes):
    """In `make test-long` each axis alone over all eight devices too."""
    with jax.set_mesh(mesh_of(**sizes)):
        mine = one_step(net(), ADAMW, batch(), evaluate=True)
    assert_equal_steps(mine, on_one_device(ADAMW, evaluate=True))


@pytest.mark.parametrize("sizes", [TENSOR_CONTEXT, long(DATA_TENSOR)], ids=str)
def test_a_step_of_muon(sizes):
    """In `make test-long` a mesh with rows over `data` too."""
    with jax.set_mesh(mesh_of(**sizes)):
        mine = one_step(net(), MUON, batch())
    assert_equal_steps(mine, on_one_device(MUON), 1e-4)


def test_a_step_of_lfm3():
    """Gates of heads are split as the heads are."""
    changes = KINDS["lfm3"] | dict(conv_bias=False)
    with jax.set_mesh(mesh_of(**TENSOR_CONTEXT)):
        mine = one_step(net(**changes), ADAMW, batch())
    assert_equal_steps(mine, on_one_device(ADAMW, changes=tuple(changes.items())))


@pytest.mark.parametrize("sizes", [dict(data=2, fsdp=4), long(TENSOR_CONTEXT)], ids=str)
def test_micro_batches(sizes):
    """In `make test-long` channels and time split too."""
    with jax.set_mesh(mesh_of(**sizes)):
        mine = one_step(net(), ADAMW, batch(), micro_batches=2)
    assert_equal_steps(mine, on_one_device(ADAMW, 2))
    alone = on_one_device(ADAMW, evaluate=True)
    assert rel_err(mine[1]["loss"], alone[1]["loss"]) < 1e-5


SCANNED = dict(layer_types=("conv", "full_attention") * 2 + ("recurrence",) * 2)


@pytest.mark.parametrize("remat", ["full", long("none"), long("ffn"), long("dots")])
def test_scanned_and_rematerialised_layers(remat):
    """In `make test-long` each way of making activations again, which tests/test_properties.py has on one device."""
    plain = on_one_device(ADAMW, changes=tuple(SCANNED.items()))
    with jax.set_mesh(mesh_of(fsdp=2, tensor=2, context=2)):
        mine = one_step(net(**SCANNED, scan_layers=True, remat=remat), ADAMW, batch())
    assert_equal_steps(mine, plain)


@pytest.mark.parametrize("tie", [True, long(False)])
def test_random_states_are_the_same_numbers_on_any_mesh_and_lie_where_they_should(tie):
    """In `make test-long` with a head of its own too."""
    config = net(tie_embedding=tie).config
    training = next_token_training(config, optimizer_for(config, MUON))
    alone = training.random_state(3)
    with jax.set_mesh(mesh_of(fsdp=2, tensor=2, context=2)):
        split, layout = training.random_state(3), training.abstract_state()
    for a, b, expected in zip(*map(jax.tree.leaves, (split, alone, layout)), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.sharding.is_equivalent_to(expected.sharding, a.ndim)
    embed = split.params["embed"]
    assert embed.addressable_shards[0].data.shape == (embed.shape[0] // 2, embed.shape[1] // 2)
    moments = [x for x in jax.tree.leaves(split.opt_state) if x.shape == embed.shape]
    assert moments
    assert all(x.sharding == embed.sharding for x in moments)


def test_what_does_not_divide_is_named():
    config = net().config.replace(num_kv_heads=2, vocab_size=101)
    with jax.set_mesh(mesh_of(tensor=4, fsdp=2)), pytest.raises(ValueError, match="does not fit the model") as error:
        next_token_training(config, optimizer_for(config, ADAMW)).abstract_state()
    assert "kv_heads (2) does not divide over tensor=4" in str(error.value)
    assert "vocab (101) does not divide over tensor=4" in str(error.value)


def compiled_step(config, sizes):
    """The optimised program of a step, and the parameters' shapes and layouts."""
    model = Net(**config)
    optimizer = optimizer_for(model.config, ADAMW)
    with jax.set_mesh(mesh_of(**sizes)):
        training = next_token_training(model.config, optimizer, loss_chunk=64)
        state = training.abstract_state()
        return training.compiled_step().lower(state, place(batch())).compile(), state.params


THREE = dict(layer_types=("conv", "full_attention", "recurrence"), num_kv_heads=4, vocab_size=104)


def test_fsdp_gathers_each_weight_once_and_no_activation():
    compiled, params = compiled_step(THREE, dict(fsdp=8))
    split = [x.shape for x in jax.tree.leaves(params) if "fsdp" in x.sharding.spec]
    found = [(dtype, shape) for kind, dtype, shape in collectives(compiled) if kind == "all-gather"]
    # Compilers may turn a matrix before they gather it.
    shapes = {tuple(sorted(shape)) for shape in split}
    assert {tuple(sorted(shape)) for dtype, shape in found if dtype == "f32"} <= shapes
    assert [shape for dtype, shape in found if dtype != "f32"] == [(B, T)]  # Token ids, to look up columns.
    moved = sum(math.prod(shape) for dtype, shape in found if dtype == "f32")
    on_paper = sum(math.prod(shape) for shape in split)
    assert moved == pytest.approx(on_paper, rel=0.1)


def test_data_parallel_gathers_nothing():
    compiled, _ = compiled_step(THREE, dict(data=8))
    assert {kind for kind, _, _ in collectives(compiled)} == {"all-reduce"}


@pytest.mark.parametrize("kind", ["conv", "recurrence"])
def test_channels_over_devices_exchange_nothing_inside_an_operator(kind):
    """A layer sums its two outputs forward and the gradients of its inputs (in_proj, w1, w3) backward."""
    sums = []
    for layers in (1, 2):
        compiled, _ = compiled_step(dict(layer_types=(kind,) * layers, vocab_size=104), dict(tensor=4, data=2))
        found = collectives(compiled)
        assert {kind for kind, _, _ in found} == {"all-reduce"}
        activations = [shape for _, _, shape in found if shape[:2] == (B // 2, T)]
        assert set(activations) == {(B // 2, T, 32)}
        sums.append(len(activations))
    assert sums[1] - sums[0] == 5


def test_specs_follow_the_table():
    assert spec("batch", "time") is None
    with jax.set_mesh(mesh_of(data=2, fsdp=2, tensor=2)):
        assert spec("batch", "time", None) == P(("data", "fsdp"), None, None)
        assert spec("vocab", "width") == P("tensor", "fsdp")
        layout = shardings(dict(a=np.zeros((4, 6))), dict(a=("heads", "width")))
    assert layout["a"].spec == P("tensor", "fsdp")


def test_every_parameter_has_axes():
    for config in (ModelConfig(), net().config, net(tie_embedding=False, recurrence="liquid").config):
        axes = param_axes(config)
        assert axes["embed"] == ("vocab", "width")
        assert all(isinstance(a, tuple) for a in jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple)))


def test_optax_updates_keep_layouts():
    model, optimizer = net(), optax.adamw(1e-3)
    with jax.set_mesh(mesh_of(fsdp=2, tensor=2, context=2)):
        training = next_token_training(model.config, optimizer, loss_chunk=16)
        state = training.placed_state(model.params)
        before = jax.tree.map(lambda x: x.sharding, state)
        state, _ = training.compiled_step()(state, place(batch()))
        assert jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state, before)


@pytest.mark.parametrize("sizes", [dict(fsdp=2, tensor=4), long(dict(tensor=2))], ids=str)
def test_prefill_and_decode_with_heads_and_channels_over_devices(sizes):
    """In `make test-long` with weights of whole width too."""
    model, tokens = net(), tokens_like((4, 12), 0)
    weights = jax.tree.map(np.asarray, model.params)  # Of no mesh, whichever was in use when they were made.

    def run(params, tokens):
        built = nnx.merge(model.graphdef, params)
        first, state = built(tokens[:, :8], state=built.init_state(4, 16), logits="last")
        chunk, state = built(tokens[:, 8:11], state=state)
        last, state = built(tokens[:, 11:], state=state)
        return first, chunk, last, state

    expected = jax.jit(run)(weights, tokens)
    with jax.set_mesh(mesh_of(**sizes)):
        params = jax.device_put(weights, shardings(weights, param_axes(model.config)))
        mine = jax.jit(run)(params, jax.device_put(tokens, P()))
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(float(np.abs(b).max()), 1))
    assert mine[3].layers[3].k_BSKH.sharding.spec == P(None, None, "tensor", None)
    assert mine[3].layers[1].tail_BVD.sharding.spec == P(None, None, "tensor")
