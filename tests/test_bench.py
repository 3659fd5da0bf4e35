"""The benchmarks run, on shapes too small to say anything about speed."""

import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lfm_jax.bench import gpu_peers, kernels, model, passes, serve, timing
from lfm_jax.chips import CHIPS
from lfm_jax.config import ModelConfig
from lfm_jax.kernels import reference
from lfm_jax.model import LFM
from lfm_jax.testing import tiny_config


def test_model_suite_measures_both_sides():
    report = model.bench_model(tiny_config(), repeats=1)
    rows = [line for line in report.splitlines() if line.startswith("| ")][1:]
    assert [row.split("|")[1].split(",")[0].strip() for row in rows] == [
        "prefill", "greedy decode", "greedy decode", "training step",
    ]
    assert all("x | >=" in row and "absent" not in row for row in rows)
    assert "jax 0." in report
    assert "transformers 5." in report


def test_model_suite_says_when_the_peer_is_absent(monkeypatch):
    monkeypatch.setattr(model.Peer, "build", classmethod(lambda cls, _: None))
    assert model.bench_model(tiny_config(), repeats=1).count("absent") >= 4


TOY = kernels.Sizes(
    "float32", conv=((1, 8, 16, 3),), scan=((2, 8, 16),), attention=((1, 8, 8, 4, 2, 8), (2, 1, 8, 4, 2, 8)),
    experts=((3, 2, 4, 8, 6),), linear_rows=(1, 2), linear_weights=1, copy_bytes=2**16,
)  # fmt: skip


def cells_of(report, start):
    """First cells after the shape -> the row's cells, of the rows whose shape begins so."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.splitlines()]
    return {row[1]: row[2:] for row in rows if row and row[0] == start}


def test_kernels_suite_has_a_row_for_every_implementation_that_runs_here(capsys):
    report = kernels.bench_kernels(repeats=1, sizes=TOY)
    conv, scan = cells_of(report, "1, 8, 16, 3"), cells_of(report, "2, 8, 16")
    rows, decode = cells_of(report, "1, 8, 8, 4, 2, 8"), cells_of(report, "2, 1, 8, 4, 2, 8")
    assert conv.pop("*copy*")[3] == scan.pop("*copy*")[3] == "100 %"
    assert set(conv) == {"lax", "shifted", "associative"}
    assert set(scan) == {"sequential", "associative", "chunked", "`lax.associative_scan` alone"}
    assert set(rows) == {"xla", "blockwise"}
    assert set(decode) == {"xla", "direct"}
    assert set(cells_of(report, "3, 2, 4, 8, 6")) == {"dense", "ragged", "blocks", "a dense layer of 2 F"}
    for cells in (*conv.values(), *scan.values()):
        assert [bool(cell) for cell in cells] == [True] * 10
        assert all(cell.endswith("%") for cell in (cells[3], cells[8]))
    assert not any(cells[4:] != [""] * 4 for cells in decode.values())  # No gradient in decoding.
    assert report.count("GB/s of weights") == 1
    assert "\n| 2 | " in report
    assert "Not run here: causal_conv pallas_tpu needs a TPU" in report
    assert "causal_conv (1, 8, 16, 3)" in capsys.readouterr().err


def test_rates_count_every_input_and_output_once():
    cells = kernels._cells(1e-3, temp=500, work=4_000_000, tokens=100, unit=1000, peak=8e9)
    assert cells == ["1.00 ms", "10000.0", "4.0", "50 %", "0.0 (0.50)"]


def test_what_would_take_too_long_is_not_run_and_what_fails_loses_only_its_cell():
    bench = kernels._Bench(1, TOY, passes.copy(64), float("inf"))
    bench.seen["k", "slow", "forward"] = 10, 3.0
    assert bench.compile(("k", "slow", "forward"), 1000, None).reason == "skipped: about 300 s"

    def broken(calls):
        raise RuntimeError("out of | memory")

    wrong = passes.compiled(lambda x: x @ x, jnp.ones((2, 3)))
    fine = passes.compiled(lambda x: x + 1, jnp.ones(3))
    found = passes.times([wrong, passes.Pass(broken), fine], repeats=2)
    assert found[0].startswith("failed: TypeError")
    assert found[1] == "failed: RuntimeError: out of / memory"
    assert found[2] > 0


def test_what_does_not_fit_in_memory_is_not_run(monkeypatch):
    monkeypatch.setattr(passes, "_free_memory", lambda: 1e6)
    assert passes.compiled(lambda x: jnp.tile(x, 10**6), jnp.ones(8)).reason == "does not fit in memory"
    assert passes.compiled(lambda x: x + 1, jnp.ones(8)).run is not None


def test_no_shape_is_begun_after_the_deadline():
    bench = kernels._Bench(1, TOY, passes.copy(64), deadline=0)
    assert list(bench.shapes("k", [(1,)])) == []


def test_peers_that_cannot_be_imported_say_why(monkeypatch):
    arrays = {name: jnp.ones((1, 4, 2)) for name in ("y_BTD", "a_BTD", "b_BTD")}
    monkeypatch.setitem(sys.modules, "torch", None)
    found = gpu_peers.conv(arrays, arrays["y_BTD"]) + gpu_peers.scan(arrays, arrays["y_BTD"])
    found += gpu_peers.experts({}, jnp.ones((4, 2)), flops=10)
    assert {entry.name for entry in found} == {
        "PyTorch conv1d alone", "PyTorch gate, conv1d, gate", "fla chunk_hgrn", "fla fused_recurrent_hgrn",
        "PyTorch grouped_mm",
    }
    assert all(entry.forward.reason.startswith("absent: import of torch halted") for entry in found)


def test_the_peer_s_convolution_is_ours():
    torch = pytest.importorskip("torch")
    y_BTD, w_WD = np.random.default_rng(0).standard_normal((2, 9, 4)), np.arange(12.0).reshape(3, 4)
    z_BDT = gpu_peers.conv1d(torch, torch.tensor(y_BTD).transpose(1, 2), torch.tensor(w_WD).T[:, None])
    expected, _ = reference.causal_conv(y_BTD, w_WD)
    np.testing.assert_allclose(z_BDT.transpose(1, 2).numpy(), expected, atol=1e-12)


def test_the_peer_s_experts_are_ours_with_their_gradient():
    torch = pytest.importorskip("torch", minversion="2.10")
    rng = np.random.default_rng(0)
    x_MD, w1_EDF, w3_EDF, w2_EFD = (
        rng.standard_normal(shape, np.float32) for shape in ((6, 8), (3, 8, 4), (3, 8, 4), (3, 4, 8))
    )
    chosen_MA = np.array([[0, 2]] * 5 + [[2, 0]], np.int32)  # Nobody has chosen the second.
    x, w13, w2 = (torch.tensor(w, requires_grad=True) for w in (x_MD, np.concatenate([w1_EDF, w3_EDF], -1), w2_EFD))
    y = gpu_peers.grouped_experts(torch, torch.tensor(chosen_MA), x, w13, w2)
    y.backward(torch.ones_like(y))

    arrays = {"x_MD": x_MD, "chosen_MA": chosen_MA, "w1_EDF": w1_EDF, "w3_EDF": w3_EDF, "w2_EFD": w2_EFD}
    expected, vjp = jax.vjp(lambda arrays: kernels._experts("dense", arrays), arrays)
    (gradient,) = vjp(jnp.ones_like(expected))
    np.testing.assert_allclose(y.detach().numpy(), expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in (("x_MD", x.grad), ("w1_EDF", w13.grad[..., :4]), ("w2_EFD", w2.grad)):
        np.testing.assert_allclose(theirs.numpy(), gradient[ours], rtol=1e-5, atol=1e-5)


def test_kernels_suite_and_selfcheck_need_jax_and_numpy_only():
    """On a GPU machine nothing else may be there."""
    others = ("flax", "optax", "orbax", "grain", "chex", "safetensors", "tokenizers", "jinja2", "rich", "tyro", "yaml")
    code = f"""
import sys
sys.modules.update(dict.fromkeys({others}))
import lfm_jax.bench.kernels
import lfm_jax.selfcheck
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_interleave_runs_in_turn_after_one_uncounted_round():
    calls = []
    times = timing.interleave([lambda: calls.append("a"), lambda: calls.append("b")], repeats=2)
    assert calls == ["a", "b", "a", "b", "a", "b"]
    assert len(times) == 2
    assert all(t >= 0 for t in times)


def test_conditions_name_what_is_absent():
    line = timing.conditions("jax", "no-such-package")
    assert "no-such-package absent" in line
    assert "cores" in line


def test_serve_suite_on_an_accelerator_needs_little_and_compiles_little():
    """Its rows at toy size, where nothing but JAX and flax, with what that needs, can be imported."""
    absent = ("array_record", "grain", "jinja2", "llguidance", "matplotlib", "safetensors", "tokenizers", "torch",
              "transformers", "tyro", "fastapi")
    code = f"""
import sys
sys.modules.update(dict.fromkeys({absent}))
import jax
from flax import nnx
from lfm_jax.bench import serve
from lfm_jax.config import ModelConfig
from lfm_jax.model import LFM
serve.CONCURRENCY = (3, 1)
config = ModelConfig(hidden_size=32, ffn_size=64, num_heads=4, num_kv_heads=2, head_dim=8, vocab_size=128,
                     layer_types=("conv", "full_attention"), param_dtype="bfloat16", dtype="bfloat16", max_position=256)
compiled = []
jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: compiled.append(event))
print(serve._throughput(LFM(config, rngs=nnx.Rngs(0)), toy=True))
print(sum(event == "/jax/core/compile/backend_compile_duration" for event in compiled), "compiled")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *rows, _, peer, count = done.stdout.splitlines()
    assert [row.split("|")[2].strip() for row in rows[2:]] == ["1", "3"]
    assert peer.startswith("transformers: absent (")
    assert all(float(row.split("|")[3].replace(",", "")) > 0 for row in rows[2:])
    assert 0 < int(count.split()[0]) < 80  # One engine's warming up alone would be some 20 of the large ones.


def test_serve_suite_at_toy_size(capsys):
    report = serve.bench_serve(repeats=1, toy=True)
    assert "One step of decoding at batch 1" in report
    rows = [line for line in report.splitlines() if line.startswith("|")]
    assert [row.split("|")[1].strip() for row in rows if "x |" in row and "target" not in row] == [
        "one token at batch 1, `lfm.generate`", "16 requests, 6 tokens each", "32 requests, 2 to 12 tokens",
        "1,024", "8,192", "32,768",
    ]
    assert "NumPy reads all parameters once" in report
    assert "Time to the first token" in report
    assert "programs compiled" in capsys.readouterr().err
    with pytest.raises(ValueError, match="pip install llama-cpp-python"):
        serve.bench_serve(repeats=1, toy=True, gguf=Path("none.gguf"))


def test_decoding_beside_llama_cpp(monkeypatch):
    """With a llama.cpp that counts: the prompt at once, then token by token, and a model of another size is refused."""
    tiny = LFM(tiny_config(max_position=256), rngs=nnx.Rngs(0))
    evals, parameters = [], tiny.config.num_params()

    class Llama:
        model = None

        def __init__(self, path, **_):
            assert path == "tiny.gguf"

        def reset(self):
            evals.clear()

        def eval(self, tokens):
            evals.append(len(tokens))

    peer = types.SimpleNamespace(Llama=Llama, llama_model_n_params=lambda model: parameters)
    monkeypatch.setitem(sys.modules, "llama_cpp", peer)
    found = serve._beside_llama_cpp(tiny, Path("tiny.gguf"), repeats=1, toy=True)
    assert "one token at batch 1" in found
    assert evals == [serve.PROMPT] + [1] * 10
    parameters *= 2
    with pytest.raises(ValueError, match="not the same shape"):
        serve._beside_llama_cpp(tiny, Path("tiny.gguf"), repeats=1, toy=True)


def test_the_roofline_of_a_decoding_step():
    """At batch 1 what an H100 can do is its bandwidth over the bytes of parameters and state."""
    config = ModelConfig.preset("lfm2.5-350m").replace(dtype="bfloat16", param_dtype="bfloat16")
    chip = CHIPS["H100"]
    tokens = serve.roofline(config, chip, prompt=512, made=512, concurrency=1)
    step = (2 * config.num_params() + config.state_bytes(768)) / chip.hbm_bandwidth
    assert tokens == pytest.approx(1 / step, rel=0.02)
    assert serve.roofline(config, chip, prompt=512, made=512, concurrency=64) > 30 * tokens
