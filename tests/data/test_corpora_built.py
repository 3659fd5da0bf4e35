"""Built datasets as training data: one global order for any processes, mixtures, limits, refusals."""

import dataclasses
import itertools
import json
import shutil

import numpy as np
import pytest
from limits import LIMITS, limited

from lfm_jax import recipe
from lfm_jax.data.batch import LOSS_IGNORE
from lfm_jax.data.build import BuildConfig, build
from lfm_jax.data.config import DataConfig, MixturePart
from lfm_jax.data.corpora import make_tokenizer, open_corpus
from lfm_jax.data.corpora.corpus import check_lasts
from lfm_jax.data.encoding import tokenizer_digest
from lfm_jax.data.manifest import load_manifest
from lfm_jax.pretrain.config import TrainConfig
from lfm_jax.text.tokenizer import inference_tokenizer, load_tokenizer, train_bpe

BYTES = train_bpe([], vocab_size=270)
T, B = 32, 8


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Datasets `a` (its texts begin with an A) and `b`, of other sizes, and `long` of other rows from a's text."""
    root = tmp_path_factory.mktemp("sets")
    BYTES.save(str(root / "bytes.json"))
    draw = np.random.default_rng(0)
    for name, count in (("a", 400), ("b", 150)):
        with open(root / f"{name}.jsonl", "w") as file:
            for i in range(count):
                text = f"{name.upper()}{i}:" + "".join(draw.choice(list("xyz "), size=draw.integers(1, 50)))
                file.write(json.dumps({"text": text}) + "\n")
        make(root, name)
    make(root, "long", source="a", seq_len=256)
    return root


def make(root, name, source=None, **changes):
    fields = dict(sources=(str(root / f"{source or name}.jsonl"),), out=str(root / name), seq_len=T, block_bytes=5000,
                  tokenizer=str(root / "bytes.json"), heldout_fraction=0.1, workers=1)
    return build(BuildConfig(**(fields | changes)), show_progress=False)


def config(root, *parts, **changes):
    parts = parts or (MixturePart(path="a", weight=0.7), MixturePart(path="b", weight=0.3))
    mixture = tuple(dataclasses.replace(part, path=str(root / part.path)) for part in parts)
    return DataConfig(**(dict(mixture=mixture, seq_len=T, batch_size=B) | changes))


def opened(conf):
    return open_corpus(conf, BYTES)


def iterator(conf, rows=None):
    return opened(conf).train_batches(rows)


def take(it, n):
    return list(itertools.islice(it, n))


def tokens(batches):
    return np.concatenate([batch["tokens"] for batch in batches])


def assert_same(batches, others):
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys() == {"tokens", "targets", "segment_ids", "positions"}
        for key in batch:
            assert batch[key].dtype == other[key].dtype == np.int32
            np.testing.assert_array_equal(batch[key], other[key])


LAYOUTS = {
    "1 process": [range(8)],
    "2 processes": [range(4), range(4, 8)],
    "4 processes": [range(2 * i, 2 * i + 2) for i in range(4)],
    "8 processes": [[i] for i in range(8)],
    "scattered rows": [[0, 3, 5, 6], [1, 2, 4, 7]],
    "copies": [range(4), range(4), range(4, 8), range(4, 8)],
}


def gathered(its, layout, n):
    """n whole batches, put together from what each process reads."""
    batches = [take(it, n) for it in its]
    whole = []
    for step in range(n):
        batch = {}
        for rows, mine in zip(layout, batches, strict=True):
            for key, x in mine[step].items():
                assert x.shape == (len(rows), T)
                batch.setdefault(key, np.full((B, T), -9, np.int32))[np.array(rows)] = x
        whole.append(batch)
    return whole


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_order_is_the_same_for_any_number_of_processes(root, name):
    layout = [np.array(rows) for rows in LAYOUTS[name]]
    its = [iterator(config(root), rows) for rows in layout]
    assert_same(gathered(its, layout, 25), take(iterator(config(root)), 25))
    states = [json.loads(json.dumps(it.get_state())) for it in its]
    assert all(state == states[0] for state in states)

    # Another number of processes goes on from any one of them.
    for other in LAYOUTS.values():
        others = [iterator(config(root), np.array(rows)) for rows in other]
        for it in others:
            it.set_state(states[-1])
            assert it.get_state() == states[0]
        assert_same(gathered(others, other, 3), take(iterator(config(root)), 28)[25:])


@pytest.mark.parametrize("prefetch", [0, 1, 5])
def test_reading_ahead_changes_nothing(root, prefetch):
    it = iterator(config(root, prefetch=prefetch))
    expected = take(iterator(config(root)), 40)
    assert_same(take(it, 10), expected[:10])
    state = it.get_state()
    assert_same(take(it, 10), expected[10:20])
    it.set_state(state)
    assert_same(take(it, 10), expected[10:20])
    again = iterator(config(root, prefetch=prefetch))
    again.set_state(state)
    assert_same(take(again, 30), expected[10:])


def test_a_run_goes_on_with_batches_of_another_size(root):
    it = iterator(config(root))
    take(it, 6)
    small = iterator(config(root, batch_size=B // 2))
    small.set_state(it.get_state())
    np.testing.assert_array_equal(tokens(take(small, 8)), tokens(take(it, 4)))


@pytest.mark.parametrize("rows", [[0, 1, 2], [], [1, 0], [0, 0], [0, 8], [-1, 0]])
def test_rows_that_do_not_fit_a_batch_are_refused(root, rows):
    with pytest.raises(ValueError, match=r"does not divide batch_size 8|must be sorted, distinct places"):
        iterator(config(root), np.array(rows, int))


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.0, 1.0), (9.0, 1.0)])
def test_weights_are_shares_of_rows_from_the_start_on(root, weights):
    mixed = iterator(config(root, *(MixturePart(path=p, weight=w) for p, w in zip("ab", weights, strict=True))))
    only = {p: {row.tobytes() for row in tokens(take(iterator(config(root, MixturePart(path=p))), 100))} for p in "ab"}
    assert not only["a"] & only["b"]
    want = weights[0] / sum(weights)
    for batches in (take(mixed, 10), take(mixed, 100)):
        rows = [row.tobytes() for row in tokens(batches)]
        assert all((row in only["a"]) != (row in only["b"]) for row in rows)
        assert abs(np.mean([row in only["a"] for row in rows]) - want) < 0.02


def test_each_epoch_has_every_row_once_in_a_new_order(root):
    count = load_manifest(root / "a").train.rows
    it = iterator(config(root, MixturePart(path="a"), batch_size=1))
    rows = [row.tobytes() for row in tokens(take(it, 3 * count))]
    epochs = [rows[i * count : (i + 1) * count] for i in range(3)]
    assert len(set(epochs[0])) == count
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2]
    other = iterator(config(root, MixturePart(path="a"), batch_size=1, seed=1))
    assert [row.tobytes() for row in tokens(take(other, count))] not in epochs


def test_epoch_limits_are_known_before_and_kept(root):
    a, b = (load_manifest(root / name).train.rows for name in "ab")
    assert opened(config(root)).rows_available is None
    assert opened(config(root, MixturePart(path="a", epochs=3))).rows_available == 3 * a
    one = config(root, MixturePart(path="a", weight=1), MixturePart(path="b", weight=1, epochs=2))
    assert opened(one).rows_available == 4 * b
    check_lasts(opened(one), steps=4 * b // B)
    with pytest.raises(ValueError, match=f"allow {4 * b} rows, which is {4 * b // B} steps of batch_size 8"):
        check_lasts(opened(one), steps=4 * b // B + 1)
    check_lasts(opened(config(root)), steps=10**9)
    it = iterator(one)
    rows = [row.tobytes() for row in tokens(take(it, 4 * b // B))]
    only_b = {row.tobytes() for row in tokens(take(iterator(config(root, MixturePart(path="b"))), b // B + 1))}
    counts = [rows.count(row) for row in only_b]
    assert max(counts) == 2
    assert sum(counts) in range(2 * b - B, 2 * b + 1)
    with pytest.raises(ValueError, match=r"epoch limits of data\.mixture are met"):
        next(it)
    assert opened(DataConfig(sources=(str(root),), seq_len=T, batch_size=B)).rows_available is None


def test_a_limit_may_be_raised_on_the_way(root):
    short, longer = (config(root, MixturePart(path="b", epochs=n)) for n in (1, 2))
    it = iterator(short)
    rows = opened(short).rows_available // B
    expected = take(iterator(longer), rows + 3)
    assert_same(take(it, rows), expected[:rows])
    more = iterator(longer)
    more.set_state(it.get_state())
    assert_same(take(more, 3), expected[rows:])


def test_state_of_other_data_is_refused(root):
    state = iterator(config(root)).get_state()
    moved = root / "moved"
    if not moved.exists():
        shutil.copytree(root / "a", moved)
    iterator(config(root, MixturePart(path="moved", weight=7), MixturePart(path="b", weight=3))).set_state(state)
    for other in (config(root, seed=1), config(root, MixturePart(path="a")),
                  config(root, MixturePart(path="a", weight=0.6), MixturePart(path="b", weight=0.4)),
                  config(root, MixturePart(path="b", weight=0.7), MixturePart(path="a", weight=0.3))):
        with pytest.raises(ValueError, match="belongs to other data"):
            iterator(other).set_state(state)


@pytest.mark.parametrize("batch_size", [3, 8])
def test_heldout_rows_are_counted_once_and_never_trained_on(root, batch_size):
    corpus = opened(config(root, batch_size=batch_size))
    batches = list(corpus.heldout_batches())
    assert all(x.shape == (batch_size, T) and x.dtype == np.int32 for batch in batches for x in batch.values())
    held = [load_manifest(root / name).heldout for name in "ab"]
    counted = sum((batch["targets"] != LOSS_IGNORE).sum() for batch in batches)
    assert counted == sum(counts.tokens for counts in held)
    assert corpus.heldout_bytes == sum(counts.text_bytes for counts in held)
    assert counted == corpus.heldout_bytes + sum(counts.documents for counts in held)  # One token a byte, and eos.
    for batch in batches:
        np.testing.assert_array_equal(batch["targets"] == LOSS_IGNORE, batch["segment_ids"] == 0)
    trained = {row.tobytes() for row in tokens(take(corpus.train_batches(), 100))}
    assert not trained & {row.tobytes() for row in tokens(batches) if row.any()}


def test_a_long_context_stage_is_the_same_text_in_longer_rows(root):
    batch = next(iterator(config(root, MixturePart(path="long"), seq_len=256)))
    assert batch["tokens"].shape == (B, 256)
    a, long = load_manifest(root / "a"), load_manifest(root / "long")
    assert (a.train.documents, a.train.tokens, a.heldout.text_bytes) == (
        long.train.documents, long.train.tokens, long.heldout.text_bytes)
    assert a.fingerprint() != long.fingerprint()


def test_datasets_that_do_not_belong_to_the_run_are_named_together(root, tmp_path):
    other = train_bpe(["aaa bbb " * 20], vocab_size=272)
    other.save(str(tmp_path / "other.json"))
    make(root, "other_tokenizer", source="b", tokenizer=str(tmp_path / "other.json"), out=str(tmp_path / "other"))
    conf = config(root, *(MixturePart(path=p) for p in ("a", "long", str(tmp_path / "other"), "nowhere")))
    with pytest.raises(ValueError, match="mixture cannot be used") as error:
        iterator(conf)
    message = str(error.value)
    assert f"{root / 'long'} was built with seq_len 256, and seq_len is {T}" in message
    assert f"{tmp_path / 'other'} was built with another tokenizer than {root / 'a'}" in message
    assert f"{root / 'nowhere'} is not a built dataset: it has no manifest.json" in message
    assert len(message.splitlines()) == 4
    with pytest.raises(ValueError, match="another tokenizer than that of the run"):
        open_corpus(config(root), other)
    with pytest.raises(ValueError, match="another tokenizer than that of the run"):
        make_tokenizer(config(root, tokenizer=str(tmp_path / "other.json")), vocab_size=270)
    with pytest.raises(ValueError, match="built with bos_id 1 and eos_id 7, but the model has bos_id 1 and eos_id 2"):
        open_corpus(config(root), BYTES, eos_id=2)
    assert make_tokenizer(config(root), vocab_size=999).to_str() == BYTES.to_str()


@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_what_a_tokenizer_is_set_to_cut_and_pad_does_not_make_it_another(root, tmp_path, limits):
    """Datasets hold whole documents; the digest of the file is in their manifest, as it always was."""
    file = limited(BYTES, **limits)
    file.save(str(tmp_path / "limited.json"))
    manifest = make(root, "a", tokenizer=str(tmp_path / "limited.json"), out=str(tmp_path / "a"))
    assert manifest.tokenizer == tokenizer_digest(file) != tokenizer_digest(BYTES)
    assert make(root, "a", tokenizer=str(tmp_path / "limited.json"), out=str(tmp_path / "a")) == manifest
    conf = config(root, MixturePart(path=str(tmp_path / "a")))
    plain = take(iterator(config(root, MixturePart(path="a"))), 2)
    for tokenizer in (file, BYTES, load_tokenizer(tmp_path / "a"), inference_tokenizer(tmp_path / "a")):
        batches = take(open_corpus(conf, tokenizer).train_batches(), 2)
        assert all(np.array_equal(one[key], two[key]) for one, two in zip(batches, plain, strict=True) for key in two)
    assert make_tokenizer(conf, vocab_size=999).to_str() == file.to_str()
    with pytest.raises(ValueError, match="another tokenizer than that of the run"):
        open_corpus(conf, train_bpe(["aaa bbb " * 20], vocab_size=272))


def damaged(root, tmp_path, how):
    copy = tmp_path / "copy"
    shutil.copytree(root / "b", copy)
    shard = copy / load_manifest(copy).of("train")[1].name
    how(shard)
    return copy, shard


def truncate(shard):
    shard.write_bytes(shard.read_bytes()[:-100])


@pytest.mark.parametrize(("how", "says"), [(truncate, "bytes, expected"), (lambda shard: shard.unlink(), "is missing")])
def test_a_missing_or_truncated_shard_is_named(root, tmp_path, how, says):
    copy, shard = damaged(root, tmp_path, how)
    with pytest.raises(ValueError, match=says) as error:
        iterator(config(root, MixturePart(path=str(copy))))
    assert str(shard) in str(error.value)


def test_changed_bytes_are_found_on_reading_and_by_verifying(root, tmp_path):
    def scramble(shard):
        data = bytearray(shard.read_bytes())
        data[len(data) // 4 : 3 * len(data) // 4] = b"\x55" * (len(data) // 2)
        shard.write_bytes(data)

    copy, shard = damaged(root, tmp_path, scramble)
    manifest = load_manifest(copy)
    manifest.check_files()
    with pytest.raises(ValueError, match=r"has other content than was built \(checksum\)") as error:
        manifest.check_files(content=True)
    assert str(shard) in str(error.value)
    with pytest.raises(ValueError, match="cannot be read") as error:
        take(iterator(config(root, MixturePart(path=str(copy)))), 40)
    assert str(shard) in str(error.value)


@pytest.mark.parametrize(("text", "says"), [
    ("{", "manifest.json cannot be read"),
    ('{"format": 99}', "it has format 99, and this version reads formats 1 and 2"),
    ('{"format": 1}', "cannot be read"),
])
def test_a_manifest_that_cannot_be_read_is_named(root, tmp_path, text, says):
    shutil.copytree(root / "b", tmp_path / "copy")
    (tmp_path / "copy" / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=says):
        load_manifest(tmp_path / "copy")


def test_a_mixture_is_written_in_a_recipe_and_as_flags(tmp_path):
    (tmp_path / "recipe.yaml").write_text("""
run_dir: runs/x
steps: 200
data:
  mixture:
    - {path: "data/a, b: {c}", weight: 0.7, epochs: 4}
    - {path: data/books}
  seq_len: 32
  batch_size: 8
""")
    parts = (MixturePart(path="data/a, b: {c}", weight=0.7, epochs=4), MixturePart(path="data/books"))
    loaded = recipe.load_recipe(TrainConfig, tmp_path / "recipe.yaml")
    assert loaded.data.mixture == parts
    (tmp_path / "again.yaml").write_text(recipe.dump_recipe(loaded))
    assert recipe.load_recipe(TrainConfig, tmp_path / "again.yaml") == loaded
    flags = ["--data.mixture", "data/x", "{path: data/y, weight: 2}"]
    assert recipe.load_recipe(TrainConfig, tmp_path / "recipe.yaml", flags).data.mixture == (
        MixturePart(path="data/x"), MixturePart(path="data/y", weight=2))


@pytest.mark.parametrize("bad", ["{weight: 1}", "{path: a, wieght: 1}", "[a, b]", "{path: a"])
def test_a_part_that_cannot_be_read_is_refused(tmp_path, capsys, bad):
    with pytest.raises(SystemExit):
        recipe.load_recipe(DataConfig, None, ["--mixture", bad, "--seq-len", "8", "--batch-size", "8"])
    assert "mixture" in capsys.readouterr().err


def test_config_lists_every_bad_field_of_a_mixture():
    with pytest.raises(ValueError, match="DataConfig is not valid") as error:
        DataConfig(sources=("text",), mixture=(MixturePart(path="a", weight=0.0), MixturePart(path="", epochs=0),
                                               MixturePart(path="a")), seq_len=8, batch_size=8, prefetch=-1)
    message = str(error.value)
    for line in ("mixture gives a the weight 0.0", "mixture names the path ''", "mixture gives  0 epochs",
                 "mixture names a path twice", "sources belong to text, not to built datasets", "prefetch is -1"):
        assert f"  - {line}" in message
    assert len(message.splitlines()) == 7
    with pytest.raises(ValueError, match="sources is empty; name at least one file, directory or glob, or built"):
        DataConfig(seq_len=8, batch_size=8)


def test_text_gives_each_process_its_rows_too(root):
    conf = DataConfig(sources=(str(root / "*.jsonl"),), heldout_fraction=0.0, seq_len=T, batch_size=B)
    whole = iterator(conf)
    expected = take(whole, 20)
    for layout in (LAYOUTS["2 processes"], LAYOUTS["scattered rows"]):
        its = [iterator(conf, np.array(rows)) for rows in layout]
        assert_same(gathered(its, layout, 20), expected)
        assert all(it.get_state() == whole.get_state() for it in its)
