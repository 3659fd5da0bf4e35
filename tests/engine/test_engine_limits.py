"""The engine: whose turn it is, cancelling and deadlines, what it refuses, memory, threads, failures."""

import contextlib
import dataclasses
import threading

import jax
import numpy as np
import pytest
from engines import CONFIG, Heard, V, a_request, assert_slots_are_whole, engine, model, run
from helpers import long

from lfm_jax.config import ModelConfig
from lfm_jax.engine.config import EngineConfig
from lfm_jax.engine.engine import Engine
from lfm_jax.engine.placement import fit_slots, memory_needed
from lfm_jax.engine.request import LOGITS_NOT_FINITE, ContextLengthError, EngineFullError, Request
from lfm_jax.engine.variants import chunk_width, chunk_widths
from lfm_jax.infer.generate import generate_tokens
from lfm_jax.model import abstract_model
from lfm_jax.structured.grammar import Grammar, grammar_tokenizer
from lfm_jax.testing import tiny_model, tiny_tokenizer


def test_a_short_prompt_need_not_wait_for_a_long_one():
    for order, (one, other) in ((1, (91, 92)), (-1, (93, 94))):  # Prompts of which nothing is cached.
        heard = [Heard(), Heard()]
        requests = [Request(prompt=[one] * 300, max_new_tokens=4), Request(prompt=[other] * 70, max_new_tokens=4)]
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


def test_a_deadline_ends_what_runs():
    request = Request(prompt=list(range(64)), max_new_tokens=200, stop_ids=(), deadline=600, n=2)
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


@pytest.mark.parametrize("config", [
    EngineConfig(slots=((5, 64),), chunk=16, prefill_rows=2, draft=2, prefix_cache_bytes=1 << 20, max_logprobs=2),
    long(EngineConfig(slots=((5, 64),), chunk=64, max_logprobs=2)),  # Prompts one by one or four at a time.
], ids=["drafts", "groups"])
def test_nothing_is_compiled_after_warming_up(config):
    """In `make test-long` prompts in groups too."""
    compiled = []

    def note(event, _, **__):
        if "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    made = Engine(tiny_model(vocab_size=V + 1, layer_types=("conv", "full_attention")), config)
    made.warm_up()
    assert compiled
    compiled.clear()
    rng = np.random.default_rng(14)
    requests = [a_request(rng, max_new_tokens=9, min_new_tokens=0, n=1 + i % 3) for i in range(12)]
    requests = [dataclasses.replace(r, prompt=r.prompt[:40]) for r in requests]
    requests += [dataclasses.replace(requests[0], prompt=[i, i + 1], n=1, logprobs=1, prompt_logprobs=i < 4)
                 for i in range(8)]
    tickets = [made.submit(request, Heard(request.n)) for request in requests]
    made.step()
    made.cancel(tickets[1])
    while made.step():
        pass
    jax.monitoring.unregister_event_duration_listener(note)
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


@pytest.mark.parametrize("end", ["length", "cancelled", "deadline", "failed"])
def test_what_is_under_way_after_its_slot_was_given_on(end):
    made = Engine(model(), CONFIG)
    heard = Heard()
    ticket = made.submit(Request(prompt=[1, 2], max_new_tokens=1, stop_ids=()), heard)
    made.step()
    assert (made.running(), heard.tokens, heard.finish) == (0, [[]], [None])
    if end == "cancelled":
        made.cancel(ticket)
    if end == "deadline":
        ticket.expires = 0
    if end == "failed":
        made._fail(RuntimeError("a test"))
    while made.step():
        pass
    assert heard.finish == [end]
    assert len(heard.tokens[0]) == (end == "length")
    assert made.counts == {"prompt_tokens": 2, end: 1} | (
        {"tokens": 1, "steps": 1} if end == "length" else {})


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
    (dict(n=7), "n is 7; there are 6 slots of its length"),
    (dict(stop_ids=tuple(range(9))), "max_stop_ids is 8"),
    (dict(logit_bias=dict.fromkeys(range(97), -float("inf"))), "logit_bias forbids every token; leave one"),
    (dict(logit_bias=dict.fromkeys(range(2, 97), -float("inf")), stop_ids=(0, 1), min_new_tokens=1),
     "min_new_tokens is 1, but logit_bias leaves stop ids only"),
    (dict(logprobs=6), "logprobs is 6; the engine's max_logprobs is 5"),
    (dict(prompt=[97]), r"prompt has \[97\]; token ids lie in 0..96"),
    (dict(stop_ids=(-1,)), r"stop_ids has \[-1\]"), (dict(logit_bias={99: 1.0}), r"logit_bias has \[99\]"),
])
def test_what_the_engine_cannot_take(changes, message):
    with pytest.raises(ValueError, match=message):
        engine().submit(Request(**dict(prompt=[1], max_new_tokens=5) | changes), Heard())
    assert engine().waiting() == 0


def test_too_long_a_request_is_told_in_openais_words():
    for prompt, new in ((list(range(90)) * 4, 5), ([1] * 320, 1), ([1], 320)):
        with pytest.raises(ContextLengthError) as error:
            engine().submit(Request(prompt=prompt, max_new_tokens=new), Heard())
        assert str(error.value) == (
            f"This model's maximum context length is 320 tokens. However, you requested {len(prompt) + new} tokens "
            f"({len(prompt)} in the messages, {new} in the completion). Please reduce the length of the messages or "
            "completion."
        )
        assert (error.value.limit, error.value.prompt_tokens, error.value.max_new_tokens) == (320, len(prompt), new)


def test_bad_requests_and_configs_list_every_field():
    bad = dict(prompt="text", max_new_tokens=-1, min_new_tokens=-1, n=0, logit_bias={1: float("nan")}, logprobs=-1,
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


@pytest.mark.parametrize("length", [8_192, long(32_768)])
def test_a_long_slot_beside_short_ones(length):
    """In `make test-long` the length that models are trained for."""
    long_model = tiny_model(vocab_size=V, max_position=length)
    made = Engine(long_model, EngineConfig(slots=((3, 64), (1, length)), chunk=512))
    rng = np.random.default_rng(10)
    prompt = rng.integers(0, V, length - 8).tolist()
    short = [Request(prompt=prompt[i : i + 9], max_new_tokens=20, stop_ids=()) for i in range(5)]
    heard = run(made, Request(prompt=prompt, max_new_tokens=8, stop_ids=()), *short)
    assert heard[0].finish == ["length"]
    [theirs] = generate_tokens(long_model, [prompt], max_new_tokens=8, stop_ids=())
    assert heard[0].tokens[0] == theirs.tokens
    assert [each.tokens[0] for each in heard[1:]] == [run(made, request)[0].tokens[0] for request in short]


def test_memory_is_counted_before_anything_is_made():
    config = EngineConfig(slots=((3, 64), (1, 4096)), chunk=16, prefix_cache_bytes=1000)
    shapes = abstract_model(model().config)[1]
    memory = memory_needed(config, model().config, shapes)
    made = Engine(model(), config)
    assert made.memory == memory
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
        lowered = pool._programs.decode.lower(pool.params, pool._slots, np.int32(1), rows=rows, plain=True,
                                              draft=0)
        taken = lowered.compile().memory_analysis().temp_size_in_bytes
        needed = memory_needed(many, model().config, shapes)["working"]
        assert taken < needed + 2**20  # That is for what the layers make.
    large = ModelConfig.preset("lfm2.5-350m")
    memory = memory_needed(EngineConfig(slots=((64, 1024), (2, 32_768))), large, abstract_model(large)[1])
    beside = 4 + 5 * large.vocab_size + 4 * 32_768  # Tokens seen, bias, history, and a little for what is asked.
    assert 0 <= memory["2 slots of 32768 tokens"] / 2 - large.state_bytes(32_768) - beside < 1000


def test_slots_of_our_own_choice_have_room_for_the_trained_context():
    """Beside short ones, as far as memory goes, and never beyond the model's positions."""
    free = EngineConfig(slots=())

    def slots(config, gib):
        return fit_slots(free, config, abstract_model(config)[1], None, int(gib * 2**30)).slots

    large = ModelConfig.preset("lfm2.5-350m")
    assert slots(large, 16) == ((16, 2048), (1, 32_768))
    assert slots(large, 3.5) == ((16, 2048), (1, 16_384))
    assert slots(large, 2.5) == ((8, 2048),)
    assert slots(large, 0.1) == ((1, 512),)
    assert slots(tiny_model(max_position=4096).config, 16) == ((16, 2048), (1, 4096))
    assert slots(tiny_model(max_position=1024).config, 16) == ((16, 1024),)
    made = Engine(model(), dataclasses.replace(free, chunk=16))
    assert made.config.slots == ((16, 2048), (1, 4096))
    assert made.longest == 4096
    with pytest.raises(ValueError, match=r"the engine needs .* MiB .* and may use 0.1; take fewer"):
        Engine(model(), dataclasses.replace(free, memory_bytes=100_000))
    given = EngineConfig(slots=((3, 64),))
    assert fit_slots(given, large, abstract_model(large)[1], None, 1) is given


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
    assert_slots_are_whole(made)


def broken_model(vocab_size, token):
    """A small model with logits that are NaN once `token` is in the text."""
    broken = tiny_model(vocab_size=vocab_size, tie_embedding=False, layer_types=("conv", "full_attention"))
    broken.embed[...] = broken.embed[...].at[token].set(np.nan)
    return broken


def test_logits_that_are_not_finite_end_their_request_alone():
    """In a prompt, in its scores, at the first token, at a later one, with drafts, and under a grammar."""
    vocab = tiny_tokenizer().get_vocab_size()
    broken, bad = broken_model(vocab, 80), Request(prompt=[4, 80, 6], max_new_tokens=9, stop_ids=(), logprobs=2)
    beside = [Request(prompt=[7, 8, 9], max_new_tokens=20, stop_ids=(), logit_bias={80: -float("inf")}),
              Request(prompt=[9, 8] * 9, max_new_tokens=20, stop_ids=(), logit_bias={80: -float("inf")})]
    late = Request(prompt=[7, 8, 9], max_new_tokens=9, stop_ids=(), logprobs=2, logit_bias={80: 1e4})
    tokens = grammar_tokenizer(tiny_tokenizer(), vocab, (3,))
    made = Engine(broken, dataclasses.replace(CONFIG, slots=((6, 64),), draft=2))
    alone = [run(made, request)[0] for request in beside]
    asked = [bad, late, dataclasses.replace(bad, n=2), dataclasses.replace(bad, prompt_logprobs=True, n=2),
             dataclasses.replace(bad, stop_ids=(3,), grammar=tokens.matcher(Grammar.regex("[a-f]{5}"))),
             dataclasses.replace(late, stop_ids=(3,), grammar=tokens.matcher(
                 Grammar.regex(tiny_tokenizer().decode([80]) + "[a-f]{5}")), logit_bias={})]
    counts, failed = [0, 1, 0, 0, 0, 1], 0
    for request, made_tokens in zip(asked, counts, strict=True):
        heard, *others = run(made, request, *beside)
        assert heard.finish == ["failed"] * request.n
        assert heard.reason == [LOGITS_NOT_FINITE] * request.n
        assert heard.tokens == [[80] * made_tokens] * request.n
        assert all(np.isfinite(t.logprob) for told in heard.logprobs for t in told)
        assert heard.prompt_logprobs == [None] * request.n
        assert [(o.tokens, o.finish) for o in others] == [(o.tokens, o.finish) for o in alone]
        failed += request.n
        assert made.counts["not_finite"] == made.counts["failed"] == failed


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
    monkeypatch.setattr(made._pools[0], "generate", lambda **_: 1 / 0)
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
    assert_slots_are_whole(made)
    made.close()


@pytest.mark.parametrize("where", ["handing out", "taking in"])
def test_a_failure_is_told_to_those_whose_slots_were_given_on(monkeypatch, capsys, where):
    made = Engine(model(), CONFIG)
    pool, take_in = made._pools[0], made._pools[0]._take_in

    def fail_behind(*args):
        take_in(*args)
        raise ZeroDivisionError

    if where == "handing out":
        monkeypatch.setattr(made, "_hand_out", lambda *_, **__: 1 / 0)
    else:
        monkeypatch.setattr(pool, "_take_in", fail_behind)
    heard = Heard()
    made.submit(Request(prompt=[1, 2], max_new_tokens=1), heard)
    made.serve()
    made._thread.join(60)
    assert heard.finish == ["failed"]
    assert pool.rows == [None] * 6
    assert "ZeroDivisionError" in capsys.readouterr().err
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
