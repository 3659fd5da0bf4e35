"""The whole step of LFM2-350M, compiled for sixteen v5e chips: it fits, and moves what it should.

For `make test-long`: the compiler takes four minutes. `test_budget.py` and tests/mesh/check_plan.py compare the same
parts with the compiled steps of small models.
"""

import dataclasses
import json
import math

import jax
import pytest
import tpu_aot

from lfm_jax.config import ModelConfig
from lfm_jax.data.config import DataConfig
from lfm_jax.model import abstract_model
from lfm_jax.plan import PlanConfig, hlo_cost, plan
from lfm_jax.plan import program as program_module
from lfm_jax.plan.hlo import Module, collectives
from lfm_jax.plan.program import expected_collectives, expected_program, read_program
from lfm_jax.plan.topology import Topology
from lfm_jax.sharding import MeshConfig

pytestmark = [pytest.mark.long, tpu_aot.requires_libtpu]

CONFIG = PlanConfig(
    run_dir="runs/x", steps=1000, topology="v5e:4x4", mesh=MeshConfig(fsdp=16), loss_chunk=1024,
    model=ModelConfig.preset("lfm2-350m").replace(
        dtype="bfloat16", remat="full", scan_layers=True, attention_impl="splash"
    ),
    data=DataConfig(sources=("text",), seq_len=4096, batch_size=32),
)
TOPOLOGY = Topology.parse(CONFIG.topology)
DTYPE_BYTES = 2


@pytest.fixture(scope="module")
def planned():
    """(the plan as `lfm plan` makes it, the compiled program's text)."""
    texts = []
    with (
        pytest.MonkeyPatch.context() as patch,
        jax.default_matmul_precision("default"),  # Splash does not compile for more (`kernels/splash.py`).
    ):
        patch.setattr(program_module, "read_program", lambda text, *a: texts.append(text) or read_program(text, *a))
        made = plan(CONFIG)
    return made, texts[0]


@pytest.fixture(scope="module")
def compiled(planned):
    made, text = planned
    return made.budget, made.program, text


def test_the_plan_says_what_was_compiled(planned):
    made, _ = planned
    made.check()
    text = str(made)
    assert "step compiled ahead of time in" in text
    assert "compiled: temporaries" in text
    assert made.limit in text
    assert json.loads(made.to_json())["mfu"] == pytest.approx(made.mfu)
    small = dataclasses.replace(made, topology=dataclasses.replace(
        made.topology, chip=dataclasses.replace(TOPOLOGY.chip, hbm_bytes=2**30)
    ))
    with pytest.raises(ValueError, match="temporaries"):
        small.check()


def test_it_fits_and_the_budget_says_so(compiled):
    found, program, _ = compiled
    memory = program.memory
    assert sum(memory.values()) < TOPOLOGY.chip.hbm_bytes
    assert memory["arguments"] == pytest.approx(found.parameters + found.optimizer + found.batch, rel=2e-3)
    expected = found.gradients + found.activations + found.working
    assert expected == pytest.approx(memory["temporaries"], rel=0.25)


def test_the_analysis_expects_what_the_program_does(compiled):
    found, program, _ = compiled
    expected = expected_program(CONFIG, found, TOPOLOGY.chip, 1.0)
    assert expected.flops == pytest.approx(program.flops, rel=0.01)
    assert expected.hbm_bytes == pytest.approx(program.hbm_bytes, rel=0.3)
    assert expected.memory_bound == pytest.approx(program.memory_bound, rel=0.3)


def test_its_products_are_those_of_the_formulas(compiled):
    found, program, text = compiled
    assert program.unknown_loops == 0
    assert program.flops * 16 == pytest.approx(found.model_flops + found.remat_flops, rel=0.01)
    module = Module(text)
    seen = 16 * sum(times * hlo_cost.flops(module, c, i) for c, i, times in module.executed)
    attention = 6 * 2 * 2 * 16 * 64 * 4097 / 2 * found.tokens * 4  # Forward, again, and twice for the gradient.
    assert seen == pytest.approx(found.model_flops + found.remat_flops - attention, rel=0.01)  # Splash shows none.


def test_weights_are_gathered_and_nothing_else(compiled):
    found, _, text = compiled
    moved = collectives(Module(text), found.mesh)
    paper = {(row.kind, row.axes): row.bytes for row in expected_collectives(CONFIG, found)}
    gathers = [c for c in moved if c.kind == "all-gather" and c.axes]
    assert {c.axes for c in gathers} == {("fsdp",)}
    assert sum(c.times * c.bytes for c in gathers) == pytest.approx(paper["all-gather", ("fsdp",)], rel=0.1)
    sizes = {math.prod(x.shape) for x in jax.tree.leaves(abstract_model(CONFIG.model)[1])}
    sizes |= {found.tokens}  # Token ids, for the columns of the table that a device looks up.
    assert {math.prod(shape.dims) * 16 for c in gathers for shape in c.shapes} <= sizes
    trades = sum(c.times * c.bytes for c in moved if c.kind == "all-to-all")
    assert trades == paper["all-to-all", ("fsdp",)]  # Embeddings: columns for rows, forward and back.


def test_every_gradient_is_summed_once(compiled):
    found, _, text = compiled
    moved = collectives(Module(text), found.mesh)
    summed = sum(c.times * c.bytes for c in moved if c.kind in ("all-reduce", "reduce-scatter"))
    assert summed == pytest.approx(DTYPE_BYTES * found.num_params, rel=0.05)
