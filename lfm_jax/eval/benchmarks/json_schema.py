"""JSON that follows a schema, over files like those of JSONSchemaBench (arXiv 2501.10868): a schema each."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from lm_eval.api.metrics import mean

from lfm_jax.eval.benchmarks.chat_task import ChatTask, Document, Metrics, counted
from lfm_jax.structured.grammar import Grammar
from lfm_jax.structured.schema import GrammarError
from lfm_jax.structured.validation import UnjudgedError, is_valid, parsed

MAX_GEN_TOKS = 1024
METRICS: Metrics = {"json_validity": (mean, True), "schema_compliance": (mean, True), "problems": (counted, None)}
INSTRUCTION = "Write a JSON value that is valid against this JSON schema. Answer with the JSON alone.\n\n{schema}"

_FENCED = re.compile(r"```(?:json)?[ \t]*\n(.*?)\n?```", re.DOTALL)


class JSONSchema(ChatTask):
    """The shares of answers that are JSON, and that are valid against their schemas.

    Constrained, a schema that the grammar refuses is not supported: nothing is asked, and the answer counts as wrong.
    """

    def __init__(self, folder: Path, *, constrained: bool = False):
        if not folder.is_dir() or not (paths := sorted(folder.rglob("*.json"))):
            raise ValueError(f"json_schema has no data: put JSON schemas, a file each, into {folder}")
        metrics = {**METRICS, "supported": (mean, True)} if constrained else METRICS
        super().__init__("json_schema", [_document(folder, path) for path in paths], "1", metrics, MAX_GEN_TOKS)
        self._constrained = constrained

    def messages(self, doc: Document) -> list[dict[str, str]]:
        schema = json.dumps(doc["schema"], ensure_ascii=False)
        return [{"role": "user", "content": INSTRUCTION.format(schema=schema)}]

    def options(self, doc: Document) -> dict[str, Any]:
        if not self._constrained:
            return {}
        # lm-eval wants an answer to each document: of those that count as wrong, the shortest.
        return {"max_gen_toks": 1} if refused(doc["schema"]) else {"grammar": {"json_schema": doc["schema"]}}

    def process_results(self, doc: Document, results: list[str]) -> dict[str, Any]:
        refusal = refused(doc["schema"]) if self._constrained else None
        if refusal:
            return {"json_validity": 0.0, "schema_compliance": 0.0, "supported": 0.0,
                    "problems": [f"not supported: {refusal}"]}
        supported = {"supported": 1.0} if self._constrained else {}
        try:
            value = parsed(unfenced(results[0]))
        except (ValueError, RecursionError):
            return {"json_validity": 0.0, "schema_compliance": 0.0, "problems": [], **supported}
        valid, problems = False, []
        try:
            valid = is_valid(value, doc["schema"])
        except UnjudgedError as error:  # Schemas are strangers', and some are none.
            problems = [error.problem]
        return {"json_validity": 1.0, "schema_compliance": float(valid), "problems": problems, **supported}


def _document(folder: Path, path: Path) -> Document:
    try:
        return {"name": str(path.relative_to(folder)), "schema": json.loads(path.read_text(encoding="utf-8"))}
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def unfenced(reply: str) -> str:
    """The reply, or what is in its code fence if that is all of it."""
    fenced = _FENCED.fullmatch(reply.strip())
    return fenced[1] if fenced else reply


def refused(schema: Any) -> str | None:
    """Why constrained decoding does not support a schema, in words that many schemas share; None: it does."""
    try:
        Grammar.json_schema(schema)
    except GrammarError as error:
        reason = str(error).removeprefix("the JSON schema is refused: ")
        return re.split(r" \(at | while processing |\. Enable ", reason)[0][:120]
    return None
