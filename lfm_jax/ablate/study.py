"""Study: a base model, what varies, tasks, seeds and a budget, as one YAML file says them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tyro
import yaml

from lfm_jax.ablate.pattern import Place, forms, parse_pattern
from lfm_jax.ablate.tasks.copying import SelectiveCopying
from lfm_jax.ablate.tasks.induction import InductionHeads
from lfm_jax.ablate.tasks.needle import Needle
from lfm_jax.ablate.tasks.recall import Mqar
from lfm_jax.ablate.tasks.text import BOS, EOS, Text
from lfm_jax.config import ConvGates, ModelConfig
from lfm_jax.kinds import FEED_FORWARDS
from lfm_jax.problems import raise_problems
from lfm_jax.train.optimizer import OptimizerConfig
from lfm_jax.train.step import GuardConfig

TaskName = Literal["text", "mqar", "copying", "induction", "needle"]
Match = Literal["params", "flops", "none"]


def axes() -> dict[str, str]:
    """What a grid can vary."""
    return {
        "attention": "number of full-attention layers",
        "place": f"where they stand: {', '.join(get_args(Place))}",
        "operator": f"operator of the other layers: {', '.join(forms())}",
        "pattern": "the whole layer pattern, in place of the three above",
        "taps": "W of the short convolution",
        "gates": f"gates of the short convolution: {', '.join(get_args(ConvGates))}",
        "ffn_ratio": "F / D, of a mixture that of one expert; the width D is then what is matched",
        "feed_forward": f"feed-forward of every layer: {', '.join(FEED_FORWARDS)}",
        "experts": "experts of a mixture; give feed_forward too, unless the base has mixtures",
        "active": "experts of a mixture that work on each token",
        "kv_heads": "key/value heads",
        "hidden_size": "D; heads and F go with it in proportion",
        "train_flops": "training FLOPs of a run, in place of the task's steps",
    }



@dataclasses.dataclass(frozen=True)
class Grid:
    """Every combination of some axes' values: `{attention: [0, 2, 4], operator: [conv, rglru]}` in a study."""

    axes: tuple[tuple[str, tuple[Any, ...]], ...]
    problem: str | None = None
    """Why what was written is no grid: `Study` says so, since a flag's parser would keep it to itself."""

    @classmethod
    def of(cls, plain: Any) -> Grid:
        """From a mapping of axes to values or lists of values.

        Raises:
          ValueError: not such a mapping, an unknown axis, or a value that its axis cannot have.
        """
        if not isinstance(plain, Mapping) or not plain:
            raise ValueError(f"{plain!r} must be a mapping of axes to values, as {{attention: [0, 2], taps: 4}}")
        unknown = [name for name in plain if name not in axes()]
        if unknown:
            known = "".join(f"\n  {name}: {what}" for name, what in axes().items())
            raise ValueError(f"{', '.join(map(str, unknown))} cannot be varied; the axes are:{known}")
        grid = tuple((name, tuple(values) if isinstance(values, list) else (values,)) for name, values in plain.items())
        problems = [problem for name, values in grid for value in values if (problem := _axis_problem(name, value))]
        problems += [f"{name} has no values" for name, values in grid if not values]
        if "pattern" in plain and {"attention", "place", "operator"} & set(plain):
            problems.append("pattern takes the place of attention, place and operator; give it in a grid of its own")
        if problems:
            raise ValueError("; ".join(problems))
        return cls(grid)

    def plain(self) -> dict[str, list[Any]]:
        return {name: list(values) for name, values in self.axes}


def _axis_problem(name: str, value: Any) -> str | None:
    choices = {"place": get_args(Place), "operator": tuple(forms()), "gates": get_args(ConvGates),
               "feed_forward": tuple(FEED_FORWARDS)}
    if name in choices:
        return None if value in choices[name] else f"{name} is {value!r}; choose of {', '.join(choices[name])}"
    if name == "pattern":
        try:
            parse_pattern(value if isinstance(value, str) else repr(value))
        except ValueError as error:
            return str(error)
        return None
    if name in ("ffn_ratio", "train_flops"):
        ok = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf
        return None if ok else f"{name} is {value!r}; it must be a number above 0 (in YAML 1.0e+12, not 1e12)"
    least = 0 if name == "attention" else 1
    ok = type(value) is int and value >= least
    return None if ok else f"{name} is {value!r}; it must be a whole number of at least {least}"


def _grid_from_yaml(text: str) -> Grid:
    try:
        return Grid.of(yaml.safe_load(text))
    except yaml.YAMLError as error:
        return Grid((), f"{text!r} is not valid YAML ({str(error).splitlines()[0]})")
    except ValueError as error:
        return Grid((), str(error))


_GRID = tyro.constructors.PrimitiveConstructorSpec(
    nargs=1,
    metavar="'{AXIS: [VALUE, ...], ...}'",
    instance_from_str=lambda args: _grid_from_yaml(args[0]),
    is_instance=lambda value: isinstance(value, Grid),
    str_from_instance=lambda grid: [
        yaml.safe_dump(grid.plain(), default_flow_style=True, width=math.inf, sort_keys=False).strip()
    ],
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """An ablation study.

    Every point of every grid, and the base, is trained on every task with every seed: the same rows in the same order,
    the same schedule, and a size matched to the base's.

    Raises:
      ValueError: on construction, one message that lists every bad field and how to mend it.
    """

    name: str
    question: str
    """What the study is to answer, for the report's head."""
    out: str
    """Directory of studies, which share the built text in its folder `data`. Runs, results.jsonl and report lie in its
    folder `name`, and what is done there is not done again."""
    pattern: str
    """Layers of the base: `ccaccaccacacacac`, or `conv:10,attention:6,place:even`."""
    vary: tuple[Annotated[Grid, _GRID], ...]
    """Grids of axes, each a mapping of axes to values."""
    tasks: tuple[TaskName, ...]
    match: Match = "params"
    """What every point has as much of as the base, within 1 %: parameters, or training FLOPs a token. F is fitted, or D
    where a point sets ffn_ratio. none: nothing is."""
    match_step: int = 8
    """Widths are multiples of this, as the hardware likes them; large models want 64 or 128."""
    seeds: int = 5
    """Seeds 0, 1, ...: each is an initialisation and an order of the data. Under 5 a study explores, and claims
    nothing."""
    peak_lrs: tuple[float, ...] = ()
    """Learning rates to try for each point and task, with a seed of its own; the best one is used. One: used as it is.
    None: that of `optimizer`. A task may have its own."""
    warmup: float = 0.05
    """Share of a run's steps; optimizer.warmup_steps follows from it."""
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    """The base; its layer_types follow from `pattern`, its vocab_size from the task."""
    optimizer: OptimizerConfig = dataclasses.field(default_factory=lambda: OptimizerConfig(warmup_steps=0))
    guard: GuardConfig = dataclasses.field(default_factory=lambda: GuardConfig(spike=0.0))
    """Which updates are skipped; a run that skips max_in_row of them in a row has failed. Studies do not use
    max_rollbacks. No spike counts as one by default: a model that leaves a plateau, as all do that learn to recall, has
    gradients ten times those before, and skipping these would hold it there."""
    loss_chunk: int = 2048
    """Tokens whose logits are in memory at one time in a training step."""
    seeds_at_once: int = 1
    """Seeds trained side by side by `vmap`: more on an accelerator that one small model leaves idle. On CPU it was not
    faster (docs/ablations)."""
    checkpoint_minutes: float = 5.0
    """A run that takes longer is saved so often, and goes on from there after a kill."""
    fit: bool = False
    """Fit loss against parameters and tokens (grids over hidden_size and train_flops, task text)."""
    cost_contexts: tuple[int, ...] = (1024, 8192, 32768)
    """Contexts at which decoding is timed. None: no costs are measured."""
    text: Text = dataclasses.field(default_factory=Text)
    mqar: Mqar = dataclasses.field(default_factory=Mqar)
    copying: SelectiveCopying = dataclasses.field(default_factory=SelectiveCopying)
    induction: InductionHeads = dataclasses.field(default_factory=InductionHeads)
    needle: Needle = dataclasses.field(default_factory=Needle)

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {getattr(self, name)!r}; it must be a whole number of at least {least}"
            for name, least in (("match_step", 1), ("seeds", 1), ("seeds_at_once", 1), ("loss_chunk", 1))
            if not (type(getattr(self, name)) is int and getattr(self, name) >= least)
        ]
        for name in ("name", "out"):
            if not getattr(self, name):
                problems.append(f"{name} is empty; give one")
        if not self.tasks:
            problems.append(f"tasks is empty; name some of {', '.join(get_args(TaskName))}")
        if len(set(self.tasks)) != len(self.tasks):
            problems.append(f"tasks {list(self.tasks)} names one twice")
        if not 0 <= self.warmup < 0.8:
            problems.append(f"warmup is {self.warmup}; it must lie in [0, 0.8)")
        if self.optimizer.warmup_steps:
            problems.append(f"optimizer.warmup_steps is {self.optimizer.warmup_steps}; leave it at 0 and set warmup")
        if not self.checkpoint_minutes > 0:
            problems.append(f"checkpoint_minutes is {self.checkpoint_minutes}; it must be above 0")
        for where, rates in (("", self.peak_lrs), *((f"{name}.", self.task(name).peak_lrs) for name in self.tasks)):
            problems += [f"{where}peak_lrs has {rate}; learning rates are above 0" for rate in rates if not rate > 0]
        if self.seeds_at_once > 1 and self.seeds % self.seeds_at_once:
            problems.append(f"seeds {self.seeds} is not a multiple of seeds_at_once {self.seeds_at_once}")
        problems += [f"cost_contexts has {T}, over model.max_position {self.model.max_position}"
                     for T in self.cost_contexts if self.model.max_position < T]
        problems += [f"vary: {grid.problem}" for grid in self.vary if grid.problem]
        if self.model.scan_layers:
            problems.append("model.scan_layers is true; studies run layer by layer, so leave it out")
        if "text" in self.tasks and (self.model.bos_id, *self.model.eos_ids[:1]) != (BOS, EOS):
            problems.append(f"model.bos_id and eos_ids are not {BOS} and {EOS}, with which a study builds its text")
        try:
            parse_pattern(self.pattern)
        except ValueError as error:
            problems.append(str(error))
        raise_problems("Study is not valid", problems)

    def task(self, name: str) -> Any:
        """The settings of a task."""
        return getattr(self, name)

    def rates(self, task: str) -> tuple[float, ...]:
        """Learning rates of a task; one of several is chosen for each point."""
        return self.task(task).peak_lrs or self.peak_lrs or (self.optimizer.peak_lr,)

    @property
    def directory(self) -> Path:
        return Path(self.out) / self.name

    def optimizer_for(self, steps: int, peak_lr: float) -> OptimizerConfig:
        """The optimizer of a run of so many steps."""
        return dataclasses.replace(self.optimizer, peak_lr=peak_lr, warmup_steps=round(self.warmup * steps))

    def smoke(self) -> Study:
        """The same study cut to a trial: 2 seeds, 2 steps, no costs; of the points only base and last."""
        small: dict[str, Any] = {}
        for name in self.tasks:
            task = self.task(name)
            few = {"steps": 2, "heldout_rows": min(task.heldout_rows, task.batch_size), "peak_lrs": ()}
            small[name] = dataclasses.replace(task, **few)
        grids = (tuple((name, values) for name, values in grid.axes if name != "train_flops") for grid in self.vary)
        return dataclasses.replace(
            self, name=f"{self.name}-smoke", vary=tuple(Grid(axes) for axes in grids if axes), seeds=2, seeds_at_once=1,
            peak_lrs=(), cost_contexts=(), **small,
        )
