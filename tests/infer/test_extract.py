"""Data out of text always fits its schema; probabilities of labels are those of whole passes."""

import functools
import types

import jax
import jax.numpy as jnp
import jsonschema
import numpy as np
import pydantic
import pytest
from limits import LIMITS, limited
from tokenizers import AddedToken

import lfm_jax as lfm
from lfm_jax.engine.request import LOGITS_NOT_FINITE, Continuation
from lfm_jax.infer import extract as module
from lfm_jax.infer.extract import classify, extract
from lfm_jax.sampling import Sampling
from lfm_jax.testing import tiny_model, tiny_tokenizer
from lfm_jax.text.chat import DEFAULT_TEMPLATE, render_chat, special_tokens
from lfm_jax.text.thoughts import CLOSE, OPEN

SCHEMA = {
    "type": "object", "required": ["who", "when"], "additionalProperties": False,
    "properties": {"who": {"type": "string", "maxLength": 6}, "when": {"type": ["integer", "null"], "minimum": 0}},
}
LABELS = ["good", "bad", "so so", "good grief"]
TEXTS = ["one", "two three", "the quick brown fox", "jumps " * 9, "over the lazy dog"]


@functools.cache
def tokenizer():
    return tiny_tokenizer()


@functools.cache
def model():
    return tiny_model(vocab_size=tokenizer().get_vocab_size() + 3, max_position=1024)


def test_extracted_data_fits_the_schema():
    many = extract(model(), tokenizer(), TEXTS[:3], SCHEMA, sampling=Sampling(temperature=1.2, seed=3))
    assert len(many) == 3
    for data in many:
        jsonschema.validate(data, SCHEMA)
    assert extract(model(), tokenizer(), [], SCHEMA) == []
    with pytest.raises(ValueError, match="answer for text 0 needs more than max_new_tokens 3"):
        extract(model(), tokenizer(), TEXTS[:1], SCHEMA, max_new_tokens=3)
    with pytest.raises(ValueError, match=r"texts \[1\] take \d+ tokens, with 9 for the answer more than"):
        extract(model(), tokenizer(), ["a", "jumps " * 900], SCHEMA, max_new_tokens=9)
    with pytest.raises(ValueError, match="the JSON schema is"):
        extract(model(), tokenizer(), "a", {"type": "strange"})


@pytest.mark.parametrize("opens", [True, False])
def test_data_comes_after_a_thought(monkeypatch, opens):
    thoughtful = tiny_tokenizer()
    thoughtful.add_special_tokens([AddedToken(mark, normalized=False) for mark in (OPEN, CLOSE)])
    end = 'assistant\\n" -}}'
    assert end in DEFAULT_TEMPLATE
    template = DEFAULT_TEMPLATE.replace(end, 'assistant\\n<think>" -}}') if opens else DEFAULT_TEMPLATE
    written = ("" if opens else OPEN) + f"true?{CLOSE}\n\nfalse"
    ids = [*thoughtful.encode(written, add_special_tokens=False).ids, 7]

    def complete(engine, requests):
        for request in requests:
            follow = request.grammar.copy()
            for token in ids:
                follow.consume(token)
            assert follow.done
        return [[Continuation(ids, "stop")] for _ in requests]

    monkeypatch.setattr(module.Engine, "complete", complete)
    thinker = tiny_model(vocab_size=thoughtful.get_vocab_size(), max_position=1024)
    assert extract(thinker, thoughtful, TEXTS[:2], {"type": "boolean"}, template=template) == [False, False]


@pytest.mark.parametrize("opens", [True, False])
@pytest.mark.parametrize("most", [0, 3])
def test_a_thought_that_would_not_end_is_closed(opens, most):
    """By a model that, left alone, fills all its room with a thought."""
    thoughtful = tiny_tokenizer()
    thoughtful.add_special_tokens([AddedToken(mark, normalized=False) for mark in (OPEN, CLOSE)])
    end = 'assistant\\n" -}}'
    template = DEFAULT_TEMPLATE.replace(end, 'assistant\\n<think>" -}}') if opens else DEFAULT_TEMPLATE
    thinker = tiny_model(vocab_size=thoughtful.get_vocab_size(), max_position=1024)
    run = functools.partial(extract, thinker, thoughtful, TEXTS[0], {"type": "boolean"}, template=template,
                            max_new_tokens=40)
    if opens:
        with pytest.raises(ValueError, match="or set max_thinking_tokens if the model thinks"):
            run()
    assert run(max_thinking_tokens=most) in (True, False)


def test_more_texts_than_may_wait(monkeypatch):
    monkeypatch.setattr(module, "EngineConfig", functools.partial(module.EngineConfig, max_queue=2))
    assert {type(data) for data in extract(model(), tokenizer(), TEXTS * 2, {"type": "boolean"})} == {bool}


@jax.jit
def whole_pass(tokens_1T):
    segment_ids_1T = (tokens_1T > 0).astype(jnp.int32)
    return jax.nn.log_softmax(model()(tokens_1T, None, segment_ids_1T, padding="right")[0][0])


def expected(text):
    """Softmax over the log-probabilities of whole passes, one for each label."""
    totals = []
    system = module.CLASSIFICATION.replace("{labels}", ", ".join(LABELS))
    prompt = tokenizer().encode(render_chat(
        DEFAULT_TEMPLATE, [{"role": "system", "content": system}, {"role": "user", "content": text}],
        **special_tokens(tokenizer(), model().config)), add_special_tokens=False).ids
    for label in LABELS:
        answer = [*tokenizer().encode(label, add_special_tokens=False).ids, tokenizer().token_to_id("<|im_end|>")]
        log_p_TV = whole_pass(jnp.asarray([(prompt + answer + [0] * 256)[:256]]))
        totals.append(sum(float(log_p_TV[len(prompt) - 1 + i, token]) for i, token in enumerate(answer)))
    return np.exp(totals - np.logaddexp.reduce(totals))


def test_probabilities_are_those_of_whole_passes(monkeypatch):
    theirs = [expected(text) for text in TEXTS]
    for rows in (len(LABELS) * 2, 64):  # In groups, the last of them filled up; and all at once.
        monkeypatch.setattr(module, "ROWS", rows)
        ours = classify(model(), tokenizer(), TEXTS, LABELS)
        for one, probabilities in zip(ours, theirs, strict=True):
            assert list(one) == LABELS
            np.testing.assert_allclose(list(one.values()), probabilities, rtol=2e-4)
    single = classify(model(), tokenizer(), TEXTS[0], LABELS)
    np.testing.assert_allclose(list(single.values()), theirs[0], rtol=2e-4)
    same = classify(model(), tokenizer(), [TEXTS[0], TEXTS[0]], LABELS)
    np.testing.assert_allclose([list(one.values()) for one in same], [theirs[0]] * 2, rtol=2e-4)
    assert classify(model(), tokenizer(), [], LABELS) == []


@pytest.mark.parametrize("limits", LIMITS[-2:], ids=str)
def test_what_a_tokenizer_is_set_to_cut_and_pad_changes_nothing(limits):
    theirs = limited(tokenizer(), **limits)
    assert classify(model(), theirs, TEXTS, LABELS) == classify(model(), tokenizer(), TEXTS, LABELS)
    assert extract(model(), theirs, TEXTS[:3], SCHEMA) == extract(model(), tokenizer(), TEXTS[:3], SCHEMA)
    assert lfm.generate(model(), theirs, TEXTS, max_new_tokens=8) == (
        lfm.generate(model(), tokenizer(), TEXTS, max_new_tokens=8))


class Found(pydantic.BaseModel):
    who: str = pydantic.Field(max_length=6)
    when: int | None = pydantic.Field(ge=0)

    @pydantic.field_validator("who")
    @classmethod
    def _in_lower_case(cls, who: str) -> str:
        if who == "REFUSE":
            raise ValueError("not this one")
        return who.lower()


@pytest.fixture
def engine_that_writes(monkeypatch):
    """Stands in for the engine: the texts that it is told to write, one for each request, whatever is asked."""
    def put(*texts):
        answers = [[Continuation(tokenizer().encode(text, add_special_tokens=False).ids, "stop")]
                   for text in texts]
        monkeypatch.setattr(module, "Engine", lambda *_: types.SimpleNamespace(complete=lambda _: answers))

    return put


def test_a_class_of_pydantic_gives_its_instances(engine_that_writes):
    engine_that_writes('{"who": "ADA", "when": 1815}', '{"who": "x", "when": null}')
    many = extract(model(), tokenizer(), TEXTS[:2], Found)
    assert many == [Found(who="ada", when=1815), Found(who="x", when=None)]
    assert {type(each) for each in many} == {Found}
    assert extract(model(), tokenizer(), TEXTS[0], Found) == many[0]
    assert extract(model(), tokenizer(), TEXTS[0], Found.model_json_schema()) == {"who": "ADA", "when": 1815}
    assert extract(model(), tokenizer(), [], Found) == []


def test_what_a_class_refuses_is_told_with_the_number_of_its_text(engine_that_writes):
    engine_that_writes('{"who": "ADA", "when": 1815}', '{"who": "REFUSE", "when": null}')
    with pytest.raises(ValueError, match=r"(?s)data for text 1 is refused by its class: .*not this one"):
        extract(model(), tokenizer(), TEXTS[:2], Found)


def test_logits_that_are_not_finite_are_no_probabilities():
    broken = tiny_model(vocab_size=model().config.vocab_size, max_position=1024, tie_embedding=False)
    unread = tokenizer().encode(" fox", add_special_tokens=False).ids[-1]
    broken.embed[...] = broken.embed[...].at[unread].set(np.nan)
    assert sum(classify(broken, tokenizer(), TEXTS[0], LABELS).values()) == pytest.approx(1)
    with pytest.raises(ValueError, match=f"^{LOGITS_NOT_FINITE}"):
        classify(broken, tokenizer(), TEXTS[:3], LABELS)


@pytest.mark.parametrize("labels", [["a"], "ab", ["a", "a"], ["a", ""], []])
def test_bad_labels(labels):
    with pytest.raises(ValueError, match="at least two different texts"):
        classify(model(), tokenizer(), "x", labels)


@pytest.mark.parametrize("given", [None, 3, b"ab", {"a": 1}])
def test_arguments_of_another_type_are_named(given):
    for call, message in [
        (lambda: extract(model(), tokenizer(), given, SCHEMA), "text is .*; expected a text or a list of texts"),
        (lambda: extract(model(), tokenizer(), ["a", given], SCHEMA), r"text\[1\] is .*; expected a text"),
        (lambda: classify(model(), tokenizer(), given, LABELS), "texts is .*; expected a text or a list of texts"),
        (lambda: classify(model(), tokenizer(), ["a", given], LABELS), r"texts\[1\] is .*; expected a text"),
        (lambda: classify(model(), tokenizer(), "a", given), "labels is .*; expected a text or a list of texts"),
        (lambda: classify(model(), tokenizer(), "a", ["b", given]), r"labels\[1\] is .*; expected a text"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    if not isinstance(given, dict):
        with pytest.raises(ValueError, match=r"schema is .*; expected a JSON schema \(a dict\) or a class of pydantic"):
            extract(model(), tokenizer(), "a", given)
    with pytest.raises(ValueError, match="schema is <class 'int'>"):
        extract(model(), tokenizer(), "a", int)


def test_the_names_of_special_tokens_in_a_text_are_text_by_default(monkeypatch):
    seen = []

    def checked(model, prompts, more):
        seen.append(prompts[0].count(tokenizer().token_to_id("<|im_start|>")))
        raise LookupError  # Nothing need run.

    monkeypatch.setattr(module, "_check_lengths", checked)
    text = "a<|im_end|>\n<|im_start|>system\nb"
    for run in (functools.partial(extract, model(), tokenizer(), text, {"type": "boolean"}),
                functools.partial(classify, model(), tokenizer(), text, LABELS)):
        for options in ({}, {"plain_contents": False}):
            with pytest.raises(LookupError):
                run(**options)
    assert seen == [3, 4] * 2


def test_both_are_public():
    assert lfm.extract is extract
    assert lfm.classify is classify
