import random

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu"]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A directory of small text files, the same every time."""
    directory = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    for i in range(24):
        lines = (" ".join(rng.choices(WORDS, k=rng.randint(3, 9))) for _ in range(rng.randint(2, 12)))
        (directory / f"{i:02}.txt").write_text("\n".join(lines) + "\n")
    return directory


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
