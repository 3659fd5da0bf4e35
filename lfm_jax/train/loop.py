"""`lfm train`: the loop around the step: data, checkpoints, held-out loss, metrics, console.

A run directory holds everything about a run: config.yaml, tokenizer.json, metrics.jsonl, loss.png and
checkpoints/. Starting again in the same directory resumes from the latest checkpoint, and the losses that
follow equal those of an uninterrupted run to the bit.
"""

from __future__ import annotations

import dataclasses
import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lfm_jax import recipe
from lfm_jax.config import ModelConfig
from lfm_jax.data import DataConfig, heldout_batches, heldout_bytes, train_iterator
from lfm_jax.data.sources import contains
from lfm_jax.infer.text import check_tokenizer
from lfm_jax.model import LFM, abstract_model
from lfm_jax.train import run_dir as run_directory
from lfm_jax.train.checkpoint import CheckpointManager
from lfm_jax.train.console import Console
from lfm_jax.train.metrics import MetricsLog, plot_loss
from lfm_jax.train.optimizer import OptimizerConfig, learning_rate, make_optimizer
from lfm_jax.train.step import compile_eval_step, compile_train_step, init_train_state


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run.

    Raises:
      ValueError: on construction, one message that lists every bad field.
    """

    run_dir: str
    """Directory of the run; an existing run in it is resumed."""
    steps: int
    """Optimizer steps in all."""
    data: DataConfig
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    init_from: str | None = None
    """Start from these weights: a Hugging Face directory, or the directory of another run. None: random."""
    seed: int = 0
    """Of the random initialisation."""
    micro_batches: int = 1
    """Gradient accumulation: the batch is worked through in this many equal parts."""
    loss_chunk: int = 512
    """Tokens whose logits are in memory at one time."""
    eval_every: int = 200
    """Steps between held-out losses; the run's end has one always. 0: only there."""
    checkpoint_every: int = 200
    """Steps between checkpoints; the run's end and an interrupt have one always. 0: only there."""
    keep_checkpoints: int = 2
    """How many of the latest checkpoints to keep."""
    log_every: int = 10
    """Steps between lines on a console that is not a terminal."""

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {getattr(self, name)}; it must be at least {least}"
            for name, least in (("steps", 1), ("micro_batches", 1), ("loss_chunk", 1), ("keep_checkpoints", 1),
                                ("log_every", 1), ("eval_every", 0), ("checkpoint_every", 0))
            if getattr(self, name) < least
        ]
        if self.micro_batches >= 1 and self.data.batch_size % self.micro_batches:
            problems.append(
                f"data.batch_size {self.data.batch_size} is not a multiple of micro_batches {self.micro_batches}"
            )
        if not self.model.eos_ids:
            problems.append("model.eos_ids is empty; name the id that ends a document")
        if self.data.seq_len > self.model.max_position:
            problems.append(f"data.seq_len {self.data.seq_len} exceeds model.max_position {self.model.max_position}")
        problems += [
            f"run_dir {self.run_dir} lies inside data source {source!r}, which would then train on it; choose another "
            "run_dir or name it in data.exclude"
            for source in (*self.data.sources, *self.data.heldout)
            if contains(source, self.run_dir, self.data.exclude)
        ]
        try:
            learning_rate(self.optimizer, max(self.steps, 1))
        except ValueError as error:
            problems.append(str(error))
        if problems:
            raise ValueError("TrainConfig is not valid:\n" + "\n".join(f"  - {p}" for p in problems))


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How a run ended: `step` < steps when it was interrupted."""

    run_dir: Path
    step: int
    heldout_loss: float | None
    """Nats per held-out token; None when the run was interrupted or nothing is held out."""
    heldout_bits_per_byte: float | None


def train(config: TrainConfig) -> TrainResult:
    """Runs or resumes a training run to its end, or to an interrupt.

    SIGINT or SIGTERM finishes the step under way, saves a checkpoint and returns; a second one kills.

    Raises:
      ValueError: the directory holds a run of another model or other data, the data cannot be read, or the loss
        is no longer finite.
    """
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    manager = CheckpointManager(run_dir, keep=config.keep_checkpoints)
    try:
        return _Run(config, run_dir, manager).loop()
    finally:
        manager.close()


class _Run:
    """The objects of one run, and its loop."""

    def __init__(self, config: TrainConfig, run_dir: Path, manager: CheckpointManager):
        self.config, self.run_dir, self.manager = config, run_dir, manager
        resume_step = manager.latest_step()
        self.console = Console(config.steps, log_every=config.log_every)
        if resume_step is None:
            self.tokenizer = run_directory.start(config, run_dir)
        else:
            for change in run_directory.check_resumable(config, manager.metadata()["config"], resume_step):
                self.console.note(f"resuming with a changed setting: {change}")
            self.tokenizer = run_directory.resume(config, run_dir)
        check_tokenizer(self.tokenizer, config.model)
        self.optimizer = make_optimizer(config.optimizer, config.steps)
        self.graphdef, abstract = abstract_model(config.model)
        self.data = train_iterator(config.data, self.tokenizer, **self._document_ids())
        if resume_step is None:
            self.state = init_train_state(_initial_params(config), self.optimizer)
        else:
            shape = jax.eval_shape(lambda p: init_train_state(p, self.optimizer), abstract)
            self.state, data_state = manager.restore(shape)
            self.data.set_state(data_state)
            self.console.note(f"resumed {run_dir} at step {resume_step}")
        # Only now: a resume that was refused must leave the run as it was.
        run_directory.write_config(config, run_dir)
        self.step = resume_step or 0
        self.schedule = learning_rate(config.optimizer, config.steps)
        self.train_step = compile_train_step(
            self.graphdef, self.optimizer, micro_batches=config.micro_batches, loss_chunk=config.loss_chunk
        )
        self.eval_step = compile_eval_step(self.graphdef, loss_chunk=config.loss_chunk)

    def loop(self) -> TrainResult:
        config = self.config
        log = MetricsLog(self.run_dir, resume_step=self.step)
        pending: tuple[int, dict[str, jax.Array]] | None = None
        heldout: tuple[float, float] | None = None
        saved_at = self.step
        with self.console, _stop_requested() as stop:
            while self.step < config.steps and not stop:
                batch = jax.tree.map(jnp.asarray, next(self.data))
                self.state, metrics = self.train_step(self.state, batch)
                # The step before is fetched only now, so that the device never waits for the host.
                self._log(log, pending)
                self.step += 1
                pending = (self.step, metrics)
                last = self.step == config.steps
                if last or (config.eval_every and self.step % config.eval_every == 0):
                    self._log(log, pending)
                    pending = None
                    heldout = self._evaluate(log)
                if last or (config.checkpoint_every and self.step % config.checkpoint_every == 0):
                    self._log(log, pending)
                    pending = None
                    self._save()
                    saved_at = self.step
            self._log(log, pending)
            if self.step != saved_at:
                self._save()
            if self.step < config.steps:
                self.console.note(f"stopped at step {self.step}; the same command resumes from there")
        log.close()
        plot_loss(self.run_dir)
        done = self.step == config.steps
        if done and heldout is None:
            # Started again after its end: nothing to train, but the result is still owed.
            heldout = self._evaluate(None)
        return TrainResult(self.run_dir, self.step, *(heldout if done and heldout else (None, None)))

    def _log(self, log: MetricsLog, pending: tuple[int, dict[str, jax.Array]] | None) -> None:
        if pending is None:
            return
        step, metrics = pending
        record: dict[str, Any] = {"step": step, **{name: float(value) for name, value in metrics.items()}}
        if not (math.isfinite(record["loss"]) and math.isfinite(record["grad_norm"])):
            saved = self.manager.latest_step()
            raise ValueError(
                f"the loss is {record['loss']} and the gradient norm {record['grad_norm']} at step {step}, so nothing "
                "more is saved; lower optimizer.peak_lr, then "
                + (f"resume from the checkpoint of step {saved}" if saved else "start again")
            )
        record["learning_rate"] = float(jnp.asarray(self.schedule(step - 1)))
        record["tokens_per_second"] = self.console.step(step, record["loss"], int(record["targets"]))
        record["time"] = time.time()
        log.write(record)

    def _evaluate(self, log: MetricsLog | None) -> tuple[float, float] | None:
        """Held-out loss in nats per token and in bits per byte of text; None where nothing is held out."""
        if not self._heldout:
            return None
        self.console.note("held-out loss ...")
        total, count = 0.0, 0
        for batch in self._heldout:
            loss, targets = self.eval_step(self.state.params, jax.tree.map(jnp.asarray, batch))
            total, count = total + float(loss), count + int(targets)
        nats = total / count
        bits_per_byte = total / math.log(2) / self._heldout_bytes
        self.console.note(f"step {self.step}: held-out loss {nats:.4f} nats/token, {bits_per_byte:.4f} bits/byte")
        self.console.restart_clock()
        if log is not None:
            log.write({"step": self.step, "heldout_loss": nats, "heldout_bits_per_byte": bits_per_byte,
                       "time": time.time()})
        return nats, bits_per_byte

    @cached_property
    def _heldout(self) -> list[dict[str, np.ndarray]]:
        return list(heldout_batches(self.config.data, self.tokenizer, **self._document_ids()))

    @cached_property
    def _heldout_bytes(self) -> int:
        return heldout_bytes(self.config.data)

    def _document_ids(self) -> dict[str, int]:
        """What documents begin and end with."""
        model = self.config.model
        return {"bos_id": model.bos_id, "eos_id": model.eos_ids[0]}

    def _save(self) -> None:
        self.manager.save(self.step, self.state, self.data.get_state(), recipe.to_plain(self.config))


def _initial_params(config: TrainConfig) -> Any:
    """Random parameters, or those of `init_from`, as a plain dict in `param_dtype`."""
    if config.init_from is None:
        @jax.jit
        def init() -> Any:
            return nnx.to_pure_dict(nnx.split(LFM(config.model, rngs=nnx.Rngs(config.seed)), nnx.Param)[1])

        return init()
    from lfm_jax.loading import load

    model, _ = load(config.init_from)
    differing = run_directory.differences(
        recipe.to_plain(model.config), recipe.to_plain(config.model), run_directory.NUMERICS
    )
    if differing:
        lines = "".join(f"\n  - {line}" for line in differing)
        raise ValueError(f"init_from {config.init_from} holds another model; make these model fields equal:{lines}")
    params = nnx.to_pure_dict(nnx.split(model, nnx.Param)[1])
    return jax.tree.map(lambda x: x.astype(config.model.param_dtype), params)


@contextmanager
def _stop_requested() -> Iterator[list[int]]:
    """A list that a first SIGINT or SIGTERM makes non-empty; a second one acts as usual."""
    received: list[int] = []
    previous: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def on_signal(number: int, frame: Any) -> None:
        del frame
        received.append(number)
        restore()

    for number in (signal.SIGINT, signal.SIGTERM):
        previous[number] = signal.signal(number, on_signal)
    try:
        yield received
    finally:
        restore()
