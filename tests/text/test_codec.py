"""Incremental decoding and stop strings: any cut into pieces gives what the whole gives."""

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm_jax.testing import tiny_config, tiny_tokenizer
from lfm_jax.text.codec import Detokenizer, ReplyText, StopStrings, check_tokenizer, encode

MULTIBYTE = "naïve Zürich 東京 🦊🦊 über straße ñandú 🇯🇵 "


@functools.cache
def tokenizer():
    return tiny_tokenizer(MULTIBYTE * 3 + "the quick brown fox ", vocab_size=300)


ids = st.lists(st.integers(0, 299), max_size=40)


@settings(max_examples=200)
@given(ids, st.booleans(), st.data())
def test_pieces_of_any_tokens_are_the_whole(tokens, skip, data):
    detokenizer = Detokenizer(tokenizer(), skip_special_tokens=skip)
    text, pushed = "", 0
    while pushed < len(tokens):
        size = data.draw(st.integers(1, 5))
        text += detokenizer.push(tokens[pushed : pushed + size])
        pushed += size
        # Never a character that later tokens change.
        assert tokenizer().decode(tokens, skip_special_tokens=skip).startswith(text)
    assert text + detokenizer.finish() == tokenizer().decode(tokens, skip_special_tokens=skip)


@given(st.text(max_size=30))
def test_real_text_comes_back_character_by_character(text):
    detokenizer = Detokenizer(tokenizer())
    pieces = [detokenizer.push([i]) for i in encode(tokenizer(), text, bos_id=1)]
    assert "".join(pieces) + detokenizer.finish() == text
    if "\ufffd" not in text:
        assert "\ufffd" not in "".join(pieces)


def test_text_is_shown_as_soon_as_it_is_certain():
    detokenizer = Detokenizer(tokenizer())
    fox = tokenizer().encode("a🦊b", add_special_tokens=False).ids
    assert [p for i in fox if (p := detokenizer.push([i]))] == ["a", "🦊", "b"]


def reference_stop(text, stop):
    """The text before the stop string that is complete first, tried end by end."""
    for end in range(len(text) + 1):
        hits = [s for s in stop if text[:end].endswith(s)]
        if hits:
            return text[: end - max(map(len, hits))], True
    return text, False


abc = st.text("abc", max_size=25)


@given(abc, st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), st.data())
def test_stop_strings_in_any_pieces(text, stop, data):
    expected, stopped = reference_stop(text, stop)
    matcher, shown, at = StopStrings(stop), "", 0
    while at < len(text):
        size = data.draw(st.integers(1, 6))
        shown += matcher.push(text[at : at + size])
        at += size
        assert expected.startswith(shown)
        if not matcher.stopped:
            seen = text[:at]
            held = seen[len(shown) :]
            # What is kept back could still become a stop string, and no more than that is.
            assert not held or any(s.startswith(held) for s in stop)
    assert shown + matcher.finish() == expected
    assert matcher.stopped == stopped


def reference_hidden(pieces, stop, through_hidden):
    """The same with hidden text in between, from the whole text at every character."""
    whole = [(c, hidden) for text, hidden in pieces for c in text]
    text = "".join(c for c, hidden in whole if not hidden)
    for end in range(len(whole) + 1):
        everything = "".join(c for c, _ in whole[:end])
        shown = "".join(c for c, hidden in whole[:end] if not hidden)
        starts = [len(shown) - len(s) for s in stop if shown.endswith(s)]
        starts += [sum(not hidden for _, hidden in whole[: end - len(s)])
                   for s in through_hidden if everything.endswith(s)]
        if starts:
            return text[: min(starts)], True
    return text, False


@settings(max_examples=300)
@given(st.lists(st.tuples(st.text("ab#", max_size=4), st.booleans()), max_size=12),
       st.lists(st.text("ab#", min_size=1, max_size=5), max_size=3), st.booleans())
def test_stop_strings_are_found_between_and_through_hidden_text(pieces, stop, hash_only):
    through_hidden = [s for s in stop if "#" in s or not hash_only]
    expected, stopped = reference_hidden(pieces, stop, through_hidden)
    matcher, shown = StopStrings(stop, through_hidden), ""
    for text, hidden in pieces:
        shown += matcher.push(text, hidden=hidden)
        assert expected.startswith(shown)
    assert shown + matcher.finish() == expected
    assert matcher.stopped == stopped


@pytest.mark.parametrize("stop", [["e" * 256], ["e" * 250 + "<|pad|>"], ["<|pad|>" + "e" * 200, "e" * 256]])
def test_what_a_stop_string_holds_back_does_not_grow_with_hidden_text(stop):
    """A prefix of every stop string stays open; each push then looks at what is held, and at no more."""
    through_hidden = [s for s in stop if "<|" in s]
    matcher = StopStrings(stop, through_hidden)
    for i in range(200):
        assert matcher.push("e" if i < 100 else "<|im_end|>", hidden=i >= 100) == ""
        held = [len(value) for value in vars(matcher).values() if isinstance(value, (str, list))]
        assert max(held) < max(map(len, stop))
        assert through_hidden or sum(held) <= 100
    assert matcher.finish() == "e" * 100


def test_reply_leaves_stop_ids_out_and_joins_characters_before_it_looks_for_stop_strings():
    tokens = tokenizer().encode("ab🦊cd", add_special_tokens=False).ids
    reply = ReplyText(tokenizer(), ["🦊c"], {7}, skip_special_tokens=False)
    assert "".join(reply.push([i]) for i in tokens) + reply.finish() == "ab"
    assert reply.stopped
    reply = ReplyText(tokenizer(), ["🦊x"], {7}, skip_special_tokens=False)
    assert "".join(reply.push([i]) for i in [*tokens, 6, 7]) + reply.finish() == "ab🦊cd<|im_start|>"
    assert not reply.stopped


LETTERS = [tokenizer().encode(c, add_special_tokens=False).ids[0] for c in "abx"]


def reference_reply(tokens, stop, hidden):
    """The text before the stop string that is complete first, tried token by token; letters and special tokens only."""
    names = [tokenizer().id_to_token(i) for i in hidden]
    for end in range(len(tokens) + 1):
        shown = tokenizer().decode(tokens[:end], skip_special_tokens=False)
        text = "".join(tokenizer().id_to_token(i) for i in tokens[:end] if i not in hidden)
        # Of those that the last token completes, how far before its end, and where they start.
        found = [(at + len(s) - len(text), at) for s in stop if (at := text.find(s)) >= 0]
        for s in stop:
            if any(name in s for name in names) and shown.endswith(s):
                before = next(n for n in range(end + 1)
                              if len(tokenizer().decode(tokens[:n], skip_special_tokens=False)) >= len(shown) - len(s))
                found.append((0, sum(len(tokenizer().id_to_token(i)) for i in tokens[:before] if i not in hidden)))
        if found:
            return text[: min(found)[1]], True
    return text, False


@settings(max_examples=300)
@given(st.lists(st.sampled_from([*LETTERS, 6, 7, 8]), max_size=14), st.booleans(), st.booleans(), st.data())
def test_a_stop_string_may_be_or_hold_special_tokens(tokens, skip, ends, data):
    """In any mixture with letters, however tokens come, whether special tokens are shown, and if one is a stop id."""
    if ends:
        tokens = [*(i for i in tokens if i != 7), 7]  # A stop id comes last.
    cuts = st.tuples(st.integers(0, 14), st.integers(1, 3)).map(lambda cut: tokens[cut[0] : sum(cut)])
    rows = st.one_of(cuts, st.lists(st.sampled_from([*LETTERS, 6, 7, 8]), max_size=3))
    stop = [tokenizer().decode(row, skip_special_tokens=False) for row in data.draw(st.lists(rows, max_size=3)) if row]
    expected, stopped = reference_reply(tokens, stop, {6, 7, 8} if skip else {7} if ends else set())
    reply, text, at = ReplyText(tokenizer(), stop, [7] * ends, skip_special_tokens=skip), "", 0
    while at < len(tokens):
        size = data.draw(st.integers(1, 4))
        text += reply.push(tokens[at : at + size])
        at += size
        assert expected.startswith(text)
    assert text + reply.finish() == expected
    assert reply.stopped == stopped


def test_letters_of_hidden_tokens_are_no_text_and_spelled_out_tokens_are():
    spelled = [i for c in "a<|im_end|>b" for i in tokenizer().encode(c, add_special_tokens=False).ids]
    assert 7 not in spelled
    for tokens, stop, expected in (
        ([LETTERS[0], 7, LETTERS[1]], ["im_", "<"], "ab"), ([LETTERS[0], 7, LETTERS[1]], ["ab"], ""),
        (spelled, ["<|im_end|>"], "a"), (spelled, ["n", "<|im_end|>b"], "a<|im_e"),
    ):
        reply = ReplyText(tokenizer(), stop, (), skip_special_tokens=True)
        assert reply.push(tokens) + reply.finish() == expected


def test_a_special_token_that_is_a_stop_string_ends_a_character():
    [first, _] = tokenizer().encode("é", add_special_tokens=False).ids
    reply = ReplyText(tokenizer(), ["<|im_end|>x"], (), skip_special_tokens=True)
    assert reply.push([LETTERS[0], first, 7]) == "a\ufffd"
    assert reply.push([LETTERS[2]]) + reply.finish() == ""
    assert reply.stopped


def test_a_stop_string_in_the_last_bytes_still_counts():
    reply = ReplyText(tokenizer(), ["\ufffd"], (), skip_special_tokens=True)
    half = tokenizer().encode("é", add_special_tokens=False).ids[:1]
    assert len(tokenizer().encode("é", add_special_tokens=False).ids) == 2
    shown = reply.push([*tokenizer().encode("x", add_special_tokens=False).ids, *half])
    assert shown + reply.finish() == "x"


def test_encode_has_bos_once():
    assert encode(tokenizer(), "fox", 1) == tokenizer().encode("fox").ids
    assert encode(tokenizer(), "fox", 1)[0] == 1
    assert encode(tokenizer(), "<|startoftext|>fox", 1) == encode(tokenizer(), "fox", 1)


def test_a_tokenizer_larger_than_the_model_is_refused():
    size = tokenizer().get_vocab_size()
    check_tokenizer(tokenizer(), tiny_config(vocab_size=size))
    with pytest.raises(ValueError, match=f"{size} ids but the model's vocab_size is {size - 1}"):
        check_tokenizer(tokenizer(), tiny_config(vocab_size=size - 1))
