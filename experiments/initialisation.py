"""How should random weights begin? The same small hybrid, data and schedule under each of `ModelConfig.init`'s choices.

Prints a Markdown table: held-out loss after a short run, mean and spread over seeds, and how loud each kind of
operator is at the first step. Finished runs are kept in --results, so that an interrupted study goes on.
Source of the text: Python's standard library, as in `make demo`.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
import sysconfig
import time
from pathlib import Path
from typing import Any

import jax
import tyro
from demo import EXCLUDE, RECIPE
from tokenizers import Tokenizer

from lfm_jax.config import ModelConfig
from lfm_jax.data.config import DataConfig
from lfm_jax.data.corpora import make_tokenizer, open_corpus
from lfm_jax.model import param_traits
from lfm_jax.pretrain.config import TrainConfig
from lfm_jax.pretrain.objective import next_token_training
from lfm_jax.recipe import load_recipe
from lfm_jax.train.optimizer import OptimizerConfig, make_optimizer

HELDOUT_BATCHES = 32
CHOICES: dict[str, dict[str, Any]] = {
    "normal, 0.02": dict(init="normal", init_std=0.02),
    "normal, 0.06": dict(init="normal", init_std=0.06),
    "scaled": dict(init="scaled", init_std=0.02),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """A short run for each choice, peak learning rate and seed."""

    results: Path = Path("runs/initialisation.jsonl")
    """One line a finished run."""
    steps: int = 300
    rows: int = 8
    """Rows of 256 tokens in a batch."""
    peak_lrs: tuple[float, ...] = (1e-3, 3e-3)
    seeds: int = 3


def main(study: Study) -> None:
    stdlib = sysconfig.get_paths()["stdlib"]
    flags = ["--data.sources", stdlib, "--data.exclude", *EXCLUDE, "--data.batch-size", str(study.rows),
             "--steps", str(max(study.steps, 1000))]
    base = load_recipe(TrainConfig, RECIPE, flags)
    study.results.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(base.data, vocab_size=base.model.vocab_size)
    done = _read(study.results)
    for seed in range(study.seeds):
        for peak_lr in study.peak_lrs:
            for name, fields in CHOICES.items():
                key = dict(name=name, peak_lr=peak_lr, seed=seed, steps=study.steps, rows=study.rows)
                if any(key.items() <= record.items() for record in done):
                    continue
                began = time.monotonic()
                data = dataclasses.replace(base.data, seed=seed)
                record = key | run(base.model.replace(**fields), data, tokenizer, peak_lr, seed, study.steps)
                done.append(record)
                with study.results.open("a") as file:
                    file.write(json.dumps(record) + "\n")
                print(f"{key}: {record['heldout_nats']:.4f} nats/token, {time.monotonic() - began:.0f} s", flush=True)
    print(table([r for r in done if r["steps"] == study.steps and r["rows"] == study.rows]))


def run(
    model: ModelConfig, data: DataConfig, tokenizer: Tokenizer, peak_lr: float, seed: int, steps: int
) -> dict[str, Any]:
    """Held-out loss after a run, its first step's activation norms and how many updates were skipped."""
    corpus = open_corpus(data, tokenizer, bos_id=model.bos_id, eos_id=model.eos_ids[0])
    config = OptimizerConfig(peak_lr=peak_lr, warmup_steps=steps // 20, final_lr_fraction=0.0)
    optimizer = make_optimizer(config, steps, param_traits(model, stacked=model.scan_layers))
    training = next_token_training(model, optimizer)
    state = training.random_state(seed)
    step, evaluate = training.compiled_step(), training.compiled_evaluate()
    batches = corpus.train_batches()
    norms: dict[str, float] = {}
    skipped = 0.0
    for i in range(steps):
        state, metrics = step(state, {name: jax.numpy.asarray(x) for name, x in next(batches).items()})
        skipped += float(metrics["skipped"])
        if i == 0:
            norms = {name: float(x) for name, x in metrics.items() if name.startswith("act_norm/")}
    heldout = itertools.islice(corpus.heldout_batches(), HELDOUT_BATCHES)
    parts = [evaluate((state.params, state.frozen), batch) for batch in heldout]
    nats = sum(float(sums["loss"]) for sums, _ in parts) / sum(float(weight) for _, weight in parts)
    return dict(heldout_nats=nats, skipped=skipped) | norms


def table(records: list[dict[str, Any]]) -> str:
    """Rows by choice and learning rate."""
    kinds = sorted({key for record in records for key in record if key.startswith("act_norm/")})
    head = ["initialisation", "peak_lr", "held-out nats/token, mean", "spread", "seeds", "skipped", *kinds]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name in CHOICES:
        for peak_lr in sorted({record["peak_lr"] for record in records}):
            same = [r for r in records if r["name"] == name and r["peak_lr"] == peak_lr]
            if not same:
                continue
            nats = [r["heldout_nats"] for r in same]
            row = [name, f"{peak_lr:g}", f"{statistics.mean(nats):.4f}", f"{max(nats) - min(nats):.4f}", str(len(nats)),
                   f"{sum(r['skipped'] for r in same):.0f}"]
            row += [f"{statistics.mean(r[kind] for r in same):.4f}" for kind in kinds]
            lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def _read(path: Path) -> list[dict[str, Any]]:
    """Whole lines only: a kill may have cut the last one short."""
    if not path.exists():
        return []
    whole = path.read_text().rpartition("\n")[0]
    return [json.loads(line) for line in whole.splitlines()]


if __name__ == "__main__":
    main(tyro.cli(Study))
