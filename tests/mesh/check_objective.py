"""An objective of a test's own over eight devices equals one device; killed it resumes to the bit; weights frozen."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import compiled
import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))

import pairs

from lfm_jax.train.metrics import read_metrics

MESH = dict(data=2, fsdp=2, tensor=2)


def losses(run_dir):
    return [record["loss"] for record in read_metrics(run_dir) if "loss" in record]


def test_eight_devices_are_one_device_and_resume_to_the_bit(tmp_path, capsys):
    whole = pairs.run(tmp_path / "whole", MESH, freeze=pairs.FREEZE)
    command = [sys.executable, pairs.__file__, str(tmp_path / "one")]
    one_device = os.environ | {"XLA_FLAGS": compiled.flags({}), "PAIRS_FREEZE": json.dumps(pairs.FREEZE)}
    done = subprocess.run(command, env=one_device, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(losses(whole.run_dir), losses(tmp_path / "one"), rtol=1e-4)

    command = [sys.executable, pairs.__file__, str(tmp_path / "killed"), json.dumps(MESH), f"{pairs.KILLED}"]
    mesh = os.environ | {"PAIRS_FREEZE": json.dumps(pairs.FREEZE)}
    killed = subprocess.run(command, env=mesh, capture_output=True, text=True, timeout=600)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    again = pairs.run(tmp_path / "killed", MESH, freeze=pairs.FREEZE)
    assert f"resumed {tmp_path / 'killed'} at step {pairs.SAVED}\n" in capsys.readouterr().err
    assert losses(again.run_dir) == losses(whole.run_dir)
    for run in (whole, again):
        assert pairs.unchanged(run.run_dir) == pairs.frozen()


def test_frozen_weights_are_laid_out_as_the_others():
    training = pairs.config("x", MESH, freeze=pairs.FREEZE).training()
    with jax.set_mesh(pairs.config("x", MESH).mesh.make()):
        state = training.abstract_state()
        full = pairs.config("x", MESH).training().abstract_state()
    for name in ("w1", "w2", "w3"):
        mine, theirs = (tree["blocks"][0]["feed_forward"][name] for tree in (state.frozen, full.params))
        assert mine.sharding == theirs.sharding
    assert state.frozen["embed"].sharding == full.params["embed"].sharding
