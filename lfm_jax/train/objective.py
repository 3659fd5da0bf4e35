"""What a run minimises, as data: the arrays of its batches, what they weigh, and a sum over them.

The step, the driver, checkpoints and the planner take any objective and know none by name. Ablations do not: each of
their tasks is next-token prediction (`ablate/run.py`).

Dimensions: B rows, T time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from lfm_jax.data.batch import LOSS_IGNORE
from lfm_jax.model import LFM, Aux

DeviceBatch = Mapping[str, Any]
"""A batch as a step takes it: arrays by name, B rows first (`Objective.arrays`)."""
Metrics = dict[str, jax.Array]
"""What a step reports, by name."""


@dataclasses.dataclass(frozen=True)
class BatchArray:
    """One array of a batch."""

    axes: tuple[str | int, ...] = ("batch", "time")
    """First `batch`; then `time`, or the size of an axis that every device has whole."""
    dtype: str = "int32"

    def shape(self, B: int, T: int) -> tuple[int, ...]:
        """Its shape in a batch of B rows of T tokens."""
        return tuple({"batch": B, "time": T}[axis] if isinstance(axis, str) else axis for axis in self.axes)

    @property
    def logical(self) -> tuple[str | None, ...]:
        """The logical axes, for `sharding.spec`."""
        return tuple(axis if isinstance(axis, str) else None for axis in self.axes)


class Terms(NamedTuple):
    """An objective over some rows. All are sums, so that those of parts of a batch add up."""

    total: jax.Array
    """What is differentiated; float32 scalar."""
    sums: Metrics
    """What is reported, each divided by the weight of the whole batch; float32 scalars, `loss` among them."""
    aux: Aux
    """What the layers report (`LFM.hidden`); the step adds their losses."""
    largest: Mapping[str, jax.Array] = MappingProxyType({})
    """What is reported as the largest of all rows; float32 scalars."""


class Objective(Protocol):
    """What a run minimises: the mean `sum of Terms.total / sum of weight` over a batch. It is hashable.

    One that looks at other models too, which are never trained, such as the reference of DPO, names them in an
    attribute `others: tuple[str, ...]`; it is then called with a third argument, a mapping from these names to models
    (`step.Training.others`).
    """

    @property
    def arrays(self) -> Mapping[str, BatchArray]:
        """The arrays of a batch by name."""
        ...

    @property
    def loss_chunk(self) -> int:
        """Tokens whose logits are in memory at one time, for the planner."""
        ...

    def tokens(self, T: int) -> int:
        """Tokens of one row that go through the model."""
        ...

    def weight(self, batch: DeviceBatch) -> jax.Array:
        """What the rows weigh together, float32 scalar of at least 0. It depends on the batch alone, so that the step
        knows it before it differentiates, however many parts it works the batch through in."""
        ...

    def real_tokens(self, batch: DeviceBatch) -> jax.Array | int:
        """Tokens of the batch that are no padding, by which `Terms.aux` are averaged."""
        ...

    def __call__(self, model: LFM, batch: DeviceBatch, *args: Any, **kwargs: Any) -> Terms:
        """The sums over the rows of a batch. Its arguments are the model and the batch, and with `others` those; no
        more."""
        ...


class OverTargets:
    """What objectives over packed rows and their targets have in common."""

    @property
    def arrays(self) -> dict[str, BatchArray]:
        """int32 [B, T] each."""
        return {name: BatchArray() for name in ("tokens", "targets", "segment_ids", "positions")}

    def tokens(self, T: int) -> int:
        return T

    def weight(self, batch: DeviceBatch) -> jax.Array:
        """Targets."""
        return jnp.sum(batch["targets"] != LOSS_IGNORE, dtype=jnp.float32)

    def real_tokens(self, batch: DeviceBatch) -> jax.Array | int:
        ids_BT = batch["segment_ids"]
        return batch["tokens"].size if ids_BT is None else jnp.sum(ids_BT != 0, dtype=jnp.float32)


def others_of(objective: Objective) -> tuple[str, ...]:
    """Names of the other models that an objective looks at."""
    return tuple(getattr(objective, "others", ()))
