"""Cutting and packing: every token predicted once, nothing across documents, padding only at the right.

Dimensions: T time.
"""

from collections import Counter
from itertools import pairwise

import grain
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lfm_jax.data.batch import LOSS_IGNORE
from lfm_jax.data.packing import PACKING_ROWS, Pieces, pack
from lfm_jax.text.tokenizer import train_bpe

BOS, EOS = 1, 2
BYTES = train_bpe([], vocab_size=270)


def token_ids(text):
    """Bytes are the only tokens, so an independent encoder is one line."""
    return [BOS, *(BYTES.token_to_id(token) for token in BYTES.encode(text, add_special_tokens=False).tokens), EOS]


def make_pieces(texts, T):
    return Pieces(texts, BYTES, T, bos_id=BOS, eos_id=EOS)


def make_rows(texts, T, shuffle_seed=None):
    return list(pack(grain.MapDataset.source(make_pieces(texts, T)), T, shuffle_seed=shuffle_seed))


TEXTS = st.lists(st.text("ab\né", max_size=40), min_size=1, max_size=12)


@given(TEXTS, st.integers(1, 16), st.sampled_from([None, 3]))
def test_every_token_is_predicted_once_from_its_own_document(texts, T, shuffle_seed):
    expected, seen = Counter(), Counter()
    for text in texts:
        ids = token_ids(text)
        expected.update(pairwise(ids))
    for row in make_rows(texts, T, shuffle_seed):
        real = row["segment_ids"] > 0
        seen.update(zip(row["tokens"][real].tolist(), row["targets"][real].tolist(), strict=True))
    assert seen == expected


@given(TEXTS, st.integers(1, 16))
def test_rows_hold_whole_pieces_then_padding(texts, T):
    for row in make_rows(texts, T):
        assert all(x.shape == (T,) and x.dtype == np.int32 for x in row.values())
        segments = row["segment_ids"]
        length = np.count_nonzero(segments)
        assert np.all(segments[:length] > 0), "padding is at the right end only"
        np.testing.assert_array_equal(row["targets"] == LOSS_IGNORE, segments == 0)
        assert not row["tokens"][length:].any()
        assert not row["positions"][length:].any()
        steps = np.diff(segments[:length])
        assert segments[0] == 1
        assert set(steps.tolist()) <= {0, 1}, "segments count up from 1"
        for segment in range(1, segments.max() + 1):
            inside = segments == segment
            np.testing.assert_array_equal(row["positions"][inside], np.arange(inside.sum()))
            np.testing.assert_array_equal(row["tokens"][inside][1:], row["targets"][inside][:-1])


@given(st.text("ab", max_size=60), st.integers(1, 16))
def test_pieces_of_a_document_overlap_by_one_token_and_are_as_long_as_they_can_be(text, T):
    pieces = make_pieces([text], T)
    parts = [pieces[i] for i in range(len(pieces))]
    assert [len(part["tokens"]) for part in parts[:-1]] == [T] * (len(parts) - 1)
    assert len(parts[-1]["tokens"]) in range(1, T + 1)
    for before, after in pairwise(parts):
        assert after["tokens"][0] == before["targets"][-1]
    ids = token_ids(text)
    np.testing.assert_array_equal(np.concatenate([part["tokens"] for part in parts]), ids[:-1])
    np.testing.assert_array_equal(np.concatenate([part["targets"] for part in parts]), ids[1:])


def test_short_documents_waste_little_padding():
    lengths = np.random.default_rng(0).integers(5, 100, size=2000)
    rows = make_rows(["a" * int(n) for n in lengths], 128, shuffle_seed=0)
    assert np.mean([row["segment_ids"] > 0 for row in rows]) > 0.94


def test_shuffling_moves_rows_within_the_rows_open_at_a_time():
    texts = [f"{i:03}" for i in range(2 * PACKING_ROWS)]  # Each fills a row of 4.
    plain, shuffled, other = (np.stack([row["tokens"] for row in make_rows(texts, 4, seed)]) for seed in (None, 5, 6))
    assert not np.array_equal(shuffled, other)
    np.testing.assert_array_equal(plain, [token_ids(text)[:-1] for text in texts])
    for half in (slice(None, PACKING_ROWS), slice(PACKING_ROWS, None)):
        assert not np.array_equal(plain[half], shuffled[half])
        assert sorted(map(tuple, plain[half])) == sorted(map(tuple, shuffled[half]))


def test_special_tokens_in_a_text_are_text():
    pieces = make_pieces(["a<|endoftext|>b<|startoftext|>"], 64)
    assert pieces[0]["targets"].tolist().count(EOS) == 1
    assert len(pieces[0]["targets"]) == len("a<|endoftext|>b<|startoftext|>") + 1


def test_the_tokenizer_s_own_truncation_and_padding_are_left_out():
    tokenizer = train_bpe([], vocab_size=270)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=40)
    pieces = Pieces(["a" * 10], tokenizer, 64, bos_id=BOS, eos_id=EOS)
    assert len(pieces[0]["tokens"]) == 11
    assert tokenizer.truncation is not None, "the caller's tokenizer is not changed"


def test_ids_that_the_tokenizer_lacks_are_named():
    with pytest.raises(ValueError, match=r"no bos_id 270 and no eos_id -1; its ids lie in 0\.\.269"):
        Pieces(["a"], BYTES, 8, bos_id=270, eos_id=-1)


@pytest.mark.parametrize("changed", [(["ab", "d"], 4), (["abc"], 4), (["ab", "c"], 2)])
def test_digest_tells_other_text_and_other_cuts_apart(changed):
    assert make_pieces(["ab", "c"], 4).digest() == make_pieces(["ab", "c"], 4).digest()
    assert make_pieces(["ab", "c"], 4).digest() != make_pieces(*changed).digest()


def test_a_large_vocabulary_keeps_its_ids():
    tokenizer = train_bpe([], vocab_size=270)
    tokenizer.add_tokens([f"<{i}>" for i in range(70_000)])
    piece = Pieces(["a<69999>b"], tokenizer, 8, bos_id=BOS, eos_id=EOS)[0]
    assert piece["targets"].tolist()[1] == 270 + 69_999
