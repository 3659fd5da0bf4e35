"""The table of ways to tune a model: what each one minimises, and what it brings to a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal, NamedTuple

from lfm_jax.config import ModelConfig
from lfm_jax.post.distill import Distill, distill_objective, distill_others, distill_problems
from lfm_jax.post.dpo import DPO, dpo_objective, dpo_others
from lfm_jax.post.grpo import GRPO, grpo_objective, grpo_others, grpo_problems
from lfm_jax.post.sft import SFT, sft_objective
from lfm_jax.post.tuning import Tuning
from lfm_jax.train.objective import Objective
from lfm_jax.train.step import GuardConfig

if TYPE_CHECKING:
    from lfm_jax.post.config import TuneConfig

MethodName = Literal["sft", "dpo", "distill", "grpo"]


class Way(NamedTuple):
    """One way to tune."""

    objective: Callable[[TuneConfig], Objective]
    open: Callable[[TuneConfig], Tuning]
    """Reads and checks all that the run needs, before anything is written."""
    peak_lr: float
    """The learning rate where none is named."""
    others: Callable[[TuneConfig], Mapping[str, ModelConfig]] = lambda config: {}
    """Frozen models that the objective looks at (`RunConfig.other_models`)."""
    problems: Callable[[TuneConfig], list[str]] = lambda config: []
    """A line for each thing that is wrong with a config for this way."""
    guard: GuardConfig = GuardConfig()
    """The guard where no `guard.spike` is named."""


METHODS: dict[MethodName, Way] = {
    "sft": Way(sft_objective, SFT, 5e-5),
    "dpo": Way(dpo_objective, DPO, 1e-6, dpo_others),
    "distill": Way(distill_objective, Distill, 5e-5, distill_others, distill_problems),
    # Where all answers to a prompt are worth the same, gradients are 0: beside their mean any other is large.
    "grpo": Way(grpo_objective, GRPO, 1e-6, grpo_others, grpo_problems, GuardConfig(spike=0.0)),
}
"""By the name that `method` has in a recipe."""
