"""The benchmarks run, on shapes too small to say anything about speed."""

import pytest

from lfm_jax.bench import kernels, model, timing
from lfm_jax.testing import tiny_config


@pytest.mark.slow
def test_model_suite_measures_both_sides():
    report = model.bench_model(tiny_config(), repeats=1)
    rows = [line for line in report.splitlines() if line.startswith("| ")][1:]
    assert [row.split("|")[1].split(",")[0].strip() for row in rows] == [
        "prefill", "greedy decode", "greedy decode", "training step",
    ]
    assert all("x | >=" in row and "absent" not in row for row in rows)
    assert "jax 0." in report
    assert "transformers 5." in report


@pytest.mark.slow
def test_model_suite_says_when_the_peer_is_absent(monkeypatch):
    monkeypatch.setattr(model._Peer, "build", classmethod(lambda cls, _: None))
    assert model.bench_model(tiny_config(), repeats=1).count("absent") >= 4


def test_kernels_suite_has_a_row_for_every_shape(monkeypatch):
    monkeypatch.setattr(kernels, "CONV_SHAPES", ((1, 8, 16, 3),))
    monkeypatch.setattr(kernels, "LINEAR_ROWS", (1, 2))
    monkeypatch.setattr(kernels, "LINEAR_WEIGHTS", 1)
    report = kernels.bench_kernels(repeats=1)
    assert report.count("\n| 1, 8, 16, 3 |") == 2
    assert report.count("GB/s") == 1
    assert "\n| 2 | " in report


def test_interleave_runs_in_turn_after_one_uncounted_round():
    calls = []
    times = timing.interleave([lambda: calls.append("a"), lambda: calls.append("b")], repeats=2)
    assert calls == ["a", "b", "a", "b", "a", "b"]
    assert len(times) == 2
    assert all(t >= 0 for t in times)


def test_conditions_name_what_is_absent():
    line = timing.conditions("jax", "no-such-package")
    assert "no-such-package absent" in line
    assert "cores" in line
