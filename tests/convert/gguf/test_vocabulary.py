"""Tokenizers in GGUF files: the same ids when they come back, and what cannot be said."""

import json

import pytest
from gguf_kinds import SIZES, tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from lfm_jax.convert.gguf.vocabulary import special_ids, tokenizer_of, vocabulary_keys
from lfm_jax.testing import tiny_config, tiny_tokenizer

CONFIG = tiny_config(**SIZES)


def there_and_back(made, config=CONFIG):
    keys, problems = vocabulary_keys(made, config, None)
    assert problems == []
    found, problems = tokenizer_of(json.loads(json.dumps(keys)))
    assert problems == []
    return keys, found


def byte_level(pre_tokenizer):
    """A tokenizer of bytes and two merges, with specials where LFM2 has them."""
    names = ["<|pad|>", "<|startoftext|>", *(f"<|{i}|>" for i in range(2, 7)), "<|im_end|>"]
    pieces = [*names, *sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "the", "Ġt"]
    merges = [("t", "h"), ("th", "e"), ("Ġ", "t")]
    made = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    made.pre_tokenizer, made.decoder = pre_tokenizer, decoders.ByteLevel()
    made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    return made


PRES = {
    "lfm2": tokenizer().pre_tokenizer,
    "smollm": pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
}


@pytest.mark.parametrize("name", PRES)
def test_every_pre_tokenizer_comes_back(name):
    made = byte_level(PRES[name])
    keys, found = there_and_back(made)
    assert keys["tokenizer.ggml.pre"] == name
    assert not keys["tokenizer.ggml.add_bos_token"]

    @given(st.text() | st.text("the 123<|im_end|>\n'"))
    def ids_are_the_same(text):
        ids = made.encode(text).ids
        assert found.encode(text).ids == ids
        assert found.decode(ids) == made.decode(ids)

    ids_are_the_same()


def test_a_trained_tokenizer_is_the_same_file():
    keys, found = there_and_back(tokenizer())
    assert found.encode("the quick <|im_end|>").ids == tokenizer().encode("the quick <|im_end|>").ids
    ours, theirs = (json.loads(x.to_str()) for x in (found, tokenizer()))
    for part in ("model", "pre_tokenizer", "decoder", "added_tokens"):
        assert ours[part] == theirs[part], part
    assert special_ids(keys) == dict(bos_id=1, pad_id=0, eos_ids=(7,))


def test_bos_and_eos_are_added_as_before():
    made = tokenizer()
    made.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|im_end|>", special_tokens=[("<|startoftext|>", 1), ("<|im_end|>", 7)])
    keys, found = there_and_back(made)
    assert keys["tokenizer.ggml.add_eos_token"]
    assert found.encode("the").ids == made.encode("the").ids
    assert found.encode("the").ids[-1] == 7
    # As in llama.cpp, a file of LFM2 that does not say has bos, and one of SmolLM has not.
    del keys["tokenizer.ggml.add_bos_token"], keys["tokenizer.ggml.add_eos_token"]
    assert tokenizer_of(keys)[0].encode("the").ids == tokenizer().encode("the").ids
    keys["tokenizer.ggml.pre"] = "smollm"
    assert 1 not in tokenizer_of(keys)[0].encode("the").ids


def test_added_tokens_that_are_not_special_are_user_defined():
    made = tokenizer()
    made.add_tokens([AddedToken("<think>", normalized=True, special=False)])
    keys, found = there_and_back(made)
    place = made.token_to_id("<think>")
    assert keys["tokenizer.ggml.token_type"][place] == 4
    assert found.encode("a<think>b").ids == made.encode("a<think>b").ids
    assert found.decode([place]) == "<think>"


def test_limits_of_training_are_left_behind():
    made = tokenizer()
    made.enable_truncation(3)
    made.enable_padding(length=5)
    _, found = there_and_back(made)
    assert found.encode("the quick brown fox").ids == tokenizer().encode("the quick brown fox").ids


def test_without_a_tokenizer_there_are_ids_and_a_template():
    keys, problems = vocabulary_keys(None, CONFIG, "{{ x }}")
    assert problems == []
    assert tokenizer_of(keys) == (None, [])
    assert special_ids(keys) == dict(bos_id=1, pad_id=0, eos_ids=(7,))
    assert keys["tokenizer.chat_template"] == "{{ x }}"


def test_what_cannot_be_said_is_listed_together():
    strange = tokenizer()
    strange.normalizer = normalizers.NFC()
    strange.pre_tokenizer = pre_tokenizers.Whitespace()
    strange.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|pad|>", special_tokens=[("<|im_start|>", 6), ("<|pad|>", 0)])
    keys, problems = vocabulary_keys(strange, tiny_config(eos_ids=(7, 2, 3, 4)), None)
    assert keys == {}
    assert [problem.split(";")[0] for problem in problems] == [
        "the tokenizer has a normalizer, NFC, which GGUF cannot say",
        "the pre-tokenizer is none of those that llama.cpp knows by the names lfm2, smollm, gpt-2",
        f"the tokenizer has {strange.get_vocab_size()} ids but vocab_size is 97",
        "eos_ids has 4 ids",
        "the tokenizer puts the ids [6] before a text",
        "the tokenizer puts the ids [0] after a text",
    ]
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    words.pre_tokenizer = PRES["lfm2"]
    [problem] = vocabulary_keys(words, CONFIG, None)[1]
    assert problem.startswith("the tokenizer is WordLevel")


def test_a_tokenizer_that_cannot_be_made_says_so():
    keys, _ = vocabulary_keys(tiny_tokenizer(vocab_size=300), CONFIG, None)
    keys["tokenizer.ggml.merges"] = ["no such"]
    found, [problem] = tokenizer_of(keys)
    assert found is None
    assert problem.startswith("the tokenizer cannot be made: ")
