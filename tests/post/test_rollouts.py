"""Rollouts: engine and trainer have one set of numbers, and what is learnt is what was sampled."""

import functools
import json

import jax
import numpy as np
import pytest
from flax import nnx

from lfm_jax.engine.config import EngineConfig
from lfm_jax.engine.engine import Engine
from lfm_jax.engine.request import Request
from lfm_jax.kernels.logprobs import token_logprobs
from lfm_jax.post.answers import Answer, PolicyGradient, rows_of
from lfm_jax.post.rollouts import Samples
from lfm_jax.sampling import Sampling
from lfm_jax.testing import tiny_model

V, T, CHUNK = 97, 128, 16
TEMPERATURE = 0.7
TEXT = "a\u2028b\u2029c\x85d\r\n"
"""What Unicode takes for ends of lines, of which JSON leaves some as they are."""


@functools.cache
def model(seed=0):
    return tiny_model(seed, vocab_size=V, layer_types=("conv", "full_attention"))


def weights(seed):
    return nnx.to_pure_dict(nnx.split(model(seed), nnx.Param)[1])


def answers(engine, seed):
    """Groups of answers to prompts of all lengths, of which many begin alike."""
    rng = np.random.default_rng(seed)
    shared = rng.integers(0, V, 48).tolist()
    prompts = [[*shared[: rng.choice([0, 16, 33, 48])], *rng.integers(0, V, rng.integers(1, 40)).tolist()]
               for _ in range(24)]
    groups = engine.complete([
        Request(prompt=prompt, max_new_tokens=int(rng.integers(1, 36)), n=3, stop_ids=(3, 5), logprobs=0,
                sampling=Sampling(temperature=TEMPERATURE, seed=i)) for i, prompt in enumerate(prompts)
    ])
    return [Answer([*prompt, *one.tokens], len(prompt), [x.logprob for x in one.logprobs], 1.0, True)
            for prompt, group in zip(prompts, groups, strict=True) for one in group]


@functools.cache
def trainer():
    """(mean, largest) mismatch of rows of one answer each."""
    graphdef, _ = nnx.split(model(), nnx.Param)
    objective = PolicyGradient(temperature=TEMPERATURE, loss_chunk=100)

    def mismatch(weights, batch):
        terms = objective(nnx.merge(graphdef, weights), batch)
        return terms.sums["mismatch/mean"] / objective.weight(batch), terms.largest["mismatch/max"]

    return jax.jit(mismatch)


@functools.cache
def packed_trainer():
    graphdef, _ = nnx.split(model(), nnx.Param)

    def logprobs(weights, tokens_BT, segment_ids_BT, targets_BT):
        found = nnx.merge(graphdef, weights)
        hidden_BTD, _ = found.hidden(tokens_BT, None, segment_ids_BT)
        return token_logprobs(hidden_BTD, found.head_VD, targets_BT, temperature=TEMPERATURE)

    return jax.jit(logprobs)


def packed(found, rows):
    """tokens, segment_ids, targets, behaviour: several answers with their prompts in each row."""
    arrays = [np.full((rows, 4 * T), fill, dtype) for fill, dtype in ((0, "i4"), (0, "i4"), (-1, "i4"), (0, "f4"))]
    used, documents = [0] * rows, [0] * rows
    for answer in found:
        row = used.index(min(used))
        documents[row] += 1
        n = len(answer.ids) - 1
        of_row = [x[row, used[row] : used[row] + n] for x in arrays]
        of_row[0][:], of_row[1][:] = answer.ids[:-1], documents[row]
        of_row[2][answer.prompt - 1 :], of_row[3][answer.prompt - 1 :] = answer.ids[answer.prompt :], answer.logprobs
        used[row] += n
    return arrays


@pytest.mark.parametrize("cache_bytes", [0, 1 << 20])
def test_the_engine_and_the_trainer_agree_on_every_token(cache_bytes):
    """In padded rows and in packed ones, over groups, the prefix cache, and weights that are handed over."""
    engine = Engine(model(), EngineConfig(slots=((6, T),), chunk=CHUNK, max_logprobs=1, logprobs_of="sampled",
                                          prefix_cache_bytes=cache_bytes))
    for seed in (0, 1):
        engine.use(weights(seed))
        found = answers(engine, seed)
        assert sum(len(answer.logprobs) for answer in found) > 500
        mean, largest = trainer()(weights(seed), rows_of(found, T))
        assert mean < largest < 1e-5
        tokens, segment_ids, targets, behaviour = packed(found, rows=20)
        assert segment_ids.max() >= 3
        policy = packed_trainer()(weights(seed), tokens, segment_ids, targets)
        np.testing.assert_allclose(policy, behaviour, atol=1e-5, rtol=0)
    _, stale = trainer()(weights(0), rows_of(found, T))
    assert stale > 1e-2, "the other weights would show"
    assert (engine.counts["cached_tokens"] > 0) == bool(cache_bytes)


def test_rows_hold_prompt_and_answer_and_learn_from_the_answer():
    batch = rows_of([Answer([4, 5, 6, 7], 2, [-1.0, -2.0], 0.5, True), Answer([8, 9], 1, [-3.0], -0.5, False)], 5)
    assert batch["tokens"].tolist() == [[4, 5, 6, 0, 0], [8, 0, 0, 0, 0]]
    assert batch["segment_ids"].tolist() == [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]
    assert batch["targets"].tolist() == [[-1, 6, 7, -1, -1], [-1] * 5], "one that was cut off is not learnt"
    assert batch["behaviour"].tolist() == [[0, -1, -2, 0, 0], [0] * 5]
    assert batch["advantages"].tolist() == [0.5, -0.5]
    assert batch.keys() == PolicyGradient().arrays.keys()


def test_samples_of_rollouts_that_are_done_again_are_there_once(tmp_path):
    path = tmp_path / "samples.jsonl"
    for rollouts in ((0, 1, 2), (1, 2, 3)):  # A kill between.
        samples = Samples(path)
        for rollout in rollouts:
            samples.write(rollout, [{"of": rollouts[0], "text": TEXT}] * 2)
        path.write_bytes(path.read_bytes() + '{"rollout": 4, "of": "é'.encode()[:-1])  # Cut off in a character.
    lines = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    assert [x["rollout"] for x in lines] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [x["of"] for x in lines] == [0, 0, 1, 1, 1, 1, 1, 1]
    assert all(x["text"] == TEXT for x in lines)
