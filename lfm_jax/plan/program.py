"""The training step as a program: compiled ahead of time and read, or expected by analysis."""

from __future__ import annotations

import collections
import dataclasses
import math
import time
from typing import Any

import jax
from jax.sharding import Mesh

from lfm_jax.chips import Chip
from lfm_jax.config import ITEMSIZE
from lfm_jax.kinds import OPERATORS
from lfm_jax.model import abstract_model, param_axes
from lfm_jax.plan import hlo, hlo_cost
from lfm_jax.sharding import ROWS
from lfm_jax.train.budget import Budget, Share, kept_bytes, too_large
from lfm_jax.train.config import RunConfig

Axes = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Traffic:
    """All collectives of one kind over the same mesh axes, in one step of one device."""

    kind: str
    axes: Axes
    calls: float
    bytes: float
    """Of the whole arrays: gathered, to be reduced, or to be moved."""
    sent: float
    """What the device sends."""
    group: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """What one device does in one step."""

    memory: dict[str, float] | None
    """Bytes as the compiler lays them out: arguments, temporaries, program. None by analysis."""
    flops: float
    """Of matrix products and kernels, work done twice included."""
    hbm_bytes: float
    compute_bound: float
    """Seconds in operations that the peak rate of products limits, each at the rates it was counted with."""
    memory_bound: float
    """Seconds in operations that HBM limits."""
    collectives: list[Traffic]
    unknown_loops: int
    compile_seconds: float | None


def lower_step(config: RunConfig, mesh: Mesh) -> jax.stages.Lowered:
    """The step of a recipe as `lfm train` runs it, lowered for a mesh whose devices need not be there."""
    training = config.training()
    step: Any = training.compiled_step()
    with jax.set_mesh(mesh):
        return step.lower(training.abstract_state(), training.abstract_batch(config.rows, config.seq_len))


def compile_program(config: RunConfig, mesh: Mesh, budget: Budget, chip: Chip, efficiency: float) -> Program:
    """Compiles the step ahead of time and reads the program.

    Raises:
      ValueError: it does not fit the device.
    """
    start = time.monotonic()
    try:
        compiled = lower_step(config, mesh).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        said = str(error).split("\n")[0].removeprefix("RESOURCE_EXHAUSTED: ")
        raise ValueError(
            f"the compiler finds no room ({said}); by analysis {too_large(budget.parts, budget.total, chip)}"
        ) from None
    return read_program(compiled.as_text() or "", dict(mesh.shape), budget, chip, efficiency, memory_of(compiled),
                        time.monotonic() - start)


def memory_of(compiled: Any) -> dict[str, float]:
    """Bytes on one device as the compiler lays them out: arguments, temporaries (new results too) and the program."""
    stats = compiled.memory_analysis()
    return {
        "arguments": float(stats.argument_size_in_bytes),
        "temporaries": float(stats.temp_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes),
        "program": float(stats.generated_code_size_in_bytes),
    }


def read_program(
    text: str, mesh: dict[str, int], budget: Budget, chip: Chip, efficiency: float,
    memory: dict[str, float] | None = None, compile_seconds: float | None = None,
) -> Program:
    """Counts the optimised HLO of a step, each operation as often as it runs.

    An operation takes what its products take at `efficiency` x the peak rate, or what its bytes take at `efficiency` x
    HBM's, whichever is more. FLOPs that the text does not show (Pallas kernels) are those that the formulas have more.
    """
    module = hlo.Module(text)
    rates = efficiency * chip.peak_bf16_flops, efficiency * chip.hbm_bandwidth
    flops = bytes_ = 0.0
    bound = [0.0, 0.0]
    for computation, instruction, times in module.executed:
        products = times * hlo_cost.flops(module, computation, instruction)
        moved = times * hlo_cost.hbm_bytes(module, computation, instruction)
        flops, bytes_ = flops + products, bytes_ + moved
        needs = products / rates[0], moved / rates[1]
        bound[needs[1] > needs[0]] += max(needs)
    hidden = max((budget.model_flops + budget.remat_flops) / budget.devices - flops, 0.0)
    return Program(
        memory=memory, flops=flops + hidden, hbm_bytes=bytes_, compute_bound=bound[0] + hidden / rates[0],
        memory_bound=bound[1], collectives=summed(hlo.collectives(module, mesh)), unknown_loops=module.unknown_loops,
        compile_seconds=compile_seconds,
    )


def summed(collectives: list[hlo.Collective]) -> list[Traffic]:
    """Collectives of the same kind and axes together, the most sent first."""
    groups: dict[tuple[str, Axes, int], list[hlo.Collective]] = collections.defaultdict(list)
    for c in collectives:
        groups[c.kind, c.axes, c.group].append(c)
    rows = [
        Traffic(kind, axes, sum(c.times for c in cs), sum(c.times * c.bytes for c in cs), sum(c.sent for c in cs), n)
        for (kind, axes, n), cs in groups.items() if axes
    ]
    return sorted(rows, key=lambda row: -row.sent)


NOT_HIDDEN = 0.4
"""Share of the shorter of products and HBM traffic that falls into operations of its own; fitted to the compiled steps
of docs/measurements/plans.md, whose times it gives within 10 %."""


def expected_program(config: RunConfig, budget: Budget, chip: Chip, efficiency: float) -> Program:
    """What a step should do, without a compiler.

    HBM: parameters, optimizer state, gradients and what is kept for the backward pass are written and read once. In
    each pass (forward, again under remat, two for the gradients) all that a layer keeps without remat is written and
    read. For each chunk of the loss the table's gradient is read and written in float32, the table read three times,
    and float32 logits pass four times.
    Collectives: see `expected_collectives`.
    """
    model, tensor = config.model, budget.mesh["tensor"]
    flops = (budget.model_flops + budget.remat_flops) / budget.devices
    local = budget.tokens / (budget.devices / tensor)
    table = model.vocab_size / tensor * model.hidden_size
    share = Share(local, config.seq_len, tensor, chip)
    layers = kept_bytes(model.replace(remat="none", scan_layers=False), share)
    chunks = local / config.objective().loss_chunk
    loss = chunks * table * (8 + 3 * ITEMSIZE[model.dtype]) + 16 * local * model.vocab_size / tensor
    passes = 3 + (model.remat != "none")
    state = budget.parameters + budget.optimizer + budget.gradients
    bytes_ = 2 * (state + budget.activations * budget.micro_batches + passes * layers) + loss
    compute, memory = flops / (efficiency * chip.peak_bf16_flops), bytes_ / (efficiency * chip.hbm_bandwidth)
    return Program(
        memory=None, flops=flops, hbm_bytes=bytes_, compute_bound=compute * (1 if compute >= memory else NOT_HIDDEN),
        memory_bound=memory * (1 if memory > compute else NOT_HIDDEN),
        collectives=expected_collectives(config, budget), unknown_loops=0, compile_seconds=None,
    )


def expected_collectives(config: RunConfig, budget: Budget) -> list[Traffic]:
    """The collectives of a step on paper, for each micro-batch.

    fsdp: every matrix is gathered in `dtype` for the forward pass and again for the backward pass, the table of the
    loss once; embeddings are traded for rows and back. Gradients of what is trained are summed over all devices that
    share rows or time; before that, those of the rows looked up in the table, in its dtype, over all that hold the same
    columns.
    tensor: two sums of the residual stream for each layer and pass. context: what operators trade (`OperatorKind`), as
    attention trades time for heads, forward and back. expert: rows are gathered and their sums scattered for each
    mixture, forward and back; under remat rows are gathered again, and nothing needs the sums again.
    """
    model, mesh = config.model, budget.mesh
    item, D, micro = ITEMSIZE[model.dtype], model.hidden_size, budget.micro_batches
    tensor, context = mesh["tensor"], mesh["context"]
    local = budget.tokens / (math.prod(mesh[axis] for axis in ROWS) * context)
    table = model.vocab_size * D / tensor * item
    in_experts, mixtures = _in_experts(config)
    layers = (model.num_params() - in_experts) / tensor * item - table * (1 if model.tie_embedding else 2)
    of_experts = in_experts / (tensor * mesh["expert"]) * item
    stream = local * D * item
    passes = 2 + (model.remat == "full")
    trained = budget.trained_params / budget.num_params
    rows_of_all = mixtures * stream * mesh["expert"]
    rows = [
        ("all-gather", ("fsdp",), micro * (2 * (layers + of_experts) + table)),
        ("all-to-all", ("fsdp",), 2 * stream),
        ("all-reduce", (*ROWS, "context"), micro * (layers + table) * trained),
        ("all-reduce", ("data", "fsdp", "context"), micro * of_experts * trained),
        ("all-reduce", (*(axis for axis in ROWS if axis != "fsdp"), "context"),
         micro * table / item * ITEMSIZE[model.param_dtype] / mesh["fsdp"] * trained),
        ("all-gather", ("expert",), passes * rows_of_all),
        ("reduce-scatter", ("expert",), 2 * rows_of_all),
        ("all-reduce", ("tensor",), passes * 2 * model.num_layers * stream),
        ("all-to-all", ("context",), passes * sum(OPERATORS[kind].traded(model) for kind in model.layer_types) * local
         / tensor * item),
    ]
    total: dict[tuple[str, Axes], float] = collections.defaultdict(float)
    for kind, over, bytes_ in rows:
        total[kind, tuple(axis for axis in over if mesh[axis] > 1)] += bytes_
    found = []
    for (kind, axes), bytes_ in total.items():
        group = math.prod(mesh[axis] for axis in axes)
        if group > 1 and bytes_:
            sent = bytes_ * (group - 1) / group * (2 if kind == "all-reduce" else 1)
            found.append(Traffic(kind, axes, math.nan, bytes_, sent, group))
    return found


def _in_experts(config: RunConfig) -> tuple[int, int]:
    """The elements of weights that `expert` splits, and the number of layers with them."""
    axes = param_axes(config.model.replace(scan_layers=False))
    _, weights = abstract_model(config.model.replace(scan_layers=False))
    sizes = jax.tree.map(lambda x, names: x.size if "experts" in names else 0, weights, axes)
    by_layer = [sum(jax.tree.leaves(layer)) for layer in sizes["blocks"].values()]
    return sum(by_layer), sum(n > 0 for n in by_layer)
