"""`lfm eval`, `lfm eval compare`."""

from __future__ import annotations

from pathlib import Path

import tyro

from lfm_jax.cli.arguments import ModelName
from lfm_jax.config import DType, Quantize


def evaluate(
    path: ModelName,
    /,
    tasks: str,
    output: Path,
    data: Path | None = None,
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
    checkers: Path | None = None,
    constrained: bool = False,
) -> int:
    """Measure a model with tasks of lm-eval, IFBench, BFCL, JSON schemas, your own chats. Needs `lfm_jax[eval]`.

    Every answer is kept in the output as it comes: the same command continues where an earlier one stopped. Example:
    `lfm eval LFM2.5-350M --tasks arc_easy,piqa --output evals/350M`.

    Args:
      path: Hugging Face directory, run directory, GGUF file, or Hub id (OWNER/NAME or OWNER/NAME@REVISION).
      tasks: names of tasks, groups and tags of lm-eval, with commas between them; also ifbench, bfcl (or
        bfcl_CATEGORY), json_schema and tool_calls (or tool_calls_NAME).
      output: directory for results.json, report.md, samples and answers.
      data: directory with task data on disk (TASK/SPLIT.jsonl), tasks of one's own (NAME.yaml) and chats with tool
        calls (tool_calls/NAME.jsonl).
      limit: only the first so many documents of each task.
      num_fewshot: examples before each document; as the task says if left out.
      apply_chat_template: write prompts as conversations, with the model's chat template.
      system_message: put before each prompt.
      predict_only: keep answers, and score nothing.
      max_length: the most tokens that the model reads; its own limit if left out.
      batch_tokens: tokens of one dispatch of scores; 2,048 on a CPU, else 16,384, if left out.
      slots: texts that are generated at a time.
      seed: of sampled texts.
      dtype: dtype of parameters and computation; the stored one if left out.
      quantize: keep matrices in a narrow type, to see what it costs.
      checkers: environment or Python that has the checkers of ifbench and bfcl; made on first use if left out.
      constrained: answers of bfcl, json_schema and tool_calls follow a grammar.
    """
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise ValueError("tasks is empty; name at least one, as --tasks arc_easy,piqa")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1")
    from lfm_jax.eval import need_lm_eval

    try:
        need_lm_eval()
    except ImportError as error:
        raise ValueError(str(error)) from None
    from lfm_jax.cli.inference import load_chat
    from lfm_jax.eval.run import REPORT
    from lfm_jax.eval.run import evaluate as run

    model, tokenizer, template = load_chat(path, dtype, quantize)
    run(model, tokenizer, template, names, output, name=path, data=data, limit=limit, num_fewshot=num_fewshot,
        apply_chat_template=apply_chat_template, system_message=system_message, predict_only=predict_only,
        max_length=max_length, batch_tokens=batch_tokens, slots=slots, seed=seed, quantize=quantize,
        checkers=checkers, constrained=constrained)
    print((output / REPORT).read_text(encoding="utf-8"))
    return 0


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
