"""`lfm train`: the loop around the step: data, checkpoints, held-out loss, metrics, console.

A run directory holds everything about a run: config.yaml, tokenizer.json, metrics.jsonl, loss.png and
checkpoints/. Starting again in the same directory resumes from the latest checkpoint, and the losses that
follow equal those of an uninterrupted run to the bit. Over many processes every one runs this loop; the first
writes the files and lines.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable
from concurrent.futures import Future
from contextlib import ExitStack, nullcontext
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from tokenizers import Tokenizer

from lfm_jax import recipe
from lfm_jax.data import DataUsedUp, check_lasts, heldout_batches, heldout_bytes, load_tokenizer, train_iterator
from lfm_jax.files import locked
from lfm_jax.text.codec import check_tokenizer
from lfm_jax.train import processes
from lfm_jax.train import run_dir as run_directory
from lfm_jax.train.checkpoint import CheckpointManager, Restored
from lfm_jax.train.config import TrainConfig
from lfm_jax.train.console import Console
from lfm_jax.train.goodput import Ledger, describe
from lfm_jax.train.metrics import plot_curves, plot_loss, saved_step
from lfm_jax.train.optimizer import make_optimizer
from lfm_jax.train.profiling import Profiler, parse_profile
from lfm_jax.train.record import Recorder
from lfm_jax.train.step import (
    abstract_train_state,
    compile_eval_step,
    compile_train_step,
    place_train_state,
    random_train_state,
    restacked,
    unstacked,
)

Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How a run ended: `step` < steps when it was interrupted."""

    run_dir: Path
    step: int
    heldout_loss: float | None
    """Nats per held-out token; None when the run was interrupted or nothing is held out."""
    heldout_bits_per_byte: float | None
    """None also with `eval_batches`."""


def train(config: TrainConfig) -> TrainResult:
    """Runs or resumes a training run to its end, or to an interrupt.

    SIGINT or SIGTERM finishes the step under way, saves a checkpoint and returns; a second one kills.

    Raises:
      ValueError: the directory holds a run of another model or other data, another process trains in it, the data
        cannot be read, the mesh does not fit, or updates had to be skipped again and again.
      OSError: a file of the run cannot be written.
    """
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    mesh = _mesh(config)
    at_work = f"another process trains in run_dir {run_dir}; wait for it, stop it, or choose another run_dir"
    with locked(run_dir, at_work) if processes.is_main() else nullcontext():
        return _train(config, run_dir, mesh)


def _train(config: TrainConfig, run_dir: Path, mesh: Mesh | None) -> TrainResult:
    manager = CheckpointManager(run_dir, keep=config.keep_checkpoints)
    try:
        # Before the mesh is in use: loading is each process's own.
        weights = _given_weights(config) if config.init_from is not None and not manager.steps() else None
        with nullcontext() if mesh is None else jax.set_mesh(mesh):
            result = _Run(config, run_dir, manager, mesh, weights).loop()
        manager.wait()
        return result
    finally:
        manager.close()


def _mesh(config: TrainConfig) -> Mesh | None:
    """The mesh of all devices; None where there is one device and no more are asked for."""
    if jax.device_count() == 1 and math.prod(config.mesh.sizes(1).values()) == 1:
        return None
    return config.mesh.make()


def _given_weights(config: TrainConfig) -> Any:
    """The parameters of `init_from` as a plain dict of numpy arrays in `param_dtype`."""
    from lfm_jax.loading import load

    assert config.init_from is not None
    model, _ = load(config.init_from)
    differing = run_directory.differences(
        recipe.to_plain(model.config), recipe.to_plain(config.model), run_directory.NUMERICS
    )
    if differing:
        lines = "".join(f"\n  - {line}" for line in differing)
        raise ValueError(f"init_from {config.init_from} holds another model; make these model fields equal:{lines}")
    params = nnx.to_pure_dict(nnx.split(model, nnx.Param)[1])
    return jax.tree.map(lambda x: np.asarray(x.astype(config.model.param_dtype)), params)


class _Run:
    """The objects of one run, and its loop."""

    def __init__(
        self, config: TrainConfig, run_dir: Path, manager: CheckpointManager, mesh: Mesh | None, weights: Any
    ):
        self.config, self.run_dir, self.manager = config, run_dir, manager
        self.main = processes.is_main()
        self.console = Console(config.steps, log_every=config.log_every, quiet=not self.main)
        self.place = processes.BatchPlacer(config.data.batch_size, config.data.seq_len, config.micro_batches)
        self._tell_budget(mesh)
        resuming = bool(manager.steps())
        self.tokenizer = self._kept_tokenizer() if resuming else self._new_tokenizer()
        check_tokenizer(self.tokenizer, config.model)
        self.optimizer = make_optimizer(config.optimizer, config.steps)
        self.data = train_iterator(config.data, self.tokenizer, rows=self.place.rows, **self._document_ids())
        check_lasts(config.data, config.steps)
        self.step = 0
        if resuming:
            self._resume()
        elif weights is not None:
            self.state = place_train_state(weights, config.model, self.optimizer)
        else:
            self.state = random_train_state(config.model, self.optimizer, config.seed)
        # Only now: a resume that was refused must leave the run as it was.
        if self.main:
            run_directory.write_config(config, run_dir)
        # A run that is over and only looked at again counts no time.
        goes_on = self.step < config.steps
        self.ledger = Ledger(run_dir if self.main and goes_on else None, resume_step=self.step)
        self.recorder = Recorder(
            config, run_dir, self.console, self.ledger, resume_step=self.step, updates=int(self.state.guard.made),
            main=self.main,
        )
        traced = parse_profile(config.profile, config.steps) if config.profile and self.main else None
        self.profiler = Profiler(traced, run_dir)
        self.train_step = compile_train_step(
            config.model, self.optimizer, micro_batches=config.micro_batches, loss_chunk=config.loss_chunk,
            z_loss=config.z_loss, guard=config.guard,
        )
        self.eval_step = compile_eval_step(config.model, loss_chunk=config.loss_chunk)
        self.pending: list[tuple[int, Metrics, Future[float]]] = []
        self._heldout_text: list[dict[str, np.ndarray]] | None = None
        self.compiled = self.save_due = False
        self.began_at = self.saved_at = self.step
        self.skipped_in_row = self.rollbacks = 0

    def _tell_budget(self, mesh: Mesh | None) -> None:
        """What the run needs, before anything is made; an estimate, so it warns and does not refuse."""
        from lfm_jax.plan import budget

        needed = budget(self.config, mesh)
        self.console.note(str(needed))
        try:
            needed.check()
        except ValueError as error:
            self.console.warn(str(error))

    def _kept_tokenizer(self) -> Tokenizer:
        """That of the run that is resumed, unless this is another run; tells what changed."""
        saved = self.manager.latest_config()
        if saved is not None:
            for change in run_directory.check_resumable(self.config, saved, self.manager.steps()[0]):
                self.console.note(f"resuming with a changed setting: {change}")
        return run_directory.resume(self.config, self.run_dir)

    def _new_tokenizer(self) -> Tokenizer:
        tokenizer = run_directory.start(self.config, self.run_dir) if self.main else None
        processes.barrier("tokenizer")
        return tokenizer or load_tokenizer(self.run_dir)

    def _resume(self) -> None:
        found = self._restore()
        self.data.set_state(found.data)
        self._go_to(found)
        saved = saved_step(self.run_dir)
        if saved is not None and saved > max((self.step, *found.damaged)):
            self.console.warn(f"the checkpoint of step {saved} is not there: deleted, or the run was killed while it "
                              f"was written; what followed step {self.step} is done again")
        self.console.note(f"resumed {self.run_dir} at step {self.step}")

    def _restore(self) -> Restored:
        model = self.config.model
        return self.manager.restore_latest(unstacked(abstract_train_state(model, self.optimizer), model))

    def _go_to(self, found: Restored) -> None:
        """Goes on from a checkpoint; later ones that cannot be read are put aside."""
        self.state = restacked(found.state, self.config.model)
        self.step = self.saved_at = found.step
        for step, reason in found.damaged.items():
            path = self.manager.set_aside(step)
            self.console.warn(f"the checkpoint of step {step} cannot be read and now lies in {path}: {reason}")

    def loop(self) -> TrainResult:
        config = self.config
        heldout: tuple[float, float | None] | None = None
        with ExitStack() as closing, self.console, processes.StopRequest() as stop:
            for part in (self.ledger, self.recorder, self.profiler):
                closing.callback(part.close)
            while self.step < config.steps and not stop.due():
                try:
                    self._dispatch()
                except DataUsedUp:  # By rollbacks, which pass over data that was counted on.
                    self._stop()
                    raise
                last = self.step == config.steps
                evaluate = last or (config.eval_every and self.step % config.eval_every == 0)
                self.save_due |= last or bool(config.checkpoint_every and self.step % config.checkpoint_every == 0)
                # The step before is fetched only now, so that the device never waits for the host.
                if self._fetch(0 if evaluate or self.save_due else 1):
                    continue
                if evaluate:
                    heldout = self._evaluate(self.recorder)
                # While updates are being skipped none is saved: each checkpoint is one to go back to.
                if self.save_due and (last or not self.skipped_in_row):
                    self._save()
                self.manager.check()
            if self.step < config.steps:
                self._stop()
            if self.saved_at > self.began_at:
                self.console.note(describe(self.ledger.summary()))
        if self.main:
            plot_loss(self.run_dir)
            plot_curves(self.run_dir)
        done = self.step == config.steps
        if done and heldout is None:
            # Started again after its end: nothing to train, but the result is still owed.
            heldout = self._evaluate(None)
        return TrainResult(self.run_dir, self.step, *(heldout if done and heldout else (None, None)))

    def _dispatch(self) -> None:
        """Hands the next step to the device."""
        with self.ledger("data"):
            batch = self.place(next(self.data))
        with self.ledger("step" if self.compiled else "compile"), self.profiler.step(self.step + 1):
            self.state, metrics = self.train_step(self.state, batch)
        self.compiled = True
        ended = self.ledger.running(metrics["loss"])
        self.step += 1
        self.profiler.after(self.step, metrics)
        self.pending.append((self.step, metrics, ended))

    def _fetch(self, keep: int) -> bool:
        """Records all finished steps but the last `keep`. True if the run went back to a checkpoint."""
        while len(self.pending) > keep:
            step, metrics, ended = self.pending.pop(0)
            values = self.recorder.step(step, metrics, ended)
            self.skipped_in_row = int(values["skipped_in_row"])
            if self.skipped_in_row >= self.config.guard.max_in_row:
                self._roll_back(step, values)
                return True
        return False

    def _roll_back(self, step: int, values: dict[str, float]) -> None:
        """Goes back to the last checkpoint and on with new data: that behind what led here is passed over.

        It is the same after a kill: what is replayed from the checkpoint comes to the same end.

        Raises:
          ValueError: there is no checkpoint, or no new one was reached since too many rollbacks.
        """
        limit = self.config.guard.max_rollbacks
        what = (f"{self.skipped_in_row} updates in a row were skipped up to step {step} (loss {values['loss']:.4g}, "
                f"gradient norm {values['grad_norm']:.4g})")
        mend = "lower optimizer.peak_lr, mend the data, or raise guard.spike if the gradients are sound"
        self.manager.wait()
        latest = self.manager.latest_step()
        if latest is None:
            raise ValueError(f"{what}, and there is no checkpoint to go back to; {mend}, then start again")
        if self.rollbacks == limit:
            raise ValueError(
                f"{what}, after {limit} rollbacks to the checkpoint of step {latest}; {mend}, then start the same "
                "command again, which resumes from there"
            )
        self.rollbacks += 1
        self.pending.clear()
        del self.state  # Its memory is needed.
        with self.ledger("restart"):
            self._go_to(self._restore())
        self.skipped_in_row, self.save_due = 0, False
        self.ledger.undo(self.step)
        self.recorder.rewind(self.step, int(self.state.guard.made))
        # Under the first step done again, so that a kill before the next checkpoint undoes the record too.
        self.recorder.write(self.step + 1, {"rolled_back_from": step, "rollbacks": self.rollbacks})
        self.console.warn(f"{what}: back to the checkpoint of step {self.step}; the data behind it is passed over")
        self.console.restart_clock()

    def _stop(self) -> None:
        """Saves what is done."""
        again = "the same command resumes from there"
        while self.pending:
            step, metrics, ended = self.pending.pop(0)
            self.skipped_in_row = int(self.recorder.step(step, metrics, ended)["skipped_in_row"])
        if self.skipped_in_row:
            self.console.note(f"stopped while updates were skipped; the checkpoint of step {self.saved_at} stands")
        else:
            if self.step != self.saved_at:
                self._save()
            self.console.note(f"stopped at step {self.step}; {again}")

    def _evaluate(self, recorder: Recorder | None) -> tuple[float, float | None] | None:
        """Held-out loss in nats per token and in bits per byte of text; None where nothing is held out."""
        total, count = 0.0, 0
        with self.ledger("eval"):
            for batch in self._heldout():
                if not count:
                    self.console.note("held-out loss ...")
                loss, targets = self.eval_step(self.state.params, self.place(batch))
                total, count = total + float(loss), count + int(targets)
        if not count:
            return None
        record = {"heldout_loss": total / count}
        text = f"step {self.step}: held-out loss {total / count:.4f} nats/token"
        if not self.config.eval_batches:
            record["heldout_bits_per_byte"] = total / math.log(2) / self._heldout_bytes
            text += f", {record['heldout_bits_per_byte']:.4f} bits/byte"
        self.console.note(text)
        self.console.restart_clock()
        if recorder is not None:
            recorder.write(self.step, record)
        return record["heldout_loss"], record.get("heldout_bits_per_byte")

    def _heldout(self) -> Iterable[dict[str, np.ndarray]]:
        """This process's rows; built datasets are read anew each time, text is tokenised once."""
        if self._heldout_text is not None:
            return self._heldout_text
        whole = heldout_batches(self.config.data, self.tokenizer, **self._document_ids())
        local = map(self.place.local, islice(whole, self.config.eval_batches or None))
        if self.config.data.mixture:
            return local
        self._heldout_text = list(local)
        return self._heldout_text

    @cached_property
    def _heldout_bytes(self) -> int:
        return heldout_bytes(self.config.data)

    def _document_ids(self) -> dict[str, int]:
        """What documents begin and end with."""
        model = self.config.model
        return {"bos_id": model.bos_id, "eos_id": model.eos_ids[0]}

    def _save(self) -> None:
        began = time.monotonic()
        with self.ledger("checkpoint"):
            state, plain = unstacked(self.state, self.config.model), recipe.to_plain(self.config)
            self.manager.save(self.step, state, self.data.get_state(), plain)
        seconds = time.monotonic() - began
        self.ledger.saved(self.step)
        self.saved_at, self.save_due, self.rollbacks = self.step, False, 0
        self.recorder.write(self.step, {"checkpoint_blocked_seconds": seconds, "goodput": self.ledger.goodput})
