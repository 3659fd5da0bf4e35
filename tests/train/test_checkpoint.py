import os
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lfm_jax.train.checkpoint import CheckpointManager
from lfm_jax.train.state import Guard, TrainState


def state(value, size=2_000_000):
    guard = Guard(jnp.float32(value), jnp.int32(value), jnp.int32(0))
    return TrainState({"embed": jnp.full((size,), value)}, {}, (jnp.full((size,), -value), {}), jnp.int32(value), guard)


def test_a_save_under_way_is_not_touched_by_the_steps_that_follow(tmp_path):
    """Saves are asynchronous and steps reuse the memory of the state they are given."""
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    manager = CheckpointManager(tmp_path, keep=3)
    current = state(1.0)
    for n in (1, 2, 3):
        manager.save(n, current, {"next": n}, {"steps": 3})
        for _ in range(5):
            current = step(current)
    manager.close()
    manager = CheckpointManager(tmp_path, keep=3)
    for n in (1, 2, 3):
        restored, data = manager.restore(jax.eval_shape(lambda: state(0.0)), n)
        assert data == {"next": n}
        assert np.all(np.asarray(restored.params["embed"]) == 1.0 + 5 * (n - 1))
        assert int(restored.step) == 1 + 5 * (n - 1)
    manager.close()


def test_only_the_latest_are_kept_and_parameters_load_alone(tmp_path):
    manager = CheckpointManager(tmp_path, keep=2)
    assert manager.latest_step() is None
    for n in (1, 2, 3):
        manager.save(n, state(float(n), size=8), {}, {"n": n})
    manager.save(3, state(9.0, size=8), {}, {"n": 9})  # A step that is saved already is left alone.
    manager.close()
    reader = CheckpointManager(tmp_path, keep=None)
    assert reader.latest_step() == 3
    assert reader.metadata()["config"] == {"n": 3}
    params = reader.restore_params({"embed": jax.ShapeDtypeStruct((8,), "float32")})
    assert np.all(np.asarray(params["embed"]) == 3.0)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]
    reader.close()


@pytest.fixture
def two_saved(tmp_path):
    """A manager of checkpoints 1 and 2."""
    manager = CheckpointManager(tmp_path, keep=2)
    for n in (1, 2):
        manager.save(n, state(float(n), size=1000), {"next": n}, {})
    manager.wait()
    yield manager
    manager.close()


def files(directory):
    """Files by their path without names that differ each time."""
    return sorted(path for path in directory.rglob("*") if path.is_file())


HOW = {"half": lambda path: os.truncate(path, path.stat().st_size // 2), "gone": lambda path: path.unlink()}


@pytest.mark.parametrize("how", HOW)
def test_any_file_cut_or_gone_is_noticed_or_changes_nothing(two_saved, tmp_path, how):
    """Of every file of the latest checkpoint: it cannot be read and the one before is, or it is read the same."""
    latest = tmp_path / "checkpoints" / "2"
    abstract = jax.eval_shape(lambda: state(0.0, size=1000))
    noticed = 0
    shutil.copytree(latest, tmp_path / "spare")
    for path in files(latest):
        HOW[how](path)
        found = two_saved.restore_latest(abstract)
        assert found.step in (1, 2)
        assert set(found.damaged) == {2} - {found.step}
        want = state(float(found.step), size=1000)
        assert jax.tree.all(jax.tree.map(np.array_equal, found.state, want)), path
        assert found.data == {"next": found.step}
        noticed += found.step == 1
        shutil.rmtree(latest)
        shutil.copytree(tmp_path / "spare", latest)
    assert noticed >= 6


def test_a_damaged_checkpoint_set_aside_makes_room_for_a_new_one(two_saved, tmp_path):
    assert two_saved.set_aside(2) == tmp_path / "damaged" / "2"
    assert two_saved.steps() == [1]
    two_saved.save(2, state(5.0, size=1000), {}, {})
    two_saved.wait()
    assert two_saved.set_aside(2) == tmp_path / "damaged" / "2-2"
    assert (tmp_path / "damaged" / "2").is_dir()


def test_a_save_returns_before_it_is_done(tmp_path, monkeypatch):
    """It comes back while its end is held up."""
    manager = CheckpointManager(tmp_path, keep=2)
    orbax, gate = manager._checkpointer._manager, threading.Event()
    finalize = orbax._wait_for_checkpointers
    monkeypatch.setattr(orbax, "_wait_for_checkpointers", lambda: (gate.wait(60), finalize()))
    manager.save(1, state(1.0), {}, {})
    manager.check()  # Nothing has failed, and nothing is waited for.
    assert not (tmp_path / "checkpoints" / "1").is_dir()
    gate.set()
    manager.close()
    assert (tmp_path / "checkpoints" / "1").is_dir()
