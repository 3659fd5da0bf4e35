"""What a request asks of the choice of its tokens: grammars, bias, penalties, log-probabilities."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engines import STOP, Heard, V, a_request, engine, model, noted, run
from helpers import long

from lfm_jax.engine import pool as pools
from lfm_jax.engine import slots as slots_of
from lfm_jax.engine.config import EngineConfig
from lfm_jax.engine.engine import Engine
from lfm_jax.engine.request import Request
from lfm_jax.infer.generate import generate_tokens
from lfm_jax.kernels.logprobs import token_logprobs
from lfm_jax.sampling import ANYTHING, Sampling, to_arrays
from lfm_jax.structured.grammar import Grammar, grammar_tokenizer
from lfm_jax.testing import tiny_model, tiny_tokenizer


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
    slots_of._next_tokens(made, jnp.zeros((3, 1, V)), None, ANYTHING, shape, None, lambda: made.bias_BV)
    expected = to_arrays([Sampling(), everything, Sampling()], V)[0]
    jax.tree.map(np.testing.assert_array_equal, seen[0], expected)


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
