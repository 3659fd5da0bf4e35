"""Trains and loads byte-level BPE tokenizers with LFM2's special tokens.

A tokenizer file may set the truncation and padding of a training run. They are part of the file, its copies and its
digest, but never apply to prompts: `inference_tokenizer` loads without them, `without_limits` removes them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

TOKENIZER_FILE = "tokenizer.json"

SPECIAL_TOKENS = (
    "<|pad|>", "<|startoftext|>", "<|endoftext|>", "<|fim_pre|>", "<|fim_mid|>", "<|fim_suf|>",
    "<|im_start|>", "<|im_end|>", "<|tool_list_start|>", "<|tool_list_end|>", "<|tool_call_start|>",
    "<|tool_call_end|>", "<|tool_response_start|>", "<|tool_response_end|>",
)
"""LFM2's special tokens; the index of each is its id."""

MIN_VOCAB_SIZE = len(SPECIAL_TOKENS) + 256

# LFM2's: words with the space before them, numbers in groups of three digits, punctuation with the line end after
# it, and runs of white space except for their last space, which belongs to the word: the indentation of
# a line of code is one token.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_bpe(texts: Iterable[str], vocab_size: int, *, min_frequency: int = 2) -> Tokenizer:
    """Trains a byte-level BPE tokenizer whose special tokens have LFM2's ids 0 to 13.

    Encode and `decode(ids, skip_special_tokens=False)` return every text unchanged, since all 256 bytes
    are in the vocabulary. `encode` prepends `<|startoftext|>` unless `add_special_tokens=False`.

    Args:
      texts: training text, iterated once.
      vocab_size: number of ids, special tokens and bytes included; the result has fewer if the text does not
        have that many repeated pairs.
      min_frequency: the number of times that a pair must occur to become a token.

    Raises:
      ValueError: vocab_size has no room for the special tokens and the bytes.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(
            f"vocab_size is {vocab_size}; it must be at least {MIN_VOCAB_SIZE}: "
            f"{len(SPECIAL_TOKENS)} special tokens and 256 bytes"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        show_progress=False,
        special_tokens=[AddedToken(name, special=True, normalized=False) for name in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos = SPECIAL_TOKENS[1]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B:1", special_tokens=[(bos, 1)]
    )
    return tokenizer


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Loads a tokenizer.json as it is, given as the file or as the directory that holds it.

    Raises:
      ValueError: the file does not exist, or `tokenizers` cannot read it.
    """
    file = Path(path)
    if file.is_dir():
        file = file / TOKENIZER_FILE
    if not file.is_file():
        raise ValueError(
            f"tokenizer {file} does not exist; give a {TOKENIZER_FILE} or a directory with one, or train one"
        )
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # `tokenizers` raises plain Exception.
        raise ValueError(
            f"tokenizer {file} cannot be read ({error}); expected a file written by `tokenizers`"
        ) from None


def inference_tokenizer(path: str | Path) -> Tokenizer:
    """Loads a tokenizer for prompts, without truncation and padding; otherwise as `load_tokenizer`."""
    tokenizer = load_tokenizer(path)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def without_limits(tokenizer: Tokenizer) -> Tokenizer:
    """Returns the tokenizer if it neither truncates nor pads, otherwise a copy that does not.

    A copy is made once for each object, which must not change otherwise.
    """
    return tokenizer if tokenizer.truncation is tokenizer.padding is None else _unlimited_copy(tokenizer)


@functools.lru_cache(maxsize=4)
def _unlimited_copy(tokenizer: Tokenizer) -> Tokenizer:
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy


@functools.lru_cache(maxsize=4)
def without_specials(tokenizer: Tokenizer) -> Tokenizer:
    """A copy to which the names of special tokens are text like any other, and that neither truncates nor pads."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.no_truncation()
    copy.no_padding()
    copy.encode_special_tokens = True
    return copy
