"""Generates from prompts: texts, tokens or a stream of text."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from lfm_jax.infer.decoding import DISPATCH, Decoding, check, resolve_stop_ids
from lfm_jax.model import LFM
from lfm_jax.sampling import GREEDY, Sampling
from lfm_jax.text.codec import ReplyText, check_tokenizer, encode

if TYPE_CHECKING:
    from tokenizers import Tokenizer

STREAM_DISPATCH = 4
"""Tokens of one dispatch when streaming: on a slow machine text should not arrive in bursts of 32."""

Prompt = str | Sequence[int]


class Completion(NamedTuple):
    """The tokens generated for one prompt."""

    tokens: list[int]
    """Ids, including the stop id that ended them."""
    finish_reason: Literal["stop", "length"]
    """`stop`: the last token is a stop id. `length`: max_new_tokens were generated."""


class Piece(NamedTuple):
    """What one dispatch adds to a text."""

    text: str
    """Empty where nothing new has become certain."""
    tokens: list[int]
    """Their text may come with a later piece."""


def generate(
    model: LFM,
    tokenizer: Tokenizer,
    prompts: str | Sequence[Prompt],
    sampling: Sampling | Sequence[Sampling] = GREEDY,
    max_new_tokens: int = 64,
    *,
    stop: str | Sequence[str] = (),
    stop_ids: Sequence[int] | None = None,
    skip_special_tokens: bool = True,
) -> list[str]:
    """Generates a continuation of each prompt.

    Args:
      model: the model.
      tokenizer: the tokenizer of the model; it adds its own special tokens (bos) to prompts that are text.
      prompts: a text, or a list of texts and lists of token ids; they run as one batch.
      sampling: for all prompts, or one for each. The same prompt and seed always give the same text: for several
        different texts, give each its own seed.
      max_new_tokens: the most tokens to generate for each prompt.
      stop: strings before the first of which a text ends; they may be or contain special tokens.
      stop_ids: tokens that end a text and are not part of it. None means `model.config.eos_ids`.
      skip_special_tokens: leaves special tokens out of the texts.

    Returns:
      The generated texts, without the prompts, in the order of the prompts.

    Raises:
      ValueError: there is no prompt, a prompt has no tokens or ids that the model lacks, a prompt and max_new_tokens
        are together longer than `config.max_position`, the tokenizer does not fit the model, an option is not valid, or
        the model's logits are not finite.
    """
    check_tokenizer(tokenizer, model.config)
    stop, ids = _stop_strings(stop), resolve_stop_ids(stop_ids, model.config)
    if isinstance(prompts, str):
        prompts = [prompts]
    rows = [encode(tokenizer, p, model.config.bos_id) if isinstance(p, str) else p for p in prompts]
    decoding = Decoding(model, rows, sampling, max_new_tokens, ids)
    replies = [ReplyText(tokenizer, stop, ids, skip_special_tokens=skip_special_tokens) for _ in rows]
    texts = [""] * len(rows)
    while not decoding.done:
        for row, tokens in enumerate(decoding.advance(DISPATCH)):
            texts[row] += replies[row].push(tokens)
            if replies[row].stopped:
                decoding.stop(row)
    return [text + reply.finish() for text, reply in zip(texts, replies, strict=True)]


def stream(
    model: LFM,
    tokenizer: Tokenizer,
    prompt: Prompt,
    sampling: Sampling = GREEDY,
    max_new_tokens: int = 64,
    *,
    stop: str | Sequence[str] = (),
    stop_ids: Sequence[int] | None = None,
    skip_special_tokens: bool = True,
) -> Iterator[str]:
    """Generates a continuation of one prompt and yields its text in pieces; arguments and errors as in `generate`.

    A piece never holds half a character nor text that may still become part of a stop string. The pieces together
    are what `generate` returns for the prompt alone. Arguments are checked at the call, before anything runs; where
    logits are not finite, the pieces before them come first.
    """
    pieces = stream_pieces(model, tokenizer, prompt, sampling, max_new_tokens, stop=stop, stop_ids=stop_ids,
                           skip_special_tokens=skip_special_tokens)
    return (piece.text for piece in pieces if piece.text)


def stream_pieces(
    model: LFM,
    tokenizer: Tokenizer,
    prompt: Prompt,
    sampling: Sampling = GREEDY,
    max_new_tokens: int = 64,
    *,
    stop: str | Sequence[str] = (),
    stop_ids: Sequence[int] | None = None,
    skip_special_tokens: bool = True,
    shown: Collection[int] = (),
) -> Iterator[Piece]:
    """`stream` with the tokens beside their text; `shown` are special tokens that the text has all the same."""
    check_tokenizer(tokenizer, model.config)
    ids = resolve_stop_ids(stop_ids, model.config)
    row = encode(tokenizer, prompt, model.config.bos_id) if isinstance(prompt, str) else prompt
    check([row], sampling, max_new_tokens, model.config)
    reply = ReplyText(tokenizer, _stop_strings(stop), ids, skip_special_tokens=skip_special_tokens, shown=shown)

    def run() -> Iterator[Piece]:
        decoding = Decoding(model, [row], sampling, max_new_tokens, ids)
        while not (decoding.done or reply.stopped):
            try:
                tokens = decoding.advance(STREAM_DISPATCH)[0]
            except ValueError:
                yield Piece(reply.finish(), [])  # No stop string can end the text any more.
                raise
            yield Piece(reply.push(tokens), tokens)
        yield Piece(reply.finish(), [])

    return run()


def generate_tokens(
    model: LFM,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | Sequence[Sampling] = GREEDY,
    max_new_tokens: int = 64,
    *,
    stop_ids: Sequence[int] | None = None,
) -> list[Completion]:
    """Does as `generate` on token ids, without a tokenizer; arguments and errors as there."""
    ids = resolve_stop_ids(stop_ids, model.config)
    decoding = Decoding(model, prompts, sampling, max_new_tokens, ids)
    rows: list[list[int]] = [[] for _ in prompts]
    while not decoding.done:
        for row, tokens in zip(rows, decoding.advance(DISPATCH), strict=True):
            row += tokens
    return [Completion(row, "stop" if row[-1] in ids else "length") for row in rows]


def _stop_strings(stop: str | Sequence[str]) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else tuple(stop)
    if not all(isinstance(s, str) and s for s in strings):
        raise ValueError(f"stop is {stop!r}; it must be strings of at least one character")
    return strings
