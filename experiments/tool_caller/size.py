"""How large a model the minutes of pre-training feed best, by the law of `docs/ablations/intelligence_density`.

Dimensions: N parameters, D training tokens, C training FLOPs, B rows, T time.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lfm_jax.ablate.pattern import parse_pattern
from lfm_jax.ablate.report import arms_of
from lfm_jax.ablate.results import RESULTS, read_results
from lfm_jax.ablate.scaling import Law, fit
from lfm_jax.config import ModelConfig
from lfm_jax.pretrain.config import TrainConfig
from lfm_jax.recipe import load_recipe, model_flags
from tool_caller.config import HERE, Life

STUDY = HERE.parents[1] / "docs" / "ablations" / "intelligence_density" / RESULTS
HEAD_DIM = 16
FFN_RATIO = 2.5
"""Both of the study, whose models the law was fitted to."""
WARM, TIMED = 2, 5
"""Steps."""


def choose(life: Life) -> dict[str, Any]:
    """The width with the lowest loss that the law expects, and what it expects of all; plain data.

    Wide products use a machine better than narrow ones, so that the chosen width is one that was timed itself. A width
    that was not counts with the better rate of its timed neighbours; one wider than all that were timed counts with the
    rate of the widest, which may be too low for it.
    """
    law = fit(arms_of(read_results(STUDY)), resamples=0).law
    rates = dict.fromkeys(life.widths, life.rate) if life.rate else {}
    width = life.widths[len(life.widths) // 2]
    while True:
        rates[width] = rates.get(width) or timed_rate(life, width)
        rows = _expected(life, law, rates)
        best = min(rows, key=lambda row: row["expected_loss"])
        width = best["width"]
        if width in rates:
            return {**best, "minutes": life.minutes.pretrain, "flops": _budget(life, best["gflops"]), "widths": rows,
                    "pattern": life.pattern, "law": dataclasses.asdict(law)}


def _expected(life: Life, law: Law, rates: Mapping[int, float]) -> list[dict[str, Any]]:
    """What the law expects of each width, which has as many tokens as its pre-training can see: the FLOPs of all its
    minutes over those of one."""
    rows = []
    for width in life.widths:
        config = model_of(life, width)
        around = [max((other for other in rates if other <= width), default=None),
                  min((other for other in rates if other >= width), default=None)]
        rate = max(rates[other] for other in around if other is not None)
        N, D = config.num_params(), int(_budget(life, rate) / (3 * config.flops_per_token(life.context)))
        rows.append({"width": width, "parameters": N, "tokens": D, "expected_loss": float(law(N, D)),
                     "gflops": rate})
    return rows


def _budget(life: Life, rate: float) -> float:
    """C of pre-training at a rate in GFLOP/s."""
    return 1e9 * rate * 60 * life.minutes.pretrain


def model_of(life: Life, width: int) -> ModelConfig:
    """The model of a width: LFM2's layers, with the study's proportions."""
    return ModelConfig(
        layer_types=parse_pattern(life.pattern), vocab_size=life.vocab_size, hidden_size=width,
        ffn_size=32 * round(FFN_RATIO * width / 32), num_heads=width // HEAD_DIM,
        num_kv_heads=width // (2 * HEAD_DIM), head_dim=HEAD_DIM, init_std=0.68 / width**0.5,
        max_position=life.max_position, dtype="float32",
    )


def timed_rate(life: Life, width: int) -> float:
    """GFLOP/s of training steps of a width on this machine, by trial."""
    config = model_of(life, width)
    B, T = max(1, life.batch_tokens // life.context), life.context
    run = load_recipe(TrainConfig, HERE / "pretrain.yaml", [
        *model_flags(config), "--data.seq-len", str(T), "--data.batch-size", str(B), "--data.sources", str(Path("-"))])
    training = run.training()
    step, state = training.compiled_step(), training.random_state(0)
    tokens_BT = jax.random.randint(jax.random.key(0), (B, T), 0, life.vocab_size)
    batch = {"tokens": tokens_BT, "targets": tokens_BT, "segment_ids": jnp.ones((B, T), jnp.int32),
             "positions": jnp.broadcast_to(jnp.arange(T), (B, T))}
    seconds = []
    for _ in range(WARM + TIMED):
        began = time.monotonic()
        state, metrics = step(state, batch)
        jax.block_until_ready(metrics)
        seconds.append(time.monotonic() - began)
    return 3 * config.flops_per_token(T) * B * T / statistics.median(seconds[WARM:]) / 1e9
