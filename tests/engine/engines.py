"""For tests of the engine: a small one, requests to it, and what is said of them."""

import dataclasses
import functools

import numpy as np
import pytest
from helpers import KINDS

from lfm_jax.engine.config import EngineConfig
from lfm_jax.engine.engine import Engine
from lfm_jax.engine.request import Request
from lfm_jax.sampling import Sampling
from lfm_jax.testing import tiny_model

V, STOP = 97, (3, 5, 90)
CONFIG = EngineConfig(slots=((6, 64), (2, 320)), chunk=16, prefix_cache_bytes=1 << 20, max_logprobs=5)


@functools.cache
def model(kind="hybrid"):
    return tiny_model(vocab_size=V, **KINDS[kind])


@functools.cache
def engine(fixed_rows=False):
    made = Engine(model(), dataclasses.replace(CONFIG, fixed_rows=fixed_rows))
    made.warm_up()
    return made


def a_request(rng, **changes):
    shared = [int(x) for x in np.arange(10, 10 + rng.choice([0, 16, 33, 48]))]
    prompt = [*shared, *rng.integers(0, V, rng.integers(1, 30)).tolist()]
    sampling = Sampling() if rng.random() < 0.6 else Sampling(
        temperature=float(rng.choice([0.3, 1.0])), top_k=int(rng.choice([0, 5, 80])), top_p=float(rng.choice([0.5, 1])),
        min_p=float(rng.choice([0, 0.05])), repetition_penalty=float(rng.choice([1, 1.2])), seed=int(rng.integers(99)),
    )
    if sampling.seed % 3 == 2:
        sampling = dataclasses.replace(sampling, frequency_penalty=0.8, presence_penalty=0.5)
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
        self.reason, self.cached = [None] * n, [None] * n

    def __call__(self, event):
        assert self.finish[event.choice] is None
        self.tokens[event.choice] += event.tokens
        self.logprobs[event.choice] += event.logprobs or []
        self.prompt_logprobs[event.choice] = event.prompt_logprobs or self.prompt_logprobs[event.choice]
        if event.cached_tokens is not None:
            assert self.cached[event.choice] is None
            self.cached[event.choice] = event.cached_tokens
        self.finish[event.choice], self.reason[event.choice] = event.finish, event.reason


def assert_slots_are_whole(made):
    """Every slot is free, once: none is lost and none is given to two."""
    for pool in made._pools:
        assert sorted(pool._free) == list(range(len(pool.rows)))


def run(made, *requests):
    heard = [Heard(request.n) for request in requests]
    for request, each in zip(requests, heard, strict=True):
        made.submit(request, each)
    while made.step():
        pass
    assert made.running() == made.waiting() == 0
    assert_slots_are_whole(made)
    return heard


def assert_mixes_are_as_alone(made, requests, alone, mixes, rng, tolerance):
    """Random mixes of the requests, that come and are cancelled at any turn: the same tokens and log-probabilities."""
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
                assert_same_logprobs(each.logprobs[0], alone[i].logprobs[0], tolerance)
    assert made.running() == made.waiting() == 0
    assert_slots_are_whole(made)


def noted(monkeypatch, made, name, what):
    """A list of `what(args, kwargs)` of each call of a program of the first pool."""
    programs, found = made._pools[0]._programs, []
    call = getattr(programs, name)
    monkeypatch.setattr(programs, name, lambda *args, **kwargs: (found.append(what(args, kwargs)),
                                                                 call(*args, **kwargs))[1])
    return found


def assert_same_logprobs(ours, theirs, tolerance):
    """Of the same tokens; of the likeliest ones only the numbers, since two may be as likely."""
    for one, other in zip(ours, theirs, strict=True):
        assert one.token == other.token
        assert one.logprob == pytest.approx(other.logprob, abs=tolerance, rel=0)
        assert [x for _, x in one.best] == pytest.approx([x for _, x in other.best], abs=tolerance, rel=0)
        assert tolerance or one == other
