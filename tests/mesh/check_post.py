"""A step of preference optimisation, and of distillation, over a mesh equals one device."""

import jax
import numpy as np
import optax
import pytest
from helpers import Net
from meshes import mesh_of
from steps import assert_equal_steps, batch, place

from lfm_jax.post.distill import TEACHER, Distillation, DistillConfig
from lfm_jax.post.dpo import REFERENCE, DPOConfig, Preference
from lfm_jax.post.stored import Frozen
from lfm_jax.pretrain.objective import NextToken
from lfm_jax.sharding import spec
from lfm_jax.train.step import Training

HYBRID = dict(layer_types=("conv", "full_attention"), hidden_size=32, num_heads=8, num_kv_heads=4, vocab_size=104)


def one_step(model, other, name, objective):
    """A step, and what the other model says as a frozen one."""
    training = Training(model=model.config, objective=objective, optimizer=optax.adam(1e-3, eps=1e-3),
                        others={name: other.config})
    weights = [jax.tree.map(np.asarray, net.params) for net in (model, other)]
    state = training.placed_state(weights[0], {name: weights[1]})
    data = batch()
    state, metrics = training.compiled_step()(state, place(data) if spec() is not None else data)
    says = ((lambda model, batch: {"x": objective.logprobs(model, batch)}) if name == REFERENCE else
            (lambda model, batch: {"x": objective.best(model, batch).logprobs_BTK}))
    alone = Training(model=other.config, objective=NextToken(), optimizer=optax.identity())
    said = Frozen(alone, weights[1], says, *data["tokens"].shape)(data)["x"]
    return jax.tree.map(np.asarray, (state, metrics)), said


@pytest.mark.parametrize(("name", "objective"), [
    (REFERENCE, Preference(dpo=DPOConfig(loss="sigmoid_norm", beta=1.0, reference="model"), loss_chunk=16)),
    (TEACHER, Distillation(distill=DistillConfig(teacher="x", top_k=4, cross_entropy=0.5), loss_chunk=16)),
], ids=["dpo", "distill"])
def test_a_step(name, objective):
    model, other = Net(**HYBRID), Net(**HYBRID, seed=1)
    alone, said = one_step(model, other, name, objective)
    with jax.set_mesh(mesh_of(fsdp=2, tensor=2, context=2)):
        mine, said_there = one_step(model, other, name, objective)
    assert_equal_steps(mine, alone, 1e-4)
    np.testing.assert_allclose(said_there, said, atol=1e-4)
