"""What a run needs and costs, before it runs: `lfm plan`, and the budget that `lfm train` prints.

Names are imported when first used: reading a compiled program (`lfm_jax.plan.hlo`) needs jax and numpy only.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lfm_jax.plan.report import Plan, PlanConfig, Planned, TunePlanConfig, plan, plan_run
    from lfm_jax.train.budget import Budget, budget

__all__ = ["Budget", "Plan", "PlanConfig", "Planned", "TunePlanConfig", "budget", "plan", "plan_run"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "lfm_jax.train.budget" if name.lower() == "budget" else "lfm_jax.plan.report"
    return getattr(importlib.import_module(module), name)
