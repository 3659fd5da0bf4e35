"""Compares `lfm eval` with lm-eval's own `hf` backend: the same scores, and the time that each takes, in one process.

    python experiments/beside_hf.py MODEL DATA [--tasks arc_challenge:250 arc_challenge:60:25 gsm8k:24 ...]
        [--threads 2] [--batch-size 8] [--records runs/beside_hf.jsonl]

MODEL is a GGUF file or a directory that both take; DATA is that of `lfm eval --data` (`experiments/eval_files.py`).
Each task has the number of its documents behind a colon, the first ones, and perhaps the number of examples behind
another. Both have float32 weights and the same threads, and are timed from requests to scores: loading is left out,
compiling is not, but a second pass of ours has everything compiled, as a second `lfm eval` has from its cache. A first
pass of two documents, untimed, lets both begin. Needs torch, transformers and accelerate. What each backend did of a
task is a line of the records; started again with the same settings and files it repeats none.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from records import Records, stamp

Model = Callable[[], Any]
TASKS = ("arc_challenge:250", "arc_challenge:250:5", "arc_challenge:60:25", "piqa:150", "lambada_openai:150",
         "wikitext:2", "gsm8k:24")


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
    settings = {"threads": args.threads, "batch_size": args.batch_size, "max_length": args.max_length,
                "model": stamp(args.model)}
    of = {spec: settings | {"data": stamp(args.data / spec.partition(":")[0])} for spec in args.tasks}
    records = Records(args.records, lambda row: row["of"] == of.get(row["spec"]))
    import torch

    torch.set_num_threads(args.threads)
    model = {"lfm_jax": lambda: ours(args.model, args.max_length),
             "hf": lambda: theirs(args.model, args.max_length, args.batch_size)}
    made: dict[str, Any] = {}
    for spec in args.tasks:
        for name, make in model.items():
            if any((row["backend"], row["spec"]) == (name, spec) for row in records.rows):
                continue
            if name not in made:
                made[name] = make()
            run(made[name], spec, args.data, limit=2)
            passes = [timed(made[name], spec, args.data) for _ in range(2 if name == "lfm_jax" else 1)]
            seconds = [each[0] for each in passes]
            _, found, scores = passes[-1]
            records.add({"of": of[spec], "backend": name, "spec": spec, "seconds": seconds, "scores": found,
                         "answers": scores})
            print(f"{spec} {name}: {seconds} s, {found}", file=sys.stderr, flush=True)
    print(table(records.rows, args.tasks))
    return 0


def run(model: Any, spec: str, data: Path, limit: int | None = None) -> tuple[dict[str, float], list[Any]]:
    """Scores of a task by metric, and the answers to its requests, document by document."""
    from lm_eval import simple_evaluate

    from lfm_jax.eval.tasks import load_tasks

    task, count, *shots = spec.split(":")
    manager, tasks = load_tasks([task], data)
    results: Any = simple_evaluate(model, tasks=tasks, task_manager=manager, limit=limit or int(count),
                                   num_fewshot=int(shots[0]) if shots else None, bootstrap_iters=0)
    scores = {name.partition(",")[0]: value for name, value in results["results"][task].items()
              if isinstance(value, float) and "stderr" not in name}
    rows = sorted(results["samples"][task], key=lambda row: (row["doc_id"], row["filter"]))
    return scores, [response for row in rows for response in row["resps"]]


def timed(model: Any, spec: str, data: Path) -> tuple[float, dict[str, float], list[Any]]:
    """`run` on all documents, behind the seconds that it took."""
    began = time.monotonic()
    found, scores = run(model, spec, data)
    return time.monotonic() - began, found, scores


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
    lines = ["| task | documents | examples | requests | scores here | scores of `hf` | largest difference of a "
             "log-likelihood | same greedy flags or texts | s of `hf` | s here, compiling | s here, compiled | "
             "times as fast |", "|---" * 12 + "|"]
    for spec in specs:
        task, count, *shots = spec.split(":")
        here, there = ({row["backend"]: row for row in done if row["spec"] == spec}[name] for name in ("lfm_jax", "hf"))
        pairs = [(flat(a), flat(b)) for a, b in zip(here["answers"], there["answers"], strict=True)]
        numbers = [abs(a[0] - b[0]) for a, b in pairs if isinstance(a[0], float)]
        rest = [a[1:] == b[1:] if isinstance(a[0], float) else a == b for a, b in pairs]
        first, second = (there["seconds"][0] / seconds for seconds in here["seconds"])
        lines.append(" | ".join([
            f"| {task}", count, shots[0] if shots else "", f"{len(pairs):,}", scores_of(here), scores_of(there),
            f"{max(numbers):.1e}" if numbers else "", f"{sum(rest):,} of {len(rest):,}",
            *(f"{seconds:.0f}" for seconds in there["seconds"] + here["seconds"]), f"{first:.1f}; {second:.1f} |",
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
