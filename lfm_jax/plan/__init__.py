"""What a run needs and costs, before it runs: `lfm plan`, and the budget that `lfm train` prints."""

from lfm_jax.plan.analysis import Budget, budget
from lfm_jax.plan.report import Plan, PlanConfig, plan

__all__ = ["Budget", "Plan", "PlanConfig", "budget", "plan"]
