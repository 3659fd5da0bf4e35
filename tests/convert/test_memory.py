"""Peak memory of converting the real 350M shape in bfloat16, in a process of its own."""

import subprocess
import sys

import numpy as np

from lfm_jax import ModelConfig
from lfm_jax.convert.hf import tensors, write_hf

CONVERT = """
import re, sys
from lfm_jax.convert.hf import convert
convert(sys.argv[1], sys.argv[2])
# Not getrusage: its maximum begins with that of the process that started this one.
print(1024 * int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]))
"""


def test_converting_350m_streams(tmp_path):
    config = ModelConfig.preset("lfm2.5-350m").replace(param_dtype="bfloat16")
    rng = np.random.default_rng(0)
    block = rng.integers(0, 2**16, 2**20, np.uint16)

    def arrays():
        for i, (name, shape) in enumerate(tensors(config).items()):
            # A rotated copy of one random block: quick to make, and each tensor is another one.
            yield name, np.resize(np.roll(block, i), shape).view("bfloat16")

    write_hf(tmp_path / "src", config, arrays(), max_shard_bytes=400_000_000)
    run = subprocess.run([sys.executable, "-c", CONVERT, str(tmp_path / "src"), str(tmp_path / "dst")],
                         capture_output=True, text=True, check=True)
    peak, params = int(run.stdout), 2 * config.num_params()
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
