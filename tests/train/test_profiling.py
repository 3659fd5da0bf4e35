"""Steps named by --profile leave an xprof trace with the scopes of the network in it."""

import jax
import jax.numpy as jnp
import pytest
from helpers import optimizer_for

from lfm_jax.pretrain.objective import next_token_training
from lfm_jax.train.profiling import Profiler, parse_profile


def test_steps_are_parsed():
    assert parse_profile("10-12", 12) == range(10, 13)
    assert parse_profile("steps=3-3", 12) == range(3, 4)
    assert parse_profile(" 7 ", 12) == range(7, 8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "profile is ''; give the steps to trace, for example 10-12"),
        ("ten", "give the steps to trace"),
        ("5:7", "give the steps to trace"),
        ("0-3", "steps count from 1"),
        ("7-5", "must not be behind the last"),
        ("10-13", "'10-13', but the run has 12 steps"),
    ],
)
def test_steps_that_make_no_sense_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_profile(text, 12)


class Steps:
    """A loop whose step is a small jitted function."""

    def __init__(self, profiler):
        self.profiler, self.state, self.ended = profiler, jnp.zeros(4), []

        @jax.jit
        def train_step(state):
            with jax.named_scope("layer_0"):
                return jnp.sin(state) + 1

        self.train_step = train_step

    def run(self, first, last):
        for number in range(first, last + 1):
            with self.profiler.step(number):
                self.state = self.train_step(self.state)
            if self.profiler.after(number, self.state):
                self.ended.append(number)


def traces(run_dir):
    return list((run_dir / "profile").rglob("*.xplane.pb"))


def test_only_the_named_steps_are_traced(tmp_path):
    loop = Steps(Profiler(range(3, 5), tmp_path))
    loop.run(1, 2)
    assert not (tmp_path / "profile").exists()
    loop.run(3, 6)
    assert loop.ended == [4]
    (trace,) = traces(tmp_path)
    content = trace.read_bytes()
    assert b"layer_0" in content
    assert b"step_num" in content


def test_a_run_stopped_within_its_trace_still_writes_it_and_a_resumed_one_begins_late(tmp_path):
    loop = Steps(Profiler(range(3, 9), tmp_path))
    loop.run(5, 6)
    loop.profiler.close()
    assert len(traces(tmp_path)) == 1
    assert loop.ended == []
    loop.profiler.close()  # Nothing is going on any more.


def test_without_steps_nothing_is_traced(tmp_path):
    loop = Steps(Profiler(None, tmp_path))
    loop.run(1, 3)
    loop.profiler.close()
    assert list(tmp_path.iterdir()) == []


def test_the_trace_of_a_training_step_names_its_parts(tmp_path):

    from lfm_jax.testing import tiny_config
    from lfm_jax.train.optimizer import OptimizerConfig

    config = tiny_config(layer_types=("conv", "full_attention"))
    optimizer = optimizer_for(config, OptimizerConfig(warmup_steps=1))
    training = next_token_training(config, optimizer)
    step, state = training.compiled_step(), training.random_state(0)
    ones = jnp.ones((2, 8), jnp.int32)
    batch = {"tokens": ones, "targets": ones, "segment_ids": ones, "positions": ones * jnp.arange(8)}
    profiler = Profiler(range(2, 3), tmp_path)
    for number in (1, 2):
        with profiler.step(number):
            state, metrics = step(state, batch)
        profiler.after(number, metrics)
    (trace,) = traces(tmp_path)
    content = trace.read_bytes()
    last = config.num_layers - 1
    scopes = ("jvp(layer_0)/operator/conv/", f"transpose(jvp(layer_{last}))/feed_forward/", "jvp(loss)/", "/optimizer/")
    for scope in scopes:
        assert scope.encode() in content, scope
