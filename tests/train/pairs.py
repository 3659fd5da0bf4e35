"""An objective that the package does not have: of two sequences a row the first shall be the likelier one.

Run as a program it is a training run of its own: `python pairs.py RUN_DIR [mesh sizes as JSON] [step at which to die]`.

Dimensions: B rows, T time.
"""

import dataclasses
import json
import os
import signal
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from lfm_jax.config import ModelConfig
from lfm_jax.kernels.logprobs import token_logprobs
from lfm_jax.model import abstract_model
from lfm_jax.sharding import MeshConfig
from lfm_jax.train.checkpoint import CHECKPOINTS, CheckpointManager
from lfm_jax.train.config import RunConfig
from lfm_jax.train.objective import BatchArray, Terms
from lfm_jax.train.optimizer import OptimizerConfig
from lfm_jax.train.runner import run_training
from lfm_jax.train.state import named

STEPS, B, T, V = 8, 8, 12, 64
SAVED, KILLED = 3, 6
"""Step of the first checkpoint, and one before the next, with whose batch a run may die."""
FREEZE = ("embed", "blocks.*.feed_forward.*")


@dataclasses.dataclass(frozen=True)
class Preferred:
    """`-weight log sigmoid(log p(first) - log p(second))`, and as much of `-log p(first) / T` as `likely` says."""

    likely: float = 0.1
    loss_chunk: int = B * T

    arrays = {  # noqa: RUF012 (never changed)
        "tokens": BatchArray(("batch", 2, "time")), "targets": BatchArray(("batch", 2, "time")),
        "row_weight": BatchArray(("batch",), "float32"),
    }

    def tokens(self, T):
        return 2 * T

    def weight(self, batch):
        return jnp.sum(batch["row_weight"])

    def real_tokens(self, batch):
        return batch["tokens"].size

    def __call__(self, model, batch):
        def log_p(i):
            hidden_BTD, aux = model.hidden(batch["tokens"][:, i], None, None)
            log_p_BT = token_logprobs(hidden_BTD, model.head_VD, batch["targets"][:, i], chunk=self.loss_chunk)
            return jnp.sum(log_p_BT, axis=1), aux

        (first_B, aux), (second_B, aux2) = log_p(0), log_p(1)
        loss_B = -jax.nn.log_sigmoid(first_B - second_B) - self.likely * first_B / T
        total = jnp.sum(batch["row_weight"] * loss_B)
        right = jnp.sum(batch["row_weight"] * (first_B > second_B))
        return Terms(total, {"loss": total, "accuracy": right}, jax.tree.map(jnp.add, aux, aux2))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairsConfig(RunConfig):
    """Such a run."""

    @property
    def rows(self):
        return B

    @property
    def seq_len(self):
        return T

    def objective(self):
        return Preferred()


class Draws:
    """Batches that follow from their number; dies with the batch of step `dies_at`, once there is a checkpoint."""

    def __init__(self, rows, dies_at=None, run_dir=None):
        self.rows, self.dies_at, self.run_dir, self.count = rows, dies_at, run_dir, 0

    def __next__(self):
        self.count += 1
        if self.count == self.dies_at:
            while not (self.run_dir / CHECKPOINTS / f"{SAVED}").exists():  # It is saved while the run goes on.
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        batch = draw(self.count)
        return batch if self.rows is None else {name: x[self.rows] for name, x in batch.items()}

    def get_state(self):
        return {"count": self.count}

    def set_state(self, state):
        self.count = state["count"]


def draw(seed):
    """The first sequence counts up, the second is noise."""
    rng = np.random.default_rng(seed)
    first = (rng.integers(0, V, (B, 1)) + np.arange(T + 1)) % V
    ids = np.stack([first, rng.integers(0, V, (B, T + 1))], axis=1).astype(np.int32)
    return {"tokens": ids[:, :, :-1], "targets": ids[:, :, 1:],
            "row_weight": rng.uniform(0.01, 0.2, B).astype(np.float32)}


class Pairs:
    """What the run works with."""

    def __init__(self, dies_at=None):
        self.dies_at = dies_at

    def prepare(self, run_dir, *, resuming):
        self.run_dir = run_dir

    def weights(self):
        return None

    def train_data(self, rows):
        return Draws(rows, self.dies_at, self.run_dir)

    def check_lasts(self, steps):
        pass

    def heldout(self):
        return [draw(10**6)]

    def measured(self, sums, weight, *, all_batches):
        record = {f"heldout_{name}": x / weight for name, x in sums.items()}
        return record, f"accuracy {record['heldout_accuracy']:.2f}"


def config(run_dir, mesh=None, **changes):
    model = ModelConfig(
        layer_types=("conv", "full_attention"), vocab_size=V, hidden_size=32, ffn_size=32, num_heads=4, num_kv_heads=2,
        head_dim=8, max_position=64, dtype="float32",
    )
    fields = dict(
        run_dir=str(run_dir), steps=STEPS, model=model, mesh=MeshConfig(**(mesh or {})), checkpoint_every=SAVED,
        eval_every=0, optimizer=OptimizerConfig(peak_lr=1e-2, warmup_steps=0, schedule="constant"),
    )
    return PairsConfig(**(fields | changes))


def run(run_dir, mesh=None, dies_at=None, **changes):
    return run_training(config(run_dir, mesh, **changes), Pairs(dies_at))


def saved(run_dir, **changes):
    """The weights of a run's latest checkpoint, by name."""
    manager = CheckpointManager(Path(run_dir), keep=None)
    try:
        _, abstract = abstract_model(config(run_dir, **changes).model)
        return dict(named(jax.tree.map(np.asarray, manager.restore_params(abstract))))
    finally:
        manager.close()


def unchanged(run_dir):
    """{name: whether a weight is, to the bit, as the run began}."""
    begun = dict(named(config(run_dir).training().random_state(0).params))
    return {name: np.array_equal(after, begun[name]) for name, after in saved(run_dir).items()}


def frozen():
    """What `unchanged` says of a run with FREEZE."""
    _, weights = abstract_model(config("x").model)
    return {name: name == "embed" or ".feed_forward." in name for name, _ in named(weights)}


if __name__ == "__main__":
    freeze = tuple(json.loads(os.environ.get("PAIRS_FREEZE", "[]")))
    run(sys.argv[1], *(json.loads(arg) for arg in sys.argv[2:]), freeze=freeze)
