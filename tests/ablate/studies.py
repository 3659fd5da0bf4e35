"""A study small enough for tests."""

import dataclasses

from lfm_jax.ablate.study import Grid, Study
from lfm_jax.ablate.tasks.recall import Mqar
from lfm_jax.ablate.tasks.text import Text
from lfm_jax.config import ModelConfig

MODEL = ModelConfig(hidden_size=32, ffn_size=64, num_heads=4, num_kv_heads=2, head_dim=8, dtype="float32",
                    max_position=4096, init_std=0.12)
SHALLOW = dict(pattern="conv:1,attention:1", vary=(Grid.of({"attention": [0, 1]}),))
"""Two layers, that compile fast."""


def tiny_study(**changes) -> Study:
    """Four layers of width 32, one of them attention."""
    fields = dict(
        name="tiny", question="?", out="runs", pattern="conv:3,attention:1",
        vary=(Grid.of({"attention": [0, 1]}),),
        tasks=("mqar",), match_step=2, model=MODEL, cost_contexts=(), seeds=2,
        mqar=Mqar(pairs=(2,), length=16, steps=3, batch_size=4, heldout_rows=8), text=Text(steps=3, heldout_rows=8),
    )
    return Study(**fields | changes)


def with_steps(study: Study, steps: int) -> Study:
    return dataclasses.replace(study, mqar=dataclasses.replace(study.mqar, steps=steps))
