import random

import pytest

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
