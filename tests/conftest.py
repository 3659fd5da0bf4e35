"""Settings of every test: CPU, exact float32 products, one cache of programs, hypothesis that repeats itself."""

import gc
import json
import os
from pathlib import Path

import compiled
import timing

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Processes that tests start find the same cache.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(compiled.directory()))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ["XLA_FLAGS"] = compiled.flags()

import jax
import pytest
from hypothesis import HealthCheck, settings

jax.config.update("jax_default_matmul_precision", "highest")

settings.register_profile(
    "lfm_jax",
    deadline=None,
    derandomize=True,
    print_blob=True,
    max_examples=15,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("lfm_jax")


def pytest_addoption(parser):
    parser.addoption("--times", metavar="FILE", help="append what each test takes to FILE (tests/timing.py)")


def pytest_configure(config):
    if "PYTEST_XDIST_WORKER" not in os.environ:  # Once a run.
        compiled.shrink()
    if config.option.times:
        config.pluginmanager.register(timing.Recorder(Path(config.option.times).absolute()))


def pytest_collection_modifyitems(config, items):
    """Marks what is slow. Two workers end together when the heaviest files start first; one never timed is heavy."""
    measured = json.loads(timing.SECONDS.read_text())
    slow = set(measured["slow"])
    for item in items:
        if item.nodeid.partition("[")[0] in slow:
            item.add_marker("slow")
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: -measured["files"].get(item.path.stem, 100))


@pytest.fixture(scope="session")
def cache():
    """The directory of the compilation cache that all processes share."""
    return os.environ["JAX_COMPILATION_CACHE_DIR"]


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Frees what a module compiled: each program maps pages, and Linux ends a process at its 65,530th mapping."""
    yield
    jax.clear_caches()
    gc.collect()
