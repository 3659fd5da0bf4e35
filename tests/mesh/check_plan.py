"""The planner's exact parts equal those of the step compiled for eight devices."""

import collections
import sys
from pathlib import Path

import pytest
from meshes import mesh_of

sys.path.insert(0, str(Path(__file__).parents[1] / "plan"))

from recipes import recipe

from lfm_jax.plan import budget
from lfm_jax.plan.hlo import Module, collectives
from lfm_jax.plan.program import expected_collectives, lower_step
from lfm_jax.plan.topology import Topology


def compiled(config, mesh):
    return lower_step(config, mesh).compile()


def test_arguments_of_the_compiled_step():
    sizes = dict(data=2, fsdp=2, tensor=2)
    config, mesh = recipe(mesh=sizes), mesh_of(**sizes)
    found = budget(config, mesh)
    arguments = compiled(config, mesh).memory_analysis().argument_size_in_bytes
    # Beside them the scalars: steps, and what the guard remembers; each takes up to 16 bytes.
    assert 0 <= arguments - (found.parameters + found.optimizer + found.batch) <= 128
    assert budget(config, Topology.parse("cpu:8").mesh(config.mesh, for_compiling=False)) == found


def test_gathers_of_weights_are_those_on_paper():
    model = dict(remat="full", scan_layers=True, layer_types=("conv",) * 4, dtype="float32")
    config, mesh = recipe(mesh=dict(fsdp=8), model=model), mesh_of(fsdp=8)
    found = budget(config, mesh)
    module = Module(compiled(config, mesh).as_text())
    gathered = sum(c.times * c.bytes for c in collectives(module, dict(mesh.shape)) if c.kind == "all-gather")
    paper = {row.kind: row.bytes for row in expected_collectives(config, found)}
    assert gathered == pytest.approx(paper["all-gather"], rel=0.1)
    assert module.unknown_loops == 0


def test_rows_for_experts_and_sums_are_those_on_paper():
    """Under remat rows are gathered again, and their sums are not scattered again. The program moves choices, weights
    and a few scalars too. Of the table two gradients are summed: of the logits and of the rows looked up."""
    model = dict(remat="full", layer_types=("conv",) * 3, ffn_types=("swiglu", "moe", "moe"), num_experts=8,
                 active_experts=2, expert_size=32, dtype="float32")
    sizes = dict(data=2, expert=4)
    config, mesh = recipe(mesh=sizes, model=model), mesh_of(**sizes)
    moved = collectives(Module(compiled(config, mesh).as_text()), dict(mesh.shape))
    program = collections.defaultdict(float)
    for c in moved:
        program[c.kind, c.axes] += c.times * c.bytes
    paper = {(row.kind, row.axes): row.bytes for row in expected_collectives(config, budget(config, mesh))}
    assert set(paper) == {("all-gather", ("expert",)), ("reduce-scatter", ("expert",)), ("all-reduce", ("data",)),
                          ("all-reduce", ("data", "expert"))}
    for kind, bytes_ in paper.items():
        assert bytes_ == pytest.approx(program[kind], rel=0.05), kind
    assert paper["all-gather", ("expert",)] == 1.5 * paper["reduce-scatter", ("expert",)]
