"""`lfm plan`: machines by name, the roofline, and what is printed."""

import json
from pathlib import Path

import pytest
import tpu_aot
from recipes import recipe

import lfm_jax as lfm
from lfm_jax import cli
from lfm_jax.chips import CHIPS
from lfm_jax.plan import PlanConfig, plan
from lfm_jax.plan.program import Program, Traffic
from lfm_jax.plan.report import Plan
from lfm_jax.plan.topology import Topology, bandwidth
from lfm_jax.recipe import load_recipe
from lfm_jax.sharding import MeshConfig
from lfm_jax.testing import tiny_model
from lfm_jax.units import si

RECIPE = """
run_dir: runs/x
steps: 1000
model:
  layer_types: [conv, full_attention, conv]
  vocab_size: 512
  hidden_size: 64
  ffn_size: 128
  num_heads: 8
  num_kv_heads: 4
  head_dim: 16
data: {sources: [text], seq_len: 64, batch_size: 16}
"""


@pytest.fixture
def path(tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return str(tmp_path / "recipe.yaml")


def run(capsys, *args):
    with pytest.raises(SystemExit) as status:
        cli.main(["plan", *args])
    out = capsys.readouterr()
    return status.value.code, out.out, out.err


# ---------------------------------------------------------------------------------------------------- topologies


@pytest.mark.parametrize(("name", "devices", "chip"), [
    ("v5e:16x16", 256, "v5e"), ("v5p:4x4x4", 64, "v5p"), ("v6e:8x8", 64, "v6e"), ("tpu7x:2x2x1", 8, "tpu7x"),
    ("gpu:8xH200", 8, "H200"), ("cpu", 1, None), ("cpu:8", 8, None),
])
def test_topologies_by_name(name, devices, chip):
    topology = Topology.parse(name)
    assert topology.num_devices == devices
    assert topology.chip is (chip and CHIPS[chip])
    assert len(topology.stand_ins()) == devices


@pytest.mark.parametrize(("name", "problem"), [
    ("v5e", "topology 'v5e' is not known; expected for example v5e:16x16"),
    ("gpu:8xH300", r"gpu:8xH200 \(A100, H100, H200, B200\)"),
    ("v5e:4x4x4", "has 3 dimensions; a slice of v5e has 2"),
])
def test_other_names_are_refused(name, problem):
    with pytest.raises(ValueError, match=problem):
        Topology.parse(name)


@tpu_aot.requires_libtpu
def test_a_mesh_that_does_not_lie_on_the_torus_is_refused():
    with pytest.raises(ValueError, match="do not fit this slice: each size must be the product"):
        Topology.parse("v6e:8x8").mesh(MeshConfig(fsdp=16), for_compiling=True)


@pytest.mark.parametrize(("name", "sizes", "axes", "links"), [
    ("v5e:16x16", dict(data=16, fsdp=16), ("fsdp",), 2),  # A ring along one dimension.
    ("v5e:16x16", dict(data=16, fsdp=16), ("data", "fsdp"), 4),
    ("v5e:4x4", dict(fsdp=16), ("fsdp",), 2),  # Lines along two.
    ("v5e:16x16", dict(data=64, fsdp=4), ("fsdp",), 1),  # A part of a ring.
    ("v5p:4x4x4", dict(data=16, fsdp=4), ("fsdp",), 2),
    ("gpu:8xH200", dict(fsdp=8), ("fsdp",), 1),
])
def test_links_that_mesh_axes_have(name, sizes, axes, links):
    topology = Topology.parse(name)
    mesh = topology.mesh(MeshConfig(**sizes), for_compiling=False)
    assert bandwidth(mesh, axes, topology.chip, topology.shape) == links * topology.chip.link_bandwidth


# ------------------------------------------------------------------------------------------------------ roofline


def planned(compute, memory, links):
    config = recipe("v5e:2x2", mesh=dict(fsdp=4))
    topology = Topology.parse("v5e:2x2")
    found = plan(recipe("v5e:2x2", mesh=dict(fsdp=4), compile=False)).budget
    row = Traffic("all-gather", ("fsdp",), 1, 4.0, 3.0, 4)
    program = Program(memory=None, flops=1.0, hbm_bytes=1.0, compute_bound=compute, memory_bound=memory,
                      collectives=[row], unknown_loops=0, compile_seconds=None)
    return Plan(topology=topology, budget=found, program=program, link_seconds={("all-gather", ("fsdp",)): links},
                run_tokens=2.0 * config.data.batch_size * config.data.seq_len, efficiency=1.0)


def test_the_slowest_term_limits_a_step():
    assert planned(3.0, 1.0, 2.0).step_seconds == 4.0
    assert planned(3.0, 1.0, 2.0).limit == "products"
    assert planned(1.0, 3.0, 2.0).limit == "HBM"
    slow = planned(1.0, 1.0, 5.0)
    assert (slow.step_seconds, slow.limit) == (5.0, "interconnect, most of it all-gather over fsdp")
    assert slow.run_seconds == 2 * 5.0
    assert slow.mfu == slow.budget.model_flops / (5.0 * 4 * 197e12)


# --------------------------------------------------------------------------------------------------- the command


def test_plan_by_analysis(path, capsys):
    status, out, err = run(capsys, path, "--topology", "gpu:8xH200", "--mesh.fsdp", "8", "--tokens", "1e9")
    assert (status, err) == (0, "")
    # Parameters: 3 x 3 x 64 x 128 (feed-forward), 2 x 4 x 64 x 64 (conv), 2 x 64 x 16 x 12 (attention), 512 x 64: over
    # eight devices; norms and taps on each.
    whole = 64 * 7 + 2 * 16 + 2 * 3 * 64
    split = 9 * 64 * 128 + 8 * 64 * 64 + 24 * 64 * 16 + 512 * 64
    count = f"{(split + whole) / 1e3:.0f} k parameters"
    assert f"{count} on gpu:8xH200: 8 device(s), mesh fsdp 8; 1,024 tokens a step" in out
    assert f"| parameters | {4 * (split / 8 + whole) / 1024:.3g} KiB |" in out
    assert f"| optimizer | {8 * (split / 8 + whole) / 1024:.3g} KiB |" in out
    assert "| HBM of a H200 device | 131 GiB |" in out
    for row in ("| all-gather | fsdp |", "| all-reduce | fsdp |", "limited by", "| tokens/s |", "| MFU |",
                "| tokens | 1 G |", "| days |", "| device-hours |", "80% of peak (989 TFLOP/s, 4.8 TB/s)"):
        assert row in out


def test_plan_as_json_agrees_with_itself(path, capsys):
    status, out, _ = run(capsys, path, "--topology", "v5e:4x4", "--compile", "False", "--format", "json")
    found = json.loads(out)
    assert status == 0
    assert found["mesh"] == dict(data=16, fsdp=1, expert=1, tensor=1, context=1)
    assert found["tokens_per_second"] == pytest.approx(1024 / found["step_seconds"])
    assert found["run_tokens"] == 1000 * 1024
    assert found["days"] * 86400 == pytest.approx(1000 * found["step_seconds"])
    assert found["device_hours"] * 3600 == pytest.approx(16 * 1000 * found["step_seconds"])
    assert found["chip"]["source"] == CHIPS["v5e"].source


@pytest.mark.parametrize(("method", "flags"), [
    ("sft", ()), ("dpo", ("--dpo.reference", "model")),
    ("grpo", ("--grpo.rewards", "length", "--grpo.max-new-tokens", "8", "--data.heldout-fraction", "0")),
])
def test_a_recipe_of_tuning_is_planned(tmp_path, capsys, method, flags):
    """The model is that of init_from, and steps are to be named."""
    path, model = tmp_path / "tune.yaml", tiny_model(layer_types=("conv", "full_attention"))
    lfm.save_hf(model, tmp_path / "base")
    path.write_text(f"{{run_dir: runs/x, method: {method}, init_from: {tmp_path / 'base'}, "
                    "data: {sources: [x], seq_len: 64, batch_size: 8}}")
    status, out, err = run(capsys, str(path), *flags, "--topology", "gpu:1xH200", "--steps", "10", "--format", "json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert found["num_params"] == model.config.num_params()
    assert found["run_tokens"] == 10 * found["tokens_per_step"] > 0
    status, _, err = run(capsys, str(path), *flags, "--topology", "gpu:1xH200")
    assert status == 2
    assert "steps is 0, which leaves them to the data" in err


def test_frozen_weights_are_told(path, capsys):
    flags = ("--topology", "cpu", "--freeze", "embed")
    found = json.loads(run(capsys, path, *flags, "--format", "json")[1])
    assert found["num_params"] - found["trained_params"] == 512 * 64
    _, out, _ = run(capsys, path, *flags)
    assert f"{si(found['num_params'])} parameters ({si(found['trained_params'])} trained) on cpu:" in out
    assert "| useful (forward and backward), all devices |" in out


def test_on_a_cpu_there_are_bytes_and_no_times(path, capsys):
    status, out, _ = run(capsys, path, "--topology", "cpu:8")
    assert status == 0
    assert "| parameters |" in out
    assert "no times" in out
    assert "MFU" not in out


def test_what_does_not_fit_is_printed_and_refused(path, capsys):
    status, out, err = run(capsys, path, "--topology", "gpu:8xA100", "--data.batch_size", str(1 << 21))
    assert status == 2
    assert "| activations |" in out
    assert "lfm: the step needs" in err
    assert "- activations" in err


@pytest.mark.parametrize(("flags", "problem"), [
    (("--topology", "v5e:4x4", "--mesh.fsdp", "3"), "does not make up 16 devices"),
    (("--topology", "cpu:8", "--data.batch_size", "4"), "batch of 4 rows is not a multiple of mesh.data x mesh.fsdp"),
    (("--topology", "cpu:8", "--efficiency", "1.5"), "efficiency is 1.5"),
    (("--topology", "moon:8"), "topology 'moon:8' is not known"),
])
def test_what_cannot_be_planned_is_refused(path, capsys, flags, problem):
    status, _, err = run(capsys, path, *flags)
    assert status == 2
    assert problem in err


# --------------------------------------------------------------------------------------------------- the recipes

CONFIGS = Path(__file__).parents[2] / "configs"
MACHINES = {"research": "v5e:2x4", "demo": "cpu", "lfm2.5-350m": "gpu:1xH200"}
SIZES = {"lfm2-350m": 354e6, "lfm2-350m-32k": 354e6, "lfm2-700m": 742e6, "lfm2-1.2b": 1.17e9, "lfm2-8b-a1b": 8.34e9,
         "research-20m": 21e6, "research-100m": 98e6}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_fits_the_machine_it_is_for(path):
    machine = next((name for start, name in MACHINES.items() if path.stem.startswith(start)), "v5e:16x16")
    config = load_recipe(PlanConfig, path, ["--topology", machine, "--compile", "False"])
    planned = plan(config)
    planned.check()
    if path.stem in SIZES:
        assert planned.budget.num_params == pytest.approx(SIZES[path.stem], rel=0.01)


def test_the_recipes_are_there():
    assert set(SIZES) | {"demo", "lfm2.5-350m"} <= {path.stem for path in CONFIGS.glob("*.yaml")}
