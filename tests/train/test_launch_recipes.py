"""The launch recipes: they parse, their flags exist, and they restart what can be resumed and nothing else."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from tiny_runs import recipe

from lfm_jax.pretrain.config import TrainCommand
from lfm_jax.recipe import load_recipe
from lfm_jax.train.launch import FAILED, LOST, STOPPED

LAUNCH = Path(__file__).parents[2] / "experiments" / "launch"


@pytest.fixture
def slurm(tmp_path):
    """Runs slurm.sh where srun ends with a given code; returns (exit code, what srun got, whether it was requeued)."""
    if shutil.which("bash") is None:
        pytest.skip("bash is not installed")
    for name, line in (("srun", 'echo "$@" > srun.txt; exit "$CODE"'), ("scontrol", 'echo "$@" > scontrol.txt')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)

    def run(code, restarts=0):
        (tmp_path / "scontrol.txt").unlink(missing_ok=True)
        env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CODE": str(code), "SLURM_JOB_ID": "7",
                            "SLURM_RESTART_COUNT": str(restarts)}
        command = ["bash", str(LAUNCH / "slurm.sh"), "recipe.yaml", "--steps", "12"]
        status = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True).returncode
        asked = tmp_path / "scontrol.txt"
        requeued = asked.exists() and asked.read_text() == "requeue 7\n"
        return status, (tmp_path / "srun.txt").read_text().split(), requeued

    return run


@pytest.mark.parametrize(("code", "again"), [(0, False), (1, False), (FAILED, False), (STOPPED, True), (LOST, True),
                                             (137, True)])
def test_slurm_requeues_what_the_same_command_resumes(slurm, code, again):
    status, _, requeued = slurm(code)
    assert status == code
    assert requeued == again


def test_slurm_does_not_requeue_for_ever(slurm):
    assert not slurm(LOST, restarts=20)[2]


def test_the_flags_that_slurm_passes_on_exist(slurm, corpus, tmp_path):
    words = slurm(0)[1]
    assert "--kill-on-bad-exit=1" in words
    flags = words[words.index("recipe.yaml") + 1 :]
    command = load_recipe(TrainCommand, recipe(corpus, tmp_path / "run"), flags)
    assert command.launch.distributed == "auto"
    assert command.run.steps == 12


def test_the_jobset_restarts_what_can_be_resumed(corpus, tmp_path):
    jobset = yaml.safe_load((LAUNCH / "gke-jobset.yaml").read_text())
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    [container] = pod["containers"]
    program, verb, _, *flags = container["command"]
    assert (program, verb) == ("lfm", "train")
    assert load_recipe(TrainCommand, recipe(corpus, tmp_path / "run"), flags).launch.distributed == "auto"
    [rule] = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    ends = rule["onExitCodes"]["values"]
    assert FAILED in ends
    assert not {STOPPED, LOST} & set(ends)
    assert jobset["spec"]["failurePolicy"]["rules"][0]["onJobFailureReasons"] == ["PodFailurePolicy"]
    assert pod["terminationGracePeriodSeconds"] > 30  # The default is short for a checkpoint.
    assert job["parallelism"] == job["completions"]
    hosts = [int(n) for n in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")]
    assert job["completions"] * container["resources"]["limits"]["google.com/tpu"] == hosts[0] * hosts[1]
