"""Training checkpoints: the one place that touches Orbax (v1 API).

A checkpoint holds parameters and optimizer state as arrays, and the data iterator's state and the
resolved config as JSON metadata. It becomes visible by a rename, so a kill leaves the one before.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint.experimental.v1 as ocp

from lfm_jax.train.step import TrainState

CHECKPOINTS = "checkpoints"
"""Name of the checkpoint directory inside a run directory."""


class CheckpointManager:
    """Saves and restores `TrainState` with data-iterator state and config; keeps the latest few.

    Args:
      run_dir: the run's directory; checkpoints lie in its `checkpoints` folder, one per step.
      keep: how many of the latest checkpoints to keep; None deletes nothing (for reading).
    """

    def __init__(self, run_dir: Path, *, keep: int | None):
        policies: Any = ocp.training.preservation_policies
        self._checkpointer = ocp.training.Checkpointer(
            str(run_dir.resolve() / CHECKPOINTS),
            preservation_policy=policies.PreserveAll() if keep is None else policies.LatestN(keep),
            cleanup_tmp_directories=keep is not None,
        )

    def latest_step(self) -> int | None:
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, step: int, state: TrainState, data_state: Any, config: dict[str, Any]) -> None:
        """Starts an asynchronous save; blocks only for the copy from the device.

        `data_state` must survive JSON. A step that is saved already is left alone.
        """
        if self.latest_step() == step:
            return
        optimizer = {"opt_state": state.opt_state, "step": state.step}
        self._checkpointer.save_checkpointables_async(
            step,
            {"params": state.params, "optimizer": optimizer},
            force=True,
            custom_metadata={"data": json.loads(json.dumps(data_state)), "config": config},
        )

    def restore(self, abstract: TrainState, step: int | None = None) -> tuple[TrainState, Any]:
        """The state and data-iterator state of `step` (None: the latest), shaped like `abstract`."""
        target = {
            "params": _abstract(abstract.params),
            "optimizer": _abstract({"opt_state": abstract.opt_state, "step": abstract.step}),
        }
        loaded = self._checkpointer.load_checkpointables(step, target)
        state = TrainState(loaded["params"], loaded["optimizer"]["opt_state"], loaded["optimizer"]["step"])
        return state, self.metadata(step)["data"]

    def restore_params(self, abstract_params: Any, step: int | None = None) -> Any:
        """Only the parameters of `step` (None: the latest), shaped like `abstract_params`."""
        return self._checkpointer.load_checkpointables(step, {"params": _abstract(abstract_params)})["params"]

    def metadata(self, step: int | None = None) -> dict[str, Any]:
        """What was saved beside the arrays: `config` and `data`."""
        saved: Any = self._checkpointer.checkpointables_metadata(step).custom_metadata
        return saved

    def close(self) -> None:
        """Waits for a save under way and lets go of the directory."""
        self._checkpointer.close()


def _abstract(tree: Any) -> Any:
    """Shapes, dtypes and shardings; arrays without one go to the default device."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def leaf(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None) or device)

    return jax.tree.map(leaf, tree)
