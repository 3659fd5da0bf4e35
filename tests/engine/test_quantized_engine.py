"""Narrow weights, and keys and values in int8, keep what the engine promises of each request."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from engines import V, a_request, assert_same_logprobs, run
from helpers import long

from lfm_jax import quantize
from lfm_jax.engine.config import EngineConfig
from lfm_jax.engine.engine import Engine
from lfm_jax.engine.placement import memory_needed
from lfm_jax.engine.request import Request
from lfm_jax.infer.generate import generate_tokens
from lfm_jax.state import init_state
from lfm_jax.testing import tiny_config, tiny_model

CONFIG = EngineConfig(slots=((4, 96),), chunk=16, prefix_cache_bytes=1 << 20, max_logprobs=2, fixed_rows=True)
FORMS = [("int4", 32, "int8"), ("w8a8", None, "model"), long("int8", None, "int8"), long("int8", 32, "model")]


@functools.cache
def narrow(kind, group, **changes):
    return quantize(tiny_model(vocab_size=V, ffn_size=64, **changes), kind, group)


@pytest.mark.parametrize(("kind", "group", "kv"), FORMS)
def test_fixed_rows_and_cached_prefixes_change_no_bit(kind, group, kv):
    """In `make test-long` the other forms."""
    made = Engine(narrow(kind, group), dataclasses.replace(CONFIG, kv=kv))
    rng = np.random.default_rng(0)
    requests = [a_request(rng, logprobs=2) for _ in range(10)]
    requests = [request for request in requests if request.size <= 96]
    alone = [run(made, request)[0] for request in requests]
    for heard, one in zip(run(made, *requests), alone, strict=True):
        assert (heard.tokens, heard.finish) == (one.tokens, one.finish)
        assert_same_logprobs(heard.logprobs[0], one.logprobs[0], 0)
    assert made.counts["cached_tokens"] > 0
    cached = [run(made, request)[0] for request in requests]
    assert [heard.tokens for heard in cached] == [one.tokens for one in alone]


@pytest.mark.parametrize("kv", ["model", long("int8")])
def test_drafts_change_no_token(kv):
    """In `make test-long` with keys and values in int8 too."""
    model = quantize(tiny_model(vocab_size=10, layer_types=("conv", "sliding_attention", "full_attention"),
                                sliding_window=8), "int8")
    config = EngineConfig(slots=((4, 128),), chunk=16, kv=kv)
    plain, drafting = Engine(model, config), Engine(model, dataclasses.replace(config, draft=4))
    rng = np.random.default_rng(7)
    requests = [Request(prompt=(rng.integers(0, 10, rng.integers(2, 9)).tolist() * 20)[: 40 + i], max_new_tokens=40,
                        stop_ids=()) for i in range(6)]
    assert [heard.tokens for heard in run(drafting, *requests)] == [heard.tokens for heard in run(plain, *requests)]
    assert drafting.counts["accepted_tokens"] > 0


def test_as_generate_without_an_engine():
    model = narrow("int8", 32)
    requests = [Request(prompt=[1, 2, 3], max_new_tokens=12, stop_ids=()), Request(prompt=[7], max_new_tokens=12,
                                                                                 stop_ids=())]
    batch = generate_tokens(model, [request.prompt for request in requests], max_new_tokens=12, stop_ids=())
    made = Engine(model, dataclasses.replace(CONFIG, prefix_cache_bytes=0))
    assert [heard.tokens[0] for heard in run(made, *requests)] == [theirs.tokens for theirs in batch]


def test_memory_of_int8_keys_and_values_is_counted():
    sizes = {}
    for kv in ("model", "int8"):
        made = Engine(tiny_model(head_dim=64), EngineConfig(slots=((2, 512),), kv=kv))
        sizes[kv] = sum(x.nbytes for pool in made._pools for x in jax.tree.leaves(pool._slots.state))
        assert made.memory["2 slots of 512 tokens"] == sum(x.nbytes for pool in made._pools
                                                           for x in jax.tree.leaves(pool._slots))
    assert 3.6 < sizes["model"] / sizes["int8"] < 4, "68 bytes of a head of 64, instead of 256"
    working = [memory_needed(EngineConfig(slots=((1, 1024),), kv=kv), tiny_config(), {})["working"]
               for kv in ("model", "int8")]
    state = [init_state(tiny_config(), 1, 1024, int8_kv=kv == "int8") for kv in ("model", "int8")]
    copies = [2 * sum(x.nbytes for x in jax.tree.leaves(each)) for each in state]
    assert working[1] - working[0] == copies[1] - copies[0] + 2 * 1024 * 16 * 4, "one layer's, widened"
    with pytest.raises(ValueError, match="kv is 'int4'; choose model or int8"):
        EngineConfig(kv="int4")
