"""`lfm tune`: post-training by the methods of `methods.METHODS`, through the runner of `train/`."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from pathlib import Path

import jax

from lfm_jax.files import say
from lfm_jax.post.config import TuneConfig
from lfm_jax.post.distill import Distill
from lfm_jax.post.methods import METHODS
from lfm_jax.train import processes
from lfm_jax.train.runner import RunResult, mesh_of, run_training


def distill(config: TuneConfig) -> RunResult:
    """Has the teacher of a run say all that the run needs of it, and keeps it in `distill.stored`; what was interrupted
    goes on where it was.

    Returns:
      The directory, at the end.

    Raises:
      ValueError: the config is of another method or stores nothing, or see `tune`.
    """
    if config.method != "distill" or config.distill.stored is None:
        raise ValueError("nothing is to be stored; set method to distill, and distill.stored to a directory")
    method = Distill(config)
    if processes.is_main():
        say(str(method))
    mesh = mesh_of(config)
    with nullcontext() if mesh is None else jax.set_mesh(mesh):
        method.store()
    return RunResult(Path(config.distill.stored), 0, 0, {})


def tune(config: TuneConfig) -> RunResult:
    """Runs or resumes a tuning run to its end, or to an interrupt; see `runner.run_training`.

    The data is read and checked whole before anything is written.

    Raises:
      ValueError: see `run_training`, and what the method says of its data.
    """
    method = METHODS[config.method].open(config)
    steps = config.steps or method.steps()
    if processes.is_main():
        say(f"{method}: {steps:,} steps" + ("" if config.steps else f" are {config.epochs:g} epochs"))
    return run_training(dataclasses.replace(config, steps=steps), method)
