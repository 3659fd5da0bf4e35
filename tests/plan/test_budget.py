"""The budget by analysis: exact where it claims to be, made without compiling, and clear about what does not fit."""

import jax
import pytest
import tpu_aot
from recipes import recipe

from lfm_jax.chips import CHIPS
from lfm_jax.config import ModelConfig
from lfm_jax.plan import budget, plan
from lfm_jax.plan.program import expected_collectives, lower_step, read_program
from lfm_jax.plan.topology import Topology
from lfm_jax.train.budget import recomputed_flops_per_token
from lfm_jax.units import si, size


def budget_on(config):
    topology = Topology.parse(config.topology)
    return budget(config, topology.mesh(config.mesh, for_compiling=False))


def test_state_and_batch_of_the_350m():
    config = recipe("v5e:16x16", mesh=dict(fsdp=16), rows=1024, seq_len=4096,
                    model=dict(ModelConfig.preset("lfm2-350m").__dict__))
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: compiled.append(name))
    found = budget_on(config)
    assert not [name for name in compiled if "backend_compile" in name]
    n = 354_483_968
    assert found.num_params == n
    # Every matrix over 16 devices in float32, once and twice; norms, taps and scalars are whole on every device. Shards
    # of attention's matrices, 64 by 64, fill half of a TPU's 128 lanes.
    attention = 6 * 2 * 1024 * 64 * (16 + 8)
    whole = 16 * 2 * 1024 + 1024 + 6 * 2 * 64 + 10 * 3 * 1024
    assert found.parameters / 4 == pytest.approx((n - whole + attention) / 16 + whole, abs=1000)
    assert 2 * found.parameters <= found.optimizer <= 2 * found.parameters + 64
    assert found.gradients == found.parameters
    assert found.batch == 4 * 4 * 4 * 4096
    assert found.tokens == 1024 * 4096
    assert found.model_flops == 3 * config.model.flops_per_token(4096) * 1024 * 4096
    assert found.chip is CHIPS["v5e"]
    assert "354 M parameters; mesh: data 16, fsdp 16" in str(found)
    assert f"of {size(16 * 2**30)}" in str(found)


def test_without_a_mesh_a_budget_is_that_of_one_device():
    config = recipe()
    assert budget(config, None).parameters == 4 * config.model.num_params()
    assert budget(config, None).chip is None
    budget(config, None).check()


def test_a_mesh_that_does_not_divide_the_model_is_refused():
    with pytest.raises(ValueError, match=r"kv_heads \(4\) does not divide over tensor=8"):
        budget_on(recipe("gpu:8xH200", mesh=dict(tensor=8)))


@pytest.mark.parametrize(("change", "largest", "advice"), [
    (dict(rows=1 << 19, model=dict(layer_types=("conv",) * 16)), "activations", "set model.remat to full"),
    (dict(model=dict(hidden_size=1 << 14, ffn_size=1 << 16, remat="full")), "optimizer", "raise mesh.fsdp"),
    (dict(rows=8, seq_len=4096, model=dict(vocab_size=1 << 22), loss_chunk=1 << 12, mesh=dict(fsdp=8)), "working",
     "lower loss_chunk"),
])
def test_what_does_not_fit_names_the_largest_parts_and_what_to_change(change, largest, advice):
    with pytest.raises(ValueError, match=r"needs .*iB on each device, but a A100 has") as error:
        plan(recipe("gpu:8xA100", **change)).check()
    first = str(error.value).splitlines()[1]
    assert largest in first
    assert advice in first


@tpu_aot.requires_libtpu
def test_what_the_compiler_finds_too_large_says_so_too():
    with pytest.raises(ValueError, match=r"compiler finds no room \(.*HBM") as error:
        plan(recipe("v5e:2x2", rows=1 << 20, model=dict(layer_types=("conv",)), mesh=dict(fsdp=4)))
    assert "v5e has 16 GiB:\n  - working: " in str(error.value)


def test_micro_batches_keep_less_and_add_a_sum_of_gradients():
    one, four = (budget_on(recipe(rows=64, micro_batches=n)) for n in (1, 4))
    assert four.gradients == 2 * one.gradients
    assert four.batch == one.batch
    assert four.activations < one.activations
    assert four.model_flops == one.model_flops


def test_what_remat_computes_again():
    model = ModelConfig.preset("lfm2-350m")
    again = {kind: recomputed_flops_per_token(model.replace(remat=kind), 4096) for kind in
             ("none", "dots", "ffn", "full")}
    D, F, L = 1024, 4608, 16
    assert again["none"] == 0
    assert again["ffn"] == 2 * L * 2 * D * F
    assert again["full"] == model.flops_per_token(4096) - 2 * D * 65536 - 2 * L * D * F
    assert again["dots"] == 6 * 2 * 2 * 16 * 64 * 4097 / 2 + 10 * 2 * 3 * D  # Attention and the conv taps.


def test_scores_that_attention_holds_are_counted():
    """One layer of attention over 64 tokens with 8 heads: scores in float32 and in bfloat16."""
    held, free, auto = (
        budget_on(recipe("gpu:8xH200", model=dict(attention_impl=impl))).activations
        for impl in ("xla", "blockwise", "auto")
    )
    local = 16 * 64 / 8
    assert held - free == local * 8 * 64 * (4 + 2)
    assert auto == free  # By cuDNN.
    held, auto = (
        budget_on(recipe("gpu:8xH200", model=dict(attention_impl=impl, dtype="float32"))).activations
        for impl in ("xla", "auto")
    )
    assert auto == held  # A gigabyte of scores, and less, is not worth blocks.
    rows = 8 * 2**30 // (4 * 8 * 512 * 512)  # On each of eight devices a gigabyte, and then more.
    just, more = (
        budget_on(recipe("gpu:8xH200", rows=n, seq_len=512, model=dict(dtype="float32"))).activations / n
        for n in (rows, rows + 8)
    )
    assert more < just / 2


@pytest.mark.parametrize("scanned", [False, True])
def test_gates_of_heads_are_counted(scanned):
    """A layer of 8 heads of 16 keeps each gate's product and sigmoid, and scanned what comes into the gates."""
    plain, gated = (
        budget_on(recipe("gpu:8xH200", model=dict(
            attention_gate=gate, scan_layers=scanned, layer_types=("full_attention",) * 2)))
        for gate in (False, True)
    )
    N, H, D, tokens, layers = 8, 16, 64, 16 * 64 / 8, 2
    kept = 2 * N + (N * H if scanned else 0)
    assert gated.num_params - plain.num_params == layers * N * D
    assert gated.model_flops - plain.model_flops == 3 * 2 * layers * N * D * 16 * 64
    assert gated.activations - plain.activations == 2 * layers * (tokens * kept + N * D)


def test_attention_of_either_kind_trades_time_for_heads():
    moved = {}
    for kind in ("conv", "full_attention", "sliding_attention"):
        config = recipe(model=dict(layer_types=(kind,)), mesh=dict(context=2))
        rows = expected_collectives(config, budget_on(config))
        moved[kind] = sum(row.bytes for row in rows if (row.kind, row.axes) == ("all-to-all", ("context",)))
    assert moved["conv"] == 0
    # Forward and back: results and queries of 8 heads, keys and values of 4, for the tokens of a device, in bfloat16.
    assert moved["full_attention"] == moved["sliding_attention"] == 2 * 2 * (8 + 4) * 16 * 16 * 64 / 8 * 2


def test_experts_over_devices_keep_their_weights_and_trade_rows():
    """Of two mixtures of 8 experts, forward and back: rows of 4 devices gathered and scattered, in bfloat16. Gradients
    of experts are summed over the devices along `data` only, those of all else over all."""
    model = dict(layer_types=("conv",) * 3, ffn_types=("swiglu", "moe", "moe"), num_experts=8, active_experts=2,
                 expert_size=32)
    config = recipe(model=model, mesh=dict(data=2, expert=4))
    found = budget_on(config)
    rows = {(row.kind, row.axes): row.bytes for row in expected_collectives(config, found)}
    tokens, D, experts = 16 * 64 / 8, 64, 2 * 8 * 3 * 64 * 32
    assert rows["all-gather", ("expert",)] == rows["reduce-scatter", ("expert",)] == 2 * 2 * 4 * tokens * D * 2
    # But for the biases of experts, which have no gradient.
    assert rows["all-reduce", ("data",)] == pytest.approx(experts / 4 * 2, rel=1e-3)
    lookups = 512 * D * 4  # In float32, before they are added to the rest of the table's gradient.
    others = (found.num_params - experts) * 2
    assert rows["all-reduce", ("data", "expert")] == pytest.approx(others + lookups, rel=1e-3)
    alone = budget_on(recipe(model=model, mesh=dict(data=8)))
    held = 4 * (alone.num_params - experts + experts / 4)
    assert found.parameters == pytest.approx(held, abs=1)


def test_units():
    assert [size(n) for n in (5, 3 * 2**20, 1.5 * 2**40)] == ["5 B", "3 MiB", "1.5 TiB"]
    assert [si(n) for n in (7, 354_483_968)] == ["7", "354 M"]
    assert si(9.55e15, "FLOP") == "9.55 PFLOP"


@tpu_aot.requires_libtpu
@pytest.mark.parametrize("remat", ["none", "full"])
def test_products_of_the_compiled_step_are_those_of_the_formulas(remat):
    """Convolutions only: attention counts half of what its products over whole rows do."""
    model = dict(layer_types=("conv",) * 3, remat=remat)
    config = recipe("v5e:2x2", mesh=dict(fsdp=4), rows=8, seq_len=256, model=model)
    mesh = Topology.parse("v5e:2x2").mesh(config.mesh, for_compiling=True)
    found = budget(config, mesh)
    text = lower_step(config, mesh).compile().as_text()
    program = read_program(text, dict(mesh.shape), found, CHIPS["v5e"], 1.0)
    assert program.flops * 4 == pytest.approx(found.model_flops + found.remat_flops, rel=0.01)
    assert program.unknown_loops == 0
