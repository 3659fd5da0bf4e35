"""`lfm plan`: what a recipe needs and costs on a machine, as Markdown or JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, Literal

from jax.sharding import Mesh

from lfm_jax.chips import Chip
from lfm_jax.plan.program import Program, Traffic, compile_program, expected_program
from lfm_jax.plan.topology import Topology, bandwidth
from lfm_jax.post.config import TuneConfig
from lfm_jax.pretrain.config import TrainConfig
from lfm_jax.train.budget import Budget, budget_of, too_large
from lfm_jax.train.config import RunConfig
from lfm_jax.units import seconds, si, size

EFFICIENCY = 0.8
"""Share of the peak rates of products and of HBM that a program is taken to reach; an assumption, not a measurement."""

SMALL = 1024
"""Bytes below which a collective is left out of the table: sums of scalars."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planned(RunConfig):
    """A run, and the machine to plan it for."""

    topology: str
    """v5e:16x16 (v4, v5p, v6e and tpu7x too), gpu:8xH200 (A100, H100, B200 too) or cpu:8."""
    tokens: float | None = None
    """Tokens of the whole run, for example 28e12. None: those of `steps`."""
    efficiency: float = EFFICIENCY
    """Share of the peak rates of products and of HBM that the program is taken to reach."""
    compile: bool = True
    """Compile the step where the compiler for the machine is installed; False: by analysis."""
    format: Literal["markdown", "json"] = "markdown"
    """How to print it."""

    def problems(self) -> list[str]:
        problems = super().problems()
        if not 0 < self.efficiency <= 1:
            problems.append(f"efficiency is {self.efficiency}; it must lie in (0, 1]")
        if self.tokens is not None and not self.tokens > 0:
            problems.append(f"tokens is {self.tokens}; it must be positive")
        return problems


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanConfig(TrainConfig, Planned):
    """A training run, and the machine to plan it for."""

    @staticmethod
    def class_for(flags: Sequence[str]) -> type[Planned]:
        """The class of a recipe's flags: `TunePlanConfig` where some are of `lfm tune` alone, such as method."""
        names = {flag.removeprefix("--").partition("=")[0].partition(".")[0].replace("-", "_")
                 for flag in flags if flag.startswith("--")}
        of_tune = {x.name for x in dataclasses.fields(TuneConfig)} - {x.name for x in dataclasses.fields(TrainConfig)}
        return TunePlanConfig if names & of_tune else PlanConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class TunePlanConfig(TuneConfig, Planned):
    """A run of `lfm tune`, and the machine to plan it for."""

    def problems(self) -> list[str]:
        unknown = "steps is 0, which leaves them to the data, and a plan does not read it; name them (--steps 1000)"
        return [*super().problems(), *([] if self.steps else [unknown])]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A recipe on a machine: what it needs, and how long it takes by our roofline."""

    topology: Topology
    budget: Budget
    program: Program | None
    """None on a CPU."""
    link_seconds: dict[tuple[str, tuple[str, ...]], float]
    """By (kind of collective, mesh axes)."""
    run_tokens: float
    efficiency: float

    @property
    def on_chip(self) -> float:
        """Seconds of products and of HBM, operation after operation."""
        return self.program.compute_bound + self.program.memory_bound if self.program else math.nan

    @property
    def links(self) -> float:
        """Seconds of all collectives, one after another."""
        return sum(self.link_seconds.values())

    @property
    def step_seconds(self) -> float:
        """The estimate: collectives hidden behind computation, or computation behind collectives."""
        return max(self.on_chip, self.links)

    @property
    def limit(self) -> str:
        """The term that decides the estimate."""
        if self.program is None:
            return "not known"
        if self.links > self.on_chip:
            (kind, axes), _ = max(self.link_seconds.items(), key=lambda item: item[1])
            return f"interconnect, most of it {kind} over {' x '.join(axes)}"
        return "products" if self.program.compute_bound >= self.program.memory_bound else "HBM"

    @property
    def mfu(self) -> float:
        """Useful FLOPs (`model_flops`, nothing done twice) over the peak in the estimated time."""
        chip = self.topology.chip
        if chip is None:
            return math.nan
        return self.budget.model_flops / (self.step_seconds * self.budget.devices * chip.peak_bf16_flops)

    @property
    def run_seconds(self) -> float:
        return self.run_tokens / self.budget.tokens * self.step_seconds

    def check(self) -> None:
        """Refuses what does not fit.

        Raises:
          ValueError: more bytes than the device has, with the largest parts and what makes them smaller.
        """
        chip, program = self.topology.chip, self.program
        if program is None or program.memory is None:
            self.budget.check()
        elif chip is not None and sum(program.memory.values()) > chip.hbm_bytes:
            parts = self.budget.parts | {"temporaries": program.memory["temporaries"]}
            del parts["activations"], parts["working"], parts["gradients"]
            raise ValueError(too_large(parts, sum(program.memory.values()), chip))

    def to_json(self) -> str:
        """Every number of the plan."""
        budget, program, chip = self.budget, self.program, self.topology.chip
        plain: dict[str, Any] = {
            "topology": self.topology.name, "devices": budget.devices, "mesh": budget.mesh,
            "chip": chip and dataclasses.asdict(chip),
            "num_params": budget.num_params, "trained_params": budget.trained_params,
            "tokens_per_step": budget.tokens,
            "bytes_per_device": budget.parts, "model_flops": budget.model_flops, "remat_flops": budget.remat_flops,
            "program": program and dataclasses.asdict(program),
            "link_seconds": [{"kind": kind, "axes": axes, "seconds": t}
                             for (kind, axes), t in self.link_seconds.items()],
            "versions": versions(),
        }
        if program is not None:
            plain |= {
                "step_seconds": self.step_seconds, "step_seconds_without_overlap": self.on_chip + self.links,
                "limit": self.limit, "mfu": self.mfu, "tokens_per_second": budget.tokens / self.step_seconds,
                "run_tokens": self.run_tokens, "days": self.run_seconds / 86400,
                "device_hours": self.run_seconds / 3600 * budget.devices, "efficiency": self.efficiency,
            }
        return json.dumps(plain, indent=1).replace("NaN", "null")

    def __str__(self) -> str:
        """The plan as Markdown."""
        return "\n\n".join(section for section in _sections(self) if section)


def plan(config: Planned) -> Plan:
    """Plans a run of `lfm train` or `lfm tune`; see `plan_run`."""
    return plan_run(
        config, config.topology, tokens=config.tokens, efficiency=config.efficiency, compile=config.compile
    )


def plan_run(
    config: RunConfig, topology: str, *, tokens: float | None = None, efficiency: float = EFFICIENCY,
    compile: bool = True,
) -> Plan:
    """Plans any training run: by compiling its step where the compiler for the machine is installed, else by analysis.

    Args:
      config: the run; its data is not looked at.
      topology, tokens, efficiency, compile: as in `Planned`.

    Raises:
      ValueError: an unknown topology, a mesh that does not make it up or does not divide the model, or a step that the
        compiler finds too large for the device. `Plan.check` refuses the rest.
    """
    import jax

    from lfm_jax.sharding import check_divides

    machine = Topology.parse(topology)
    chip, compiles = machine.chip, compile and machine.compiles
    mesh = machine.mesh(config.mesh, for_compiling=compiles)
    check_divides(config.rows, config.seq_len, config.micro_batches, mesh)
    with jax.set_mesh(mesh):
        state = config.training().abstract_state()
    budget = budget_of(config, state, dict(mesh.shape), chip)
    program = None
    if chip is not None:
        program = (compile_program(config, mesh, budget, chip, efficiency) if compiles
                   else expected_program(config, budget, chip, efficiency))
    return Plan(
        topology=machine, budget=budget, program=program,
        link_seconds={(row.kind, row.axes): _seconds(row, mesh, chip, machine.shape)
                      for row in program.collectives} if program and chip else {},
        run_tokens=tokens or float(config.steps * budget.tokens), efficiency=efficiency,
    )


def _seconds(row: Traffic, mesh: Mesh, chip: Chip, shape: tuple[int, ...]) -> float:
    """Time on the links. All-to-all on a ring passes through n / 4 links on average, a ring collective through each."""
    hops = max(row.group / 4, 1.0) if row.kind == "all-to-all" and chip.torus_dims else 1.0
    return hops * row.sent / bandwidth(mesh, row.axes, chip, shape)


def versions() -> str:
    return ", ".join(f"{name} {version(name)}" for name in ("jax", "flax", "optax"))


# --------------------------------------------------------------------------------------------------------- Markdown


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    rule = tuple("---" if i == 0 else "---:" for i in range(len(head)))
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows))


def _sections(plan: Plan) -> list[str]:
    budget, program, chip = plan.budget, plan.program, plan.topology.chip
    mesh = ", ".join(f"{name} {n}" for name, n in budget.mesh.items() if n > 1) or "of one"
    how = "by analysis" if program is None or program.memory is None else (
        f"step compiled ahead of time in {program.compile_seconds:.0f} s"
    )
    trained = "" if budget.trained_params == budget.num_params else f" ({si(budget.trained_params)} trained)"
    head = (f"{si(budget.num_params)} parameters{trained} on {plan.topology.name}: {budget.devices} device(s), mesh "
            f"{mesh}; {budget.tokens:,} tokens a step in {budget.micro_batches} micro-batch(es); {how} ({versions()})")
    parts = [(name, size(n)) for name, n in budget.parts.items()] + [("together, by analysis", size(budget.total))]
    if program and program.memory:
        parts += [(f"compiled: {name}", size(n)) for name, n in program.memory.items()]
        parts += [("compiled, together", size(sum(program.memory.values())))]
    if chip:
        parts += [(f"HBM of a {chip.name} device", size(chip.hbm_bytes))]
    work = [("useful (forward and backward), all devices", si(budget.model_flops, "FLOP")),
            ("again for remat", si(budget.remat_flops, "FLOP"))]
    if program:
        work += [("products of one device, as they run", si(program.flops, "FLOP")),
                 ("bytes to and from HBM, one device", size(program.hbm_bytes))]
    sections = [head, _table(("bytes on each device", ""), parts), _table(("work of a step", ""), work)]
    if program is None or chip is None:
        return [*sections, "No chip constants for a CPU: no times."]
    if program.collectives:
        sections.append(_table(
            ("collective", "over", "calls", "arrays", "sent", "time"),
            [(row.kind, " x ".join(row.axes), "" if math.isnan(row.calls) else f"{row.calls:.0f}", size(row.bytes),
              size(row.sent), seconds(plan.link_seconds[row.kind, row.axes]))
             for row in program.collectives if row.sent >= SMALL],
        ))
    sections.append(_table(("time of a step", ""), [
        ("operations that products limit", seconds(program.compute_bound)),
        ("operations that HBM limits", seconds(program.memory_bound)),
        ("collectives", seconds(plan.links)),
        (f"**estimate, collectives overlapped; limited by {plan.limit}**", f"**{seconds(plan.step_seconds)}**"),
        ("nothing overlapped", seconds(plan.on_chip + plan.links)),
    ]))
    sections.append(_table(("run", ""), [
        ("tokens/s", f"{budget.tokens / plan.step_seconds:,.0f}"), ("MFU", f"{plan.mfu:.1%}"),
        ("tokens", si(plan.run_tokens)), ("days", f"{plan.run_seconds / 86400:,.2f}"),
        ("device-hours", f"{plan.run_seconds / 3600 * budget.devices:,.0f}"),
    ]))
    return [*sections, _assumptions(plan, chip)]


def _assumptions(plan: Plan, chip: Chip) -> str:
    lines = [
        f"products and HBM run at {plan.efficiency:.0%} of peak ({si(chip.peak_bf16_flops, 'FLOP/s')}, "
        f"{si(chip.hbm_bandwidth, 'B/s')}); not measured on this machine",
        "collectives run one after another at full link rate, without latency",
        f"figures of the chip: {chip.source}",
    ]
    if not chip.torus_dims:
        lines.append("all devices hang on one NVLink switch")
    if plan.program and plan.program.unknown_loops:
        lines.append(f"{plan.program.unknown_loops} loops of unknown length count once")
    return "Assumed: " + "; ".join(lines) + "."
