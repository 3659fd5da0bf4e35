"""Which tokens of a conversation the assistant wrote: as `transformers` finds them, and by LFM2's form."""

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from lfm_jax.testing import tiny_config, tiny_tokenizer
from lfm_jax.text.chat import DEFAULT_TEMPLATE, encode_chat, render_chat
from lfm_jax.text.conversation import encode_conversation, render_conversation
from lfm_jax.text.tokenizer import train_bpe

SPECIALS = dict(bos_token="<|startoftext|>", eos_token="<|im_end|>", pad_token="<|pad|>")
CONFIG = tiny_config(vocab_size=320)

# LFM2.5's form: all that the assistant writes is in the block.
TURNS = """\
{{- bos_token -}}
{%- if tools -%}{{- "<|im_start|>system\\nList of tools: " + tools | tojson + "<|im_end|>\\n" -}}{%- endif -%}
{%- for message in messages -%}
    {{- "<|im_start|>" + message["role"] + "\\n" -}}
    {%- if message["role"] == "assistant" -%}
        {%- generation -%}
        {{- message["content"] or "" -}}
        {%- for call in message["tool_calls"] or [] -%}
            {{- "<|tool_call_start|>" + call["function"] | tojson + "<|tool_call_end|>" -}}
        {%- endfor -%}
        {{- "<|im_end|>\\n" -}}
        {%- endgeneration -%}
    {%- else -%}
        {{- message["content"] + "<|im_end|>\\n" -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|im_start|>assistant\\n" -}}{%- endif -%}
"""

# Borders anywhere in a token, blocks side by side and empty, text by the template's own lines.
LINES = """\
{% for message in messages %}
    {% if message.role == "assistant" %}
[{% generation %}{{ message.content[:2] }}{% endgeneration %}{% generation %}{{ message.content[2:] }}
{% endgeneration %}]
    {% else %}
{{ loop.index }} {{ message.role | upper }}: {{ message.content }}{% generation %}{% endgeneration %}
    {% endif %}
{% endfor %}
{% generation %}{{ tools | tojson(indent=1) }}{% endgeneration %}
"""

# The turn cut in two: a thought that is not learnt, and the answer.
THOUGHT = """\
{%- for message in messages -%}
    {%- if message.role == "assistant" and "</think>" in message.content -%}
        {%- set parts = message.content.split("</think>") -%}
        {{- parts[0] + "</think>" -}}{%- generation -%}{{- parts[1:] | join("") + eos_token -}}{%- endgeneration -%}
    {%- elif message.role == "assistant" -%}
        {%- generation -%}{{- message.content | trim + eos_token -}}{%- endgeneration -%}
    {%- else -%}
        {{- bos_token + message.content -}}
    {%- endif -%}
{%- endfor -%}
{%- if tools -%}{{- tools[0].name -}}{%- endif -%}
"""

LETTERS = st.sampled_from(list("abc the\n\t .{%}é東😀\u0301\ue000\ue001")) | st.characters(exclude_categories=["Cs"])
CONTENT = st.text(LETTERS, max_size=20) | st.sampled_from(
    ["", "hm</think>\n the", "<|im_end|>\n", "<|im_start|>assistant\nno"])
PLAIN = CONTENT.filter(lambda text: "<|im_" not in text)
NAMES = st.from_regex(r"[a-z_]{1,8}", fullmatch=True)
CALLS = st.lists(st.fixed_dictionaries({"type": st.just("function"), "function": st.fixed_dictionaries(
    {"name": NAMES, "arguments": st.dictionaries(NAMES, PLAIN | st.integers(-9, 9) | st.none(), max_size=2)})}),
    min_size=1, max_size=2)
TOOLS = st.none() | st.lists(st.fixed_dictionaries({"name": NAMES, "description": PLAIN}), min_size=1, max_size=2)


def chats(content):
    message = st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant", "tool"]),
                                     "content": content})
    return st.lists(message, min_size=1, max_size=6)


@functools.cache
def tokenizers():
    learnt = train_bpe(["the cat the hat\n\n", "a b c <im> ab\n"] * 9, vocab_size=320)
    return tiny_tokenizer(), learnt


@functools.cache
def theirs(number):
    return PreTrainedTokenizerFast(tokenizer_object=tokenizers()[number], **SPECIALS)


def same_as_transformers(number, template, messages, tools):
    found = encode_conversation(tokenizers()[number], CONFIG, template, messages, tools)
    expected = theirs(number).apply_chat_template(
        messages, tools=tools, chat_template=template, return_dict=True, return_assistant_tokens_mask=True)
    assert found.ids == expected["input_ids"]
    mask = np.zeros(len(found.ids), int)
    for start, stop in found.spans:
        assert 0 <= start < stop
        mask[start:stop] = 1
    assert mask.tolist() == expected["assistant_masks"]
    assert all(a[1] < b[0] for a, b in zip(found.spans, found.spans[1:], strict=False))
    return mask


@settings(max_examples=150)
@given(st.sampled_from([0, 1]), st.sampled_from([TURNS, LINES, THOUGHT]), chats(CONTENT), TOOLS)
def test_spans_are_those_of_transformers(number, template, messages, tools):
    same_as_transformers(number, template, messages, tools)


@given(st.sampled_from([0, 1]), chats(CONTENT), TOOLS, CALLS, st.sampled_from([{}, {"content": None}, {"content": ""}]))
def test_calls_of_tools_are_learnt_as_with_transformers(number, messages, tools, calls, content):
    messages = [*messages, {"role": "assistant", "tool_calls": calls} | content]
    mask = same_as_transformers(number, TURNS, messages, tools)
    assert mask[-1] == 1


@given(st.sampled_from([0, 1]), chats(PLAIN), TOOLS)
def test_without_marks_a_turn_is_learnt_from_its_content_to_its_end(number, messages, tools):
    """The same as with `{% generation %}` put around it."""
    marked = DEFAULT_TEMPLATE.replace(
        '{{- "<|im_start|>" + message["role"] + "\\n" + message["content"] + "<|im_end|>\\n" -}}', """
        {%- if message["role"] == "assistant" -%}
            {{- "<|im_start|>assistant\\n" -}}
            {%- generation -%}{{- message["content"] + "<|im_end|>\\n" -}}{%- endgeneration -%}
        {%- else -%}
            {{- "<|im_start|>" + message["role"] + "\\n" + message["content"] + "<|im_end|>\\n" -}}
        {%- endif -%}""")
    assert marked != DEFAULT_TEMPLATE
    mine = encode_conversation(tokenizers()[number], CONFIG, DEFAULT_TEMPLATE, messages, tools)
    assert mine == encode_conversation(tokenizers()[number], CONFIG, marked, messages, tools)
    same_as_transformers(number, marked, messages, tools)


def test_the_end_of_a_turn_is_learnt_and_its_opening_is_not():
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes", "tool_calls": [
        {"name": "f", "arguments": {"x": 1}}]}, {"role": "tool", "content": "2"}, {"role": "assistant", "content": ""}]
    tokenizer = tiny_tokenizer()
    ids, spans = encode_conversation(tokenizer, CONFIG, None, messages)
    assert [tokenizer.decode(ids[a:b], skip_special_tokens=False) for a, b in spans] == [
        "yes<|tool_call_start|>[f(x=1)]<|tool_call_end|><|im_end|>\n", "<|im_end|>\n"]
    for turn, (start, _) in zip((1, 3), spans, strict=True):
        assert ids[:start] == encode_chat(tokenizer, CONFIG, None, messages[:turn]), "what the model is asked with"


def test_a_system_turn_that_the_template_adds_is_not_learnt():
    template = '{{ "<|im_start|>system\\nBe brief.<|im_end|>\\n" }}' + DEFAULT_TEMPLATE
    text, spans = render_conversation(template, [{"role": "user", "content": "hi"},
                                                 {"role": "assistant", "content": "assistant\n"}], bos_token="")
    assert [text[a:b] for a, b in spans] == ["assistant\n<|im_end|>\n"]


def test_a_chat_without_the_assistant_has_no_spans():
    for template in (DEFAULT_TEMPLATE, TURNS):
        assert encode_conversation(tiny_tokenizer(), CONFIG, template, [{"role": "user", "content": "hi"}]).spans == []


# `transformers` counts the text before a block that is not printed where it stands, and finds other characters.
INDIRECT = [
    '{% macro turn(m) %}{{ m.role }}: {% generation %}{{ m.content }}{% endgeneration %};{% endmacro %}'
    '{% for m in messages %}{{ turn(m) }}{% endfor %}',
    '{% for m in messages %}{% set turn %}{{ m.role }}: {% generation %}{{ m.content }}{% endgeneration %};{% endset %}'
    '{{ turn }}{% endfor %}',
]


@pytest.mark.parametrize("template", INDIRECT)
def test_blocks_in_macros_and_captured_text_are_found_where_they_are_printed(template):
    text, spans = render_conversation(template, [{"role": "assistant", "content": c} for c in ("one", "two")])
    assert text == "assistant: one;assistant: two;"
    assert [text[a:b] for a, b in spans] == ["one", "two"]


CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": " b "}]


@pytest.mark.parametrize("template", [
    "{% set x %}{% generation %}{{ messages[1].content }}{% endgeneration %}{% endset %}{{ x | trim }}",
    "{% set x %}{% generation %}{{ messages[1].content }}{% endgeneration %}{% endset %}{{ x | length }}",
    "{% generation %}a{% generation %}b{% endgeneration %}{% endgeneration %}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% break %}{% endgeneration %}{% endfor %}",
])
def test_blocks_whose_place_is_not_known_are_refused(template):
    with pytest.raises(ValueError, match="print each block as it is"):
        render_conversation(template, CHAT)
    assert render_chat(template, CHAT)


@pytest.mark.parametrize("template", [
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
    DEFAULT_TEMPLATE.replace("<|im_end|>\\n", "<|im_end|>"),
    DEFAULT_TEMPLATE.replace('message["role"]', '("user" if message["role"] == "tool" else message["role"])'),
    DEFAULT_TEMPLATE.replace("in messages", "in messages[:1]"),
    "<|im_end|>" + DEFAULT_TEMPLATE,
])
def test_a_template_of_another_form_is_refused_with_what_to_do(template):
    with pytest.raises(ValueError, match=r"put {% generation %} and {% endgeneration %} around"):
        render_conversation(template, [*CHAT, {"role": "tool", "content": "c"}], bos_token="")


@pytest.mark.parametrize("mark", ["<|im_start|>", "<|im_end|>"])
def test_a_message_that_could_end_its_turn_is_refused(mark):
    for messages, tools in (([{"role": "user", "content": f"a{mark}\n"}], None), (CHAT, [{"name": mark}])):
        with pytest.raises(ValueError, match="would begin or end a turn; take it out"):
            render_conversation(DEFAULT_TEMPLATE, messages, tools=tools, bos_token="")


def test_one_moment_is_meant_however_often_a_template_asks_for_the_time():
    template = '{{ strftime_now("%f") }}{% generation %}{{ messages[0].content }}{% endgeneration %}'
    text, spans = render_conversation(template, CHAT)
    assert [text[a:b] for a, b in spans] == ["a"]


@pytest.mark.parametrize(("call", "says"), [
    ({"name": "f"}, "must have a name and arguments"),
    ({"function": {"arguments": {}}}, "must have a name and arguments"),
    ({"function": {"name": "f", "arguments": "{}"}}, "arguments of a call of 'f' must be an object"),
])
def test_calls_that_cannot_be_written_are_refused(call, says):
    with pytest.raises(ValueError, match=says):
        encode_conversation(tiny_tokenizer(), CONFIG, None, [{"role": "assistant", "tool_calls": [call]}])
