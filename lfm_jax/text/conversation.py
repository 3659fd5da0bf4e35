"""Encodes conversations for training: their token ids, and the spans of them that the assistant wrote.

Spans come from the `{% generation %}` blocks of the template. A template without such blocks must write each message as
a turn in LFM2's form:

    <|im_start|>ROLE\\nCONTENT<|im_end|>\\n

The assistant then wrote its turns from the content on, including `<|im_end|>\\n`, with which it ends them. The opening
`<|im_start|>assistant\\n` is part of its prompt.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lfm_jax.config import ModelConfig
from lfm_jax.text.chat import (
    DEFAULT_TEMPLATE,
    END_OF_TURN,
    START_OF_TURN,
    Message,
    has_generation,
    render_chat,
    special_tokens,
    with_calls,
)
from lfm_jax.text.codec import encoded
from lfm_jax.text.templates import GENERATION_CLOSES, GENERATION_OPENS

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Span = tuple[int, int]
"""A first index and the index after the last."""


class Conversation(NamedTuple):
    """The tokens of a conversation."""

    ids: list[int]
    spans: list[Span]
    """The spans of ids that the assistant wrote: sorted, disjoint, not adjacent, none empty."""


def encode_conversation(
    tokenizer: Tokenizer, config: ModelConfig, template: str | None, messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> Conversation:
    """Encodes a whole conversation; template None means DEFAULT_TEMPLATE.

    A token is the assistant's if any of its characters is, as in the `assistant_masks` of `transformers`. Templates and
    tool calls are treated as in `encode_chat`, so that the ids begin with those it returns for the turns before.

    Raises:
      ValueError: see `encode_chat` and `render_conversation`.
    """
    template = template or DEFAULT_TEMPLATE
    text, spans = render_conversation(
        template, with_calls(template, messages), tools=tools, **special_tokens(tokenizer, config)
    )
    encoding = encoded(tokenizer, text, add_special_tokens=False)
    return Conversation(encoding.ids, token_spans(encoding.offsets, spans))


def render_conversation(
    template: str, messages: Sequence[Message], *, tools: Sequence[Mapping[str, Any]] | None = None, **specials: Any
) -> tuple[str, list[Span]]:
    """Renders a whole conversation, and finds the characters that the assistant wrote.

    Args:
      template, messages, tools, specials: as for `render_chat`.

    Returns:
      (text, spans); the spans are sorted and do not overlap, and are empty for empty `{% generation %}` blocks.

    Raises:
      ValueError: see `render_chat`, or the spans are not known exactly. The template has no `{% generation %}` and does
        not write one turn of LFM2's form for each message, or a message holds the marks of a turn. Or its `{%
        generation %}` blocks are nested or left by a `break`, or the template changes their text.
    """
    specials = {"strftime_now": datetime.now().strftime} | specials  # Both renderings get the same time.
    text = render_chat(template, messages, tools=tools, add_generation_prompt=False, **specials)
    if not has_generation(template):
        return text, _turn_spans(text, messages, tools)
    opens, closes = islice((c for c in map(chr, range(0xE000, 0xF900)) if c not in text), 2)
    marked = render_chat(template, messages, tools=tools, add_generation_prompt=False, **specials,
                         **{GENERATION_OPENS: opens, GENERATION_CLOSES: closes})
    return text, _marked_spans(marked, opens, closes, text)


def _marked_spans(marked: str, opens: str, closes: str, text: str) -> list[Span]:
    parts = re.split(f"([{opens}{closes}])", marked)
    texts, marks = parts[::2], parts[1::2]
    if "".join(texts) != text or marks != [opens, closes] * (len(marks) // 2):
        raise ValueError(
            "the chat template works on the text of its {% generation %} blocks (with a filter, a length or the like), "
            "nests them or leaves one by a break, so that what the assistant wrote is not known; print each block as "
            "it is, straight into the conversation"
        )
    borders = np.cumsum([len(part) for part in texts])[:-1].tolist()
    return list(zip(borders[::2], borders[1::2], strict=True))


def _turn_spans(text: str, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None) -> list[Span]:
    given = json.dumps([list(messages), tools], ensure_ascii=False)
    for mark in (START_OF_TURN, END_OF_TURN):
        if mark in given:
            raise ValueError(f"a message or tool holds the text {mark}, which would begin or end a turn; take it out")
    head, *turns = text.split(START_OF_TURN)
    at, roles, spans = len(head), [], []
    for turn in turns:
        role, newline, written = turn.partition("\n")
        roles.append(role if newline and written.partition(END_OF_TURN)[1:] == (END_OF_TURN, "\n") else None)
        at += len(START_OF_TURN + turn)
        if role == "assistant":
            spans.append((at - len(written), at))
    asked = [message["role"] for message in messages]
    if END_OF_TURN in head or roles not in (asked, ["system", *asked]):
        raise ValueError(
            "the chat template has no {% generation %} and does not write each message as "
            f"{START_OF_TURN}ROLE\\nCONTENT{END_OF_TURN}\\n, so that what the assistant wrote is not known; put "
            "{% generation %} and {% endgeneration %} around what it writes in the template"
        )
    return spans


def token_spans(offsets: Sequence[Span], spans: Sequence[Span]) -> list[Span]:
    """Returns the runs of tokens, given by their characters, that overlap spans."""
    first, last = np.array(offsets, np.int64).reshape(-1, 2).T
    begins, ends = np.array(spans, np.int64).reshape(-1, 2).T
    # The first span that does not end before a token decides.
    begins = np.append(begins, np.iinfo(np.int64).max)
    inside = last > begins[np.searchsorted(ends, first, side="right")]
    borders = np.flatnonzero(np.diff(inside, prepend=False, append=False))
    return [(int(a), int(b)) for a, b in borders.reshape(-1, 2)]
