"""Batches: endless, reproducible, exactly resumable; the held-out set counted once and never trained on."""

import itertools
import json

import numpy as np
import pytest

from lfm_jax.data.batch import LOSS_IGNORE
from lfm_jax.data.config import DataConfig
from lfm_jax.data.corpora import make_tokenizer, open_corpus
from lfm_jax.data.corpora.text import heldout_documents, train_documents
from lfm_jax.data.packing import PACKING_ROWS, Pieces
from lfm_jax.text.tokenizer import train_bpe

BYTES = train_bpe([], vocab_size=270)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    random = np.random.default_rng(0)
    for i in range(30):
        text = "".join(random.choice(list("abcdef \n"), size=random.integers(1, 150)))
        (root / f"{i}.txt").write_text(f"{i}:{text}")
    (root / "rows.jsonl").write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(20)))
    return root


def config(corpus, **changes):
    fields = dict(sources=(str(corpus),), seq_len=32, batch_size=4, heldout_fraction=0.2)
    return DataConfig(**(fields | changes))


def opened(conf):
    return open_corpus(conf, BYTES)


def take(iterator, n):
    return list(itertools.islice(iterator, n))


def assert_same(batches, others):
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys() == {"tokens", "targets", "segment_ids", "positions"}
        for key in batch:
            np.testing.assert_array_equal(batch[key], other[key])


def test_batches_have_one_shape_and_repeat_with_the_seed(corpus):
    batches = take(opened(config(corpus)).train_batches(), 60)
    assert all(x.shape == (4, 32) and x.dtype == np.int32 for batch in batches for x in batch.values())
    assert_same(batches, take(opened(config(corpus)).train_batches(), 60))
    other = take(opened(config(corpus, seed=1)).train_batches(), 60)
    assert not all(np.array_equal(a["tokens"], b["tokens"]) for a, b in zip(batches, other, strict=True))


@pytest.mark.parametrize("consumed", [0, 1, 5, 31, 32, 33, 90])
def test_resuming_gives_exactly_the_batches_that_were_to_come(corpus, consumed):
    # 128 rows are packed at a time, 32 batches: the numbers lie before, on and after such borders, and epochs.
    iterator = opened(config(corpus)).train_batches()
    take(iterator, consumed)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = take(iterator, 25)

    fresh = opened(config(corpus)).train_batches()
    fresh.set_state(state)
    assert fresh.get_state() == state
    assert_same(take(fresh, 25), expected)

    iterator.set_state(state)
    assert_same(take(iterator, 25), expected)


def test_state_of_other_data_is_refused(corpus, tmp_path):
    (tmp_path / "other.txt").write_text("something else")
    state = opened(config(corpus)).train_batches().get_state()
    for changes in (dict(seed=1), dict(batch_size=2), dict(seq_len=16), dict(exclude=("0.txt",)),
                    dict(sources=(str(corpus), str(tmp_path)))):
        with pytest.raises(ValueError, match="belongs to other data"):
            opened(config(corpus, **changes)).train_batches().set_state(state)
    with pytest.raises(ValueError, match="belongs to other data"):
        open_corpus(config(corpus), train_bpe(["aaaa bbbb" * 9], vocab_size=272)).train_batches().set_state(state)


@pytest.fixture(scope="module")
def half_epochs(tmp_path_factory):
    """For seeds 0 and 1 the rows of each half of three epochs, sorted, so that only what is in a half counts."""
    root = tmp_path_factory.mktemp("short")
    for i in range(2 * PACKING_ROWS):  # Each fills a row of 4, and PACKING_ROWS are packed at a time.
        (root / f"{i}.txt").write_text(f"{i:03}")
    return [
        [sorted(batch["tokens"].tolist()) for batch in take(opened(
            config(root, seq_len=4, batch_size=PACKING_ROWS, heldout_fraction=0.0, seed=seed)).train_batches(), 6)]
        for seed in (0, 1)
    ]


def test_each_epoch_has_every_piece_once_in_a_new_order(half_epochs):
    halves, _ = half_epochs
    epochs = [sorted(halves[i] + halves[i + 1]) for i in (0, 2, 4)]
    assert len({tuple(row) for row in epochs[0]}) == 2 * PACKING_ROWS
    assert epochs[0] == epochs[1] == epochs[2]
    assert all(a != b for a, b in itertools.combinations(halves, 2))


def test_neighbouring_seeds_do_not_share_the_order_of_their_epochs(half_epochs):
    assert all(a != b for a, b in itertools.product(*half_epochs))


def test_a_corpus_smaller_than_a_batch_still_fills_batches(tmp_path):
    (tmp_path / "only.txt").write_text("abc")
    iterator = opened(config(tmp_path, heldout_fraction=0.0)).train_batches()
    assert all((batch["segment_ids"].max(axis=1) > 0).all() for batch in take(iterator, 3))


def test_documents_begin_with_bos_and_end_with_eos(corpus):
    batches = take(open_corpus(config(corpus), BYTES, bos_id=5, eos_id=6).train_batches(), 40)
    tokens, targets = (np.stack([batch[key] for batch in batches]) for key in ("tokens", "targets"))
    assert 5 in tokens
    assert 6 in targets
    assert 6 not in tokens
    assert 5 not in targets


@pytest.mark.parametrize("batch_size", [1, 4, 7])
def test_heldout_pass_counts_every_token_once_in_batches_of_one_shape(corpus, batch_size):
    conf = config(corpus, batch_size=batch_size)
    batches = list(opened(conf).heldout_batches())
    assert all(x.shape == (batch_size, 32) and x.dtype == np.int32 for batch in batches for x in batch.values())
    documents = list(heldout_documents(conf))
    # One token a byte, and one eos a document.
    counted = sum((batch["targets"] != LOSS_IGNORE).sum() for batch in batches)
    assert counted == opened(conf).heldout_bytes + len(documents)
    assert opened(conf).heldout_bytes == sum(len(text.encode()) for text in documents)
    for batch in batches:
        np.testing.assert_array_equal(batch["targets"] == LOSS_IGNORE, batch["segment_ids"] == 0)
    assert_same(batches, opened(config(corpus, batch_size=batch_size, seed=9)).heldout_batches())


def test_held_out_rows_are_packed_as_they_are_asked_for(tmp_path, monkeypatch):
    (tmp_path / "train.txt").write_text("abc")
    (tmp_path / "held.txt").write_text("x" * 32 * 10 * PACKING_ROWS)
    packed, real = [], Pieces.__getitem__
    monkeypatch.setattr(Pieces, "__getitem__", lambda self, index: packed.append(index) or real(self, index))
    next(opened(config(tmp_path, heldout=(str(tmp_path / "held.txt"),))).heldout_batches())
    assert len(packed) < 3 * PACKING_ROWS


def test_heldout_documents_are_not_trained_on(corpus):
    train, heldout = set(train_documents(config(corpus))), set(heldout_documents(config(corpus)))
    everything = set(train_documents(config(corpus, heldout_fraction=0.0)))
    assert train
    assert heldout
    assert not train & heldout
    assert train | heldout == everything


def test_heldout_files_can_be_named(corpus):
    conf = config(corpus, heldout=(f"{corpus}/1*.txt",), exclude=("12.txt",))
    assert len(heldout_documents(conf)) == 10
    assert all(text[:2].rstrip(":") in {"1", *map(str, range(10, 20))} for text in heldout_documents(conf))
    assert not set(heldout_documents(conf)) & set(train_documents(conf))
    assert not any(text.startswith("12:") for text in train_documents(conf))
    with pytest.raises(ValueError, match="takes every file of sources"):
        train_documents(config(corpus, heldout=(str(corpus),)))


def test_nothing_held_out_gives_no_batches(corpus):
    conf = config(corpus, heldout_fraction=0.0)
    assert opened(conf).heldout_bytes == 0
    assert list(opened(conf).heldout_batches()) == []


def test_a_corpus_without_text_is_refused(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match="every training document is empty"):
        opened(config(tmp_path, heldout_fraction=0.0)).train_batches()
    with pytest.raises(ValueError, match="every held-out document is empty"):
        heldout_documents(config(tmp_path, heldout=(str(tmp_path / "a.txt"),)))


def test_the_tokenizer_is_the_named_one_or_trained_on_the_training_files(corpus, tmp_path):
    assert make_tokenizer(config(corpus), vocab_size=300).get_vocab_size() == 300
    BYTES.save(str(tmp_path / "mine.json"))
    given = make_tokenizer(config(corpus, tokenizer=str(tmp_path / "mine.json")), vocab_size=300)
    assert given.to_str() == BYTES.to_str()


def test_config_lists_every_bad_field():
    with pytest.raises(ValueError, match="DataConfig is not valid") as error:
        DataConfig(sources=(), heldout="books", exclude=("",), seq_len=0, batch_size=True, seed=-1,
                   heldout_fraction=1.0, text_field="", tokenizer="")
    message = str(error.value)
    fields = ("sources", "heldout", "exclude", "seq_len", "batch_size", "seed", "heldout_fraction", "text_field",
              "tokenizer")
    assert len(message.splitlines()) == 1 + len(fields)
    for field in fields:
        assert f"  - {field} is " in message
