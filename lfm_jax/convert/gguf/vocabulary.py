"""Tokenizers in GGUF files, both ways: byte-level BPE (`tokenizer.ggml.model` gpt2) with a pre-tokenizer by name.

Names are those that llama.cpp knows (src/llama-vocab.cpp); keys are those of its converter (`_set_vocab_gpt2`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from lfm_jax.config import ModelConfig

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PREFIX = "tokenizer.ggml."
TEMPLATE = "tokenizer.chat_template"
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Types of tokens."""
_EOS = ("eos_token_id", "eot_token_id", "eom_token_id")
"""Keys of the ids that end a text."""


class _Pre(NamedTuple):
    """What llama.cpp does for the name of a pre-tokenizer."""

    parts: tuple[dict[str, Any], ...]
    """The pre-tokenizer, as in a tokenizer.json."""
    adds_bos: bool = False
    """Whether bos is added if the file does not say."""


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _bytes(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _pres() -> dict[str, _Pre]:
    from lfm_jax.text.tokenizer import SPLIT

    return {
        "lfm2": _Pre((_split(SPLIT), _bytes(False)), adds_bos=True),
        "smollm": _Pre(({"type": "Digits", "individual_digits": True}, _bytes(True))),
        "gpt-2": _Pre((_bytes(True),)),
    }


# -------------------------------------------------------------------- out


def vocabulary_keys(
    tokenizer: Tokenizer | None, config: ModelConfig, template: str | None
) -> tuple[dict[str, Any], list[str]]:
    """Returns the keys of a tokenizer and a chat template, and why they cannot be written, if so.

    Ids without a token get the name [PADn], as embedding tables have rows that no tokenizer uses.
    """
    keys: dict[str, Any] = {TEMPLATE: template} if template else {}
    ids = dict(zip(_EOS, config.eos_ids, strict=False))
    ids |= {"bos_token_id": config.bos_id, "padding_token_id": config.pad_id}
    keys |= {PREFIX + key: i for key, i in ids.items()}
    if tokenizer is None:
        return {f"{PREFIX}model": "none"} | keys, []
    from lfm_jax.text.tokenizer import without_limits

    tokenizer = without_limits(tokenizer)
    plain = json.loads(tokenizer.to_str())
    model, problems = plain["model"], []
    if model.get("type") != "BPE" or model.get("byte_fallback") or model.get("dropout"):
        problems.append(f"the tokenizer is {model.get('type')} or has byte fallback or dropout; expected byte-level "
                        "BPE without them")
    if plain.get("normalizer"):
        problems.append(f"the tokenizer has a normalizer, {plain['normalizer']['type']}, which GGUF cannot say")
    pre = _name_of(plain.get("pre_tokenizer") or {})
    if pre is None:
        problems.append(f"the pre-tokenizer is none of those that llama.cpp knows by the names {', '.join(_pres())}")
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    if (size := max(vocabulary.values(), default=-1) + 1) > config.vocab_size:
        problems.append(f"the tokenizer has {size} ids but vocab_size is {config.vocab_size}; use the tokenizer that "
                        "the model was trained with")
    if len(config.eos_ids) > len(_EOS):
        problems.append(f"eos_ids has {len(config.eos_ids)} ids; a GGUF file has at most {len(_EOS)}")
    adds, found = _added(tokenizer, config)
    problems += found
    if problems:
        return {}, problems
    tokens, kinds = [f"[PAD{i}]" for i in range(config.vocab_size)], [UNUSED] * config.vocab_size
    for token, i in vocabulary.items():
        tokens[i], kinds[i] = token, NORMAL
    for i, token in tokenizer.get_added_tokens_decoder().items():
        kinds[i] = CONTROL if token.special else USER_DEFINED
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    own = {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": kinds, "merges": merges, **adds}
    return {PREFIX + key: value for key, value in own.items()} | keys, []


def _name_of(pre_tokenizer: Mapping[str, Any]) -> str | None:
    parts = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    return next((name for name, pre in _pres().items() if list(pre.parts) == parts), None)


def _added(tokenizer: Tokenizer, config: ModelConfig) -> tuple[dict[str, bool], list[str]]:
    """Returns whether the tokenizer puts bos before a text and eos after it, and what else it does."""
    bare, whole = (tokenizer.encode("a", add_special_tokens=add).ids for add in (False, True))
    at = next(i for i in range(len(whole) + 1) if whole[i : i + len(bare)] == bare)
    before, after = whole[:at], whole[at + len(bare) :]
    problems = []
    if before not in ([], [config.bos_id]):
        problems.append(f"the tokenizer puts the ids {before} before a text; only bos_id, {config.bos_id}, can be said")
    if after not in ([], list(config.eos_ids[:1])):
        problems.append(f"the tokenizer puts the ids {after} after a text; only the first of eos_ids, "
                        f"{list(config.eos_ids[:1])}, can be said")
    return {"add_bos_token": bool(before), "add_eos_token": bool(after)}, problems


# -------------------------------------------------------------------- in


def special_ids(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of ModelConfig that name tokens."""
    eos = [keys[PREFIX + key] for key in _EOS if PREFIX + key in keys]
    return dict(bos_id=keys.get(f"{PREFIX}bos_token_id", 0), pad_id=keys.get(f"{PREFIX}padding_token_id", 0),
                eos_ids=tuple(dict.fromkeys(eos)))


def tokenizer_of(keys: Mapping[str, Any]) -> tuple[Tokenizer | None, list[str]]:
    """Makes the tokenizer of a file; returns it, None if it has none, and problems."""
    kind = keys.get(f"{PREFIX}model", "none")
    if kind == "none":
        return None, []
    if kind != "gpt2":
        return None, [f"tokenizer.ggml.model is {kind!r}; only gpt2, byte-level BPE, is supported"]
    pres, name = _pres(), keys.get(f"{PREFIX}pre")
    if name not in pres:
        return None, [f"tokenizer.ggml.pre is {name!r}; only {', '.join(pres)} are supported"]
    lists = [keys.get(PREFIX + key) for key in ("tokens", "token_type", "merges")]
    tokens, kinds, merges = (found if isinstance(found, list) else [] for found in lists)
    if not tokens or len(tokens) != len(kinds):
        return None, [f"tokenizer.ggml.tokens has {len(tokens)} entries and token_type {len(kinds)}; expected one of "
                      "each for every id"]
    special = {i: kind == CONTROL for i, kind in enumerate(kinds) if kind in (CONTROL, USER_DEFINED)}
    plain: dict[str, Any] = {
        "version": "1.0",
        "added_tokens": [_added_token(i, tokens[i], special[i]) for i in special],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": list(pres[name].parts)},
        "post_processor": _template(keys, pres[name].adds_bos, tokens),
        "decoder": _bytes(True) | {"add_prefix_space": True},
        "model": {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens) if kinds[i] != UNUSED},
                  "merges": [merge.split(" ") for merge in merges]},
    }
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(json.dumps(plain)), []
    except Exception as error:  # `tokenizers` raises plain Exception.
        return None, [f"the tokenizer cannot be made: {error}"]


def _added_token(i: int, content: str, special: bool) -> dict[str, Any]:
    return {"id": i, "content": content, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": not special, "special": special}


def _template(keys: Mapping[str, Any], adds_bos: bool, tokens: list[str]) -> dict[str, Any] | None:
    """Returns the post-processor, which puts bos before each text and eos after it, None if it does neither."""
    ids = [keys.get(f"{PREFIX}{name}_token_id") if keys.get(f"{PREFIX}add_{name}_token", default) else None
           for name, default in (("bos", adds_bos), ("eos", False))]
    bos, eos = (i if isinstance(i, int) and 0 <= i < len(tokens) else None for i in ids)
    if bos is None and eos is None:
        return None

    def around(name: str, kind: int) -> list[dict[str, Any]]:
        pieces = [{"SpecialToken": {"id": tokens[i], "type_id": kind}} for i in (bos, eos) if i is not None]
        return [*pieces[: bos is not None], {"Sequence": {"id": name, "type_id": kind}}, *pieces[bos is not None :]]

    named = {tokens[i]: {"id": tokens[i], "ids": [i], "tokens": [tokens[i]]} for i in (bos, eos) if i is not None}
    # As LFM2's, the second text of a pair begins with bos too; nothing here encodes pairs.
    return {"type": "TemplateProcessing", "single": around("A", 0), "pair": around("A", 0) + around("B", 0),
            "special_tokens": named}
