"""Grammars in Lark that would stop or crash a server are refused as the client's mistake."""

import json

import numpy as np
import pytest

from lfm_jax.structured.grammar import Grammar, grammar_tokenizer
from lfm_jax.structured.schema import GrammarError
from lfm_jax.testing import tiny_tokenizer


def nested(depth):
    schemas = {str(i): {"items": {"$ref": f"#/$defs/{i + 1}"}} for i in range(depth)} | {str(depth): {}}
    return "start: %json " + json.dumps({"$ref": "#/$defs/0", "$defs": schemas})


@pytest.mark.parametrize("text", [
    nested(1100),  # It ended the process.
    "start: A\nA: " + " & ".join(f"/.*a{i}.*/" for i in range(30)),  # It never came back, holding Python's lock.
], ids=["too deep", "intersections"])
def test_what_takes_too_much_is_refused(text):
    with pytest.raises(GrammarError, match="takes more than 1 s, 300 MiB or too deep a stack to compile"):
        Grammar.lark(text)


@pytest.mark.parametrize(("text", "problem"), [
    ("start: a", "unknown name: \"a\""),
    ('start: %json {"type": "strin"}', "strin"),
    ("start: " + "(" * 3000 + '"a"' + ")" * 3000, "too deeply nested"),
])
def test_what_is_wrong_is_said(text, problem):
    with pytest.raises(GrammarError, match=problem):
        Grammar.lark(text)


@pytest.mark.parametrize("text", [
    'start: "a" B\nB: /x+/', nested(100), 'start: <|tool_call_start|> "a" <[7]>', "start: /.*/ <think>",
])
def test_others_are_accepted(text):
    assert Grammar.lark(text).text == text


def test_special_tokens_are_those_of_the_tokenizer():
    tokens = grammar_tokenizer(tiny_tokenizer(), 2000, (3,))
    mask_W = np.zeros(len(tokens.known_W), np.uint32)
    tokens.matcher(Grammar.lark('start: <|im_start|> "a"')).mask(mask_W)
    assert mask_W.any()
    with pytest.raises(GrammarError, match="no_such"):
        tokens.matcher(Grammar.lark('start: <|no_such|> "a"'))
