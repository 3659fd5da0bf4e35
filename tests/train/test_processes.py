"""Runs of two processes with two devices each, over loopback: the same as one, to the bit after any loss."""

import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from tiny_runs import children, finish, load, losses, recipe, start, steps_in_order, wait_for_step

import lfm_jax as lfm
from lfm_jax.data.build import BuildConfig, build
from lfm_jax.pretrain.run import train
from lfm_jax.sharding import MeshConfig
from lfm_jax.train import launch, processes
from lfm_jax.train.launch import FAILED, LOST, STOPPED, Launch
from lfm_jax.train.objective import BatchArray
from lfm_jax.train.processes import HEARTBEAT_SECONDS, BatchPlacer

STEPS = 24
TWO = ("--processes", 2, "--devices-per-process", 2)


def path_of(corpus, run_dir, **changes):
    return recipe(corpus, run_dir, **({"steps": STEPS, "eval_every": 0, "checkpoint_every": 4} | changes))


@pytest.fixture(scope="module")
def two(corpus, tmp_path_factory, cache):
    """An uninterrupted run of two processes: (run directory, what it printed)."""
    run_dir = tmp_path_factory.mktemp("two") / "run"
    out, err = complete(path_of(corpus, run_dir), cache, *TWO)
    assert out == ""  # Gloo prints to standard output.
    return run_dir, err


def complete(path, cache, *flags):
    """(standard output, standard error) of a run that ends well."""
    status, out, err = finish(start(path, cache, *flags))
    assert status == 0, err[-3000:]
    return out, err


def start_until(path, cache, run_dir, step):
    """A run of two processes that has `step` on record."""
    process = start(path, cache, *TWO)
    wait_for_step(process, run_dir, step)
    return process


def signal_child(process, which, number):
    os.kill(children(process)[which], number)


def held(run_dir):
    """Parameters of the latest checkpoint."""
    return lfm.to_state_dict(lfm.load(run_dir)[0])


def test_two_processes_equal_one(corpus, tmp_path, cache, two):
    run_dir, printed = two
    assert steps_in_order(run_dir) == list(range(1, STEPS + 1))
    assert "[0] " in printed
    assert not [line for line in printed.splitlines() if line.startswith("[1] step")]
    status, _, err = finish(start(path_of(corpus, tmp_path / "one"), cache, "--devices-per-process", 4))
    assert status == 0, err[-3000:]
    alone = losses(tmp_path / "one")
    np.testing.assert_allclose([losses(run_dir)[s] for s in alone], list(alone.values()), rtol=1e-5)


def test_stopped_killed_and_resumed_it_is_the_same_run_to_the_bit(corpus, tmp_path, cache, two):
    """SIGTERM to one process stops both at one step; SIGKILL of one ends the other; nothing is lost or repeated."""
    rng = random.Random(2)
    run_dir = tmp_path / "run"
    path = path_of(corpus, run_dir)
    process = start_until(path, cache, run_dir, 2)
    victim = rng.randrange(2)
    signal_child(process, victim, signal.SIGTERM)
    status, _, err = finish(process)
    assert status == STOPPED, err[-3000:]
    stopped = max(losses(run_dir))
    assert f"stopped at step {stopped}" in err
    assert (run_dir / "checkpoints" / str(stopped)).is_dir()

    until = rng.randint(stopped + 1, STEPS - 4) if stopped < STEPS - 4 else stopped + 1
    process = start_until(path, cache, run_dir, until)
    signal_child(process, 1 - victim, signal.SIGKILL)
    killed = time.monotonic()
    status, _, err = finish(process)
    assert status == LOST, err[-3000:]
    assert time.monotonic() - killed < 60
    assert f"process {1 - victim} of 2 was lost: killed by signal 9 (SIGKILL)" in err

    complete(path, cache, *TWO)
    assert steps_in_order(run_dir) == list(range(1, STEPS + 1))
    assert losses(run_dir) == losses(two[0])
    a, b = held(run_dir), held(two[0])
    assert all(np.array_equal(a[name], b[name]) for name in b)


@pytest.mark.long
def test_a_process_that_falls_silent_is_noticed_by_its_heartbeat(corpus, tmp_path, cache):
    run_dir = tmp_path / "run"
    process = start_until(path_of(corpus, run_dir, steps=2000), cache, run_dir, 2)
    signal_child(process, 1, signal.SIGSTOP)
    silent = time.monotonic()
    status, _, err = finish(process)
    assert status == LOST, err[-3000:]
    assert time.monotonic() - silent < 60
    assert "process 1 of 2 was lost: it does not answer" in err


@pytest.mark.long
def test_ten_times_one_of_two_is_killed_at_a_random_moment(corpus, tmp_path, cache):
    steps, kills, rng = 120, 10, random.Random(3)
    undisturbed = tmp_path / "undisturbed"
    complete(path_of(corpus, undisturbed, steps=steps), cache, *TWO)
    run_dir = tmp_path / "killed"
    path = path_of(corpus, run_dir, steps=steps)
    for kill in range(1, kills + 1):
        until = max(losses(run_dir), default=0) + rng.randint(1, (steps - 6) // kills)
        process = start_until(path, cache, run_dir, until)
        time.sleep(rng.random() * 0.3)
        victim = rng.randrange(2)
        signal_child(process, victim, signal.SIGKILL)
        killed = time.monotonic()
        status, _, err = finish(process)
        assert status == LOST, err[-3000:]
        assert f"process {victim} of 2 was lost: killed by signal 9" in err
        seconds = time.monotonic() - killed
        assert seconds < 60
        print(f"kill {kill} of {kills}: process {victim} at step {max(losses(run_dir))} of {steps}, all stopped after "
              f"{seconds:.1f} s", file=sys.stderr)
    complete(path, cache, *TWO)
    assert steps_in_order(run_dir) == list(range(1, steps + 1))
    assert losses(run_dir) == losses(tmp_path / "undisturbed")
    a, b = held(run_dir), held(tmp_path / "undisturbed")
    assert all(np.array_equal(a[name], b[name]) for name in b)
    print(f"{kills} kills of one of two: {steps} losses and all parameters equal to the bit", file=sys.stderr)


@pytest.mark.parametrize("flags", [(), ("--devices-per-process", 4, "--mesh.data", 1, "--mesh.fsdp", 2,
                                        "--mesh.context", 2)], ids=["one device", "fsdp x context"])
def test_a_run_of_two_processes_goes_on_in_one_and_on_another_mesh(corpus, tmp_path, cache, two, flags):
    """At a learning rate that moves no bit, the next checkpoint holds what was restored."""
    run_dir = tmp_path / "run"
    shutil.copytree(two[0], run_dir)
    shutil.rmtree(run_dir / "checkpoints" / str(STEPS))
    at = STEPS - 4
    path = path_of(corpus, run_dir, optimizer__peak_lr=1e-30, steps=at + 1, optimizer__decay_steps=1)
    before = held(run_dir)
    status, _, err = finish(start(path, cache, *flags))
    assert status == 0, err[-3000:]
    assert f"resumed {run_dir} at step {at}" in err
    assert steps_in_order(run_dir) == list(range(1, at + 2))
    after = held(run_dir)
    assert all(np.array_equal(after[name], before[name]) for name in before)
    # The same parameters on the same rows.
    np.testing.assert_allclose(losses(run_dir)[at + 1], losses(two[0])[at + 1], rtol=1e-5)


def test_a_process_that_cannot_write_its_part_stops_the_run(corpus, tmp_path, cache):
    run_dir = tmp_path / "run"
    process = start_until(path_of(corpus, run_dir, steps=400), cache, run_dir, 6)
    pid = children(process)[1]
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (4_000, 4_000))  # As a full disk: writing more fails.
    status, _, err = finish(process)
    assert status == FAILED, err[-3000:]
    assert "process 1 of 2 was lost: exit code 2" in err
    assert "File too large" in err
    kept = max(int(p.name) for p in (run_dir / "checkpoints").iterdir() if p.name.isdigit())
    assert f"the checkpoint of step {kept} is intact" in err
    held(run_dir)


def test_a_program_first_runs_when_all_have_compiled_it(monkeypatch):
    order = []

    class Program:
        def lower(self, x):
            order.append(f"lower {x}")
            return self

        def compile(self):
            order.append("compile")

        def __call__(self, x):
            order.append(f"run {x}")
            return -x

    program = Program()
    assert processes.compiled_together(program) is program  # Of one process.
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes, "barrier", order.append)
    together = processes.compiled_together(program)
    assert (together(1), together(2)) == (-1, -2)
    assert order == ["lower 1", "compile", "compiled", "run 1", "run 2"]


LATE = """
import sys, time
import jax
from jax.sharding import NamedSharding, PartitionSpec as P
from lfm_jax.train import processes
from lfm_jax.train.launch import Launch

late, port = int(sys.argv[1]), sys.argv[2]
processes.join(Launch(coordinator=f"127.0.0.1:{port}", num_processes=2, process_id=late, devices_per_process=2))
mesh = jax.make_mesh((4,), ("data",))

def total(x):
    time.sleep(40 * late)  # While it is traced, as a compiler that takes long.
    return x.sum()

program = processes.compiled_together(jax.jit(total))
x = jax.make_array_from_callback((4,), NamedSharding(mesh, P("data")), lambda index: jax.numpy.arange(4.0)[index])
print(float(program(x)))
processes.barrier("end")
"""


@pytest.mark.long
def test_a_process_that_compiles_long_is_waited_for():
    """Adds the wait itself: 40 seconds, where Gloo by itself gives up after 30."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    crew = [subprocess.Popen([sys.executable, "-c", LATE, str(i), str(port)], stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True) for i in range(2)]
    ended = [finish(process) for process in crew]
    assert [(status, out.strip()) for status, out, _ in ended] == [(0, "6.0"), (0, "6.0")], ended


def test_one_process_needs_all_rows_over_its_mesh():
    with jax.set_mesh(MeshConfig().make()):
        place = BatchPlacer({"tokens": BatchArray()}, 4, 8)
        assert place.rows is None
        batch = {"tokens": np.arange(32, dtype=np.int32).reshape(4, 8)}
        assert np.array_equal(np.asarray(place(batch)["tokens"]), batch["tokens"])


def test_launch_flags_are_checked_together():
    assert HEARTBEAT_SECONDS <= 30
    with pytest.raises(ValueError, match="not valid") as error:
        Launch(processes=0, coordinator="here:1", distributed="auto", devices_per_process=-1)
    for part in ("processes is 0", "go together", "detects the coordinator", "devices_per_process is -1"):
        assert part in str(error.value)


def test_a_batch_that_does_not_divide_names_the_fields(corpus, tmp_path):
    config = load(recipe(corpus, tmp_path / "run", mesh__data=3))
    with pytest.raises(ValueError, match=r"data=3.* make"):
        train(config)


def test_built_shards_come_in_one_order_for_any_number_of_processes(corpus, tmp_path, cache, two):
    """Two processes begin, one goes on: the losses are those of one process from beginning to end."""
    build(BuildConfig(sources=(str(corpus),), out=str(tmp_path / "set"), tokenizer=str(two[0]), seq_len=32,
                      heldout_fraction=0.0, workers=1), show_progress=False)
    fields = dict(data__sources=[], data__mixture=[dict(path=str(tmp_path / "set"))], data__heldout_fraction=0.0,
                  optimizer__schedule="constant")
    for run_dir, steps, flags in (("one", 10, ()), ("shared", 6, TWO), ("shared", 10, ())):
        complete(path_of(corpus, tmp_path / run_dir, steps=steps, **fields), cache, *flags)
    one, shared = losses(tmp_path / "one"), losses(tmp_path / "shared")
    assert list(shared) == list(one) == list(range(1, 11))
    np.testing.assert_allclose(list(shared.values()), list(one.values()), rtol=1e-5)
    assert len({round(loss, 3) for loss in one.values()}) == 10  # Batches differ, so another order would show.


def test_a_cluster_is_detected(tmp_path):
    """Two processes that find each other as those of a Slurm step do, through `--distributed auto`."""
    script = (
        "import jax; from lfm_jax.train import processes; from lfm_jax.train.launch import Launch; "
        "processes.join(Launch(distributed='auto')); print(jax.process_index(), jax.process_count(), flush=True); "
        "processes.barrier('end')"
    )
    with socket.socket() as probe:  # JAX derives its port from the number of the job.
        probe.bind(("127.0.0.1", 0))
        job = probe.getsockname()[1]
    crew = [
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                         env=os.environ | {
                             "SLURM_JOB_ID": str(job), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2",
                             "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i), "JAX_PLATFORMS": "cpu",
                         })
        for i in range(2)
    ]
    said = [finish(process, 120) for process in crew]
    assert [(status, out.strip()) for status, out, _ in said] == [(0, "0 2"), (0, "1 2")], said


def test_a_stop_while_starting_leaves_no_process_behind(monkeypatch):
    """SIGTERM between the starts of two: the first is asked to end, the second is not started."""
    real = subprocess.Popen
    made = []

    def one_then_stop(*args, **kwargs):
        made.append(real(*args, **kwargs))
        os.kill(os.getpid(), signal.SIGTERM)
        return made[-1]

    monkeypatch.setattr(launch.subprocess, "Popen", one_then_stop)
    began = time.monotonic()
    status = launch.start([sys.executable, "-c", "import time; time.sleep(120)"], Launch(processes=2))
    assert status == STOPPED
    assert time.monotonic() - began < 60
    assert len(made) == 1
    assert made[0].returncode is not None


def test_who_must_be_killed_after_a_stop_was_not_lost(monkeypatch, capfd):
    """One ends when asked, the other does not listen and is killed: a stop all the same."""
    monkeypatch.setattr(launch, "GRACE_SECONDS", 1.0)
    script = (
        "import signal, sys, time\n"
        "me = int(sys.argv[-1])\n"
        "if me: signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    said = []
    real = launch._Crew._read

    def read(self, i, stream):
        for line in stream:
            said.append(line)
            if len(said) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
        return real(self, i, stream)

    monkeypatch.setattr(launch._Crew, "_read", read)
    assert launch.start([sys.executable, "-c", script], Launch(processes=2)) == STOPPED
    assert "was lost" not in capfd.readouterr().err


@pytest.mark.parametrize(("ends", "named"), [
    (("os.abort()", "time.sleep(1); sys.exit(75)"), "process 0 of 2 was lost: killed by signal 6"),
    (("sys.exit(75)", "time.sleep(1); sys.exit(9)"), "process 1 of 2 was lost: exit code 9"),
], ids=["all-bereft", "one-says-why"])
def test_who_is_named_as_lost(ends, named, capfd):
    """The first that does not just follow another, or else the first: the rest is what came of it."""
    script = f"import os, sys, time\nif sys.argv[-1] == '0': {ends[0]}\nelse: {ends[1]}\n"
    assert launch.start([sys.executable, "-c", script], Launch(processes=2)) == LOST
    assert named in capfd.readouterr().err
