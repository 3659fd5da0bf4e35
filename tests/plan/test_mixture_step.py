"""The step of three layers of LFM2-8B-A1B at their full width, compiled for sixteen v5e chips: weights along `fsdp`,
experts along `expert`.

For `make test-long`: the compiler takes two minutes. tests/mesh/check_plan.py compares a small one on CPU devices.
"""

import collections

import jax
import pytest
import tpu_aot

from lfm_jax.config import ModelConfig
from lfm_jax.data.config import DataConfig
from lfm_jax.plan import PlanConfig, plan
from lfm_jax.plan.program import expected_collectives
from lfm_jax.plan.topology import Topology
from lfm_jax.sharding import MeshConfig

pytestmark = [pytest.mark.long, tpu_aot.requires_libtpu]

CONFIG = PlanConfig(
    run_dir="runs/x", steps=1000, topology="v5e:4x4", mesh=MeshConfig(fsdp=4, expert=4), loss_chunk=2048,
    model=ModelConfig.preset("lfm2-8b-a1b").replace(
        layer_types=("conv", "full_attention", "conv"), ffn_types=("swiglu", "moe", "moe"), dtype="bfloat16",
        remat="full", attention_impl="splash", router_z_loss=1e-3, expert_bias_rate=1e-3,
    ),
    data=DataConfig(sources=("text",), seq_len=4096, batch_size=16),
)


def test_it_fits_and_moves_what_it_should():
    with jax.default_matmul_precision("default"):  # Splash does not compile for more (`kernels/splash.py`).
        made = plan(CONFIG)
    memory, found = sum(made.program.memory.values()), made.budget
    assert memory < Topology.parse(CONFIG.topology).chip.hbm_bytes
    assert memory == pytest.approx(found.total, rel=0.25)

    paper = {(row.kind, row.axes): row.bytes for row in expected_collectives(CONFIG, found)}
    moved = collections.defaultdict(float)
    for row in made.program.collectives:
        moved[row.kind, row.axes] += row.bytes
    rows = 4 * 4096 * 2048 * 2
    assert paper["all-gather", ("expert",)] == 2 * 3 * rows
    assert paper["reduce-scatter", ("expert",)] == 2 * 2 * rows
    for kind in (("all-gather", ("fsdp",)), ("all-gather", ("expert",)), ("reduce-scatter", ("expert",)),
                 ("all-reduce", ("expert",)), ("all-reduce", ("fsdp", "expert"))):
        assert moved[kind] == pytest.approx(paper[kind], rel=0.01), kind
    # Gradients of experts: summed and cut at once, which sends half of what is on paper.
    assert moved["reduce-scatter", ("fsdp",)] == pytest.approx(paper["all-reduce", ("fsdp",)], rel=0.01)
