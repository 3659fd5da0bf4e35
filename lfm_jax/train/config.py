"""TrainConfig: what a training run is."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import tyro

from lfm_jax.config import ModelConfig
from lfm_jax.data import DataConfig
from lfm_jax.data.sources import contains
from lfm_jax.sharding import MeshConfig
from lfm_jax.train.launch import Launch
from lfm_jax.train.optimizer import OptimizerConfig, learning_rate
from lfm_jax.train.profiling import parse_profile
from lfm_jax.train.step import GuardConfig
from lfm_jax.train.trackers import TrackerName, check_trackers


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run.

    Raises:
      ValueError: on construction, one message that lists every bad field.
    """

    run_dir: str
    """Directory of the run; an existing run in it is resumed."""
    steps: int
    """Optimizer steps in all."""
    data: DataConfig
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    """How devices share the work; a run resumes on another mesh."""
    init_from: str | None = None
    """Start from these weights: a Hugging Face directory, or the directory of another run. None: random."""
    seed: int = 0
    """Of the random initialisation."""
    micro_batches: int = 1
    """Gradient accumulation: the batch is worked through in this many equal parts."""
    loss_chunk: int = 512
    """Tokens whose logits are in memory at one time."""
    z_loss: float = 0.0
    """Weight of the squared log of the softmax's denominator in what is minimised; 1e-4 keeps logits from drifting."""
    guard: GuardConfig = dataclasses.field(default_factory=GuardConfig)
    """When an update is skipped, and when the run goes back to a checkpoint."""
    eval_every: int = 200
    """Steps between held-out losses; the run's end has one always. 0: only there."""
    eval_batches: int = 0
    """Most batches of a held-out loss; 0: all, with bits per byte. A large held-out set wants a limit."""
    checkpoint_every: int = 200
    """Steps between checkpoints; the run's end and an interrupt have one always. 0: only there."""
    keep_checkpoints: int = 2
    """How many of the latest checkpoints to keep."""
    log_every: int = 10
    """Steps between lines on a console that is not a terminal."""
    trackers: tuple[TrackerName, ...] = ()
    """Where records go besides metrics.jsonl; the extra [track] installs them."""
    profile: str | None = None
    """Steps of which to write an xprof trace into the run directory, for example 10-12."""

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {getattr(self, name)}; it must be at least {least}"
            for name, least in (("steps", 1), ("micro_batches", 1), ("loss_chunk", 1), ("keep_checkpoints", 1),
                                ("log_every", 1), ("eval_every", 0), ("eval_batches", 0), ("checkpoint_every", 0))
            if getattr(self, name) < least
        ]
        if self.micro_batches >= 1 and self.data.batch_size % self.micro_batches:
            problems.append(
                f"data.batch_size {self.data.batch_size} is not a multiple of micro_batches {self.micro_batches}"
            )
        if not self.z_loss >= 0:
            problems.append(f"z_loss is {self.z_loss}; it must not be negative")
        if not self.model.eos_ids:
            problems.append("model.eos_ids is empty; name the id that ends a document")
        if self.data.seq_len > self.model.max_position:
            problems.append(f"data.seq_len {self.data.seq_len} exceeds model.max_position {self.model.max_position}")
        problems += [
            f"run_dir {self.run_dir} lies inside data source {source!r}, which would then train on it; choose another "
            "run_dir or name it in data.exclude"
            for source in (*self.data.sources, *self.data.heldout)
            if contains(source, self.run_dir, self.data.exclude)
        ]
        problems += check_trackers(self.trackers)
        for check in (lambda: learning_rate(self.optimizer, max(self.steps, 1)),
                      lambda: self.profile and parse_profile(self.profile, max(self.steps, 1))):
            try:
                check()
            except ValueError as error:
                problems.append(str(error))
        if problems:
            raise ValueError("TrainConfig is not valid:\n" + "\n".join(f"  - {p}" for p in problems))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainCommand:
    """The flags of `lfm train`: those of a run, and those of how its processes come about."""

    run: Annotated[TrainConfig, tyro.conf.arg(name="")]
    launch: Annotated[Launch, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Launch)
