"""Sharing pieces out over rows: each once, none too full, little left over."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lfm_jax.data.filling import fill_rows


@given(st.integers(1, 60).flatmap(lambda T: st.tuples(st.just(T), st.lists(st.integers(1, T), max_size=60))),
       st.integers(0, 3))
def test_every_piece_is_in_one_row_and_no_row_is_too_full(case, seed):
    T, lengths = case
    rows = fill_rows(lengths, T, seed)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    totals = [sum(lengths[i] for i in row) for row in rows]
    assert all(0 < total <= T for total in totals)
    assert rows == fill_rows(lengths, T, seed)
    # No later row's piece would have fitted into what an earlier one left over.
    for i, total in enumerate(totals):
        assert all(lengths[piece] > T - total for row in rows[i + 1 :] for piece in row)


DISTRIBUTIONS = {
    "spread about 400": lambda r: np.minimum(r.lognormal(np.log(300), 0.75, 10_000), 4000) + 2,
    "from 300 to 500": lambda r: r.integers(300, 501, 10_000),
    "very short": lambda r: r.integers(2, 40, 30_000),
    "whole rows and ends of books": lambda r: np.concatenate([np.full(2800, 4096), r.integers(1, 4096, 25)]),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_rows_are_99_percent_full(name):
    lengths = DISTRIBUTIONS[name](np.random.default_rng(0)).astype(int).tolist()
    rows = fill_rows(lengths, 4096, seed=0)
    assert sum(lengths) / (len(rows) * 4096) >= 0.99


def test_seeds_put_other_pieces_together():
    lengths = np.random.default_rng(0).integers(10, 50, 500).tolist()
    a, b = (fill_rows(lengths, 256, seed) for seed in (0, 1))
    assert not {frozenset(row) for row in a} & {frozenset(row) for row in b}
