import dataclasses
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from helpers import optimizer_for
from studies import SHALLOW, tiny_study, with_steps

from lfm_jax.ablate import cost
from lfm_jax.ablate import run as runs
from lfm_jax.ablate.results import RESULTS, run_file
from lfm_jax.ablate.schedule import _FIRST, AblateConfig, Work, _fields, ablate
from lfm_jax.ablate.study import Grid
from lfm_jax.cli import main
from lfm_jax.files import locked
from lfm_jax.pretrain.objective import next_token_training
from lfm_jax.train.launch import FAILED, STOPPED
from lfm_jax.train.state import Guard

ROOT = Path(__file__).parents[2]


def results(study):
    ablate(AblateConfig(study=study, report_only=True))
    return [json.loads(line) for line in Path(study.directory, RESULTS).read_text().splitlines()]


def scores(study):
    return {(r["point"], r["task"], r["seed"]): (r["score"], r["metrics"], r["curves"])
            for r in results(study) if r["kind"] == "run"}


class StopAfter:
    """A stop that is due after so many questions."""

    def __init__(self, questions):
        self.left = questions

    def due(self):
        self.left -= 1
        return self.left < 0


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished study of two points, one task, two seeds."""
    study = tiny_study(out=str(tmp_path_factory.mktemp("study") / "out"), **SHALLOW)
    assert ablate(AblateConfig(study=study)) == 0
    return study


def test_a_study_runs_and_is_not_run_again(finished, monkeypatch):
    records = results(finished)
    kinds = [record["kind"] for record in records]
    assert kinds == ["study", "task", "point", "point", "run", "run", "run", "run"]
    assert {(r["point"], r["seed"]) for r in records if r["kind"] == "run"} == {
        ("base", 0), ("base", 1), ("attention=0", 0), ("attention=0", 1)
    }
    run = records[-1]
    assert run["status"] == "ok"
    assert 0 <= run["score"] <= 1
    assert run["metrics"]["answers"] == 16
    assert run["metrics"]["skipped_updates"] == 0
    points = [r for r in records if r["kind"] == "point"]
    assert [p["pattern"] for p in points] == ["ca", "cc"]
    assert points[0]["train_flops"] == pytest.approx(points[1]["train_flops"], rel=0.1)
    monkeypatch.setattr(runs, "Trainer", None)  # There is nothing left to do.
    files = [Path(finished.directory, RESULTS), Path(finished.directory, "report", "README.md")]
    before = [file.read_text() for file in files]
    assert ablate(AblateConfig(study=finished)) == 0
    assert before == [file.read_text() for file in files]


def test_seeds_differ_and_a_seed_is_repeated(finished, tmp_path):
    again = dataclasses.replace(finished, out=str(tmp_path / "again"))
    ablate(AblateConfig(study=again))
    assert scores(again) == scores(finished)
    nats = {metrics["nats_per_answer"] for _, metrics, _ in scores(finished).values()}
    assert len(nats) == 4


def test_runs_of_another_study_are_taken_over(finished, tmp_path, monkeypatch):
    shutil.copytree(finished.out, tmp_path / "out")
    study = dataclasses.replace(finished, name="other", out=str(tmp_path / "out"))
    first = run_file(Path(tmp_path, "out", finished.name), "mqar", "base", 0)
    failed = json.loads(first.read_text()) | {"status": "failed", "score": None}
    first.write_text(json.dumps(failed))
    broken = first.parents[2] / "text" / "base" / "seed-0.json"  # What others have broken is theirs to mend.
    broken.parent.mkdir(parents=True)
    broken.write_text("{")
    made = []
    run = runs.Trainer.run
    monkeypatch.setattr(runs.Trainer, "run", lambda self, seeds, *rest: made.extend(seeds) or run(self, seeds, *rest))
    assert ablate(AblateConfig(study=study)) == 0
    assert made == [0]  # Only what the other study has not finished.
    assert scores(study) == scores(finished)
    taken = {(r["point"], r["seed"]): r.get("taken_from") for r in results(study) if r["kind"] == "run"}
    assert taken == dict.fromkeys(taken, finished.name) | {("base", 0): None}
    page = (study.directory / "report" / "README.md").read_text()
    assert "3 runs of the same model, task and seed were made by `tiny`" in page


def test_shares_of_two_processes_are_the_whole(finished, tmp_path):
    shared = dataclasses.replace(finished, out=str(tmp_path / "shared"))
    assert ablate(AblateConfig(study=shared, index="1/2")) == 0
    assert {point for point, _, _ in scores(shared)} == {"attention=0"}
    assert ablate(AblateConfig(study=shared, index="0/2")) == 0
    assert scores(shared) == scores(finished)


def test_a_stop_at_any_step_changes_nothing(finished, tmp_path):
    study = dataclasses.replace(finished, out=str(tmp_path / "stopped"))
    for questions in (2, 0, 4, 5):  # In a run, before its first step, in the next one.
        work = Work(study)
        work.check()
        assert work.run((0, 1), StopAfter(questions), False) == STOPPED
    assert ablate(AblateConfig(study=study)) == 0
    assert scores(study) == scores(finished)
    assert not list(Path(study.directory, "runs").rglob("*.saved"))


def test_the_time_granted_ends_and_the_study_goes_on(finished, tmp_path):
    study = dataclasses.replace(finished, out=str(tmp_path / "slices"))
    assert ablate(AblateConfig(study=study, minutes=1e-6)) == STOPPED
    assert ablate(AblateConfig(study=study)) == 0
    assert scores(study) == scores(finished)


def test_a_failed_run_is_recorded_and_the_rest_goes_on(finished, tmp_path, monkeypatch):
    study = dataclasses.replace(finished, out=str(tmp_path / "failing"))
    real = runs.Trainer.run

    def sometimes(self, seeds, *args):
        if self._trial.point.name == "base" and list(seeds) == [1]:
            raise RuntimeError("out of luck")
        return real(self, seeds, *args)

    with monkeypatch.context() as patch:
        patch.setattr(runs.Trainer, "run", sometimes)
        assert ablate(AblateConfig(study=study)) == FAILED
    failed = [r for r in results(study) if r.get("status") == "failed"]
    assert [(r["point"], r["seed"], r["error"]) for r in failed] == [("base", 1, "RuntimeError: out of luck")]
    assert "out of luck" in Path(study.directory, "report", "README.md").read_text()
    assert ablate(AblateConfig(study=study)) == FAILED  # Not tried again unless asked.
    assert ablate(AblateConfig(study=study, retry_failed=True)) == 0
    assert scores(study) == scores(finished)
    page = (study.directory / "report" / "README.md").read_text()
    assert "run, finished when repeated | RuntimeError: out of luck" in page


def test_a_run_that_diverges_has_failed(tmp_path):
    study = tiny_study(out=str(tmp_path / "out"), **SHALLOW | dict(vary=(Grid.of({"attention": 1}),)), seeds=1)
    hot = dataclasses.replace(with_steps(study, 40), optimizer=dataclasses.replace(study.optimizer, peak_lr=1e30))
    assert ablate(AblateConfig(study=hot)) == FAILED
    (failed,) = [r for r in results(hot) if r["kind"] == "run"]
    assert "updates in a row were skipped" in failed["error"]
    assert failed["score"] is None
    assert not list(Path(hot.directory).rglob("*.saved"))  # Nothing was saved.


def test_leaving_a_plateau_is_no_spike(finished):
    """A gradient far over the mean of those before is used, unlike in `lfm train`; one that is not finite is not."""
    work = Work(finished)
    task = work.tasks["mqar"]
    trainer = runs.Trainer(finished, work.trials[0], task)
    batch = next(task.train_batches(0))
    for broken, skipped in ((False, 0), (True, 1)):
        state = dataclasses.replace(trainer._init(0), guard=Guard(jnp.float32(1e-6), jnp.int32(1000), jnp.int32(0)))
        if broken:
            state = dataclasses.replace(state, params=jax.tree.map(lambda x: x * np.nan, state.params))
        assert trainer._one_step(state, batch, np.float32(3e-3))[1]["skipped"] == skipped


def test_more_seeds_and_points_go_on_and_another_study_is_refused(finished, tmp_path):
    study = dataclasses.replace(finished, out=str(tmp_path / "grown"))
    ablate(AblateConfig(study=study))
    kept = scores(study)
    grown = dataclasses.replace(study, seeds=3, vary=(Grid.of({"attention": [0, 1, 2]}),))
    assert ablate(AblateConfig(study=grown)) == 0
    assert len(scores(grown)) == 9
    assert kept.items() <= scores(grown).items()
    for changed in (with_steps(grown, 4), dataclasses.replace(grown, warmup=0.5)):
        with pytest.raises(ValueError, match="holds a run of another study"):
            ablate(AblateConfig(study=changed))


def test_a_tuned_learning_rate_is_the_best_of_its_grid(tmp_path):
    study = with_steps(tiny_study(out=str(tmp_path / "out"), **SHALLOW, seeds=1), 30)
    study = dataclasses.replace(study, peak_lrs=(1e-6, 1e-2), mqar=dataclasses.replace(study.mqar, num_values=2))
    assert ablate(AblateConfig(study=study)) == 0
    records = results(study)
    for point in ("base", "attention=0"):
        tuned = {r["peak_lr"]: r["score"] for r in records if r["kind"] == "tuning" and r["point"] == point}
        (rate,) = {r["peak_lr"] for r in records if r["kind"] == "run" and r["point"] == point}
        assert set(tuned) == {1e-6, 1e-2}
        assert tuned[rate] == max(tuned.values())


def test_seeds_side_by_side_are_the_same_runs(finished, tmp_path):
    both = dataclasses.replace(finished, out=str(tmp_path / "both"), seeds_at_once=2)
    assert ablate(AblateConfig(study=both)) == 0
    alone, together = scores(finished), scores(both)
    assert alone.keys() == together.keys()
    for key, (_, metrics, _) in alone.items():
        np.testing.assert_allclose(together[key][1]["nats_per_answer"], metrics["nats_per_answer"], rtol=1e-5)


def test_the_learning_rate_scales_the_update(finished):
    """One program for all learning rates gives what an optimizer made for each would."""
    work = Work(finished)
    trial, task = work.trials[0], work.tasks["mqar"]
    trainer = runs.Trainer(finished, trial, task)
    exact = dataclasses.replace(finished.optimizer, peak_lr=3e-3, warmup_steps=0)
    optimizer = optimizer_for(trial.model, exact, trial.steps)
    state, same = trainer._init(0), trainer._init(0)
    training = next_token_training(trial.model, optimizer, loss_chunk=finished.loss_chunk, guard=finished.guard)
    step = training.compiled_step()
    for _, batch in zip(range(3), task.train_batches(0), strict=False):
        state, _ = step(state, batch)
        same, _ = trainer._one_step(same, batch, np.float32(3e-3))
    leaves = zip(*(sorted(_flat(s.params).items()) for s in (state, same)), strict=True)
    for (name, a), (_, b) in leaves:
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6, err_msg=name)


def _flat(params):
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(params)}


@pytest.mark.parametrize(("flags", "says"), [
    (dict(processes=0), "processes is 0"), (dict(index="2/2"), "index is '2/2'"), (dict(index="x"), "write I/N"),
    (dict(minutes=0), "minutes is 0"),
])
def test_bad_flags_are_named(flags, says):
    with pytest.raises(ValueError, match=says):
        AblateConfig(study=tiny_study(), **flags)


@pytest.mark.parametrize(("changes", "says"), [
    (dict(name=""), "name is empty"), (dict(tasks=()), "tasks is empty"), (dict(tasks=("mqar", "mqar")), "twice"),
    (dict(pattern="cx"), "'x'"), (dict(seeds=3, seeds_at_once=2), "seeds_at_once 2"),
    (dict(warmup=0.9), "warmup is 0.9"),
    (dict(peak_lrs=(0.0,)), "peak_lrs has 0.0"), (dict(cost_contexts=(8192,)), "cost_contexts has 8192"),
    (dict(match_step=0), "match_step is 0"), (dict(checkpoint_minutes=0), "checkpoint_minutes is 0"),
])
def test_bad_fields_of_a_study_are_named(changes, says):
    with pytest.raises(ValueError, match=says):
        tiny_study(**changes)


@pytest.mark.long
def test_block_ratio_smokes(tmp_path, capfd):
    """`make test-long` adds the shipped study as a user tries it, in two processes."""
    with pytest.raises(SystemExit) as status:
        main(["ablate", str(ROOT / "configs" / "ablations" / "block_ratio.yaml"), "--smoke", "--out", str(tmp_path),
              "--processes", "2"])
    said = capfd.readouterr().err
    assert status.value.code == 0, said
    report = tmp_path / "block_ratio-smoke" / "report"
    assert "All 8 planned runs are finished" in (report / "README.md").read_text()
    assert {"text-cost.png", "mqar-cost.png"} <= {path.name for path in report.iterdir()}


def test_a_killed_study_goes_on(finished, tmp_path):
    """SIGKILL at some moment, twice; then the same command ends with the scores of an undisturbed study."""
    path = tmp_path / "study.yaml"
    content = yaml.safe_load((finished.directory / "study.yaml").read_text()) | {"out": str(tmp_path / "killed")}
    path.write_text(yaml.safe_dump(content))
    command = [sys.executable, "-m", "lfm_jax.cli", "ablate", str(path)]
    done = tmp_path / "killed" / finished.name / "runs"
    for runs_there in (1, 3):
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while len(list(done.rglob("seed-*.json"))) < runs_there:
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
        process.wait()
    assert subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0
    assert scores(dataclasses.replace(finished, out=str(tmp_path / "killed"))) == scores(finished)


def test_a_saved_run_of_another_study_is_not_gone_on_with(finished, tmp_path):
    study = dataclasses.replace(finished, out=str(tmp_path / "changed"))
    work = Work(study)
    work.check()
    assert work.run((0, 1), StopAfter(3), False) == STOPPED
    assert list(Path(study.directory).rglob("*.saved"))
    changed = dataclasses.replace(study, warmup=0.3)
    assert ablate(AblateConfig(study=changed)) == 0
    fresh = dataclasses.replace(changed, out=str(tmp_path / "fresh"))
    assert ablate(AblateConfig(study=fresh)) == 0
    assert scores(changed) == scores(fresh)


def test_a_trial_that_another_process_is_at_is_left_to_it(finished, tmp_path, capsys):
    study = dataclasses.replace(finished, out=str(tmp_path / "shared"))
    work = Work(study)
    work.check()
    taken = run_file(work.out, "mqar", "base", 0).parent
    taken.mkdir(parents=True)
    with locked(taken, "taken"):
        assert work.run((0, 2), StopAfter(1000), False, help_others=True) == 0
        assert {point for point, _, _ in scores(study)} == {"attention=0"}
        assert ablate(AblateConfig(study=study)) == STOPPED  # Not the end, if there is nothing to do here.
    assert "2 runs are left to other processes" in capsys.readouterr().err
    assert work.run((0, 2), StopAfter(1000), False, help_others=True) == 0
    assert scores(study) == scores(finished)


def test_of_seeds_side_by_side_only_what_diverges_fails(finished, tmp_path, monkeypatch):
    study = dataclasses.replace(finished, out=str(tmp_path / "both"), seeds_at_once=2)
    real = runs.Trainer.run

    def one_diverges(self, seeds, *args):
        if 1 in seeds and self._trial.point.name == "base":
            raise runs.DivergedError("too hot")
        return real(self, seeds, *args)

    monkeypatch.setattr(runs.Trainer, "run", one_diverges)
    assert ablate(AblateConfig(study=study)) == FAILED
    found = {(r["point"], r["seed"]): r["status"] for r in results(study) if r["kind"] == "run"}
    assert found == {("base", 0): "ok", ("base", 1): "failed", ("attention=0", 0): "ok", ("attention=0", 1): "ok"}


def test_a_lost_device_is_no_failed_run(finished, tmp_path, monkeypatch):
    def lost(self, *args):
        raise jax.errors.JaxRuntimeError("INTERNAL: device lost")

    study = dataclasses.replace(finished, out=str(tmp_path / "lost"))
    monkeypatch.setattr(runs.Trainer, "run", lost)
    with pytest.raises(jax.errors.JaxRuntimeError):
        ablate(AblateConfig(study=study))
    assert not list(Path(study.directory).rglob("seed-*.json"))


def test_costs_are_measured_once_and_reported(finished, tmp_path):
    study = dataclasses.replace(finished, out=str(tmp_path / "costs"), cost_contexts=(32,))
    assert ablate(AblateConfig(study=study)) == 0
    costs = {r["point"]: r for r in results(study) if r["kind"] == "cost"}
    assert list(costs) == ["base", "attention=0"]
    assert costs["base"]["relative"]["decode"] == {"32": 1.0}
    assert costs["base"]["state_bytes"]["32"] > costs["attention=0"]["state_bytes"]["32"]
    page = (study.directory / "report" / "README.md").read_text()
    before = (study.directory / "costs" / "base.json").read_bytes()
    assert ablate(AblateConfig(study=study)) == 0
    assert (study.directory / "costs" / "base.json").read_bytes() == before
    assert (study.directory / "report" / "README.md").read_text() == page


def test_no_cost_is_begun_that_the_time_granted_does_not_hold(finished, monkeypatch, tmp_path):
    study = dataclasses.replace(finished, out=str(tmp_path / "costs"), cost_contexts=(32,))
    work = Work(study)
    work.check()
    measured = []
    monkeypatch.setattr(cost, "measure_cost", lambda *_, **__: measured.append(1) or time.sleep(0.01) or {"params": 1})

    class Short:
        def due(self):
            return False

        def left(self):
            return 0.005

    assert [work.costs(Short()) for _ in range(2)] == [STOPPED, 0]
    assert len(measured) == len(work.points) == 2


def test_processes_need_the_arguments_of_the_command(finished):
    with pytest.raises(ValueError, match="give its arguments too"):
        ablate(AblateConfig(study=finished, processes=2))


def test_sigterm_stops_a_crew_and_the_command_goes_on(finished, tmp_path):
    path = tmp_path / "study.yaml"
    content = yaml.safe_load((finished.directory / "study.yaml").read_text()) | {"out": str(tmp_path / "crew")}
    path.write_text(yaml.safe_dump(content))
    command = [sys.executable, "-m", "lfm_jax.cli", "ablate", str(path), "--processes", "2"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while not list((tmp_path / "crew").rglob("mqar/*")):
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()
    assert process.wait(60) == STOPPED
    assert subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0
    assert scores(dataclasses.replace(finished, out=str(tmp_path / "crew"))) == scores(finished)


def test_the_command_is_that_of_the_study_not_of_the_call():
    args = ["a.yaml", "--processes", "2", "--text.sources", "books", "--minutes=8", "--retry-failed", "--seeds", "3"]
    assert Work(tiny_study(), args=args)._command == "lfm ablate a.yaml --text.sources books --seeds 3"


def test_a_window_counts_where_there_is_one():
    def digests(window):
        model = dataclasses.replace(tiny_study().model, sliding_window=window)
        work = Work(tiny_study(model=model, vary=(Grid.of({"operator": "sliding_attention"}),)))
        return [work.digest(trial, 0, 0.1) for trial in work.trials]

    (base, windowed), (other_base, other_windowed) = digests(32), digests(64)
    assert base == other_base
    assert windowed != other_windowed


def test_a_field_from_after_the_first_records_counts_where_it_is_used():
    """Runs that are finished have fingerprints without it."""
    def digests(**changes):
        work = Work(tiny_study(model=dataclasses.replace(tiny_study().model, **changes)))
        return [work.digest(trial, 0, 0.1) for trial in work.trials]

    plain = digests()
    later = {"attention_gate": True, "rope_fraction": 0.5, "sliding_rope_theta": 1e4}
    assert len({tuple(digests(**{name: value})) for name, value in later.items()} | {tuple(plain)}) == 4
    assert _fields(tiny_study().model).keys() == _FIRST
