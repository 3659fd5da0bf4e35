"""TuneConfig: what a run of `lfm tune` is."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, cast

import tyro
import yaml

from lfm_jax import recipe
from lfm_jax.config import ModelConfig
from lfm_jax.data.config import ChatData
from lfm_jax.data.sources import contains
from lfm_jax.loading import model_config
from lfm_jax.post.distill import DistillConfig
from lfm_jax.post.dpo import DPOConfig
from lfm_jax.post.grpo_config import GRPOConfig
from lfm_jax.post.methods import METHODS, MethodName, Way
from lfm_jax.train.checkpoint import has_checkpoint
from lfm_jax.train.config import RunConfig
from lfm_jax.train.launch import Launch
from lfm_jax.train.objective import Objective
from lfm_jax.train.optimizer import OptimizerConfig
from lfm_jax.train.run_dir import CONFIG
from lfm_jax.train.step import GuardConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuneConfig(RunConfig):
    """A run that goes on from a trained model. In a recipe, `model` changes single fields of that of `init_from`,
    or of the run's own where it goes on.

    Raises:
      ValueError: on construction, one message that lists every bad field.
    """

    # Whether the data is the same, its own fingerprint decides.
    movable: ClassVar[frozenset[str]] = frozenset({"sources", "heldout", "prefetch"})
    least_steps: ClassVar[int] = 0

    method: MethodName = "sft"
    """sft: supervised fine-tuning on chats; dpo: preference optimisation on pairs of answers; distill: chats, and a
    teacher's distribution at each place; grpo: reinforcement learning, with rewards on answers to prompts."""
    init_from: str
    """The model to begin with: a Hugging Face directory, the directory of a run, a GGUF file, or a Hub id
    (OWNER/NAME or OWNER/NAME@REVISION)."""
    data: ChatData
    epochs: float = 3.0
    """Passes over the data, where steps is 0."""
    steps: int = 0
    """Optimizer steps in all; with `train_minutes`, at most. 0: those of epochs."""
    optimizer: OptimizerConfig = dataclasses.field(default_factory=lambda: _optimizer("sft"))
    """Its peak_lr is 5e-5, and 1e-6 in a recipe or command of dpo or grpo that names none."""
    guard: GuardConfig = dataclasses.field(default_factory=GuardConfig)
    """When an update is skipped, and when the run goes back to a checkpoint. Its spike is 10, and 0 in a recipe or
    command of grpo that names none."""
    loss_chunk: int = 512
    """Tokens whose logits are in memory at one time."""
    dpo: DPOConfig = dataclasses.field(default_factory=DPOConfig)
    """For `method: dpo` only."""
    distill: DistillConfig = dataclasses.field(default_factory=DistillConfig)
    """For `method: distill` only."""
    grpo: GRPOConfig = dataclasses.field(default_factory=GRPOConfig)
    """For `method: grpo` only."""

    @classmethod
    def of(cls, init_from: str, *, model: Mapping[str, Any] | None = None, **fields: Any) -> Self:
        """A config whose model is that of `init_from`, but for some fields of it.

        Raises:
          ValueError: see the class and `lfm.load`.
        """
        method = fields.get("method", "sft")
        fields.setdefault("optimizer", _optimizer(method))
        fields.setdefault("guard", _way(method).guard)
        return cls(init_from=init_from, model=tuned_model(init_from).replace(**model or {}), **fields)

    @staticmethod
    def flags_before(flags: Sequence[str]) -> list[str]:
        """The fields of a model, the method's learning rate and its guard as flags: the model of `init_from`, or of the
        run that goes on. None where the flags name the model's layers, as those of a run's own config do.

        Raises:
          ValueError: the flags name a preset beside `init_from`, or see `lfm.load`.
        """
        name, preset = _value_of(flags, "init-from"), _value_of(flags, "model.preset")
        if name is not None and preset is not None:
            raise ValueError(f"model.preset {preset} stands beside init_from {name}, whose model is tuned; leave the "
                             "preset out, or name another model in init_from")
        if name is None or _value_of(flags, "model.layer-types") is not None:
            return []
        way = _way(_value_of(flags, "method") or "sft")
        model = _model_of_run(_value_of(flags, "run-dir")) or tuned_model(name)
        return [*recipe.model_flags(model), "--optimizer.peak-lr", repr(way.peak_lr), "--guard.spike",
                repr(way.guard.spike)]

    @property
    def rows(self) -> int:
        return self.data.batch_size

    @property
    def seq_len(self) -> int:
        return self.data.seq_len

    def objective(self) -> Objective:
        return METHODS[self.method].objective(self)

    def other_models(self) -> Mapping[str, ModelConfig]:
        return METHODS[self.method].others(self) if self.method in METHODS else {}

    def problems(self) -> list[str]:
        problems = super().problems()
        if self.method not in METHODS:
            problems.append(f"method is {self.method!r}; choose one of {', '.join(METHODS)}")
        else:
            problems += METHODS[self.method].problems(self)
        problems += [f"{name} is for method {name}, and method is {self.method}; leave it out"
                     for name, default in (("dpo", DPOConfig()), ("distill", DistillConfig()), ("grpo", GRPOConfig()))
                     if self.method != name and getattr(self, name) != default]
        if not self.init_from:
            problems.append("init_from is empty; name the model to begin with")
        if not self.epochs > 0:
            problems.append(f"epochs is {self.epochs}; it must be above 0")
        if self.loss_chunk < 1:
            problems.append(f"loss_chunk is {self.loss_chunk}; it must be at least 1")
        if not self.model.causal:
            problems.append("init_from is an encoder (model.causal is False); name a causal model")
        problems += [
            f"run_dir {self.run_dir} lies inside data source {source!r}, which would then train on it; choose another "
            "run_dir"
            for source in (*self.data.sources, *self.data.heldout) if contains(source, self.run_dir)
        ]
        return problems


def tuned_model(name: str) -> ModelConfig:
    """The config of a model that is to be tuned: its own, but for float32 parameters, which small updates need.

    Raises:
      ValueError: see `lfm.load`.
    """
    return model_config(name).replace(param_dtype="float32")


def _model_of_run(run_dir: str | None) -> ModelConfig | None:
    """The config of the model of a run that goes on, which does not need what it began with; None without one."""
    if run_dir is None or not has_checkpoint(Path(run_dir)) or not (Path(run_dir) / CONFIG).exists():
        return None
    return ModelConfig.from_plain(yaml.safe_load((Path(run_dir) / CONFIG).read_text())["model"])


def _way(method: str) -> Way:
    """The row of a method; that of sft for what is none."""
    return METHODS.get(cast(MethodName, method), METHODS["sft"])


def _optimizer(method: str) -> OptimizerConfig:
    """What a method is trained with unless something else is named."""
    return OptimizerConfig(peak_lr=_way(method).peak_lr, schedule="cosine", warmup_steps=0, warmup_fraction=0.1,
                           weight_decay=0.0)


def _value_of(flags: Sequence[str], name: str) -> str | None:
    """The value of the last flag of a name, in any of the forms that a flag has."""
    value = None
    for flag, following in zip(flags, [*flags[1:], None], strict=True):
        key, equals, after = flag.partition("=")
        if key.replace("_", "-") == f"--{name}":
            value = after if equals else following
    return value


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuneCommand:
    """The flags of `lfm tune`: those of a run, and those of how its processes come about."""

    run: Annotated[TuneConfig, tyro.conf.arg(name="")]
    launch: Annotated[Launch, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Launch)

    flags_before = staticmethod(TuneConfig.flags_before)
