"""Where a generated text ends, token by token: thoughts, stop strings, characters of several bytes."""

import pytest
from lm_eval.models.utils import postprocess_generated_text
from tokenizers import AddedToken

from lfm_jax.eval.generating import Wanted, _Reply
from lfm_jax.sampling import GREEDY
from lfm_jax.testing import tiny_tokenizer
from lfm_jax.text.thoughts import thinking

PLAIN = tiny_tokenizer()
MARKED = tiny_tokenizer()
MARKED.add_special_tokens([AddedToken(mark, special=True) for mark in ("<think>", "</think>")])
END = 7


def reply(written, until, begin="start", tokenizer=PLAIN, template="</think>"):
    """(text, how many tokens were read) of a reply that would go on."""
    tokens = [*tokenizer.encode(written, add_special_tokens=False).ids, END]
    task = Wanted([1], 99, until, GREEDY, thinking(tokenizer, template), begin)
    found = _Reply(tokenizer, task, [END])
    for count, token in enumerate(tokens, 1):
        found.push([token])
        if found.over:
            return found.text(), count
    return found.text(), len(tokens)


@pytest.mark.parametrize("tokenizer", [PLAIN, MARKED], ids=["text", "tokens"])
@pytest.mark.parametrize(("written", "until", "begin", "answer"), [
    ("<think>a fox\n\nis</think>\n\nthe dog\n\nmore", ["\n\n"], "start", "the dog"),
    ("a fox\n\nis</think>\n\nthe dog", ["\n\n"], "thought", "the dog"),
    ("<think>a fox\n\nis", ["\n\n"], "start", ""),
    ("the dog\n\n<think>", ["\n\n"], "start", "the dog"),
    ("\nthe dog", ["\n"], "start", ""),
    ("<think>a</think>i think", ["think", "<"], "start", "i "),
    ("<thus", ["th"], "start", "<"),
    ("the dog", [], "answer", "the dog"),
    ("<think></think>  é🦊!", ["🦊"], "start", "é"),
])
def test_stop_strings_are_looked_for_behind_the_thought(written, until, begin, answer, tokenizer):
    assert reply(written, until, begin, tokenizer)[0] == answer
    if "</think>" in written and begin == "start":  # The `hf` backend agrees on whole texts.
        assert answer == postprocess_generated_text(written, until, "</think>")


def test_a_model_without_thoughts_has_marks_as_text():
    assert reply("<think>a</think> b", [], template=None) == ("<think>a</think> b", len(PLAIN.encode(
        "<think>a</think> b", add_special_tokens=False).ids) + 1)


def test_tokens_end_where_a_stop_string_is_complete():
    text, count = reply("fox 漢字🦊 jumps over", ["🦊"], template=None)
    assert text == "fox 漢字"
    assert count == len(PLAIN.encode("fox 漢字🦊", add_special_tokens=False).ids)
