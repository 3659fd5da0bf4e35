"""Training and measuring one trial: a point on a task, with some seeds, by the driver of `train/`.

A trial's programs are compiled once, for all its seeds and learning rates.

Dimensions: B rows, T time; S seeds side by side.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from lfm_jax.ablate.points import Trial
from lfm_jax.ablate.study import Study
from lfm_jax.ablate.tasks.task import Task
from lfm_jax.kernels.logprobs import token_scores
from lfm_jax.model import LFM, param_traits
from lfm_jax.pretrain.objective import next_token_training
from lfm_jax.train.checkpoint import CHECKPOINTS, CheckpointManager
from lfm_jax.train.driver import DivergedError, Driver, Pace, Parts, Stop, Watch
from lfm_jax.train.objective import DeviceBatch, Metrics
from lfm_jax.train.optimizer import make_optimizer
from lfm_jax.train.state import TrainState


class StoppedError(Exception):
    """A run was asked to stop; it is saved if it had begun."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run of one seed came to."""

    score: float
    metrics: dict[str, float]
    curves: dict[str, list[list[float]]]
    seconds: float
    """Of training and measuring, compilation left out; shared equally among seeds side by side."""


class Trainer:
    """The programs of a trial, and runs of them."""

    def __init__(self, study: Study, trial: Trial, task: Task):
        self._study, self._trial, self._task = study, trial, task
        # Made for a learning rate of 1 and scaled in the step: an update is linear in it, and one program serves all.
        config = study.optimizer_for(trial.steps, 1.0)
        optimizer = make_optimizer(config, trial.steps, param_traits(trial.model))
        self._training = next_token_training(trial.model, optimizer, loss_chunk=study.loss_chunk, guard=study.guard)
        self._compiled: set[int] = set()

    def run(
        self, seeds: Sequence[int], peak_lr: float, directory: Path, key: str, stop: Stop,
        say: Callable[[int], None] = lambda step: None,
    ) -> list[Outcome]:
        """Trains and measures, going on with what a stopped run left in `directory`. The caller deletes that directory
        once it has kept the outcomes.

        Args:
          seeds: one, or several that are trained side by side.
          key: fingerprint of everything that decides the run; what is saved under another one is deleted.
          say: called with the number of steps done, after each.

        Raises:
          StoppedError: `stop` was due.
          DivergedError: `guard.max_in_row` updates in a row were skipped, or the held-out loss is not finite.
        """
        self._compile(len(seeds))
        if directory.exists() and not _holds(directory, key):
            shutil.rmtree(directory)
        progress, rate = _Progress([self._task.train_batches(seed) for seed in seeds], say), jnp.float32(peak_lr)
        manager = CheckpointManager(directory, keep=1)
        try:
            driver = Driver(
                Parts(
                    step=lambda state, batch: self._step(seeds)(state, batch, rate), data=progress, place=self._stack,
                    fresh=lambda: self._begin(seeds), abstract=lambda: jax.eval_shape(lambda: self._begin(seeds)),
                    manager=manager, config={"key": key}, guard=dataclasses.replace(self._study.guard, max_rollbacks=0),
                ),
                Pace(steps=self._trial.steps, checkpoint_seconds=60 * self._study.checkpoint_minutes, save_last=False),
            )
            driver.start(progress)
            progress.began = time.monotonic()
            driver.run(stop, progress)
        finally:
            manager.close()
            with suppress(OSError):  # It holds a checkpoint.
                (directory / CHECKPOINTS).rmdir()
                directory.rmdir()
        if driver.step < self._trial.steps:
            raise StoppedError
        weights = driver.state.weights
        results = [self._measure(jax.tree.map(lambda x, i=i: x[i], weights) if len(seeds) > 1 else weights)
                   for i in range(len(seeds))]
        for result, skipped in zip(results, np.broadcast_to(progress.skipped, len(seeds)).tolist(), strict=True):
            result["metrics"]["skipped_updates"] = skipped
        seconds = progress.seconds / len(seeds)
        return [Outcome(**result, seconds=seconds) for result in results]

    def _compile(self, seeds: int) -> None:
        """Compiles for so many seeds at once, so that no run's time has it in it."""
        if seeds in self._compiled:
            return
        batches = [self._task.train_batches(seed) for seed in range(seeds)]
        batch = self._stack([next(b) for b in batches])
        state, _ = self._step(range(seeds))(self._begin(range(seeds)), batch, jnp.float32(0))
        weights = jax.tree.map(lambda x: x[0], state.weights) if seeds > 1 else state.weights
        shapes = set()
        for batch, _ in self._heldout:
            if batch["tokens"].shape not in shapes:
                shapes.add(batch["tokens"].shape)
                jax.block_until_ready(self._evaluate(weights, dict(batch)))
        self._compiled.add(seeds)

    # ---------------------------------------------------------------- training

    def _begin(self, seeds: Sequence[int]) -> TrainState:
        """A new state of all seeds."""
        return self._stack([self._init(seed) for seed in seeds])

    def _init(self, seed: int) -> TrainState:
        # Not jitted: compiling the draws of every matrix takes longer than a small model trains.
        model = LFM(self._trial.model, rngs=nnx.Rngs(seed))
        return self._training.new_state(nnx.to_pure_dict(nnx.split(model, nnx.Param)[1]))

    def _stack(self, trees: Sequence[Any]) -> Any:
        return trees[0] if len(trees) == 1 else jax.tree.map(lambda *x: jnp.stack(x), *trees)

    def _step(self, seeds: Sequence[int]) -> Callable[..., tuple[TrainState, Metrics]]:
        return self._one_step if len(seeds) == 1 else self._many_steps

    def _train_step(
        self, state: TrainState, batch: DeviceBatch, peak_lr: jax.Array
    ) -> tuple[TrainState, Metrics]:
        # Scaling last, with the state of the optimizer as it is without.
        optimizer = self._training.optimizer

        def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
            updates, state = optax.with_extra_args_support(optimizer).update(updates, state, params, **extra)
            return jax.tree.map(lambda u: (peak_lr * u).astype(u.dtype), updates), state

        scaled = optax.GradientTransformationExtraArgs(optimizer.init, update)
        return dataclasses.replace(self._training, optimizer=scaled).step(state, batch)

    @cached_property
    def _one_step(self) -> Callable[..., Any]:
        return jax.jit(self._train_step, donate_argnums=0)

    @cached_property
    def _many_steps(self) -> Callable[..., Any]:
        return jax.jit(jax.vmap(self._train_step, in_axes=(0, 0, None)), donate_argnums=0)

    # ---------------------------------------------------------------- measuring

    @cached_property
    def _heldout(self) -> list[tuple[Any, Any]]:
        """Made once for all runs."""
        return list(self._task.heldout_batches())

    def _measure(self, weights: Any) -> dict[str, Any]:
        """score, metrics and curves on the held-out rows."""
        score = self._task.score()
        for batch, tag in self._heldout:
            nll_BT, hit_BT = self._evaluate(weights, dict(batch))
            score.add(batch, tag, np.asarray(nll_BT), np.asarray(hit_BT))
        result = score.result()
        numbers = [result["score"], *result["metrics"].values(), *(y for c in result["curves"].values() for _, y in c)]
        if not np.all(np.isfinite(numbers)):
            raise DivergedError("the held-out loss is not finite; lower the learning rate")
        return result

    @cached_property
    def _evaluate(self) -> Callable[[Any, DeviceBatch], tuple[jax.Array, jax.Array]]:
        """(negative log-likelihood in nats [B, T], whether the likeliest token is the target [B, T])."""
        graphdef, chunk = self._training.graphdef, self._study.loss_chunk

        def evaluate(weights: Any, batch: DeviceBatch) -> tuple[jax.Array, jax.Array]:
            model = nnx.merge(graphdef, weights)
            hidden_BTD, _ = model.hidden(batch["tokens"], batch["positions"], batch["segment_ids"])
            scores = token_scores(hidden_BTD, model.head_VD, batch["targets"], chunk=chunk)
            return -scores.logprob_BT, scores.likeliest_BT == batch["targets"]

        return jax.jit(evaluate)


class _Progress(Watch):
    """The batches of all seeds, and what is counted as a run goes; both are saved with its checkpoints."""

    def __init__(self, batches: Sequence[Any], say: Callable[[int], None]):
        self._batches, self._say = batches, say
        self.skipped: Any = 0.0
        """Updates skipped, of each seed."""
        self.began = time.monotonic()
        self._earlier = 0.0

    @property
    def seconds(self) -> float:
        """Spent on the run so far, earlier starts included."""
        return self._earlier + time.monotonic() - self.began

    def __next__(self) -> Any:
        return [next(batches) for batches in self._batches]

    def get_state(self) -> dict[str, Any]:
        skipped = np.broadcast_to(self.skipped, len(self._batches)).tolist()
        return {"iterators": [batches.get_state() for batches in self._batches], "seconds": self.seconds,
                "skipped": skipped}

    def set_state(self, state: Mapping[str, Any]) -> None:
        for batches, position in zip(self._batches, state["iterators"], strict=True):
            batches.set_state(position)
        self._earlier, self.skipped = state["seconds"], np.array(state["skipped"])

    def finished(self, step: int, metrics: Metrics, ended: Future[float] | None) -> Mapping[str, Any]:
        values = super().finished(step, metrics, ended)
        self.skipped = self.skipped + np.asarray(values["skipped"], np.float64)
        self._say(step)
        return values


def _holds(directory: Path, key: str) -> bool:
    """Whether a directory has a checkpoint of the run with this fingerprint."""
    manager = CheckpointManager(directory, keep=None)
    try:
        return (manager.latest_config() or {}).get("key") == key
    finally:
        manager.close()
