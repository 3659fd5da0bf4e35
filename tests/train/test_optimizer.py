import dataclasses

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from optax.contrib import MuonDimensionNumbers

from lfm_jax import LFM
from lfm_jax.feed_forward.swiglu import SwiGLU
from lfm_jax.kinds import FEED_FORWARDS
from lfm_jax.layers import OUT_IN, Traits
from lfm_jax.model import param_traits
from lfm_jax.testing import tiny_config
from lfm_jax.train.optimizer import (
    OptimizerConfig,
    clip_by_global_norm,
    decay_mask,
    learning_rate,
    make_optimizer,
    muon_dimensions,
)

MUON = OptimizerConfig(algorithm="muon", peak_lr=1.0, warmup_steps=0, schedule="constant", weight_decay=0.0,
                       clip_norm=1e9)


def lr(config, steps):
    schedule = learning_rate(config, steps)
    return [float(schedule(s)) for s in range(steps + 1)]


def test_wsd_rises_holds_and_falls_linearly():
    values = lr(OptimizerConfig(peak_lr=1.0, warmup_steps=10, decay_steps=20, final_lr_fraction=0.1), 100)
    np.testing.assert_allclose(values[:11], np.arange(11) / 10, atol=1e-6)
    np.testing.assert_allclose(values[10:81], 1.0)
    np.testing.assert_allclose(values[80:], np.linspace(1.0, 0.1, 21), rtol=1e-5)


def test_wsd_decays_over_a_fifth_by_default():
    values = lr(OptimizerConfig(peak_lr=1.0, warmup_steps=0), 50)
    assert values[40] == pytest.approx(1.0)
    assert values[41] < 1.0
    assert values[50] == pytest.approx(0.1)


def test_cosine_and_constant():
    cosine = lr(OptimizerConfig(peak_lr=2.0, schedule="cosine", warmup_steps=10, final_lr_fraction=0.5), 110)
    assert cosine[10] == pytest.approx(2.0)
    assert cosine[60] == pytest.approx(1.5)
    assert cosine[110] == pytest.approx(1.0)
    assert lr(OptimizerConfig(peak_lr=2.0, schedule="constant", warmup_steps=4), 8)[4:] == [2.0] * 5


def test_warmup_and_decay_longer_than_the_run_are_refused():
    with pytest.raises(ValueError, match="exceed the run's 10 steps"):
        learning_rate(OptimizerConfig(warmup_steps=9, decay_steps=9), 10)


def test_steps_that_are_not_known_yet_have_no_schedule():
    assert learning_rate(OptimizerConfig(peak_lr=0.5, warmup_steps=9, decay_steps=9), 0)(0) == 0.5


def test_bad_fields_are_listed_together():
    with pytest.raises(ValueError, match="not valid") as error:
        OptimizerConfig(b1=1.0, peak_lr=0.0, warmup_steps=-1, clip_norm=0.0, final_lr_fraction=2.0)
    for name in ("b1", "peak_lr", "warmup_steps", "clip_norm", "final_lr_fraction"):
        assert name in str(error.value)


def weights_of(**changes):
    config = tiny_config(**changes)
    weights = nnx.to_pure_dict(nnx.split(LFM(config, rngs=nnx.Rngs(0)), nnx.Param)[1])
    return weights, param_traits(config)


def paths_of(tree):
    """The dotted names of the leaves that are true; dimension numbers are leaves."""

    def is_leaf(x):
        return x is None or isinstance(x, MuonDimensionNumbers)

    return {jax.tree_util.keystr(path, simple=True, separator=".")
            for path, leaf in jax.tree.leaves_with_path(tree, is_leaf=is_leaf) if leaf}


EVERY = dict(layer_types=("conv", "full_attention", "recurrence"), conv_bias=True, tie_embedding=False)


def test_only_matrices_and_tables_decay():
    decayed = paths_of(decay_mask(*weights_of(**EVERY)))
    assert {"embed", "blocks.0.operator.in_proj", "blocks.1.operator.q_proj", "blocks.0.feed_forward.w1"} <= decayed
    names = {path.split(".")[-1] for path in decayed}
    assert names == {"embed", "head", "in_proj", "out_proj", "q_proj", "k_proj", "v_proj", "w1", "w2", "w3"}


@pytest.mark.parametrize("decay_all", [False, True])
def test_decay_moves_exactly_the_masked_leaves(decay_all):
    params, traits = weights_of(conv_bias=True)
    params = jax.tree.map(lambda x: x + 1.0, params)
    optimizer = make_optimizer(
        OptimizerConfig(peak_lr=0.1, schedule="constant", warmup_steps=0, weight_decay=0.5, decay_all=decay_all), 10,
        traits,
    )
    zeros = jax.tree.map(lambda x: 0.0 * x, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    moved = jax.tree.map(lambda u, p: bool(np.allclose(u, -0.05 * p)) and bool(np.any(u)), updates, params)
    want = jax.tree.map(lambda _: True, params) if decay_all else decay_mask(params, traits)
    assert moved == want


def test_gradients_above_the_clip_norm_are_scaled_down():
    params = {"w1": np.ones(4, np.float32)}
    traits = {"w1": Traits((None,), decay=False, matrix=None)}
    optimizer = make_optimizer(OptimizerConfig(clip_norm=1.0, schedule="constant", warmup_steps=0), 10, traits)
    big = {"w1": np.full(4, 100.0, np.float32)}
    unit = {"w1": np.full(4, 0.5, np.float32)}
    moments = [
        optax.tree.get(optimizer.update(g, optimizer.init(params), params)[1], "mu")["w1"] for g in (big, unit)
    ]
    np.testing.assert_allclose(moments[0], moments[1], rtol=1e-6)


@pytest.mark.parametrize("limit", [0.5, 1e3])
def test_clipping_is_that_of_optax(limit):
    grads = {"a": np.arange(6.0, dtype=np.float32).reshape(2, 3), "b": np.ones(4, np.float32)}
    ours, theirs = (clip.update(grads, clip.init(grads))[0]
                    for clip in (clip_by_global_norm(limit), optax.clip_by_global_norm(limit)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, theirs)
    zeros = jax.tree.map(np.zeros_like, grads)
    assert not np.any(clip_by_global_norm(limit).update(zeros, optax.EmptyState())[0]["a"])


def test_muon_orthogonalises_matrices_between_activations_and_nothing_else():
    params, traits = weights_of(**EVERY, hidden_size=16, num_heads=4)
    paths = paths_of(muon_dimensions(params, traits))
    assert {path.split(".")[-1] for path in paths} == {
        "in_proj", "out_proj", "q_proj", "k_proj", "v_proj", "w1", "w2", "w3"
    }
    optimizer = make_optimizer(MUON, 10, traits)
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda w: rng.standard_normal(w.shape).astype(np.float32), params)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    operators = [updates["blocks"][i]["operator"] for i in range(3)]
    matrices = [operators[0]["in_proj"][1], operators[0]["out_proj"], operators[1]["q_proj"].reshape(-1, 16),
                operators[1]["out_proj"].reshape(16, -1), updates["blocks"][0]["feed_forward"]["w1"]]
    for update in matrices:  # All singular values about the same, of the size of an AdamW step.
        values = np.linalg.svd(np.asarray(update), compute_uv=False)
        assert values.max() / values.min() < 2
        assert 0.1 < np.sqrt(np.mean(np.square(update))) < 0.3
    np.testing.assert_allclose(np.abs(updates["embed"]), 1.0, rtol=1e-3)  # Adam's first step.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Halves:
    """A weight of two arrays."""

    first: jax.Array
    second: jax.Array


def test_weights_that_are_pytrees_and_trees_that_lack_some():
    """Each leaf of a weight follows its traits, but is no matrix of Muon's; names that are gone are not missed."""
    rng = np.random.default_rng(0)
    w1, w2, w3 = (rng.standard_normal((3, 4)).astype(np.float32) for _ in range(3))
    traits = {name: Traits((None, None), decay=name != "w3", matrix=OUT_IN) for name in ("w1", "w2", "w3", "gone")}
    params = {"w1": w1, "w2": Halves(w2[:1], w2[1:]), "w3": Halves(w3, w3)}
    assert paths_of(decay_mask(params, traits)) == {"w1", "w2.first", "w2.second"}
    assert paths_of(muon_dimensions(params, traits)) == {"w1"}
    optimizer = make_optimizer(MUON, 10, traits)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    np.testing.assert_allclose(np.abs(updates["w2"].second), 1.0, rtol=1e-3)  # Adam's first step.
    values = np.linalg.svd(updates["w1"], compute_uv=False)
    assert values.max() / values.min() < 2


def test_a_parameter_without_traits_is_named():
    class Bare(SwiGLU):
        def __init__(self, config, *, rngs):
            super().__init__(config, rngs=rngs)
            self.w1 = nnx.Param(self.w1[...])

    FEED_FORWARDS.register(dataclasses.replace(FEED_FORWARDS["swiglu"], name="bare", module=Bare))
    try:
        with pytest.raises(TypeError, match=r"blocks\.1\.feed_forward\.w1 have no traits; make parameters with"):
            param_traits(tiny_config(layer_types=("conv", "conv"), ffn_types=("swiglu", "bare")))
    finally:
        FEED_FORWARDS.remove("bare")


def test_warmup_may_be_a_share_of_the_run():
    share, steps = OptimizerConfig(warmup_steps=0, warmup_fraction=0.25), OptimizerConfig(warmup_steps=10)
    for step in (0, 3, 9, 10, 39):
        assert learning_rate(share, 40)(step) == learning_rate(steps, 40)(step)
    with pytest.raises(ValueError, match=r"warmup_fraction is 1.5; it must lie in \[0, 1\]"):
        OptimizerConfig(warmup_fraction=1.5)
