"""Text follows its grammar token by token: masks, special tokens, the end, copies and rollback."""

import copy
import re
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from grammars import EOS, SMALL, START, TOOLS, V, allowed, matcher, pick, samples, tokenizer, written

from lfm_jax.engine.slots import unpack
from lfm_jax.structured.grammar import Grammar, GrammarTokenizer, Matcher, fill_masks, grammar_tokenizer
from lfm_jax.structured.json_schema import GrammarError
from lfm_jax.structured.kept import Kept
from lfm_jax.testing import tiny_tokenizer


@pytest.mark.parametrize("pattern", [r"[a-f]{3}-[0-9]{1,2}", r"(yes|no)( or (yes|no)){0,3}", r"é[^\x00-\x7f]{2}"])
def test_regex(pattern):
    assert all(re.fullmatch(pattern, text) for text in samples(Grammar.regex(pattern), 20))


def test_choice():
    choices = ["the", "them", 'a "b"\n', "é/"]
    assert set(samples(Grammar.choice(choices), 60)) == set(choices)


def test_lark():
    grammar = Grammar.lark('start: sum\nsum: NUMBER (" + " NUMBER){1,3}\nNUMBER: /[1-9][0-9]{0,2}/')
    assert all(re.fullmatch(r"\d+( \+ \d+){1,3}", text) for text in samples(grammar, 20))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Grammar.regex("a("), lambda: Grammar.regex(r"a(?=b)"), lambda: Grammar.lark("start: x"),
        lambda: Grammar.lark(""), lambda: Grammar.choice([]), lambda: Grammar.choice("ab"), lambda: Grammar.choice([1]),
        lambda: matcher(Grammar.lark("start: <|no_such_token|>")), lambda: Grammar.tool_calls([]),
    ],
)
def test_broken_grammars_are_refused(make):
    with pytest.raises(GrammarError, match=r"\w{3}"):
        make()


def test_without_llguidance_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ImportError, match=re.escape("pip install lfm_jax[grammar]")):
        Grammar.regex("asked for here only")


# ------------------------------------------------------------------ matchers and masks


def test_nothing_beyond_the_tokenizer_is_allowed():
    size = tokenizer().get_vocab_size()
    assert size < V
    for grammar in (Grammar.lark("start: <[*]>"), Grammar.lark("start: <[^0]>{1,3}"), Grammar.regex("(?s:.*)")):
        ids = allowed(matcher(grammar))
        assert len(ids) > 200
        assert ids.max() < size


def test_a_complete_text_allows_every_eos_and_nothing_else():
    grammar = Grammar.choice(["a", "ab"])
    m = matcher(grammar)
    a, b = (tokenizer().token_to_id(c) for c in "ab")
    assert (m.accepts_eos, m.done) == (False, False)
    assert set(allowed(m)) == {a}
    m.consume(a)
    assert (m.accepts_eos, m.done) == (True, False)
    assert set(allowed(m)) == {*EOS, b}
    m.consume(b)
    assert m.done
    assert set(allowed(m)) == set(EOS)
    m.consume(EOS[1])
    assert m.done
    assert set(allowed(m)) == set(EOS)


def test_special_tokens_are_no_text():
    m = matcher(Grammar.json_schema({"type": "string"}))
    m.consume(tokenizer().token_to_id('"'))
    for id in tokenizer().encode(f"{START} fox", add_special_tokens=False).ids[1:]:
        m.consume(id)
    assert not set(allowed(m)) & set(range(14))
    # Their letters are.
    for c in "<|im_end|>":
        m.consume(tokenizer().token_to_id(c))
    assert not m.accepts_eos
    m.consume(tokenizer().token_to_id('"'))
    assert m.done


@pytest.mark.parametrize("name", ["<|tool_call_start|>", *map(tokenizer().id_to_token, EOS)])
@pytest.mark.parametrize("make", [
    lambda name: Grammar.choice([f"{name}yes", f"{name}no"]), lambda name: Grammar.regex(f"a{re.escape(name)}+"),
    lambda name: Grammar.json_schema({"const": f"é{name}{name}"}),
])
def test_forced_text_may_be_the_name_of_a_special_token(make, name):
    """It is spelled out, and does not end the text if it is that of eos."""
    assert tokenizer().get_added_tokens_decoder()[tokenizer().token_to_id(name)].special
    for text in samples(make(name), 4):
        assert name in text


def test_a_token_that_is_not_allowed_raises():
    m = matcher(Grammar.choice(["ab"]))
    with pytest.raises(ValueError, match="token 7 is not allowed"):
        m.copy().consume(7)
    with pytest.raises(ValueError, match="token 40 is not allowed"):
        m.consume(40)


def test_copies_are_independent():
    rng = np.random.default_rng(0)
    schema = {"type": "array", "items": {"enum": ["the", 17, None]}, "minItems": 3}
    m = matcher(Grammar.json_schema(schema, bounds=SMALL))
    for _ in range(4):
        m.consume(pick(allowed(m), rng))
    before = allowed(m)
    texts = {written(m, rng) for _ in range(20)}
    assert len(texts) > 5
    np.testing.assert_array_equal(allowed(m), before)


def test_rollback_takes_tokens_back():
    rng = np.random.default_rng(0)
    m = matcher(Grammar.json_schema({"type": "array", "items": {"type": ["boolean", "null"]}, "minItems": 300}))
    masks = [allowed(m)]
    for n in (1, 0, 7, 30):
        for _ in range(30):
            m.consume(pick(np.setdiff1d(masks[-1], EOS), rng))
            masks.append(allowed(m))
        m.rollback(n)
        del masks[len(masks) - n :]
        np.testing.assert_array_equal(allowed(m), masks[-1])
    with pytest.raises(ValueError, match="cannot take back 99"):
        m.rollback(99)


def test_many_masks_at_once_are_those_of_each():
    rng = np.random.default_rng(0)
    grammars = [Grammar.json_object(), Grammar.regex("a*b"), Grammar.tool_calls(TOOLS), Grammar.choice(["x"])]
    matchers = [matcher(g) for g in grammars for _ in range(3)]
    for m in matchers[::2]:
        m.consume(pick(np.setdiff1d(allowed(m), EOS), rng))
    rows = [*matchers[:5], None, *matchers[5:]]
    masks_BW = rng.integers(0, 2**32, (len(rows), -(-V // 32)), np.uint32)
    fill_masks(rows, masks_BW)
    mask_BV = np.asarray(jax.jit(unpack, static_argnums=1)(masks_BW, V))
    assert mask_BV.shape == (len(rows), V)
    assert mask_BV.dtype == bool
    for row, m in zip(mask_BV, rows, strict=True):
        np.testing.assert_array_equal(np.flatnonzero(row), np.arange(V) if m is None else allowed(m))


@pytest.mark.parametrize(
    ("limit", "message"), [("step_max_items", "Too many items"), ("max_items_in_row", "max is 20")]
)
def test_a_grammar_too_complex_ends_its_own_request_only(limit, message):
    """Whether it shows while a mask is made or while a token is taken in."""
    import llguidance

    tools, x = grammar_tokenizer(tokenizer(), V, EOS), tokenizer().token_to_id("x")
    grammar = Grammar.lark('start: a{0,50}\na: "x" | "x" "y" | "x" a')
    limits = llguidance.LLParserLimits(**{limit: 20})
    failing = Matcher(tools, llguidance.LLMatcher(tools.handle, grammar.text, log_level=0, limits=limits))
    other = matcher(Grammar.choice(["xy"]))
    masks_BW = np.zeros((2, -(-V // 32)), np.uint32)
    for _ in range(6):
        fill_masks([failing, other], masks_BW)
        failing.consume(x)
    fill_masks([failing, other], masks_BW)
    assert message in failing.error
    assert (failing.accepts_eos, failing.done) == (False, False)
    mask_BV = np.asarray(unpack(masks_BW, V))
    assert set(np.flatnonzero(mask_BV[0])) == set(EOS)
    assert set(np.flatnonzero(mask_BV[1])) == {x}
    assert failing.copy().error == failing.error
    failing.consume(EOS[0])
    if limit == "max_items_in_row":
        hasty = Matcher(tools, llguidance.LLMatcher(tools.handle, grammar.text, log_level=0, limits=limits))
        for _ in range(6):
            hasty.consume(x)
        assert message in hasty.error


@pytest.mark.parametrize("rest", ["a\na: a", "<[320]>", "A\nA: /y/ & /z/"])
def test_a_grammar_without_a_way_on_fails_where_it_ends(rest):
    m = matcher(Grammar.lark(f'start: "x" {rest}'))
    assert set(allowed(m)) == {tokenizer().token_to_id("x")}
    m.consume(tokenizer().token_to_id("x"))
    assert set(allowed(m)) == set(EOS)
    assert m.error == "no token can go on"


def test_masks_of_another_shape_are_refused():
    m = matcher(Grammar.json_object())
    for masks in (np.zeros((2, 11), np.uint32), np.zeros((1, 11), np.int32), np.zeros((1, 9), np.uint32)):
        with pytest.raises(ValueError, match="expected uint32"):
            fill_masks([m], masks)


def test_the_tokenizer_is_made_once():
    assert grammar_tokenizer(tokenizer(), V, EOS) is grammar_tokenizer(tokenizer(), V, EOS)
    with pytest.raises(ValueError, match="the model's vocab_size is 100"):
        GrammarTokenizer(tokenizer(), 100, EOS)
    for eos_ids in ((), (-1,), (V,)):
        with pytest.raises(ValueError, match="eos_ids"):
            GrammarTokenizer(tokenizer(), V, eos_ids)


def test_padding_and_truncation_do_not_matter():
    other = tiny_tokenizer()
    other.enable_padding(length=8)
    other.enable_truncation(2)
    m = grammar_tokenizer(other, V, EOS).matcher(Grammar.choice(["the lazy dog"]))
    for id in tokenizer().encode("the lazy dog", add_special_tokens=False).ids:
        m.consume(id)
    assert m.done
    assert other.padding is not None


# ------------------------------------------------------------------ what is kept


def makers(order):
    """Each kind of grammar twice over, from content that is equal and not the same; `order` is that of two keys."""
    schema = {"type": "object", "properties": {name: {"type": "boolean"} for name in order}, "required": [*order]}
    return [
        lambda: Grammar.json_schema(copy.deepcopy(schema)), lambda: Grammar.regex(f"[{order}]+"),
        lambda: Grammar.lark(f'start: "{order}"'), lambda: Grammar.choice([*order]),
        lambda: Grammar.tool_calls([{"name": "f", "parameters": copy.deepcopy(schema)}], required=True),
    ]  # fmt: skip


@pytest.mark.parametrize("kind", range(5))
def test_a_grammar_is_compiled_once(kind, monkeypatch):
    names = f"ab{kind}"
    made, first = (makers(order)[kind]() for order in (names, names[::-1]))
    assert made.text != first.text
    m = matcher(made)
    size = len(samples(made, 3))
    monkeypatch.setattr("lfm_jax.structured.json_schema.refusal", None)  # Whatever would compile fails.
    monkeypatch.setattr("lfm_jax.structured.call_grammar.refusal", None)
    monkeypatch.setattr(GrammarTokenizer, "_compiled", None)
    assert makers(names)[kind]() is made
    assert len(samples(made, 3)) == size
    # What one request does to its matcher is nothing to the next.
    m.consume(pick(allowed(m), np.random.default_rng(0)))
    assert set(allowed(matcher(made))) != set(allowed(m))


def test_options_make_other_grammars():
    tools, schema = [{"name": "f"}, {"name": "g"}], {"type": "string"}
    grammars = [
        Grammar.tool_calls(tools), Grammar.tool_calls(tools, required=True), Grammar.tool_calls(tools, parallel=False),
        Grammar.tool_calls(tools, name="f"), Grammar.tool_calls(tools[::-1]), Grammar.json_schema(schema),
        Grammar.json_schema(schema, bounds=SMALL), Grammar.json_schema(True),
    ]  # fmt: skip
    assert len({grammar.text for grammar in grammars}) == len(grammars)
    assert Grammar.json_schema(True) == Grammar.json_schema({})


def test_what_is_kept_is_bounded():
    made = []

    def get(kept, key):
        return kept.get(key, lambda: made.append(key) or key)

    kept = Kept(3, 10, lambda key, value: len(value))
    for key in ("a", "b", "c", "a", "d", "a", "c", "b"):  # The least used one goes: b at d, d at b.
        assert get(kept, key) == key
    assert made == ["a", "b", "c", "d", "b"]
    made.clear()
    for key in ("x" * 8, "a", "b", "x" * 8, "y" * 11, "y" * 11, "b"):
        assert get(kept, key) == key
    assert made == ["x" * 8, "a", "y" * 11, "y" * 11]  # What weighs too much pushes nothing out.


def test_threads_that_ask_at_once_make_it_once():
    made, kept, ready = [], Kept(3, 10, lambda key, value: 1), threading.Barrier(8)

    def make():
        made.append(1)
        time.sleep(0.05)
        if len(made) == 1:
            raise ValueError("the first time")
        return "value"

    def ask(_):
        ready.wait()
        try:
            return kept.get("key", make)
        except ValueError as error:
            return str(error)

    with ThreadPoolExecutor(8) as pool:
        assert sorted(pool.map(ask, range(8))) == ["the first time", *["value"] * 7]
    assert len(made) == 2
