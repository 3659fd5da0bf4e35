"""An engine that gets other weights, and log-probabilities of what tokens are drawn from."""

import dataclasses
from itertools import chain

import jax
import numpy as np
import pytest
from engines import STOP, V, a_request, run
from flax import nnx

from lfm_jax.engine.config import EngineConfig
from lfm_jax.engine.engine import Engine
from lfm_jax.engine.request import Request
from lfm_jax.sampling import Sampling
from lfm_jax.testing import tiny_model

CONFIG = EngineConfig(slots=((4, 128),), chunk=16, max_logprobs=1, prefix_cache_bytes=1 << 20)


def two():
    return tiny_model(vocab_size=V, layer_types=("conv", "full_attention"))


def weights(of):
    return nnx.to_pure_dict(nnx.split(of, nnx.Param)[1])


def test_other_weights_answer_as_in_a_new_engine():
    """The states of prompts that the old ones left in the prefix cache are gone."""
    other = tiny_model(vocab_size=V, layer_types=("conv", "full_attention"), seed=7)
    rng = np.random.default_rng(0)
    requests = [a_request(rng, prompt=[*range(40), n], max_new_tokens=6, min_new_tokens=0, logprobs=1, n=2)
                for n in range(4)]
    made = Engine(two(), CONFIG)
    before = made.complete(requests)
    assert made.counts["cached_tokens"] > 0
    given = weights(other)
    made.use(given)
    assert made._pools[0].params is given, "nothing is copied"
    found, expected = made.complete(requests), Engine(other, CONFIG).complete(requests)
    assert found == expected
    assert found != before
    assert all(len(one.logprobs) == len(one.tokens) for group in found for one in group)
    jax.tree.map(lambda x: x.delete(), given)  # As a training step does that takes the old state.
    made.use(weights(two()))
    assert made.complete(requests) == before


def test_weights_of_another_model_or_at_a_wrong_time_are_refused():
    made = Engine(two(), CONFIG)
    with pytest.raises(ValueError, match="not weights of the engine's model"):
        made.use(weights(tiny_model(vocab_size=V, layer_types=("conv", "conv"))))
    with pytest.raises(ValueError, match="not weights of the engine's model"):
        made.use(jax.tree.map(lambda x: x.astype("bfloat16"), weights(two())))
    made.submit(Request(prompt=[1], max_new_tokens=3), lambda event: None)
    with pytest.raises(RuntimeError, match="only between requests"):
        made.use(weights(two()))


def test_log_probabilities_are_of_the_distribution_that_tokens_are_drawn_from():
    """By the whole distribution of the model alone, which another engine tells of the same tokens."""
    config = dataclasses.replace(CONFIG, max_logprobs=V, draft=2, prefix_cache_bytes=0)
    bias = {9: 2.0, 11: float("-inf")}
    request = Request(prompt=[5, 6, 7] * 5, max_new_tokens=12, n=2, stop_ids=STOP, logprobs=V, logit_bias=bias,
                      sampling=Sampling(temperature=0.7, top_k=20, seed=3))
    [alone], [sampled] = (run(Engine(two(), dataclasses.replace(config, logprobs_of=of)), request)
                          for of in ("model", "sampled"))
    assert alone.tokens == sampled.tokens
    for ours, theirs in zip(chain(*sampled.logprobs), chain(*alone.logprobs), strict=True):
        logits_V = np.zeros(V)
        for token, logprob in theirs.best:
            logits_V[token] = (logprob + bias.get(token, 0.0)) / 0.7
        logits_V[logits_V < np.sort(logits_V)[-20]] = -np.inf
        logprob_V = logits_V - np.logaddexp.reduce(logits_V)
        assert ours.logprob == pytest.approx(logprob_V[ours.token], abs=1e-5)
        assert dict(ours.best) == pytest.approx(dict(enumerate(logprob_V)), abs=1e-5)
