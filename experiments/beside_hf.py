"""Compares `lfm eval` with lm-eval's own `hf` backend: the same scores, and the time that each takes, in one process.

    python experiments/beside_hf.py MODEL DATA [--tasks arc_challenge:250 piqa:100 gsm8k:8 ...] [--threads 2]
        [--batch-size 8] [--records runs/beside_hf.jsonl]

MODEL is a GGUF file or a directory that both take; DATA is that of `lfm eval --data` (`experiments/eval_files.py`).
Each task has the number of its documents behind a colon, the first ones. Both have float32 weights and the same
threads, and are timed from requests to scores: loading is left out, compiling is not. A first pass of two documents,
untimed, lets both begin. Needs torch, transformers and accelerate. Every pass is a line of the records; started again
with the same settings and files it repeats none.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stamps import stamp

Model = Callable[[], Any]
TASKS = ("arc_challenge:250", "piqa:250", "lambada_openai:250", "wikitext:4", "gsm8k:16")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--records", type=Path, default=Path("runs/beside_hf.jsonl"))
    args = parser.parse_args(argv)
    args.records.parent.mkdir(parents=True, exist_ok=True)
    settings = {"threads": args.threads, "batch_size": args.batch_size, "max_length": args.max_length,
                "model": stamp(args.model)}
    of = {spec: settings | {"data": stamp(args.data / spec.partition(":")[0])} for spec in args.tasks}
    done = [json.loads(line) for line in args.records.read_text().splitlines()] if args.records.exists() else []
    done = [row for row in done if row.get("of") == of.get(f"{row['task']}:{row['count']}", {})]
    import torch

    torch.set_num_threads(args.threads)
    model = {"lfm_jax": lambda: ours(args.model, args.max_length),
             "hf": lambda: theirs(args.model, args.max_length, args.batch_size)}
    made: dict[str, Any] = {}
    for spec in args.tasks:
        task, _, count = spec.partition(":")
        for name, make in model.items():
            if any((row["backend"], row["task"], row["count"]) == (name, task, int(count)) for row in done):
                continue
            if name not in made:
                made[name] = make()
            run(made[name], task, args.data, 2)
            began = time.monotonic()
            found, scores = run(made[name], task, args.data, int(count))
            row = {"of": of[spec], "backend": name, "task": task, "count": int(count),
                   "seconds": time.monotonic() - began, "scores": found, "answers": scores}
            done.append(row)
            with args.records.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{task} {name}: {row['seconds']:.1f} s, {found}", file=sys.stderr, flush=True)
    print(table(done, args.tasks))
    return 0


def run(model: Any, task: str, data: Path, limit: int) -> tuple[dict[str, float], list[Any]]:
    """Scores of a task by metric, and the answers to its requests, document by document."""
    from lm_eval import simple_evaluate

    from lfm_jax.eval.tasks import load_tasks

    manager, tasks = load_tasks([task], data)
    results: Any = simple_evaluate(model, tasks=tasks, task_manager=manager, limit=limit, bootstrap_iters=0)
    scores = {name.partition(",")[0]: value for name, value in results["results"][task].items()
              if isinstance(value, float) and "stderr" not in name}
    rows = sorted(results["samples"][task], key=lambda row: (row["doc_id"], row["filter"]))
    return scores, [response for row in rows for response in row["resps"]]


def ours(path: Path, max_length: int) -> Any:
    import jax.numpy as jnp

    import lfm_jax as lfm
    from lfm_jax.eval import EvalModel

    model, tokenizer = lfm.load(path, dtype=jnp.float32)
    if tokenizer is None:
        raise ValueError(f"{path} has no tokenizer")
    return EvalModel(model, tokenizer, max_length=max_length)


def theirs(path: Path, max_length: int, batch_size: int) -> Any:
    """The backend over the same weights and the tokenizer that `lfm.load` reads."""
    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    import lfm_jax as lfm

    loaded, tokenizer = lfm.load(path)
    config = loaded.config
    assert tokenizer is not None
    names = {name: tokenizer.id_to_token(id) for name, id in
             (("bos_token", config.bos_id), ("eos_token", config.eos_ids[0]), ("pad_token", config.pad_id))
             if id is not None}
    where = {"pretrained_model_name_or_path": path} if path.is_dir() else {
        "pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    codec = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    return HFLM(model, tokenizer=codec, batch_size=batch_size, max_length=max_length)


def table(done: list[dict[str, Any]], specs: list[str]) -> str:
    lines = ["| task | documents | requests | scores here | scores of `hf` | largest difference of a log-likelihood | "
             "same greedy flags or texts | s here | s of `hf` | times as fast |", "|---" * 10 + "|"]
    for spec in specs:
        task, _, count = spec.partition(":")
        of_task = {row["backend"]: row for row in done if (row["task"], row["count"]) == (task, int(count))}
        here, there = of_task["lfm_jax"], of_task["hf"]
        pairs = [(flat(a), flat(b)) for a, b in zip(here["answers"], there["answers"], strict=True)]
        numbers = [abs(a[0] - b[0]) for a, b in pairs if isinstance(a[0], float)]
        rest = [a[1:] == b[1:] if isinstance(a[0], float) else a == b for a, b in pairs]
        lines.append(" | ".join([
            f"| {task}", count, f"{len(pairs):,}", scores_of(here), scores_of(there),
            f"{max(numbers):.1e}" if numbers else "", f"{sum(rest):,} of {len(rest):,}",
            f"{here['seconds']:.0f}", f"{there['seconds']:.0f}", f"{there['seconds'] / here['seconds']:.1f} |",
        ]))
    return "\n".join(lines)


def flat(answer: Any) -> list[Any]:
    """The parts of an answer: [log-likelihood, whether it is greedy], [log-likelihood] or [text]."""
    while isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    return list(answer) if isinstance(answer, (list, tuple)) else [answer]


def scores_of(row: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in row["scores"].items())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
