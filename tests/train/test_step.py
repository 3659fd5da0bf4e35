"""Dimensions: B rows, T time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import torch
from flax import nnx
from helpers import optimizer_for, reference_cross_entropy

from lfm_jax.convert.hf import to_state_dict
from lfm_jax.data.batch import LOSS_IGNORE
from lfm_jax.pretrain.objective import next_token_training
from lfm_jax.testing import tiny_config, tiny_model
from lfm_jax.train.optimizer import OptimizerConfig
from lfm_jax.train.state import Guard
from lfm_jax.train.step import GuardConfig

OPTIMIZER = OptimizerConfig(peak_lr=1e-2, warmup_steps=0, schedule="constant")


def split(model):
    return model.config, nnx.to_pure_dict(nnx.split(model, nnx.Param)[1])


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


def test_loss_of_a_packed_batch_equals_that_of_its_documents_alone():
    model = tiny_model()
    batch = packed_batch()
    config, params = split(model)
    training = next_token_training(config, optimizer_for(config, OPTIMIZER), loss_chunk=7)
    sums, count = training.compiled_evaluate()((params, {}), batch)
    loss = sums["loss"]
    total, targets = 0.0, 0
    for b in range(4):
        for document in (1, 2):
            keep = np.asarray(batch["segment_ids"][b]) == document
            hidden, _ = model(batch["tokens"][b][keep][None], logits=None)
            expected = batch["targets"][b][keep][None]
            total += float(reference_cross_entropy(hidden, model.head_VD, expected))
            targets += int(np.sum(expected != LOSS_IGNORE))
    assert int(count) == targets
    np.testing.assert_allclose(float(loss), total, rtol=1e-5)


def test_micro_batches_change_nothing_but_rounding():
    config, params = split(tiny_model())
    optimizer = optimizer_for(config, OPTIMIZER)
    results = []
    for micro_batches in (1, 2, 4):
        training = next_token_training(config, optimizer, micro_batches=micro_batches, loss_chunk=8)
        step = training.compiled_step()
        state = training.new_state(jax.tree.map(jnp.copy, params))
        state, metrics = step(state, packed_batch())
        results.append((metrics, state.opt_state))
    for metrics, opt_state in results[1:]:
        for name, value in results[0][0].items():
            np.testing.assert_allclose(metrics[name], value, rtol=1e-5)
        for a, b in zip(jax.tree.leaves(opt_state), jax.tree.leaves(results[0][1]), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5 * max(float(jnp.abs(b).max()), 1e-12))


def test_training_learns_and_counts_steps():
    config, params = split(tiny_model(init_std=0.02))
    optimizer = optimizer_for(config, OPTIMIZER, 30)
    training = next_token_training(config, optimizer)
    step = training.compiled_step()
    state, batch, losses = training.new_state(params), packed_batch(), []
    for _ in range(30):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert int(state.step) == 30
    assert losses[0] == pytest.approx(np.log(97), rel=0.05)
    assert losses[-1] < 0.5 * losses[0]
    sums, count = training.compiled_evaluate()((state.params, state.frozen), batch)
    assert float(sums["loss"] / count) < losses[-1]


def test_an_update_that_is_not_finite_is_skipped_to_the_bit_and_the_next_is_made():
    config, params = split(tiny_model())
    optimizer = optimizer_for(config, OPTIMIZER)
    training = next_token_training(config, optimizer)
    step = training.compiled_step()
    state, metrics = step(training.new_state(params), packed_batch())
    assert (metrics["skipped"], metrics["skipped_in_row"]) == (0, 0)
    before = jax.tree.map(np.asarray, state)
    scale = before.params["norm"]["weight"]
    broken = dataclasses.replace(state, params=state.params | {"norm": {"weight": scale * np.inf}})
    for in_row in (1, 2):
        broken, metrics = step(broken, packed_batch())
        assert (metrics["skipped"], metrics["skipped_in_row"]) == (1, in_row)
    assert int(broken.step) == 3
    assert int(broken.guard.made) == 1
    for a, b in zip(jax.tree.leaves(broken.opt_state), jax.tree.leaves(before.opt_state), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(broken.params["embed"], before.params["embed"])
    assert float(broken.guard.mean_norm) == before.guard.mean_norm
    mended = dataclasses.replace(broken, params=broken.params | {"norm": {"weight": jnp.asarray(scale)}})
    state, metrics = step(mended, packed_batch())
    assert (metrics["skipped"], metrics["skipped_in_row"], int(state.guard.made)) == (0, 0, 2)


def test_a_spike_is_skipped_once_the_mean_is_trusted():
    config, params = split(tiny_model())
    optimizer = optimizer_for(config, OPTIMIZER)
    fresh = next_token_training(config, optimizer).new_state(params)
    steps = {
        spike: next_token_training(config, optimizer, guard=GuardConfig(spike=spike)).compiled_step()
        for spike in (10, 0)
    }
    norm = float(steps[10](jax.tree.map(jnp.copy, fresh), packed_batch())[1]["grad_norm"])
    for made, factor, spike, skipped in ((100, 11, 10, 1), (100, 9, 10, 0), (99, 11, 10, 0), (100, 11, 0, 0)):
        guard = Guard(jnp.float32(norm / factor), jnp.int32(made), jnp.int32(0))
        state = dataclasses.replace(jax.tree.map(jnp.copy, fresh), guard=guard)
        assert steps[spike](state, packed_batch())[1]["skipped"] == skipped


def test_without_segment_ids_a_row_is_one_document():
    config, params = split(tiny_model())
    batch = packed_batch() | {"segment_ids": jnp.ones((4, 16), jnp.int32)}
    optimizer = optimizer_for(config, OPTIMIZER)
    results = []
    for ids, micro_batches in ((batch["segment_ids"], 1), (None, 1), (None, 2)):
        training = next_token_training(config, optimizer, micro_batches=micro_batches)
        step = training.compiled_step()
        state = training.new_state(jax.tree.map(jnp.copy, params))
        results.append(step(state, batch | {"segment_ids": ids})[1])
    for metrics in results[1:]:
        for name, value in results[0].items():
            np.testing.assert_allclose(metrics[name], value, rtol=1e-5)


def test_a_step_holds_one_gradient_beside_the_state():
    """With few tokens, temporaries are a gradient and little more; the new state takes the place of the old one."""
    config = tiny_config(hidden_size=128, ffn_size=512, vocab_size=2048)
    optimizer = optimizer_for(config, OPTIMIZER)
    training = next_token_training(config, optimizer)
    state = training.abstract_state()
    batch = {name: jax.ShapeDtypeStruct((1, 8), jnp.int32) for name in packed_batch()}
    memory = training.compiled_step().lower(state, batch).compile().memory_analysis()
    size = 4 * config.num_params()
    assert memory.alias_size_in_bytes >= 3 * size
    assert memory.temp_size_in_bytes < 1.5 * size


def test_norms_by_kind_are_those_of_the_parts():
    model = tiny_model()
    config, params = split(model)
    batch = packed_batch()
    training = next_token_training(config, optimizer_for(config, OPTIMIZER))
    _, metrics = training.compiled_step()(training.new_state(jax.tree.map(jnp.copy, params)), batch)
    by_kind = {name: float(x) for name, x in metrics.items() if name.startswith("grad_norm/")}
    assert set(by_kind) == {f"grad_norm/{k}" for k in ("conv", "full_attention", "feed_forward", "norm", "table")}
    assert sum(x**2 for x in by_kind.values()) ** 0.5 == pytest.approx(float(metrics["grad_norm"]), rel=1e-5)
    # The operators' outputs, caught by hand.
    real = np.asarray(batch["segment_ids"]) != 0
    x = model.embed[...][batch["tokens"]]
    squares = {}
    for block, kind in zip(model.blocks, model.config.layer_types, strict=True):
        how = dict(positions_BT=batch["positions"], segment_ids_BT=batch["segment_ids"], state=None)
        y, _ = block.operator(block.operator_norm(x), **how)
        squares.setdefault(kind, []).append(np.mean(np.square(y), axis=-1)[real].mean())
        x += y
        y, _ = block.feed_forward(block.ffn_norm(x), segment_ids_BT=None)
        squares.setdefault("feed_forward", []).append(np.mean(np.square(y), axis=-1)[real].mean())
        x += y
    for kind, values in squares.items():
        assert float(metrics[f"act_norm/{kind}"]) == pytest.approx(np.mean(values) ** 0.5, rel=1e-4)


def test_bf16_parameters_with_micro_batches():
    config, params = split(tiny_model(dtype="bfloat16", param_dtype="bfloat16"))
    optimizer = optimizer_for(config, OPTIMIZER)
    training = next_token_training(config, optimizer, micro_batches=2)
    fresh = training.new_state(params)
    step = training.compiled_step()
    state, metrics = step(jax.tree.map(jnp.copy, fresh), packed_batch())
    assert jax.tree.map(lambda x: x.dtype, state) == jax.tree.map(lambda x: x.dtype, fresh)
    assert np.isfinite(float(metrics["loss"]))


def test_bf16_compute_keeps_float32_parameters_and_moments():
    config, params = split(tiny_model(dtype="bfloat16"))
    optimizer = optimizer_for(config, OPTIMIZER)
    training = next_token_training(config, optimizer)
    state, metrics = training.compiled_step()(training.new_state(params), packed_batch())
    floats = [x.dtype for x in jax.tree.leaves((state, metrics)) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert set(floats) == {jnp.dtype("float32")}
    assert np.isfinite(float(metrics["loss"]))


def test_equals_transformers_and_torch_adamw():
    """Loss, gradient norm and parameters after three of our own steps against PyTorch's."""
    hf = oracle.hf_model(oracle.hf_config(**oracle.CASES["hybrid"]), "loud")
    graphdef, params = oracle.ours(hf)
    config = nnx.merge(graphdef, params).config
    lr, decay, clip = 1e-3, 0.1, 1.0
    optimizer = optimizer_for(config, OptimizerConfig(peak_lr=lr, warmup_steps=0, schedule="constant",
                                                      weight_decay=decay, decay_all=True, clip_norm=clip))
    training = next_token_training(config, optimizer, loss_chunk=16)
    step, state = training.compiled_step(), training.new_state(params)
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
