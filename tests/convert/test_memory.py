"""Peak memory of converting, loading and saving real shapes in bfloat16, in a process of its own."""

import subprocess
import sys

import numpy as np
import pytest

from lfm_jax import ModelConfig
from lfm_jax.convert.hf import tensors, write_hf

PEAK = """
import re, sys
import lfm_jax as lfm
from lfm_jax.convert.hf import convert

def peak():
    # Not getrusage: its maximum begins with that of the process that started this one.
    print(1024 * int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]))

"""
CONVERT = PEAK + "convert(sys.argv[1], sys.argv[2]); peak()"
LOAD_AND_SAVE = PEAK + "model, _ = lfm.load(sys.argv[1]); peak(); lfm.save_hf(model, sys.argv[2]); peak()"


def peaks(code, tmp_path):
    """What a process tells of its largest memory so far, each time that it is asked."""
    run = subprocess.run([sys.executable, "-c", code, str(tmp_path / "src"), str(tmp_path / "dst")],
                         capture_output=True, text=True, check=True)
    return [int(line) for line in run.stdout.split()]


def random_arrays(config):
    """Each tensor is a rotated copy of one random block: quick to make, and another one each time."""
    block = np.random.default_rng(0).integers(0, 2**16, 2**20, np.uint16)
    for i, (name, shape) in enumerate(tensors(config).items()):
        values = np.resize(np.roll(block, i), shape).view("bfloat16")
        yield name, values.astype(np.float32) if name.endswith("expert_bias") else values


def test_converting_350m_streams(tmp_path):
    config = ModelConfig.preset("lfm2.5-350m").replace(param_dtype="bfloat16")
    write_hf(tmp_path / "src", config, random_arrays(config), max_shard_bytes=400_000_000)
    [peak], params = peaks(CONVERT, tmp_path), 2 * config.num_params()
    print(f"peak {peak / 1e6:.0f} MB for {params / 1e6:.0f} MB of parameters")
    assert peak < 1.5 * params + 500e6
    assert peak < params, "more than the process and a few tensors was held"
    single = np.memmap(tmp_path / "dst" / "model.safetensors", np.uint8, "r")
    shards = [np.memmap(file, np.uint8, "r") for file in sorted((tmp_path / "src").glob("*.safetensors"))]
    data = [shard[8 + int(shard[:8].view("<u8")[0]) :] for shard in (single, *shards)]
    assert len(shards) == 2
    assert len(data[0]) == params
    np.testing.assert_array_equal(data[0][: len(data[1])], data[1])
    np.testing.assert_array_equal(data[0][len(data[1]) :], data[2])
    for file in tmp_path.rglob("*.safetensors"):
        file.unlink()


@pytest.mark.long
def test_experts_are_loaded_and_saved_one_by_one(tmp_path):
    """1.8 GB of the real width: three tensors for each expert in the file, arrays of all experts in memory. Loading
    stays below 1.5 times the parameters and 500 MB, and so does saving; the bytes of each tensor come back."""
    config = ModelConfig.preset("lfm2-8b-a1b").replace(
        layer_types=("conv", "full_attention", "conv"), ffn_types=("swiglu", "moe", "moe"), param_dtype="bfloat16",
    )
    params = 2 * config.num_params()
    write_hf(tmp_path / "src", config, random_arrays(config))
    for what, peak in zip(("load", "save"), peaks(LOAD_AND_SAVE, tmp_path), strict=True):
        print(f"{what}: peak {peak / 1e6:.0f} MB, {peak / params:.2f} times {params / 1e6:.0f} MB of parameters")
        assert peak < 1.5 * params + 500e6
    [src, dst] = (np.memmap(tmp_path / side / "model.safetensors", np.uint8, "r") for side in ("src", "dst"))
    np.testing.assert_array_equal(src, dst)
    assert sum(".experts." in name for name in tensors(config)) == 2 * 3 * 32
    for file in tmp_path.rglob("*.safetensors"):
        file.unlink()
