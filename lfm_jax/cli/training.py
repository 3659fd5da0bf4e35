"""`lfm plan`, `lfm train`, `lfm ablate`: their flags are the keys of their recipes."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lfm_jax.cli.errors import refuse

if TYPE_CHECKING:
    from lfm_jax.ablate.schedule import AblateConfig
    from lfm_jax.plan import PlanConfig
    from lfm_jax.pretrain.config import TrainCommand


def train(command: TrainCommand, args: Sequence[str]) -> int:
    """Train or resume a run: `lfm train RECIPE.yaml [--optimizer.peak-lr 1e-3 ...]`; every key is a flag.

    Exit status: 0 at the run's end, 130 when it was asked to stop (the same command resumes), 75 when a process of
    many was lost (the same command resumes), 2 for bad input.
    """
    from lfm_jax.train.launch import FAILED, LOST, STOPPED, start

    if command.launch.processes > 1:
        return start([sys.executable, "-m", "lfm_jax.cli", "train", *args], command.launch)
    from lfm_jax.eval.in_training import open_tasks
    from lfm_jax.pretrain.run import train as run
    from lfm_jax.train import processes

    processes.join(command.launch)
    try:
        result = run(command.run, open_tasks)
        status = 0 if result.step == result.steps else STOPPED
    except (ValueError, OSError) as error:
        if command.launch.many and os.environ.get("LFM_TRACEBACK"):  # Raised, it would wait for the others at the end.
            traceback.print_exc()
            status = FAILED
        else:
            status = refuse(error)
    except Exception as error:
        if not command.launch.many:
            raise
        traceback.print_exc()
        status = LOST if processes.device_failed(error) else 1
    processes.leave(status)
    return status


def plan(config: PlanConfig, args: Sequence[str]) -> int:
    """Report what a run needs and costs on a machine: `lfm plan RECIPE.yaml --topology v5e:16x16`; every key is a
    flag."""
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
