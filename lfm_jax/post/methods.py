"""The table of ways to tune a model: what each one minimises, and what it brings to a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple

from lfm_jax.post.grpo import GRPO, grpo_objective, grpo_problems
from lfm_jax.post.sft import SFT, sft_objective
from lfm_jax.post.tuning import Tuning
from lfm_jax.train.objective import Objective

if TYPE_CHECKING:
    from lfm_jax.post.config import TuneConfig

MethodName = Literal["sft", "grpo"]


class Way(NamedTuple):
    """One way to tune."""

    objective: Callable[[TuneConfig], Objective]
    open: Callable[[TuneConfig], Tuning]
    """Reads and checks all that the run needs, before anything is written."""
    problems: Callable[[TuneConfig], list[str]] = lambda config: []
    """A line for each field of a config that does not go with it."""


METHODS: dict[MethodName, Way] = {
    "sft": Way(sft_objective, SFT),
    "grpo": Way(grpo_objective, GRPO, grpo_problems),
}
"""By the name that `method` has in a recipe."""
