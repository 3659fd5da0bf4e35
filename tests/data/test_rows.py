"""Records: a decoded row is what the on-the-fly pipeline makes of the same pieces."""

import grain
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lfm_jax.data.encoding import DocumentEncoder, cuts
from lfm_jax.data.packing import Pieces, pack
from lfm_jax.data.rows import encode_row
from lfm_jax.data.shards import decode_row
from lfm_jax.text.tokenizer import train_bpe

BYTES = train_bpe([], vocab_size=270)
MANY = train_bpe([], vocab_size=270)
MANY.add_tokens([f"<{i}>" for i in range(66_000)])


@given(st.lists(st.text("ab\né", max_size=30), min_size=1, max_size=8), st.integers(1, 40))
def test_a_record_decodes_to_the_row_of_the_pipeline(texts, T):
    check(texts, T, BYTES, np.uint16)


def test_a_record_of_a_large_vocabulary_decodes_likewise():
    check(["a<65999>b", "<0><65998>" * 9], 8, MANY, np.uint32)


def check(texts, T, tokenizer, dtype):
    encode = DocumentEncoder(tokenizer, bos_id=1, eos_id=7)
    assert encode.dtype == dtype
    pieces = [ids[a : b + 1] for ids in encode(texts) for a, b in zip(*cuts(len(ids), T), strict=True)]
    source = grain.MapDataset.source(Pieces(texts, tokenizer, T, bos_id=1, eos_id=7))
    for first in range(len(pieces)):
        fit = np.cumsum([len(piece) - 1 for piece in pieces[first:]]) <= T
        row = decode_row(encode_row(pieces[first : first + fit.sum()]), encode.dtype, T)
        # The packer puts what fits together into the one row that is open.
        (expected,) = pack(source[first : first + int(fit.sum())], T, shuffle_seed=None)
        assert row.keys() == expected.keys()
        for key in row:
            assert row[key].dtype == np.int32
            np.testing.assert_array_equal(row[key], expected[key], err_msg=key)


@pytest.mark.parametrize("damage", [lambda r: b"", lambda r: r[:6], lambda r: r[:-2], lambda r: r + b"\0",
                                    lambda r: b"\0" * len(r), lambda r: b"\xff" * len(r)])
def test_bytes_that_are_no_record_are_refused(damage):
    record = encode_row([np.arange(5, dtype=np.uint16), np.arange(3, dtype=np.uint16)])
    decode_row(record, np.dtype("<u2"), 8)
    with pytest.raises(ValueError, match="bytes"):
        decode_row(damage(record), np.dtype("<u2"), 8)
    with pytest.raises(ValueError, match="longer than seq_len 5"):
        decode_row(record, np.dtype("<u2"), 5)
