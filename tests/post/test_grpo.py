"""GRPO end to end on a tiny model: rewards rise, one set of numbers, resuming to the bit, refusing early."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import rl_runs
from chats import write
from rl_runs import desk, recipe
from tiny_runs import environment, losses, steps_in_order
from tuning import load

import lfm_jax as lfm
from lfm_jax.adapters.config import LoRAConfig
from lfm_jax.cli import main
from lfm_jax.data.config import ChatData
from lfm_jax.post.config import TuneConfig
from lfm_jax.post.grpo import GRPO
from lfm_jax.post.grpo_config import GRPOConfig
from lfm_jax.post.run import tune
from lfm_jax.sampling import Sampling
from lfm_jax.train.metrics import read_metrics


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return desk(tmp_path_factory.mktemp("grpo"))


@pytest.fixture(scope="module")
def whole_run(root):
    """An uninterrupted run."""
    return tune(load(recipe(root, root / "whole")))


def records(run_dir):
    return [r for r in read_metrics(run_dir) if "loss" in r]


def test_the_reward_rises(whole_run):
    rolled_out = [r for r in records(whole_run.run_dir) if "reward/mean" in r]
    assert len(rolled_out) == whole_run.steps / 2, "there are two updates on each rollout"
    first, last = (np.mean([r["reward/mean"] for r in some]) for some in (rolled_out[:3], rolled_out[-3:]))
    assert last > first + 0.15
    weighted = [r[f"reward/{name}"] for name in rl_runs.REWARDS for r in rolled_out[:1]]
    assert np.dot(weighted, rl_runs.WEIGHTS) == pytest.approx(rolled_out[0]["reward/mean"])


def test_every_step_says_how_far_engine_and_trainer_are_apart(whole_run):
    fresh, again = (records(whole_run.run_dir)[i::2] for i in (0, 1))
    assert all(0 < r["mismatch/mean"] < r["mismatch/max"] < 1e-5 for r in fresh)
    assert all(r["ratio"] == pytest.approx(1, abs=1e-5) and r["clipped_low"] == r["clipped_high"] == 0 for r in fresh)
    assert max(r["mismatch/max"] for r in again) > 1e-3, "the policy has changed since"
    assert max(r["clipped_low"] + r["clipped_high"] for r in again) > 0
    told = {"entropy", "truncated", "answer_tokens/mean", "answer_tokens/max", "groups_of_one_reward", "reward/std",
            "rollout/seconds", "rollout/tokens_per_second"}
    assert told <= fresh[0].keys()
    assert all(0 < r["rollout/share"] < 1 for r in fresh[1:])


def test_samples_are_there_to_be_looked_at(whole_run):
    lines = [json.loads(line) for line in (whole_run.run_dir / "samples.jsonl").read_text().splitlines()]
    assert [(x["rollout"], x["step"]) for x in lines] == [(r, 2 * r + 1) for r in (0, 5, 10) for _ in range(2)]
    for line in lines:
        assert "<|im_start|>assistant\n" in line["prompt"]
        assert len(line["answers"]) == 4
        for answer in line["answers"]:
            assert answer["reward"] == pytest.approx(np.dot(list(answer["rewards"].values()), rl_runs.WEIGHTS))
            assert answer["rewards"][rl_runs.REWARDS[0]] == rl_runs.share(answer["text"])
            assert not answer["text"].endswith("<|im_end|>")


def test_a_killed_run_goes_on_and_is_the_same_to_the_bit(root, whole_run, cache):
    """Between two updates on one rollout: the answers that are left are those of weights that are gone."""
    run_dir = root / "killed"
    process = subprocess.run([sys.executable, rl_runs.__file__, recipe(root, run_dir)], env=environment(cache),
                             capture_output=True)
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()
    assert steps_in_order(run_dir)[-1] < whole_run.steps
    tune(load(recipe(root, run_dir)))
    assert steps_in_order(run_dir) == list(range(1, whole_run.steps + 1))
    assert losses(run_dir) == losses(whole_run.run_dir)
    told = "reward/mean", "entropy", "mismatch/max", "answer_tokens/mean"
    for ours, theirs in zip(records(run_dir), records(whole_run.run_dir), strict=True):
        assert [ours.get(name) for name in told] == [theirs.get(name) for name in told]
    assert (run_dir / "samples.jsonl").read_text() == (whole_run.run_dir / "samples.jsonl").read_text()
    ours, theirs = (lfm.to_state_dict(lfm.load(d)[0]) for d in (run_dir, whole_run.run_dir))
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("lora", [{}, {"rank": 2}])
def test_beside_a_reference(root, lora):
    """The model that the run began with; with an adapter, the model without it."""
    path = recipe(root, root / f"beside{len(lora)}", steps=2, lora=lora, grpo__beta=0.1, grpo__updates=1,
                  model={} if lora else {"scan_layers": True})
    first, second = records(tune(load(path)).run_dir)
    assert first["mismatch/max"] < 1e-5
    assert second["mismatch/max"] < 1e-5
    assert 0 <= first["reference_kl"] < 1e-9 < second["reference_kl"]


def test_a_reward_that_fails_ends_the_run_and_is_named(root, tmp_path):
    path = recipe(root, tmp_path / "run", grpo__rewards=["regex", f"{root}/rewards.py:broken"])
    with pytest.raises(ValueError, match=r"rewards.py:broken' raised KeyError: 'missing' \(.*prompts.jsonl:1\)"):
        tune(load(path))
    assert not (tmp_path / "run").exists(), "it is tried on a prompt before the run begins"
    path = recipe(root, tmp_path / "late", grpo__rewards=[f"{root}/rewards.py:late"])
    with pytest.raises(ValueError, match=r"rewards.py:late' returned nan; expected a finite number \(.*jsonl:"):
        tune(load(path))


def test_a_reward_may_read_the_whole_reply(root, tmp_path):
    GRPO(load(recipe(root, tmp_path / "run", grpo__rewards=[f"{root}/rewards.py:of_reply"])))
    GRPO(load(recipe(root, tmp_path / "run", grpo__rewards=["regex", f"{root}/rewards.py:of_reply"])))


def test_several_processes_are_refused(root, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match=r"runs in one process, .*here are 2; start one alone .--processes 1"):
        GRPO(load(recipe(root, tmp_path / "run")))


def test_a_reward_whose_library_is_missing_says_how_to_install_it(root, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    with pytest.raises(ValueError, match=r"grpo.rewards: the reward json_schema .*pip install 'lfm_jax\[post\]'"):
        GRPO(load(recipe(root, tmp_path / "run", grpo__rewards=["json_schema"])))


def test_prompts_that_cannot_be_used_are_refused_before_anything_is_written(root, tmp_path, capsys):
    bad = write(tmp_path / "bad.jsonl", [{"prompt": "a", "pattern": "a"}, {"prompt": "a"}, {"pattern": "a"},
                                         {"prompt": "a", "pattern": "a", "file": "main.py", "reply": "b"}])
    with pytest.raises(SystemExit) as stop:
        main(["tune", str(recipe(root, tmp_path / "run", data__sources=[str(bad)], grpo__rewards=["regex"]))])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert f"{bad}, line 2: reward 'regex' raised ValueError: the example has no field 'pattern'" in err
    assert f"{bad}, line 3: it has no prompt" in err
    assert f"{bad}, line 4: it has the keys file, reply, which are ours" in err
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="none of 8 prompts has at most 4 tokens"):
        tune(load(recipe(root, tmp_path / "run", data__seq_len=16)))


def test_a_config_says_all_that_does_not_go_with_it(root):
    data = ChatData(sources=("x",), seq_len=8, batch_size=6, too_long="cut")
    says = (r"grpo.rewards is empty(.|\n)*6 times grpo.updates 1 answers are no groups of grpo.generations 4(.|\n)*"
            r"grpo.slots is 2(.|\n)*max_new_tokens 8 leaves no room(.|\n)*held-out prompts(.|\n)*is cut(.|\n)*"
            r"train_minutes(.|\n)*lora.dropout")
    with pytest.raises(ValueError, match=says):
        TuneConfig.of(str(root / "base"), run_dir="x", data=data, method="grpo", train_minutes=1,
                      lora=LoRAConfig(dropout=0.1), grpo=GRPOConfig(generations=4, slots=2, max_new_tokens=8))
    says = (r"generations is 1(.|\n)*reward_weights has 1(.|\n)*epsilon_low is 2(.|\n)*normalisation is 'x'(.|\n)*"
            r"temperature is 0.0(.|\n)*top_k is 5; leave it out: a token counts by its probability(.|\n)*seed is set")
    with pytest.raises(ValueError, match=says):
        GRPOConfig(rewards=("regex", "answer"), reward_weights=(1.0,), generations=1, epsilon_low=2, normalisation="x",
                   sampling=Sampling(top_k=5, seed=1))


def test_the_recipe_fits_a_model(root):
    config = load(Path(__file__).parents[2] / "configs/tune/grpo.yaml", "--init-from", str(root / "base"))
    assert (config.optimizer.peak_lr, config.grpo.weights) == (1e-6, {"answer": 1.0})
    assert load(recipe(root, root / "x", optimizer={})).optimizer.peak_lr == 1e-6


def test_gradients_may_come_and_go(root):
    """Where rewards are rare most are 0: the guard of other methods would skip all others for ever."""
    path = recipe(root, root / "x", guard={})
    config, named = (load(path, *flags) for flags in ((), ("--guard.spike", "3")))
    made = TuneConfig.of(str(root / "base"), run_dir="x", data=config.data, method="grpo", grpo=config.grpo)
    assert (config.guard.spike, named.guard.spike, made.guard.spike) == (0, 3, 0)
    assert TuneConfig.of(str(root / "base"), run_dir="x", data=config.data).guard.spike == 10


def test_other_prompts_are_refused_when_a_run_goes_on(root, whole_run, tmp_path):
    other = write(tmp_path / "other.jsonl", rl_runs.prompts()[:7])
    with pytest.raises(ValueError, match="belongs to other data"):
        tune(load(recipe(root, whole_run.run_dir, data__sources=[str(other)], steps=99)))


def test_weights_are_handed_over_without_a_copy(root):
    config = load(recipe(root, root / "x"))
    rollouts = GRPO(config).train_data(None)
    state = config.training().random_state(0)
    given = rollouts._weights(state.params, state.frozen)
    assert given["embed"] is state.params["embed"]
