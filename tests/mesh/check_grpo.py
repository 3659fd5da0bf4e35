"""Reinforcement learning over a mesh: answers and steps of one device, weights on the devices alone, resuming."""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

sys.path.insert(0, str(Path(__file__).parents[1] / "post"))
import rl_runs
from chats import write
from helpers import KINDS
from meshes import mesh_of
from tuning import load

from lfm_jax.engine.placement import gathered, place_replicas, replica_mesh
from lfm_jax.model import param_axes
from lfm_jax.post.grpo import GRPO
from lfm_jax.post.run import tune
from lfm_jax.sharding import shardings
from lfm_jax.testing import tiny_model
from lfm_jax.train.metrics import read_metrics
from lfm_jax.train.processes import BatchPlacer

STEPS, SAVED = 4, 3
"""Of two updates on a rollout each; the checkpoint lies between those on the second."""


class Killed(Exception):
    pass


class Kept:
    """Rollouts whose batches are kept; with the last of them the run may die."""

    def __init__(self, rollouts, dies_with=0):
        self.rollouts, self.dies_with, self.batches = rollouts, dies_with, []
        self.get_state, self.set_state = rollouts.get_state, rollouts.set_state

    def next_for(self, state):
        found = self.rollouts.next_for(state)
        self.batches.append(found[0])
        if len(self.batches) == self.dies_with:
            raise Killed
        return found


def recipe(root, name, **changes):
    # Two prompts a rollout: of the engine's copies of the model only as many compile programs.
    fields = dict(steps=STEPS, checkpoint_every=SAVED, mesh={"fsdp": 2, "tensor": 2}, optimizer__eps=1e-3,
                  micro_batches=1, grpo__generations=8, grpo__slots=8, grpo__samples_every=0)
    return load(rl_runs.recipe(root, root / name, **(fields | changes)))


def run(config, monkeypatch, dies_with=0):
    """(records of the steps, batches) of a run over all eight devices."""
    made, train_data = [], GRPO.train_data

    def kept(self, rows):
        made.append(Kept(train_data(self, rows), dies_with))
        return made[0]

    with monkeypatch.context() as patch:
        patch.setattr(GRPO, "train_data", kept)
        if dies_with:
            with pytest.raises(Killed):
                tune(config)
        else:
            tune(config)
    return [r for r in read_metrics(Path(config.run_dir)) if "loss" in r], made[0].batches


def steps(config):
    """The same as `run` over the mesh in use, or without one on the first device."""
    method, training = GRPO(config), config.training()
    data, step = method.train_data(None), training.compiled_step()
    place = BatchPlacer(config.objective().arrays, config.rows, config.seq_len, config.micro_batches)
    state, records, batches = training.placed_state(method.weights(), method.others()), [], []
    for _ in range(config.steps):
        batch, report = data.next_for(state)
        state, metrics = step(state, place(batch))
        batches.append(batch)
        records.append(jax.device_get(metrics) | report)
    return records, batches


def assert_alike(mine, alone):
    for ours, theirs in zip(mine[1], alone[1], strict=True):
        np.testing.assert_array_equal(ours["tokens"], theirs["tokens"])
        np.testing.assert_allclose(ours["behaviour"], theirs["behaviour"], atol=1e-5, rtol=0)
    for i, (ours, theirs) in enumerate(zip(mine[0], alone[0], strict=True)):
        for name in ("loss", "reward/mean", "entropy", "answer_tokens/mean", "reference_kl"):
            assert ours.get(name) == pytest.approx(theirs.get(name), abs=1e-5), name
        assert i % 2 or 0 < ours["mismatch/max"] < 1e-5


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = rl_runs.desk(tmp_path_factory.mktemp("grpo"), num_heads=4, num_kv_heads=2)
    # Of one length in the slots: fewer programs.
    write(root / "prompts.jsonl", [x | {"prompt": x["prompt"].split("?")[0]} for x in rl_runs.prompts()])
    return root


@pytest.fixture(scope="module")
def alone(root):
    return steps(recipe(root, "alone", mesh={}))


def test_as_on_one_device_and_on_after_a_kill(root, alone, monkeypatch):
    """Over data, fsdp and tensor; to the bit after a kill between two updates on a rollout."""
    whole = run(recipe(root, "whole"), monkeypatch)
    assert_alike(whole, alone)
    run(recipe(root, "killed"), monkeypatch, dies_with=STEPS)
    records, batches = run(recipe(root, "killed"), monkeypatch)
    assert len(batches) == STEPS - SAVED
    assert [r["loss"] for r in records] == [r["loss"] for r in whole[0]]
    assert [r["mismatch/max"] for r in records] == [r["mismatch/max"] for r in whole[0]]


@pytest.mark.parametrize("changes", [
    {"model": {"scan_layers": True}, "grpo__beta": 0.1}, {"lora": {"rank": 2}},
], ids=["scanned", "adapter"])
@pytest.mark.long
def test_other_weights(root, changes):
    """In `make test-long` weights that are made for the engine, beside a reference; and an adapter."""
    config = recipe(root, "x", mesh={}, **changes)
    with jax.set_mesh(mesh_of(fsdp=2, tensor=2)):
        mine = steps(config)
    assert_alike(mine, steps(config))


@pytest.mark.long
def test_experts_and_tokens_split(tmp_path):
    """In `make test-long` the axes on which the engine has copies of what a step splits."""
    root = rl_runs.desk(tmp_path, **KINDS["moe"], layer_types=("conv", "full_attention", "conv"))
    config = recipe(root, "x", mesh={}, steps=2)
    with jax.set_mesh(mesh_of(expert=2, context=2)):
        mine = steps(config)
    assert_alike(mine, steps(config))


def addresses(tree):
    """Of every device's part of each array."""
    return {(i, part.device): part.data.unsafe_buffer_pointer()
            for i, x in enumerate(jax.tree.leaves(tree)) for part in x.addressable_shards}


@pytest.mark.parametrize("sizes", [
    dict(data=4, tensor=2), dict(data=2, fsdp=2, tensor=2), dict(expert=2, tensor=2, context=2),
], ids=str)
def test_weights_go_from_device_to_device(sizes):
    """None through the host, none that is there is copied, and every replica has them all."""
    model = tiny_model(vocab_size=96, **KINDS["moe"])
    given = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.split(model, nnx.Param)[1]))
    with jax.set_mesh(mesh_of(**sizes)):
        trained = jax.device_put(given, shardings(given, param_axes(model.config)))
        with jax.transfer_guard_device_to_host("disallow_explicit"):
            found = gathered(trained)
            replicas = place_replicas(found, model.config, replica_mesh(jax.sharding.get_mesh()))
    assert len(replicas) == 4
    for params, mesh in replicas:
        assert addresses(params).items() <= addresses(found).items()
        assert mesh.shape["tensor"] == 2
        jax.tree.map(np.testing.assert_array_equal, params, given)
    for x, y in zip(jax.tree.leaves(trained), jax.tree.leaves(found), strict=True):
        assert (x is y) == x.sharding.is_equivalent_to(y.sharding, x.ndim)
