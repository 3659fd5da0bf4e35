"""Generated texts that follow a grammar."""

import json

import numpy as np
import pytest
from hf_backend import instances

from lfm_jax.eval import EvalModel, lm
from lfm_jax.eval.answers import keep_answers
from lfm_jax.eval.generating import _Reply, wanted
from lfm_jax.testing import tiny_model, tiny_tokenizer
from lfm_jax.text.chat import turn_stop_ids
from lfm_jax.text.thoughts import thinking
from lfm_jax.text.tools import END, START

SCHEMA = {"type": "object", "properties": {"who": {"enum": ["fox", "dog"]}}, "required": ["who"]}
JUMP = {"name": "jump", "parameters": SCHEMA}


def options(**more):
    return {"until": [], "max_gen_toks": 24, **more}


def test_json_of_a_schema(ours, loaded, tmp_path, monkeypatch):
    """The same prompt without a grammar is another request, also where answers are kept."""
    prompts = instances("generate_until", [("the", options(grammar={"json_schema": SCHEMA})), ("the", options())])
    with keep_answers(tmp_path / "answers.jsonl", {}) as answers:
        model = EvalModel(*loaded, max_length=64, slots=2, answers=answers)
        held, free = model.generate_until(prompts)
    assert json.loads(held)["who"] in ("fox", "dog")
    assert free == ours.generate_until(prompts[1:])[0] != held
    with keep_answers(tmp_path / "answers.jsonl", {}) as answers:
        model = EvalModel(*loaded, max_length=64, slots=2, answers=answers)
        monkeypatch.setattr(lm, "run", lambda *given: pytest.fail("again") if given[2] else ())
        assert model.generate_until(prompts) == [held, free]


def test_a_grammar_that_is_refused_is_said_of(loaded, caplog):
    model = EvalModel(*loaded, max_length=64, slots=2)
    refused = options(grammar={"json_schema": {"type": "object", "dependencies": {}}})
    assert model.generate_until(instances("generate_until", [("the", refused)])) == [""]
    assert "a grammar is refused, and its text is empty" in caplog.text


@pytest.mark.parametrize("template", ["", "</think>"])
def test_calls_of_tools(template, ours, loaded):
    model, tokenizer = loaded
    stop_ids = turn_stop_ids(tokenizer, model.config)
    task = wanted(ours, tokenizer, template, "the", options(grammar={"tools": [JUMP]}), 0)
    assert (task.how is None) is (thinking(tokenizer, template) is None)
    matcher = task.matcher(tokenizer, model.config.vocab_size, stop_ids)
    call = [tokenizer.token_to_id(START), *tokenizer.encode('[jump(who="', add_special_tokens=False).ids]
    for token in [*tokenizer.encode("a fox: ", add_special_tokens=False).ids, *call]:
        matcher.consume(token)
    mask = np.zeros(-(-model.config.vocab_size // 32), np.uint32)
    matcher.mask(mask)
    allowed = {tokenizer.decode([i]) for i in np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))}
    assert {"f", "d"} <= allowed
    assert all("fox".startswith(text) or "dog".startswith(text) for text in allowed)


def test_special_tokens_stay_where_calls_are_wanted(loaded):
    model, tokenizer = loaded
    text = f"{START}[jump()]{END}"
    for skip, expected in ((True, "[jump()]"), (False, text)):
        evaluated = EvalModel(*loaded, max_length=64, slots=2)
        task = wanted(evaluated, tokenizer, "", "the", options(skip_special_tokens=skip), 0)
        reply = _Reply(tokenizer, task, turn_stop_ids(tokenizer, model.config))
        reply.push(tokenizer.encode(text, add_special_tokens=False).ids)
        assert reply.text() == expected


def test_grammars_that_cannot_be(loaded):
    model = EvalModel(*loaded, max_length=64, slots=2)
    with pytest.raises(ValueError, match="expected json_schema or tools"):
        model.generate_until(instances("generate_until", [("the", options(grammar={"regex": "a"}))]))
    plain = tiny_tokenizer()
    plain = type(plain).from_str(plain.to_str().replace(START, "<|other|>"))
    other = EvalModel(tiny_model(vocab_size=plain.get_vocab_size()), plain, max_length=64, slots=2)
    with pytest.raises(ValueError, match="tool calls of this model cannot be constrained"):
        other.generate_until(instances("generate_until", [("the", options(grammar={"tools": [JUMP]}))]))
