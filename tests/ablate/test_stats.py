"""Intervals, paired tests and Holm's correction agree with scipy and arithmetic by hand; claims are rare and right."""

import math

import numpy as np
import pytest
from scipy import stats as reference

from lfm_jax.ablate.stats import compare, holm, paired_difference, summarize, verdict

BASE = {0: 2.31, 1: 2.35, 2: 2.29, 3: 2.33, 4: 2.36}
POINT = {0: 2.28, 1: 2.30, 2: 2.27, 3: 2.29, 4: 2.35}


def by_seed(values):
    return dict(enumerate(map(float, values)))


def test_summary_is_the_t_interval():
    values = list(BASE.values())
    summary = summarize(values)
    expected = reference.t.interval(0.95, 4, loc=np.mean(values), scale=reference.sem(values))
    assert (summary.n, summary.mean, summary.sd) == (5, pytest.approx(2.328), pytest.approx(np.std(values, ddof=1)))
    assert (summary.low, summary.high) == pytest.approx(expected)


def test_one_value_has_no_interval_and_none_or_a_nan_is_refused():
    assert summarize([1.5]) == summarize(iter([1.5]))
    assert (summarize([1.5]).sd, summarize([1.5]).low) == (None, None)
    for bad in ([], [1.0, math.nan]):
        with pytest.raises(ValueError, match="leave failed runs out"):
            summarize(bad)


def test_paired_difference_is_the_paired_t_test():
    difference = paired_difference(POINT, BASE)
    expected = reference.ttest_rel(list(POINT.values()), list(BASE.values()))
    interval = expected.confidence_interval(0.95)
    assert difference.p == pytest.approx(expected.pvalue, rel=1e-9)
    assert difference.mean == pytest.approx(-0.03)
    assert (difference.low, difference.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
    unpaired = reference.ttest_ind(list(POINT.values()), list(BASE.values())).pvalue
    assert difference.p < unpaired / 10  # the pairing is what the numbers were chosen to show


def test_only_shared_seeds_are_compared():
    fewer = {seed: POINT[seed] for seed in (3, 1, 2)} | {9: 100.0}
    expected = reference.ttest_rel([POINT[s] for s in (1, 2, 3)], [BASE[s] for s in (1, 2, 3)])
    difference = paired_difference(fewer, BASE)
    assert (difference.n, difference.p) == (3, pytest.approx(expected.pvalue))
    assert paired_difference({9: 1.0}, BASE) is None
    assert paired_difference({0: 2.0}, BASE).p is None


def test_differences_without_spread():
    same = paired_difference(dict(BASE), BASE)
    assert (same.mean, same.p, same.low) == (0.0, 1.0, None)
    # 2.31 + 0.1 - 2.31 is not quite 0.1: rounding is no spread.
    constant = paired_difference({seed: score + 0.1 for seed, score in BASE.items()}, BASE)
    assert (constant.n, constant.p, constant.low) == (5, 2 / 2**5, None)
    assert verdict(constant, constant.p, "lower") == "no difference shown"


def test_holm_by_hand():
    # Smallest first: 4 x 0.01, 3 x 0.013 (not below the one before), 2 x 0.03, 1 x 0.04 (not below 0.06).
    assert holm([0.03, 0.01, 0.04, 0.013]) == pytest.approx([0.06, 0.04, 0.06, 0.04])
    assert holm([0.5, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_counts_tests_that_are_missing():
    assert holm([0.01, None, 0.02]) == [pytest.approx(0.03), None, pytest.approx(0.04)]
    assert holm([0.01], family=12) == [pytest.approx(0.12)]
    with pytest.raises(ValueError, match="family is 1"):
        holm([0.1, 0.2], family=1)


def test_no_verdict_below_five_pairs_however_large_the_difference():
    rng = np.random.default_rng(0)
    for n, expected in ((4, None), (5, "worse")):
        base = by_seed(rng.normal(2.0, 0.001, n))
        arms = {"base": base, "far": {seed: score + 1 + 0.001 * seed for seed, score in base.items()}}
        assert compare(arms, "base", "lower")["far"].adjusted_p < 0.001
        assert compare(arms, "base", "lower")["far"].verdict == expected


def test_the_direction_of_the_score_decides():
    higher = {seed: score + 0.5 + 0.01 * seed for seed, score in BASE.items()}
    assert compare({"b": BASE, "p": higher}, "b", "lower")["p"].verdict == "worse"
    assert compare({"b": BASE, "p": higher}, "b", "higher")["p"].verdict == "better"


def test_without_a_base_nothing_is_compared():
    assert compare({"p": BASE}, "b", "lower") == {}


def test_of_twenty_pairs_of_identical_arms_few_are_flagged():
    """Each pair a family of its own, as if no correction were made; then all as one study."""
    rng = np.random.default_rng(1)
    arms = {f"arm{i}": by_seed(rng.normal(2.0, 0.02, 5)) for i in range(41)}
    alone = [compare({"b": arms[f"arm{2 * i}"], "p": arms[f"arm{2 * i + 1}"]}, "b", "lower")["p"].verdict
             for i in range(20)]
    assert sum(v != "no difference shown" for v in alone) <= 3
    study = compare(arms, "arm0", "lower")
    assert [c.verdict for c in study.values()] == ["no difference shown"] * 40


def test_false_claims_of_a_whole_study_stay_below_the_level():
    rng = np.random.default_rng(2)
    flagged = 0
    for _ in range(300):
        shared = rng.normal(0, 0.02, 5)  # the seed's part, which pairing takes out
        arms = {f"arm{i}": by_seed(2 + shared + rng.normal(0, 0.01, 5)) for i in range(7)}
        flagged += any(c.verdict != "no difference shown" for c in compare(arms, "arm0", "lower").values())
    assert flagged <= 300 * 0.05 + 2 * math.sqrt(300 * 0.05 * 0.95)


def test_a_planted_difference_is_flagged_among_twelve_points():
    rng = np.random.default_rng(3)
    shared = rng.normal(0, 0.02, 5)
    arms = {f"arm{i}": by_seed(2 + shared + rng.normal(0, 0.01, 5)) for i in range(13)}
    arms["arm7"] = {seed: score + 0.15 for seed, score in arms["arm7"].items()}
    verdicts = {point: c.verdict for point, c in compare(arms, "arm0", "lower").items()}
    assert verdicts.pop("arm7") == "worse"
    assert set(verdicts.values()) == {"no difference shown"}
