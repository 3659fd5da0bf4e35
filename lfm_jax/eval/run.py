"""`lfm eval`: tasks of lm-eval, and a directory with what came out of them.

    answers.jsonl       every answer of the model, as it came
    results.json        lm-eval's results, with `lfm_jax`: model, settings, versions
    samples_TASK.jsonl  lm-eval's samples, a document and its answers a line
    report.md           scores, standard errors, settings
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from lm_eval import simple_evaluate
from lm_eval.utils import handle_non_serializable, sanitize_list

from lfm_jax.eval.answers import keep_answers, model_hash
from lfm_jax.eval.kept import KeptLM
from lfm_jax.eval.lm import EvalModel
from lfm_jax.eval.report import report
from lfm_jax.eval.server import Server, TextServer, TokenServer
from lfm_jax.eval.tasks import load_tasks
from lfm_jax.files import whole, write_whole
from lfm_jax.model import LFM

if TYPE_CHECKING:
    from tokenizers import Tokenizer

ANSWERS, RESULTS, REPORT = "answers.jsonl", "results.json", "report.md"


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is measured."""

    lm: KeptLM
    name: str
    """For people."""
    identity: Mapping[str, Any]
    """What it is: a hash of its weights, or what is known of a server."""
    of: Mapping[str, Any]
    """What its answers depend on beside a request."""
    settings: Mapping[str, Any]
    """For the report."""


def of_model(
    model: LFM, tokenizer: Tokenizer, template: str | None, *, name: str, max_length: int | None = None,
    batch_tokens: int | None = None, slots: int = 16, seed: int = 0, quantize: str | None = None,
) -> Subject:
    """A model on the engine.

    Args:
      model, tokenizer, template, max_length, batch_tokens, slots, seed: as for `EvalModel`.
      name: of the model, for people.
      quantize: the form that the model was quantised to (`lfm.load`), for the report.

    Raises:
      ValueError: see `EvalModel`.
    """
    lm = EvalModel(model, tokenizer, template, max_length=max_length, batch_tokens=batch_tokens, slots=slots, seed=seed)
    # What is asked has passed template and tokenizer; the two also say how a reply is read.
    codec = hashlib.sha256(tokenizer.to_str().encode()).hexdigest()
    known = model_hash(model)
    return Subject(
        lm, name, {"model_hash": known},
        {"model": known, "max_length": lm.max_length, "template": template, "tokenizer": codec},
        {"max_length": lm.max_length, "seed": seed, "dtype": model.config.dtype, "quantize": quantize},
    )


def of_server(
    server: Server, tokenizer: Path | None, *, max_length: int | None = None, seed: int = 0
) -> Subject:
    """A model of a server with OpenAI's API.

    Args:
      tokenizer, max_length, seed: as for `TokenServer`; without a tokenizer it is asked with texts.

    Raises:
      ValueError: max_length without a tokenizer, or see `TokenServer`.
    """
    if tokenizer is None and max_length is not None:
        raise ValueError("max_length goes with a tokenizer: only tokens can be counted and cut")
    lm: KeptLM = TextServer(server, seed=seed) if tokenizer is None else TokenServer(
        server, tokenizer, max_length=max_length, seed=seed)
    return Subject(
        lm, f"{server.model} at {server.url}", {"model_hash": None, "server": server.facts},
        {"server": server.facts, "max_length": lm.max_length, "tokenizer": lm.tokenizer_name},
        {"max_length": lm.max_length, "seed": seed},
    )


def evaluate(
    subject: Subject, tasks: Sequence[str], output: Path, *, data: Path | None = None, limit: int | None = None,
    num_fewshot: int | None = None, apply_chat_template: bool = False, system_message: str | None = None,
    predict_only: bool = False,
) -> dict[str, Any]:
    """Evaluates a model and writes a directory; continues where an earlier call in the same directory stopped.

    Args:
      tasks: names of tasks, groups and tags of lm-eval.
      output: the directory, made if it is not there.
      data: task data on disk; see `tasks.load_tasks`.
      limit: only so many documents of a task, the first ones.
      num_fewshot: examples before each document; None: as the task says.
      apply_chat_template: prompts are conversations.
      system_message: put before each prompt.
      predict_only: keeps answers and samples, and computes no scores.

    Returns:
      What results.json holds.

    Raises:
      ValueError: see `load_tasks` and `keep_answers`, or the directory has the results of another model.
    """
    lm = subject.lm
    _check_directory(output, subject.identity)
    manager, loaded = load_tasks(tasks, data)
    output.mkdir(parents=True, exist_ok=True)
    with keep_answers(output / ANSWERS, subject.of) as answers:
        lm.answers = answers
        results: dict[str, Any] = simple_evaluate(
            lm, tasks=loaded, task_manager=manager, limit=limit, num_fewshot=num_fewshot,
            apply_chat_template=apply_chat_template, system_instruction=system_message, predict_only=predict_only,
        )  # pyrefly: ignore[bad-assignment]
        samples = results.pop("samples")
        results["chat_template"] = lm.chat_template(apply_chat_template)
        results["lfm_jax"] = {
            "model": subject.name,
            **subject.identity,
            "tokenizer": lm.tokenizer_name,
            "predict_only": predict_only,
            "settings": {
                "limit": limit, "num_fewshot": num_fewshot, "apply_chat_template": apply_chat_template,
                "system_message": system_message, "data": None if data is None else str(data), **subject.settings,
            },
            "versions": {each: metadata.version(each) for each in ("lfm_jax", "lm_eval", "jax", "tokenizers")},
            "device": "a server" if "server" in subject.identity else jax.devices()[0].device_kind,
        }
        _write(output, results, samples)
    return results


def _check_directory(output: Path, identity: Mapping[str, Any]) -> None:
    results = output / RESULTS
    if not results.exists():
        return
    try:
        other = json.loads(results.read_text(encoding="utf-8"))["lfm_jax"]
        found, name = {"model_hash": other["model_hash"]}, other["model"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{results} is not of lfm eval; name another output") from None
    if found | {key: other.get(key) for key in identity} != dict(identity):
        raise ValueError(f"{output} has the results of another model, {name}; name another output")


def _write(output: Path, results: Mapping[str, Any], samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Writes samples, report and results, each whole; results.json comes last."""
    for task, rows in samples.items():
        with whole(output / f"samples_{task}.jsonl") as file:
            for row in rows:
                file.write(_json(_sample(row)).encode() + b"\n")
    write_whole(output / REPORT, report(results))
    write_whole(output / RESULTS, _json(results, indent=2) + "\n")


def _json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, indent=indent, default=handle_non_serializable, ensure_ascii=False)


def _sample(row: Mapping[str, Any]) -> dict[str, Any]:
    """A sample in the form of lm-eval's own files (`EvaluationTracker.save_results_samples`)."""
    arguments = {f"gen_args_{i}": {f"arg_{j}": part for j, part in enumerate(argument)}
                 for i, argument in enumerate(row["arguments"])}
    return dict(row) | {
        "resps": sanitize_list(row["resps"]), "filtered_resps": sanitize_list(row["filtered_resps"]),
        "arguments": arguments, "target": str(row["target"]),
    }
