import dataclasses
import math
import random

import numpy as np
import pytest

from lfm_jax.ablate.tasks.task import open_task
from lfm_jax.ablate.tasks.text import Text
from lfm_jax.data.shards import rows_of

WORDS = ["alpha", "béta", "gamma", "dëlta", "epsilon", "zeta", "eta", "theta"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """(settings, task, directory) of forty short documents, some letters of two bytes."""
    corpus, directory = tmp_path_factory.mktemp("corpus"), tmp_path_factory.mktemp("data")
    rng = random.Random(0)
    for i in range(40):
        (corpus / f"{i}.txt").write_text(" ".join(rng.choices(WORDS, k=rng.randint(5, 60))))
    text = Text(
        sources=(str(corpus),), vocab_size=290, seq_len=32, batch_size=4, heldout_fraction=0.3, heldout_rows=1000
    )
    return text, open_task(text, directory), directory


def test_bytes_of_all_held_out_targets_are_those_of_the_text(prepared):
    _, task, _ = prepared
    score = task.score()
    targets = 0
    for batch, tag in task.heldout_batches():
        score.add(batch, tag, np.full(batch["targets"].shape, math.log(2), np.float32), batch["targets"] >= 0)
        targets += int((batch["targets"] >= 0).sum())
    found = score.result()
    manifest = task._prepared.manifest
    assert found["metrics"] == {
        "nats_per_token": pytest.approx(math.log(2)), "tokens": targets, "bytes": manifest.heldout.text_bytes
    }
    assert targets == manifest.heldout.tokens
    assert found["score"] == pytest.approx(targets / manifest.heldout.text_bytes)  # One bit a token.


def test_what_is_held_out_is_said(prepared):
    text, task, directory = prepared
    heldout = task._prepared.manifest.heldout
    assert task.about.note == (f"Measured on {heldout.rows} of {heldout.rows} rows of {heldout.documents} of 40 "
                               "documents, the others to train on")
    few = open_task(dataclasses.replace(text, heldout_fraction=0.1, heldout_rows=1), directory).about.note
    assert few.startswith("Measured on 1 of ")
    assert few.endswith("so few say little of text in general")


def test_the_loss_by_position_is_that_of_its_bin(prepared):
    _, task, _ = prepared
    score = task.score()
    for batch, tag in task.heldout_batches():
        score.add(batch, tag, batch["positions"].astype(np.float32), batch["targets"] >= 0)
    curve = dict(score.result()["curves"]["position"])
    assert curve[1] == 0  # The first token of a piece.
    assert curve[2] == 1
    assert 2 <= curve[4] <= 3
    assert 16 <= curve[32] <= 31


def test_a_share_of_the_held_out_rows_is_spread_over_all(prepared):
    text, whole, directory = prepared
    rows = rows_of(whole._prepared.manifest, "heldout")
    few = open_task(dataclasses.replace(text, heldout_rows=3), directory)
    (batch,) = [batch for batch, _ in few.heldout_batches()]
    assert np.array_equal(batch["tokens"][0], rows[0]["tokens"])
    assert np.array_equal(batch["tokens"][2], rows[len(rows) - 1]["tokens"])
    assert (batch["targets"][3] < 0).all()  # Filled up.
    assert few._prepared.manifest.directory == whole._prepared.manifest.directory  # Built once.
    assert few.digest() != whole.digest()


def test_the_order_is_the_seeds_and_resumes(prepared):
    _, task, _ = prepared
    first = task.train_batches(0)
    batches = [next(first)["tokens"] for _ in range(5)]
    state = first.get_state()
    later = [next(first)["tokens"] for _ in range(2)]
    again, other = task.train_batches(0), task.train_batches(1)
    assert all(np.array_equal(next(again)["tokens"], batch) for batch in batches)
    assert not all(np.array_equal(next(other)["tokens"], batch) for batch in batches)
    resumed = task.train_batches(0)
    resumed.set_state(state)
    assert all(np.array_equal(next(resumed)["tokens"], batch) for batch in later)


def test_nothing_held_out_says_what_to_do(prepared, tmp_path):
    text, _, _ = prepared
    with pytest.raises(ValueError, match="holds out none; raise it, or give more and shorter documents"):
        open_task(dataclasses.replace(text, heldout_fraction=1e-9), tmp_path)


@pytest.mark.parametrize(("field", "value"), [
    ("vocab_size", 100), ("seq_len", 1), ("steps", 0), ("heldout_fraction", 0),
])
def test_bad_fields_are_named(field, value):
    with pytest.raises(ValueError, match=rf"text\.{field} is {value}"):
        Text(**{field: value})
