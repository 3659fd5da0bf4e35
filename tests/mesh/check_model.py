"""A whole model with time split over devices equals one device: hidden states, loss, gradients, an optimizer step."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import KINDS, Net, long, rel_err, tokens_like
from jax.sharding import PartitionSpec as P
from meshes import collectives, mesh_of

from lfm_jax.data.batch import LOSS_IGNORE
from lfm_jax.feed_forward.swiglu import SwiGLU
from lfm_jax.kinds import FEED_FORWARDS
from lfm_jax.model import abstract_model, param_axes
from lfm_jax.pretrain.objective import NextToken, next_token_training
from lfm_jax.sharding import shardings
from lfm_jax.stacking import stack_layers

B, T = 2, 32
KIND = KINDS["every-operator"] | dict(conv_gates="both", num_kv_heads=4)
TOKENS = P(("data", "fsdp"), "context")


def batch():
    ids = np.asarray([[1] * 13 + [2] * 2 + [3] * 17, [1] * 5 + [2] * 6 + [0] * 21], np.int32)
    positions = np.stack([np.concatenate([np.arange(n) for n in row]) for row in ((13, 2, 17), (5, 6, 21))])
    targets = np.where((ids != 0) & (np.roll(ids, -1, 1) == ids), tokens_like((B, T), 1), LOSS_IGNORE)
    return dict(tokens=tokens_like((B, T), 0), targets=targets, segment_ids=ids, positions=positions.astype(np.int32))


@functools.cache
def net(kind):
    return Net(**(KIND if kind == "every-operator" else KINDS[kind]))


def loss_and_gradients(model, params, data):
    def loss(params, data):
        objective = NextToken(loss_chunk=16)
        return objective(nnx.merge(model.graphdef, params), data).total / objective.weight(data)

    return jax.jit(jax.value_and_grad(loss))(params, data)


@functools.cache
def on_one_device(kind):
    return loss_and_gradients(net(kind), net(kind).params, batch())


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [("every-operator", dict(context=8)), ("every-operator", dict(data=2, context=4)),
     *(long("every-operator", dict(context=n)) for n in (2, 4)), ("liquid", dict(context=4)),
     long("lti", dict(context=8))],
)
def test_loss_and_the_gradient_of_every_parameter(kind, sizes):
    """In `make test-long` other lengths of shards, and the recurrence whose forgetting is constant."""
    expected, grads = on_one_device(kind)
    with jax.set_mesh(mesh_of(**sizes)):
        placed = {name: jax.device_put(x, TOKENS) for name, x in batch().items()}
        split, split_grads = loss_and_gradients(net(kind), jax.device_put(net(kind).params, P()), placed)
    assert rel_err(split, expected) < 1e-5
    expected_grads = jax.tree_util.tree_leaves_with_path(grads)
    for (path, theirs), mine in zip(expected_grads, jax.tree.leaves(split_grads), strict=True):
        assert rel_err(mine, theirs) < 1e-5, jax.tree_util.keystr(path)


class Reporting(SwiGLU):
    def __call__(self, x_BTD, *, segment_ids_BT):
        y_BTD, _ = super().__call__(x_BTD, segment_ids_BT=segment_ids_BT)
        y32_BTD = y_BTD.astype(jnp.float32)
        size_BT = jnp.mean(y32_BTD**2, axis=-1)
        return y_BTD, {"loss": size_BT, "two": jnp.stack([size_BT, jnp.sum(y32_BTD, axis=-1)], axis=-1)}


def test_reports_of_layers_and_the_gradient_of_their_loss():
    FEED_FORWARDS.register(dataclasses.replace(FEED_FORWARDS["swiglu"], name="reporting", module=Reporting))
    try:
        model = Net(layer_types=("conv",) * 3, ffn_types=("reporting",), scan_layers=True, remat="full")
        graphdef, _ = abstract_model(model.config, stacked=True)
        params = stack_layers(model.params, model.config)

        @jax.jit
        def run(params, data):
            def loss(params):
                _, aux = nnx.merge(graphdef, params).hidden(data["tokens"], data["positions"], data["segment_ids"])
                return aux.loss, aux.reports

            return jax.grad(loss, has_aux=True)(params)

        expected = run(params, batch())
        with jax.set_mesh(mesh_of(data=2, context=4)):
            placed = {name: jax.device_put(x, TOKENS) for name, x in batch().items()}
            found = run(jax.device_put(params, P()), placed)
    finally:
        FEED_FORWARDS.remove("reporting")
    assert expected[1]["reporting/two"].shape == (3, 2)
    for (path, theirs), mine in zip(jax.tree.leaves_with_path(expected), jax.tree.leaves(found), strict=True):
        if np.any(theirs):  # The last norm has no part in it.
            assert rel_err(mine, theirs) < 1e-5, jax.tree_util.keystr(path)


@pytest.mark.long
def test_a_training_step_along_time():
    """Adds rows and time split and nothing else to the steps of check_train.py."""
    model, data = Net(**KIND), batch()
    optimizer = optax.adamw(1e-2)
    training = next_token_training(model.config, optimizer, loss_chunk=16)
    step = training.compiled_step()
    alone, metrics = step(training.new_state(jax.tree.map(jnp.copy, model.params)), data)
    with jax.set_mesh(mesh_of(data=2, context=4)):
        placed = {name: jax.device_put(x, TOKENS) for name, x in data.items()}
        state = jax.jit(training.new_state)(jax.device_put(model.params, P()))
        split, split_metrics = step(state, placed)
    assert rel_err(split_metrics["loss"], metrics["loss"]) < 1e-5
    assert rel_err(split_metrics["grad_norm"], metrics["grad_norm"]) < 1e-5
    for mine, theirs in zip(jax.tree.leaves(split.params), jax.tree.leaves(alone.params), strict=True):
        assert rel_err(mine, theirs) < 1e-4  # AdamW divides by a gradient's own size, also where that is rounding.


def test_no_layer_but_attention_moves_the_sequence():
    model = Net(layer_types=("conv", "recurrence", "conv"))
    with jax.set_mesh(mesh_of(context=8)):
        tokens = jax.device_put(batch()["tokens"], TOKENS)
        params = jax.device_put(model.params, P())
        run = jax.jit(lambda params, tokens: nnx.merge(model.graphdef, params)(tokens, logits=None)[0])
        moved = collectives(run.lower(params, tokens).compile())
    D = model.config.hidden_size
    assert moved
    assert all(shape in ((B, 2, D), (B, 1, D), (B, D)) for _, dtype, shape in moved if dtype == "f32")


def test_what_time_over_devices_does_not_go_with_is_refused():
    model, data = Net(**KIND), batch()
    net = nnx.merge(model.graphdef, model.params)
    with jax.set_mesh(mesh_of(context=4)):
        tokens, ids = (jax.device_put(data[name], TOKENS) for name in ("tokens", "segment_ids"))
        for kwargs in (dict(state=net.init_state(B, T)), dict(logits="last"), dict(segment_ids_BT=ids)):
            with pytest.raises(ValueError, match="tokens_BT is split along time; that goes without a state"):
                net(tokens, **kwargs)


def test_a_mesh_of_automatic_axes_is_left_to_the_compiler():
    model, data = Net(**KIND), batch()
    expected, _ = loss_and_gradients(model, model.params, data)
    devices = np.asarray(jax.devices()[:2])
    with jax.set_mesh(jax.sharding.Mesh(devices, ("data",), axis_types=(jax.sharding.AxisType.Auto,))):
        placed = {name: jax.device_put(x, P("data")) for name, x in data.items()}
        split, _ = loss_and_gradients(model, jax.device_put(model.params, P()), placed)
    assert rel_err(split, expected) < 1e-5


@pytest.mark.parametrize(("sizes", "padding"), [
    (dict(data=2), "any"), (dict(data=1), "right"), long(dict(data=1), "any"), long(dict(data=2), "right"),
], ids=str)
def test_rows_over_devices_and_a_mesh_of_one(sizes, padding):
    """The same specs as for time over devices, on meshes whose `context` is one device.

    In `make test-long` each mesh with each promise about padding.
    """
    model, data = Net(layer_types=("conv", "recurrence", "full_attention")), batch()
    expected, _ = model(data["tokens"], segment_ids=data["segment_ids"])
    with jax.set_mesh(mesh_of(**sizes)):
        tokens, ids = (jax.device_put(data[name], TOKENS) for name in ("tokens", "segment_ids"))
        params = jax.device_put(model.params, P())
        run = jax.jit(lambda params, tokens, ids: nnx.merge(model.graphdef, params)(
            tokens, segment_ids_BT=ids, logits=None, padding=padding)[0])
        hidden = np.asarray(run(params, tokens, ids))
    real = data["segment_ids"] != 0
    assert rel_err(hidden[real], expected[real]) < 1e-5


def test_an_encoder_with_rows_and_heads_over_devices():
    model, data = Net(causal=False, num_kv_heads=4, conv_bias=True, vocab_size=98), batch()
    expected, _ = model(data["tokens"], segment_ids=data["segment_ids"])

    @jax.jit
    def run(params, tokens, ids):
        return nnx.merge(model.graphdef, params)(tokens, segment_ids_BT=ids, logits=None, padding="right")[0]

    def split(sizes):
        with jax.set_mesh(mesh_of(**sizes)):
            tokens, ids = (jax.device_put(data[name], TOKENS) for name in ("tokens", "segment_ids"))
            params = jax.device_put(model.params, shardings(model.params, param_axes(model.config)))
            return np.asarray(run(params, tokens, ids))

    real = data["segment_ids"] != 0
    assert rel_err(split(dict(data=2, tensor=2))[real], expected[real]) < 1e-5
    with pytest.raises(ValueError, match="causal=False cannot split time over `context`; give it whole rows"):
        split(dict(context=2))


def test_what_rows_over_devices_do_not_go_with_is_refused():
    model, data = Net(**KIND), batch()
    with jax.set_mesh(mesh_of(data=2)):
        placed = {name: jax.device_put(x, TOKENS) for name, x in data.items()}
        net = nnx.merge(model.graphdef, model.params)
        with pytest.raises(ValueError, match="with a decode state give every device all rows"):
            net(placed["tokens"], state=net.init_state(B, T))
