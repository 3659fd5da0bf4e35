"""Running a study: what is left to do, in one process or several, resumed anywhere.

A trial (a point on a task) is the unit that processes share out, by index: its runs share compiled programs. Each run
that ends is a file of its own, so that nothing is done twice, whoever did it; what another study in the same directory
has made already, of the same fingerprint, is taken over. A run that fails is recorded with its error and not tried
again unless asked for.
"""

from __future__ import annotations

import dataclasses
import shlex
import shutil
import statistics
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from itertools import batched
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
import yaml

from lfm_jax import recipe
from lfm_jax.ablate.crew import StopOrDeadline, run_crew
from lfm_jax.ablate.points import BASE, Trial, all_settings, make_trial, points
from lfm_jax.ablate.results import (
    cost_file,
    digest,
    is_finished,
    read_record,
    run_file,
    slug,
    tuning_file,
    write_record,
    write_results,
)
from lfm_jax.ablate.study import Study
from lfm_jax.ablate.tasks.task import Task, open_task
from lfm_jax.config import ModelConfig
from lfm_jax.files import locked, say, write_whole
from lfm_jax.problems import raise_problems
from lfm_jax.train.launch import FAILED, STOPPED

if TYPE_CHECKING:
    from lfm_jax.ablate.run import Stop

TUNING_SEED = 1_000_000
"""Seed of the runs that choose a learning rate; no run that is reported has it."""
_CONDITIONS = "conditions.txt"
_FIRST = frozenset({
    "layer_types", "ffn_types", "vocab_size", "hidden_size", "ffn_size", "num_heads", "num_kv_heads", "head_dim",
    "conv_taps", "conv_bias", "conv_gates", "recurrence", "sliding_window", "qk_norm", "post_norm", "tie_embedding",
    "norm_eps", "rope_theta", "max_position", "init", "init_std", "pad_id", "bos_id", "eos_ids", "param_dtype",
    "dtype", "logits_dtype", "conv_impl", "scan_impl", "attention_impl", "remat", "scan_layers",
})
"""Fields of ModelConfig that every fingerprint has. A later one is in it only where it is not at its default, so that
earlier runs go on."""
SAY_SECONDS = 30.0
"""Seconds between lines about a run under way."""


def _switch(args: list[str]) -> bool:
    if args not in ([], ["True"], ["False"]):
        raise ValueError(f"{' '.join(args)!r} is neither True nor False; name the flag alone to switch it on")
    return args != ["False"]


# Recipes write booleans out (`recipe.load_recipe`); what is said of one call only reads better as a bare flag.
Switch = Annotated[bool, tyro.constructors.PrimitiveConstructorSpec(
    nargs="*", metavar="[True|False]", instance_from_str=_switch, is_instance=lambda value: isinstance(value, bool),
    str_from_instance=lambda value: [str(value)],
)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """How one call works on a study; no part of what the study is."""

    processes: int = 1
    """Start this many processes here, which share the cores and the trials."""
    index: str | None = None
    """I/N: do only every N-th trial from the I-th on (from 0), for a study spread over hosts; no costs, no report. With
    processes: one of those started here, which takes other trials too once its own are done."""
    minutes: float | None = None
    """Stop after so long; the same command goes on. Exit status 130, as after Ctrl-C."""
    retry_failed: Switch = False
    """Make failed runs again."""
    report_only: Switch = False
    """Only write results.jsonl and the report from what is there."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AblateConfig(Call):
    """A study, and how this call works on it.

    Raises:
      ValueError: on construction, one message that lists every bad field.
    """

    study: Annotated[Study, tyro.conf.arg(name="")]
    smoke: Switch = False
    """Try the study on base and last point in a few steps, without costs, into a directory of its own."""

    def __post_init__(self) -> None:
        problems = []
        if self.processes < 1:
            problems.append(f"processes is {self.processes}; it must be at least 1")
        if self.minutes is not None and not self.minutes > 0:
            problems.append(f"minutes is {self.minutes}; it must be above 0")
        if self.index is not None:
            i, _, n = self.index.partition("/")
            if not (i.isdigit() and n.isdigit() and int(i) < int(n)):
                problems.append(f"index is {self.index!r}; write I/N with I from 0 to N - 1")
        raise_problems("the flags of lfm ablate are not valid", problems)


def ablate(config: AblateConfig, args: Sequence[str] = ()) -> int:
    """Runs what is left of a study, measures costs, writes results and report.

    Args:
      args: the command's own arguments, for the processes that it starts.

    Returns:
      Exit status: 0, `STOPPED` when it was stopped before its end or runs are left to other processes, `FAILED` when it
      ended and a run failed.

    Raises:
      ValueError: the study cannot be run as it is; says why.
    """
    until = float("inf") if config.minutes is None else time.monotonic() + 60 * config.minutes
    study = config.study.smoke() if config.smoke else config.study
    work = Work(study, smoke=config.smoke, args=args, processes=config.processes)
    work.check()
    if config.report_only:
        return work.report()
    if config.processes > 1 and config.index is None:
        status = run_crew(config.processes, args)
    else:
        share = (0, 1) if config.index is None else tuple(int(x) for x in config.index.split("/"))
        with StopOrDeadline(until) as stop:
            status = work.run(share, stop, config.retry_failed, help_others=config.processes > 1)
    if config.index is not None or status == STOPPED:
        return status
    if work.missing():
        say(f"{work.missing()} runs are left to other processes that are at them; the same command goes on once they "
             "have ended")
        return STOPPED
    with StopOrDeadline(until) as stop:
        status = work.costs(stop)
    return STOPPED if status == STOPPED else max(status, work.report())


class Work:
    """A study with its trials worked out."""

    def __init__(self, study: Study, *, smoke: bool = False, args: Sequence[str] = (), processes: int = 1):
        self.study, self.smoke, self.out, self._processes = study, smoke, study.directory, processes
        self._command = shlex.join(["lfm", "ablate", *_of_the_study(args or [f"{study.name}.yaml"])])
        found = points(study)
        self.points = [found[0], *found[1:][-1:]] if smoke else found
        self.tasks: dict[str, Task] = {
            name: open_task(study.task(name), Path(study.out) / "data") for name in study.tasks
        }
        self.trials = self._trials()
        self._shown = 0.0

    def _trials(self) -> list[Trial]:
        trials, problems = [], []
        for point in self.points:
            for name, task in self.tasks.items():
                try:
                    trials.append(make_trial(self.study, point, self.points[0], name, task))
                except ValueError as error:
                    problems.append(f"{point.name} on {name}: {error}")
        raise_problems("points of the study cannot be used", problems)
        return trials

    # ---------------------------------------------------------------- what belongs to what

    def digest(self, trial: Trial, seed: int, peak_lr: float) -> str:
        """Of everything that decides a run."""
        study, model = self.study, trial.model
        if "sliding_attention" not in model.layer_types:  # The window is nothing to it.
            model = model.replace(sliding_window=ModelConfig().sliding_window)
        fields = _fields(model)
        if model.ffn_types == ModelConfig().ffn_types:  # Runs from before there was a choice go on.
            del fields["ffn_types"]
        optimizer = dataclasses.replace(study.optimizer, peak_lr=peak_lr)
        return digest(
            fields, self.tasks[trial.task].digest(), trial.steps, recipe.to_plain(optimizer),
            recipe.to_plain(study.guard), study.warmup, study.loss_chunk, seed,
        )

    def check(self) -> None:
        """Checks that what is there belongs to this study, and writes study.yaml.

        Raises:
          ValueError: a run of another study is there, or two points have one file name.
        """
        names = [slug(point.name) for point in self.points]
        if len(set(names)) < len(names):
            raise ValueError("two points of the study have the same file name; vary them in one grid")
        for trial in self.trials:
            for seed in range(self.study.seeds):
                path = run_file(self.out, trial.task, trial.point.name, seed)
                record = read_record(path)
                rates = self.study.rates(trial.task)
                if record is not None and record["peak_lr"] in rates:
                    rates = (record["peak_lr"],)
                read_record(path, *(self.digest(trial, seed, rate) for rate in rates))
            for rate in self._tried(trial):
                self._tuning(trial, rate)
        self.out.mkdir(parents=True, exist_ok=True)
        plain = recipe.to_plain(self.study) | {"vary": [grid.plain() for grid in self.study.vary]}
        write_whole(self.out / "study.yaml", yaml.safe_dump(plain, sort_keys=False), by_many=True)

    def _chosen_rate(self, trial: Trial) -> float | None:
        """The learning rate of a trial's runs; None while it is not chosen."""
        rates = self.study.rates(trial.task)
        if len(rates) == 1:
            return rates[0]
        found = {rate: self._tuning(trial, rate) for rate in rates}
        if None in found.values():
            return None
        better = max if self.tasks[trial.task].about.better == "higher" else min
        scores = {rate: r["score"] for rate, r in found.items() if r is not None and r["score"] is not None}
        if not scores:
            return rates[0]  # All failed: its runs will fail too, and say so.
        return better(scores, key=scores.__getitem__)

    def _tried(self, trial: Trial) -> tuple[float, ...]:
        """The rates that have a run of their own, to choose by."""
        rates = self.study.rates(trial.task)
        return rates if len(rates) > 1 else ()

    def _tuning(self, trial: Trial, rate: float) -> dict[str, Any] | None:
        path = tuning_file(self.out, trial.task, trial.point.name, rate)
        return read_record(path, self.digest(trial, TUNING_SEED, rate))

    # ---------------------------------------------------------------- running

    def run(self, share: tuple[int, ...], stop: Stop, retry_failed: bool, *, help_others: bool = False) -> int:
        """Makes the runs of a share (i, n) of the trials, every n-th from the i-th on; see `ablate` for the status.

        A trial that another process is at is left to it.

        Args:
          help_others: take the trials of other shares too, once those of this one are done.
        """
        from lfm_jax.ablate.run import StoppedError

        index, count = share
        mine = self.trials[index::count]
        # Backwards, so that the others are met late.
        others = [trial for trial in self.trials[::-1] if trial not in mine] if help_others else []
        self._note_conditions()
        try:
            for trial in (*mine, *others):
                folder = run_file(self.out, trial.task, trial.point.name, 0).parent
                folder.mkdir(parents=True, exist_ok=True)
                with suppress(_TakenError), _locked(folder):
                    self._run_trial(trial, stop, retry_failed)
        except StoppedError:
            say(f"stopped with {self._progress()}; the same command goes on")
            return STOPPED
        return 0

    def _run_trial(self, trial: Trial, stop: Stop, retry_failed: bool) -> None:
        from lfm_jax.ablate.run import StoppedError, Trainer

        study, out = self.study, self.out
        trainer = None  # Made, and compiled, only where there is something to do.

        def todo(path: Path, seed: int, rate: float) -> bool:
            record = read_record(path) or self._take_over(path, trial, seed, rate)
            # Another rate may have been chosen since, when one that had failed was tried again.
            return record is None or record["peak_lr"] != rate or (retry_failed and record["status"] == "failed")

        def do(seeds: Sequence[int], rate: float, paths: Sequence[Path], kind: str) -> None:
            nonlocal trainer
            if stop.due():
                raise StoppedError
            trainer = trainer or Trainer(study, trial, self.tasks[trial.task])
            self._run_seeds(trainer, trial, seeds, rate, paths, kind, stop)

        for rate in self._tried(trial):
            path = tuning_file(out, trial.task, trial.point.name, rate)
            if todo(path, TUNING_SEED, rate):
                do([TUNING_SEED], rate, [path], "tuning")
        rate = self._chosen_rate(trial)
        assert rate is not None  # All were just tried.
        paths = {seed: run_file(out, trial.task, trial.point.name, seed) for seed in range(study.seeds)}
        left = [seed for seed, path in paths.items() if todo(path, seed, rate)]
        for seeds in batched(left, study.seeds_at_once):
            # A group that is not full would be another program.
            for group in [seeds] if len(seeds) == study.seeds_at_once else [(seed,) for seed in seeds]:
                do(group, rate, [paths[seed] for seed in group], "run")

    @cached_property
    def _of_other_studies(self) -> dict[str, dict[str, Any]]:
        """Finished runs of the other studies in the same `out`, by fingerprint."""
        found = {}
        for path in sorted(self.out.parent.glob("*/runs/*/*/*.json")):
            if self.out not in path.parents:
                with suppress(ValueError, KeyError, TypeError, AttributeError):  # Theirs to mend.
                    if (record := read_record(path)) and is_finished(record):
                        found[record["digest"]] = {"taken_from": path.relative_to(self.out.parent).parts[0]} | record
        return found

    def _take_over(self, path: Path, trial: Trial, seed: int, rate: float) -> dict[str, Any] | None:
        """Writes the run that another study has made already, if one has: same model, data, steps and seed."""
        record = self._of_other_studies.get(self.digest(trial, seed, rate))
        if record is None:
            return None
        kind = "tuning" if seed == TUNING_SEED else "run"
        record = record | {"kind": kind, "point": trial.point.name, "task": trial.task}
        write_record(path, record)
        say(f"{trial.point.name} | {trial.task} | seed {seed}, rate {rate:g}: as in {record['taken_from']}")
        return record

    def _run_seeds(
        self, trainer: Any, trial: Trial, seeds: Sequence[int], rate: float, paths: Sequence[Path], kind: str,
        stop: Stop,
    ) -> None:
        from lfm_jax.ablate.run import DivergedError, StoppedError
        from lfm_jax.train.processes import device_failed

        name = f"{trial.point.name} | {trial.task} | seed {', '.join(map(str, seeds))}, rate {rate:g}"

        def tell(done: int) -> None:
            if time.monotonic() - self._shown > SAY_SECONDS:
                self._shown = time.monotonic()
                say(f"{name}: step {done}/{trial.steps}")

        self._shown = time.monotonic()
        common = [
            {"digest": self.digest(trial, seed, rate), "kind": kind, "point": trial.point.name, "task": trial.task,
             "seed": seed, "peak_lr": rate} | _earlier_errors(path)
            for seed, path in zip(seeds, paths, strict=True)
        ]
        saved = paths[0].with_suffix(".saved")
        try:
            key = digest([record["digest"] for record in common])
            outcomes = trainer.run(seeds, rate, saved, key, stop, tell)
        except StoppedError:
            raise
        except Exception as error:  # One that fails must not take the others with it; it is recorded.
            if device_failed(error):  # The next ones would fail like it.
                raise
            if isinstance(error, DivergedError) and len(seeds) > 1:  # One of them: which, each alone will show.
                for seed, path in zip(seeds, paths, strict=True):
                    self._run_seeds(trainer, trial, [seed], rate, [path], kind, stop)
                return
            for path, record in zip(paths, common, strict=True):
                lines = traceback.format_exc().strip().splitlines()
                reason = f"{type(error).__name__}: {str(error).strip() or lines[-1]}"
                write_record(path, record | {
                    "status": "failed", "error": reason[:2000], "score": None, "metrics": {}, "curves": {},
                    "seconds": 0.0,
                })
            say(f"{name}: FAILED: {error}")
            return
        for path, record, outcome in zip(paths, common, outcomes, strict=True):
            write_record(path, record | {"status": "ok", "error": None} | dataclasses.asdict(outcome))
        shutil.rmtree(saved, ignore_errors=True)
        scores = ", ".join(f"{outcome.score:.4f}" for outcome in outcomes)
        about = self.tasks[trial.task].about
        say(f"{name}: {about.score} {scores} ({outcomes[0].seconds:.0f} s); {self._progress()}")

    def _run_records(self) -> list[dict[str, Any]]:
        records = []
        for trial in self.trials:
            found = [tuning_file(self.out, trial.task, trial.point.name, rate) for rate in self._tried(trial)]
            found += [run_file(self.out, trial.task, trial.point.name, seed) for seed in range(self.study.seeds)]
            records += [record for path in found if (record := read_record(path)) is not None]
        return records

    def missing(self) -> int:
        """Planned runs that are neither finished nor failed."""
        return self.num_runs() - len(self._run_records())

    def num_runs(self) -> int:
        """Planned runs, those that choose learning rates included."""
        return len(self._planned())

    def _planned(self) -> list[str]:
        """The task of every planned run."""
        return [trial.task for trial in self.trials for _ in range(self.study.seeds + len(self._tried(trial)))]

    def _progress(self) -> str:
        """How much is done, by all processes; and the time that is left at the pace so far, compiling left out."""
        records, total = self._run_records(), self.num_runs()
        text = f"{len(records)}/{total} runs done"
        left = Counter(self._planned())
        left.subtract(record["task"] for record in records)
        # Medians: one run beside other work may take ten times as long. A task that has none yet is like the others.
        every = [record["seconds"] for record in records if record["seconds"]]
        if every and len(records) < total:
            seconds = {task: [r["seconds"] for r in records if r["task"] == task and r["seconds"]] or every
                       for task in left}
            minutes = sum(n * statistics.median(seconds[task]) for task, n in left.items()) / 60 / self._processes
            many = f" of {self._processes} processes" if self._processes > 1 else ""
            text += f", about {minutes:.0f} minutes{many} left"
        return text

    # ---------------------------------------------------------------- costs, results, report

    def costs(self, stop: StopOrDeadline) -> int:
        """Measures the costs of each point that has none yet, beside the base in the same process; see `ablate`.

        They are those of the first task's shapes. Points of one model share them.
        """
        from lfm_jax.ablate.cost import PREFILL_LENGTH, measure_cost

        study, name, status = self.study, next(iter(self.tasks)), 0
        task, base = self.tasks[name], self.trials[0].model
        known: dict[str, dict[str, Any]] = {}
        took = 0.0
        for trial in self.trials if study.cost_contexts else ():
            path = cost_file(self.out, trial.point.name)
            if trial.task != name:
                continue
            key = digest(_fields(trial.model), _fields(base), study.cost_contexts, study.loss_chunk)
            record = read_record(path)
            if record is None or record["digest"] != key:
                # One that is begun is not interrupted; each takes about as long as the last.
                if stop.due() or (key not in known and stop.left() < took):
                    say("stopped while costs were measured; the same command goes on")
                    return STOPPED
                began, new = time.monotonic(), key not in known
                try:
                    cost = known.get(key) or measure_cost(
                        trial.model, base, train_shape=(task.batch_size, task.seq_len), optimizer=study.optimizer,
                        contexts=study.cost_contexts, loss_chunk=study.loss_chunk,
                        prefill_length=min(PREFILL_LENGTH, trial.model.max_position),
                    )
                except Exception as error:  # The report is owed all the same; the next call tries again.
                    say(f"{trial.point.name}: costs FAILED: {error}")
                    status = FAILED
                    continue
                took = time.monotonic() - began if new else took
                record = {"digest": key, "kind": "cost"} | cost | {"point": trial.point.name}
                write_record(path, record)
                how = f"measured in {took:.0f} s" if new else "are those of an equal model"
                say(f"{trial.point.name}: costs {how}")
            known[key] = record
        return status

    def records(self) -> list[dict[str, Any]]:
        """Everything that is known, in the order of the study: what results.jsonl holds."""
        study = self.study
        self._note_conditions()
        head = {
            "kind": "study", "name": study.name, "question": study.question, "base": BASE,
            "points": [point.name for point in self.points], "axes": list(all_settings(study, self.points[0])),
            "seeds": list(range(study.seeds)), "match": study.match, "smoke": self.smoke,
            "runs": len(self.trials) * study.seeds, "fit": study.fit, "command": self._command,
            "conditions": (self.out / _CONDITIONS).read_text().strip(),
        }
        tasks = [
            {"kind": "task", "task": name, **dataclasses.asdict(task.about), "steps": task.steps,
             "tokens": task.steps * task.batch_size * task.seq_len}
            for name, task in self.tasks.items()
        ]
        found = [
            {"kind": "point", "point": trial.point.name, "task": trial.task,
             "settings": all_settings(study, trial.point), "pattern": _letters(trial.model),
             "attention_layers": trial.model.attention_layers, "layers": trial.model.num_layers,
             "params": trial.model.num_params(), "train_flops": trial.train_flops, "tokens": trial.tokens,
             "match_off": trial.match_off, "changed": trial.changed}
            for trial in self.trials
        ]
        costs = [read_record(cost_file(self.out, point.name)) for point in self.points]
        return [head, *tasks, *found, *self._run_records(), *(record for record in costs if record is not None)]

    def _note_conditions(self) -> None:
        """Keeps versions and machine on which the study was begun."""
        import jax

        from lfm_jax.bench.timing import conditions

        path = self.out / _CONDITIONS
        if not path.exists():
            device = jax.devices()[0]
            accelerator = "" if device.platform == "cpu" else f"{device.device_kind}; "
            many = f"; {self._processes} processes side by side, each with its share" if self._processes > 1 else ""
            write_whole(path, accelerator + conditions("jax", "flax", "optax") + many + "\n", by_many=True)

    def report(self) -> int:
        """Writes results.jsonl and the report; `FAILED` where a run failed."""
        from lfm_jax.ablate.report import write_report

        results = write_results(self.out, self.records())
        page = write_report(results, self.out / "report")
        failed = [r for r in self._run_records() if r["status"] == "failed" and r["kind"] == "run"]
        say(f"{self._progress()}{f', {len(failed)} FAILED' if failed else ''}; report: {page}")
        return FAILED if failed else 0


def _earlier_errors(path: Path) -> dict[str, list[dict[str, Any]]]:
    """What went wrong before with a run that is made again."""
    record = read_record(path)
    if record is None or record["status"] != "failed":
        return {}
    failed = {"error": record["error"], "peak_lr": record["peak_lr"]}
    return {"earlier_errors": [*record.get("earlier_errors", ()), failed]}


class _TakenError(ValueError):
    """Another process is at a trial."""


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(folder, "taken"))
        except ValueError as error:
            raise _TakenError from error
        yield


def _of_the_study(args: Sequence[str]) -> list[str]:
    """A command's arguments without those of the call."""
    return tyro.cli(Call, args=args, return_unknown_args=True, config=(tyro.conf.FlagConversionOff,))[1]


def _fields(model: ModelConfig) -> dict[str, Any]:
    """A model as plain values, for fingerprints."""
    fields, before = recipe.to_plain(model), recipe.to_plain(ModelConfig())
    return {name: value for name, value in fields.items() if name in _FIRST or value != before[name]}


def _letters(model: ModelConfig) -> str:
    from lfm_jax.ablate.pattern import to_letters

    return to_letters(model.layer_types)
