"""What the tests of training runs share: a tiny recipe, processes that run it, and ways to lose them."""

import os
import subprocess
import sys
import time
from pathlib import Path

import yaml

from lfm_jax.pretrain.config import TrainConfig
from lfm_jax.recipe import load_recipe
from lfm_jax.train.metrics import read_metrics

STEPS = 12


def recipe(corpus, run_dir, **changes):
    """The path of a recipe for a tiny run in `run_dir`; `data__seed=1` changes a key of a section."""
    content = {
        "run_dir": str(run_dir), "steps": STEPS, "eval_every": 5, "checkpoint_every": 4, "log_every": 100,
        "model": {
            "layer_types": ["conv", "full_attention"], "vocab_size": 300, "hidden_size": 16, "ffn_size": 24,
            "num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "max_position": 64, "dtype": "float32",
        },
        "data": {"sources": [str(corpus)], "seq_len": 32, "batch_size": 4, "heldout_fraction": 0.1},
        "optimizer": {"peak_lr": 1.0e-2, "warmup_steps": 2},
        "guard": {}, "mesh": {}, "eval": {},
    }
    return written(content, run_dir, changes)


def written(content, run_dir, changes):
    """Writes a recipe beside a run's directory, with changes of its keys; returns its path."""
    for key, value in changes.items():
        section, _, field = key.rpartition("__")
        (content[section] if section else content)[field] = value
    path = run_dir.parent / f"{run_dir.name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def load(path):
    return load_recipe(TrainConfig, path)


def losses(run_dir):
    return {r["step"]: r["loss"] for r in read_metrics(run_dir) if "loss" in r}


def steps_in_order(run_dir):
    """The steps of the records of training, none of which may be missing or there twice."""
    return [r["step"] for r in read_metrics(run_dir) if "loss" in r]


def command(path, *flags):
    return [sys.executable, "-m", "lfm_jax.cli", "train", str(path), *map(str, flags)]


def environment(cache):
    """Restarting is mostly compiling, and the programs are the same each time."""
    return os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


def start(path, cache, *flags):
    """A run in a process of its own, whose output is kept."""
    return subprocess.Popen(
        command(path, *flags), env=environment(cache), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process, seconds=600):
    """(exit code, standard output, standard error)."""
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


def wait_for_step(process, run_dir, step):
    """Until a step is on record; fails if the run ends before."""
    while max(losses(run_dir), default=0) < step:
        # All of its messages: why the run ended may stand long before the last line.
        assert process.poll() is None, f"the run ended before step {step}: {process.communicate()[1]}"
        time.sleep(0.005)


def children(process):
    """Process ids of the processes that a launcher started, the first process of the run first."""
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


class Broken(Exception):
    """A run that is broken off."""


class Breaking:
    """The batches of a corpus, up to one with which the run is broken off, in this process."""

    def __init__(self, batches, last):
        self.batches, self.left = batches, last
        self.get_state, self.set_state = batches.get_state, batches.set_state

    def __next__(self):
        self.left -= 1
        if not self.left:
            raise Broken
        return next(self.batches)
