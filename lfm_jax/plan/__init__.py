"""What a run needs and costs, before it runs: `lfm plan`, and the budget that `lfm train` prints."""

from lfm_jax.plan.report import Plan, PlanConfig, Planned, TunePlanConfig, plan, plan_run
from lfm_jax.train.budget import Budget, budget

__all__ = ["Budget", "Plan", "PlanConfig", "Planned", "TunePlanConfig", "budget", "plan", "plan_run"]
