"""`lfm eval`: tasks of lm-eval, and a directory with what came out of them.

    answers.jsonl       every answer of the model, as it came
    results.json        lm-eval's results, with `lfm_jax`: model, settings, versions
    samples_TASK.jsonl  lm-eval's samples, a document and its answers a line
    report.md           scores, standard errors, settings
"""

from __future__ import annotations

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
from lfm_jax.eval.benchmarks.chat_task import ChatTask
from lfm_jax.eval.lm import EvalModel
from lfm_jax.eval.report import report
from lfm_jax.eval.tasks import load_tasks
from lfm_jax.files import whole, write_whole
from lfm_jax.model import LFM

if TYPE_CHECKING:
    from tokenizers import Tokenizer

ANSWERS, RESULTS, REPORT = "answers.jsonl", "results.json", "report.md"


def evaluate(
    model: LFM, tokenizer: Tokenizer, template: str | None, tasks: Sequence[str], output: Path, *, name: str,
    data: Path | None = None, limit: int | None = None, num_fewshot: int | None = None,
    apply_chat_template: bool = False, system_message: str | None = None, predict_only: bool = False,
    max_length: int | None = None, batch_tokens: int | None = None, slots: int = 16, seed: int = 0,
    quantize: str | None = None, checkers: Path | None = None, constrained: bool = False,
) -> dict[str, Any]:
    """Evaluates a model and writes a directory; continues where an earlier call in the same directory stopped.

    Args:
      model, tokenizer, template, max_length, batch_tokens, slots, seed: as for `EvalModel`.
      tasks: names of tasks, groups and tags of lm-eval.
      output: the directory, made if it is not there.
      name: of the model, for people.
      data: task data on disk; see `tasks.load_tasks`.
      limit: only so many documents of a task, the first ones.
      num_fewshot: examples before each document; None: as the task says.
      apply_chat_template: prompts are conversations.
      system_message: put before each prompt.
      predict_only: keeps answers and samples, and computes no scores.
      quantize: the form that the model was quantised to (`lfm.load`), for the report.
      checkers, constrained: of our own benchmarks, see `benchmarks.load`.

    Returns:
      What results.json holds.

    Raises:
      ValueError: see `load_tasks`, `EvalModel` and `keep_answers`, or the directory has the results of another model.
    """
    known = model_hash(model)
    _check_directory(output, known)
    manager, loaded = load_tasks(tasks, data, checkers=checkers, constrained=constrained)
    output.mkdir(parents=True, exist_ok=True)
    length = model.config.max_position if max_length is None else max_length
    # What is asked has passed template and tokenizer; the two also say how a reply is read.
    codec = hashlib.sha256(tokenizer.to_str().encode()).hexdigest()
    of = {"model": known, "max_length": length, "template": template, "tokenizer": codec}
    with keep_answers(output / ANSWERS, of) as answers:
        lm = EvalModel(model, tokenizer, template, max_length=length, batch_tokens=batch_tokens, slots=slots, seed=seed,
                       answers=answers)
        results: dict[str, Any] = simple_evaluate(
            lm, tasks=loaded, task_manager=manager, limit=limit, num_fewshot=num_fewshot,
            apply_chat_template=apply_chat_template, system_instruction=system_message, predict_only=predict_only,
        )  # pyrefly: ignore[bad-assignment]
        samples = results.pop("samples")
        for task in loaded:
            if isinstance(task, ChatTask) and not predict_only:
                results["results"][task.task_name] |= task.share_errors(samples[task.task_name])
        results["chat_template"] = lm.chat_template(apply_chat_template)
        results["lfm_jax"] = {
            "model": name,
            "model_hash": known,
            "tokenizer": lm.tokenizer_name,
            "predict_only": predict_only,
            "settings": {
                "limit": limit, "num_fewshot": num_fewshot, "apply_chat_template": apply_chat_template,
                "system_message": system_message, "max_length": length, "seed": seed,
                "data": None if data is None else str(data), "dtype": model.config.dtype, "quantize": quantize,
                "constrained": constrained,
            },
            "versions": {each: metadata.version(each) for each in ("lfm_jax", "lm_eval", "jax", "tokenizers")},
            "device": jax.devices()[0].device_kind,
        }
        _write(output, results, samples)
    return results


def _check_directory(output: Path, known: str) -> None:
    results = output / RESULTS
    if not results.exists():
        return
    try:
        other = json.loads(results.read_text(encoding="utf-8"))["lfm_jax"]
        same, name = other["model_hash"] == known, other["model"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{results} is not of lfm eval; name another output") from None
    if not same:
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
