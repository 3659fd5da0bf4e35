"""Tasks of lm-eval in a training run: measured at their pace, on record, and without a trace in the training."""

import json
import os
import random
import signal
import sys

import numpy as np
import pytest
from tiny_runs import STEPS, load, losses, recipe

import lfm_jax as lfm
from lfm_jax.cli import main
from lfm_jax.eval.in_training import open_tasks
from lfm_jax.pretrain.run import train
from lfm_jax.recipe import dump_recipe
from lfm_jax.train import state as states
from lfm_jax.train.console import Console
from lfm_jax.train.metrics import read_metrics, saved_step

TASK = """
task: toy
dataset_path: json
dataset_kwargs: {data_files: {test: toy.jsonl}}
test_split: test
fewshot_split: test
num_fewshot: 1
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "toy.yaml").write_text(TASK)
    rows = [{"question": f"alpha beta {i}", "choices": [" gamma", f" {i}", " delta"], "label": i % 3} for i in range(6)]
    (folder / "toy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def measured(corpus, data, tmp_path_factory):
    """(run, with tasks, that was interrupted behind the first measurement; its tasks' records by step)."""
    run_dir = tmp_path_factory.mktemp("runs") / "measured"
    config = load(recipe(corpus, run_dir, eval__tasks=["toy"], eval__every=5, eval__limit=4, eval__data=str(data)))
    original = Console.step

    def interrupt(self, step, *args):
        if step == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, step, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Console, "step", interrupt)
        assert train(config, watched).step < STEPS
    assert train(config, watched).step == STEPS
    return run_dir, config


def watched(tasks):
    """As `open_tasks`, and no random number of the process may be drawn."""
    measure = open_tasks(tasks)

    def states():
        return random.getstate(), np.random.get_state()[1].tolist()

    def watch(*args):
        before = states()
        found = measure(*args)
        assert states() == before
        return found

    return watch


def scores(run_dir):
    return {r["step"]: r for r in read_metrics(run_dir) if any(key.startswith("eval/") for key in r)}


def test_tasks_are_measured_at_their_pace_and_once(measured):
    run_dir, config = measured
    found = scores(run_dir)
    rows = [r["step"] for r in read_metrics(run_dir) if "eval/toy/acc" in r]
    assert rows == sorted(found) == [5, 10, STEPS]
    assert all(set(r) == {"step", "eval/toy/acc", "eval/toy/acc_norm", "time"} for r in found.values())
    before = (run_dir / "metrics.jsonl").read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lfm_jax.eval.lm.EvalModel._score", lambda *_: pytest.fail("asked again"))
        train(config, open_tasks)  # It is over: nothing is measured again.
    assert (run_dir / "metrics.jsonl").read_bytes() == before
    assert (run_dir / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert saved_step(run_dir) == STEPS


def test_training_is_the_same_to_the_bit_without_them(measured, corpus, tmp_path):
    run_dir, _ = measured
    train(load(recipe(corpus, tmp_path / "plain")))
    assert losses(tmp_path / "plain") == losses(run_dir)


def test_scores_are_those_of_lfm_eval(measured, data, tmp_path):
    run_dir, _ = measured
    with pytest.raises(SystemExit) as status:
        main(["eval", str(run_dir), "--tasks", "toy", "--data", str(data), "--limit", "4", "--output",
              str(tmp_path / "out")])
    assert status.value.code == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())["results"]["toy"]
    last = scores(run_dir)[STEPS]
    assert [last["eval/toy/acc"], last["eval/toy/acc_norm"]] == [results["acc,none"], results["acc_norm,none"]]


def test_layers_that_are_stacked_and_rounded_weights(corpus, data, tmp_path, monkeypatch):
    """What is measured is what a checkpoint of the run loads as; of moments no copy is made for it."""
    unstacked, copied = states.unstacked, []
    monkeypatch.setattr(states, "unstacked", lambda state, config: copied.append(state) or unstacked(state, config))
    run_dir = tmp_path / "stacked"
    config = load(recipe(corpus, run_dir, steps=2, eval__tasks=["toy"], eval__data=str(data), model__scan_layers=True,
                         model__quantize="int8", model__layer_types=["conv", "full_attention"] * 2))
    seen = []

    def opened(tasks):
        measure = open_tasks(tasks)

        def watch(model, run_dir):
            seen.append(model)
            return measure(model, run_dir)

        return watch

    train(config, opened)
    [model] = seen
    assert [state.opt_state for state in copied].count({}) == 1
    loaded, _ = lfm.load(run_dir)
    tokens = np.arange(20)[None]
    np.testing.assert_array_equal(model(tokens)[0], loaded(tokens)[0])


@pytest.mark.parametrize(("changes", "message"), [
    ({"eval__tasks": ["nothing"]}, "there is no task 'nothing'"),
    ({"eval__tasks": ["toy", "json_schema"]}, "eval.tasks: json_schema cannot be measured in a training run"),
    ({"eval__tasks": ["toy"], "eval__data": "nowhere"}, "data nowhere is not a directory"),
])
def test_what_cannot_be_measured_is_told_before_anything_is_done(corpus, data, tmp_path, changes, message):
    changes = {"eval__data": str(data)} | changes
    path = recipe(corpus, tmp_path / "run", **changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lfm_jax.eval.tasks.TaskManager", lambda **_: type("Shipped", (), {"all_tasks": ["toy"]})())
        with pytest.raises(ValueError, match=message):
            train(load(path), open_tasks)
    assert not (tmp_path / "run").exists()


def test_what_is_missing_is_told(corpus, data, tmp_path, monkeypatch):
    config = load(recipe(corpus, tmp_path / "run", eval__tasks=["toy"], eval__data=str(data)))
    assert load(_written(config, tmp_path)) == config
    with pytest.raises(ValueError, match=r"need open_tasks=lfm_jax.eval.in_training.open_tasks"):
        train(config)
    monkeypatch.setattr("jax.process_count", lambda: 2)
    with pytest.raises(ValueError, match="in runs of one process only"):
        train(config, open_tasks)
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(ValueError, match=r"eval.tasks: .* is not installed: pip install 'lfm_jax\[eval\]'"):
        train(config, open_tasks)
    with pytest.raises(ValueError, match=r"(?s)eval.every is -1.*eval.limit is 0"):
        type(config.eval)(every=-1, limit=0)


@pytest.mark.parametrize("changes", [{"eval__every": 5}, {"eval__limit": 3}, {"eval__data": "tasks"}])
def test_settings_of_tasks_without_tasks_are_refused(corpus, tmp_path, changes, capsys):
    with pytest.raises(SystemExit):
        main(["train", str(recipe(corpus, tmp_path / "run", **changes))])
    printed = capsys.readouterr()
    assert "eval.tasks is empty" in printed.out + printed.err


def _written(config, folder):
    path = folder / "again.yaml"
    path.write_text(dump_recipe(config))
    return path
