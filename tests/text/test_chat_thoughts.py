"""Thoughts in conversations: how earlier turns have them in the prompt, and how the terminal shows them."""

import functools

import pytest
from tokenizers import AddedToken

from lfm_jax.infer import chat_loop as chat_loop_module
from lfm_jax.infer.chat_loop import chat_loop
from lfm_jax.infer.generate import Piece
from lfm_jax.testing import tiny_config, tiny_model, tiny_tokenizer
from lfm_jax.text.chat import begun_turn, encode_chat, reply_stage
from lfm_jax.text.codec import ReplyText
from lfm_jax.text.conversation import encode_conversation
from lfm_jax.text.thoughts import CLOSE, OPEN, thinking

STRIPS = """\
{{- bos_token -}}
{%- set ns = namespace(last=-1) -%}
{%- for message in messages -%}
    {%- if message["role"] == "assistant" -%}{%- set ns.last = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
    {%- set content = message["content"] -%}
    {%- if message["role"] == "assistant" and not (keep_past_thinking or loop.index0 == ns.last) -%}
        {%- set content = content.split("</think>")[-1] | trim -%}
    {%- endif -%}
    {{- "<|im_start|>" + message["role"] + "\\n" + content + "<|im_end|>\\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|im_start|>assistant\\n" -}}{%- endif -%}
"""
OPENS = STRIPS.replace('assistant\\n" -}}{%- endif', 'assistant\\n<think>\\n" -}}{%- endif')
OWN = """\
{%- for message in messages -%}
    {{- message["role"] + ": " + message["content"] + " [" + message.get("reasoning_content", "") + "]\n" -}}
{%- endfor -%}
"""
NONE = """{%- for message in messages -%}{{- message["role"] + ": " + message["content"] + "\n" -}}{%- endfor -%}"""
TALK = [{"role": "user", "content": "hi"},
        {"role": "assistant", "content": "Hello", "reasoning_content": "Greet <|im_end|>"},
        {"role": "user", "content": "more"}]
LAST = [*TALK, {"role": "assistant", "content": "Yes", "reasoning_content": "Again?"}]


@functools.cache
def tokenizer(marks=None):
    made = tiny_tokenizer()
    if marks is not None:
        made.add_tokens([AddedToken(mark, special=marks == "special", normalized=False) for mark in (OPEN, CLOSE)])
    return made


def prompt(template, messages, marks=None, **options):
    ids = encode_chat(tokenizer(marks), tiny_config(vocab_size=400), template, messages, **options)
    return tokenizer(marks).decode(ids, skip_special_tokens=False), ids


def test_the_template_says_what_becomes_of_thoughts():
    assert prompt(STRIPS, TALK)[0].count("Greet") == 1  # Of the last answer; so the template wants it.
    text, _ = prompt(STRIPS, LAST)
    assert "Greet" not in text
    assert "<|im_start|>assistant\n<think>\nAgain?\n</think>\n\nYes<|im_end|>" in text
    text, _ = prompt(STRIPS, LAST, variables={"keep_past_thinking": True})
    assert "<think>\nGreet <|im_end|>\n</think>\n\nHello<" in text
    assert prompt(OWN, LAST[1:])[0].startswith("assistant: Hello [Greet <|im_end|>]\n")
    assert prompt(NONE, LAST)[0] == "user: hi\nassistant: Hello\nuser: more\nassistant: Yes\n"


def test_calls_come_after_the_thought():
    call = {"role": "assistant", "content": "", "reasoning_content": "Ask.",
            "tool_calls": [{"name": "f", "arguments": {}}]}
    text, _ = prompt(STRIPS, [TALK[0], call])
    assert "assistant\n<think>\nAsk.\n</think>\n\n<|tool_call_start|>[f()]<|tool_call_end|><" in text


def test_only_the_marks_of_plain_contents_are_tokens():
    for plain in (True, False):
        _, ids = prompt(STRIPS, TALK, "special", plain_contents=plain)
        assert [ids.count(tokenizer("special").token_to_id(mark)) for mark in (OPEN, CLOSE)] == [1, 1]
        assert ids.count(7) == 3 + (not plain)  # <|im_end|>


def test_what_cannot_be_a_thought_is_refused():
    for message, why in ((TALK[1] | {"reasoning_content": 3}, "reasoning_content is 3; expected a text"),
                         (TALK[1] | {"content": ["a"]}, r"content is \['a'\]; expected a text after its reasoning")):
        with pytest.raises(ValueError, match=f"message 1: its {why}"):
            prompt(STRIPS, [TALK[0], message])


def test_conversations_for_training_have_their_thoughts():
    conversation = encode_conversation(tokenizer(), tiny_config(vocab_size=400), STRIPS, [TALK[0], LAST[-1]])
    begin, end = conversation.spans[-1]
    assert tokenizer().decode(conversation.ids[begin:end]) == "<think>\nAgain?\n</think>\n\nYes\n"


def test_what_the_prompt_has_of_the_turn():
    for marks in (None, "special", "plain"):
        for template, begun in ((STRIPS, ""), (OPENS, "<think>\n"), (NONE, "")):
            assert begun_turn(tokenizer(marks), prompt(template, TALK[:1], marks)[1]) == begun
        begin = [*TALK[:1], {"role": "assistant", "content": "<think>\nThe "}]
        assert begun_turn(tokenizer(marks), prompt(STRIPS, begin, marks, continue_final=True)[1]) == "<think>\nThe "
        assert begun_turn(tokenizer(marks), tokenizer(marks).encode("Assistant: <think>\n").ids) == OPEN


def test_marks_that_a_stranger_spells_out_begin_no_thought():
    begin = [*TALK[:1], {"role": "assistant", "content": "<think>\nThe "}]
    how = thinking(tokenizer("special"), STRIPS)
    for plain, where in ((True, "answer"), (False, "thought")):
        ids = prompt(STRIPS, begin, "special", continue_final=True, plain_contents=plain)[1]
        assert reply_stage(tokenizer("special"), how, ids) == where
        ids = prompt(OPENS, TALK[:1], "special", plain_contents=plain)[1]
        assert reply_stage(tokenizer("special"), how, ids) == "thought"
    assert reply_stage(tokenizer("special"), None, ids) == "answer"
    other = tokenizer("special").encode("Assistant: ").ids
    assert reply_stage(tokenizer("special"), how, other, "<think>\nx") == "answer"
    assert reply_stage(tokenizer(), thinking(tokenizer(), STRIPS), other, "<think>\nx") == "thought"


# -------------------------------------------------------------------- the loop


def talk(monkeypatch, *replies, template=STRIPS, marks=None):
    """A conversation in which these texts are the replies, token by token; and what the terminal shows."""
    said, shown, prompts = iter(replies), [], []

    def pieces(model, tokenizer, ids, *args, shown, **options):
        assert list(shown) == ([tokenizer.token_to_id(mark) for mark in (OPEN, CLOSE)] if marks else [])
        prompts.append(tokenizer.decode(list(ids), skip_special_tokens=False))
        ids = tokenizer.encode(next(said), add_special_tokens=False).ids
        yield from (Piece(tokenizer.decode([i], skip_special_tokens=False), [i]) for i in ids)

    lines = iter(["hi"] * len(replies))
    monkeypatch.setattr(chat_loop_module, "stream_pieces", pieces)
    messages = chat_loop(
        tiny_model(vocab_size=400), tokenizer(marks), template, read=lambda _: next(lines, "/exit"),
        write=lambda text, end="\n", flush=False: shown.append(text + end),
    )
    return messages, "".join(shown), prompts


@pytest.mark.parametrize("marks", [None, "special"])
def test_the_terminal_marks_the_thought(monkeypatch, marks):
    messages, shown, prompts = talk(monkeypatch, "<think>\nWell?\n</think>\n\nHello", "Yes", marks=marks)
    assert "[thinking]\nWell?\n[answer]\nHello\n[" in shown
    assert shown.count("[thinking]") == 1
    assert messages[1] == {"role": "assistant", "content": "Hello", "reasoning_content": "Well?"}
    assert messages[3] == {"role": "assistant", "content": "Yes"}
    assert "<think>\nWell?\n</think>\n\nHello<" in prompts[1]


def test_a_thought_that_the_template_opened(monkeypatch):
    messages, shown, _ = talk(monkeypatch, "Well?</think>Hello", template=OPENS)
    assert (messages[1]["reasoning_content"], messages[1]["content"]) == ("Well?", "Hello")
    assert "[thinking]\nWell?\n[answer]\nHello\n[" in shown


def test_without_thoughts_a_mark_is_text(monkeypatch):
    messages, shown, _ = talk(monkeypatch, "<think>a</think>", template=NONE)
    assert messages[1] == {"role": "assistant", "content": "<think>a</think>"}
    assert "[thinking]" not in shown


def test_the_marks_come_through_though_they_are_special():
    marks = [tokenizer("special").token_to_id(mark) for mark in (OPEN, CLOSE)]
    ids = [marks[0], 6, *tokenizer().encode("the", add_special_tokens=False).ids, marks[1], 7]
    reply = ReplyText(tokenizer("special"), (), [7], skip_special_tokens=True, shown=marks)
    assert reply.push(ids) + reply.finish() == "<think>the</think>"
