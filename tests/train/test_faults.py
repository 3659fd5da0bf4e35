"""What goes wrong in a run, and what is left of it: bad gradients, damaged checkpoints, full disks."""

import os
import resource
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import STEPS, load, losses, recipe, steps_in_order

import lfm_jax as lfm
from lfm_jax.data.corpora.text import TextCorpus
from lfm_jax.pretrain import objective
from lfm_jax.pretrain.run import train
from lfm_jax.train.checkpoint import CheckpointManager
from lfm_jax.train.metrics import read_metrics
from lfm_jax.train.record import Recorder

BAD = 10**6
"""A target that makes every gradient NaN, with what the fixture `poison` puts into the step."""


@pytest.fixture(scope="module")
def whole_run(corpus, tmp_path_factory):
    return train(load(recipe(corpus, tmp_path_factory.mktemp("runs") / "whole"))).run_dir


@pytest.fixture
def copy(whole_run, tmp_path):
    return shutil.copytree(whole_run, tmp_path / "copy")


class Poisoned:
    """A data iterator of which the batches numbered `bad`, from 1, make no finite gradient."""

    def __init__(self, inner, bad):
        self.inner, self.bad, self.count = inner, bad, 0

    def __next__(self):
        batch = next(self.inner)
        self.count += 1
        return batch | {"targets": np.full_like(batch["targets"], BAD)} if self.count in self.bad else batch

    def get_state(self):
        return {"inner": self.inner.get_state(), "count": self.count}

    def set_state(self, state):
        self.inner.set_state(state["inner"])
        self.count = state["count"]


@pytest.fixture
def poison(monkeypatch):
    """A function that makes the batches of these numbers bad."""
    real, real_loss = TextCorpus.train_batches, objective.cross_entropy

    def loss(hidden_BTD, table_VD, targets_BT, **options):
        factor = jnp.where(jnp.any(targets_BT == BAD), jnp.nan, 1.0)
        return real_loss(hidden_BTD * factor, table_VD, targets_BT, **options)

    monkeypatch.setattr(objective, "cross_entropy", loss)

    def make_bad(bad):
        monkeypatch.setattr(
            TextCorpus, "train_batches", lambda *args, **kwargs: Poisoned(real(*args, **kwargs), bad)
        )

    return make_bad


def records(run_dir):
    """Records without what depends on the clock."""
    clock = {"time", "tokens_per_second", "data_seconds", "goodput", "checkpoint_blocked_seconds", "mfu"}
    return [{name: value for name, value in r.items() if name not in clock} for r in read_metrics(run_dir)]


def test_an_update_that_is_not_finite_is_skipped_and_told(corpus, tmp_path, poison, capsys):
    poison({6})
    run_dir = train(load(recipe(corpus, tmp_path / "run"))).run_dir
    by_step = {r["step"]: r for r in read_metrics(run_dir) if "skipped" in r}
    assert [step for step, r in by_step.items() if r["skipped"]] == [6]
    assert by_step[6]["loss"] is None
    # The schedule counts updates that were made.
    assert by_step[7]["learning_rate"] == by_step[6]["learning_rate"]
    assert "step 6: the update was skipped, 1 in a row" in capsys.readouterr().err
    assert all(np.isfinite(w).all() for w in lfm.to_state_dict(lfm.load(run_dir)[0]).values())


def test_too_many_in_a_row_go_back_and_pass_over_the_data_also_after_a_kill(
    corpus, tmp_path, poison, capsys, monkeypatch
):
    """Batches 6 to 9 are bad, three in a row too many: at step 8 back to the checkpoint of step 4, on with batch 9."""
    poison(range(6, 10))
    config = load(recipe(corpus, tmp_path / "run", guard__max_in_row=3))
    run_dir = train(config).run_dir
    assert "back to the checkpoint of step 4; the data behind it is passed over" in capsys.readouterr().err
    assert steps_in_order(run_dir) == list(range(1, STEPS + 1))
    assert [(r["step"], r["rolled_back_from"]) for r in read_metrics(run_dir) if "rolled_back_from" in r] == [(5, 8)]
    assert [r["step"] for r in read_metrics(run_dir) if r.get("skipped")] == [5]  # Batch 9.

    # Killed after it went back, before the next checkpoint: from the same checkpoint the same happens again.
    real = Recorder.step

    class KilledError(Exception):
        pass

    def killed_at_6_again(self, number, *args):
        if number == 6 and any("rolled_back_from" in r for r in read_metrics(tmp_path / "killed")):
            raise KilledError
        return real(self, number, *args)

    config = load(recipe(corpus, tmp_path / "killed", guard__max_in_row=3))
    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "step", killed_at_6_again)
        with pytest.raises(KilledError):
            train(config)
    train(config)
    assert records(tmp_path / "killed") == records(run_dir)


def test_going_back_without_progress_ends_with_what_to_do(corpus, tmp_path, poison):
    poison(range(6, 1000))
    config = load(recipe(corpus, tmp_path / "run", guard__max_in_row=2, guard__max_rollbacks=2))
    with pytest.raises(ValueError, match=r"2 rollbacks to the checkpoint of step 4; lower optimizer.peak_lr, mend"):
        train(config)
    assert all(np.isfinite(w).all() for w in lfm.to_state_dict(lfm.load(tmp_path / "run")[0]).values())
    poison(range(1, 1000))
    config = load(recipe(corpus, tmp_path / "other", guard__max_in_row=2))
    with pytest.raises(ValueError, match="there is no checkpoint to go back to"):
        train(config)


def largest_file(directory):
    return max((p for p in directory.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def truncate(checkpoint):
    path = largest_file(checkpoint / "params")
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(
    "damage",
    [truncate, lambda c: (c / "_CHECKPOINT_METADATA").write_text("{")], ids=["truncated", "metadata cut"],
)
def test_a_damaged_checkpoint_is_put_aside_and_the_one_before_goes_on(corpus, copy, whole_run, capsys, damage):
    damage(copy / "checkpoints" / str(STEPS))
    train(load(recipe(corpus, copy)))
    told = capsys.readouterr().err
    assert f"warning: the checkpoint of step {STEPS} cannot be read and now lies in {copy}/damaged/{STEPS}: " in told
    assert f"resumed {copy} at step 8" in told
    assert (copy / "damaged" / str(STEPS)).is_dir()
    assert losses(copy) == losses(whole_run)
    assert steps_in_order(copy) == list(range(1, STEPS + 1))


def test_a_latest_checkpoint_that_is_gone_falls_back(corpus, copy, whole_run, capsys):
    shutil.rmtree(copy / "checkpoints" / str(STEPS))
    train(load(recipe(corpus, copy)))
    told = capsys.readouterr().err
    assert f"the checkpoint of step {STEPS} is not there" in told
    assert f"resumed {copy} at step 8" in told
    assert losses(copy) == losses(whole_run)


def test_where_no_checkpoint_can_be_read_nothing_is_touched(corpus, copy):
    for checkpoint in (copy / "checkpoints").iterdir():
        truncate(checkpoint)
    before = sorted(copy.rglob("*"))
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be read:\n  - step 12: .*\n  - step 8: "):
        train(load(recipe(corpus, copy)))
    assert sorted(copy.rglob("*")) == before


def test_a_full_disk_stops_the_run_and_the_last_checkpoint_is_intact(corpus, tmp_path, whole_run):
    """Writing more than a limit fails, as on a full disk (Python ignores the signal that comes with it)."""
    run_dir = tmp_path / "run"
    path = recipe(corpus, run_dir, keep_checkpoints=1, eval_every=0)
    real = CheckpointManager.save

    def full_at_step_8(self, number, *args):
        if number == 8:
            self.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        return real(self, number, *args)

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointManager, "save", full_at_step_8)
        try:
            with pytest.raises(OSError, match=r"step 8 could not be written .* step 4 is intact; make room"):
                train(load(path))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert train(load(path)).step == STEPS
    assert losses(run_dir) == losses(whole_run)


def test_records_that_cannot_be_written_stop_the_run_with_a_clear_message(corpus, tmp_path, monkeypatch):
    from lfm_jax.train.metrics import MetricsLog

    def full(self, step, record):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(MetricsLog, "log", full)
    with pytest.raises(OSError, match=r"records of step 1 cannot be written to .*No space left.*make room"):
        train(load(recipe(corpus, tmp_path / "run")))
