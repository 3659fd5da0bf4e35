"""BFCL, the Berkeley Function Calling Leaderboard (version 4): its single-turn categories over Python functions.

Documents and `ast_checker` are those of `bfcl-eval`. As its handlers of APIs do, functions are shown as JSON schemas,
with `_` for the dots in names; prompt and calls are written and read as the model's own chat template and
`text.tools` have them.
"""

from __future__ import annotations

from typing import Any

from lm_eval.api.metrics import mean

from lfm_jax.eval.benchmarks.chat_task import ChatTask, Document, Metrics, counted
from lfm_jax.eval.benchmarks.checkers import Checkers
from lfm_jax.text.tools import parse_tool_calls
from lfm_jax.worker import TooSlowError

CATEGORIES = (
    "simple_python", "multiple", "parallel", "parallel_multiple", "irrelevance", "live_simple", "live_multiple",
    "live_parallel", "live_parallel_multiple", "live_irrelevance", "live_relevance",
)
MAX_GEN_TOKS = 1024
METRICS: Metrics = {"acc": (mean, True), "errors": (counted, None), "problems": (counted, None)}


class BFCL(ChatTask):
    """A category. Where no function is of use (`irrelevance`) the right answer calls none; `live_relevance` wants any
    call; elsewhere the checker compares calls with those that are right."""

    def __init__(self, category: str, checkers: Checkers, *, constrained: bool = False):
        super().__init__(f"bfcl_{category}", checkers.documents(category), checkers.version, METRICS, MAX_GEN_TOKS)
        self._category, self._checkers, self._constrained = category, checkers, constrained

    def messages(self, doc: Document) -> list[dict[str, str]]:
        return doc["messages"]

    def tools(self, doc: Document) -> list[dict[str, Any]]:
        return doc["tools"]

    def options(self, doc: Document) -> dict[str, Any]:
        grammar = {"grammar": {"tools": doc["tools"]}} if self._constrained and doc["tools"] else {}
        return {"skip_special_tokens": False, **grammar}

    def doc_to_target(self, doc: Document) -> str:
        return str(doc["ground_truth"])

    def process_results(self, doc: Document, results: list[str]) -> dict[str, Any]:
        _, calls = parse_tool_calls(results[0], doc["tools"])
        if doc["ground_truth"] is None:
            right = bool(calls) == (not self._category.endswith("irrelevance"))
            error = None if right else "called a function" if calls else "called no function"
            verdict: dict[str, Any] = {"valid": right, "error": error, "problem": None}
        else:
            try:
                verdict = self._checkers.judge({
                    "functions": doc["functions"], "calls": [{call.name: call.arguments} for call in calls],
                    "ground_truth": doc["ground_truth"], "category": self._category,
                })
            except TooSlowError as error:
                verdict = {"valid": False, "error": None, "problem": f"the checkers {error}"}
        return {"acc": float(verdict["valid"]), "errors": [verdict["error"]] if verdict["error"] else [],
                "problems": [verdict["problem"]] if verdict["problem"] else []}
