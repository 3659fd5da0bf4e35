"""Records: both formats by hand, back and forth; a decoded row is what the on-the-fly pipeline makes of its pieces."""

import itertools
import struct

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm_jax.data.batch import LOSS_IGNORE
from lfm_jax.data.encoding import DocumentEncoder, Tokens
from lfm_jax.data.packing import Pieces, pack
from lfm_jax.data.records import SPANS_FORMAT, TEXT_FORMAT, RowCodec
from lfm_jax.text.tokenizer import train_bpe

BYTES = train_bpe([], vocab_size=270)
MANY = train_bpe([], vocab_size=270)
MANY.add_tokens([f"<{i}>" for i in range(66_000)])
TYPES = {np.dtype("<u2"): "H", np.dtype("<u4"): "I"}


@given(st.lists(st.text("ab\né", max_size=30), min_size=1, max_size=8), st.integers(1, 40))
def test_a_record_decodes_to_the_row_of_the_pipeline(texts, T):
    check(texts, T, BYTES, np.uint16)


def test_a_record_of_a_large_vocabulary_decodes_likewise():
    check(["a<65999>b", "<0><65998>" * 9], 8, MANY, np.uint32)


def check(texts, T, tokenizer, dtype):
    encode = DocumentEncoder(tokenizer, bos_id=1, eos_id=7)
    assert encode.dtype == dtype
    codec = RowCodec(TEXT_FORMAT, encode.dtype)
    pieces = [piece for ids in encode(texts) for piece in Tokens(ids).pieces(T)]
    source = grain.MapDataset.source(Pieces(texts, tokenizer, T, bos_id=1, eos_id=7))
    for first in range(len(pieces)):
        fit = np.cumsum([len(piece.ids) - 1 for piece in pieces[first:]]) <= T
        row = codec.decode(codec.encode(pieces[first : first + fit.sum()]), T)
        # The packer puts what fits together into the one row that is open.
        (expected,) = pack(source[first : first + int(fit.sum())], T, shuffle_seed=None)
        assert row.keys() == expected.keys()
        for key in row:
            assert row[key].dtype == np.int32
            np.testing.assert_array_equal(row[key], expected[key], err_msg=key)


@st.composite
def documents(draw, dtype, min_size=2):
    ids = draw(st.lists(st.integers(0, min(np.iinfo(dtype).max, 2**31 - 1)), min_size=min_size, max_size=12))
    borders = draw(st.none() | st.lists(st.integers(0, len(ids)), max_size=6, unique=True))
    spans = None if borders is None else np.array(sorted(borders)[: len(borders) // 2 * 2], np.int64).reshape(-1, 2)
    return Tokens(np.array(ids, dtype), spans)


@st.composite
def rows(draw):
    dtype = draw(st.sampled_from(sorted(TYPES, key=str)))
    return dtype, draw(st.lists(documents(dtype), min_size=1, max_size=4))


def by_hand(pieces, T):
    """A row of a batch, and the borders of its spans, one token at a time."""
    row, borders, place = {key: [] for key in ("tokens", "targets", "segment_ids", "positions")}, [], 0
    for number, (ids, spans) in enumerate(pieces):
        for i in range(1, len(ids)):
            learnt = spans is None or any(start <= i < stop for start, stop in spans.tolist())
            row["tokens"].append(int(ids[i - 1]))
            row["targets"].append(int(ids[i]) if learnt else LOSS_IGNORE)
            row["segment_ids"].append(number + 1)
            row["positions"].append(i - 1)
            if learnt != len(borders) % 2:
                borders.append(place)
            place += 1
    borders += [place] * (len(borders) % 2)
    fill = {"targets": LOSS_IGNORE}
    return {key: [*values, *[fill.get(key, 0)] * (T - place)] for key, values in row.items()}, borders


@settings(max_examples=100)
@given(rows(), st.integers(0, 3))
def test_spans_decode_to_targets_and_the_bytes_are_those_of_the_format(row, padding):
    dtype, pieces = row
    lengths = [len(ids) - 1 for ids, _ in pieces]
    T = sum(lengths) + padding
    expected, borders = by_hand(pieces, T)
    codec = RowCodec(SPANS_FORMAT, dtype)
    record = codec.encode(pieces)
    assert record == struct.pack(
        f"<II{len(pieces) + len(borders)}I{sum(lengths) + len(pieces)}{TYPES[dtype]}",
        len(pieces), len(borders), *lengths, *borders, *np.concatenate([ids for ids, _ in pieces]).tolist())
    found = codec.decode(record, T)
    assert {key: values.tolist() for key, values in found.items()} == expected
    assert all(values.dtype == np.int32 for values in found.values())


@settings(max_examples=100)
@given(rows())
def test_text_keeps_the_bytes_of_format_1(row):
    dtype, pieces = row
    pieces = [Tokens(ids) for ids, _ in pieces]
    lengths = [len(ids) - 1 for ids, _ in pieces]
    codec = RowCodec(TEXT_FORMAT, dtype)
    record = codec.encode(pieces)
    assert record == struct.pack(f"<I{len(pieces)}I{sum(lengths) + len(pieces)}{TYPES[dtype]}", len(pieces), *lengths,
                                 *np.concatenate([ids for ids, _ in pieces]).tolist())
    expected, _ = by_hand(pieces, sum(lengths))
    assert {key: values.tolist() for key, values in codec.decode(record, sum(lengths)).items()} == expected


def test_spans_do_not_go_into_format_1():
    piece = Tokens(np.arange(3, dtype="<u2"), np.zeros((0, 2), int))
    with pytest.raises(ValueError, match="records of format 1 hold no spans; write format 2"):
        RowCodec(TEXT_FORMAT, np.dtype("<u2")).encode([piece])
    row = RowCodec(SPANS_FORMAT, np.dtype("<u2")).decode(RowCodec(SPANS_FORMAT, np.dtype("<u2")).encode([piece]), 4)
    assert (row["targets"] == LOSS_IGNORE).all(), "no span at all: nothing is learnt"
    assert row["segment_ids"].tolist() == [1, 1, 0, 0]


@settings(max_examples=100)
@given(documents(np.dtype("<u2")), st.integers(1, 14))
def test_a_document_cut_to_pieces_has_each_target_once_and_learns_the_same(document, T):
    pieces = document.pieces(T)
    assert all(2 <= len(piece.ids) <= T + 1 for piece in pieces)
    assert np.concatenate([piece.ids[1:] for piece in pieces]).tolist() == document.ids[1:].tolist()
    assert all(a.ids[-1] == b.ids[0] for a, b in itertools.pairwise(pieces))
    learnt = np.concatenate([piece.learnt()[1:] for piece in pieces])
    assert learnt.tolist() == document.learnt()[1:].tolist()


@pytest.mark.parametrize("spans", [None, np.array([[0, 2], [4, 5]])])
@pytest.mark.parametrize("damage", [lambda r: b"", lambda r: r[:6], lambda r: r[:-2], lambda r: r + b"\0",
                                    lambda r: b"\0" * len(r), lambda r: b"\xff" * len(r)])
def test_bytes_that_are_no_record_are_refused(spans, damage):
    codec = RowCodec(TEXT_FORMAT if spans is None else SPANS_FORMAT, np.dtype("<u2"))
    record = codec.encode([Tokens(np.arange(5, dtype=np.uint16), spans), Tokens(np.arange(3, dtype=np.uint16))])
    codec.decode(record, 8)
    with pytest.raises(ValueError, match="bytes"):
        codec.decode(damage(record), 8)
    with pytest.raises(ValueError, match="longer than seq_len 5"):
        codec.decode(record, 5)


@pytest.mark.parametrize("borders", [[1], [1, 1], [2, 1], [0, 5], [0, 1, 1, 2], [2**32 - 1, 2**32 - 1]])
def test_borders_that_do_not_fit_the_row_are_refused(borders):
    record = struct.pack(f"<III{len(borders)}I5H", 1, len(borders), 4, *borders, 1, 2, 3, 4, 5)
    with pytest.raises(ValueError, match="of what is learnt do not fit a row of 4 tokens"):
        RowCodec(SPANS_FORMAT, np.dtype("<u2")).split(record)
