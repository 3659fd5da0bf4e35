"""Loss against parameters and tokens: a fitted law with its uncertainty, and small against large at equal FLOPs.

The law is L(N, D) = E + A / N^alpha + B / D^beta, fitted as approach 3 of Hoffmann et al. 2022 (arXiv 2203.15556).

Dimensions: N parameters, D training tokens, C training FLOPs of a run; R resamples.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lfm_jax.ablate.stats import Difference, Verdict, holm, paired_difference, summarize, verdict

DELTA = 1e-3
"""Where the Huber loss of log L turns from square to linear, as published."""
RESAMPLES = 200
EQUAL = 0.02
"""Counts this close to each other are one: runs of one FLOP budget, models of one size."""
MIN_RUNS, MIN_VALUES = 6, 3
"""Fewest (N, D) for the five numbers of the law, and fewest sizes and token counts for a power law and a constant."""
MAX_EXPONENT = 3.0

_EXPONENT_STARTS = (0.2, 0.7)
_FLOOR_STARTS = (0.4, 0.8)
"""Starts of E, as shares of the lowest loss."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """Runs of one size on one number of tokens."""

    point: str
    N: int
    D: int
    C: float
    scores: Mapping[int, float]
    """Held-out loss by seed, in any unit; that of E, A and B is the same."""


@dataclasses.dataclass(frozen=True)
class Law:
    """L(N, D) = E + A / N^alpha + B / D^beta."""

    E: float
    A: float
    alpha: float
    B: float
    beta: float

    def __call__(self, N: np.ndarray | float, D: np.ndarray | float) -> Any:
        """The loss at N and D, numbers or arrays."""
        return self.E + self.A / np.power(N, self.alpha) + self.B / np.power(D, self.beta)


@dataclasses.dataclass(frozen=True)
class Fit:
    """A law and how far the seeds leave it open."""

    law: Law
    resampled: tuple[Law, ...]
    """Laws of resampled seeds; empty where every (N, D) has one seed only."""
    residual_sd: float
    """Of log L over all runs: about the relative error."""
    at_bounds: tuple[str, ...]
    """Numbers of the law that ran to an end of what they may be: not determined."""

    def interval(self, quantity: Callable[[Law], float]) -> tuple[float, float] | None:
        """The 95 % bootstrap interval of a number that follows from the law; None without resamples."""
        if not self.resampled:
            return None
        low, high = np.quantile([quantity(law) for law in self.resampled], (0.025, 0.975))
        return float(low), float(high)


@dataclasses.dataclass(frozen=True)
class Pair:
    """A smaller model on more tokens against a larger one on fewer, at equal training FLOPs."""

    small: Arm
    large: Arm
    difference: Difference
    """Small minus large, paired by seed."""
    adjusted_p: float | None
    """Holm's, over all pairs of all budgets."""
    verdict: Verdict | None
    """Of the smaller one; None with too few seeds."""


def refusal(arms: Sequence[Arm]) -> str | None:
    """Why no law is fitted to these runs; None where one can be."""
    runs = {(arm.N, arm.D) for arm in arms}
    if len(runs) < MIN_RUNS:
        return (f"it needs at least {MIN_RUNS} different pairs of parameters and tokens, and {len(runs)} have finished "
                "runs; add points over hidden_size and train_flops")
    for what, values in (("sizes", {arm.N for arm in arms}), ("numbers of tokens", {arm.D for arm in arms})):
        found = len(_together([float(value) for value in values]))
        if found < MIN_VALUES:
            return (f"it needs at least {MIN_VALUES} different {what}, and {found} have finished runs: a power law "
                    "beside a constant is not determined by fewer")
    return None


def fit(arms: Sequence[Arm], resamples: int = RESAMPLES) -> Fit:
    """Fits the law, each run one observation, and bootstraps it over seeds.

    Log-space parameters, Huber loss of log L, several starts. The minimum is found by a trust region (scipy), which
    takes a tenth of the time of the L-BFGS of the paper to reach the same one. Each resample draws, for each (N, D), as
    many of its seeds as it has, with replacement, and widens their deviations from the mean by sqrt(n / (n - 1)): n
    values drawn from n are too close together by that factor. What a seed does to all (N, D) alike is not in it;
    drawing seeds for all at once would have it, and intervals of five of them are too short. The spread is that of
    seeds alone; whether the law has the right form, and holds beyond the runs, it does not say.

    Args:
      arms: at least what `refusal` asks for.
      resamples: R.

    Raises:
      ValueError: too few runs, or a loss that is not above 0.
    """
    reason = refusal(arms)
    if reason is not None:
        raise ValueError(f"no law can be fitted: {reason}")
    arms = sorted(arms, key=lambda arm: (arm.N, arm.D, arm.point))
    scores = [np.array([arm.scores[seed] for seed in sorted(arm.scores)], np.float64) for arm in arms]
    if not all((values > 0).all() for values in scores):
        raise ValueError("a loss is not above 0; the law is one of losses, where lower is better")
    repeats = [len(values) for values in scores]
    log_N = np.repeat(np.log([arm.N for arm in arms]), repeats)
    log_D = np.repeat(np.log([arm.D for arm in arms]), repeats)
    fitter = _Fitter(log_N, log_D)
    log_L = np.log(np.concatenate(scores))
    best = fitter.fit(log_L, fitter.starts(log_L))
    rng = np.random.default_rng(0)
    laws = []
    for _ in range(resamples if max(repeats) > 1 else 0):
        drawn = np.log(np.maximum(np.concatenate([_resample(values, rng) for values in scores]), 1e-9))
        # Other starts lead to the same laws, to five digits.
        laws.append(fitter.law(fitter.fit(drawn, [best])))
    residuals = log_L - fitter.log_loss(best)[0]
    return Fit(fitter.law(best), tuple(laws), float(np.sqrt(np.mean(residuals**2))), fitter.at_bounds(best, log_L))


def budgets(arms: Sequence[Arm]) -> list[list[Arm]]:
    """Groups of at least two sizes with training FLOPs equal within 2 %, smaller budgets and smaller models first."""
    ordered = sorted(arms, key=lambda arm: (arm.C, arm.N, arm.D, arm.point))
    groups = [[ordered[i] for i in group] for group in _together([arm.C for arm in ordered])]
    groups = [sorted(group, key=lambda arm: (arm.N, arm.D, arm.point)) for group in groups]
    return [group for group in groups if len({arm.N for arm in group}) > 1]


def compare_sizes(groups: Sequence[Sequence[Arm]]) -> list[Pair]:
    """Every smaller model against every larger one of its budget, paired by seed, corrected over all of them."""
    pairs = [
        (small, large, difference)
        for group in groups for small, large in itertools.combinations(group, 2)
        if small.N < large.N and (difference := paired_difference(small.scores, large.scores)) is not None
    ]
    planned = sum(small.N < large.N for group in groups for small, large in itertools.combinations(group, 2))
    adjusted = holm([difference.p for _, _, difference in pairs], planned)
    return [Pair(small, large, difference, p, verdict(difference, p, "lower"))
            for (small, large, difference), p in zip(pairs, adjusted, strict=True)]


def best_of(group: Sequence[Arm]) -> Arm:
    """The size with the lowest mean loss."""
    return min(group, key=lambda arm: summarize(arm.scores.values()).mean)


def at_budget(group: Sequence[Arm], ratios: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N, D) that have each of the given tokens per parameter and cost what the group does.

    FLOPs per parameter and token are those of the group's runs, interpolated between them: 6 only for large models.
    """
    known = sorted((arm.D / arm.N, arm.C / (arm.N * arm.D)) for arm in group)
    per_token = np.exp(np.interp(np.log(ratios), *np.log(np.array(known)).T))
    C = float(np.mean([arm.C for arm in group]))
    N = np.sqrt(C / (per_token * ratios))
    return N, N * ratios


def best_ratio(law: Law, group: Sequence[Arm]) -> float:
    """Tokens per parameter with the lowest fitted loss at the group's FLOPs, within the ratios that were run."""
    low, high = ratios_of(group)
    ratios = np.geomspace(low, high, 400)
    return float(ratios[np.argmin(law(*at_budget(group, ratios)))])


def ratios_of(group: Sequence[Arm]) -> tuple[float, float]:
    """Lowest and highest tokens per parameter."""
    ratios = [arm.D / arm.N for arm in group]
    return min(ratios), max(ratios)


class _Fitter:
    """The fit of log L at fixed N and D.

    Parameters are (log of A's term at the mean log N, alpha, log of B's term at the mean log D, beta, log E): centred,
    so that a term and its exponent hardly depend on each other.
    """

    def __init__(self, log_N: np.ndarray, log_D: np.ndarray):
        self._mean_N, self._mean_D = float(np.mean(log_N)), float(np.mean(log_D))
        self._n, self._d = log_N - self._mean_N, log_D - self._mean_D

    def starts(self, log_L: np.ndarray) -> list[np.ndarray]:
        lowest, mean = math.exp(np.min(log_L)), math.exp(np.mean(log_L))
        return [
            np.array([math.log((mean - share * lowest) / 2), alpha, math.log((mean - share * lowest) / 2), beta,
                      math.log(share * lowest)])
            for alpha in _EXPONENT_STARTS for beta in _EXPONENT_STARTS for share in _FLOOR_STARTS
        ]

    def fit(self, log_L: np.ndarray, starts: Sequence[np.ndarray]) -> np.ndarray:
        from scipy.optimize import least_squares

        low, high = self._bounds(log_L)
        fits = [least_squares(lambda x: self.log_loss(x)[0] - log_L, np.clip(start, low, high), self._slopes,
                              bounds=(low, high), loss="huber", f_scale=DELTA, ftol=1e-10, xtol=1e-10, gtol=1e-10)
                for start in starts]
        return min(fits, key=lambda found: found.cost).x

    def at_bounds(self, x: np.ndarray, log_L: np.ndarray) -> tuple[str, ...]:
        """Names of what the runs do not determine, since it lies at a bound or beside something that does."""
        low, high = self._bounds(log_L)
        near = np.array([1, 0.01, 1, 0.01, 1])  # Of logarithms, and of exponents.
        at = dict(zip(("A", "alpha", "B", "beta", "E"), ((x < low + near) | (x > high - near)).tolist(), strict=True))
        for factor, exponent in (("A", "alpha"), ("B", "beta")):
            at[exponent] |= at[factor]  # Of a term that is nothing.
            if at[exponent] and not at[factor]:  # The term is a constant, as E is.
                at[factor] = at["E"] = True
        return tuple(name for name in ("E", "A", "alpha", "B", "beta") if at[name])

    def _bounds(self, log_L: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        top = float(np.max(log_L))
        return (np.array([top - 20, 0, top - 20, 0, top - 20]),
                np.array([top + 5, MAX_EXPONENT, top + 5, MAX_EXPONENT, top + 5]))

    def log_loss(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(log of the law at every run, each term's share of it [3, runs])."""
        a, alpha, b, beta, e = x
        terms = np.stack([a - alpha * self._n, b - beta * self._d, np.full_like(self._n, e)])
        top = terms.max(axis=0)
        total = top + np.log(np.exp(terms - top).sum(axis=0))
        return total, np.exp(terms - total)

    def law(self, x: np.ndarray) -> Law:
        a, alpha, b, beta, e = map(float, x)
        return Law(math.exp(e), math.exp(a + alpha * self._mean_N), alpha, math.exp(b + beta * self._mean_D), beta)

    def _slopes(self, x: np.ndarray) -> np.ndarray:
        """Derivatives of log_loss, [runs, 5]."""
        a, b, e = self.log_loss(x)[1]
        return np.stack([a, -a * self._n, b, -b * self._d, e], axis=1)


def _resample(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    n = len(values)
    if n == 1:
        return values
    mean = values.mean()
    return mean + math.sqrt(n / (n - 1)) * (rng.choice(values, n) - mean)


def _together(values: Sequence[float]) -> list[list[int]]:
    """Indices of values that lie within EQUAL of the smallest of their group, smallest first."""
    groups: list[list[int]] = []
    for i in sorted(range(len(values)), key=lambda i: values[i]):
        if groups and values[i] <= (1 + EQUAL) * values[groups[-1][0]]:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups
