"""The driver, the step and the planner take an objective that the package does not have (`pairs.py`)."""

import re
import signal
import subprocess
import sys

import jax
import numpy as np
import pairs
import pytest
from helpers import long

from lfm_jax.plan import plan_run
from lfm_jax.train.metrics import read_metrics
from lfm_jax.train.optimizer import OptimizerConfig


def losses(run_dir):
    return [record["loss"] for record in read_metrics(run_dir) if "loss" in record]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return pairs.run(tmp_path_factory.mktemp("pairs") / "whole")


def test_it_learns_and_reports_what_the_objective_says(whole):
    found = losses(whole.run_dir)
    assert len(found) == pairs.STEPS
    assert found[-1] < 0.9 * found[0]
    assert whole.measured["heldout_accuracy"] > 0.9
    first = next(record for record in read_metrics(whole.run_dir) if "loss" in record)
    assert first["weight"] == pytest.approx(float(pairs.draw(1)["row_weight"].sum()), rel=1e-6)
    assert first["tokens"] == 2 * pairs.B * pairs.T
    assert 0 <= first["accuracy"] <= 1


def test_killed_it_goes_on_to_the_bit(whole, tmp_path, capsys):
    command = [sys.executable, pairs.__file__, str(tmp_path / "killed"), "{}", f"{pairs.KILLED}"]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    again = pairs.run(tmp_path / "killed")
    assert f"resumed {tmp_path / 'killed'} at step {pairs.SAVED}\n" in capsys.readouterr().err
    assert losses(again.run_dir) == losses(whole.run_dir)
    assert again.measured == whole.measured


def test_steps_that_minutes_allow_are_fixed_once(tmp_path, capsys):
    """A run of no time has one step, and a resumed run keeps its number."""
    short = pairs.run(tmp_path / "short", train_minutes=1e-9)
    assert (short.step, short.steps) == (1, 1)
    assert "1 steps in 1e-09 minutes" in capsys.readouterr().err
    assert pairs.run(tmp_path / "short", train_minutes=1e9).steps == 1
    told = [line for line in capsys.readouterr().err.splitlines() if "changed setting" in line]
    assert told == ["resuming with a changed setting: train_minutes: 1e-09 there, 1000000000.0 here; only a new run is "
                    "timed, this one keeps its 1 steps"]
    slow = OptimizerConfig(warmup_steps=4, schedule="constant")
    with pytest.raises(ValueError, match=r"train_minutes 1e-09 is 1 steps on this machine: (.|\n)*warmup_steps 4"):
        pairs.run(tmp_path / "none", train_minutes=1e-9, optimizer=slow)


def test_timing_the_first_steps_changes_no_number(whole, tmp_path):
    timed = pairs.run(tmp_path / "timed", train_minutes=1e9)
    assert timed.step == timed.steps == pairs.STEPS
    assert losses(timed.run_dir) == losses(whole.run_dir)


def test_held_out_batches_are_made_once_and_no_more_than_are_measured(tmp_path, monkeypatch):
    made = []

    def heldout(self):
        for i in range(3):
            made.append(i)
            yield pairs.draw(10**6 + i)

    monkeypatch.setattr(pairs.Pairs, "heldout", heldout)
    pairs.run(tmp_path / "run", steps=4, eval_every=2, eval_batches=2)
    assert made == [0, 1]
    assert len([record for record in read_metrics(tmp_path / "run") if "heldout_loss" in record]) == 2


def test_a_stop_while_steps_are_timed_ends_before_the_first(whole, tmp_path, capsys, monkeypatch):
    draw, before = pairs.draw, signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(pairs, "draw", lambda seed: signal.raise_signal(signal.SIGINT) or draw(seed))
        stopped = pairs.run(tmp_path / "run", train_minutes=1e9)
    assert (stopped.step, stopped.steps, stopped.measured) == (0, pairs.STEPS, {})
    assert "stopped before the first step" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before
    again = pairs.run(tmp_path / "run", train_minutes=1e9)
    assert losses(again.run_dir) == losses(whole.run_dir)


def test_parts_of_a_batch_add_up(whole, tmp_path):
    parts = pairs.run(tmp_path / "parts", micro_batches=4)
    np.testing.assert_allclose(losses(parts.run_dir), losses(whole.run_dir), rtol=1e-4)


@pytest.mark.parametrize("mesh", [dict(fsdp=4), dict(fsdp=2, context=2)])
def test_it_is_planned(mesh):
    """The budget counts its own arrays, each as it is split, and both sequences."""
    config = pairs.config("runs/x", mesh)
    found = plan_run(config, "v5e:2x2", compile=False).budget
    assert found.tokens == 2 * pairs.B * pairs.T
    assert found.batch == 2 * 2 * 4 * pairs.B * pairs.T / 4 + 4 * pairs.B / mesh["fsdp"]
    assert found.model_flops == 3 * config.model.flops_per_token(pairs.T) * found.tokens


@pytest.fixture(scope="module")
def partly(tmp_path_factory):
    return pairs.run(tmp_path_factory.mktemp("pairs") / "partly", freeze=pairs.FREEZE)


def test_frozen_weights_stay_as_they_are_and_the_others_learn(partly):
    found = losses(partly.run_dir)
    assert found[-1] < found[0]
    assert pairs.unchanged(partly.run_dir) == pairs.frozen()


def test_a_run_with_frozen_weights_resumes_to_the_bit(partly, tmp_path):
    pairs.run(tmp_path / "run", freeze=pairs.FREEZE, steps=4)
    again = pairs.run(tmp_path / "run", freeze=pairs.FREEZE)
    assert losses(again.run_dir) == losses(partly.run_dir)
    with pytest.raises(ValueError, match="freeze changed"):
        pairs.run(tmp_path / "run", steps=9)


def compiled(freeze):
    training = pairs.config("x", freeze=freeze).training()
    program = training.compiled_step().lower(training.abstract_state(), training.abstract_batch(pairs.B, pairs.T))
    return training, program.compile()


def test_no_moments_and_no_gradient_are_made_of_frozen_weights():
    """Bytes of the compiled step fall by two moments, FLOPs by what the planner counts."""
    (full, full_step), (part, part_step) = compiled(()), compiled(pairs.FREEZE)
    weights = full.abstract_state().params
    frozen = sum(x.size for path, x in jax.tree_util.tree_leaves_with_path(weights)
                 if "embed" in str(path) or "feed_forward" in str(path))
    arguments = [step.memory_analysis().argument_size_in_bytes for step in (full_step, part_step)]
    assert arguments[0] - arguments[1] == pytest.approx(2 * 4 * frozen, abs=256)
    state = part.abstract_state()
    assert sum(x.size for x in jax.tree.leaves(state.opt_state)) == pytest.approx(
        2 * sum(x.size for x in jax.tree.leaves(state.params)), abs=8
    )
    flops = [step.cost_analysis()["flops"] for step in (full_step, part_step)]
    budgets = [plan_run(pairs.config("x", freeze=freeze), "cpu:1").budget for freeze in ((), pairs.FREEZE)]
    counted = budgets[0].model_flops - budgets[1].model_flops
    assert counted == 2 * (frozen) * budgets[0].tokens  # Each is a matrix with a product of its own.
    # The optimizer's arithmetic falls too, by a few operations a weight.
    assert counted <= flops[0] - flops[1] <= counted + 40 * frozen
    assert budgets[0].optimizer - budgets[1].optimizer == 2 * 4 * frozen
    assert budgets[0].gradients - budgets[1].gradients == 4 * frozen
    assert budgets[0].parameters == budgets[1].parameters


def test_below_the_lowest_trained_weight_there_is_no_backward_pass():
    lower = ("embed", "blocks.0.*")
    (_, all_step), (_, top_step) = compiled(("embed",)), compiled(lower)
    budgets = [plan_run(pairs.config("x", freeze=freeze), "cpu:1").budget for freeze in (("embed",), lower)]
    counted = budgets[0].model_flops - budgets[1].model_flops
    saved_flops = all_step.cost_analysis()["flops"] - top_step.cost_analysis()["flops"]
    assert saved_flops == pytest.approx(counted, rel=0.15)
    assert budgets[1].activations < budgets[0].activations


@pytest.mark.parametrize(("changes", "message"), [
    (dict(freeze=("embd", "blocks.*", "nrm.weight")),
     "name no weight of the model: 'embd' (the nearest is 'embed'), 'nrm.weight' (the nearest is 'norm.weight')"),
    (dict(freeze=("*",)), "freeze ['*'] leaves nothing to train"),
])
def test_what_cannot_be_frozen_is_refused(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        pairs.config("x", **changes)


@pytest.mark.parametrize(("layer_types", "freeze"), [
    # Of a stacked entry all weights are frozen, of another one none.
    (("conv", "conv", "full_attention", "full_attention"), ("blocks.0.*", "blocks.1.*")),
    long(("conv", "full_attention") * 2, ("blocks.*.operator.in_proj",)),
])
def test_a_scanned_run_with_frozen_weights_resumes_to_the_bit(tmp_path, layer_types, freeze):
    """In `make test-long` a part of every stacked layer frozen too."""
    model = pairs.config("x").model.replace(layer_types=layer_types, scan_layers=True)
    whole = pairs.run(tmp_path / "whole", model=model, freeze=freeze)
    pairs.run(tmp_path / "run", model=model, freeze=freeze, steps=4)
    again = pairs.run(tmp_path / "run", model=model, freeze=freeze)
    assert losses(again.run_dir) == losses(whole.run_dir)
    ended, expected = (pairs.saved(run.run_dir, model=model) for run in (again, whole))
    assert all(np.array_equal(ended[name], expected[name]) for name in expected)


def test_stacked_layers_are_frozen_alike():
    model = pairs.config("x").model.replace(layer_types=("conv",) * 4, scan_layers=True)
    with pytest.raises(ValueError, match="scan_layers"):
        pairs.config("x", model=model, freeze=("blocks.1.*",))
    state = pairs.config("x", model=model, freeze=("blocks.*.operator.*",)).training().abstract_state()
    assert "operator" not in state.params["blocks"][0]
    assert state.frozen["blocks"][0]["operator"]["in_proj"].shape == (4, 3, 32, 32)
