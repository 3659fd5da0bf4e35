"""Which rows a dispatch works on, and with which program: all is in use soon, and no token depends on it."""

import dataclasses

import numpy as np
from engines import (
    STOP,
    Heard,
    V,
    a_request,
    assert_same_logprobs,
    assert_slots_are_whole,
    model,
    noted,
    run,
)

from lfm_jax.engine.config import EngineConfig
from lfm_jax.engine.engine import Engine
from lfm_jax.engine.prefix_cache import PrefixCache
from lfm_jax.engine.request import Request
from lfm_jax.engine.variants import Variant, cache_variants, variants
from lfm_jax.sampling import Sampling
from lfm_jax.structured.grammar import Grammar, grammar_tokenizer
from lfm_jax.testing import tiny_model, tiny_tokenizer


def test_slots_fill_up_soon_and_are_given_on_at_once(monkeypatch):
    """Steps of the device, each of which costs much however few rows it has, stay near the fewest possible:
    while slots fill up they are taken one by one, and a slot is given on where its budget ends."""
    made = Engine(model(), EngineConfig(slots=((4, 64),), chunk=16, steps=8))
    decode, steps = made._pools[0]._programs.decode, []

    def counting(params, slots, n, **static):
        steps.append(int(n))
        return decode(params, slots, n, **static)

    monkeypatch.setattr(made._pools[0]._programs, "decode", counting)
    lengths = [21, 4, 9, 17, 5, 12, 21, 8, 1, 13]
    requests = [Request(prompt=[7 + i, 8, 9], max_new_tokens=n, stop_ids=()) for i, n in enumerate(lengths)]
    heard = run(made, *requests)
    assert [len(h.tokens[0]) for h in heard] == lengths
    assert all(h.finish == ["length"] for h in heard)
    ends = [0] * 4  # Were slots full at once and never empty: 30 steps, since first tokens come with the prompts.
    for n in lengths:
        ends[ends.index(min(ends))] += n - 1
    assert sum(steps) <= 1.25 * max(ends)
    assert max(steps) > 1


def test_short_prompts_are_taken_in_together_and_get_what_they_get_alone(monkeypatch):
    two = tiny_model(vocab_size=V, layer_types=("conv", "full_attention"))
    made = Engine(two, EngineConfig(slots=((4, 128),), chunk=64, max_logprobs=2, prefix_cache_bytes=1 << 20))
    prefills = noted(monkeypatch, made, "prefill", lambda args, _: args[3].shape)
    rng = np.random.default_rng(14)
    short = [a_request(rng, prompt=[n] * n, max_new_tokens=4, min_new_tokens=0, logprobs=None) for n in range(1, 8)]
    run(made, *short)
    assert prefills == [(4, 16), (4, 16)]  # Of the second one's rows three are in use.
    prefills.clear()
    run(made, *short[:2])
    assert prefills == [(1, 16), (1, 16)]
    requests = [a_request(rng, max_new_tokens=8, min_new_tokens=0, logprobs=2, prompt_logprobs=bool(i % 3 == 0))
                for i in range(24)]
    requests = [dataclasses.replace(request, prompt=request.prompt[-100 if i % 5 == 0 else -14 :])
                for i, request in enumerate(requests)]
    alone = [run(made, request)[0] for request in requests]
    prefills.clear()
    for _ in range(30):
        picked = rng.choice(len(requests), rng.integers(4, 12), replace=False)
        for i, heard in zip(picked, run(made, *(requests[i] for i in picked)), strict=True):
            assert heard.tokens == alone[i].tokens
            assert_same_logprobs(heard.logprobs[0], alone[i].logprobs[0], 1e-5)
            assert_same_logprobs(heard.prompt_logprobs[0] or [], alone[i].prompt_logprobs[0] or [], 1e-5)
    assert {rows for rows, width in prefills if width == 16} == {1, 4}
    fixed = Engine(two, EngineConfig(slots=((4, 128),), chunk=64, fixed_rows=True))
    prefills = noted(monkeypatch, fixed, "prefill", lambda args, _: args[3].shape)
    run(fixed, *short)
    assert set(prefills) == {(1, 16)}


def test_what_is_left_moves_to_low_slots(monkeypatch):
    """A dispatch takes all slots up to the highest in use."""
    made = Engine(model(), EngineConfig(slots=((8, 64),), chunk=16, steps=4, draft=2))
    requests = [Request(prompt=[7 + i, 8, 9], max_new_tokens=6 if i < 5 else 40, stop_ids=(),
                        sampling=Sampling(temperature=float(i % 2), seed=i)) for i in range(8)]
    alone = [run(made, request)[0].tokens for request in requests]
    rows = noted(monkeypatch, made, "decode", lambda _, kwargs: kwargs["rows"])
    heard = [Heard() for _ in requests]
    tickets = [made.submit(request, each) for request, each in zip(requests, heard, strict=True)]
    while not all(h.finish[0] for h in heard[:5]):
        made.step()
    assert max(ticket.runs[0].row for ticket in tickets[5:]) < 4
    made.cancel(tickets[5])  # What was moved is let go of like any other.
    while made.step():
        pass
    assert 8 in rows
    assert set(rows[rows.index(8) :]) == {8, 4}
    assert rows[-1] == 4
    assert_slots_are_whole(made)
    assert heard[5].finish == ["cancelled"]
    assert [h.tokens for h in heard if h is not heard[5]] == [tokens for i, tokens in enumerate(alone) if i != 5]


def test_an_engine_that_is_still_warming_up_gives_the_same_tokens(monkeypatch):
    """Whatever is ready: of that the best is called, where there is a choice, and else the widest of all."""
    two = tiny_model(vocab_size=tiny_tokenizer().get_vocab_size(), layer_types=("conv", "full_attention"))
    made = Engine(two, EngineConfig(slots=((8, 128),), chunk=64, max_logprobs=2, prefix_cache_bytes=1 << 20))
    grammar = grammar_tokenizer(tiny_tokenizer(), two.config.vocab_size, STOP).matcher(Grammar.regex("[a-f]{5}"))
    rng = np.random.default_rng(18)
    requests = [a_request(rng, max_new_tokens=8, min_new_tokens=0, logprobs=2 if i % 3 else None,
                          sampling=Sampling(temperature=float(i % 4 == 1), seed=i)) for i in range(12)]
    requests = [dataclasses.replace(request, prompt=request.prompt[:118]) for request in requests]
    requests += [dataclasses.replace(requests[0], grammar=grammar, n=2),
                 dataclasses.replace(requests[1], logprobs=2, prompt_logprobs=True, prompt=requests[1].prompt[-9:])]
    [pool], found = made._pools, []
    alone = [run(made, request)[0].tokens for request in requests]
    for name, of_call in (("prefill", lambda args, _: Variant("prefill", *args[3].shape)),
                          ("score", lambda args, _: Variant("score", *args[3].shape)),
                          ("start", lambda args, _: Variant("start", len(args[3]))),
                          ("decode", lambda _, kwargs: Variant("decode", **kwargs)),
                          ("advance", lambda _, kwargs: Variant("advance", **kwargs)),
                          ("choose", lambda _, kwargs: Variant("choose", **kwargs))):
        found.append(noted(monkeypatch, made, name, of_call))
    stages = variants(pool.shape, made.config)
    every = {variant for stage in stages for variant in stage}
    for mix in range(8):
        ready = {variant for variant in every if rng.random() < (0, 0.3, 0.7)[mix % 3]} | set(stages[0])
        pool.ready = set(ready)
        pool.cache = PrefixCache(made.config.chunk, made.config.prefix_cache_bytes)
        for calls in found:
            calls.clear()
        picked = [*rng.choice(12, 6, replace=False), *((12, 13) if mix % 2 else ())]
        heard = run(made, *(requests[i] for i in picked))
        assert [each.tokens for each in heard] == [alone[i] for i in picked]
        called = {variant for calls in found for variant in calls}
        general = {Variant("score", 1, 64), Variant("advance", 8), Variant("choose", 8)}
        assert called <= ready | general
        assert pool.ready == ready | (called & general)
        assert not len(pool.cache) or set(cache_variants(made.config)) <= ready
    pool.ready = every
    for calls in found:
        calls.clear()
    run(made, *(Request(prompt=[i] * 9, max_new_tokens=3, stop_ids=()) for i in range(4)))
    assert set().union(*map(set, found)) == {Variant("prefill", 4, 16), Variant("start", 4),
                                             Variant("decode", 4, plain=True)}  # The best of all.
