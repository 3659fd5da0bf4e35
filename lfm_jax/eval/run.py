"""`lfm eval`: tasks of lm-eval, and a directory with what came out of them.

    answers.jsonl       every answer of the model, as it came; answers-I-of-N.jsonl: those of a shard
    results.json        lm-eval's results, with `lfm_jax`: model, settings, versions
    samples_TASK.jsonl  lm-eval's samples, a document and its answers a line
    report.md           scores, standard errors, settings
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import Mesh
from lm_eval import simple_evaluate
from lm_eval.utils import handle_non_serializable, sanitize_list

from lfm_jax.eval.answers import keep_answers, model_hash
from lfm_jax.eval.benchmarks.chat_task import ChatTask
from lfm_jax.eval.kept import KeptLM
from lfm_jax.eval.lm import EvalModel
from lfm_jax.eval.long_context import LONGEST, make_tasks, parse_name
from lfm_jax.eval.report import report
from lfm_jax.eval.server import NO_SCORES, Server, TextServer, TokenServer
from lfm_jax.eval.shards import PartDone, PartLM, Shard
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
    mesh: Mesh | None = None,
) -> Subject:
    """A model on the engine.

    Args:
      model, tokenizer, template, max_length, batch_tokens, slots, seed, mesh: as for `EvalModel`.
      name: of the model, for people.
      quantize: the form that the model was quantised to (`lfm.load`), for the report.

    Raises:
      ValueError: see `EvalModel`.
    """
    lm = EvalModel(model, tokenizer, template, max_length=max_length, batch_tokens=batch_tokens, slots=slots, seed=seed,
                   mesh=mesh)
    # What is asked has passed template and tokenizer; the two also say how a reply is read.
    codec = hashlib.sha256(tokenizer.to_str().encode()).hexdigest()
    known = model_hash(model)
    axes = None if mesh is None else {name: size for name, size in mesh.shape.items() if size > 1}
    return Subject(
        lm, name, {"model_hash": known},
        {"model": known, "max_length": lm.max_length, "template": template, "tokenizer": codec},
        {"max_length": lm.max_length, "seed": seed, "dtype": model.config.dtype, "quantize": quantize,
         "mesh": axes},
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
    predict_only: bool = False, shard: Shard | None = None, text: Path | None = None, checkers: Path | None = None,
    constrained: bool = False,
) -> dict[str, Any] | None:
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
      shard: keeps the answers to this part of the requests, and nothing else; a call without, in the same directory,
        then finds them.
      text: what tasks of long contexts are made of; see `long_context.Text`.
      checkers, constrained: of our own benchmarks, see `benchmarks.load`.

    Returns:
      What results.json holds; None for a shard.

    Raises:
      ValueError: see `load_tasks` and `keep_answers`, an option that none of the tasks has, or the directory has the
        results of another model.
    """
    lm = subject.lm
    _check_directory(output, subject.identity)
    if any(parse_name(name, LONGEST) for name in tasks) and isinstance(lm, TextServer):
        raise ValueError(NO_SCORES)
    long = [pair for name in tasks for pair in parse_name(name, lm.max_length)]
    rest = [name for name in tasks if not parse_name(name, lm.max_length)]
    if long and constrained:
        raise ValueError("tasks of long contexts cannot be constrained; leave --constrained out, or measure them alone")
    if text is not None and not long:
        raise ValueError("text is what tasks of long contexts are made of, and none of these tasks is one; leave "
                         "--text out")
    manager, loaded = load_tasks(rest, data, checkers=checkers, constrained=constrained)
    loaded += make_tasks(long, text, _counter(lm, apply_chat_template, system_message), limit, subject.settings["seed"])
    output.mkdir(parents=True, exist_ok=True)
    path = output / (ANSWERS if shard is None else f"answers-{shard.number}-of-{shard.count}.jsonl")
    others = [other for other in sorted(output.glob("answers*.jsonl")) if other != path]
    with keep_answers(path, subject.of, others) as answers:
        lm.answers = answers
        asked = lm if shard is None else PartLM(lm, shard, loaded)
        try:
            results: dict[str, Any] = simple_evaluate(
                asked, tasks=loaded, task_manager=manager, limit=limit, num_fewshot=num_fewshot,
                apply_chat_template=apply_chat_template, system_instruction=system_message, predict_only=predict_only,
            )  # pyrefly: ignore[bad-assignment]
        except PartDone:
            return None
        samples = results.pop("samples")
        for task in loaded:
            if isinstance(task, ChatTask) and not predict_only:
                results["results"][task.task_name] |= task.share_errors(samples[task.task_name])
        results["chat_template"] = lm.chat_template(apply_chat_template)
        results["lfm_jax"] = {
            "model": subject.name,
            **subject.identity,
            "tokenizer": lm.tokenizer_name,
            "predict_only": predict_only,
            "settings": {
                "limit": limit, "num_fewshot": num_fewshot, "apply_chat_template": apply_chat_template,
                "system_message": system_message, "data": None if data is None else str(data),
                **({"text": "Python's standard library" if text is None else str(text)} if long else {}),
                "constrained": constrained, **subject.settings,
            },
            "versions": {each: metadata.version(each) for each in ("lfm_jax", "lm_eval", "jax", "tokenizers")},
            "device": "a server" if "server" in subject.identity else jax.devices()[0].device_kind,
        }
        _write(output, results, samples)
    return results


def _counter(lm: KeptLM, chat: bool, system: str | None) -> Callable[[str], int]:
    """What counts the tokens of a prompt as lm-eval asks it."""
    before = [{"role": "system", "content": system}] if system else []

    def count(prompt: str) -> int:
        if chat:
            prompt = lm.apply_chat_template([*before, {"role": "user", "content": prompt}])
        return len(lm.tok_encode(prompt if chat or not system else system + prompt))

    return count


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
