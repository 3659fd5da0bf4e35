"""The next turn of a conversation, taken apart into thought, text and calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lfm_jax.infer.generate import stream_pieces
from lfm_jax.model import LFM
from lfm_jax.sampling import GREEDY, Sampling
from lfm_jax.text.chat import encode_chat, reply_stage, turn_stop_ids
from lfm_jax.text.codec import check_tokenizer
from lfm_jax.text.reply import Reply, read_reply
from lfm_jax.text.thoughts import ThoughtCounter, thinking
from lfm_jax.text.tool_schemas import Tool, tool_schemas
from lfm_jax.text.tools import END, START

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def chat(
    model: LFM,
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    template: str | None = None,
    tools: Sequence[Tool] = (),
    sampling: Sampling = GREEDY,
    max_new_tokens: int = 512,
    plain_contents: bool = True,
) -> Reply:
    """Writes the assistant's next turn.

    Args:
      model, tokenizer, sampling: as in `generate`.
      messages: the conversation so far, each with `role` and `content`; an earlier reply may have its
        `reasoning_content` and `tool_calls` (`text.chat.encode_chat`).
      template: chat template of the checkpoint (`convert.hf.chat_template`); None means
        `text.chat.DEFAULT_TEMPLATE`.
      tools: what the model may call: Python functions, or schemas as OpenAI writes them (`text.tool_schemas`). Nothing
        holds calls to them; what is no call is text.
      max_new_tokens: of thought, text and calls together. A thought that they cut leaves an empty text.
      plain_contents: the names of special tokens in messages and tools are text like any other.

    Returns:
      The reply; `reply.thought` is empty where the model did not think.

    Raises:
      ValueError: as in `generate`; tools that are not valid; a template that fails or refuses the messages.
    """
    model.config.need_causal("a chat")
    check_tokenizer(tokenizer, model.config)
    offered = [{"type": "function", "function": schema} for schema in tool_schemas(tools)]
    prompt = encode_chat(tokenizer, model.config, template, messages, offered or None, plain_contents=plain_contents)
    how = thinking(tokenizer, template)
    begin = reply_stage(tokenizer, how, prompt)
    markers = [tokenizer.token_to_id(marker) for marker in (START, END) if tools]
    shown = [*(how.token_ids if how else ()), *(i for i in markers if i is not None)]
    pieces = stream_pieces(model, tokenizer, prompt, sampling, max_new_tokens, shown=shown,
                           stop_ids=turn_stop_ids(tokenizer, model.config))
    text, counter = "", ThoughtCounter(tokenizer, how, begin)
    for piece in pieces:
        text += piece.text
        counter.push(piece.tokens)
    return read_reply(text, tools, "answer" if counter.none else begin)
