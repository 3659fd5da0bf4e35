"""Peak memory and file size of exporting the real 350M shape, in a process of its own."""

import subprocess
import sys

import numpy as np
import pytest

from lfm_jax import ModelConfig
from lfm_jax.convert.hf import tensors, write_hf

EXPORT = """
import re, sys, time
from lfm_jax.convert.gguf.models import export
began = time.monotonic()
export(sys.argv[1], sys.argv[2], sys.argv[3])
# Not getrusage: its maximum begins with that of the process that started this one.
peak = 1024 * int(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1])
print(peak, time.monotonic() - began)
"""
SIZES = {"F32": 1418.0, "Q8_0": 376.8, "Q4_K_M": 226.9, "Q4_0": 216.9}
"""Megabytes of the tensors in llama.cpp's files, without keys."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("350m") / "src"
    config = ModelConfig.preset("lfm2.5-350m").replace(param_dtype="bfloat16")
    block = (0.02 * np.random.default_rng(0).standard_normal(2**20, np.float32)).astype("bfloat16")

    def arrays():
        for i, (name, shape) in enumerate(tensors(config).items()):
            # A rotated copy of one random block: quick to make, and each tensor is another one.
            yield name, np.resize(np.roll(block, i), shape)

    write_hf(path, config, arrays())
    yield path
    (path / "model.safetensors").unlink()


@pytest.mark.long
@pytest.mark.parametrize("type", SIZES)
def test_exporting_350m_streams(directory, tmp_path, type):
    out = tmp_path / "out.gguf"
    run = subprocess.run([sys.executable, "-c", EXPORT, str(directory), str(out), type],
                         capture_output=True, text=True, check=True)
    peak, seconds = map(float, run.stdout.split())
    size = out.stat().st_size
    out.unlink()
    print(f"\n{type}: {size / 1e6:.1f} MB, peak {peak / 1e6:.0f} MB, {seconds:.0f} s")
    assert peak < 4 * 65_536 * 1024 + 500e6
    assert abs(size / 1e6 / SIZES[type] - 1) < 1e-3
