"""How tensors of several models become one: the formulas of `lfm merge`, in float32, and what each reads.

A *difference* is what fine-tuning added to a tensor: that of a model less that of the base it began from (a task
vector). Weights and densities are one for each model.

Sources: task arithmetic (https://arxiv.org/abs/2212.04089), TIES (https://arxiv.org/abs/2306.01708), DARE
(https://arxiv.org/abs/2311.03099), and for slerp mergekit (`mergekit/merge_methods/slerp.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

PARALLEL = 0.9995
"""The cosine above which `slerp` interpolates linearly, as mergekit does: the sine it would divide by is near 0."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The options of a merge, one value for each model; what its method does not read has no meaning."""

    weights: tuple[float, ...] = ()
    density: tuple[float, ...] = ()
    """Shares of the entries of a difference that are kept."""
    t: float = 0.5
    seed: int = 0


class Tensors(NamedTuple):
    """The tensors of one name, in float32."""

    name: str
    base: np.ndarray
    """That of the base; 0 to a method without one."""
    models: list[np.ndarray]

    def differences(self) -> list[np.ndarray]:
        """Returns model less base, for each model."""
        return [model - self.base for model in self.models]


class Method(NamedTuple):
    """One row of `METHODS`."""

    reads: frozenset[str]
    """The options that it reads; `base` and `density` it needs."""
    combine: Callable[[Tensors, Recipe], np.ndarray]


def weighted_sum(arrays: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """Returns sum(w x)."""
    total = np.zeros_like(arrays[0])
    for array, weight in zip(arrays, weights, strict=True):
        total += weight * array
    return total


def weighted_mean(arrays: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """Returns sum(w x) / sum(w); the weights must not sum to 0."""
    return weighted_sum(arrays, [weight / sum(weights) for weight in weights])


def slerp(a: np.ndarray, b: np.ndarray, t: float) -> np.ndarray:
    """Returns a for t = 0 and b for t = 1, and between them what lies on the arc, both taken as one vector:
    (sin((1 - t) angle) a + sin(t angle) b) / sin(angle), or (1 - t) a + t b where they are nearly parallel or one is 0.
    """
    norms = np.sqrt(_dot(a, a) * _dot(b, b))
    cosine = _dot(a, b) / norms if norms > 0 else 1.0
    if abs(cosine) > PARALLEL:
        return weighted_sum([a, b], [1 - t, t])
    angle = np.arccos(cosine)
    return weighted_sum([a, b], [float(np.sin(part * angle) / np.sin(angle)) for part in (1 - t, t)])


def _dot(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sum(a * b, dtype=np.float64))  # Tens of millions of terms are too many for float32.


def trim(difference: np.ndarray, density: float) -> np.ndarray:
    """Returns the difference with 0 for all but its largest entries by size, `density` of them and at least one.

    Entries of the same size as the last one kept stay too. As in mergekit, entries are ranked within one tensor; the
    paper of TIES ranks those of the whole model, which would have to be in memory.
    """
    size = np.abs(difference)
    dropped = size.size - max(1, round(density * size.size))
    return difference * (size >= np.partition(size, dropped, axis=None)[dropped])


def drop(difference: np.ndarray, density: float, key: Sequence[int]) -> np.ndarray:
    """Returns the difference with each entry kept by chance, with probability `density` and divided by it, else 0, so
    that the mean stays (DARE). `key` decides all draws."""
    kept = np.random.default_rng(key).random(difference.shape, np.float32) < density
    return difference * kept / density


def elected_mean(differences: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """Returns the disjoint mean of TIES: of each entry the sign of sum(w d) is elected, and those differences that
    have it make a weighted mean. Where the sum is 0 no sign is elected, and the mean is 0. Weights are above 0."""
    elected = np.sign(weighted_sum(differences, weights))
    total, mass = np.zeros_like(elected), np.zeros_like(elected)
    for difference, weight in zip(differences, weights, strict=True):
        agrees = (np.sign(difference) == elected).astype(np.float32)
        total += weight * difference * agrees
        mass += weight * agrees
    return total / np.where(mass > 0, mass, 1)


def trimmed(x: Tensors, recipe: Recipe) -> list[np.ndarray]:
    """Returns the differences of all models, trimmed."""
    return [trim(difference, density) for difference, density in zip(x.differences(), recipe.density, strict=True)]


def dropped(x: Tensors, recipe: Recipe) -> list[np.ndarray]:
    """Returns the differences of all models, dropped by chance: the draws depend on the seed, the place of the model
    and the name of the tensor, and on nothing else."""
    return [drop(difference, density, [recipe.seed, place, *x.name.encode()])
            for place, (difference, density) in enumerate(zip(x.differences(), recipe.density, strict=True))]


_DIFFERENCES = frozenset({"base", "weights"})
METHODS: dict[str, Method] = {
    "linear": Method(
        frozenset({"weights"}), lambda x, recipe: weighted_mean(x.models, recipe.weights)),
    "slerp": Method(
        frozenset({"t"}), lambda x, recipe: slerp(x.models[0], x.models[1], recipe.t)),
    "task_arithmetic": Method(
        _DIFFERENCES, lambda x, recipe: x.base + weighted_sum(x.differences(), recipe.weights)),
    "ties": Method(
        _DIFFERENCES | {"density"}, lambda x, recipe: x.base + elected_mean(trimmed(x, recipe), recipe.weights)),
    "dare_linear": Method(
        _DIFFERENCES | {"density", "seed"},
        lambda x, recipe: x.base + weighted_sum(dropped(x, recipe), recipe.weights)),
    "dare_ties": Method(
        _DIFFERENCES | {"density", "seed"},
        lambda x, recipe: x.base + elected_mean(dropped(x, recipe), recipe.weights)),
}
ELECTING = ("ties", "dare_ties")
"""The methods whose weights are shares of a mean over those that agree."""


def buffer_weights(recipe: Recipe) -> tuple[float, ...]:
    """Returns the weights of the mean that a buffer becomes, whatever the method: the size of the models' own, or of
    `slerp` 1 - t and t. A buffer, such as the bias of experts, is set by how often experts are chosen and not by a
    gradient, so that its differences do not add up."""
    return tuple(map(abs, recipe.weights)) or (1 - recipe.t, recipe.t)
