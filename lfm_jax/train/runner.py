"""A training run in a directory: what `lfm train` and every other method of training do around the driver.

A run directory holds everything about a run: config.yaml, metrics.jsonl, loss.png and checkpoints/, and what its method
keeps there. Starting again in the same directory resumes from the latest checkpoint, and the losses that follow equal
those of an uninterrupted run to the bit. Over many processes every one runs this; the first writes the files and lines.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from lfm_jax import recipe
from lfm_jax.adapters.trees import digest
from lfm_jax.files import locked
from lfm_jax.model import LFM, abstract_model
from lfm_jax.problems import raise_problems
from lfm_jax.train import processes
from lfm_jax.train import run_dir as run_directory
from lfm_jax.train import state as states
from lfm_jax.train.budget import budget
from lfm_jax.train.checkpoint import DIGESTS, CheckpointManager
from lfm_jax.train.config import RunConfig, TaskConfig
from lfm_jax.train.console import Console
from lfm_jax.train.driver import Data, Driver, Experience, Pace, Parts, Values, Watch, next_batch
from lfm_jax.train.goodput import Label, Ledger, describe
from lfm_jax.train.metrics import TASKS, plot_curves, plot_loss, saved_step
from lfm_jax.train.objective import Metrics
from lfm_jax.train.profiling import Profiler, parse_profile
from lfm_jax.train.record import Recorder
from lfm_jax.train.step import Training


class Method(Protocol):
    """What a method brings to a run."""

    def prepare(self, run_dir: Path, *, resuming: bool) -> None:
        """Opens what the run learns from, in every process; a new run keeps in its directory what it needs again.

        Raises:
          ValueError: something cannot be read, or belongs to another run than the one in `run_dir`.
        """
        ...

    def weights(self) -> Any | None:
        """The weights that a new run begins with, as a plain dict of numpy arrays; None: random ones. A run whose
        checkpoints do not hold them all asks again when it resumes."""
        ...

    def others(self) -> Mapping[str, Any]:
        """The weights of each of `RunConfig.other_models`, in the same form."""
        ...

    def train_data(self, rows: np.ndarray | None) -> Data | Experience:
        """Batches to train on; of each one the given rows (None: all)."""
        ...

    def check_lasts(self, steps: int) -> None:
        """Checks that there are training batches for so many steps in all.

        Raises:
          ValueError: there are not; says how many steps they last.
        """
        ...

    def heldout(self) -> Iterable[Mapping[str, np.ndarray]]:
        """Whole batches to measure on, made as they are asked for; none where nothing is held out."""
        ...

    def measured(self, sums: Mapping[str, float], weight: float, *, all_batches: bool) -> tuple[dict[str, float], str]:
        """Returns the record's values and the console's text for the sums over the held-out batches; `all_batches` is
        False where `eval_batches` cut them short."""
        ...


Tasks = Callable[[LFM, Path], dict[str, float]]
"""Measures a model whose tokenizer lies in a run's directory: scores by the name that records have for them."""
OpenTasks = Callable[[TaskConfig], Tasks]
"""Opens tasks; raises ValueError for those that there are not, and where lm-eval is missing."""


@dataclasses.dataclass(frozen=True)
class RunResult:
    """How a run ended: `step` < `steps` when it was interrupted."""

    run_dir: Path
    step: int
    steps: int
    """Steps of the whole run: those of the config, or as many as `train_minutes` allowed."""
    measured: Mapping[str, float]
    """What was measured at the end; empty when the run was interrupted or nothing is held out."""


def run_training(config: RunConfig, method: Method, open_tasks: OpenTasks | None = None) -> RunResult:
    """Runs or resumes a training run to its end, or to an interrupt.

    Args:
      open_tasks: what measures `config.eval`, which lies in a room above: `lfm_jax.eval.in_training.open_tasks`.

    SIGINT or SIGTERM finishes the step under way, saves a checkpoint and returns; a second one kills.

    Raises:
      ValueError: the directory holds another run, another process trains in it, the data cannot be read, the mesh does
        not fit, or updates had to be skipped again and again.
      OSError: a file of the run cannot be written.
    """
    run_dir = Path(config.run_dir)
    tasks = _tasks(config, open_tasks)
    run_dir.mkdir(parents=True, exist_ok=True)
    mesh = mesh_of(config)
    at_work = f"another process trains in run_dir {run_dir}; wait for it, stop it, or choose another run_dir"
    with locked(run_dir, at_work) if processes.is_main() else nullcontext():
        manager = CheckpointManager(run_dir, keep=config.keep_checkpoints)
        try:
            # Before the mesh is in use: loading is each process's own.
            begun = _begun(config, method, resuming=bool(manager.steps()))
            with nullcontext() if mesh is None else jax.set_mesh(mesh):
                result = _train(config, method, run_dir, manager, mesh, begun, tasks)
            manager.wait()
            return result
        finally:
            manager.close()


class _Begun:
    """What a run began with.

    Attributes:
      digests: of all this where checkpoints do not hold it; a resumed run must find the same.
    """

    def __init__(self, weights: Any | None, others: Mapping[str, Any], digests: dict[str, str] | None):
        self._held: tuple[Any | None, Mapping[str, Any]] | None = weights, others
        self.digests = digests

    def take(self) -> tuple[Any | None, Mapping[str, Any]]:
        """Hands over the weights and those of other models, once: the run then holds no second copy of them."""
        assert self._held is not None
        held, self._held = self._held, None
        return held


def _begun(config: RunConfig, method: Method, *, resuming: bool) -> _Begun:
    others = method.others() if config.other_models() else {}
    if not config.lora.rank and not others:
        return _Begun(None if resuming else method.weights(), others, None)
    weights = method.weights()
    of_model = {"model": digest(weights, config.seed)} if config.lora.rank else {}
    return _Begun(weights, others, of_model | {name: digest(w, config.seed) for name, w in others.items()})


def mesh_of(config: RunConfig) -> Mesh | None:
    """The mesh of all devices; None where there is one device and no more are asked for."""
    if jax.device_count() == 1 and math.prod(config.mesh.sizes(1).values()) == 1:
        return None
    return config.mesh.make()


def _tasks(config: RunConfig, open_tasks: OpenTasks | None) -> Tasks | None:
    """What measures `config.eval`, opened before anything else is done; None where it names no tasks."""
    if not config.eval.tasks:
        return None
    if jax.process_count() > 1:
        raise ValueError("eval.tasks are measured in runs of one process only: leave them out, and measure checkpoints "
                         "of this one with lfm eval")
    if open_tasks is None:
        raise ValueError("eval.tasks need open_tasks=lfm_jax.eval.in_training.open_tasks, as lfm train hands it over")
    return open_tasks(config.eval)


def _train(
    config: RunConfig, method: Method, run_dir: Path, manager: CheckpointManager, mesh: Mesh | None, begun: _Begun,
    tasks: Tasks | None,
) -> RunResult:
    main, resuming = processes.is_main(), bool(manager.steps())
    if config.train_minutes is not None and resuming:
        config = _with_kept_steps(config, manager)
    console = Console(config.steps, log_every=config.log_every, quiet=not main)
    place = processes.BatchPlacer(config.objective().arrays, config.rows, config.seq_len, config.micro_batches)
    _show_budget(config, mesh, console)
    if resuming:
        _check_resumable(config, manager, console, begun.digests)
    method.prepare(run_dir, resuming=resuming)
    data = method.train_data(place.rows)
    with processes.StopRequest() as stop:
        if config.train_minutes is not None and not resuming:
            timed = _with_timed_steps(config, data, place, console, stop)
            if timed is None:
                console.note("stopped before the first step; the same command begins again")
                return RunResult(run_dir, 0, config.steps, {})
            config = timed
        method.check_lasts(config.steps)
        driver = _driver(config, method, manager, data, place, console, begun,
                         None if tasks is None else _TaskEvaluation(config, tasks, run_dir, console))
        found = driver.start(_Voice(console))
        if found is not None:
            _say_where(run_dir, driver.step, found.damaged, console)
        # Only now: a resume that was refused must leave the run as it was.
        if main:
            run_directory.write_config(config, run_dir)
        record = _loop(config, run_dir, driver, console, stop, main)
    if driver.step == config.steps and record is None:
        # Started again after its end: nothing to train, but the result is still owed.
        record = driver.evaluate()
    if main:
        plot_loss(run_dir)
        plot_curves(run_dir)
    return RunResult(run_dir, driver.step, config.steps, (record or {}) if driver.step == config.steps else {})


def _driver(
    config: RunConfig, method: Method, manager: CheckpointManager, data: Data | Experience,
    place: processes.BatchPlacer, console: Console, begun: _Begun,
    tasks: _TaskEvaluation | None,
) -> Driver:
    training = config.training()

    def fresh() -> states.TrainState:
        weights, others = begun.take()
        return training.random_state(config.seed) if weights is None else training.placed_state(weights, others)

    return Driver(
        Parts(
            step=processes.compiled_together(training.compiled_step()), data=data, place=place,
            fresh=fresh,
            abstract=lambda: states.unstacked(training.stored(training.abstract_state()), config.model),
            pack=lambda state: states.unstacked(training.stored(state), config.model),
            unpack=lambda stored, kept: training.completed(states.restacked(stored, config.model), kept),
            kept=training.kept, remade=lambda: training.remade(*begun.take(), config.seed),
            evaluate=_Evaluation(config, training, method, place, console), tasks=tasks, manager=manager,
            config=recipe.to_plain(config) | ({} if begun.digests is None else {DIGESTS: begun.digests}),
            guard=config.guard,
        ),
        Pace(steps=config.steps, eval_every=config.eval_every, tasks_every=config.eval.every,
             checkpoint_every=config.checkpoint_every),
    )


def _loop(
    config: RunConfig, run_dir: Path, driver: Driver, console: Console, stop: processes.StopRequest, main: bool
) -> Values | None:
    began_at = driver.step
    # A run that is over and only looked at again counts no time.
    ledger = Ledger(run_dir if main and began_at < config.steps else None, resume_step=began_at)
    recorder = Recorder(
        config, run_dir, console, ledger, resume_step=began_at, updates=int(driver.state.guard.made), main=main
    )
    traced = parse_profile(config.profile, config.steps) if config.profile and main else None
    profiler = Profiler(traced, run_dir)
    with ExitStack() as closing, console:
        for part in (ledger, recorder, profiler):
            closing.callback(part.close)
        record = driver.run(stop, _RunWatch(console, ledger, recorder, profiler))
        if driver.saved_at > began_at:
            console.note(describe(ledger.summary()))
    return record


WARM_STEPS, TIMED_STEPS = 2, 5
"""Trial steps of `train_minutes` before the timing, and timed; all are discarded."""


def _with_timed_steps(
    config: RunConfig, data: Data | Experience, place: processes.BatchPlacer, console: Console,
    stop: processes.StopRequest,
) -> RunConfig | None:
    """The config with as many steps as fit into its minutes, the same number in every process; None once `stop` is due.

    Raises:
      ValueError: they do not hold the schedule's warm-up and decay.
    """
    training = config.training()
    step = processes.compiled_together(training.compiled_step())
    state, first = training.random_state(config.seed), data.get_state()
    batch = place(next_batch(data, state)[0])  # The same for all steps: there may be fewer batches than steps here.
    data.set_state(first)
    seconds = []
    for _ in range(WARM_STEPS + TIMED_STEPS):
        if stop.due():
            return None
        began = time.monotonic()
        state, metrics = step(state, batch)
        jax.block_until_ready(metrics)
        seconds.append(time.monotonic() - began)
    one = processes.agreed(statistics.median(seconds[WARM_STEPS:]))
    assert config.train_minutes is not None  # The caller asked for this because of it.
    steps = max(1, min(config.steps, int(60 * config.train_minutes / one)))
    console.note(f"a step takes {one:.3f} s: {steps} steps in {config.train_minutes:g} minutes")
    console.expect(steps)
    try:
        return dataclasses.replace(config, steps=steps)
    except ValueError as error:
        raise ValueError(f"train_minutes {config.train_minutes:g} is {steps} steps on this machine: {error}") from None


def _with_kept_steps(config: RunConfig, manager: CheckpointManager) -> RunConfig:
    """The config with the steps that were fixed when the run began."""
    saved = manager.latest_config() or {}
    timed = saved.get("train_minutes") is not None
    return dataclasses.replace(config, steps=saved["steps"]) if timed else config


def _show_budget(config: RunConfig, mesh: Mesh | None, console: Console) -> None:
    """Shows what the run needs before anything is made. It is an estimate, so it warns and does not refuse."""
    needed = budget(config, mesh)
    console.note(str(needed))
    try:
        needed.check()
    except ValueError as error:
        console.warn(str(error))


def _check_resumable(
    config: RunConfig, manager: CheckpointManager, console: Console, begun_with: dict[str, str] | None
) -> None:
    saved = manager.latest_config()
    if saved is None:
        return
    changed = run_directory.check_resumable(config, saved, manager.steps()[0])
    there, here = saved.get(DIGESTS) or {}, begun_with or {}
    if there.keys() != here.keys():
        names = (", ".join(sorted(each)) or "none" for each in (there, here))
        raise_problems(f"run_dir {config.run_dir} began with other settings; restore them, or choose a new run_dir",
                       ["models that stay as they are: {} there, {} here".format(*names), *changed])
    if there != here:
        raise ValueError(
            f"run_dir {config.run_dir} began with other weights than are there now, and its checkpoints do not hold "
            "them; restore what it began with (init_from and the like), or choose a new run_dir"
        )
    for change in changed:
        console.note(f"resuming with a changed setting: {change}")


def _say_where(run_dir: Path, step: int, damaged: Mapping[int, str], console: Console) -> None:
    saved = saved_step(run_dir)
    if saved is not None and saved > max((step, *damaged)):
        console.warn(f"the checkpoint of step {saved} is not there: deleted, or the run was killed while it was "
                     f"written; what followed step {step} is done again")
    console.note(f"resumed {run_dir} at step {step}")


class _Evaluation:
    """The objective over the held-out batches."""

    def __init__(
        self, config: RunConfig, training: Training, method: Method, place: processes.BatchPlacer, console: Console
    ):
        self._limit, self._method, self._place, self._console = config.eval_batches, method, place, console
        self._evaluate: Callable[..., Any] = processes.compiled_together(training.compiled_evaluate())

    @cached_property
    def _batches(self) -> list[dict[str, np.ndarray]]:
        """This process's rows of the batches that are measured on, read once."""
        return [self._place.local(batch) for batch in islice(self._method.heldout(), self._limit or None)]

    def __call__(self, state: states.TrainState) -> dict[str, float] | None:
        """What `Method.measured` says; None where nothing is held out."""
        if self._batches:
            self._console.note("held-out loss ...")
        sums: dict[str, float] = {}
        weight = 0.0
        for batch in self._batches:
            part, count = self._evaluate((state.params, state.frozen), self._place(batch), state.others)
            sums = {name: sums.get(name, 0.0) + float(x) for name, x in part.items()}
            weight += float(count)
        if not weight:
            return None
        record, text = self._method.measured(sums, weight, all_batches=not self._limit)
        self._console.note(f"step {int(state.step)}: {text}")
        self._console.restart_clock()
        return record


class _TaskEvaluation:
    """The tasks of `config.eval` with the weights that the steps compute with, on one device."""

    def __init__(self, config: RunConfig, tasks: Tasks, run_dir: Path, console: Console):
        self._config, self._tasks, self._run_dir, self._console = config, tasks, run_dir, console

    def __call__(self, state: states.TrainState) -> dict[str, float]:
        self._console.note(f"tasks {', '.join(self._config.eval.tasks)} ...")
        config = self._config.model.replace(scan_layers=False)
        # No copies of moments and of other models, which no task looks at.
        held = states.unstacked(dataclasses.replace(state, opt_state={}, others={}), self._config.model)
        weights = held.params, held.frozen
        if not jax.sharding.get_mesh().empty:
            weights = jax.device_get(weights)
        with jax.set_mesh(Mesh(np.empty((), object), ())):
            training = dataclasses.replace(self._config.training(), model=config)
            model = training.model_of(*jax.tree.map(jnp.asarray, weights))
            graphdef, _ = abstract_model(config.replace(quantize=""))  # Its weights are rounded already.
            scores = self._tasks(nnx.merge(graphdef, nnx.state(model, nnx.Param)), self._run_dir)
        told = ", ".join(f"{name.removeprefix(TASKS)} {score:.4f}" for name, score in scores.items())
        self._console.note(f"step {int(state.step)}: {told}")
        self._console.restart_clock()
        return scores


class _Voice(Watch):
    """Shows the driver's notes and warnings on the console."""

    def __init__(self, console: Console):
        self._console = console

    def note(self, text: str) -> None:
        self._console.note(text)

    def warn(self, text: str) -> None:
        self._console.warn(text)


class _RunWatch(_Voice):
    """Console, ledger, records and profile of a run."""

    def __init__(self, console: Console, ledger: Ledger, recorder: Recorder, profiler: Profiler):
        super().__init__(console)
        self._ledger, self._recorder, self._profiler = ledger, recorder, profiler
        self._compiled = False

    @contextmanager
    def doing(self, label: Label) -> Iterator[None]:
        with self._ledger(label):
            yield

    @contextmanager
    def dispatching(self, step: int) -> Iterator[None]:
        with self._ledger("step" if self._compiled else "compile"), self._profiler.step(step):
            yield
        self._compiled = True

    def dispatched(self, step: int, metrics: Metrics) -> Future[float]:
        ended = self._ledger.running(metrics["loss"])
        self._profiler.after(step, metrics)
        return ended

    def finished(self, step: int, metrics: Metrics, ended: Future[float] | None) -> Values:
        assert ended is not None  # That of `dispatched`.
        return self._recorder.step(step, metrics, ended)

    def evaluated(self, step: int, record: Values) -> None:
        self._recorder.write(step, record)

    def saved(self, step: int, seconds: float) -> None:
        self._ledger.saved(step)
        self._recorder.write(step, {"checkpoint_blocked_seconds": seconds, "goodput": self._ledger.goodput})

    def rolled_back(self, step: int, state: states.TrainState, came_from: int, rollbacks: int) -> None:
        self._ledger.undo(step)
        self._recorder.rewind(step, int(state.guard.made))
        # Under the first step done again, so that a kill before the next checkpoint undoes the record too.
        self._recorder.write(step + 1, {"rolled_back_from": came_from, "rollbacks": rollbacks})
        self._console.restart_clock()
