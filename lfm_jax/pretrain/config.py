"""TrainConfig: what a pre-training run is."""

from __future__ import annotations

import dataclasses
from typing import Annotated, ClassVar

import tyro

from lfm_jax.data.config import DataConfig
from lfm_jax.data.sources import contains
from lfm_jax.pretrain.objective import NextToken
from lfm_jax.train.config import RunConfig
from lfm_jax.train.launch import Launch
from lfm_jax.train.objective import Objective


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """A run that learns to predict the next token of text.

    Raises:
      ValueError: on construction, one message that lists every bad field.
    """

    # Whether the data is the same, its own fingerprint decides.
    movable: ClassVar[frozenset[str]] = frozenset({"sources", "mixture", "heldout", "exclude", "tokenizer", "prefetch"})

    data: DataConfig
    init_from: str | None = None
    """Start from these weights: a Hugging Face directory, the directory of another run, a GGUF file, or a Hub id
    (OWNER/NAME or OWNER/NAME@REVISION). None: random."""
    loss_chunk: int = 512
    """Tokens whose logits are in memory at one time."""
    z_loss: float = 0.0
    """Weight of the squared log of the softmax's denominator in what is minimised; 1e-4 keeps logits from drifting."""

    @property
    def rows(self) -> int:
        return self.data.batch_size

    @property
    def seq_len(self) -> int:
        return self.data.seq_len

    def objective(self) -> Objective:
        return NextToken(loss_chunk=self.loss_chunk, z_loss=self.z_loss)

    def problems(self) -> list[str]:
        problems = super().problems()
        if self.loss_chunk < 1:
            problems.append(f"loss_chunk is {self.loss_chunk}; it must be at least 1")
        if not self.z_loss >= 0:
            problems.append(f"z_loss is {self.z_loss}; it must not be negative")
        if not self.model.causal:
            problems.append("model.causal is False; next-token prediction needs a causal model")
        if not self.model.eos_ids:
            problems.append("model.eos_ids is empty; name the id that ends a document")
        problems += [
            f"run_dir {self.run_dir} lies inside data source {source!r}, which would then train on it; choose another "
            "run_dir or name it in data.exclude"
            for source in (*self.data.sources, *self.data.heldout)
            if contains(source, self.run_dir, self.data.exclude)
        ]
        return problems


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainCommand:
    """The flags of `lfm train`: those of a run, and those of how its processes come about."""

    run: Annotated[TrainConfig, tyro.conf.arg(name="")]
    launch: Annotated[Launch, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Launch)
