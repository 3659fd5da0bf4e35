"""Training and measuring one trial: a point on a task, with some seeds.

A trial's programs are compiled once, for all its seeds and learning rates.

Dimensions: B rows, T time, D width, V vocabulary; S seeds side by side.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from lfm_jax.ablate.points import Trial
from lfm_jax.ablate.study import Study
from lfm_jax.ablate.tasks.task import Task
from lfm_jax.data.batch import LOSS_IGNORE
from lfm_jax.model import LFM, abstract_model
from lfm_jax.train.checkpoint import CheckpointManager
from lfm_jax.train.optimizer import make_optimizer
from lfm_jax.train.step import Batch, TrainState, init_train_state, train_step

LOOK_EVERY = 20
"""Steps between looks at the guard."""


class Stop(Protocol):
    """Whether to stop now, between two steps."""

    def due(self) -> bool: ...


class StoppedError(Exception):
    """A run was asked to stop; it is saved if it had begun."""


class DivergedError(ValueError):
    """Updates were skipped again and again."""


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
        self._graphdef, _ = abstract_model(trial.model)
        # Made for a learning rate of 1 and scaled in the step: an update is linear in it, and one program serves all.
        self._optimizer = make_optimizer(study.optimizer_for(trial.steps, 1.0), trial.steps)
        self._compiled: set[int] = set()

    def run(
        self, seeds: Sequence[int], peak_lr: float, directory: Path, key: str, stop: Stop,
        say: Callable[[int], None] = lambda step: None,
    ) -> list[Outcome]:
        """Trains and measures, going on with what a stopped run left in `directory`. Whoever keeps the outcomes deletes
        it then.

        Args:
          seeds: one, or several that are trained side by side.
          key: fingerprint of everything that decides the run; what is saved under another one is thrown away.
          say: told the number of steps done, every LOOK_EVERY steps.

        Raises:
          StoppedError: `stop` was due.
          DivergedError: `guard.max_in_row` updates in a row were skipped, or the held-out loss is not finite.
        """
        self._compile(len(seeds))
        state, batches, done, seconds, skipped_S = self._begin(seeds, directory, key)
        rate, recent = jnp.float32(peak_lr), []
        began = saved = time.monotonic()
        while done < self._trial.steps:
            if stop.due():
                skipped_S += self._check(recent, done)
                self._save(directory, key, state, batches, done, seconds + time.monotonic() - began, skipped_S)
                raise StoppedError
            state, metrics = self._step(seeds)(state, self._stack([next(b) for b in batches]), rate)
            done += 1
            recent.append(metrics)
            if done % LOOK_EVERY == 0 or done == self._trial.steps:
                skipped_S += self._check(recent, done)
                recent.clear()
                say(done)
                now = time.monotonic()
                if now - saved > 60 * self._study.checkpoint_minutes and done < self._trial.steps:
                    self._save(directory, key, state, batches, done, seconds + now - began, skipped_S)
                    saved = now
        results = [self._measure(jax.tree.map(lambda x, i=i: x[i], state.params) if len(seeds) > 1 else state.params)
                   for i in range(len(seeds))]
        for result, skipped in zip(results, skipped_S.tolist(), strict=True):
            result["metrics"]["skipped_updates"] = skipped
        seconds = (seconds + time.monotonic() - began) / len(seeds)
        return [Outcome(**result, seconds=seconds) for result in results]

    def _compile(self, seeds: int) -> None:
        """Compiles for so many seeds at once, so that no run's time has it in it."""
        if seeds in self._compiled:
            return
        state, batches, *_ = self._begin(range(seeds), None, "")
        state, _ = self._step(range(seeds))(state, self._stack([next(b) for b in batches]), jnp.float32(0))
        params = jax.tree.map(lambda x: x[0], state.params) if seeds > 1 else state.params
        shapes = set()
        for batch, _ in self._heldout:
            if batch["tokens"].shape not in shapes:
                shapes.add(batch["tokens"].shape)
                jax.block_until_ready(self._evaluate(params, dict(batch)))
        self._compiled.add(seeds)

    # ---------------------------------------------------------------- training

    def _begin(
        self, seeds: Sequence[int], directory: Path | None, key: str
    ) -> tuple[TrainState, list[Any], int, float, np.ndarray]:
        """(state, iterators, steps done, seconds spent, updates skipped [S]) of a new run or of a stopped one."""
        batches = [self._task.train_batches(seed) for seed in seeds]
        if directory is not None and directory.exists():
            manager = CheckpointManager(directory, keep=None)
            try:
                if (manager.latest_config() or {}).get("key") == key:
                    abstract = jax.eval_shape(lambda: self._stack([self._init(seed) for seed in seeds]))
                    found = manager.restore_latest(abstract)
                    for iterator, position in zip(batches, found.data["iterators"], strict=True):
                        iterator.set_state(position)
                    return found.state, batches, found.step, found.data["seconds"], np.array(found.data["skipped"])
            finally:
                manager.close()
            shutil.rmtree(directory)
        return self._stack([self._init(seed) for seed in seeds]), batches, 0, 0.0, np.zeros(len(seeds))

    def _init(self, seed: int) -> TrainState:
        # Not jitted: compiling the draws of every matrix takes longer than a small model trains.
        model = LFM(self._trial.model, rngs=nnx.Rngs(seed))
        return init_train_state(nnx.to_pure_dict(nnx.split(model, nnx.Param)[1]), self._optimizer)

    def _stack(self, trees: Sequence[Any]) -> Any:
        return trees[0] if len(trees) == 1 else jax.tree.map(lambda *x: jnp.stack(x), *trees)

    def _step(self, seeds: Sequence[int]) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
        return self._one_step if len(seeds) == 1 else self._many_steps

    def _train_step(
        self, state: TrainState, batch: Batch, peak_lr: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        # Scaling last, with the state of the optimizer as it is without.
        optimizer = self._optimizer

        def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
            updates, state = optax.with_extra_args_support(optimizer).update(updates, state, params, **extra)
            return jax.tree.map(lambda u: (peak_lr * u).astype(u.dtype), updates), state

        scaled = optax.GradientTransformationExtraArgs(optimizer.init, update)
        return train_step(
            self._graphdef, scaled, state, batch, micro_batches=1, loss_chunk=self._study.loss_chunk, z_loss=0.0,
            guard=self._study.guard,
        )

    @cached_property
    def _one_step(self) -> Callable[..., Any]:
        return jax.jit(self._train_step, donate_argnums=0)

    @cached_property
    def _many_steps(self) -> Callable[..., Any]:
        return jax.jit(jax.vmap(self._train_step, in_axes=(0, 0, None)), donate_argnums=0)

    def _check(self, recent: Sequence[Mapping[str, jax.Array]], done: int) -> np.ndarray:
        """Looks at the steps since the last look; updates skipped in them, [S]."""
        if not recent:
            return np.zeros(1)
        in_row = max(int(np.max(np.asarray(metrics["skipped_in_row"]))) for metrics in recent)
        metrics = recent[-1]
        if in_row >= self._study.guard.max_in_row:
            raise DivergedError(
                f"{in_row} updates in a row were skipped up to step {done} (loss {np.asarray(metrics['loss'])}, "
                f"gradient norm {np.asarray(metrics['grad_norm'])}); lower the learning rate, or raise guard.spike"
            )
        return np.sum([np.atleast_1d(metrics["skipped"]) for metrics in recent], axis=0)

    def _save(
        self, directory: Path, key: str, state: TrainState, batches: Sequence[Any], done: int, seconds: float,
        skipped_S: np.ndarray,
    ) -> None:
        if not done:
            return
        directory.mkdir(parents=True, exist_ok=True)
        manager = CheckpointManager(directory, keep=1)
        try:
            position = {"iterators": [iterator.get_state() for iterator in batches], "seconds": seconds,
                        "skipped": skipped_S.tolist()}
            manager.save(done, state, position, {"key": key})
        finally:
            manager.close()

    # ---------------------------------------------------------------- measuring

    @cached_property
    def _heldout(self) -> list[tuple[Any, Any]]:
        """Made once for all runs."""
        return list(self._task.heldout_batches())

    def _measure(self, params: Any) -> dict[str, Any]:
        """score, metrics and curves on the held-out rows."""
        score = self._task.score()
        for batch, tag in self._heldout:
            nll_BT, hit_BT = self._evaluate(params, dict(batch))
            score.add(batch, tag, np.asarray(nll_BT), np.asarray(hit_BT))
        result = score.result()
        numbers = [result["score"], *result["metrics"].values(), *(y for c in result["curves"].values() for _, y in c)]
        if not np.all(np.isfinite(numbers)):
            raise DivergedError("the held-out loss is not finite; lower the learning rate")
        return result

    @cached_property
    def _evaluate(self) -> Callable[[Any, Batch], tuple[jax.Array, jax.Array]]:
        """(negative log-likelihood in nats [B, T], whether the likeliest token is the target [B, T])."""
        graphdef = self._graphdef

        def evaluate(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
            model = nnx.merge(graphdef, params)
            hidden_BTD, _ = model.hidden(batch["tokens"], batch["positions"], batch["segment_ids"])
            targets_BT = jnp.where(batch["targets"] == LOSS_IGNORE, 0, batch["targets"])

            def row(inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
                hidden_TD, targets_T = inputs  # The logits of one row at a time are in memory.
                logits_TV = model.project(hidden_TD[None])[0]
                log_p_TV = jax.nn.log_softmax(logits_TV)
                nll_T = -jnp.take_along_axis(log_p_TV, targets_T[:, None], axis=-1)[:, 0]
                return nll_T, jnp.argmax(logits_TV, axis=-1) == targets_T

            return jax.lax.map(row, (hidden_BTD, targets_BT))

        return jax.jit(evaluate)
