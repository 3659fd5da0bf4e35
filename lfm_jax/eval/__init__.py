"""Evaluation with lm-eval: a model on the batched engine, `lfm eval`, and comparisons of two evaluations.

Only `lm` and what stands above it need lm-eval, an extra (`lfm_jax[eval]`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lfm_jax.eval.lm import EvalModel

__all__ = ["EvalModel"]


def __getattr__(name: str) -> Any:
    if name != "EvalModel":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    need_lm_eval()
    from lfm_jax.eval.lm import EvalModel

    globals()[name] = EvalModel
    return EvalModel


def need_lm_eval() -> None:
    """Raises ImportError, with what to install, where lm-eval is missing."""
    try:
        import lm_eval.api.model  # noqa: F401  Only to see whether it is there.
    except ImportError as error:
        raise ImportError(f"{error.name} is not installed: pip install 'lfm_jax[eval]'") from None
