import jax
import jax.numpy as jnp
import numpy as np

from lfm_jax.train.checkpoint import CheckpointManager
from lfm_jax.train.step import TrainState


def state(value, size=2_000_000):
    return TrainState({"embed": jnp.full((size,), value)}, (jnp.full((size,), -value), {}), jnp.int32(value))


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
