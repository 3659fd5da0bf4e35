"""RunConfig: what every training run is, whatever it learns."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from typing import ClassVar

from lfm_jax.adapters.config import NO_LORA, LoRAConfig
from lfm_jax.adapters.trees import adapter_traits
from lfm_jax.config import ModelConfig
from lfm_jax.model import param_traits
from lfm_jax.problems import raise_problems
from lfm_jax.sharding import MeshConfig
from lfm_jax.train import rounding
from lfm_jax.train.objective import Objective
from lfm_jax.train.optimizer import OptimizerConfig, learning_rate, make_optimizer
from lfm_jax.train.profiling import parse_profile
from lfm_jax.train.state import frozen_mask
from lfm_jax.train.step import GuardConfig, Training
from lfm_jax.train.trackers import TrackerName, check_trackers


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """Tasks of lm-eval with which a run is measured while it trains; the extra [eval] installs it.

    Raises:
      ValueError: on construction; the message lists every bad field.
    """

    tasks: tuple[str, ...] = ()
    """Names of tasks, groups and tags; light ones, since training waits for them."""
    every: int = 0
    """Steps between measurements; the run's end has one always. 0: only there."""
    limit: int | None = None
    """Only the first so many documents of each task."""
    data: str | None = None
    """Directory with task data on disk and tasks of one's own, as of `lfm eval`."""

    def __post_init__(self) -> None:
        problems = [f"eval.every is {self.every}; it must be at least 0"] if self.every < 0 else []
        if self.limit is not None and self.limit < 1:
            problems.append(f"eval.limit is {self.limit}; it must be at least 1")
        if not self.tasks and (self.every, self.limit, self.data) != (0, None, None):
            problems.append("eval.tasks is empty, and the other fields of eval are for them; name tasks")
        raise_problems("TaskConfig is not valid", problems)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig(abc.ABC):
    """The part of a run's config that does not depend on what is learnt; the config of each method extends it.

    Raises:
      ValueError: on construction, one message that lists every bad field.
    """

    movable: ClassVar[frozenset[str]] = frozenset()
    """Fields of `data` that may change in a run, as when files move."""
    least_steps: ClassVar[int] = 1
    """0 where `steps` may be left to the data; it is known before the run begins."""

    run_dir: str
    """Directory of the run; an existing run in it is resumed."""
    steps: int
    """Optimizer steps in all; with `train_minutes`, at most."""
    train_minutes: float | None = None
    """Time budget of the steps, in minutes. A new run times a few trial steps, discards them, and fixes the number of
    steps that fits."""
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    """How devices share the work; a run resumes on another mesh."""
    seed: int = 0
    """Of the random initialisation, of a new adapter and of dropout."""
    freeze: tuple[str, ...] = ()
    """Weights that are not trained: shell patterns over their names, such as embed or blocks.*.operator.*."""
    lora: LoRAConfig = NO_LORA
    """Train a low-rank adapter alone (`lora: {rank: 8}`): the weights that the run begins with stay as they are, and no
    checkpoint holds them."""
    micro_batches: int = 1
    """Gradient accumulation: the batch is worked through in this many equal parts."""
    guard: GuardConfig = dataclasses.field(default_factory=GuardConfig)
    """When an update is skipped, and when the run goes back to a checkpoint."""
    eval_every: int = 200
    """Steps between held-out losses; the run's end has one always. 0: only there."""
    eval_batches: int = 0
    """Most batches of a held-out loss; 0: all, with bits per byte. A large held-out set wants a limit."""
    eval: TaskConfig = dataclasses.field(default_factory=TaskConfig)
    """Tasks to measure the model with beside the held-out loss."""
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
        raise_problems(f"{type(self).__name__} is not valid", self.problems())

    @property
    @abc.abstractmethod
    def rows(self) -> int:
        """B, rows of one optimizer step over all devices."""

    @property
    @abc.abstractmethod
    def seq_len(self) -> int:
        """T, tokens of a row."""

    @abc.abstractmethod
    def objective(self) -> Objective:
        """What is minimised."""

    def other_models(self) -> Mapping[str, ModelConfig]:
        """Frozen models that the objective looks at beside the one that is trained (`Training.others`), by name."""
        return {}

    def training(self) -> Training:
        """What is trained; without a schedule where `steps` is still left to the data."""
        lora, stacked = (self.lora if self.lora.rank else None), self.model.scan_layers
        traits = (param_traits(self.model, stacked=stacked) if lora is None
                  else adapter_traits(self.model, lora, stacked=stacked))
        return Training(
            model=self.model, objective=self.objective(), optimizer=make_optimizer(self.optimizer, self.steps, traits),
            micro_batches=self.micro_batches, guard=self.guard, freeze=self.freeze, lora=lora, seed=self.seed,
            others=self.other_models(),
        )

    def problems(self) -> list[str]:
        """A line for each bad field; a config that extends this one adds its own."""
        problems = [
            f"{name} is {getattr(self, name)}; it must be at least {least}"
            for name, least in (("steps", self.least_steps), ("micro_batches", 1), ("keep_checkpoints", 1),
                                ("log_every", 1), ("eval_every", 0), ("eval_batches", 0), ("checkpoint_every", 0))
            if getattr(self, name) < least
        ]
        if self.train_minutes is not None and not self.train_minutes > 0:
            problems.append(f"train_minutes is {self.train_minutes}; it must be above 0")
        if self.micro_batches >= 1 and self.rows % self.micro_batches:
            problems.append(f"a batch of {self.rows} rows is not a multiple of micro_batches {self.micro_batches}")
        if self.seq_len > self.model.max_position:
            problems.append(f"rows of {self.seq_len} tokens exceed model.max_position {self.model.max_position}")
        problems += [f"lora.{name} is of adapters that are read, and a recipe cannot hold it; leave it out"
                     for name in ("rank_pattern", "alpha_pattern") if getattr(self.lora, name)]
        problems += check_trackers(self.trackers) + rounding.problems(self.model)
        for check in (lambda: self.steps >= 1 and learning_rate(self.optimizer, self.steps),
                      lambda: self.steps >= 1 and self.profile and parse_profile(self.profile, self.steps),
                      lambda: self.freeze and frozen_mask(self.model, self.freeze)):
            try:
                check()
            except ValueError as error:
                problems.append(str(error))
        if (self.lora.rank or self.other_models()) and not problems:
            try:
                self.training()
            except ValueError as error:
                problems.append(str(error))
        return problems
