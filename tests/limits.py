"""Tokenizers that still hold what a training run set them to cut and pad."""

from tokenizers import Tokenizer

LIMITS = (
    {"truncation": dict(max_length=4)},
    {"truncation": dict(max_length=3, stride=1, direction="left", strategy="only_first")},
    {"padding": dict(length=64)},
    {"padding": dict(pad_to_multiple_of=8, direction="left", pad_id=3, pad_token="<|fim_pre|>")},
    {"truncation": dict(max_length=16), "padding": dict(length=16)},
)


def limited(tokenizer, *, truncation=None, padding=None):
    """A copy that is set so."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    if truncation is not None:
        copy.enable_truncation(**truncation)
    if padding is not None:
        copy.enable_padding(**padding)
    return copy
