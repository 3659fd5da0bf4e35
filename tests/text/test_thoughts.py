"""Thoughts: any cut into pieces gives what the whole gives; tokens of thoughts are counted one by one."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from replies import pieces_of
from tokenizers import AddedToken

from lfm_jax.testing import tiny_tokenizer
from lfm_jax.text.thoughts import BLANKS, CLOSE, OPEN, Split, ThoughtCounter, ThoughtSplitter, split_thought, stage
from lfm_jax.text.thoughts import thinking as thinking_of

parts = st.sampled_from([OPEN, CLOSE, "<thi", "nk>", "</", "think>", "<", " ", "\n\n", "a", "b c", "é", "\x1f"])
texts = st.lists(parts, max_size=9).map("".join)
stages = st.sampled_from(["start", "thought", "answer"])


def reference(text, begin):
    """The same by one regular expression."""
    opening = {"start": rf"[{BLANKS}]*{OPEN}", "thought": "", "answer": r"(?!)"}[begin]
    found = re.fullmatch(rf"{opening}(.*?)(?:{CLOSE}(.*))?", text, re.DOTALL)
    if not found:
        return Split("", text)
    return Split(found[1].strip(BLANKS), (found[2] or "").lstrip(BLANKS))


@settings(max_examples=500)
@given(texts, stages, st.data())
def test_any_pieces_are_split_as_the_whole(text, begin, data):
    splitter = ThoughtSplitter(begin)
    parts = [splitter.push(piece) for piece in pieces_of(text, data)]
    parts.append(splitter.finish())
    assert Split(*map("".join, zip(*parts, strict=True))) == split_thought(text, begin) == reference(text, begin)
    answers = [bool(part.answer) for part in parts if part.thought or part.answer]
    assert answers == sorted(answers)  # Nothing of the thought comes after the answer.


def test_what_is_a_thought():
    assert split_thought("<think>\nWhy?\n</think>\n\nSo. <think>x</think>") == ("Why?", "So. <think>x</think>")
    assert split_thought("Why?</think>So.", "thought") == ("Why?", "So.")
    assert split_thought("</think>So.", "thought") == ("", "So.")
    assert split_thought("</think>So.") == ("", "</think>So.")
    assert split_thought("<think>Why? </thin") == ("Why? </thin", "")
    assert split_thought("So. <think>x</think>") == ("", "So. <think>x</think>")
    assert split_thought(" \n So.") == ("", " \n So.")


def test_text_comes_as_soon_as_it_is_certain():
    splitter = ThoughtSplitter()
    pieces = [splitter.push(c) for c in "<think> a b</think> c d"]
    assert "".join(p.thought for p in pieces) == "a b"
    assert [p.answer for p in pieces[-4:]] == ["", "c", " ", "d"]
    assert [p for p in pieces[:9] if any(p)] == [("a", "")]


@pytest.mark.parametrize(("begun", "where"), [
    ("", "start"), ("\n", "start"), ("<think>", "thought"), ("<think>\nx", "thought"), ("So", "answer"),
    ("<think>\n\n</think>\n\n", "answer"), ("<thi", "answer"),
])
def test_where_a_reply_goes_on(begun, where):
    assert stage(begun) == where
    assert stage(begun, marked=False) == ("answer" if begun.strip() else "start")


def with_marks(special):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken(mark, special=special, normalized=False) for mark in (OPEN, CLOSE)])
    return tokenizer


def test_how_tokenizers_write_thoughts():
    plain = tiny_tokenizer()
    assert thinking_of(plain, None) is thinking_of(plain, "{{ messages }}") is None
    text = thinking_of(plain, "{{ content.split('</think>')[-1] }}")  # All that the templates of LFM2.5 say.
    assert text.token_ids == ()
    assert plain.decode(text.close_ids) == CLOSE
    for special in (True, False):
        tokenizer = with_marks(special)
        tokens = thinking_of(tokenizer, None)
        assert [tokenizer.id_to_token(i) for i in tokens.token_ids] == [OPEN, CLOSE]
        assert tokens.close_ids == tokens.token_ids[1:]


@pytest.mark.parametrize("tokenizer", [tiny_tokenizer(), with_marks(special=True)], ids=["text", "tokens"])
def test_tokens_of_a_thought(tokenizer):
    def ids(text):
        return tokenizer.encode(text, add_special_tokens=False).ids

    how = thinking_of(tokenizer, CLOSE)
    thought, answer = f"{OPEN}\nthe fox 🦊?{CLOSE}", "\n\nover <think>"
    tokens, marks = [*ids(thought), *ids(answer)], len(ids(OPEN))
    for size in (1, 3, len(tokens)):
        counter = ThoughtCounter(tokenizer, how, "start")
        for i in range(0, len(tokens), size):
            counter.push(tokens[i : i + size])
        assert counter.tokens == len(ids(thought))
        assert not counter.open
        assert counter.inside == len(ids(thought)) - marks
    counter = ThoughtCounter(tokenizer, how, "thought")
    counter.push(ids("the fox"))
    assert counter.open
    assert counter.tokens == counter.inside == len(ids("the fox"))
    counter = ThoughtCounter(tokenizer, how, "start")
    counter.push(ids("\nthe fox"))
    assert (counter.open, counter.tokens) == (False, 0)
    assert counter.none == bool(how.token_ids)
    counter = ThoughtCounter(tokenizer, None, "start")
    counter.push(ids(thought))
    assert (counter.open, counter.tokens) == (False, 0)


@pytest.mark.parametrize("marks", [None, True, False], ids=["text", "special", "plain"])
def test_only_a_token_opens_a_thought_where_there_is_one(marks):
    tokenizer = tiny_tokenizer() if marks is None else with_marks(marks)
    how = thinking_of(tokenizer, CLOSE)
    spelled = [tokenizer.encode(letter, add_special_tokens=False).ids[0] for letter in f"\n{OPEN}the fox"]
    counter, splitter = ThoughtCounter(tokenizer, how, "start"), ThoughtSplitter()
    found = []
    for i in spelled:
        counter.push([i])
        if counter.none:
            splitter.skip()
        found.append(splitter.push(tokenizer.decode([i])))
    found = Split(*map("".join, zip(*[*found, splitter.finish()], strict=True)))
    assert counter.open == (marks is None)
    assert found == (("the fox", "") if marks is None else ("", f"\n{OPEN}the fox"))
