"""`lfm tune`: post-training by the methods of `methods.METHODS`, through the runner of `train/`."""

from __future__ import annotations

import dataclasses

from lfm_jax.files import say
from lfm_jax.post.config import TuneConfig
from lfm_jax.post.methods import METHODS
from lfm_jax.train import processes
from lfm_jax.train.runner import OpenTasks, RunResult, run_training


def tune(config: TuneConfig, open_tasks: OpenTasks | None = None) -> RunResult:
    """Runs or resumes a tuning run to its end, or to an interrupt; see `runner.run_training`.

    The data is read and checked whole before anything is written.

    Raises:
      ValueError: see `run_training`, and what the method says of its data.
    """
    method = METHODS[config.method].open(config)
    steps = config.steps or method.steps()
    if processes.is_main():
        say(f"{method}: {steps:,} steps" + ("" if config.steps else f" are {config.epochs:g} epochs"))
    return run_training(dataclasses.replace(config, steps=steps), method, open_tasks)
