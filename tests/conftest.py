"""Settings of every test: CPU, exact float32 products, few threads, hypothesis that repeats itself."""

import gc
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jax
import pytest
from hypothesis import HealthCheck, settings
from jax.experimental.compilation_cache import compilation_cache

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


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Frees what a module compiled: each program maps pages, and Linux ends a process at its 65,530th mapping."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """A compilation cache for all processes that tests start."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def cached(cache):
    """The same cache for what a module compiles in this process: runs of one recipe are one program."""
    changes = {"jax_compilation_cache_dir": str(cache), "jax_persistent_cache_min_compile_time_secs": 0}
    before = {name: getattr(jax.config, name) for name in changes}

    def use(values):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()

    use(changes)
    yield
    use(before)
