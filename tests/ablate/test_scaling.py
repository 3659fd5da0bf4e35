"""The fit finds a known law within its interval, and says where it cannot; sizes are compared at equal FLOPs."""

import dataclasses
import math

import numpy as np
import pytest
from scipy.stats import ttest_rel

from lfm_jax.ablate.scaling import Arm, Law, at_budget, best_of, best_ratio, budgets, compare_sizes, fit, refusal

TRUTH = Law(E=0.9, A=90.0, alpha=0.4, B=400.0, beta=0.4)
SIZES = (1e5, 2e5, 4e5, 8e5)
FLOPS = (2e12, 8e12, 3.2e13)


def runs(noise=0.004, seeds=5, sizes=SIZES, flops=FLOPS, seed=0):
    rng = np.random.default_rng(seed)
    arms = []
    for C in flops:
        for N in sizes:
            D = C / (6 * N)
            loss = float(TRUTH(N, D))
            arms.append(Arm(f"{N:g} {C:g}", int(N), int(D), C,
                            {s: loss * math.exp(rng.normal(0, noise)) for s in range(seeds)}))
    return arms


@pytest.fixture(scope="module")
def fitted():
    return fit(runs(), resamples=30)


def test_a_law_without_noise_is_found_exactly():
    found = fit(runs(noise=0.0, seeds=1))
    assert dataclasses.astuple(found.law) == pytest.approx(dataclasses.astuple(TRUTH), rel=0.02)
    assert found.residual_sd < 1e-4
    assert found.interval(lambda law: law.E) is None  # One seed: no spread is known.


def test_a_number_that_the_runs_do_not_determine_is_named(fitted):
    assert fitted.at_bounds == ()
    rng = np.random.default_rng(0)
    no_floor = [dataclasses.replace(arm, scores={s: 5000 * arm.D**-0.5 * math.exp(rng.normal(0, 0.01)) for s in (0, 1)})
                for arm in runs()]
    found = fit(no_floor, resamples=20)
    assert {"A", "alpha", "E"} <= set(found.at_bounds)
    assert len(found.resampled) == 20  # Each starts from the fit, wherever that lies in its own bounds.


def test_a_law_with_noise_is_found_within_its_interval(fitted):
    for name, true in dataclasses.asdict(TRUTH).items():
        low, high = fitted.interval(lambda law, name=name: getattr(law, name))
        assert low <= true <= high, name
        assert low < getattr(fitted.law, name) < high
    low, high = fitted.interval(lambda law: law.alpha)
    assert high - low < 0.3  # and the interval says something
    assert fitted.residual_sd == pytest.approx(0.004, rel=0.3)


def test_more_noise_gives_wider_intervals(fitted):
    loud = fit(runs(noise=0.012), resamples=12)
    widths = [high - low for low, high in (f.interval(lambda law: law.E) for f in (fitted, loud))]
    assert widths[1] > 1.5 * widths[0]


def test_the_fit_repeats_itself_in_any_order(fitted):
    again = fit(runs()[::-1], resamples=2)
    assert (again.law, again.resampled) == (fitted.law, fitted.resampled[:2])


def test_one_wild_run_does_not_move_the_law(fitted):
    arms = runs()
    arms[3] = dataclasses.replace(arms[3], scores=dict(arms[3].scores) | {0: 30.0})
    law = fit(arms, resamples=0).law
    for arm in runs():
        assert law(arm.N, arm.D) == pytest.approx(fitted.law(arm.N, arm.D), rel=0.004)


def test_too_few_runs_are_refused_with_the_reason():
    assert "at least 6 different pairs" in refusal(runs(flops=FLOPS[:1]))
    assert "3 different sizes, and 2 have" in refusal(runs(sizes=(1e5, 2e5)))
    assert refusal([]) is not None
    assert refusal(runs()) is None
    with pytest.raises(ValueError, match="no law can be fitted: it needs"):
        fit(runs(flops=FLOPS[:1]))
    with pytest.raises(ValueError, match="not above 0"):
        fit([dataclasses.replace(arm, scores={0: 0.0}) for arm in runs()])


def test_budgets_are_groups_within_two_per_cent():
    arms = [Arm("a", 100, 10, 1.0e6, {0: 1.0}), Arm("b", 200, 5, 1.015e6, {0: 1.0}), Arm("c", 400, 2, 1.03e6, {0: 1.0}),
            Arm("d", 100, 20, 2.0e6, {0: 1.0}), Arm("e", 100, 21, 2.01e6, {0: 1.0})]
    # c is within 2 % of b but not of the group's first; d and e are one size.
    assert [[arm.point for arm in group] for group in budgets(arms[::-1])] == [["a", "b"]]


def test_small_and_large_are_compared_at_equal_flops_with_correction():
    groups = budgets(runs())
    assert [len(group) for group in groups] == [4, 4, 4]
    pairs = {(pair.small.N, pair.large.N, pair.small.C): pair for pair in compare_sizes(groups)}
    assert len(pairs) == 18
    assert pairs[100_000, 800_000, 2e12].verdict == "better"
    assert pairs[100_000, 400_000, 3.2e13].verdict == "worse"
    pair = pairs[100_000, 200_000, 2e12]
    p = ttest_rel(list(pair.small.scores.values()), list(pair.large.scores.values())).pvalue
    assert pair.difference.p == pytest.approx(p)
    assert pair.adjusted_p >= 1.5 * p
    assert all(pair.verdict is None for pair in compare_sizes(budgets(runs(seeds=4))))
    assert [best_of(group).N for group in groups] == [100_000, 200_000, 400_000]


def test_identical_sizes_are_rarely_told_apart():
    rng = np.random.default_rng(0)
    flagged = 0
    for _ in range(20):
        pair = [Arm(str(N), N, 10, 1e6, {s: 2 + rng.normal(0, 0.02) for s in range(5)}) for N in (100, 200)]
        flagged += compare_sizes([pair])[0].verdict != "no difference shown"
    assert flagged <= 3


def test_the_best_ratio_is_that_of_the_law():
    (group,) = budgets(runs(flops=(3.2e13,)))
    # Where dL/dlogN = 0 at C = 6 N D: alpha A / N^alpha = beta B / D^beta, so (D / N)^0.4 = 400 / 90 here.
    assert best_ratio(TRUTH, group) == pytest.approx((400 / 90) ** (1 / 0.4), rel=0.02)
    N, D = at_budget(group, np.array([10.0, 100.0]))
    assert pytest.approx([10.0, 100.0]) == D / N
    assert pytest.approx(3.2e13, rel=1e-4) == 6 * N * D
