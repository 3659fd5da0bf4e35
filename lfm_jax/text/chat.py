"""Renders conversations as prompts with the checkpoint's own Jinja template.

A template is a program that comes with the weights: it runs in a sandbox, on copies of plain data.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from lfm_jax.config import ModelConfig
from lfm_jax.problems import raise_problems
from lfm_jax.text.codec import encoded
from lfm_jax.text.contents import encode_contents_plainly
from lfm_jax.text.templates import GENERATION_OPENS, compiled_template, render
from lfm_jax.text.thoughts import BLANKS, CLOSE, OPEN, Stage, Thinking, stage
from lfm_jax.text.tools import END, START, ToolCall, render_calls

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Message = Mapping[str, Any]

START_OF_TURN, END_OF_TURN = "<|im_start|>", "<|im_end|>"

OWN_VARIABLES = {"messages", "tools", "documents", "add_generation_prompt"}
"""Variables of a template that `render_chat` sets."""
_END_OF_CONTENT = "\U00100000end\U00100000"
"""Stands, while a template renders, where the content of a message ends that is to be continued."""

DEFAULT_TEMPLATE = """\
{{- bos_token -}}
{%- if tools -%}
    {%- set list = "List of tools: " + tools | tojson -%}
    {%- if messages[0]["role"] == "system" -%}
        {%- set messages = [{"role": "system", "content": messages[0]["content"] + "\\n" + list}] + messages[1:] -%}
    {%- else -%}
        {%- set messages = [{"role": "system", "content": list}] + messages -%}
    {%- endif -%}
{%- endif -%}
{%- for message in messages -%}
    {{- "<|im_start|>" + message["role"] + "\\n" + message["content"] + "<|im_end|>\\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- "<|im_start|>assistant\\n" -}}
{%- endif -%}
"""
"""For checkpoints without a template: ChatML turns as in LFM2, and tools listed as in LFM2.5."""


def render_chat(
    template: str,
    messages: Sequence[Message],
    /,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    **specials: Any,
) -> str:
    """Renders the prompt of a conversation, as `apply_chat_template` of `transformers` does.

    Args:
      template: Jinja source: a checkpoint's chat template or DEFAULT_TEMPLATE.
      messages: plain data, each with at least a `role` and mostly a `content`. Keys with the value None are left out.
      tools: JSON schemas of functions.
      add_generation_prompt: ends with the opening of the assistant's turn.
      **specials: further variables of the template, above all `bos_token` (see `special_tokens`); one with the name of
        a function of templates (`strftime_now`) replaces it.

    Returns:
      Text that already has bos: encode it without special tokens.

    Raises:
      ValueError: a broken template, one that the sandbox or the bounds of `templates` stop, one that refuses these
        messages, messages that are not plain data, or tools for a template without them.
    """
    messages = _for_each(_without_none, _plain("messages", messages))
    tools = _plain("tools", tools)
    if tools and "tools" not in compiled_template(template)[1]:
        raise ValueError("the chat template takes no tools; leave them out or use a checkpoint whose template does")
    return render(template, {
        "messages": messages, "tools": tools, "documents": None, "add_generation_prompt": add_generation_prompt
    } | specials)


def render_open(
    template: str, messages: Sequence[Message], /, *, tools: Sequence[Mapping[str, Any]] | None = None, **specials: Any
) -> str:
    """Renders a conversation up to the end of its last message's content, for a model to continue it.

    Raises:
      ValueError: see `render_chat`; the last message has no content, or the template leaves it out.
    """
    if not messages or not messages[-1].get("content"):
        raise ValueError("the last message has no content to continue")
    *earlier, last = messages
    marked = dict(last) | {"content": last["content"] + _END_OF_CONTENT}
    whole = render_chat(template, [*earlier, marked], tools=tools, add_generation_prompt=False, **specials)
    begun, found, _ = whole.rpartition(_END_OF_CONTENT)
    if not found:
        raise ValueError("the last message cannot be continued: the chat template leaves its content out")
    return begun


def _without_none(message: Message) -> Message:
    return {key: value for key, value in message.items() if value is not None}


def _for_each(change: Callable[[Message], Message], messages: Any) -> list[Message]:
    """Applies `change` to each message.

    Raises:
      ValueError: messages that are not dicts with a role, or that `change` refuses, all by their numbers from 0.
    """
    if isinstance(messages, str) or not isinstance(messages, Iterable):
        raise ValueError(f"messages is {messages!r:.80}; expected a list of dicts, each with a 'role'")
    changed, problems = [], []
    for i, message in enumerate(messages):
        try:
            if not isinstance(message, Mapping) or "role" not in message:
                raise ValueError(f"it is {message!r:.80}; expected a dict with a 'role'")
            changed.append(change(message))
        except ValueError as error:
            problems.append(f"message {i}: {error}")
    raise_problems("messages are not valid", problems)
    return changed


def _plain(name: str, value: Any) -> Any:
    """Returns a copy made of JSON types only: a template must not get objects with methods."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{name} must be plain data (dicts, lists, texts, numbers): {error}") from error


def has_generation(template: str) -> bool:
    """Returns whether a template marks with `{% generation %}` what the assistant wrote.

    Raises:
      ValueError: the template is not valid.
    """
    return GENERATION_OPENS in compiled_template(template)[1]


def special_tokens(tokenizer: Tokenizer, config: ModelConfig) -> dict[str, Any]:
    """Returns the variables `bos_token`, `eos_token` and `pad_token` of a template: the texts of the config's ids."""
    ids = {"bos_token": config.bos_id, "eos_token": config.eos_ids[0] if config.eos_ids else None,
           "pad_token": config.pad_id}
    return {name: "" if i is None else tokenizer.id_to_token(i) or "" for name, i in ids.items()}


def encode_chat(
    tokenizer: Tokenizer, config: ModelConfig, template: str | None, messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None, *, plain_contents: bool = False, continue_final: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> list[int]:
    """Encodes a conversation up to the opening of the assistant's turn; template None means DEFAULT_TEMPLATE.

    Calls in earlier turns (`tool_calls`, each with `name` and `arguments`, itself or in its `function`) are written as
    the model writes them, unless the template writes them. A thought in an earlier turn (`reasoning_content`) is
    written before its content where the template names `</think>`, so that the template's own rule says what becomes of
    it; a template that names `reasoning_content` gets it as it is, and one that names neither has no thoughts.

    Args:
      plain_contents: the names of special tokens in messages and tools are encoded as plain text, so that only the
        template writes special tokens. What holds no such name has the same ids either way.
      continue_final: ends with the content of the last message, which the model then continues.
      variables: further variables of the template.

    Raises:
      ValueError: see `render_chat`; calls without name or arguments; with `plain_contents`, the name of a special token
        in a content on which the template works, as by a length, so that it is not known in the prompt; a last message
        without content to continue, or whose content the template leaves out; variables that `render_chat` sets itself.
    """
    template = template or DEFAULT_TEMPLATE
    # One moment, however often it is rendered.
    given: dict[str, Any] = {"strftime_now": datetime.now().strftime} | special_tokens(tokenizer, config)
    given |= dict(variables or {})
    if taken := sorted(OWN_VARIABLES & given.keys()):
        raise ValueError(f"{', '.join(taken)} cannot be set as a variable of the chat template")

    def text(change: Callable[[Any], Any]) -> str:
        written = with_calls(template, messages, change)
        if not continue_final:
            return render_chat(template, written, tools=change(tools), **given)
        return render_open(template, written, tools=change(tools), **given)

    if not plain_contents:
        return encoded(tokenizer, text(lambda value: value), add_special_tokens=False).ids
    messages, tools = _plain("messages", messages), _plain("tools", tools)
    return encode_contents_plainly(tokenizer, [messages, tools], text)


def with_calls(
    template: str, messages: Sequence[Message], change: Callable[[Any], Any] = lambda value: value
) -> list[Message]:
    """Writes the calls and thoughts of messages as text, unless the template writes them (see `encode_chat`).

    Args:
      change: applied to everything in the messages, and to calls as they are written.

    Raises:
      ValueError: messages or calls that are not valid, by the numbers of the messages from 0.
    """

    def written(message: Message) -> Message:
        thought, message = _thought(template, message)
        if "tool_calls" in template:
            message = change(_with_calls_in_full(message))
        else:
            message = _with_calls_as_text(message, change)
        if not thought:
            return message
        content = message.get("content") or ""
        if not isinstance(content, str):
            raise ValueError(f"its content is {content!r:.80}; expected a text after its reasoning_content")
        return dict(message) | {"content": f"{OPEN}\n{change(thought)}\n{CLOSE}\n\n{content}"}

    return _for_each(written, messages)


def _thought(template: str, message: Message) -> tuple[str, Message]:
    """The thought of a message that is to be written into its content, and the rest of the message."""
    thought = message.get("reasoning_content")
    if thought is None or "reasoning_content" in template:
        return "", message
    if not isinstance(thought, str):
        raise ValueError(f"its reasoning_content is {thought!r:.80}; expected a text")
    rest = {key: value for key, value in message.items() if key != "reasoning_content"}
    return thought if CLOSE in template else "", rest


def _calls(message: Message) -> Sequence[Mapping[str, Any]]:
    calls = message.get("tool_calls") or ()
    if not isinstance(calls, Sequence) or not all(isinstance(call, Mapping) for call in calls):
        raise ValueError(f"its tool_calls is {calls!r:.80}; expected a list of dicts, each with a name and arguments")
    return calls


def _with_calls_in_full(message: Message) -> Message:
    """Gives each call a `function`: templates look for name and arguments there, or in the call itself."""
    calls = _calls(message)
    if not calls:
        return message
    full = [call if "function" in call
            else {"type": "function", "function": dataclasses.asdict(_tool_call(call)), **call} for call in calls]
    return dict(message) | {"tool_calls": full}


def _with_calls_as_text(message: Message, change: Callable[[Any], Any]) -> Message:
    calls, content = _calls(message), message.get("content") or ""
    if not calls:
        return change(message)
    if not isinstance(content, str):
        raise ValueError(f"its content is {content!r:.80}; expected a text before its calls")
    text = render_calls(map(_tool_call, calls)).removeprefix(START).removesuffix(END)
    rest = change({key: value for key, value in message.items() if key != "tool_calls"})
    return rest | {"content": (rest.get("content") or "") + START + change(text) + END}


def _tool_call(call: Mapping[str, Any]) -> ToolCall:
    function = call.get("function", call)
    if not isinstance(function, Mapping) or not (isinstance(function.get("name"), str) and "arguments" in function):
        raise ValueError(f"each of tool_calls must have a name and arguments, itself or in its function, not {call!r}")
    if not isinstance(function["arguments"], Mapping):
        raise ValueError(f"the arguments of a call of {function['name']!r} must be an object, not "
                         f"{function['arguments']!r}; parse the text of one first")
    return ToolCall(function["name"], dict(function["arguments"]))


def begun_turn(tokenizer: Tokenizer, prompt: Sequence[int]) -> str:
    """Returns what a prompt has of the assistant's turn, such as `<think>`: what follows its opening.

    Of a prompt whose turns have another form than LFM2's this is at most the `<think>` that ends it.
    """
    at = _last_turn(tokenizer, prompt)
    text = tokenizer.decode(list(prompt[max(len(prompt) - 64, 0) if at is None else at :]), skip_special_tokens=False)
    _, found, turn = text.rpartition(START_OF_TURN)
    if not found:
        return OPEN if text.rstrip(BLANKS).endswith(OPEN) else ""
    return turn.partition("\n")[2]


def _last_turn(tokenizer: Tokenizer, prompt: Sequence[int]) -> int | None:
    start = tokenizer.token_to_id(START_OF_TURN)
    return next((i for i in range(len(prompt) - 1, -1, -1) if prompt[i] == start), None)


def is_marked(tokenizer: Tokenizer, how: Thinking, prompt: Sequence[int]) -> bool:
    """Returns whether `<think>` in the assistant's turn of a prompt is a mark. Where a tokenizer has a token for it,
    texts of strangers may spell it out (`contents`)."""
    return not how.token_ids or how.token_ids[0] in prompt[_last_turn(tokenizer, prompt) or 0 :]


def reply_stage(tokenizer: Tokenizer, how: Thinking | None, prompt: Sequence[int], begun: str = "") -> Stage:
    """Returns where the reply to a prompt goes on; of a model without thoughts, in the answer.

    Args:
      begun: what a client wrote of it, for prompts whose turns have another form than LFM2's.
    """
    if how is None:
        return "answer"
    turn = begun_turn(tokenizer, prompt)
    return stage(turn if turn.strip(BLANKS) else begun, marked=is_marked(tokenizer, how, prompt))


def turn_stop_ids(tokenizer: Tokenizer, config: ModelConfig) -> tuple[int, ...]:
    """Returns the tokens that end the assistant's turn: eos, and the end of a turn if the tokenizer has one."""
    end = tokenizer.token_to_id(END_OF_TURN)
    return tuple(sorted({*config.eos_ids, *([] if end is None else [end])}))
