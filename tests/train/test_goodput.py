"""Every second of a run has one label, across restarts."""

import json
import threading
import time

import jax.numpy as jnp
import pytest

from lfm_jax.train import goodput
from lfm_jax.train.goodput import Ledger, describe


class Clock:
    def __init__(self, at=1000.0):
        self.at = at

    def __call__(self):
        return self.at


def spend(ledger, clock, label, seconds):
    with ledger(label):
        clock.at += seconds


def seconds(ledger):
    found = ledger.summary()
    assert sum(found["seconds"].values()) == pytest.approx(found["wall_seconds"])
    return {label: value for label, value in found["seconds"].items() if value}


def test_time_goes_to_the_innermost_label_and_what_has_none_is_other(tmp_path):
    clock = Clock()
    ledger = Ledger(tmp_path, resume_step=0, now=clock)
    clock.at += 1
    with ledger("checkpoint"):
        clock.at += 2
        spend(ledger, clock, "data", 3)
        clock.at += 4

    def fails():
        with ledger("eval"):
            clock.at += 5
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert seconds(ledger) == {"other": 1, "checkpoint": 6, "data": 3, "eval": 5}
    assert ledger.take("data") == 3
    assert ledger.take("data") == 0
    with pytest.raises(ValueError, match="label is 'dada'; choose one of step, lost"), ledger("dada"):
        pass


def test_step_time_behind_the_checkpoint_is_lost_by_a_kill_and_the_pause_is_restart(tmp_path):
    clock = Clock()
    first = Ledger(tmp_path, resume_step=0, now=clock)
    spend(first, clock, "compile", 20)
    spend(first, clock, "step", 100)
    spend(first, clock, "checkpoint", 1)
    first.saved(10)
    spend(first, clock, "step", 30)
    clock.at += 11
    spend(first, clock, "data", 2)  # Written here; what follows is not.
    spend(first, clock, "step", 5)
    clock.at += 40

    again = Ledger(tmp_path, resume_step=10, now=clock)
    assert seconds(again) == {
        "compile": 20, "step": 100, "lost": 30, "checkpoint": 1, "other": 11, "data": 2, "restart": 45,
    }
    assert again.take("data") == 0
    spend(again, clock, "step", 91)
    assert again.summary()["starts"] == 2
    assert again.goodput == pytest.approx(191 / 300)
    assert describe(again.summary()).startswith(
        "goodput 63.7 % of 0:05:00 since the first of 2 starts: step 63.7 %, restart 15.0 %, lost 10.0 %, compile"
    )


def test_a_fall_back_to_an_older_checkpoint_and_a_rollback_lose_what_is_behind_it(tmp_path):
    clock = Clock()
    ledger = Ledger(tmp_path, resume_step=0, now=clock)
    for step in (10, 20):
        spend(ledger, clock, "step", 50)
        ledger.saved(step)
    ledger.close()
    ledger = Ledger(tmp_path, resume_step=10, now=clock)  # The checkpoint of step 20 was damaged.
    assert seconds(ledger) == {"step": 50, "lost": 50}
    spend(ledger, clock, "step", 7)
    ledger.undo(10)
    assert seconds(ledger) == {"step": 50, "lost": 57}
    ledger.undo(0)
    assert seconds(ledger) == {"lost": 107}


def test_data_that_is_fetched_while_the_device_works_costs_nothing():
    clock = Clock()

    class Result:
        ready = threading.Event()

        def block_until_ready(self):
            self.ready.wait()

    ledger = Ledger(None, resume_step=0, now=clock)
    result = Result()
    ledger.running(result)
    spend(ledger, clock, "data", 3)
    with ledger("data"):
        clock.at += 1
        result.ready.set()
        deadline = time.monotonic() + 10
        while ledger._busy and time.monotonic() < deadline:
            time.sleep(0.001)
        clock.at += 2
    assert seconds(ledger) == {"step": 4, "data": 2}
    assert ledger.take("data") == 2


def test_a_step_ends_when_it_is_ready_not_when_it_is_read():
    clock = Clock()

    class Result:
        def __init__(self):
            self.ready = threading.Event()

        def block_until_ready(self):
            self.ready.wait()

    ledger = Ledger(None, resume_step=0, now=clock)
    results = [Result(), Result()]
    ended = [ledger.running(result) for result in results]
    start = clock.at
    for result, future in zip(results, ended, strict=True):
        clock.at += 3
        result.ready.set()
        future.result(timeout=10)
    clock.at += 5
    assert [future.result() - start for future in ended] == [3, 6]


def test_the_thread_that_waits_ends_with_the_ledger():
    before = set(threading.enumerate())
    ledger = Ledger(None, resume_step=0)
    done = ledger.running(jnp.ones(3))
    [waiting] = set(threading.enumerate()) - before
    ledger.close()
    waiting.join(10)
    assert not waiting.is_alive()
    assert done.done()


def test_a_result_that_fails_ends_its_step(tmp_path):
    class Result:
        def block_until_ready(self):
            raise RuntimeError("out of memory")

    ledger = Ledger(tmp_path, resume_step=0)
    ledger.running(Result())
    deadline = time.monotonic() + 10
    while ledger._busy and time.monotonic() < deadline:
        time.sleep(0.001)
    assert ledger._busy == 0


def test_the_clock_of_this_machine_and_a_real_array(tmp_path):
    import jax.numpy as jnp

    ledger = Ledger(tmp_path, resume_step=0)
    ledger.running(jnp.ones(3) + 1)
    with ledger("eval"):
        time.sleep(0.02)
    ledger.close()
    saved = json.loads((tmp_path / goodput.LEDGER).read_text())
    assert saved["seconds"]["eval"] > 0.005
    assert abs(saved["first_start"] - time.time()) < 60
    assert [path.name for path in tmp_path.iterdir()] == ["goodput.json"]


def test_a_ledger_that_cannot_be_read_is_begun_anew_with_a_warning(tmp_path):
    (tmp_path / goodput.LEDGER).write_text('{"seconds": {"step": 3}}')
    with pytest.warns(UserWarning, match=r"goodput.json cannot be read .*counted anew"):
        ledger = Ledger(tmp_path, resume_step=5)
    assert ledger.summary()["seconds"]["lost"] == 0
