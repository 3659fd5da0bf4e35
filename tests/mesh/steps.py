"""What checks of training over meshes share: a batch, one step of it, and the comparison of two steps."""

import jax
import numpy as np
from helpers import optimizer_for, rel_err, tokens_like

from lfm_jax.data.batch import LOSS_IGNORE
from lfm_jax.pretrain.objective import next_token_training
from lfm_jax.sharding import spec
from lfm_jax.train.optimizer import OptimizerConfig
from lfm_jax.train.state import unstacked
from lfm_jax.train.step import GuardConfig

B, T = 16, 32
ADAMW = OptimizerConfig(peak_lr=1e-2, warmup_steps=0, schedule="constant", eps=1e-3)


def batch(rows=B):
    rng = np.random.default_rng(0)
    ids = np.zeros((rows, T), np.int32)
    positions = np.zeros((rows, T), np.int32)
    for row in range(rows):
        at, segment = 0, 1
        for length in rng.integers(1, 15, 4):
            stop = min(at + length, T)
            ids[row, at:stop], positions[row, at:stop] = segment, np.arange(stop - at)
            at, segment = stop, segment + 1
    targets = np.where(ids != 0, tokens_like((rows, T), 1), LOSS_IGNORE)
    return dict(tokens=tokens_like((rows, T), 0), targets=targets, segment_ids=ids, positions=positions)


def place(data):
    return {name: jax.device_put(x, spec("batch", "time")) for name, x in data.items()}


def one_step(model, config, data, *, micro_batches=1, evaluate=False):
    """The state after a step, its metrics, and with `evaluate` the loss without the z-loss afterwards."""
    optimizer = optimizer_for(model.config, config)
    training = next_token_training(
        model.config, optimizer, micro_batches=micro_batches, loss_chunk=16, z_loss=1e-3, guard=GuardConfig()
    )
    state, step = training.placed_state(jax.tree.map(np.asarray, model.params)), training.compiled_step()
    data = place(data) if spec() is not None else data
    state, metrics = step(state, data)
    if evaluate:
        sums, weight = training.compiled_evaluate()((state.params, state.frozen), data)
        metrics |= {"evaluated": sums["loss"], "targets evaluated": weight}
    return jax.tree.map(np.asarray, (unstacked(state, model.config), metrics))


def assert_equal_steps(mine, theirs, tolerance=1e-5):
    (state, metrics), (state1, metrics1) = mine, theirs
    assert metrics.keys() == metrics1.keys()
    for name in metrics:
        assert rel_err(metrics[name] + 1, metrics1[name] + 1) < tolerance, name
    leaves = jax.tree_util.tree_leaves_with_path((state.params, state.frozen))
    for (path, a), b in zip(leaves, jax.tree.leaves((state1.params, state1.frozen)), strict=True):
        assert rel_err(a, b) < tolerance, jax.tree_util.keystr(path)
