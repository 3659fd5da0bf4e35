"""The engine: what a request gets is its own, whoever runs beside it, whatever the cache holds or a draft guesses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engines import CONFIG, STOP, Heard, V, a_request, assert_slots_are_whole, engine, model, run
from helpers import long

from lfm_jax.engine import pool as pools
from lfm_jax.engine import slots as slots_of
from lfm_jax.engine.config import EngineConfig
from lfm_jax.engine.engine import Engine
from lfm_jax.engine.prefix_cache import PrefixCache
from lfm_jax.engine.request import Request
from lfm_jax.engine.variants import Variant, cache_variants, variants
from lfm_jax.infer.generate import generate_tokens
from lfm_jax.kernels.logprobs import token_logprobs
from lfm_jax.sampling import ANYTHING, Sampling, to_arrays
from lfm_jax.structured.grammar import Grammar, grammar_tokenizer
from lfm_jax.testing import tiny_model, tiny_tokenizer


@pytest.mark.parametrize(("mixes", "fixed_rows"), [(100, False), (40, True), long(500, False), long(150, True)])
def test_mixes_give_each_request_what_it_gets_alone(mixes, fixed_rows):
    """To the bit with `fixed_rows`; without, a sum's rounding may depend on how many rows a dispatch has.

    In `make test-long` rarer meetings: of requests that come, end and are cancelled at the same turn.
    """
    made = engine(fixed_rows)
    rng = np.random.default_rng(0)
    requests = [a_request(rng) for _ in range(60)]
    cached = made.counts["cached_tokens"]
    alone = [run(made, request)[0] for request in requests]
    made.warm_up()  # Again, where other modules have had it before: what they compiled is gone.
    compiled = []

    def note(event, _, **__):
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    for _ in range(mixes):
        picked = rng.choice(len(requests), rng.integers(2, 10), replace=False)
        arrivals = sorted(rng.integers(0, 6, len(picked)).tolist())
        heard, cancelled = {i: Heard() for i in picked}, {}
        turn = 0
        todo = list(zip(arrivals, picked, strict=True))
        while todo or made.step():
            while todo and todo[0][0] <= turn:
                i = todo.pop(0)[1]
                ticket = made.submit(requests[i], heard[i])
                if rng.random() < 0.1:
                    cancelled[i] = (turn + int(rng.integers(0, 4)), ticket)
            for when, ticket in cancelled.values():
                if when == turn:
                    made.cancel(ticket)
            turn += 1
            if todo:
                made.step()
        for i, each in heard.items():
            if each.finish == ["cancelled"]:
                assert i in cancelled
                assert alone[i].tokens[0][: len(each.tokens[0])] == each.tokens[0]
            else:
                assert (each.tokens, each.finish) == (alone[i].tokens, alone[i].finish)
                assert_same_logprobs(each.logprobs[0], alone[i].logprobs[0], 0 if fixed_rows else 1e-5)
    assert made.running() == made.waiting() == 0
    assert_slots_are_whole(made)
    assert made.counts["cached_tokens"] > cached
    jax.monitoring.unregister_event_duration_listener(note)
    assert compiled == []


def assert_same_logprobs(ours, theirs, tolerance):
    """Of the same tokens; of the likeliest ones only the numbers, since two may be as likely."""
    for one, other in zip(ours, theirs, strict=True):
        assert one.token == other.token
        assert one.logprob == pytest.approx(other.logprob, abs=tolerance, rel=0)
        assert [x for _, x in one.best] == pytest.approx([x for _, x in other.best], abs=tolerance, rel=0)
        assert tolerance or one == other


@pytest.mark.parametrize("mixes", [25, long(60)])
def test_mixes_with_grammars_give_each_request_what_it_gets_alone(mixes):
    """While a grammar is at work its neighbours go one token at a time: the same tokens, whenever it comes and goes.

    In `make test-long` more mixes.
    """
    vocab = tiny_tokenizer().get_vocab_size() + 5
    tokens = grammar_tokenizer(tiny_tokenizer(), vocab, STOP)
    grammars = [tokens.matcher(grammar) for grammar in (
        Grammar.choice(["left", "right", "straight on"]),
        Grammar.json_schema({"type": "object", "properties": {"a": {"type": "integer", "maximum": 99, "minimum": 0},
                                                              "b": {"enum": ["x", "yy", None]}}, "required": ["a"]}),
        Grammar.regex("[a-f]{2,9}!"),
    )]
    config = EngineConfig(slots=((6, 128),), chunk=16, prefill_rows=3, draft=3, max_logprobs=2)
    made = Engine(tiny_model(vocab_size=vocab), config)
    rng = np.random.default_rng(12)
    requests = [a_request(rng, max_new_tokens=int(rng.integers(1, 40)), min_new_tokens=0) for _ in range(20)]
    requests = [r if r.size <= 128 else dataclasses.replace(r, prompt=r.prompt[:40]) for r in requests]
    for i in range(0, 20, 2):
        requests[i] = dataclasses.replace(requests[i], grammar=grammars[i % 3], max_new_tokens=60, n=1 + i % 4)
    alone = [run(made, request)[0] for request in requests]
    ended = 0
    for _ in range(mixes):
        picked = rng.choice(len(requests), rng.integers(2, 10), replace=False)
        heard = {int(i): Heard(requests[i].n) for i in picked}
        for i, each in heard.items():
            made.submit(requests[i], each)
            for _ in range(rng.integers(0, 3)):
                made.step()
        while made.step():
            pass
        for i, each in heard.items():
            assert (each.tokens, each.finish) == (alone[i].tokens, alone[i].finish)
            ended += each.finish.count("stop") if requests[i].grammar is not None else 0
            for ours, theirs in zip(each.logprobs, alone[i].logprobs, strict=True):
                np.testing.assert_allclose([t.logprob for t in ours], [t.logprob for t in theirs], atol=1e-5)
    assert ended > 0.8 * mixes  # By the grammar's own end.


def test_masks_are_made_while_the_device_takes_in_the_last_token(monkeypatch):
    """Both calls of a step go to the device without a wait in between: the mask is made behind the first."""
    vocab = tiny_tokenizer().get_vocab_size() + 5
    grammar = grammar_tokenizer(tiny_tokenizer(), vocab, STOP).matcher(Grammar.regex("[a-f]{9}!"))
    made = Engine(tiny_model(vocab_size=vocab), EngineConfig(slots=((2, 64),), chunk=16))
    done, programs = [], made._pools[0]._programs

    def noting(name, call):
        return lambda *args, **kwargs: (done.append(name), call(*args, **kwargs))[1]

    for name in ("advance", "choose"):
        monkeypatch.setattr(programs, name, noting(name, getattr(programs, name)))
    monkeypatch.setattr(pools, "_masks", noting("masks", pools._masks))
    monkeypatch.setattr(made, "_deliver", noting("handed out", made._deliver))
    [heard] = run(made, Request(prompt=[1, 2, 3], max_new_tokens=30, stop_ids=STOP, grammar=grammar))
    assert heard.finish == ["stop"]
    starts = [i for i, name in enumerate(done) if name == "advance"]
    assert len(starts) >= len(heard.tokens[0]) - 1
    assert {tuple(done[i : i + 3]) for i in starts} == {("advance", "masks", "choose")}


def test_as_generate_where_the_best_two_are_apart():
    rng = np.random.default_rng(1)
    requests = [a_request(rng, sampling=Sampling(), min_new_tokens=0, max_new_tokens=20, logprobs=2) for _ in range(40)]
    batch = generate_tokens(model(), [request.prompt for request in requests], max_new_tokens=20, stop_ids=STOP)
    for heard, theirs in zip(run(engine(), *requests), batch, strict=True):
        for ours, other, told in zip(heard.tokens[0], theirs.tokens, heard.logprobs[0], strict=False):
            if ours != other:
                assert told.best[0][1] - told.best[1][1] < 1e-5
                break
        else:
            assert heard.tokens[0] == theirs.tokens
            assert heard.finish[0] == theirs.finish_reason


def test_sampled_as_generate():
    rng = np.random.default_rng(2)
    request = a_request(rng, sampling=Sampling(temperature=0.9, top_p=0.9, seed=7), max_new_tokens=20)
    [heard] = run(engine(), dataclasses.replace(request, min_new_tokens=0))
    [theirs] = generate_tokens(model(), [request.prompt], request.sampling, 20, stop_ids=STOP)
    assert heard.tokens[0] == theirs.tokens


def test_penalties_of_what_was_generated_are_those_of_generate():
    """From the first token on, in any slot: what came before in it, and what its neighbours ask for, are nothing."""
    rng = np.random.default_rng(15)
    requests = [
        a_request(rng, prompt=[7, 8, 9, *rng.integers(0, V, 20 + i).tolist()], max_new_tokens=24, min_new_tokens=0,
                  sampling=Sampling(temperature=float(i % 3 == 1), seed=i, frequency_penalty=(0, 0.8, -0.5)[i % 3],
                                    presence_penalty=(1.5, 0, 0, 0)[i % 4]), stop_ids=())
        for i in range(12)
    ]
    heard = run(engine(), *requests)
    prompts, samplings = [r.prompt for r in requests], [r.sampling for r in requests]
    plain = [dataclasses.replace(s, frequency_penalty=0, presence_penalty=0) for s in samplings]
    theirs = generate_tokens(model(), prompts, samplings, 24, stop_ids=())
    free = generate_tokens(model(), prompts, plain, 24, stop_ids=())
    assert [each.tokens[0] for each in heard] == [each.tokens for each in theirs]
    assert [one != other for one, other in zip(theirs, free, strict=True)] == [
        one != other for one, other in zip(samplings, plain, strict=True)
    ]
    several = dataclasses.replace(requests[4], n=3)
    [together] = run(engine(), several)
    assert together.tokens[0] == heard[4].tokens[0]
    assert together.tokens == [
        run(engine(), dataclasses.replace(several, n=1, sampling=several.choice_sampling(i)))[0].tokens[0]
        for i in range(3)
    ]


def test_several_continuations_are_those_of_their_seeds():
    rng = np.random.default_rng(3)
    request = a_request(rng, sampling=Sampling(temperature=1.0, seed=2**32 - 2), n=4, max_new_tokens=12, logprobs=1)
    [heard], others = run(engine(), request), [
        run(engine(), dataclasses.replace(request, n=1, sampling=request.choice_sampling(i)))[0] for i in range(4)
    ]
    assert heard.tokens == [other.tokens[0] for other in others]
    assert heard.finish == [other.finish[0] for other in others]
    assert len({tuple(tokens) for tokens in heard.tokens}) > 1


def test_a_grammar_that_ends_nowhere_ends_its_request_alone():
    tokens = grammar_tokenizer(tiny_tokenizer(), tiny_tokenizer().get_vocab_size() + 5, STOP)
    grammar = tokens.matcher(Grammar.lark('start: "x" A\nA: /y/ & /z/'))
    made = Engine(tiny_model(vocab_size=tokens.vocab_size), EngineConfig(slots=((2, 64),), chunk=16))
    other = a_request(np.random.default_rng(8), min_new_tokens=0, prompt=[7, 8, 9])
    [alone] = run(made, other)
    heard, beside = run(made, dataclasses.replace(other, grammar=grammar, logit_bias={}), other)
    assert (heard.finish, heard.reason) == (["grammar"], ["no token can go on"])
    assert (beside.tokens, beside.finish) == (alone.tokens, alone.finish)
    assert made.counts["grammar"] == 1
    assert made.counts["failed"] == 0


def test_options_of_requests_that_have_ended_cost_the_others_nothing(monkeypatch):
    """`sample` skips a filter or a penalty that no row asks for: it must not see those of idle rows."""
    shape = slots_of.SlotShape(config=model().config, slots=3, length=16)
    everything = Sampling(temperature=0.5, top_k=3, top_p=0.5, min_p=0.1, repetition_penalty=1.2, seed=4,
                          frequency_penalty=1.0, presence_penalty=1.0)
    asked = dataclasses.replace(shape.asked(3), sampling=to_arrays([everything] * 3, V)[0])
    seen = []
    monkeypatch.setattr(slots_of, "sample", lambda _, params, *rest: seen.append(params) or jnp.zeros(3, jnp.int32))
    made = dataclasses.replace(shape.init(), asked=asked, left_B=jnp.array([0, 5, 0]))
    slots_of._next_tokens(made, jnp.zeros((3, 1, V)), None, ANYTHING, 0, None, lambda: made.bias_BV)
    expected = to_arrays([Sampling(), everything, Sampling()], V)[0]
    jax.tree.map(np.testing.assert_array_equal, seen[0], expected)


def test_a_continuation_may_be_cancelled_and_the_others_go_on():
    request = a_request(np.random.default_rng(4), prompt=list(range(60)), sampling=Sampling(temperature=1.0), n=2,
                        max_new_tokens=100, stop_ids=())
    [whole] = run(engine(), request)
    for turns in range(6):  # Before it has a slot, while the prompt is taken in, while it generates.
        heard = Heard(2)
        ticket = engine().submit(request, heard)
        for _ in range(turns):
            engine().step()
        engine().cancel(ticket, 0)
        while engine().step():
            pass
        assert heard.finish == ["cancelled", "length"]
        assert heard.tokens[1] == whole.tokens[1]
        assert engine().running() == 0


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


def log_probabilities(tokens):
    """Of every token at every place, and of those that follow as training scores them."""
    inputs, targets = jnp.asarray([tokens[:-1]]), jnp.asarray([tokens[1:]])
    hidden, _ = model().hidden(inputs, None, None)
    scored = token_logprobs(hidden, model().head_VD, targets)[0]
    return np.asarray(jax.nn.log_softmax(model()(inputs)[0][0])), np.asarray(scored)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.5, top_k=3, repetition_penalty=1.3)])
def test_log_probabilities_are_the_models_and_those_of_training(sampling):
    request = a_request(np.random.default_rng(8), prompt=list(range(20, 60)), sampling=sampling, max_new_tokens=10,
                        logprobs=4, prompt_logprobs=True, stop_ids=())
    [heard] = run(engine(), request)
    tokens = [*request.prompt, *heard.tokens[0]]
    expected_TV, scored_T = log_probabilities(tokens)
    told = [*heard.prompt_logprobs[0], *heard.logprobs[0]]
    assert [t.token for t in told] == tokens[1:]
    np.testing.assert_allclose([t.logprob for t in told], scored_T, rtol=0, atol=1e-5)
    for t, expected_V in zip(told, expected_TV, strict=True):
        assert t.logprob == pytest.approx(expected_V[t.token], abs=1e-4)
        best = np.argsort(-expected_V)[:4]
        np.testing.assert_allclose([p for _, p in t.best], expected_V[best], atol=1e-4)


def test_a_prompt_is_scored_and_nothing_generated(monkeypatch):
    """It may fill its slot, and it takes no step; what runs beside it goes on, and its blocks are kept."""
    made, pool = engine(), engine()._pools[0]
    prompt, beside = [int(x) for x in np.random.default_rng(17).integers(0, V, 64)], Request(
        prompt=[1], stop_ids=(), max_new_tokens=20)
    [alone] = run(made, beside)
    starts = noted(monkeypatch, made, "start", lambda args, _: int((args[3] < len(pool.rows)).sum()))
    scored = Request(prompt=prompt, max_new_tokens=0, logprobs=2, prompt_logprobs=True, n=2)
    tokens = made.counts["tokens"]
    [heard, other, silent] = run(made, scored, beside, Request(prompt=prompt, max_new_tokens=0))
    assert (heard.finish, heard.tokens) == (["length"] * 2, [[], []])
    np.testing.assert_allclose([t.logprob for t in heard.prompt_logprobs[1]], log_probabilities(prompt)[1], atol=1e-5)
    assert heard.prompt_logprobs[0] == heard.prompt_logprobs[1]
    assert (silent.finish, silent.tokens, silent.prompt_logprobs) == (["length"], [[]], [None])
    assert other.tokens == alone.tokens
    assert (starts, made.counts["tokens"] - tokens) == ([1], 20)  # The neighbour's alone.
    assert len(pool.cache.find([*prompt, 1])) == 4


def test_bias_and_least_tokens():
    base = a_request(np.random.default_rng(9), prompt=[8, 9, 10], sampling=Sampling(), max_new_tokens=8, stop_ids=())
    [free] = run(engine(), base)
    first = free.tokens[0][0]
    [without] = run(engine(), dataclasses.replace(base, logit_bias={first: -float("inf")}))
    assert first not in without.tokens[0]
    [forced] = run(engine(), dataclasses.replace(base, logit_bias={41: 1e4}))
    assert forced.tokens[0] == [41] * 8
    for least in (0, 3, 8):
        request = dataclasses.replace(base, stop_ids=(41, 42), logit_bias={41: 1e4, 42: 1e4}, min_new_tokens=least)
        [heard] = run(engine(), request)
        assert heard.tokens[0][:least].count(41) + heard.tokens[0][:least].count(42) == 0
        assert (len(heard.tokens[0]), heard.finish[0]) == ((least + 1, "stop") if least < 8 else (8, "length"))


def test_a_bias_is_its_rows_own_and_of_any_size(monkeypatch):
    """In mixes, with several continuations, in slots that had another one before, and after a move to a lower slot."""
    made = engine()
    written = noted(monkeypatch, made, "bias", lambda args, _: int(args[1]))
    rng = np.random.default_rng(16)
    requests = []
    for i in range(14):
        bias = {int(t): float(x) for t, x in enumerate(rng.normal(0, 8, V)) if rng.random() < (0, 0.3, 1)[i % 3]}
        requests.append(Request(
            prompt=[7 + i, 8, 9], max_new_tokens=30 if i in (7, 12) else 4 + i % 5, stop_ids=(), n=1 + 2 * (i == 4),
            sampling=Sampling(temperature=float(i % 2), seed=i), logit_bias=bias | ({i: -float("inf")} if bias else {}),
        ))
    alone = [run(made, request)[0].tokens for request in requests]
    assert len(written) == sum(bool(request.logit_bias) for request in requests)  # Once for several continuations.
    assert [heard.tokens for heard in run(made, *requests)] == alone
    assert alone != [run(made, dataclasses.replace(request, logit_bias={}))[0].tokens for request in requests]
    for i, (request, texts) in enumerate(zip(requests, alone, strict=True)):
        assert not request.logit_bias or all(i not in tokens for tokens in texts)
    for i in (1, 2, 5):  # As the whole text's logits say.
        bias_V, prompt = np.zeros(V), requests[i].prompt
        bias_V[list(requests[i].logit_bias)] = list(requests[i].logit_bias.values())
        [greedy] = run(made, dataclasses.replace(requests[i], sampling=Sampling()))
        text = [*prompt, *greedy.tokens[0]]
        tokens_1T = jnp.asarray([text + [0] * (16 - len(text))])  # One shape for all three.
        logits_TV = np.asarray(model()(tokens_1T)[0][0]) + bias_V
        for at, token in enumerate(greedy.tokens[0], start=len(prompt) - 1):
            assert logits_TV[at, token] > logits_TV[at].max() - 1e-5


def test_a_grammar_outranks_bias_and_least_tokens():
    """Where they leave none of the tokens that it allows; and what can be told of no token ends one request alone."""
    vocab = tiny_tokenizer().get_vocab_size() + 5
    tokens = grammar_tokenizer(tiny_tokenizer(), vocab, STOP)
    made = Engine(tiny_model(vocab_size=vocab), EngineConfig(slots=((4, 64),), chunk=16))
    grammar = tokens.matcher(Grammar.choice(["left", "right"]))
    asked = Request(prompt=[50, 60, 70], max_new_tokens=30, stop_ids=STOP, grammar=grammar)
    beside = Request(prompt=[50, 60, 70], max_new_tokens=30, stop_ids=())
    [free, other] = run(made, asked, beside)
    assert free.finish == ["stop"]
    first = free.tokens[0][0]
    for changes in (dict(min_new_tokens=25), dict(logit_bias=dict.fromkeys(STOP, -float("inf"))),
                    dict(logit_bias={first: -float("inf")}), dict(logit_bias=dict.fromkeys(range(50, 64), -1e9))):
        [heard, same] = run(made, dataclasses.replace(asked, **changes), beside)
        assert heard.finish == ["stop"]
        text = tiny_tokenizer().decode(heard.tokens[0][:-1])
        assert text in ("left", "right")
        assert same.tokens == other.tokens
    with pytest.raises(ValueError, match=r"grammar ends texts with \(3, 5, 90\); stop_ids \(3, 5\) must"):
        made.submit(dataclasses.replace(asked, stop_ids=STOP[:2]), Heard())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(grammar), "consume", lambda *_: (_ for _ in ()).throw(ValueError("token 9 is not allowed")))
        [heard, same] = run(made, asked, beside)
    assert (heard.finish, heard.reason) == (["failed"], ["token 9 is not allowed"])
    assert same.tokens == other.tokens


@pytest.mark.parametrize("fixed_rows", [True, False])
def test_at_real_widths(fixed_rows):
    """XLA adds up rows in another order when there are others beside them; with `fixed_rows` there always are."""
    wide = tiny_model(vocab_size=V, hidden_size=1024, ffn_size=2304, layer_types=("conv", "full_attention"))
    made = Engine(wide, EngineConfig(slots=((6, 64),), chunk=64, steps=4, max_logprobs=2, fixed_rows=fixed_rows))
    rng = np.random.default_rng(13)
    requests = [a_request(rng, max_new_tokens=16, min_new_tokens=0, logprobs=2, stop_ids=()) for _ in range(6)]
    requests = [dataclasses.replace(request, prompt=request.prompt[:40]) for request in requests]
    if not fixed_rows:  # Of sampled tokens nothing says when another one is as likely.
        requests = [dataclasses.replace(request, sampling=Sampling()) for request in requests]
    alone = [run(made, request)[0] for request in requests]
    for heard, one in zip(run(made, *requests), alone, strict=True):
        if fixed_rows:
            assert (heard.tokens, heard.logprobs) == (one.tokens, one.logprobs)
        for ours, theirs in zip(heard.logprobs[0], one.logprobs[0], strict=True):
            if ours.token != theirs.token:  # Greedy, and two tokens are as likely.
                assert theirs.best[0][1] - theirs.best[1][1] < 1e-4
                break
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)


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


def noted(monkeypatch, made, name, what):
    """A list of `what(args, kwargs)` of each call of a program of the first pool."""
    programs, found = made._pools[0]._programs, []
    call = getattr(programs, name)
    monkeypatch.setattr(programs, name, lambda *args, **kwargs: (found.append(what(args, kwargs)),
                                                                 call(*args, **kwargs))[1])
    return found


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
