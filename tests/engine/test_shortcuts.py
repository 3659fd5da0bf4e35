"""The prefix cache and drafts save work and change no token."""

import dataclasses

import numpy as np
import pytest
from engines import CONFIG, Heard, a_request, engine, model, run
from helpers import long

from lfm_jax.engine.config import EngineConfig
from lfm_jax.engine.engine import Engine
from lfm_jax.engine.prefix_cache import PrefixCache
from lfm_jax.engine.request import Request
from lfm_jax.infer.generate import generate_tokens
from lfm_jax.sampling import Sampling
from lfm_jax.testing import tiny_model


def test_what_the_prefix_cache_holds_changes_nothing():
    request = a_request(np.random.default_rng(5), prompt=[3, *range(96, 47, -1)], max_new_tokens=14)
    longer = dataclasses.replace(request, prompt=[*request.prompt[:40], 7, 7, 7])
    first = [*run(engine(), request), *run(engine(), longer)]
    assert [heard.cached for heard in first] == [[0], [32]]
    before = engine().counts["cached_tokens"]
    again = run(engine(), request, longer)
    assert engine().counts["cached_tokens"] - before == 48 + 32
    assert [heard.cached for heard in again] == [[48], [32]]
    [several] = run(engine(), dataclasses.replace(request, n=3))
    assert several.cached == [48] * 3
    assert [heard.tokens for heard in first] == [heard.tokens for heard in again]
    uncached = Engine(model(), dataclasses.replace(CONFIG, prefix_cache_bytes=0))
    assert [heard.tokens for heard in run(uncached, request, longer)] == [heard.tokens for heard in first]
    assert uncached.counts["cached_tokens"] == 0


@pytest.mark.parametrize("prefill_rows", [1, 4])
def test_prompts_that_come_together_share_what_they_begin_with(prefill_rows):
    requests = [a_request(np.random.default_rng(i), prompt=[*range(48), i, 8],
                          max_new_tokens=25) for i in range(4)]
    made = Engine(model(), dataclasses.replace(CONFIG, prefill_rows=prefill_rows, fixed_rows=True))
    together = run(made, *requests)
    assert made.counts["cached_tokens"] == 3 * 48  # Each block was computed once.
    assert [each.tokens for each in together] == [run(made, request)[0].tokens for request in requests]
    # One that holds no block has none to wait for.
    none = Engine(model(), dataclasses.replace(CONFIG, prefill_rows=prefill_rows, prefix_cache_bytes=1))
    assert [each.tokens for each in run(none, *requests)] == [each.tokens for each in together]
    assert not none._pools[0].cache.wants(requests[0].prompt, 1)


def test_a_prefix_longer_than_the_cache_is_not_waited_for():
    cache = PrefixCache(4, 2 * 64)
    prompt = tuple(range(17))
    for n in (1, 2, 3):
        assert cache.wants(prompt, n)
        cache.add(prompt, n, np.zeros(8))
    assert len(cache.find(prompt)) == 2
    assert not cache.wants(prompt, 3)  # Thrown out at once: so it would be again.
    assert not cache.wants(prompt, 4)  # And this one would have nothing to follow.


def test_prefix_cache_keeps_prefixes_whole_and_its_bounds():
    rng = np.random.default_rng(6)
    cache = PrefixCache(4, 10 * 64)
    prompts = [tuple(rng.integers(0, 2, 17).tolist()) for _ in range(300)]
    for prompt in prompts:
        found = cache.find(prompt)
        assert [int(x[0]) for x in found] == [hash(prompt[: 4 * (i + 1)]) for i in range(len(found))]
        for n in range(len(found) + 1, 5):
            assert cache.wants(prompt, n)
            cache.add(prompt, n, np.full(8, hash(prompt[: 4 * n])))
            assert len(cache.find(prompt)) == n
        assert cache.bytes == 64 * len(cache) <= 640
    assert not cache.wants(prompts[-1], 4)
    other = PrefixCache(4, 0)
    assert not other.wants(prompts[0], 1)
    assert other.find(prompts[0]) == []


DRAFTING = {
    "lfm2": dict(),
    "seven taps and a window": dict(layer_types=("conv", "sliding_attention", "full_attention", "conv"), conv_taps=7,
                                    sliding_window=8),
    "one tap": dict(conv_taps=1, layer_types=("full_attention", "conv")),
}


@pytest.mark.parametrize("name", ["lfm2", "seven taps and a window", long("one tap")])
def test_drafts_change_no_token(name, monkeypatch):
    """In `make test-long` convolutions of one tap too, which keep nothing to go back to."""
    made_of = tiny_model(vocab_size=10, **DRAFTING[name])  # So few tokens that texts repeat themselves.
    config = EngineConfig(slots=((4, 128),), chunk=16)
    plain, drafting = Engine(made_of, config), Engine(made_of, dataclasses.replace(config, draft=4))
    rng = np.random.default_rng(7)
    requests = []
    for i in range(12):
        phrase = rng.integers(0, 10, rng.integers(2, 9)).tolist()
        sampling = Sampling(temperature=0.7, seed=i) if i % 4 == 0 else Sampling(
            repetition_penalty=1 + (i % 5 == 0), frequency_penalty=0.1 * (i == 7))
        # The bias leaves one program to compile.
        requests.append(Request(prompt=(phrase * 20)[: 40 + i], max_new_tokens=50, sampling=sampling,
                                stop_ids=(3,) if i % 2 else (), logit_bias={9: 0.1}))
    theirs, ours = run(plain, *requests), run(drafting, *requests)
    assert [heard.tokens for heard in ours] == [heard.tokens for heard in theirs]
    assert plain.counts["steps"] == plain.counts["tokens"] == drafting.counts["tokens"]
    accepted = drafting.counts["accepted_tokens"]
    assert 0 < accepted < drafting.counts["drafted_tokens"]
    assert drafting.counts["steps"] == drafting.counts["tokens"] - accepted
    assert plain.counts["drafted_tokens"] == 0

    ticket = drafting.submit(dataclasses.replace(requests[2], max_new_tokens=40, stop_ids=()), heard := Heard())
    while drafting.step():
        made = ticket.runs[0].made if ticket.runs else 0
        assert not made or made <= ticket.runs[0].promised  # What was accepted counts for when the slot is free.
    assert len(heard.tokens[0]) == 40

    [pool] = drafting._pools
    widths = []
    decode = pool._programs.decode
    with monkeypatch.context() as patch:
        patch.setattr(pool._programs, "decode", lambda *args, **kw: widths.append(kw["draft"]) or decode(*args, **kw))
        # Where nobody may have any, nothing is spent on them.
        for penalty, drafted in ((dict(repetition_penalty=1.2), 0), (dict(presence_penalty=0.1), 0), ({}, 4)):
            widths.clear()
            run(drafting, dataclasses.replace(requests[2], sampling=Sampling(**penalty)))
            assert set(widths) == {drafted}


def test_drafts_are_refused_with_recurrences():
    recurrent = tiny_model(layer_types=("recurrence", "full_attention"))
    with pytest.raises(ValueError, match="leave draft at 0"):
        Engine(recurrent, EngineConfig(slots=((2, 64),), draft=2))
    request = Request(prompt=[1, 2, 3], max_new_tokens=9)
    [heard] = run(Engine(recurrent, EngineConfig(slots=((2, 64),), chunk=16, prefix_cache_bytes=10**6)), request)
    assert heard.tokens[0] == generate_tokens(recurrent, [[1, 2, 3]], max_new_tokens=9)[0].tokens
