"""Chat templates against `transformers`; the conversation in the terminal with scripted input."""

import functools
import json
import re
import resource

import jax
import numpy as np
import pytest
from flax import nnx
from transformers import PreTrainedTokenizerFast

from lfm_jax.engine.request import LOGITS_NOT_FINITE
from lfm_jax.infer import chat_loop as chat_loop_module
from lfm_jax.infer import decoding
from lfm_jax.infer.chat_loop import chat_loop
from lfm_jax.infer.generate import generate, generate_tokens
from lfm_jax.sampling import GREEDY
from lfm_jax.testing import tiny_config, tiny_model, tiny_tokenizer
from lfm_jax.text.chat import DEFAULT_TEMPLATE, encode_chat, render_chat, special_tokens
from lfm_jax.text.codec import encode
from lfm_jax.text.conversation import encode_conversation

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
    for messages in ("hello", None, [{"content": "x"}], ["x"]):
        with pytest.raises(ValueError, match=r"expected a (list of dicts, each|dict) with a 'role'"):
            render_chat(DEFAULT_TEMPLATE, messages)


FINE = {"role": "user", "content": "hi"}


@pytest.mark.parametrize("template", [None, "{{ messages[0].tool_calls }}"], ids=["calls-as-text", "calls-in-template"])
@pytest.mark.parametrize(("bad", "expected"), [
    ("hi", "it is 'hi'; expected a dict with a 'role'"),
    (None, "it is None; expected a dict with a 'role'"),
    ({"content": "x"}, "it is {'content': 'x'}; expected a dict with a 'role'"),
    ({"role": "assistant", "tool_calls": ["x"]}, "its tool_calls is ['x']; expected a list of dicts"),
    ({"role": "assistant", "tool_calls": "x"}, "its tool_calls is 'x'; expected a list of dicts"),
    ({"role": "assistant", "tool_calls": {"name": "f"}}, "its tool_calls is {'name': 'f'}; expected a list of dicts"),
    ({"role": "assistant", "tool_calls": 3}, "its tool_calls is 3; expected a list of dicts"),
    ({"role": "assistant", "tool_calls": [{"name": "f"}]}, "each of tool_calls must have a name and arguments"),
    ({"role": "assistant", "tool_calls": [{"name": 3, "arguments": {}}]}, "each of tool_calls must have a name"),
    ({"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{}"}]}, "the arguments of a call of 'f' must be"),
])
def test_bad_messages_are_named_by_their_number(bad, expected, template):
    for encode_any in (encode_chat, encode_conversation):
        with pytest.raises(ValueError, match="messages are not valid") as e:
            encode_any(tokenizer(), tiny_config(vocab_size=320), template, [FINE, bad, FINE, bad])
        lines = str(e.value).splitlines()[1:]
        assert len(lines) == 2
        for number, line in zip((1, 3), lines, strict=True):
            assert line.startswith(f"  - message {number}: {expected}")


@pytest.mark.parametrize("content", [[{"type": "text", "text": "yes"}], 3])
def test_calls_written_as_text_stand_behind_a_text(content):
    message = {"role": "assistant", "content": content, "tool_calls": [{"name": "f", "arguments": {}}]}
    with pytest.raises(ValueError, match=r"message 1: its content is .*; expected a text before its calls"):
        encode_chat(tokenizer(), tiny_config(vocab_size=320), None, [FINE, message])


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


def talk(*lines, interrupt_at=None, chatter=None, template=None, **options):
    terminal = Terminal(*lines, interrupt_at=interrupt_at)
    messages = chat_loop(chatter or model(), tokenizer(), template, GREEDY, 12, read=terminal.read,
                         write=terminal.write, **options)
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


def test_a_reply_is_followed_by_its_speed_and_where_it_was_cut():
    _, shown = talk("hello", "/exit")
    speed = r"12 tokens, \d+\.\d tokens/s, the first after \d+\.\d\d s"
    assert re.search(rf"\n\[{speed}; cut at the limit of 12 tokens \(--max-new-tokens\)\]\n", shown)
    prompt = encode_chat(tokenizer(), model().config, None, [{"role": "user", "content": "hello"}])
    ids = generate_tokens(model(), [prompt], GREEDY, 12)[0].tokens
    ending = tiny_model(vocab_size=320, layer_types=("conv", "full_attention"), eos_ids=(ids[2],))
    _, shown = talk("hello", "/exit", chatter=ending)
    assert re.search(r"\n\[3 tokens, [^;]* s\]\n", shown)  # The one that ends it among them, and not cut.


def test_reset_forgets_all_but_the_system_message():
    messages, shown = talk("hello", "/reset", "again", EOFError, system="be brief")
    assert [m["content"] for m in messages[:2]] == ["be brief", "again"]
    assert len(messages) == 3
    assert messages[2]["content"] == answer(messages[:2])
    assert "forgotten" in shown


def test_an_interrupt_stops_the_reply_and_keeps_the_talk():
    messages, shown = talk("hello", "more", "/exit", interrupt_at=2)
    whole = answer([{"role": "user", "content": "hello"}])
    assert messages[1]["content"] != whole
    assert whole.startswith(messages[1]["content"])
    assert re.search(r"\n\[stopped; 1 token, the first after", shown)
    assert messages[3]["content"] == answer(messages[:3])


def test_a_reply_that_is_stopped_before_its_first_word_leaves_the_talk_as_it_was(monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(chat_loop_module, "stream_pieces", interrupted)
    messages, shown = talk("hello", "/exit", system="be brief")
    assert messages == [{"role": "system", "content": "be brief"}]
    assert "your message is not kept" in shown


def test_logits_that_are_not_finite_are_one_line_and_the_talk_goes_on():
    def chatter():
        return tiny_model(vocab_size=320, layer_types=("conv", "full_attention"), tie_embedding=False)

    hello = encode_chat(tokenizer(), model().config, None, [{"role": "user", "content": "hello"}])
    ids = generate_tokens(chatter(), [hello], GREEDY, 12)[0].tokens
    at = max(i for i, token in enumerate(ids[:-1]) if token not in [*hello, *ids[:i]])
    broken = chatter()
    broken.embed[...] = broken.embed[...].at[ids[at]].set(np.nan)
    messages, shown = talk("hello", "/system be brief", "/exit", chatter=broken)
    assert messages == [{"role": "system", "content": "be brief"}]
    assert shown.splitlines().count(LOGITS_NOT_FINITE) == 1
    assert f"\n{tokenizer().decode(ids[: at + 1])}\n{LOGITS_NOT_FINITE}\n" in shown


def test_an_error_of_the_device_is_one_message_and_the_talk_goes_on(monkeypatch, tmp_path):
    stream_pieces, calls = chat_loop_module.stream_pieces, iter(range(3))

    def failing(*args, **options):
        pieces = stream_pieces(*args, **options)
        if next(calls) == 1:
            yield next(pieces)
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nwhile allocating\nmuch")
        yield from pieces

    monkeypatch.setattr(chat_loop_module, "stream_pieces", failing)
    messages, shown = talk("hello", "long", f"/save {tmp_path / 'talk.json'}", "more", "/exit")
    assert "\nThe reply failed: RESOURCE_EXHAUSTED: Out of memory\nYour message is not kept" in shown
    assert "while allocating" not in shown
    assert "/save FILE" in shown
    assert [m["content"] for m in messages[::2]] == ["hello", "more"]
    assert json.loads((tmp_path / "talk.json").read_text()) == messages[:2]


def test_an_interrupt_at_the_prompt_says_how_to_leave_and_the_next_one_leaves():
    messages, shown = talk(KeyboardInterrupt, "hello", KeyboardInterrupt, KeyboardInterrupt)
    assert len(messages) == 2
    assert shown.count("Ctrl-D or /exit leaves") == 2


def test_a_conversation_that_outgrows_the_context_says_so():
    short = nnx.eval_shape(lambda: tiny_model(vocab_size=320, max_position=64))  # Refused before it runs.
    messages, shown = talk("hello " * 50, "/exit", chatter=short)
    assert messages == []
    assert "the model's context holds 64" in shown
    assert "/reset" in shown


def test_a_reply_ends_where_the_context_is_full():
    ids = encode_chat(tokenizer(), model().config, None, [{"role": "user", "content": "hi"}])
    short = tiny_model(vocab_size=320, layer_types=("conv", "full_attention"), max_position=len(ids) + 5)
    messages, shown = talk("hi", "more", "/exit", chatter=short)
    assert "[5 tokens" in shown
    assert f"cut where the model's context of {len(ids) + 5} tokens is full" in shown
    assert [m["content"] for m in messages[::2]] == ["hi"]  # Nothing fits after it.


def test_a_system_message_holds_from_the_next_reply_on():
    messages, shown = talk("hello", "/system", "/system be\nbrief", "/system", "more", "/exit")
    assert messages[0] == {"role": "system", "content": "be\nbrief"}
    assert [m["role"] for m in messages[1:]] == ["user", "assistant"] * 2
    assert messages[4]["content"] == answer(messages[:4])
    assert "There is no system message" in shown
    assert "The system message: be\nbrief\n" in shown


def test_a_system_message_can_be_removed():
    messages, shown = talk("/system -", "/help", "/system", "hello", "/exit", system="be brief")
    assert [m["role"] for m in messages] == ["user", "assistant"]
    assert messages[1]["content"] == answer(messages[:1])
    assert "There is no system message any more.\n" in shown
    assert "There is no system message. /system TEXT sets one.\n" in shown
    assert "removes it where TEXT is -" in shown


def test_a_template_that_refuses_a_system_message_is_found_before_it_is_needed():
    template = """{{ raise_exception("no system here") if messages[0].role == "system" }}{{ messages[0].content }}"""
    messages, shown = talk("/system be brief", "/exit", template=template)
    assert messages == []
    assert "no system here" in shown
    with pytest.raises(ValueError, match="no system here"):
        talk(template=template, system="be brief")


def test_save_writes_a_new_file_and_says_why_not(tmp_path):
    there, new, lost = tmp_path / "there.json", tmp_path / "größe 2.json", tmp_path / "none" / "x.json"
    there.write_text("mine")
    messages, shown = talk(f"/save {new}", "grüße", "/save", f"/save {there}", f"/save {lost}", f"/save {tmp_path}",
                           f"/save {new}", f"/save {new}", "/save ~nobody-here/x", "/exit", system="be brief")
    assert json.loads(new.read_text()) == messages
    assert "grüße" in new.read_text()
    assert there.read_text() == "mine"
    assert shown.count("There is nothing to save yet") == 1
    assert "/save needs the name of a new file" in shown
    for path in (there, tmp_path, new):
        assert f"{path} is there already; name a new file.\n" in shown
    assert f"{lost} cannot be written: No such file or directory\n" in shown
    assert "~nobody-here/x cannot be written: " in shown
    assert f"3 messages are in {new}.\n" in shown


def test_half_a_file_does_not_stay(tmp_path):
    """A file that outgrows its limit fails as one on a full disk does."""
    path, limits = tmp_path / "talk.json", resource.getrlimit(resource.RLIMIT_FSIZE)
    terminal = Terminal("hello", f"/save {path}", f"/save {path}", "/exit")

    def read(prompt):
        full = len(terminal.lines) == 3
        resource.setrlimit(resource.RLIMIT_FSIZE, (8, limits[1]) if full else limits)
        return terminal.read(prompt)

    try:
        messages = chat_loop(model(), tokenizer(), None, GREEDY, 12, read=read, write=terminal.write)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"{path} cannot be written: File too large\n" in terminal.text
    assert f"2 messages are in {path}.\n" in terminal.text
    assert json.loads(path.read_text()) == messages


def test_commands_that_are_none_are_no_messages_and_paths_are():
    messages, shown = talk("/hlep", "/xyz", "/reset the clock", "/help", "/etc/passwd is what?", " /help", "/exit")
    assert "There is no command /hlep; the nearest is /help. /help lists all" in shown
    assert "There is no command /xyz. /help" in shown
    assert "/reset takes no text" in shown
    for usage in chat_loop_module.COMMANDS:
        assert f"\n{usage} " in shown
    assert [m["content"] for m in messages[::2]] == ["/etc/passwd is what?", "/help"]


def test_a_bad_limit_is_refused_at_the_start():
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        chat_loop(model(), tokenizer(), max_new_tokens=0, read=pytest.fail)
