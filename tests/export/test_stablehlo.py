"""Programs for a process that has jax alone."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import tokens_like

import lfm_jax as lfm
from lfm_jax.export.stablehlo import export_stablehlo
from lfm_jax.sharding import nvidia_capability, platform
from lfm_jax.testing import tiny_model

ALONE = r'''
import json, sys
import jax, jax.export, jax.numpy as jnp, numpy as np

directory, platform = sys.argv[1], "cpu"
manifest = json.load(open(f"{directory}/manifest.json"))
raw = open(f"{directory}/model.safetensors", "rb").read()
n = int.from_bytes(raw[:8], "little")
header = json.loads(raw[8 : 8 + n])
dtypes = {"F32": jnp.float32, "BF16": jnp.bfloat16, "F16": jnp.float16}

def tensor(name):
    entry = header[name]
    first, stop = entry["data_offsets"]
    return np.frombuffer(raw[8 + n + first : 8 + n + stop], dtypes[entry["dtype"]]).reshape(entry["shape"])

weights = tuple(tensor(name) for name in manifest["weights"])
state = tuple(np.zeros(one["shape"], one["dtype"]) for one in manifest["state"])
programs = {name: jax.export.deserialize(bytearray(open(f"{directory}/{files[platform]}", "rb").read())).call
            for name, files in manifest["programs"].items()}
tokens = np.load(f"{directory}/tokens.npy")
logits, state = programs["prefill_8"](weights, state, tokens[:, :8], np.array([8, 5], np.int32))
found = [logits]
for _ in range(3):
    step = jnp.argmax(logits, axis=-1).astype(jnp.int32)[:, None]
    logits, state = programs["decode"](weights, state, step, np.array([1, 1], np.int32))
    found.append(logits)
np.save(f"{directory}/found.npy", np.stack(found))
assert not any(name.split(".")[0] in ("lfm_jax", "flax", "safetensors") for name in sys.modules), "not jax alone"
'''


@pytest.mark.parametrize("changes", [
    dict(layer_types=("conv", "full_attention", "recurrence")),
    dict(layer_types=("conv", "sliding_attention"), sliding_window=4, ffn_types=("swiglu", "moe"), num_experts=4,
         active_experts=2, expert_size=8),
], ids=["dense", "moe"])
def test_a_process_with_jax_alone_gets_the_same_numbers(tmp_path, changes):
    model = tiny_model(**changes)
    told = []
    export_stablehlo(model, tmp_path, prompts=(8,), max_len=16, batch=2, platforms=("cpu",), say=told.append)
    tokens_BT = np.asarray(tokens_like((2, 8), 0), np.int32)
    np.save(tmp_path / "tokens.npy", tokens_BT)
    subprocess.run([sys.executable, "-c", ALONE, str(tmp_path)], check=True)
    found = np.load(tmp_path / "found.npy")

    graphdef, params = nnx.split(model, nnx.Param)

    @jax.jit
    def run(params, tokens_BT, length_B, state):
        model = nnx.merge(graphdef, params)
        ids_BT = (jnp.arange(tokens_BT.shape[1]) < length_B[:, None]).astype(jnp.int32)
        logits_B1V, state = model(tokens_BT, segment_ids_BT=ids_BT, padding="right", logits="last", state=state)
        return logits_B1V[:, 0], state

    logits, state = run(params, tokens_BT, jnp.array([8, 5]), model.init_state(2, 16))
    for expected in found:
        np.testing.assert_array_equal(logits, expected)
        step = jnp.argmax(logits, axis=-1).astype(jnp.int32)[:, None]
        logits, state = run(params, step, jnp.array([1, 1]), state)
    tensors = len(jax.tree.leaves(params))
    assert told == [f"model.safetensors: {tensors} tensors", "decode.cpu.jaxexport", "prefill_8.cpu.jaxexport"]


def test_programs_for_other_platforms_are_what_xla_alone_makes(tmp_path):
    export_stablehlo(tiny_model(dtype="bfloat16"), tmp_path, prompts=(8,), max_len=16)
    programs = json.loads((tmp_path / "manifest.json").read_text())["programs"]
    assert [*programs] == ["decode", "prefill_8"]
    for files in programs.values():
        assert [*files] == ["cpu", "cuda", "tpu"]
        for platform_, file in files.items():
            exported = jax.export.deserialize(bytearray((tmp_path / file).read_bytes()))
            assert exported.platforms == (platform_,)
            assert "custom_call" not in exported.mlir_module()


def test_a_gpu_that_is_not_here_has_no_known_capability(monkeypatch):
    device = jax.sharding.AbstractDevice("NVIDIA H200", 1, "gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        assert (platform(), nvidia_capability()) == ("gpu", 0.0)


def test_what_cannot_be_exported_is_refused(tmp_path, monkeypatch):
    model = tiny_model()
    with pytest.raises(ValueError, match=r"'rocm' is none of cpu(.|\n)*batch is 0(.|\n)*32 tokens do not fit"):
        export_stablehlo(model, tmp_path, prompts=(32,), max_len=16, batch=0, platforms=("rocm",))
    with pytest.raises(ValueError, match="the model is quantised, which the file of weights cannot hold"):
        export_stablehlo(lfm.quantize(model, "int8"), tmp_path / "narrow")
    (tmp_path / "mine").write_text("x")
    with pytest.raises(ValueError, match="has files already"):
        export_stablehlo(model, tmp_path)
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    with pytest.raises(ImportError, match=r"pip install lfm_jax\[export\]"):
        export_stablehlo(model, tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
