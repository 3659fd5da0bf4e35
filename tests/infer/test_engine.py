"""The engine: what a request gets is its own, whoever runs beside it; limits; news; nothing compiled on the way."""

import contextlib
import dataclasses
import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lfm_jax.config import ModelConfig
from lfm_jax.infer.engine import Engine
from lfm_jax.infer.engine_config import EngineConfig
from lfm_jax.infer.generate import generate_tokens
from lfm_jax.infer.grammar import Grammar, grammar_tokenizer
from lfm_jax.infer.pool import chunk_width, chunk_widths
from lfm_jax.infer.prefix_cache import PrefixCache
from lfm_jax.infer.request import EngineFullError, Request
from lfm_jax.infer.sampling import Sampling
from lfm_jax.testing import tiny_model, tiny_tokenizer

V, STOP = 97, (3, 5, 90)
CONFIG = EngineConfig(slots=((6, 64), (2, 320)), chunk=16, prefix_cache_bytes=1 << 20, max_logprobs=5)


@functools.cache
def model():
    return tiny_model(vocab_size=V)


@functools.cache
def engine():
    made = Engine(model(), CONFIG)
    made.warm_up()
    return made


def a_request(rng, **changes):
    shared = [int(x) for x in np.arange(10, 10 + rng.choice([0, 16, 33, 48]))]
    prompt = [*shared, *rng.integers(0, V, rng.integers(1, 30)).tolist()]
    sampling = Sampling() if rng.random() < 0.6 else Sampling(
        temperature=float(rng.choice([0.3, 1.0])), top_k=int(rng.choice([0, 5, 80])), top_p=float(rng.choice([0.5, 1])),
        min_p=float(rng.choice([0, 0.05])), repetition_penalty=float(rng.choice([1, 1.2])), seed=int(rng.integers(99)),
    )
    fields = dict(prompt=prompt, max_new_tokens=int(rng.integers(1, 24)), sampling=sampling, stop_ids=STOP)
    if rng.random() < 0.2:
        fields |= dict(min_new_tokens=int(rng.integers(fields["max_new_tokens"] + 1)))
    if rng.random() < 0.1:
        fields |= dict(prompt=[*prompt, *rng.integers(0, V, 100).tolist()])
    if rng.random() < 0.2:
        fields |= dict(logprobs=2)
    return Request(**fields | changes)


class Heard:
    """Everything said of one request."""

    def __init__(self, n=1):
        self.tokens, self.finish = [[] for _ in range(n)], [None] * n
        self.logprobs, self.prompt_logprobs = [[] for _ in range(n)], [None] * n
        self.reason = [None] * n

    def __call__(self, event):
        assert self.finish[event.choice] is None
        self.tokens[event.choice] += event.tokens
        self.logprobs[event.choice] += event.logprobs or []
        self.prompt_logprobs[event.choice] = event.prompt_logprobs or self.prompt_logprobs[event.choice]
        self.finish[event.choice], self.reason[event.choice] = event.finish, event.reason


def run(made, *requests):
    heard = [Heard(request.n) for request in requests]
    for request, each in zip(requests, heard, strict=True):
        made.submit(request, each)
    while made.step():
        pass
    assert made.running() == made.waiting() == 0
    return heard


def test_500_mixes_give_each_request_what_it_gets_alone():
    rng = np.random.default_rng(0)
    requests = [a_request(rng) for _ in range(60)]
    cached = engine().counts["cached_tokens"]
    alone = [run(engine(), request)[0] for request in requests]
    sizes = {name: program._cache_size() for name, program in programs_of(engine())}
    for _ in range(500):
        picked = rng.choice(len(requests), rng.integers(2, 10), replace=False)
        arrivals = sorted(rng.integers(0, 6, len(picked)).tolist())
        heard, cancelled = {i: Heard() for i in picked}, {}
        turn = 0
        todo = list(zip(arrivals, picked, strict=True))
        while todo or engine().step():
            while todo and todo[0][0] <= turn:
                i = todo.pop(0)[1]
                ticket = engine().submit(requests[i], heard[i])
                if rng.random() < 0.1:
                    cancelled[i] = (turn + int(rng.integers(0, 4)), ticket)
            for when, ticket in cancelled.values():
                if when == turn:
                    engine().cancel(ticket)
            turn += 1
            if todo:
                engine().step()
        for i, each in heard.items():
            if each.finish == ["cancelled"]:
                assert i in cancelled
                assert alone[i].tokens[0][: len(each.tokens[0])] == each.tokens[0]
            else:
                assert (each.tokens, each.finish) == (alone[i].tokens, alone[i].finish)
                assert each.logprobs == alone[i].logprobs
    assert engine().running() == engine().waiting() == 0
    assert engine().counts["cached_tokens"] > cached
    assert {name: program._cache_size() for name, program in programs_of(engine())} == sizes  # Nothing was compiled.


def test_mixes_with_grammars_give_each_request_what_it_gets_alone():
    """While a grammar is at work its neighbours go one token at a time: the same tokens, whenever it comes and goes."""
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
    for _ in range(60):
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
    assert ended > 50  # By the grammar's own end.


def programs_of(made):
    return [(f"{pool.shape.length} {name}", program) for pool in made._pools
            for name, program in vars(pool._programs).items() if hasattr(program, "_cache_size")]


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


def test_several_continuations_are_those_of_their_seeds():
    rng = np.random.default_rng(3)
    request = a_request(rng, sampling=Sampling(temperature=1.0, seed=2**32 - 2), n=4, max_new_tokens=12, logprobs=1)
    [heard], others = run(engine(), request), [
        run(engine(), dataclasses.replace(request, n=1, sampling=request.choice_sampling(i)))[0] for i in range(4)
    ]
    assert heard.tokens == [other.tokens[0] for other in others]
    assert heard.finish == [other.finish[0] for other in others]
    assert len({tuple(tokens) for tokens in heard.tokens}) > 1


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
    request = a_request(np.random.default_rng(5), prompt=list(range(50)), max_new_tokens=14)
    longer = dataclasses.replace(request, prompt=[*range(40), 7, 7, 7])
    for pool in engine()._pools:
        pool.cache.clear()
    first = run(engine(), request, longer)
    before = engine().counts["cached_tokens"]
    again = run(engine(), request, longer)
    assert engine().counts["cached_tokens"] - before == 48 + 32
    assert [heard.tokens for heard in first] == [heard.tokens for heard in again]
    uncached = Engine(model(), dataclasses.replace(CONFIG, prefix_cache_bytes=0))
    assert [heard.tokens for heard in run(uncached, request, longer)] == [heard.tokens for heard in first]
    assert uncached.counts["cached_tokens"] == 0


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


@pytest.mark.parametrize("name", DRAFTING)
def test_drafts_change_no_token(name):
    made_of = tiny_model(vocab_size=10, **DRAFTING[name])  # So few tokens that texts repeat themselves.
    config = EngineConfig(slots=((4, 128),), chunk=16)
    plain, drafting = Engine(made_of, config), Engine(made_of, dataclasses.replace(config, draft=4))
    rng = np.random.default_rng(7)
    requests = []
    for i in range(12):
        phrase = rng.integers(0, 10, rng.integers(2, 9)).tolist()
        sampling = Sampling(temperature=0.7, seed=i) if i % 4 == 0 else Sampling(repetition_penalty=1 + (i % 5 == 0))
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


def test_drafts_are_refused_with_recurrences():
    recurrent = tiny_model(layer_types=("recurrence", "full_attention"))
    with pytest.raises(ValueError, match="leave draft at 0"):
        Engine(recurrent, EngineConfig(slots=((2, 64),), draft=2))
    request = Request(prompt=[1, 2, 3], max_new_tokens=9)
    [heard] = run(Engine(recurrent, EngineConfig(slots=((2, 64),), chunk=16, prefix_cache_bytes=10**6)), request)
    assert heard.tokens[0] == generate_tokens(recurrent, [[1, 2, 3]], max_new_tokens=9)[0].tokens


def log_probabilities(tokens):
    logits_TV = model()(jnp.asarray([tokens]))[0][0]
    return np.asarray(jax.nn.log_softmax(logits_TV))


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.5, top_k=3, repetition_penalty=1.3)])
def test_log_probabilities_are_the_models(sampling):
    request = a_request(np.random.default_rng(8), prompt=list(range(20, 60)), sampling=sampling, max_new_tokens=10,
                        logprobs=4, prompt_logprobs=True, stop_ids=())
    [heard] = run(engine(), request)
    tokens = [*request.prompt, *heard.tokens[0]]
    expected_TV = log_probabilities(tokens)
    told = [*heard.prompt_logprobs[0], *heard.logprobs[0]]
    assert [t.token for t in told] == tokens[1:]
    for t, expected_V in zip(told, expected_TV, strict=False):
        assert t.logprob == pytest.approx(expected_V[t.token], abs=1e-4)
        best = np.argsort(-expected_V)[:4]
        np.testing.assert_allclose([p for _, p in t.best], expected_V[best], atol=1e-4)


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
    made = Engine(wide, EngineConfig(slots=((6, 64),), chunk=16, steps=4, max_logprobs=2, fixed_rows=fixed_rows))
    rng = np.random.default_rng(13)
    requests = [a_request(rng, max_new_tokens=16, min_new_tokens=0, logprobs=2, stop_ids=()) for _ in range(6)]
    requests = [dataclasses.replace(request, prompt=request.prompt[:40]) for request in requests]
    alone = [run(made, request)[0] for request in requests]
    for heard, one in zip(run(made, *requests), alone, strict=True):
        if fixed_rows:
            assert (heard.tokens, heard.logprobs) == (one.tokens, one.logprobs)
        for ours, theirs in zip(heard.logprobs[0], one.logprobs[0], strict=True):
            if ours.token != theirs.token:  # Greedy, and two tokens are as likely.
                assert theirs.best[0][1] - theirs.best[1][1] < 1e-4
                break
            assert ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)


def test_a_short_prompt_need_not_wait_for_a_long_one():
    for order in (1, -1):
        heard = [Heard(), Heard()]
        requests = [Request(prompt=[1] * 300, max_new_tokens=4), Request(prompt=[2] * 70, max_new_tokens=4)]
        long, short = requests
        for i in (0, 1)[::order]:
            engine().submit(requests[i], heard[i])
        turns = [None, None]
        for turn in range(100):
            more = engine().step()
            for i in (0, 1):
                if turns[i] is None and heard[i].tokens[0]:
                    turns[i] = turn
            if not more:
                break
        assert turns[1] <= 2 * len(short.prompt) // 16 + 2
        assert turns[0] <= (len(long.prompt) + len(short.prompt)) // 16 + 4
        for pool in engine()._pools:
            pool.cache.clear()


def test_a_deadline_ends_what_runs():
    request = Request(prompt=list(range(64)), max_new_tokens=200, stop_ids=(), deadline=0.2, n=2)
    for turns in (1, 6):  # While the prompt is taken in, and while it generates.
        heard = Heard(2)
        ticket = engine().submit(request, heard)
        for _ in range(turns):
            engine().step()
        ticket.expires = 0
        engine().step()
        assert heard.finish == ["deadline"] * 2
        assert engine().running() == 0
        while engine().step():
            pass


def test_nothing_is_compiled_after_warming_up():
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **__: compiled.append(event) if "backend_compile" in event else None)
    made = Engine(tiny_model(vocab_size=V + 1), EngineConfig(slots=((5, 64),), chunk=16, prefill_rows=2, draft=2,
                                                             prefix_cache_bytes=1 << 20, max_logprobs=2))
    made.warm_up()
    assert compiled
    compiled.clear()
    rng = np.random.default_rng(14)
    requests = [a_request(rng, max_new_tokens=9, min_new_tokens=0, n=1 + i % 3) for i in range(12)]
    requests = [dataclasses.replace(r, prompt=r.prompt[:40]) for r in requests]
    requests.append(dataclasses.replace(requests[0], logprobs=1, prompt_logprobs=True))
    tickets = [made.submit(request, Heard(request.n)) for request in requests]
    made.step()
    made.cancel(tickets[1])
    while made.step():
        pass
    jax.monitoring.clear_event_listeners()
    assert compiled == []


def test_cancelling_frees_the_slot_in_one_turn():
    requests = [a_request(np.random.default_rng(i), prompt=list(range(40)), max_new_tokens=20, stop_ids=())
                for i in range(9)]
    heard = [Heard() for _ in requests]
    tickets = [engine().submit(request, each) for request, each in zip(requests, heard, strict=True)]
    engine().step()
    assert (engine().running(), engine().waiting()) == (6, 3)
    for ticket in tickets[:8]:  # Six in slots, two that wait.
        engine().cancel(ticket)
    engine().step()
    assert (engine().running(), engine().waiting()) == (1, 0)
    while engine().step():
        pass
    assert [each.finish[0] for each in heard] == ["cancelled"] * 8 + ["length"]
    engine().cancel(tickets[0])  # Once more is nothing.
    with pytest.raises(ValueError, match=r"choice is 1; the request has continuations 0..0"):
        engine().cancel(tickets[0], 1)
    assert not engine().step()


def test_deadline_and_queue():
    made = Engine(model(), dataclasses.replace(CONFIG, max_queue=2))
    request = Request(prompt=[1, 2], max_new_tokens=30, stop_ids=())
    late, in_time = Heard(), Heard()
    made.submit(dataclasses.replace(request, deadline=1e-9), late)
    made.submit(request, in_time)
    with pytest.raises(EngineFullError, match="2 requests wait already"):
        made.submit(request, Heard())
    while made.step():
        pass
    assert (late.finish, in_time.finish) == (["deadline"], ["length"])
    assert made.counts["deadline"] == 1


@pytest.mark.parametrize(("changes", "message"), [
    (dict(prompt=list(range(90)) * 4), "prompt has 360 tokens, with max_new_tokens 5 more than the longest slot, 320"),
    (dict(n=7), "n is 7; there are 6 slots of its length"),
    (dict(stop_ids=tuple(range(9))), "max_stop_ids is 8"),
    (dict(logit_bias=dict.fromkeys(range(17), 1.0)), "max_biases is 16"),
    (dict(logprobs=6), "logprobs is 6; the engine's max_logprobs is 5"),
    (dict(prompt=[97]), r"prompt has \[97\]; token ids lie in 0..96"),
    (dict(stop_ids=(-1,)), r"stop_ids has \[-1\]"), (dict(logit_bias={99: 1.0}), r"logit_bias has \[99\]"),
])
def test_what_the_engine_cannot_take(changes, message):
    with pytest.raises(ValueError, match=message):
        engine().submit(Request(**dict(prompt=[1], max_new_tokens=5) | changes), Heard())
    assert engine().waiting() == 0


def test_bad_requests_and_configs_list_every_field():
    bad = dict(prompt="text", max_new_tokens=0, min_new_tokens=-1, n=0, logit_bias={1: float("nan")}, logprobs=-1,
               deadline=0)
    with pytest.raises(ValueError, match="Request is not valid") as error:
        Request(**bad)
    assert all(name in str(error.value) for name in bad)
    with pytest.raises(ValueError, match="min_new_tokens 5 exceeds max_new_tokens 4"):
        Request(prompt=[1], min_new_tokens=5, max_new_tokens=4)
    with pytest.raises(ValueError, match="prompt_logprobs needs logprobs"):
        Request(prompt=[1], prompt_logprobs=True)
    bad = dict(slots=((0, 5),), chunk=24, prefill_rows=0, steps=33, draft=-1, max_queue=0, memory_bytes=0)
    with pytest.raises(ValueError, match="EngineConfig is not valid") as error:
        EngineConfig(**bad)
    assert all(name in str(error.value) for name in bad)
    for bad in (dict(slots=(5,)), dict(slots=5), dict(chunk="a"), dict(steps=None)):
        with pytest.raises(ValueError, match=f"{next(iter(bad))} is"):
            EngineConfig(**bad)
    for bad in (dict(deadline="5"), dict(logit_bias=[1])):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Request(prompt=[1], **bad)
    with pytest.raises(ValueError, match="names a length twice"):
        EngineConfig(slots=((1, 64), (2, 64)))
    with pytest.raises(ValueError, match="slots of 5000 tokens exceed the model's max_position 4096"):
        Engine(model(), EngineConfig(slots=((1, 5000),)))


def test_a_long_slot_beside_short_ones():
    long_model = tiny_model(vocab_size=V, max_position=32_768)
    made = Engine(long_model, EngineConfig(slots=((3, 64), (1, 32_768)), chunk=512))
    rng = np.random.default_rng(10)
    prompt = rng.integers(0, V, 32_760).tolist()
    short = [Request(prompt=prompt[i : i + 9], max_new_tokens=20, stop_ids=()) for i in range(5)]
    heard = run(made, Request(prompt=prompt, max_new_tokens=8, stop_ids=()), *short)
    assert heard[0].finish == ["length"]
    [theirs] = generate_tokens(long_model, [prompt], max_new_tokens=8, stop_ids=())
    assert heard[0].tokens[0] == theirs.tokens
    assert [each.tokens[0] for each in heard[1:]] == [run(made, request)[0].tokens[0] for request in short]


def test_memory_is_counted_before_anything_is_made():
    config = EngineConfig(slots=((3, 64), (1, 4096)), chunk=16, prefix_cache_bytes=1000)
    memory = config.memory(model().config)
    made = Engine(model(), config)
    for pool in made._pools:
        held = sum(x.nbytes for x in jax.tree.leaves(pool._slots))
        assert memory[f"{pool.shape.slots} slots of {pool.shape.length} tokens"] == held
    assert memory["parameters"] == 4 * model().config.num_params()
    assert memory["prefix cache"] == 1000
    with pytest.raises(ValueError, match=r"the engine needs .* MiB .* and may use 0.1; take fewer or shorter slots"):
        Engine(model(), dataclasses.replace(config, memory_bytes=100_000))
    many = EngineConfig(slots=((64, 4096),), chunk=16)
    [pool] = Engine(model(), many)._pools
    for rows in pool.shape.row_counts:
        lowered = pool._programs.decode.lower(pool._params, pool._slots, np.int32(1), rows=rows, plain=True)
        taken = lowered.compile().memory_analysis().temp_size_in_bytes
        assert taken < many.memory(model().config)["working"] + 2**20  # That is for what the layers make.
    large = ModelConfig.preset("lfm2.5-350m")
    memory = EngineConfig(slots=((64, 1024), (2, 32_768))).memory(large)
    beside = 4 + large.vocab_size + 4 * 32_768  # Tokens seen, history, and a little for what is asked.
    assert 0 <= memory["2 slots of 32768 tokens"] / 2 - large.state_bytes(32_768) - beside < 1000


def test_served_from_many_threads():
    made = Engine(model(), CONFIG)
    made.serve()
    rng = np.random.default_rng(11)
    requests = [a_request(rng) for _ in range(24)]
    heard = [Heard() for _ in requests]
    threads = [threading.Thread(target=made.submit, args=pair) for pair in zip(requests, heard, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    made.close()
    assert [each.tokens for each in heard] == [run(engine(), request)[0].tokens for request in requests]
    with pytest.raises(RuntimeError, match="closed"):
        made.submit(requests[0], Heard())


def test_closing_without_draining_ends_everything():
    made = Engine(model(), CONFIG)
    made.serve()
    heard = [Heard() for _ in range(5)]
    for each in heard:
        made.submit(Request(prompt=[1, 2, 3], max_new_tokens=200, stop_ids=()), each)
    made.close(drain=False)
    assert {each.finish[0] for each in heard} <= {"cancelled", "length"}
    assert "cancelled" in {each.finish[0] for each in heard}
    assert made.running() == made.waiting() == 0


def test_a_listener_that_raises_harms_nobody(capsys):
    def bad(event):
        raise KeyError("mine")

    heard = Heard()
    request = Request(prompt=[1, 2, 3], max_new_tokens=20, stop_ids=())
    engine().submit(request, bad)
    engine().submit(request, heard)
    while engine().step():
        pass
    assert heard.finish == ["length"]
    assert engine().running() == 0
    assert "KeyError: 'mine'" in capsys.readouterr().err


def test_a_failure_is_told_to_everyone_and_nobody_waits(monkeypatch, capsys):
    made = Engine(model(), CONFIG)
    made.serve()
    monkeypatch.setattr(made._pools[0], "generate", lambda: 1 / 0)
    heard = []
    with contextlib.suppress(RuntimeError):  # It may have failed before it takes the last of them.
        for n in (1, 2, 2, 3, 6, 6, 1):
            each = Heard(n)
            made.submit(Request(prompt=[1, 2], max_new_tokens=9, n=n), each)
            heard.append(each)
    made._thread.join(60)
    assert len(heard) >= 1
    assert {finish for each in heard for finish in each.finish} == {"failed"}
    assert "ZeroDivisionError" in made.failure
    assert "ZeroDivisionError" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="the engine has failed"):
        made.submit(Request(prompt=[1]), Heard())
    assert made.running() == made.waiting() == 0
    made.close()


def test_chunk_shapes():
    assert [chunk_width(n, 256) for n in (1, 16, 17, 200, 256, 9999)] == [16, 16, 32, 256, 256, 256]
    assert chunk_widths(100, 256) == [16, 32, 64, 128]
    assert chunk_widths(256, 256) == [16, 32, 64, 128, 256]


def test_complete_keeps_order():
    rng = np.random.default_rng(12)
    requests = [a_request(rng, n=int(rng.integers(1, 3))) for _ in range(7)]
    small = Engine(model(), dataclasses.replace(CONFIG, max_queue=1))
    assert [[(c.tokens, c.finish) for c in ends] for ends in small.complete(requests)] == [
        [*zip(heard.tokens, heard.finish, strict=True)] for heard in run(engine(), *requests)
    ]
    with pytest.raises(ValueError, match="token ids"):
        small.complete([Request(prompt=[1]), Request(prompt=[99])])
    small.serve()
    with pytest.raises(RuntimeError, match="serves in a thread of its own"):
        small.complete(requests)
    small.close()
