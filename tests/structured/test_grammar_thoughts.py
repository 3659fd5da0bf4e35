"""Grammars after a thought, for tokenizers of both kinds; limits of thoughts."""

import functools
import json

import numpy as np
import pytest
from grammars import END, EOS, START, pick
from tokenizers import AddedToken

from lfm_jax.structured.grammar import Grammar, fill_masks, grammar_tokenizer
from lfm_jax.testing import tiny_tokenizer
from lfm_jax.text.thoughts import CLOSE, OPEN, ThoughtLimit, split_thought, thinking
from lfm_jax.text.tools import parse_tool_calls

V = 340
KINDS = ("text", "special", "plain")
CALL = f"{START}[f(a=1)]{END}"
TOOLS = [{"name": "f", "parameters": {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"]}}]
SCHEMA = {"enum": [12]}
FREE = Grammar.lark("start: /(?s:.*)/")
GRAMMARS = {  # With an answer that fits, and one that does not.
    "schema": (Grammar.json_schema(SCHEMA), "12", "13"),
    "object": (Grammar.json_schema({"type": "object", "properties": {"a": {"const": "x"}}, "required": ["a"]}),
               '{"a": "x"}', '{"a":  "x"}'),
    "regex": (Grammar.regex("a+b"), "aab", "aa"),
    "choice": (Grammar.choice(["yes", "no"]), "no", "yesno"),
    "lark": (Grammar.lark('start: "in " YEAR\nYEAR: /[0-9]{4}/'), "in 1999", "in 99"),
    "required": (Grammar.tool_calls(TOOLS, required=True), CALL, f"{CALL}x"),
    "calls or JSON": (Grammar.tool_calls(TOOLS, answer=SCHEMA), "12", "x"),
    "free": (Grammar.tool_calls(TOOLS), f"x {CALL} y", f"x {CALL} y {CALL}"),
}


@functools.cache
def tokenizer(kind):
    made = tiny_tokenizer()
    if kind != "text":
        made.add_tokens([AddedToken(mark, special=kind == "special", normalized=False) for mark in (OPEN, CLOSE)])
    return made


def how(kind):
    return thinking(tokenizer(kind), CLOSE)


def matcher(kind, grammar, begin="start", most=None):
    made = grammar_tokenizer(tokenizer(kind), V, EOS).matcher(grammar.after_thought(how(kind), begin))
    if most is not None:
        made.limit = ThoughtLimit(tokenizer(kind), how(kind), begin, most)
    return made


def allowed(m):
    masks_BW = np.zeros((1, -(-V // 32)), np.uint32)
    fill_masks([m], masks_BW)
    return np.flatnonzero(np.unpackbits(masks_BW.view(np.uint8)[0], bitorder="little"))


def accepts(kind, grammar, text, begin):
    m = matcher(kind, grammar, begin)
    try:
        for token in tokenizer(kind).encode(text, add_special_tokens=False).ids:
            m.consume(token)
    except ValueError:
        return False
    return m.accepts_eos


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", GRAMMARS)
def test_the_answer_follows_the_thought(kind, name):
    grammar, good, bad = GRAMMARS[name]
    for begin, opening in (("start", OPEN), ("thought", "")):
        for thought in ("", "\nIs it 13?\n\n<|", "é 🦊</thin"):
            for blanks in ("", "\n\n", " "):
                assert accepts(kind, grammar, f"{opening}{thought}{CLOSE}{blanks}{good}", begin)
        assert not accepts(kind, grammar, f"{opening}x{CLOSE}{bad}", begin)
        assert name == "free" or not accepts(kind, grammar, f"{opening}x", begin)
    assert accepts(kind, grammar, good, "start")
    assert not accepts(kind, grammar, good, "thought")
    assert not accepts(kind, grammar, bad, "start")
    assert grammar.after_thought(how(kind), "answer") is grammar


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_relaxed_stays_said(kind):
    tools = [{"name": "f", "parameters": {"properties": {"a": {"propertyNames": {}}}}}]
    grammar = Grammar.tool_calls(tools)
    assert grammar.relaxed
    assert grammar.after_thought(how(kind)).relaxed == grammar.relaxed


def written(m, kind, rng, start=()):
    """What a random model writes after some tokens."""
    m, ids = m.copy(), []
    for token in start:
        m.consume(token)
        ids.append(token)
    while True:
        token = pick(allowed(m), rng)
        m.consume(token)
        assert m.error is None
        if token in EOS:
            return ids
        ids.append(token)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("most", [0, 1, 9])
def test_a_limit_ends_the_thought(kind, most):
    rng, close = np.random.default_rng(0), len(how(kind).close_ids)
    for grammar in (Grammar.json_schema(SCHEMA), Grammar.tool_calls(TOOLS, required=True)):
        for begin in ("start", "thought"):
            m = matcher(kind, grammar, begin, most)
            opening = tokenizer(kind).encode(OPEN, add_special_tokens=False).ids if begin == "start" else []
            for _ in range(10):
                ids = written(m, kind, rng, opening)
                text = tokenizer(kind).decode(ids, skip_special_tokens=False)
                _, answer = split_thought(text, begin)
                assert answer == "12" or parse_tool_calls(answer)[1]
                body = tokenizer(kind).decode(ids[len(opening) :], skip_special_tokens=False).partition(CLOSE)[0]
                tokens = next(n for n in range(len(ids)) if CLOSE in tokenizer(kind).decode(
                    ids[len(opening) : len(opening) + n], skip_special_tokens=False))
                assert tokens <= most + close + 6, body  # And what completes a character.


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_forced(kind):
    m = matcher(kind, FREE, "thought", 3)
    fox = tokenizer(kind).encode("the fox over the", add_special_tokens=False).ids
    for token in fox[:3]:
        assert m.limit.forced is None
        m.consume(token)
    other = m.copy()
    for token in how(kind).close_ids:
        assert allowed(m).tolist() == [token]
        m.consume(token)
    assert m.limit.forced is None
    assert len(allowed(m)) > 99
    assert allowed(other).tolist() == [how(kind).close_ids[0]]  # A copy goes its own way.
    with pytest.raises(ValueError, match="limit of its thought"):
        other.rollback(1)


def test_half_a_character_is_completed_before_the_thought_ends():
    m = matcher("special", FREE, "thought", 1)
    first, *rest = tokenizer("special").encode("🦊", add_special_tokens=False).ids
    m.consume(first)
    for token in rest:
        assert set(allowed(m)) >= {token}
        assert how("special").close_ids[0] not in allowed(m)
        m.consume(token)
    assert allowed(m).tolist() == [*how("special").close_ids]


def test_no_thought_no_limit():
    m = matcher("text", Grammar.json_schema(SCHEMA), "start", 0)
    for token in tokenizer("text").encode("12", add_special_tokens=False).ids:
        assert token in allowed(m)
        m.consume(token)
    assert m.done
    assert json.loads(Grammar.json_schema(SCHEMA).after_thought(how("text")).text)["grammars"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_limit_without_a_grammar(kind):
    m = grammar_tokenizer(tokenizer(kind), V, EOS).matcher(None)
    m.limit = ThoughtLimit(tokenizer(kind), how(kind), "thought", 1)
    every = sorted(tokenizer(kind).get_vocab(with_added_tokens=True).values())
    assert allowed(m).tolist() == every
    for token in tokenizer(kind).encode("🦊", add_special_tokens=False).ids:
        assert allowed(m).tolist() == every  # Half a character is completed first.
        m.consume(token)
    other = m.copy()
    for token in how(kind).close_ids:
        assert allowed(m).tolist() == [token]
        m.consume(token)
    m.consume(tokenizer(kind).token_to_id(START))
    assert allowed(m).tolist() == every
    assert allowed(other).tolist() == [how(kind).close_ids[0]]
    assert (m.error, m.accepts_eos, m.done) == (None, True, False)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mark_that_is_spelled_out_begins_a_thought_where_there_is_no_token_for_it(kind):
    m = grammar_tokenizer(tokenizer(kind), V, EOS).matcher(None)
    m.limit = ThoughtLimit(tokenizer(kind), how(kind), "start", 0)
    for letter in OPEN:
        [token] = tokenizer(kind).encode(letter, add_special_tokens=False).ids
        assert m.limit.forced is None
        m.consume(token)
    assert (m.limit.forced == how(kind).close_ids[0]) == (kind == "text")
    assert (len(allowed(m)) == 1) == (kind == "text")
