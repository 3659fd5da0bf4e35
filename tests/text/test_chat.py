"""Chat templates against `transformers`; the conversation in the terminal with scripted input."""

import functools

import pytest
from flax import nnx
from transformers import PreTrainedTokenizerFast

from lfm_jax.infer import decoding
from lfm_jax.infer.chat_loop import chat_loop
from lfm_jax.infer.generate import generate
from lfm_jax.sampling import GREEDY
from lfm_jax.testing import tiny_config, tiny_model, tiny_tokenizer
from lfm_jax.text.chat import DEFAULT_TEMPLATE, render_chat, special_tokens
from lfm_jax.text.codec import encode

SPECIALS = dict(bos_token="<|startoftext|>", eos_token="<|im_end|>", pad_token="<|pad|>")

WITH_TOOLS = """\
{{- bos_token -}}
{%- set ns = namespace(system="", last=-1) -%}
{%- if messages[0]["role"] == "system" -%}
    {%- set ns.system = messages[0]["content"] -%}
    {%- set messages = messages[1:] -%}
{%- endif -%}
{%- if tools -%}
    {%- set ns.system = ns.system + ("\\n" if ns.system else "") + "List of tools: <|tool_list_start|>[" -%}
    {%- for tool in tools -%}
        {%- set ns.system = ns.system + (tool if tool is string else tool | tojson) -%}
        {%- if not loop.last -%}{%- set ns.system = ns.system + ", " -%}{%- endif -%}
    {%- endfor -%}
    {%- set ns.system = ns.system + "]<|tool_list_end|>" -%}
{%- endif -%}
{%- if ns.system -%}{{- "<|im_start|>system\\n" + ns.system + "<|im_end|>\\n" -}}{%- endif -%}
{%- for message in messages -%}
    {%- set content = message["content"] -%}
    {%- if content is not string -%}{%- set content = content | tojson -%}{%- endif -%}
    {%- if message["role"] == "assistant" and "</think>" in content -%}
        {%- set content = content.split("</think>")[-1] | trim -%}
    {%- elif message["role"] == "tool" -%}
        {%- set content = "<|tool_response_start|>" + content + "<|tool_response_end|>" -%}
    {%- endif -%}
    {{- "<|im_start|>" + message["role"] + "\\n" + content + "<|im_end|>\\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|im_start|>assistant\\n" -}}{%- endif -%}
"""

# Everything else that templates use: white space control by line, loop controls, marks for training, the date.
BLOCKS = """\
{{ bos_token }}Year {{ strftime_now("%Y") }}
{% for message in messages %}
    {% if message.role == "skip" %}
        {% continue %}
    {% elif message.role == "end" %}
        {% break %}
    {% elif message.role == "bad" %}
        {{ raise_exception("role bad is not allowed: " + message.content) }}
    {% endif %}
    {% generation %}
    {{ loop.index }} {{ message.role | upper }}: {{ message.content }}{{ message.missing }}
    {% endgeneration %}
{% endfor %}
{{ {"é": [1, none, true, "<&>"]} | tojson(indent=2) }}{{ eos_token }}
{% if tools is none %}no tools{% endif %}
"""

TURNS = [
    {"role": "system", "content": "Be brief. <b>&'\""},
    {"role": "user", "content": "Grüße, 東京?"},
    {"role": "assistant", "content": "<think>hm</think>\n Hello "},
    {"role": "tool", "content": {"temperature": 21.5, "unit": "°C"}},
    {"role": "skip", "content": "not shown"},
    {"role": "user", "content": "and now?"},
    {"role": "end", "content": "last"},
]
TOOLS = [
    {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
    {"name": "größe", "description": "a \"quoted\" <text>"},
]


@functools.cache
def tokenizer():
    return tiny_tokenizer()


@functools.cache
def model():
    return tiny_model(vocab_size=320, layer_types=("conv", "full_attention"))


@functools.cache
def hf_tokenizer():
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer(), **SPECIALS)


@pytest.mark.parametrize(
    ("template", "tools"),
    [(template, tools) for template in (DEFAULT_TEMPLATE, WITH_TOOLS, BLOCKS) for tools in (None, TOOLS)],
)
@pytest.mark.parametrize("prompted", [True, False])
def test_renders_as_transformers(template, prompted, tools):
    turns = [t for t in TURNS if isinstance(t["content"], str)] if template is DEFAULT_TEMPLATE else TURNS
    theirs = hf_tokenizer().apply_chat_template(
        turns, tools=tools, chat_template=template, add_generation_prompt=prompted, tokenize=False
    )
    assert render_chat(template, turns, tools=tools, add_generation_prompt=prompted, **SPECIALS) == theirs
    assert "Grüße" in theirs


def test_default_template_text():
    assert render_chat(DEFAULT_TEMPLATE, [{"role": "user", "content": "hi\n"}], bos_token="<s>") == (
        "<s><|im_start|>user\nhi\n<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_rendered_prompt_is_encoded_with_one_bos():
    text = render_chat(DEFAULT_TEMPLATE, TURNS[:2], **SPECIALS)
    ids = encode(tokenizer(), text, bos_id=1)
    assert ids == tokenizer().encode(text, add_special_tokens=False).ids
    assert ids.count(1) == 1
    assert ids[1] == 6


def test_special_tokens_come_from_the_config():
    config = tiny_config(vocab_size=320)
    assert special_tokens(tokenizer(), config) == SPECIALS
    assert special_tokens(tokenizer(), config.replace(eos_ids=(), bos_id=319)) == {
        "bos_token": "", "eos_token": "", "pad_token": "<|pad|>"
    }


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}", "not valid Jinja"),
        ("{{ nope(1) }}", "failed on these messages: UndefinedError"),
        ("{{ messages.__class__.__mro__ }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ raise_exception.__globals__['json'] }}", "SecurityError"),
        ("{{ 1 + none }}", "TypeError"),
        ("{{ range(10 ** 9) | list }}", "OverflowError"),
        (BLOCKS, "role bad is not allowed: why"),
    ],
)
def test_template_errors_are_one_kind(template, message):
    with pytest.raises(ValueError, match=message):
        render_chat(template, [{"role": "bad", "content": "why"}], **SPECIALS)


def test_what_no_template_can_take_is_refused():
    with pytest.raises(ValueError, match="takes no tools"):
        render_chat("{{ messages }}", TURNS[:2], tools=TOOLS, **SPECIALS)
    with pytest.raises(ValueError, match="messages must be plain data"):
        render_chat(DEFAULT_TEMPLATE, [{"role": "user", "content": object()}])
    for messages in ("hello", [{"content": "x"}], ["x"]):
        with pytest.raises(ValueError, match="each with a 'role'"):
            render_chat(DEFAULT_TEMPLATE, messages)


# -------------------------------------------------------------------- the loop


@pytest.fixture(autouse=True)
def one_shape(monkeypatch):
    """Conversations of every length run in one compiled shape."""
    monkeypatch.setattr(decoding, "bucket", lambda n: 256)


class Terminal:
    """Lines to be read, text that was written, and an interrupt when asked for."""

    def __init__(self, *lines, interrupt_at=None):
        self.lines, self.text, self.writes, self.interrupt_at = list(lines), "", 0, interrupt_at

    def read(self, prompt):
        line = self.lines.pop(0)
        if isinstance(line, type):
            raise line
        return line

    def write(self, text, end="\n", flush=False):
        self.text += text + end
        self.writes += 1
        if self.writes == self.interrupt_at:
            raise KeyboardInterrupt


def talk(*lines, interrupt_at=None, chatter=None, **options):
    terminal = Terminal(*lines, interrupt_at=interrupt_at)
    messages = chat_loop(chatter or model(), tokenizer(), None, GREEDY, 12, read=terminal.read, write=terminal.write,
                         **options)
    return messages, terminal.text


def answer(messages):
    text = render_chat(DEFAULT_TEMPLATE, messages, **SPECIALS)
    return generate(model(), tokenizer(), text, GREEDY, 12)[0]


def test_replies_follow_the_whole_conversation():
    messages, shown = talk("hello", "  ", " more ", "/exit", system="be brief")
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert messages[3]["content"] == "more"
    for i in (2, 4):
        assert messages[i]["content"] == answer(messages[:i])
        assert messages[i]["content"] in shown


def test_reset_forgets_all_but_the_system_message():
    messages, shown = talk("hello", "/reset", "again", EOFError, system="be brief")
    assert [m["content"] for m in messages[:2]] == ["be brief", "again"]
    assert len(messages) == 3
    assert messages[2]["content"] == answer(messages[:2])
    assert "forgotten" in shown


def test_an_interrupt_stops_the_reply_and_at_the_prompt_the_program():
    messages, shown = talk("hello", "more", KeyboardInterrupt, interrupt_at=2)
    whole = answer([{"role": "user", "content": "hello"}])
    assert messages[1]["content"] != whole
    assert whole.startswith(messages[1]["content"])
    assert "[stopped]" in shown
    assert messages[3]["content"] == answer(messages[:3])


def test_a_conversation_that_outgrows_the_context_says_so():
    short = nnx.eval_shape(lambda: tiny_model(vocab_size=320, max_position=64))  # Refused before it runs.
    messages, shown = talk("hello " * 50, "/exit", chatter=short)
    assert messages == []
    assert "config.max_position 64" in shown
    assert "/reset" in shown
