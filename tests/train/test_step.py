"""Dimensions: B rows, T time."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import torch
from flax import nnx

from lfm_jax.convert.hf import to_state_dict
from lfm_jax.testing import tiny_model
from lfm_jax.train.loss import LOSS_IGNORE, reference_cross_entropy
from lfm_jax.train.optimizer import OptimizerConfig, make_optimizer
from lfm_jax.train.step import batch_loss, compile_eval_step, compile_train_step, init_train_state

OPTIMIZER = OptimizerConfig(peak_lr=1e-2, warmup_steps=0, schedule="constant")


def split(model):
    graphdef, params = nnx.split(model, nnx.Param)
    return graphdef, nnx.to_pure_dict(params)


def packed_batch(B=4, T=16, vocab=97, seed=0):
    """Rows of two documents and some padding; each document's last token has no target."""
    rng = np.random.default_rng(seed)
    segment_ids = np.zeros((B, T), np.int32)
    for b in range(B):
        border, end = sorted(rng.choice(np.arange(2, T + 1), 2, replace=False))
        segment_ids[b, :border], segment_ids[b, border:end] = 1, 2
    tokens = rng.integers(1, vocab, (B, T), dtype=np.int32) * (segment_ids > 0)
    same = np.pad(segment_ids[:, 1:] == segment_ids[:, :-1], ((0, 0), (0, 1))) & (segment_ids > 0)
    targets = np.where(same, np.roll(tokens, -1, axis=1), LOSS_IGNORE)
    starts = np.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    positions = np.arange(T) - np.maximum.accumulate(np.where(starts, np.arange(T), 0), axis=1)
    batch = dict(tokens=tokens, targets=targets, segment_ids=segment_ids, positions=positions)
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.int32), batch)


@pytest.mark.slow
def test_loss_of_a_packed_batch_equals_that_of_its_documents_alone():
    model = tiny_model()
    batch = packed_batch()
    loss, count = jax.jit(lambda p, b: batch_loss(split(model)[0], p, b, 7))(split(model)[1], batch)
    total, targets = 0.0, 0
    for b in range(4):
        for document in (1, 2):
            keep = np.asarray(batch["segment_ids"][b]) == document
            hidden, _ = model(batch["tokens"][b][keep][None], logits=None)
            one, n = reference_cross_entropy(hidden, model.head_VD, batch["targets"][b][keep][None])
            total, targets = total + float(one), targets + int(n)
    assert int(count) == targets
    np.testing.assert_allclose(float(loss), total, rtol=1e-5)


@pytest.mark.slow
def test_micro_batches_change_nothing_but_rounding():
    graphdef, params = split(tiny_model())
    optimizer = make_optimizer(OPTIMIZER, 10)
    results = []
    for micro_batches in (1, 2, 4):
        step = compile_train_step(graphdef, optimizer, micro_batches=micro_batches, loss_chunk=8)
        state = init_train_state(jax.tree.map(jnp.copy, params), optimizer)
        state, metrics = step(state, packed_batch())
        results.append((metrics, state.opt_state))
    for metrics, opt_state in results[1:]:
        for name, value in results[0][0].items():
            np.testing.assert_allclose(metrics[name], value, rtol=1e-5)
        for a, b in zip(jax.tree.leaves(opt_state), jax.tree.leaves(results[0][1]), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5 * max(float(jnp.abs(b).max()), 1e-12))


def test_training_learns_and_counts_steps():
    graphdef, params = split(tiny_model(init_std=0.02))
    optimizer = make_optimizer(OPTIMIZER, 30)
    step = compile_train_step(graphdef, optimizer)
    state, batch, losses = init_train_state(params, optimizer), packed_batch(), []
    for _ in range(30):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert int(state.step) == 30
    assert losses[0] == pytest.approx(np.log(97), rel=0.05)
    assert losses[-1] < 0.5 * losses[0]
    loss, count = compile_eval_step(graphdef)(state.params, batch)
    assert float(loss / count) < losses[-1]


def test_bf16_compute_keeps_float32_parameters_and_moments():
    graphdef, params = split(tiny_model(dtype="bfloat16"))
    optimizer = make_optimizer(OPTIMIZER, 10)
    state, metrics = compile_train_step(graphdef, optimizer)(init_train_state(params, optimizer), packed_batch())
    floats = [x.dtype for x in jax.tree.leaves((state, metrics)) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert set(floats) == {jnp.dtype("float32")}
    assert np.isfinite(float(metrics["loss"]))


@pytest.mark.slow
def test_equals_transformers_and_torch_adamw():
    """Loss, gradient norm and parameters after three of our own steps against PyTorch's."""
    hf = oracle.hf_model(oracle.hf_config(**oracle.CASES["hybrid"]), "loud")
    graphdef, params = oracle.ours(hf)
    lr, decay, clip = 1e-3, 0.1, 1.0
    optimizer = make_optimizer(OptimizerConfig(peak_lr=lr, warmup_steps=0, schedule="constant", weight_decay=decay,
                                               decay_all=True, clip_norm=clip), 10)
    step, state = compile_train_step(graphdef, optimizer, loss_chunk=16), init_train_state(params, optimizer)
    theirs = torch.optim.AdamW(hf.parameters(), lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=decay)
    rng = np.random.default_rng(0)
    for _ in range(3):
        tokens = rng.integers(1, hf.config.vocab_size, (2, 25), dtype=np.int32)
        ones = np.ones((2, 24), np.int32)
        state, metrics = step(state, {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": ones,
                                      "positions": ones * np.arange(24, dtype=np.int32)})
        ids = torch.tensor(tokens, dtype=torch.long)
        theirs.zero_grad()
        loss = torch.nn.functional.cross_entropy(hf(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(hf.parameters(), clip)
        theirs.step()
        np.testing.assert_allclose(float(metrics["loss"]), loss.item(), rtol=1e-5)
        np.testing.assert_allclose(float(metrics["grad_norm"]), norm.item(), rtol=1e-4)
    ours = to_state_dict(nnx.merge(graphdef, state.params))
    for name, p in hf.named_parameters():
        difference = np.abs(ours[name] - p.detach().numpy())
        # Where a gradient is no more than rounding, Adam still takes a whole step of either sign.
        assert np.mean(difference > 0.05 * lr) < 0.01, name
