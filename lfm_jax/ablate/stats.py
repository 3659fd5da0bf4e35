"""Statistics of a study: intervals, t tests paired by seed, Holm's correction, and what may be claimed from them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

ALPHA = 0.05
"""Adjusted p below which a difference is called one."""
CLAIM_SEEDS = 5
"""Fewest paired seeds on which anything is claimed; with fewer a study explores."""
Z = 1.96
"""Standard errors to either side of a 95 % interval."""
_ROUNDING = 1e-12
"""A spread below this share of the largest score is none: what floating-point subtraction leaves."""

Better = Literal["lower", "higher"]
Verdict = Literal["better", "worse", "no difference shown"]


@dataclasses.dataclass(frozen=True)
class Summary:
    """Scores of one point over its seeds, in the score's unit."""

    n: int
    mean: float
    sd: float | None
    """Standard deviation of the sample (n - 1); None below two values."""
    low: float | None
    """Ends of the 95 % interval of the mean, by Student's t; None below two values."""
    high: float | None


@dataclasses.dataclass(frozen=True)
class Difference:
    """A point minus the base over the seeds that both have, in the score's unit."""

    n: int
    """Paired seeds."""
    mean: float
    low: float | None
    """Ends of the 95 % interval of the mean difference, by Student's t, not corrected for the number of points. None
    below two pairs, or where every seed gives the same difference: then nothing is known about its spread."""
    high: float | None
    p: float | None
    """Two-sided, not corrected; None below two pairs."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A point against the base, corrected for the other points of the task."""

    difference: Difference
    adjusted_p: float | None
    verdict: Verdict | None
    """None below `CLAIM_SEEDS` pairs: the point only explores."""


def wilson(share: float, n: float) -> tuple[float, float]:
    """Wilson's 95 % score interval of a share of n documents (JASA 22, 1927): one within 0 and 1, that has a width also
    where all or none of a few are right."""
    middle, half = share + Z**2 / (2 * n), Z * math.sqrt(share * (1 - share) / n + (Z / (2 * n)) ** 2)
    low, high = ((middle + side * half) / (1 + Z**2 / n) for side in (-1, 1))
    return min(low, share), max(high, share)  # They differ by rounding where all or none are right.


def summarize(values: Iterable[float]) -> Summary:
    """Mean, standard deviation and 95 % t interval.

    Raises:
      ValueError: no value, or one that is not finite.
    """
    values = list(values)
    if not values or not all(map(math.isfinite, values)):
        raise ValueError(f"scores are {values}; give at least one, all finite, and leave failed runs out")
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return Summary(n, mean, None, None, None)
    sd = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = _t_quantile(n - 1) * sd / math.sqrt(n)
    return Summary(n, mean, sd, mean - half, mean + half)


def paired_difference(scores: Mapping[int, float], base: Mapping[int, float]) -> Difference | None:
    """Student's t test of the differences, paired by seed; seeds that only one side has are left out.

    Where all differences are zero p is 1. Where all are the same other number, t is infinite and its p of 0 would rest
    on a spread of zero that few seeds cannot show (it happens where both sides are saturated); there only the signs
    count, p = 2 / 2^n, so that five seeds never suffice.

    Args:
      scores: by seed.
      base: by seed.

    Returns:
      None where no seed is shared.
    """
    seeds = sorted(scores.keys() & base.keys())
    if not seeds:
        return None
    summary = summarize(scores[seed] - base[seed] for seed in seeds)
    n, mean, sd = summary.n, summary.mean, summary.sd
    if sd is None:
        return Difference(n, mean, None, None, None)
    rounding = _ROUNDING * max(abs(side[seed]) for side in (scores, base) for seed in seeds)
    if sd <= rounding:
        return Difference(n, mean, None, None, 1.0 if abs(mean) <= rounding else 2.0 ** (1 - n))
    return Difference(n, mean, summary.low, summary.high, _two_sided_p(mean / (sd / math.sqrt(n)), n - 1))


def holm(ps: Sequence[float | None], family: int | None = None) -> list[float | None]:
    """Holm's step-down adjusted p values: they keep the chance of any false claim in the family below the level.

    Args:
      ps: None for a test that is not there (yet); it stays None.
      family: tests that were planned. Those without a p count as ones that show nothing, so that a failed or unfinished
        point does not make claims about the others easier. None: as many as `ps` has.

    Raises:
      ValueError: a family smaller than its tests.
    """
    family = len(ps) if family is None else family
    known = sorted((p, i) for i, p in enumerate(ps) if p is not None)
    if family < len(known):
        raise ValueError(f"family is {family}, but there are {len(known)} p values; count every test that was planned")
    adjusted: list[float | None] = [None] * len(ps)
    largest = 0.0
    for rank, (p, i) in enumerate(known):
        largest = max(largest, min(1.0, (family - rank) * p))
        adjusted[i] = largest
    return adjusted


def verdict(difference: Difference, adjusted_p: float | None, better: Better) -> Verdict | None:
    """What may be said of a difference: better or worse at an adjusted p below `ALPHA`, nothing with too few seeds."""
    if difference.n < CLAIM_SEEDS or adjusted_p is None:
        return None
    if adjusted_p >= ALPHA:
        return "no difference shown"
    return "better" if (difference.mean < 0) == (better == "lower") else "worse"


def compare(
    scores: Mapping[str, Mapping[int, float]], base: str, better: Better, family: int | None = None
) -> dict[str, Comparison]:
    """Every point of a task against the base.

    Args:
      scores: point -> seed -> score, finished runs only.
      base: the point to compare with.
      better: which scores are good.
      family: points that were planned besides the base; None: those in `scores`.

    Returns:
      By point; one that shares no seed with the base is not in it, and neither is the base.
    """
    differences = {
        point: difference for point, by_seed in scores.items()
        if point != base and (difference := paired_difference(by_seed, scores.get(base, {}))) is not None
    }
    adjusted = holm([difference.p for difference in differences.values()],
                    len(scores.keys() - {base}) if family is None else family)
    return {
        point: Comparison(difference, p, verdict(difference, p, better))
        for (point, difference), p in zip(differences.items(), adjusted, strict=True)
    }


def _t_quantile(df: int) -> float:
    from scipy.special import stdtrit  # scipy.stats has the same and takes a second to import

    return float(stdtrit(df, 1 - ALPHA / 2))


def _two_sided_p(t: float, df: int) -> float:
    from scipy.special import stdtr

    return float(2 * stdtr(df, -abs(t)))
