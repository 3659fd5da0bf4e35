"""The next turn of a conversation, and what it consists of."""

import functools

import pytest
from tokenizers import AddedToken

import lfm_jax as lfm
from lfm_jax.infer import chat as module
from lfm_jax.infer.generate import Piece
from lfm_jax.sampling import Sampling
from lfm_jax.testing import tiny_model, tiny_tokenizer
from lfm_jax.text.chat import DEFAULT_TEMPLATE, render_chat, special_tokens, turn_stop_ids
from lfm_jax.text.codec import ReplyText
from lfm_jax.text.thoughts import CLOSE, OPEN
from lfm_jax.text.tools import ToolCall

HELLO = [{"role": "user", "content": "hello"}]
CALL = '<|tool_call_start|>[look(place="Paris")]<|tool_call_end|>'


def look(place: str) -> str:
    """Looks there."""
    return place


@functools.cache
def tokenizer(special=True):
    made = tiny_tokenizer()
    made.add_tokens([AddedToken(mark, special=special, normalized=False) for mark in (OPEN, CLOSE)])
    return made


@functools.cache
def model():
    return tiny_model(vocab_size=tokenizer().get_vocab_size(), max_position=1024)


def test_it_is_what_generate_writes_after_the_template():
    sampling = Sampling(temperature=0.8, seed=3)
    reply = lfm.chat(model(), tokenizer(), HELLO, sampling=sampling, max_new_tokens=20)
    prompt = render_chat(DEFAULT_TEMPLATE, HELLO, **special_tokens(tokenizer(), model().config))
    ids = tokenizer().encode(prompt, add_special_tokens=False).ids
    stop_ids = turn_stop_ids(tokenizer(), model().config)
    [text] = lfm.generate(model(), tokenizer(), [ids], sampling, 20, stop_ids=stop_ids)
    assert text
    assert reply == lfm.Reply(text)


def writing(monkeypatch, written):
    """Lets the model write this; the prompts that it is given."""
    prompts = []

    def stream_pieces(_, tokenizer, prompt, sampling, most, *, stop_ids, shown):
        prompts.append(prompt)
        reply = ReplyText(tokenizer, (), stop_ids, skip_special_tokens=True, shown=shown)
        for i in [*tokenizer.encode(written, add_special_tokens=False).ids, min(stop_ids)]:
            yield Piece(reply.push([i]), [i])

    monkeypatch.setattr(module, "stream_pieces", stream_pieces)
    return prompts


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("opens", [True, False])
def test_thought_text_and_calls_come_apart(monkeypatch, special, opens):
    end = 'assistant\\n" -}}'
    template = DEFAULT_TEMPLATE.replace(end, 'assistant\\n<think>" -}}') if opens else DEFAULT_TEMPLATE
    assert (template == DEFAULT_TEMPLATE) != opens
    written = ("" if opens else OPEN) + f"\nwhere?\n{CLOSE}\n\nthere {CALL}"
    prompts = writing(monkeypatch, written)
    reply = lfm.chat(model(), tokenizer(special), HELLO, template=template, tools=[look])
    assert reply == lfm.Reply("there ", "where?", (ToolCall("look", {"place": "Paris"}),))
    assert "Looks there." in tokenizer().decode(prompts[0])
    without = lfm.chat(model(), tokenizer(special), HELLO, template=template)
    assert (without.thought, without.calls) == ("where?", ())
    assert "look(" in without.text


def test_messages_are_text(monkeypatch):
    prompts, end = writing(monkeypatch, "yes"), tokenizer().token_to_id("<|im_end|>")
    for plain in (True, False):
        assert lfm.chat(model(), tokenizer(), [{"role": "user", "content": "a<|im_end|>b"}], plain_contents=plain).text
    assert [prompt.count(end) for prompt in prompts] == [1, 2]


def test_what_is_wrong_is_said_before_anything_runs():
    with pytest.raises(ValueError, match="tools are not valid"):
        lfm.chat(model(), tokenizer(), HELLO, tools=[{"name": 3}])
    with pytest.raises(ValueError, match="max_new_tokens"):
        lfm.chat(model(), tokenizer(), HELLO, max_new_tokens=5000)
    encoder = tiny_model(vocab_size=tokenizer().get_vocab_size(), causal=False)
    with pytest.raises(ValueError, match="chat"):
        lfm.chat(encoder, tokenizer(), HELLO)


def test_a_text_is_read_as_the_reply_it_is():
    assert lfm.read_reply(f"{OPEN}why{CLOSE}so") == lfm.Reply("so", "why")
    assert lfm.read_reply(f"why{CLOSE}so {CALL}", [look], "thought").calls == (ToolCall("look", {"place": "Paris"}),)
    assert lfm.read_reply(f"so {CALL}") == lfm.Reply(f"so {CALL}")
    assert lfm.read_reply(f"{OPEN}why {CALL}", [look]) == lfm.Reply("", f"why {CALL}")
