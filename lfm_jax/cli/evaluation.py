"""`lfm eval`, `lfm eval compare`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from lfm_jax.config import DType, Quantize
from lfm_jax.problems import raise_problems
from lfm_jax.sharding import MeshConfig

if TYPE_CHECKING:
    from lfm_jax.eval.run import Subject


def evaluate(
    path: Annotated[str | None, tyro.conf.arg(metavar="[PATH]")] = None,
    /,
    *,
    tasks: str,
    output: Path,
    url: str | None = None,
    model: str | None = None,
    tokenizer: str | None = None,
    data: Path | None = None,
    text: Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    apply_chat_template: bool = False,
    system_message: str | None = None,
    predict_only: bool = False,
    max_length: int | None = None,
    batch_tokens: int | None = None,
    slots: int = 16,
    seed: int = 0,
    dtype: DType | None = None,
    quantize: Quantize | None = None,
    adapter: Path | None = None,
    checkers: Path | None = None,
    constrained: bool = False,
    mesh: MeshConfig = MeshConfig(data=1),  # noqa: B008  It is frozen.
    shard: str | None = None,
) -> int:
    """Measure a model with tasks of lm-eval, IFBench, BFCL, JSON schemas, your own chats. Needs `lfm_jax[eval]`.

    Every answer is kept in the output as it comes: the same command continues where an earlier one stopped. Example:
    `lfm eval LFM2.5-350M --tasks arc_easy,piqa --output evals/350M`.

    Args:
      path: Hugging Face directory, run directory, GGUF file, or Hub id (OWNER/NAME or OWNER/NAME@REVISION); none with
        --url.
      tasks: names of tasks, groups and tags of lm-eval, with commas between them; also ifbench, bfcl (or
        bfcl_CATEGORY), json_schema, tool_calls (or tool_calls_NAME) and long_context (or needle_4096
        and the like).
      output: directory for results.json, report.md, samples and answers.
      url: measure a server with OpenAI's API, as http://127.0.0.1:8000/v1, with the key in OPENAI_API_KEY if any.
      model: name of the model at --url, where it has several.
      tokenizer: the model at --url, or a Hugging Face directory with its tokenizer, for multiple choice.
      data: directory with task data on disk (TASK/SPLIT.jsonl), tasks of one's own (NAME.yaml) and chats with tool
        calls (tool_calls/NAME.jsonl).
      text: file or folder of which needle_4096 and other tasks of long_context are made; Python's own library if left
        out.
      limit: only the first so many documents of each task.
      num_fewshot: examples before each document; as the task says if left out.
      apply_chat_template: write prompts as conversations, with the model's chat template.
      system_message: put before each prompt.
      predict_only: keep answers, and score nothing.
      max_length: the most tokens that the model reads; its own limit if left out.
      batch_tokens: tokens of one dispatch of scores; 512 on a CPU, else 16,384, if left out.
      slots: texts that are generated at a time; with --url, requests.
      seed: of sampled texts.
      dtype: dtype of parameters and computation; the stored one if left out.
      quantize: keep matrices in a narrow type, to see what it costs.
      adapter: directory of an adapter (PEFT's files), which is merged into the weights.
      checkers: environment or Python that has the checkers of ifbench and bfcl; made on first use if left out.
      constrained: answers of bfcl, json_schema and tool_calls follow a grammar.
      mesh: copies of the model (data) and devices that each is split over (tensor); data 0: on all devices.
      shard: I/N answers a part of the requests only, to spread them over processes and machines; then the same command
        without it, in the same directory, computes the scores.
    """
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    _check(names, limit=(limit, 1), num_fewshot=(num_fewshot, 0), slots=(slots, 1))
    loading = dict(dtype=dtype, quantize=quantize, adapter=adapter, mesh=mesh, batch_tokens=batch_tokens)
    settings = dict(slots=slots, max_length=max_length, seed=seed)
    from lfm_jax.eval import run, shards

    part = None if shard is None else shards.Shard.of(shard)
    results = run.evaluate(
        _subject(path, url, model, tokenizer, loading, **settings), names, output, data=data, limit=limit,
        num_fewshot=num_fewshot, apply_chat_template=apply_chat_template, system_message=system_message,
        predict_only=predict_only, shard=part, text=text, checkers=checkers, constrained=constrained,
    )
    print(f"{output} has the answers of shard {shard}; once all are there, the same command without --shard computes "
          "the scores" if results is None else (output / run.REPORT).read_text(encoding="utf-8"))
    return 0


def _check(names: Sequence[str], **least: tuple[int | None, int]) -> None:
    """Refuses a command whose numbers cannot be, or that misses a library."""
    problems = [] if names else ["tasks is empty; name at least one, as --tasks arc_easy,piqa"]
    problems += [f"{name} is {value}; it must be at least {bound}" for name, (value, bound) in least.items()
                 if value is not None and value < bound]
    raise_problems("the evaluation cannot be made", problems)
    from lfm_jax.eval import need_lm_eval

    try:
        need_lm_eval()
    except ImportError as error:
        raise ValueError(str(error)) from None


def _subject(
    path: str | None, url: str | None, model: str | None, tokenizer: str | None, loading: Mapping[str, Any], *,
    slots: int, **settings: Any,
) -> Subject:
    """What is measured: the model at a path, or that of a server."""
    if url is None:
        if path is None or model or tokenizer:
            raise ValueError("name a model, as lfm eval LFM2.5-350M; --model and --tokenizer go with --url")
        return _loaded(path, **loading, slots=slots, **settings)
    if path is not None or any(x not in (None, MeshConfig(data=1)) for x in loading.values()):
        raise ValueError("a PATH, --batch-tokens, --dtype, --quantize, --adapter and --mesh do not go with --url: the "
                         "server has the model")
    return _served(url, model, tokenizer, at_once=slots, **settings)


def _loaded(
    path: str, dtype: DType | None, quantize: Quantize | None, adapter: Path | None, mesh: MeshConfig, **settings: Any
) -> Subject:
    """A model of this machine."""
    from lfm_jax.cli.inference import load_chat
    from lfm_jax.eval.run import of_model

    over = None if mesh == MeshConfig(data=1) else mesh.make()
    name = path if adapter is None else f"{path} with {adapter}"
    return of_model(*load_chat(path, dtype, quantize, adapter), name=name, quantize=quantize, mesh=over, **settings)


def _served(url: str, model: str | None, tokenizer: str | None, *, at_once: int, **settings: Any) -> Subject:
    """One of a server."""
    from lfm_jax.eval.run import of_server
    from lfm_jax.eval.server import Server
    from lfm_jax.loading import local

    return of_server(Server(url, model, at_once=at_once), None if tokenizer is None else local(tokenizer), **settings)


def compare(a: tyro.conf.Positional[Path], b: tyro.conf.Positional[Path], /) -> int:
    """Print the differences of two evaluations, with 95 % intervals from a paired bootstrap.

    Documents are drawn in pairs 10,000 times. Where the interval holds 0, nothing can be told apart.

    Args:
      a: output of `lfm eval`.
      b: another one, of the same tasks over the same documents.
    """
    from lfm_jax.eval.compare import compare as run
    from lfm_jax.eval.compare import table

    print(table(run(a, b)))
    return 0
