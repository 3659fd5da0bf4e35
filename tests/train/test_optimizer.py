import jax
import numpy as np
import optax
import pytest
from flax import nnx
from optax.contrib import MuonDimensionNumbers

from lfm_jax import LFM
from lfm_jax.testing import tiny_model
from lfm_jax.train.optimizer import (
    OptimizerConfig,
    clip_by_global_norm,
    decay_mask,
    learning_rate,
    make_optimizer,
    muon_dimensions,
)


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


def test_bad_fields_are_listed_together():
    with pytest.raises(ValueError, match="not valid") as error:
        OptimizerConfig(b1=1.0, peak_lr=0.0, warmup_steps=-1, clip_norm=0.0, final_lr_fraction=2.0)
    for name in ("b1", "peak_lr", "warmup_steps", "clip_norm", "final_lr_fraction"):
        assert name in str(error.value)


def test_only_matrices_and_tables_decay():
    params = nnx.to_pure_dict(nnx.split(tiny_model(conv_bias=True), nnx.Param)[1])
    decayed = {
        jax.tree_util.keystr(path, simple=True, separator=".")
        for path, keep in jax.tree_util.tree_flatten_with_path(decay_mask(params))[0] if keep
    }
    assert {"embed", "blocks.0.operator.in_proj", "blocks.1.operator.q_proj", "blocks.0.feed_forward.w1"} <= decayed
    names = {path.split(".")[-1] for path in decayed}
    assert names == {"embed", "in_proj", "out_proj", "q_proj", "k_proj", "v_proj", "w1", "w2", "w3"}


@pytest.mark.parametrize("decay_all", [False, True])
def test_decay_moves_exactly_the_masked_leaves(decay_all):
    params = nnx.to_pure_dict(nnx.split(tiny_model(conv_bias=True), nnx.Param)[1])
    params = jax.tree.map(lambda x: x + 1.0, params)
    optimizer = make_optimizer(
        OptimizerConfig(peak_lr=0.1, schedule="constant", warmup_steps=0, weight_decay=0.5, decay_all=decay_all), 10
    )
    zeros = jax.tree.map(lambda x: 0.0 * x, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    moved = jax.tree.map(lambda u, p: bool(np.allclose(u, -0.05 * p)) and bool(np.any(u)), updates, params)
    want = jax.tree.map(lambda _: True, params) if decay_all else decay_mask(params)
    assert moved == want


def test_gradients_above_the_clip_norm_are_scaled_down():
    params = {"w1": np.ones(4, np.float32)}
    optimizer = make_optimizer(OptimizerConfig(clip_norm=1.0, schedule="constant", warmup_steps=0), 10)
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
    config = tiny_model(layer_types=("conv", "full_attention", "recurrence"), hidden_size=16, num_heads=4).config
    params = nnx.to_pure_dict(nnx.split(LFM(config, rngs=nnx.Rngs(0)), nnx.Param)[1])
    paths = {
        jax.tree_util.keystr(path, simple=True, separator=".")
        for path, dims in jax.tree_util.tree_flatten_with_path(
            muon_dimensions(params), is_leaf=lambda x: x is None or isinstance(x, MuonDimensionNumbers))[0] if dims
    }
    assert {path.split(".")[-1] for path in paths} == {
        "in_proj", "out_proj", "q_proj", "k_proj", "v_proj", "w1", "w2", "w3"
    }
    optimizer = make_optimizer(OptimizerConfig(algorithm="muon", peak_lr=1.0, warmup_steps=0, schedule="constant",
                                               weight_decay=0.0, clip_norm=1e9), 10)
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
