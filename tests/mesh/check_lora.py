"""Training of adapters over meshes equals one device: narrow base, dropout, layers that are scanned."""

import jax
import numpy as np
import optax
import pytest
from helpers import KINDS, Net, long, rel_err
from meshes import mesh_of
from steps import assert_equal_steps, batch, place

from lfm_jax.adapters.config import LoRAConfig
from lfm_jax.pretrain.objective import next_token_training
from lfm_jax.sharding import spec
from lfm_jax.train.state import unstacked

HYBRID = dict(layer_types=("conv", "full_attention") * 2, hidden_size=32, num_heads=8, num_kv_heads=4, vocab_size=104)
EVERY = KINDS["every-operator"] | dict(num_heads=8, num_kv_heads=4, vocab_size=104)
MESH = dict(fsdp=2, tensor=2, context=2)


def one_step(model, lora, **settings):
    training = next_token_training(model.config, optax.adam(1e-3, eps=1e-3), loss_chunk=16, lora=lora, **settings)
    data = place(batch()) if spec() is not None else batch()
    state, step = training.placed_state(jax.tree.map(np.asarray, model.params)), training.compiled_step()
    for _ in range(2):  # B is zero in the first.
        state, metrics = step(state, data)
    layout = training.abstract_state()
    assert all(x.sharding.is_equivalent_to(like.sharding, x.ndim) for x, like in zip(
        jax.tree.leaves(state), jax.tree.leaves(layout), strict=True) if like.sharding is not None)
    return jax.tree.map(np.asarray, (unstacked(training.stored(state), model.config), metrics))


@pytest.mark.parametrize(("changes", "lora", "settings", "sizes"), [
    (HYBRID | dict(scan_layers=True, remat="full"), LoRAConfig(rank=2, dropout=0.2, quantize="int8"),
     dict(micro_batches=2), MESH),
    long(EVERY, LoRAConfig(rank=2), {}, dict(data=2, fsdp=2, tensor=2)),
    long(HYBRID | dict(hidden_size=64, ffn_size=128), LoRAConfig(rank=2, quantize="int8:32"), {},
         dict(data=2, fsdp=2, tensor=2)),
], ids=["scanned", "every-operator", "groups"])
def test_a_step(changes, lora, settings, sizes):
    """In `make test-long` every operator, and groups of inputs that share a scale."""
    model = Net(**changes)
    alone = one_step(model, lora, **settings)
    with jax.set_mesh(mesh_of(**sizes)):
        mine = one_step(model, lora, **settings)
    assert_equal_steps(mine, alone, 3e-4)  # Of two steps by Adam, which divides rounding by small gradients.


def test_random_states_are_the_same_numbers():
    model = Net(**HYBRID)
    training = next_token_training(model.config, optax.adam(1e-3), lora=LoRAConfig(rank=2, quantize="int8"))
    alone = training.random_state(3)
    with jax.set_mesh(mesh_of(**MESH)):
        split = training.random_state(3)
    a, b = split.params["blocks"][1]["operator"]["out_proj"].values()
    assert a.addressable_shards[0].data.size == a.size // 2  # Heads over `tensor`.
    assert b.addressable_shards[0].data.size == b.size // 2  # Width over `fsdp`.
    assert all(rel_err(x, y) < 1e-6 for x, y in zip(*map(jax.tree.leaves, (split.params, alone.params)), strict=True)
               if np.any(y))
    jax.tree.map(np.testing.assert_array_equal, split.frozen["embed"].values, alone.frozen["embed"].values)
