"""`lfm selfcheck` passes here, names every implementation, and sees what is wrong."""

import os
import re
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lfm_jax import selfcheck
from lfm_jax.kernels import attention, causal_conv, experts, linear_scan
from lfm_jax.kernels.cudnn_attention import levels, run_levels
from lfm_jax.kernels.linear import linear


def check(run, **changes):
    problem = selfcheck._linear(np.random.default_rng(0))
    return selfcheck.Check("linear", "dot", run, [problem])._replace(**changes)


def report(monkeypatch, *checks):
    monkeypatch.setattr(selfcheck, "_checks", lambda devices: iter(checks))
    return selfcheck.selfcheck()


def test_a_right_kernel_passes(monkeypatch):
    text, ok = report(monkeypatch, check(partial(linear, impl="dot")))
    assert ok
    assert re.search(r"\| linear \| dot \| \d\.\de-\d\d \| \d\.\de-\d\d \| 2e-05 \| ok \|", text)


@jax.custom_vjp
def crooked(x, w):
    return linear(x, w, impl="dot")


crooked.defvjp(lambda x, w: (crooked(x, w), (x, w)), lambda kept, dy: (dy @ kept[1], 1.0001 * dy.T @ kept[0]))


@pytest.mark.parametrize(
    ("run", "finding"),
    [(lambda x, w: 1.0001 * linear(x, w), r"1\.\de-04 \| \d\.\de-\d\d \| 2e-05 \| FAILED"),
     (crooked, r"\d\.\de-0[78] \| 1\.\de-04 \| 2e-05 \| FAILED"),
     (lambda x, w: linear(x, w).at[0, 0].set(jnp.nan), "inf .* FAILED"),
     (lambda x, w: linear(x, w[:, 1:]), "FAILED: ValueError: .* differ in their last 1 axes")],
    ids=["values", "gradient", "nan", "error"],
)
def test_a_wrong_kernel_fails_and_the_others_still_run(monkeypatch, run, finding):
    text, ok = report(monkeypatch, check(run), check(linear))
    assert not ok
    rows = text.splitlines()[4:]
    assert re.search(finding, rows[0])
    assert rows[1].endswith("| ok |")


def test_padding_and_idle_rows_are_not_compared():
    problem = selfcheck._conv(np.random.default_rng(0), T=13, D=3, W=3)
    padding = problem.ids["segment_ids_BT"] == 0
    assert padding.any()
    assert (np.isnan(problem.values[0]).all(axis=2) == padding).all()
    assert not problem.cotangents[0][padding].any()


def test_one_device_says_how_to_exercise_the_collectives(monkeypatch):
    text, ok = report(monkeypatch)
    assert ok
    if len(jax.devices()) == 1:
        assert "the collectives were not exercised" in text
        assert "JAX_NUM_CPU_DEVICES=4" in text


def test_what_needs_another_device_is_named_and_does_not_fail(monkeypatch):
    monkeypatch.setattr(selfcheck, "platform", lambda: "gpu")
    impls = ("pallas_tpu", "splash", "pallas_gpu")
    text, ok = report(monkeypatch, *(check(linear, impl=impl) for impl in impls))
    assert ok
    rows = text.splitlines()[4:]
    assert all("not for this platform: needs a TPU" in row for row in rows[:2])
    assert "needs compute capability 9.0 (Hopper), this is 0.0" in rows[2]


def test_every_implementation_and_collective_has_a_row():
    rows = {(c.kernel, c.impl) for c in selfcheck._checks(devices=len(jax.devices()))}
    for kernel, impls in (("causal_conv", causal_conv.IMPLS), ("linear_scan", linear_scan.IMPLS),
                          ("attention", attention.IMPLS), ("decode_attention", attention.DECODE_IMPLS),
                          ("linear", ("dot", "left")), ("experts", experts.IMPLS)):
        assert {impl for name, impl in rows if name == kernel} == set(impls)


def test_cudnn_is_checked_with_sequences_of_every_level_and_with_masks():
    [check] = [c for c in selfcheck._checks(devices=1) if (c.kernel, c.impl) == ("attention", "cudnn")]
    kinds = set()
    for problem in check.problems:
        ids_BT, T = problem.ids.get("segment_ids_BT"), problem.arrays["q_BTNH"].shape[1]
        if ids_BT is None or "order_BT" in problem.ids:
            continue
        sizes = levels(T)
        level_BT, fits = run_levels(jnp.asarray(ids_BT), sizes)
        if fits:
            assert len(sizes) == len(np.unique(np.asarray(level_BT))) == 2
            C = sizes[-1][0]
            assert (ids_BT[:, C - 1 : -1 : C] == ids_BT[:, C::C])[np.asarray(level_BT)[:, C::C] == 1].any()
        kinds.add((bool(fits), "window" in problem.options, problem.options.get("causal", True)))
    assert kinds == {(True, False, True), (True, True, True), (True, False, False), (False, False, True),
                     (False, True, True)}


def test_everything_passes_here_over_four_devices():
    env = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    command = [sys.executable, "-m", "lfm_jax.selfcheck"]
    done = subprocess.run(command, env=env | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    rows = done.stdout.splitlines()[4:]
    skipped = [row for row in rows if "not for this platform" in row]
    assert [row.split("|")[2].strip() for row in skipped] == ["cudnn", "pallas_gpu"]  # Of experts.
    assert sum("interpret mode)" in row and "ok" in row for row in rows) == 6
    assert sum("ok (4 devices)" in row for row in rows) == 4
