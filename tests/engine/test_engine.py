"""The engine: what a request gets is its own, whoever runs beside it, whatever the cache holds or a draft guesses."""

import dataclasses

import jax
import numpy as np
import pytest
from engines import CONFIG, STOP, Heard, V, a_request, assert_mixes_are_as_alone, engine, model, run
from helpers import long

from lfm_jax.engine.config import EngineConfig
from lfm_jax.engine.engine import Engine
from lfm_jax.infer.generate import generate_tokens
from lfm_jax.sampling import Sampling
from lfm_jax.testing import tiny_model


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
    assert_mixes_are_as_alone(made, requests, alone, mixes, rng, 0 if fixed_rows else 1e-5)
    assert made.counts["cached_tokens"] > cached
    jax.monitoring.unregister_event_duration_listener(note)
    assert compiled == []


@pytest.mark.parametrize(("kind", "mixes", "fixed_rows"), [
    *((kind, 30, True) for kind in ("moe", "lfm3")),
    *(long(kind, 200, fixed_rows) for kind in ("moe", "lfm3") for fixed_rows in (True, False)),
])
def test_mixes_of_other_layers(kind, mixes, fixed_rows):
    """Experts, whose blocks hold tokens of several requests; and the windows, taps and gates of LFM3.

    To the bit with `fixed_rows`, experts too: a dispatch then always has the same number of tokens, which decides how
    many rows a block has, and a row of a block is computed alike wherever it stands. Without, the rounding may depend
    on that number too. In `make test-long` more mixes, and those without `fixed_rows`.
    """
    made = Engine(model(kind), dataclasses.replace(CONFIG, slots=((6, 256),), fixed_rows=fixed_rows))
    rng = np.random.default_rng(0)
    requests = [a_request(rng) for _ in range(30)]
    alone = [run(made, request)[0] for request in requests]
    cached = made.counts["cached_tokens"]
    assert_mixes_are_as_alone(made, requests, alone, mixes, rng, 0 if fixed_rows else 1e-5)
    assert made.counts["cached_tokens"] > cached


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
