"""What padding, packing and batching may not change, without state. Each document is compared with float64 numpy."""

import numpy as np
import pytest
from helpers import KINDS, Net, batches, documents, every_kind, net, rel_err, tokens_like
from hypothesis import given
from hypothesis import strategies as st

B, T, D = 3, 24, 32
SEEDS = st.integers(0, 2**16)


@every_kind
@given(segment_ids=batches(B, T), seed=SEEDS)
def test_every_document_is_computed_as_if_alone(kind, segment_ids, seed):
    model, tokens = net(kind), tokens_like((B, T), seed)
    hidden, state = model(tokens, segment_ids=segment_ids)
    assert state is None
    for row in range(B):
        for where in documents(segment_ids[row]):
            assert rel_err(hidden[row, where], model.reference(tokens[row, where])) < 1e-5


@every_kind
@pytest.mark.parametrize("length", [2, 17])
def test_padding_left_right_middle_or_none_is_the_same(kind, length):
    model, tokens = net(kind), tokens_like((1, length), length)
    plain, _ = model(tokens)
    assert rel_err(plain[0], model.reference(tokens[0])) < 1e-5
    middle = [i * (T - 1) // max(length - 1, 1) for i in range(length)]
    for where in (list(range(T - length, T)), list(range(length)), middle):
        rows, segment_ids = np.zeros((B, T), np.int32), np.zeros((B, T), np.int32)
        rows[1, where], segment_ids[1, where] = tokens[0], 5
        padded, _ = model(rows, segment_ids=segment_ids)
        assert rel_err(padded[1, where], plain[0]) < 1e-5


@every_kind
@given(segment_ids=batches(B, T), seed=SEEDS, data=st.data())
def test_a_changed_token_moves_only_later_tokens_of_its_document(kind, segment_ids, seed, data):
    model, tokens = net(kind), tokens_like((B, T), seed)
    row, at = data.draw(st.integers(0, B - 1)), data.draw(st.integers(0, T - 1))
    changed = tokens.copy()
    changed[row, at] = 1 + tokens[row, at] % 96
    before, _ = model(tokens, segment_ids=segment_ids)
    after, _ = model(changed, segment_ids=segment_ids)
    may_move = np.zeros((B, T), bool)
    for where in documents(segment_ids[row]):
        if at in where:
            may_move[row, [i for i in where if i >= at]] = True
    may_move |= segment_ids == 0  # Values at padding mean nothing.
    np.testing.assert_array_equal(before[~may_move], after[~may_move])
    if segment_ids[row, at]:
        assert (before[row, at] != after[row, at]).any()


@every_kind
@given(segment_ids=batches(B, T), seed=SEEDS, data=st.data())
def test_gradient_stays_inside_the_document_and_the_past(kind, segment_ids, seed, data):
    """Tokens 1..48 where the loss may look, 49..96 elsewhere: the second half of the table gets exactly nothing."""
    model = net(kind)
    row, at = data.draw(st.integers(0, B - 1)), data.draw(st.integers(0, T - 1))
    weight = np.zeros((B, T, D), np.float32)
    sees = np.zeros((B, T), bool)
    for where in documents(segment_ids[row]):
        if at in where:
            weight[row, at] = np.random.default_rng(seed).standard_normal(D)
            sees[row, [i for i in where if i <= at]] = True
    tokens = np.where(sees, tokens_like((B, T), seed, 1, 49), tokens_like((B, T), seed + 1, 49, 97))
    gradient = model.embed_grad(tokens, segment_ids, weight)
    assert not gradient[49:].any()
    assert gradient[:49].any() == sees.any()


@every_kind
@given(segment_ids=batches(B, T), seed=SEEDS)
def test_rows_do_not_know_each_other(kind, segment_ids, seed):
    model, tokens = net(kind), tokens_like((B, T), seed)
    hidden, _ = model(tokens, segment_ids=segment_ids)
    order = [2, 0, 1]
    permuted, _ = model(tokens[order], segment_ids=segment_ids[order])
    real = segment_ids != 0
    if real.any():
        assert rel_err(permuted[real[order]], hidden[order][real[order]]) < 1e-5
    others, ids = tokens_like((B, T), seed + 1), np.roll(segment_ids, 1, axis=1)
    others[1], ids[1] = tokens[1], segment_ids[1]
    among_others, _ = model(others, segment_ids=ids)
    np.testing.assert_array_equal(among_others[1], hidden[1])


@pytest.mark.parametrize("kind", ["hybrid", "seven-taps"])
@given(lengths=st.lists(st.integers(0, T), min_size=B, max_size=B), split=st.integers(1, T), seed=SEEDS)
def test_right_padding_promised_equals_right_padding_found(kind, lengths, split, seed):
    model, tokens = net(kind), tokens_like((B, T), seed)
    ids = np.where(np.arange(T) < split, 4, 9)  # Up to two documents a row.
    segment_ids = np.where(np.arange(T) < np.asarray(lengths)[:, None], ids, 0)
    found, _ = model(tokens, segment_ids=segment_ids)
    promised, _ = model(tokens, segment_ids=segment_ids, padding="right")
    if segment_ids.any():
        assert rel_err(promised[segment_ids != 0], found[segment_ids != 0]) < 1e-5


@pytest.mark.parametrize("kind", ["hybrid", "all-attention"])
@given(segment_ids=batches(B, T), seed=SEEDS)
def test_positions_count_within_documents_unless_given(kind, segment_ids, seed):
    model, tokens = net(kind), tokens_like((B, T), seed)
    rng = np.random.default_rng(seed)
    default, given_ = np.zeros((B, T), np.int32), np.zeros((B, T), np.int32)
    for row in range(B):
        for where in documents(segment_ids[row]):
            default[row, where] = np.arange(len(where))
            given_[row, where] = np.cumsum(rng.integers(1, 50, len(where)))
    counted, _ = model(tokens, segment_ids=segment_ids)
    same, _ = model(tokens, default, segment_ids)
    if segment_ids.any():
        assert rel_err(same[segment_ids != 0], counted[segment_ids != 0]) < 1e-5
    other, _ = model(tokens, given_, segment_ids)
    for row in range(B):
        for where in documents(segment_ids[row]):
            expected = model.reference(tokens[row, where], given_[row, where])
            assert rel_err(other[row, where], expected) < 1e-5


@pytest.mark.parametrize("kind", ["hybrid", "sandwich"])
@given(segment_ids=batches(B, T), seed=SEEDS)
def test_last_is_the_last_real_token_of_all(kind, segment_ids, seed):
    model, tokens = net(kind), tokens_like((B, T), seed)
    every, _ = model(tokens, segment_ids=segment_ids, logits="all")
    last, _ = model(tokens, segment_ids=segment_ids, logits="last")
    hidden, _ = model(tokens, segment_ids=segment_ids)
    assert every.shape == (B, T, 97)
    assert last.shape == (B, 1, 97)
    real = segment_ids != 0
    if real.any():
        table = model.params64["embed"]
        assert rel_err(every[real], hidden[real].astype(np.float64) @ table.T) < 1e-5
    for row in range(B):
        if real[row].any():
            assert rel_err(last[row, 0], every[row, np.flatnonzero(real[row])[-1]]) < 1e-5


def test_gradients_of_a_packed_row_are_the_sum_over_its_documents():
    model = net("hybrid")
    tokens, weight = tokens_like((1, T), 3), np.random.default_rng(3).standard_normal((1, T, D)).astype(np.float32)
    segment_ids = np.asarray([[1] * 9 + [2] * 2 + [3] * 8 + [0] * 5], np.int32)
    weight *= (segment_ids != 0)[:, :, None]
    packed = model.embed_grad(tokens, segment_ids, weight)
    alone = sum(model.embed_grad(tokens, np.where(segment_ids == i, 1, 0), weight * (segment_ids == i)[:, :, None])
                for i in (1, 2, 3))
    assert rel_err(packed, alone) < 1e-5


@pytest.mark.parametrize("remat", ["ffn", "dots", "full"])
def test_activations_made_again_change_no_gradient(remat):
    tokens, weight = tokens_like((B, T), 4), np.random.default_rng(4).standard_normal((B, T, D)).astype(np.float32)
    plain, again = (model.embed_grad(tokens, np.ones((B, T), np.int32), weight)
                    for model in (net("every-operator"), Net(**KINDS["every-operator"], remat=remat)))
    assert rel_err(again, plain) < 1e-5
