"""Where a run's records go: metrics.jsonl always, TensorBoard, Weights & Biases and Trackio if asked for.

metrics.jsonl is what happened: a resumed run drops its records behind the checkpoint, which a kill undid. The others
are brought in line with it:

- TensorBoard: each record is on disk at once, and a resumed run's event file takes back what was undone.
- wandb: the run is resumed by its id and gets what it lacks. It takes no point back, but steps done again give the same
  values, and those that it has are not sent twice.
- Trackio: the run in the local store is written again, since it neither takes points back nor writes them through.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from lfm_jax.train.metrics import MetricsLog, read_metrics

TrackerName = Literal["tensorboard", "wandb", "trackio"]
_MODULES: dict[str, str] = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}
_RUN_ID = "run_id"
"""File in a run directory with the name under which services know the run."""

Record = Mapping[str, Any]


class Tracker(Protocol):
    """Takes the records of a run."""

    def log(self, step: int, record: Record) -> None:
        """Keeps the numbers of a step. Several records may share a step; steps do not fall."""

    def close(self) -> None:
        """Writes out what is left. Nothing may be logged afterwards."""


def check_trackers(names: Sequence[str]) -> list[str]:
    """What is wrong with a list of tracker names: one line for each that is not known or not installed."""
    problems = []
    for name in names:
        if name not in _MODULES:
            problems.append(f"trackers has {name!r}; choose from {', '.join(get_args(TrackerName))}")
            continue
        try:
            importlib.import_module(_MODULES[name])
        except ImportError as error:
            problems.append(
                f"trackers has {name!r}, but {_MODULES[name]} cannot be imported ({error}); "
                "pip install 'lfm_jax[track]', or take it off"
            )
    return problems


class Trackers:
    """metrics.jsonl and every tracker named, as one; see `open_trackers`."""

    def __init__(self, names: Sequence[str], run_dir: Path, config: Mapping[str, Any], resume_step: int):
        problems = check_trackers(names)
        if problems:
            raise ValueError("\n".join(problems))
        self._names, self._run_dir, self._config = tuple(dict.fromkeys(names)), Path(run_dir), config
        self._all: list[Tracker] = []
        self._open(resume_step)

    def log(self, step: int, record: Record) -> None:
        """Keeps a record in all of them, metrics.jsonl first. Numbers that are not finite become null there."""
        for tracker in self._all:
            tracker.log(step, record)

    def rewind(self, step: int) -> None:
        """Drops the records behind `step`, as a resumed run does: for a rollback within one process."""
        self.close()
        self._open(step)

    def close(self) -> None:
        for tracker in self._all:
            tracker.close()
        self._all = []

    def _open(self, resume_step: int) -> None:
        self._all.append(MetricsLog(self._run_dir, resume_step=resume_step))
        for name in self._names:
            if name == "tensorboard":
                self._all.append(_TensorBoard(self._run_dir, self._config, resume_step))
            else:
                service = _Wandb if name == "wandb" else _Trackio
                self._all.append(service(self._run_dir, self._config, read_metrics(self._run_dir)))


def open_trackers(names: Sequence[str], run_dir: Path, config: Mapping[str, Any], resume_step: int) -> Trackers:
    """Opens metrics.jsonl and the trackers named, for a run that goes on from `resume_step` (0: from nothing).

    Only one process of a run may do so.

    Args:
      names: of `tensorboard`, `wandb`, `trackio`.
      run_dir: the run's directory, which is there already.
      config: the resolved config as plain data, for services that show it.
      resume_step: records of later steps are dropped.

    Raises:
      ValueError: a name that is not known, or whose package is not installed; the message says what to install.
    """
    return Trackers(names, run_dir, config, resume_step)


def numbers(record: Record) -> dict[str, float]:
    """The finite numbers of a record, without its step and time."""
    return {
        name: float(value)
        for name, value in record.items()
        if name not in ("step", "time") and isinstance(value, (int, float)) and math.isfinite(value)
    }


class _TensorBoard:
    """Event files in `run_dir/tensorboard`, one a start, each record on disk before `log` returns.

    Not through `SummaryWriter`, whose `flush` does not wait for its queue: a kill would lose points for good.
    """

    def __init__(self, run_dir: Path, config: Mapping[str, Any], resume_step: int):
        from tensorboardX.event_file_writer import EventsWriter  # pyrefly: ignore
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyrefly: ignore
        from tensorboardX.proto.summary_pb2 import Summary  # pyrefly: ignore
        from tensorboardX.summary import text  # pyrefly: ignore

        self._event, self._summary = Event, Summary
        directory = run_dir / "tensorboard"
        directory.mkdir(exist_ok=True)
        earlier = len(list(directory.glob("events.*")))  # Names have seconds only: two starts in one would be one file.
        self._writer: Any = EventsWriter(str(directory / "events"), f".{earlier:06}")
        start = SessionLog(status=SessionLog.START)
        self._write(step=resume_step + 1, session_log=start)  # Takes back the points from this step on.
        if resume_step == 0:
            self._write(step=0, summary=text("config", f"```\n{json.dumps(config, indent=2)}\n```"))

    def log(self, step: int, record: Record) -> None:
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in numbers(record).items()]
        self._write(step=step, summary=self._summary(value=values))

    def close(self) -> None:
        self._writer.close()

    def _write(self, **fields: Any) -> None:
        self._writer.write_event(self._event(wall_time=time.time(), **fields))
        self._writer.flush()


class _Wandb:
    """A wandb run of the directory's name, resumed by its id. WANDB_* variables (project, mode, entity) work as usual.

    What the service does not have of `history` is sent at the start: its own process may lose points in a kill. Steps
    that it has and that are done again are left out, since it takes no point back. Offline it has nothing, so that the
    newest offline directory holds the whole run and is the one to sync.
    """

    def __init__(self, run_dir: Path, config: Mapping[str, Any], history: Sequence[Record]):
        import wandb  # pyrefly: ignore

        options = dict(dir=str(run_dir), id=_run_id(run_dir), name=run_dir.resolve().name, config=dict(config))
        self._run: Any = wandb.init(project=_project("WANDB_PROJECT"), resume="allow", **options)
        self._first = self._run.starting_step
        for record in history:
            self.log(record["step"], record)

    def log(self, step: int, record: Record) -> None:
        if step >= self._first:
            self._run.log(numbers(record), step=step)

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    """A run of Trackio's local store, named after the directory; written again from `history` at each start."""

    def __init__(self, run_dir: Path, config: Mapping[str, Any], history: Sequence[Record]):
        import trackio  # pyrefly: ignore

        project, name = _project("TRACKIO_PROJECT"), f"{run_dir.resolve().name}-{_run_id(run_dir)}"
        with contextlib.suppress(ValueError):  # The project is new.
            for run in list(trackio.Api().runs(project)):
                if run.name == name:
                    run.delete()
        self._run: Any = trackio.init(project=project, name=name, config=dict(config), embed=False)
        for record in history:
            self.log(record["step"], record)

    def log(self, step: int, record: Record) -> None:
        self._run.log(numbers(record), step=step)

    def close(self) -> None:
        self._run.finish()


def _project(variable: str) -> str:
    return os.environ.get(variable) or "lfm_jax"


def _run_id(run_dir: Path) -> str:
    """A name that no other run has, made at the first start and kept in the run's directory."""
    path = run_dir / _RUN_ID
    if not path.exists():
        path.write_text(uuid.uuid4().hex[:12] + "\n")
    return path.read_text().strip()
