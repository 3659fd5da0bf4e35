"""How long a checkpoint holds up training, beside how long it takes to be written.

    python experiments/checkpoint_blocking.py --millions 100 --directory /tmp/blocking

saves a training state of so many parameters (float32, with AdamW's two moments) three times and prints medians.
"""

from __future__ import annotations

import shutil
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import tyro

from lfm_jax.train.checkpoint import CheckpointManager
from lfm_jax.train.state import Guard, TrainState

SAVES = 3


def main(directory: Path, millions: int = 100) -> None:
    """Measures on this machine.

    Args:
      directory: a new directory, removed afterwards.
      millions: parameters.
    """
    directory.mkdir(parents=True)

    @jax.jit
    def made(value: jax.Array) -> TrainState:
        def weights() -> dict[str, jax.Array]:
            return {f"{i}": jnp.full((1000, 1000), value + i) for i in range(millions)}

        return TrainState(weights(), {}, (weights(), weights()), jnp.int32(0), Guard(value, jnp.int32(0), jnp.int32(0)))

    manager = CheckpointManager(directory, keep=1)
    blocked, written = [], []
    for n in range(1, SAVES + 1):
        state = jax.block_until_ready(made(jnp.float32(n)))
        began = time.monotonic()
        manager.save(n, state, {}, {})
        blocked.append(time.monotonic() - began)
        manager.wait()
        written.append(time.monotonic() - began)
    manager.close()
    shutil.rmtree(directory)
    size = 3 * 4 * millions * 1e6 / 1e9
    print(f"| {millions}M parameters | {size:.1f} GB | {statistics.median(blocked):.2f} s | "
          f"{statistics.median(written):.1f} s |")


if __name__ == "__main__":
    tyro.cli(main)
