"""Mixtures of experts over meshes equal one device, and what devices exchange for them is counted.

Dimensions: B rows, T time, D width.
"""

import collections
import functools

import jax
import pytest
from helpers import KINDS, Net, long, optimizer_for
from meshes import collectives, mesh_of
from steps import ADAMW, B, T, assert_equal_steps, batch, one_step, place

from lfm_jax.pretrain.objective import next_token_training

MIXTURES = KINDS["moe"] | dict(
    num_experts=8, active_experts=3, num_heads=8, num_kv_heads=4, hidden_size=32, vocab_size=104, router_z_loss=1e-2,
    expert_bias_rate=1e-2,
)


@functools.cache
def net(**changes):
    return Net(**(MIXTURES | changes))


@functools.cache
def on_one_device():
    return one_step(net(), ADAMW, batch())


@pytest.mark.parametrize("sizes", [
    dict(expert=4, tensor=2), dict(fsdp=2, expert=2, context=2), long(dict(data=2, fsdp=2, tensor=2)),
], ids=str)
def test_a_step_with_experts_rows_time_and_units_split(sizes):
    """Parameters, metrics and the rule of the bias; in `make test-long` all experts on each device too."""
    with jax.set_mesh(mesh_of(**sizes)):
        assert_equal_steps(one_step(net(), ADAMW, batch()), on_one_device())


def test_the_products_of_accelerators_over_a_mesh():
    with jax.set_mesh(mesh_of(fsdp=2, expert=2, tensor=2)):
        assert_equal_steps(one_step(net(experts_impl="ragged"), ADAMW, batch()), on_one_device())


def compiled_step(**changes):
    model = net(**changes)
    with jax.set_mesh(mesh_of(expert=4)):
        training = next_token_training(model.config, optimizer_for(model.config, ADAMW), loss_chunk=64)
        return training.compiled_step().lower(training.abstract_state(), place(batch())).compile()


def test_what_a_mixture_exchanges():
    """Forward the rows with their choices and weights are gathered, and the sums scattered; backward the cotangents of
    the sums are gathered, and those of rows and weights scattered. No weight of an expert moves."""
    counts = []
    for mixtures in (1, 2):
        found = collectives(compiled_step(layer_types=("conv",) * 3, ffn_types=("swiglu",) * (3 - mixtures)
                                          + ("moe",) * mixtures))
        counts.append(collections.Counter((kind, dtype, shape) for kind, dtype, shape in found))
    more = counts[1] - counts[0]
    D, A = 32, 3
    whole, part = (B, T), (B // 4, T)
    gathered = {("all-gather", "f32", (*whole, D)): 2, ("all-gather", "s32", (*whole, A)): 1,
                ("all-gather", "f32", (*whole, A)): 1}
    scattered = {("reduce-scatter", "f32", (*part, D)): 2, ("reduce-scatter", "f32", (*part, A)): 1}
    # A CPU has no reduce-scatter: it sums, and each device keeps its part.
    summed = {("all-reduce", dtype, (*whole, size)): n for (_, dtype, (*_, size)), n in scattered.items()}
    moved = {key: n for key, n in more.items() if len(key[2]) == 3 and key[2][1] == T}
    assert moved in (gathered | scattered, gathered | summed)
    weights = [shape for _, _, shape in more if len(shape) == 3 and shape[1] != T]
    assert weights == []


def test_experts_that_do_not_divide_are_named():
    model = net(num_experts=6)
    said = r"experts \(6\) does not divide over expert=4"
    with jax.set_mesh(mesh_of(expert=4)), pytest.raises(ValueError, match=said):
        next_token_training(model.config, optimizer_for(model.config, ADAMW)).abstract_state()
