"""Adapters in an engine: each request is answered as by its adapter alone, whatever shares its dispatch or its cache,
and adapters come and go while it runs."""

import dataclasses
import functools
import logging

import jax
import numpy as np
import pytest
from engines import STOP, Heard, a_request, assert_mixes_are_as_alone, assert_same_logprobs, run
from flax import nnx

from lfm_jax.adapters.config import LoRAConfig
from lfm_jax.adapters.peft import Adapter
from lfm_jax.adapters.targets import named_targets
from lfm_jax.adapters.trees import init_adapter, merge, taken
from lfm_jax.engine.config import EngineConfig
from lfm_jax.engine.engine import Engine
from lfm_jax.engine.request import Request, UnknownAdapterError
from lfm_jax.engine.variants import Variant, lower
from lfm_jax.sampling import Sampling
from lfm_jax.structured.grammar import Grammar, grammar_tokenizer
from lfm_jax.testing import tiny_config, tiny_model, tiny_tokenizer

V = tiny_tokenizer().get_vocab_size()
LAYERS = ("conv", "full_attention")
CONFIG = EngineConfig(slots=((4, 128),), chunk=16, max_logprobs=2, prefix_cache_bytes=1 << 20, draft=2, adapters=3,
                      adapter_rank=4)
LORAS = {"all": LoRAConfig(rank=4, alpha=6), "some": LoRAConfig(rank=2, alpha=9, targets=("conv.in_proj", "w2")),
         "third": LoRAConfig(rank=1, rslora=True, targets=("q_proj", "out_proj"))}


@functools.cache
def model():
    return tiny_model(vocab_size=V, layer_types=LAYERS)


@functools.cache
def weights(seed=0):
    return nnx.to_pure_dict(nnx.split(tiny_model(vocab_size=V, layer_types=LAYERS, seed=seed), nnx.Param)[1])


def an_adapter(lora, seed=0, config=None):
    """With B that is not zero."""
    config, rng = config or model().config, np.random.default_rng(seed)
    made = init_adapter(config, lora, jax.random.key(seed))
    return Adapter(config, lora, jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), made))


ADAPTERS = functools.cache(lambda: {name: an_adapter(lora, i) for i, (name, lora) in enumerate(LORAS.items())})


@functools.cache
def engine():
    """With all of them; tests leave it as it is."""
    made = Engine(model(), CONFIG)
    for name, adapter in ADAPTERS().items():
        made.load_adapter(name, adapter)
    return made


@functools.cache
def plain():
    """One without places, for `alone`."""
    return Engine(model(), dataclasses.replace(CONFIG, adapters=0))


def alone(requests, adapters=None, base=0):
    """What each request is told by an engine whose weights have its adapter merged."""
    adapters, heard = adapters or ADAPTERS(), {}
    for name in {request.adapter for request in requests}:
        one = adapters.get(name)
        plain().use(weights(base) if one is None else merge(model().config, one.lora, weights(base), one.weights))
        for i, request in enumerate(requests):
            if request.adapter == name:
                [heard[i]] = run(plain(), dataclasses.replace(request, adapter=None))
    return [heard[i] for i in range(len(requests))]


def clear(made):
    for pool in made._pools:
        pool.cache.clear()


def test_every_request_gets_what_its_adapter_gives_alone():
    """Prompts in chunks and from the cache, scored ones, drafts, and cancelled neighbours."""
    rng = np.random.default_rng(3)
    requests = [a_request(rng, logprobs=2 if i % 3 else None, prompt_logprobs=i % 3 == 1, stop_ids=STOP,
                          adapter=[None, *LORAS][i % 4]) for i in range(20)]
    requests = [dataclasses.replace(request, prompt=request.prompt[:100]) for request in requests]
    requests += [Request(prompt=[7, 8, 9] * 12, max_new_tokens=20, stop_ids=(), adapter=name) for name in LORAS]
    expected = alone(requests)
    clear(engine())
    assert len({tuple(heard.tokens[0]) for heard in expected[20:]}) == 3, "the adapters differ"
    before = engine().counts.copy()
    assert_mixes_are_as_alone(engine(), requests, expected, 8, rng, 1e-5)
    for heard, one in zip(run(engine(), *requests), expected, strict=True):
        assert heard.tokens == one.tokens
        assert_same_logprobs(heard.prompt_logprobs[0] or [], one.prompt_logprobs[0] or [], 1e-5)
    found = engine().counts - before
    assert found["cached_tokens"] > 0
    assert found["accepted_tokens"] > 0


def test_continuations_and_grammars_keep_the_adapter():
    """A copied slot has its options; with a grammar a step is two programs."""
    grammar = grammar_tokenizer(tiny_tokenizer(), V, STOP).matcher(Grammar.regex("[a-f]{5}"))
    requests = [Request(prompt=[9, 4, 7], max_new_tokens=8, stop_ids=STOP, n=2, logprobs=1, adapter=name,
                        grammar=grammar, sampling=Sampling(temperature=1.0, seed=5)) for name in (None, "all")]
    expected = alone(requests)
    for heard, one in zip(run(engine(), *requests), expected, strict=True):
        assert heard.tokens == one.tokens
        for ours, theirs in zip(heard.logprobs, one.logprobs, strict=True):
            assert_same_logprobs(ours, theirs, 1e-5)
    assert expected[0].tokens != expected[1].tokens


def test_a_cached_prefix_serves_only_the_adapter_that_made_it():
    """Nor another one that has got its name and its place."""
    made, prompt = Engine(model(), dataclasses.replace(CONFIG, adapters=1)), [*range(40)]

    def ask(name):
        [heard] = run(made, Request(prompt=prompt, max_new_tokens=6, stop_ids=(), adapter=name))
        return heard.tokens, heard.cached

    base = ask(None)
    made.load_adapter("a", ADAPTERS()["all"])
    first = ask("a")
    assert (base[1], first[1]) == ([0], [0])
    assert (ask(None), ask("a")) == ((base[0], [32]), (first[0], [32]))
    made.unload_adapter("a")
    made.load_adapter("a", ADAPTERS()["some"])
    other = ask("a")
    assert other[1] == [0]
    assert ask("a") == (other[0], [32])
    requests = [Request(prompt=prompt, max_new_tokens=6, stop_ids=(), adapter=name) for name in ("all", "some")]
    assert [heard.tokens for heard in alone(requests)] == [first[0], other[0]]
    # Side by side too, where one waits for the block that another is about to add.
    clear(made)
    heard = run(made, *(Request(prompt=prompt, max_new_tokens=6, stop_ids=(), adapter=name) for name in (None, "a")))
    assert [each.tokens for each in heard] == [base[0], other[0]]


def test_an_adapter_comes_without_a_compilation_and_goes_when_its_requests_have_ended(caplog):
    made = Engine(model(), dataclasses.replace(CONFIG, adapters=2, adapter_rank=4))
    requests = [Request(prompt=[5, 6, 7], max_new_tokens=20, stop_ids=(), adapter=name) for name in (None, "all")]
    made.load_adapter("some", ADAPTERS()["some"])
    run(made, requests[0], dataclasses.replace(requests[0], adapter="some"), requests[0])
    with caplog.at_level(logging.WARNING), jax.log_compiles():
        made.load_adapter("all", ADAPTERS()["all"])
        heard = Heard()
        made.submit(requests[1], heard)
        made.step()
        made.unload_adapter("all")
        with pytest.raises(UnknownAdapterError, match="there is no adapter 'all'; the engine has 'some'"):
            made.submit(requests[1], Heard())
        with pytest.raises(ValueError, match=r"all 2 places .* unload one first: 1 unloaded ones still have requests"):
            made.load_adapter("third", ADAPTERS()["third"])
        while made.step():
            pass
        made.load_adapter("third", ADAPTERS()["third"])
        [third] = run(made, dataclasses.replace(requests[1], adapter="third"))
        assert not [record.message for record in caplog.records if "Compiling" in record.message]
        jax.jit(lambda x: x + 41)(1)
    assert any("Compiling" in record.message for record in caplog.records), "they would be seen"
    expected = alone([requests[1], dataclasses.replace(requests[1], adapter="third")])
    assert [heard.tokens, third.tokens] == [each.tokens for each in expected]
    assert made.adapters.sources() == {"some": "", "third": ""}


def test_what_does_not_fit_is_refused():
    made = Engine(model(), dataclasses.replace(CONFIG, adapters=1, adapter_rank=3))
    wide = tiny_config(vocab_size=V, layer_types=LAYERS, ffn_size=96)
    deep = tiny_config(vocab_size=V, layer_types=(*LAYERS, "conv"))
    bad = an_adapter(LORAS["some"])
    bad.weights["blocks"][0]["feed_forward"]["w2"]["b"][0, 0] = np.inf
    for adapter, message in (
        (ADAPTERS()["all"], r"its rank is 4; places are of rank 3 \(engine.adapter_rank\)"),
        (an_adapter(LORAS["some"], config=wide), r"\['w2'\]\['a'\] is \[2, 96\]; expected"),
        (an_adapter(LORAS["some"], config=deep), r"\[2\].* which no target of this model is"),
        (bad, "not finite in float32:\n.*w2"),
    ):
        with pytest.raises(ValueError, match=message):
            made.load_adapter("x", adapter)
    made.load_adapter("x", ADAPTERS()["some"], "here")
    for name, message in (("x", "there is an adapter 'x' already"), ("", "name of an adapter is empty"),
                          ("y", r"all 1 places for adapters are taken \(engine.adapters\)")):
        with pytest.raises(ValueError, match=message):
            made.load_adapter(name, ADAPTERS()["some"])
    with pytest.raises(UnknownAdapterError, match="no adapter 'y'"):
        made.unload_adapter("y")
    with pytest.raises(UnknownAdapterError, match="no adapter 'y'"):
        made.complete([Request(prompt=[1], adapter="y")])
    with pytest.raises(ValueError, match="has no places for adapters"):
        plain().load_adapter("x", ADAPTERS()["some"])
    assert made.adapters.sources() == {"x": "here"}
    with pytest.raises(ValueError, match=r"(?s)adapters is -1.*adapter_rank is 0"):
        EngineConfig(adapters=-1, adapter_rank=0)


def test_other_weights_of_the_model_keep_the_adapters():
    requests = [Request(prompt=[5, 6, 7], max_new_tokens=9, stop_ids=(), adapter=name) for name in (None, *LORAS)]
    try:
        engine().use(weights(7))
        found = run(engine(), *requests)
    finally:
        engine().use(weights())
    assert [heard.tokens for heard in found] == [heard.tokens for heard in alone(requests, base=7)]


def test_memory_counts_the_places_and_a_copy():
    [pool] = engine()._pools
    places = sum(x.nbytes for x in jax.tree.leaves(taken(pool.params)))
    [counted] = [size for name, size in engine().memory.items() if "adapters" in name]
    assert counted == 2 * places
    assert engine().memory["parameters"] == plain().memory["parameters"]
    assert not any("adapters" in name for name in plain().memory)


def test_without_places_programs_have_the_products_of_the_model_alone():
    """And with them two more beside each matrix that can have an adapter."""
    def products(made, variant):
        [pool] = made._pools
        return lower(pool._programs, variant, pool.params, pool._shapes, pool.shape).as_text().count("dot_general")

    dense = len(named_targets(model().config, LoRAConfig()))
    for variant in (Variant("decode", 4, plain=True), Variant("prefill", 1, 16), Variant("advance", 4)):
        without, with_places = products(plain(), variant), products(engine(), variant)
        assert with_places == without + 2 * dense
        assert without == dense + {"decode": 3, "prefill": 3, "advance": 3}[variant.name]
