"""Distillation layer by layer: each layer that differs from the teacher's is to do to the teacher's residual stream
what the teacher's layer does.

Dimensions: B rows, T time, D width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from lfm_jax.config import ModelConfig
from lfm_jax.data.batch import LOSS_IGNORE
from lfm_jax.model import LFM, Aux
from lfm_jax.train.objective import DeviceBatch, OverTargets, Terms

TEACHER = "teacher"


@dataclasses.dataclass(frozen=True)
class LayerOutputs(OverTargets):
    """Mean over learnt targets, and over the layers whose operator is another than the teacher's, of

        |student's layer(x) - teacher's layer(x)|^2 / |teacher's layer(x) - x|^2

    where x is the teacher's own input of that layer, for both (teacher forcing), as the hidden-state alignment of
    MOHAWK (arXiv 2408.10189). What it comes to is the share of a layer's work that the student's leaves undone: 1 for a
    layer that passes its input through. Layers do not meet, so that each learns at its own pace, and those of one run
    serve every mixture of both models' layers.
    """

    @property
    def loss_chunk(self) -> int:
        return 1  # No logits are made.

    @property
    def others(self) -> tuple[str, ...]:
        return (TEACHER,)

    def __call__(self, model: LFM, batch: DeviceBatch, others: Mapping[str, LFM]) -> Terms:
        teacher = others[TEACHER]
        x_BTD, positions_BT, segment_ids_BT = teacher.inputs(batch["tokens"], batch["positions"], batch["segment_ids"])
        inputs = dict(positions_BT=positions_BT, segment_ids_BT=segment_ids_BT, state=None)
        found: dict[str, jax.Array] = {}
        for i, (theirs, ours) in enumerate(zip(teacher.blocks, model.blocks, strict=True)):
            with jax.named_scope(f"layer_{i}"):
                next_BTD, _, _ = theirs(x_BTD, **inputs)
                if ours.kind != theirs.kind:
                    made_BTD, _, _ = ours(x_BTD, **inputs)
                    missing_BT, work_BT = (_square(a, b) for a, b in ((made_BTD, next_BTD), (x_BTD, next_BTD)))
                    share_BT = missing_BT / jnp.maximum(work_BT, jnp.finfo(jnp.float32).tiny)
                    found[f"layer_{i}"] = jnp.sum(jnp.where(batch["targets"] != LOSS_IGNORE, share_BT, 0.0))
                x_BTD = next_BTD
        total = jnp.mean(jnp.stack(list(found.values())))
        return Terms(total, {"loss": total} | found, Aux({}, {}))


def _square(a_BTD: jax.Array, b_BTD: jax.Array) -> jax.Array:
    """Mean over the width of the square of a difference, [B, T]."""
    return jnp.mean(jnp.square(a_BTD.astype(jnp.float32) - b_BTD.astype(jnp.float32)), axis=-1)


def layer_problems(teacher: ModelConfig, model: ModelConfig) -> list[str]:
    """A line for each thing that keeps a student's layers from standing beside those of a teacher."""
    problems = [f"distill.match is layers, and {name} is {getattr(model, name)!r} in the student and "
                f"{getattr(teacher, name)!r} in the teacher; make them equal"
                for name in ("num_layers", "hidden_size") if getattr(model, name) != getattr(teacher, name)]
    if model.scan_layers:
        problems.append("model.scan_layers is true, and distill.match: layers looks at them one by one; leave it out")
    if not problems and model.layer_types == teacher.layer_types:
        problems.append("distill.match is layers, and all operators are of the teacher's kinds, so that there is "
                        "nothing to learn; match tokens")
    return problems
