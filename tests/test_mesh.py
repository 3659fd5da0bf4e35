"""Runs tests/mesh/check_*.py, each in a process of its own with eight CPU devices."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Compiling is most of the time of these checks, and LLVM a third of compiling.
FLAGS = ("--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=1")
CHECKS = sorted((Path(__file__).parent / "mesh").glob("check_*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS, ids=lambda path: path.stem)
def test_on_eight_devices(check):
    env = os.environ | {"XLA_FLAGS": " ".join(FLAGS), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-m", "pytest", str(check)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def test_there_are_checks():
    assert {"check_kernels", "check_linear_scan", "check_model"} <= {path.stem for path in CHECKS}
