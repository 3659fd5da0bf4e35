"""A conversation in the terminal: `lfm chat`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from lfm_jax.infer.generate import stream
from lfm_jax.model import LFM
from lfm_jax.sampling import GREEDY, Sampling
from lfm_jax.text.chat import Message, encode_chat, turn_stop_ids
from lfm_jax.text.codec import check_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def chat_loop(
    model: LFM,
    tokenizer: Tokenizer,
    template: str | None = None,
    sampling: Sampling = GREEDY,
    max_new_tokens: int = 512,
    *,
    system: str | None = None,
    read: Callable[[str], str] = input,
    write: Callable[..., None] = print,
) -> list[dict[str, str]]:
    """Talks until /exit, end of input or Ctrl-C at the prompt; /reset forgets the conversation.

    Ctrl-C during a reply stops the reply, not the program.

    Args:
      model, tokenizer, sampling, max_new_tokens: as in `generate`.
      template: chat template; None means DEFAULT_TEMPLATE.
      system: text of a system message that opens the conversation.
      read: asks for a line, given the prompt to show.
      write: shows text; takes the keywords `end` and `flush` of `print`.

    Returns:
      The messages of the conversation.
    """
    check_tokenizer(tokenizer, model.config)
    opening = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    write("Type a message; /reset forgets the conversation, /exit leaves.")
    while (line := _ask(read)) != "/exit":
        if line == "/reset":
            messages = list(opening)
            write("The conversation is forgotten.")
        elif line:
            turn = [*messages, {"role": "user", "content": line}]
            try:
                reply = _reply(model, tokenizer, template, turn, sampling, max_new_tokens, write)
            except ValueError as error:  # Above all: the conversation has outgrown the model's context.
                write(f"{error}\n/reset begins a new conversation.")
            else:
                messages = [*turn, {"role": "assistant", "content": reply}]
    return messages


def _ask(read: Callable[[str], str]) -> str:
    try:
        return read("> ").strip()
    except (EOFError, KeyboardInterrupt):
        return "/exit"


def _reply(
    model: LFM, tokenizer: Tokenizer, template: str | None, messages: Sequence[Message], sampling: Sampling,
    max_new_tokens: int, write: Callable[..., None],
) -> str:
    """Streams the assistant's turn to `write` and returns it, or what there was of it at Ctrl-C."""
    ids = encode_chat(tokenizer, model.config, template, messages)
    stop_ids = turn_stop_ids(tokenizer, model.config)
    text = ""
    try:
        for piece in stream(model, tokenizer, ids, sampling, max_new_tokens, stop_ids=stop_ids):
            text += piece
            write(piece, end="", flush=True)
    except KeyboardInterrupt:
        write(" [stopped]", end="")
    write("")
    return text
