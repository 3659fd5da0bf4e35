"""The tokenizer loses nothing, knows LFM2's special tokens and says what is wrong with a file."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from limits import LIMITS, limited

from lfm_jax.testing import tiny_config, tiny_tokenizer
from lfm_jax.text.chat import encode_chat
from lfm_jax.text.codec import encode
from lfm_jax.text.tokenizer import (
    MIN_VOCAB_SIZE,
    SPECIAL_TOKENS,
    inference_tokenizer,
    load_tokenizer,
    train_bpe,
    without_limits,
)

CODE = "def half(number):\n    if number > 12345678:\n        return number / 2\n\n\n" * 20
TOKENIZER = train_bpe([CODE], vocab_size=400)


AWKWARD = st.lists(st.sampled_from([*" \t\r\n'1éß中\u200d\U0001f600", *SPECIAL_TOKENS])).map("".join)


@given(st.text() | AWKWARD)
def test_any_text_survives(text):
    ids = TOKENIZER.encode(text, add_special_tokens=False).ids
    assert TOKENIZER.decode(ids, skip_special_tokens=False) == text


@given(st.text())
def test_bos_is_prepended_when_asked_for(text):
    plain = TOKENIZER.encode(text, add_special_tokens=False).ids
    assert TOKENIZER.encode(text).ids == [1, *plain]


def test_special_tokens_have_the_ids_of_lfm2():
    names = {
        0: "<|pad|>", 1: "<|startoftext|>", 2: "<|endoftext|>", 6: "<|im_start|>", 7: "<|im_end|>",
        10: "<|tool_call_start|>", 13: "<|tool_response_end|>",
    }
    for i, name in names.items():
        assert TOKENIZER.id_to_token(i) == name
        assert TOKENIZER.encode(f"a{name}b", add_special_tokens=False).ids.count(i) == 1
    assert [TOKENIZER.token_to_id(name) for name in SPECIAL_TOKENS] == list(range(14))
    assert TOKENIZER.decode([1, *TOKENIZER.encode("x", add_special_tokens=False).ids, 7]) == "x"


def test_indentation_merges_and_digits_do_not_pile_up():
    tokens = TOKENIZER.encode("\n        return 12345678", add_special_tokens=False).tokens
    assert tokens[:3] == ["Ċ", "Ġ" * 7, "Ġreturn"]
    assert tokens[-3:] == ["123", "456", "78"]


def test_vocabulary_is_as_large_as_asked_and_training_repeats():
    assert TOKENIZER.get_vocab_size() <= 400
    assert train_bpe([CODE], vocab_size=300).get_vocab_size() == 300
    assert train_bpe([CODE], vocab_size=400).to_str() == TOKENIZER.to_str()
    assert tiny_tokenizer().token_to_id("<|im_end|>") == 7
    with pytest.raises(ValueError, match="at least 270"):
        train_bpe([CODE], vocab_size=MIN_VOCAB_SIZE - 1)


def test_load_takes_a_file_or_its_directory(tmp_path):
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).to_str() == TOKENIZER.to_str()
    assert load_tokenizer(str(tmp_path / "tokenizer.json")).to_str() == TOKENIZER.to_str()


def test_load_says_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer\.json does not exist; give"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{not json")
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_truncation_and_padding_of_a_file_stay_in_the_file(tmp_path, limits):
    file = limited(TOKENIZER, **limits)
    file.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).to_str() == file.to_str() != TOKENIZER.to_str()
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        assert inference_tokenizer(path).to_str() == TOKENIZER.to_str()
    assert without_limits(TOKENIZER) is TOKENIZER
    assert without_limits(file) is without_limits(file)
    assert without_limits(file).to_str() == TOKENIZER.to_str()
    assert file.to_str() != TOKENIZER.to_str()  # It is left as it was.


LIMITED = [limited(TOKENIZER, **limits) for limits in LIMITS]


@given(st.text() | AWKWARD, st.sampled_from(LIMITED))
def test_prompts_are_encoded_whole_and_no_longer(text, tokenizer):
    assert encode(tokenizer, text, 1) == encode(TOKENIZER, text, 1)
    config = tiny_config(vocab_size=400)
    messages = [{"role": "user", "content": text}]
    assert encode_chat(tokenizer, config, None, messages) == encode_chat(TOKENIZER, config, None, messages)
