"""`lfm plan`, `lfm train`, `lfm tune`, `lfm ablate`: their flags are the keys of their recipes."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from lfm_jax.cli.errors import refuse

if TYPE_CHECKING:
    from lfm_jax.ablate.schedule import AblateConfig
    from lfm_jax.plan import Planned
    from lfm_jax.post.config import TuneCommand
    from lfm_jax.pretrain.config import TrainCommand
    from lfm_jax.train.launch import Launch


class RunEnd(Protocol):
    """How a run ended: `step` < `steps` when it was interrupted."""

    @property
    def step(self) -> int: ...

    @property
    def steps(self) -> int: ...


def train(command: TrainCommand, args: Sequence[str]) -> int:
    """Train or resume a run: `lfm train RECIPE.yaml [--optimizer.peak-lr 1e-3 ...]`; every key is a flag.

    Exit status: 0 at the run's end, 130 when it was asked to stop (the same command resumes), 75 when a process of
    many was lost (the same command resumes), 2 for bad input.
    """
    def run() -> RunEnd:
        from lfm_jax.eval.in_training import open_tasks
        from lfm_jax.pretrain.run import train

        return train(command.run, open_tasks)

    return _launched("train", command.launch, args, run)


def tune(command: TuneCommand, args: Sequence[str]) -> int:
    """Teach a model from chats, pairs of answers or a teacher, or resume:
    `lfm tune RECIPE.yaml [--init-from MODEL ...]`; every key is a flag.

    Exit status: as of `lfm train`.
    """

    def run() -> RunEnd:
        from lfm_jax.eval.in_training import open_tasks
        from lfm_jax.post.run import tune

        return tune(command.run, open_tasks)

    return _launched("tune", command.launch, args, run)


def distill(command: TuneCommand, args: Sequence[str]) -> int:
    """Store what a teacher says, for `lfm tune` to learn from: `lfm data distill RECIPE.yaml --distill.stored DIR`.

    The recipe is that of the run (`method: distill`). Exit status: as of `lfm train`.
    """

    def run() -> RunEnd:
        from lfm_jax.post.run import distill

        return distill(command.run)

    return _launched("data distill", command.launch, args, run)


def _launched(verb: str, launch: Launch, args: Sequence[str], run: Callable[[], RunEnd]) -> int:
    """The exit status of a run, in this process or in as many as are asked for."""
    from lfm_jax.train.launch import FAILED, LOST, STOPPED, start

    if launch.processes > 1:
        return start([sys.executable, "-m", "lfm_jax.cli", *verb.split(), *args], launch)
    from lfm_jax.train import processes

    processes.join(launch)
    try:
        result = run()
        status = 0 if result.step == result.steps else STOPPED
    except (ValueError, OSError) as error:
        if launch.many and os.environ.get("LFM_TRACEBACK"):  # Raised, it would wait for the others at the end.
            traceback.print_exc()
            status = FAILED
        else:
            status = refuse(error)
    except Exception as error:
        if not launch.many:
            raise
        traceback.print_exc()
        status = LOST if processes.device_failed(error) else 1
    processes.leave(status)
    return status


def plan(config: Planned, args: Sequence[str]) -> int:
    """Report what a run needs and costs on a machine: `lfm plan RECIPE.yaml --topology v5e:16x16`; every key is a
    flag. The recipe is one of `lfm train`, or one of `lfm tune` that names its method or epochs."""
    del args
    import jax

    from lfm_jax.plan import plan as run

    if not jax.config.jax_platforms:
        jax.config.update("jax_platforms", "cpu")  # Nothing runs here, so no TPU or GPU is needed.
    result = run(config)
    print(result.to_json() if config.format == "json" else result)
    result.check()
    return 0


def ablate(config: AblateConfig, args: Sequence[str]) -> int:
    """Run, resume or report an ablation study: `lfm ablate STUDY.yaml [SIZE.yaml] [--processes 2 ...]`.

    Later files win over earlier ones, and every key is a flag.
    """
    from lfm_jax.ablate.schedule import ablate as run

    return run(config, args)
