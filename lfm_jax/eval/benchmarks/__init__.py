"""Benchmarks that lm-eval does not have, as tasks of lm-eval: one file each."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.group import AggMetricConfig, Group

from lfm_jax.eval.benchmarks import tool_calls
from lfm_jax.eval.benchmarks.bfcl import BFCL, CATEGORIES
from lfm_jax.eval.benchmarks.checkers import Checkers
from lfm_jax.eval.benchmarks.ifbench import IFBench
from lfm_jax.eval.benchmarks.json_schema import JSONSchema
from lfm_jax.eval.benchmarks.tool_calls import ToolCalls

GROUPS = {"bfcl": tuple(f"bfcl_{category}" for category in CATEGORIES)}
NAMES = frozenset({"ifbench", "json_schema", tool_calls.NAME, *GROUPS["bfcl"], *GROUPS})
"""Beside them, `tool_calls_NAME` for each file of chats (`tool_calls`: for all of them); see `has`."""
FREE = frozenset({"ifbench"})
"""Tasks whose answers no grammar could constrain."""


def has(name: str) -> bool:
    """Whether a task or group is one of ours."""
    return name in NAMES or tool_calls.has(name)


def load(
    names: Sequence[str], data: Path | None = None, *, checkers: Path | None = None, constrained: bool = False
) -> list[Any]:
    """Makes tasks and groups of NAMES.

    Args:
      data: `DIR/ifbench/test.jsonl` takes the place of the documents of the package; json_schema needs
        `DIR/json_schema/`, with a schema a file, and tool_calls_NAME `DIR/tool_calls/NAME.jsonl`, with chats.
      checkers: see `Checkers`.
      constrained: answers follow a grammar: calls of the tools, JSON of the schema.

    Raises:
      ValueError: see `Checkers`, checkers that no task has, data that are missing or no documents, a task that has no
        constrained form, or a package that is not installed.
    """
    calls = any(map(tool_calls.has, names))
    needed = ["jsonschema"] * ("json_schema" in names or calls) + ["llguidance"] * constrained
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise ValueError(f"not installed: {', '.join(missing)}; pip install 'lfm_jax[eval]'")
    if constrained and (free := sorted(FREE & set(names))):
        raise ValueError(f"{', '.join(free)} cannot be constrained: no grammar says what a right answer is")
    checked = "ifbench", "bfcl", *GROUPS["bfcl"]
    if checkers is not None and not set(checked) & set(names):
        raise ValueError("checkers are those of ifbench and bfcl, and none of these tasks is one; leave --checkers out")
    of = functools.cache(lambda benchmark: Checkers(benchmark, checkers))
    chats = tool_calls.files(data) if calls else {}
    names = [each for name in names for each in (chats if name == tool_calls.NAME else [name])]
    if missing := [name for name in names if tool_calls.has(name) and name not in chats]:
        raise ValueError(f"there is no file of chats for {', '.join(missing)}; there are {', '.join(chats)}")

    def task(name: str) -> Any:
        if name == "json_schema":
            if data is None:
                raise ValueError("json_schema has no data of its own: put JSON schemas, a file each, into "
                                 "DIR/json_schema/ and add --data DIR")
            return JSONSchema(data / name, constrained=constrained)
        if name in chats:
            return ToolCalls(chats[name], constrained=constrained)
        if name == "ifbench":
            path = None if data is None else data / "ifbench" / "test.jsonl"
            return IFBench(of("ifbench"), path if path is not None and path.exists() else None)
        return BFCL(name.removeprefix("bfcl_"), of("bfcl"), constrained=constrained)

    def group(name: str) -> Group:
        mean = AggMetricConfig(metric="acc", aggregation="mean", weight_by_size=True)
        made = Group(name, aggregate_metric_list=[mean])
        for each in GROUPS[name]:
            made.add(task(each))
        return made

    asked = [name for name in dict.fromkeys(names) if name in GROUPS]
    grouped = {each for name in asked for each in GROUPS[name]}
    return [*map(group, asked), *(task(name) for name in dict.fromkeys(names) if name not in {*asked, *grouped})]
