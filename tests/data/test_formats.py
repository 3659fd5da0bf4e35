"""Datasets of both formats, written by hand: read as they always were, mixed, resumed, shown."""

import hashlib
import itertools
import json
import struct

import numpy as np
import pytest
from array_record.python import array_record_module
from rich.console import Console

from lfm_jax.data.batch import LOSS_IGNORE
from lfm_jax.data.config import DataConfig, MixturePart
from lfm_jax.data.corpora import open_corpus
from lfm_jax.data.encoding import Tokens
from lfm_jax.data.manifest import load_manifest
from lfm_jax.data.records import SPANS_FORMAT, RowCodec
from lfm_jax.data.show import sample
from lfm_jax.testing import tiny_config
from lfm_jax.text.conversation import encode_conversation
from lfm_jax.text.tokenizer import train_bpe

BYTES = train_bpe([], vocab_size=270)
T, B = 128, 4
CHATS = [
    [{"role": "user", "content": f"what is {i} + {i}?"}, {"role": "assistant", "content": f"It is {2 * i}."},
     {"role": "user", "content": "sure"}, {"role": "assistant", "content": "yes"}]
    for i in range(12)
]
ANSWERS = [[f"It is {2 * i}.<|im_end|>\n", "yes<|im_end|>\n"] for i in range(12)]


def write_set(directory, form, rows):
    """A dataset of records, as `lfm data build` of format 1 laid it out."""
    directory.mkdir()
    BYTES.save(str(directory / "tokenizer.json"))
    shards, counts = [], {}
    for split, records in rows.items():
        name = f"{split}-00000-of-00001.arrayrecord"
        writer = array_record_module.ArrayRecordWriter(str(directory / name), "group_size:1")
        for record in records:
            writer.write(record)
        writer.close()
        data = (directory / name).read_bytes()
        shards.append({"name": name, "split": split, "rows": len(records), "bytes": len(data),
                       "digest": hashlib.blake2b(data, digest_size=16).hexdigest()})
        counts[split] = {"documents": len(records), "text_bytes": 10 * len(records), "tokens": 11 * len(records),
                         "pieces": len(records), "rows": len(records), "document_lengths": [], "piece_lengths": []}
    tokenizer = hashlib.blake2b(BYTES.to_str().encode(), digest_size=16).hexdigest()
    manifest = {
        "format": form, "seq_len": T, "dtype": "uint16", "vocab_size": 270, "tokenizer": tokenizer, "bos_id": 1,
        "eos_id": 7, "seed": 0, "block_bytes": 1000, "heldout_fraction": 0.1, "heldout_rule": "", "unreadable": 0,
        "sources": {"patterns": ["a"], "files": 1, "bytes": 1},
    } | counts | {"shards": shards}
    (directory / "manifest.json").write_text(json.dumps(manifest))
    train = next(shard["digest"] for shard in shards if shard["split"] == "train")
    return hashlib.blake2b(f"{form} {T} uint16".encode() + train.encode(), digest_size=16).hexdigest()


def old_record(*pieces):
    ids = [i for piece in pieces for i in piece]
    return struct.pack(f"<{1 + len(pieces)}I{len(ids)}H", len(pieces), *(len(piece) - 1 for piece in pieces), *ids)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """(directory with `text` and `chats`, fingerprint of each)."""
    root = tmp_path_factory.mktemp("sets")
    text = [old_record([1, 20 + i, 7], [1, 21, 22, 23, 7]) for i in range(12)]
    prints = {"text": write_set(root / "text", 1, {"train": text, "heldout": [old_record([40, 41, 42])]})}
    codec = RowCodec(SPANS_FORMAT, np.dtype("<u2"))
    found = [encode_conversation(BYTES, tiny_config(vocab_size=270), None, chat) for chat in CHATS]
    chats = [codec.encode([Tokens(np.array(ids, "<u2"), np.array(spans))]) for ids, spans in found]
    prints["chats"] = write_set(root / "chats", 2, {"train": chats[:10], "heldout": chats[10:]})
    return root, prints


def config(root, *names, **changes):
    mixture = tuple(MixturePart(path=str(root / name)) for name in names)
    return DataConfig(**dict(mixture=mixture, seq_len=T, batch_size=B, prefetch=0) | changes)


def take(iterator, n):
    return list(itertools.islice(iterator, n))


def assert_same(batches, others):
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for key in batch:
            np.testing.assert_array_equal(batch[key], other[key])


def row_of(values, fill=0):
    return [*values, *[fill] * (T - len(values))]


def test_a_dataset_of_format_1_reads_to_the_bit(sets):
    root, prints = sets
    assert load_manifest(root / "text").fingerprint() == prints["text"]
    (batch,) = open_corpus(config(root, "text"), BYTES).heldout_batches()
    expected = {"tokens": [40, 41], "targets": [41, 42], "segment_ids": [1, 1], "positions": [0, 1]}
    for key, values in expected.items():
        fill = LOSS_IGNORE if key == "targets" else 0
        assert batch[key].tolist() == [row_of(values, fill), *[row_of([], fill)] * (B - 1)]
        assert batch[key].dtype == np.int32
    assert open_corpus(config(root, "text"), BYTES).heldout_bytes == 10
    batches = take(open_corpus(config(root, "text"), BYTES).train_batches(), 3)
    rows = {key: sorted(np.concatenate([batch[key] for batch in batches]).tolist()) for key in batches[0]}
    assert rows["tokens"] == [row_of([1, 20 + i, 1, 21, 22, 23]) for i in range(12)]
    assert rows["targets"] == [row_of([20 + i, 7, 21, 22, 23, 7], LOSS_IGNORE) for i in range(12)]
    assert rows["segment_ids"] == [row_of([1, 1, 2, 2, 2, 2])] * 12
    assert rows["positions"] == [row_of([0, 1, 0, 1, 2, 3])] * 12


def test_a_position_saved_in_a_dataset_of_format_1_is_still_known(sets):
    root, prints = sets
    known = hashlib.blake2b(f"0 {prints['text']} 1.000000000".encode(), digest_size=16).hexdigest()
    saved = {"fingerprint": known, "iterator": {"global_next_index": 2 * B}}
    whole, resumed = (open_corpus(config(root, "text"), BYTES).train_batches() for _ in range(2))
    resumed.set_state(saved)
    assert resumed.get_state() == saved
    assert_same(take(resumed, 5), take(whole, 7)[2:])


def test_only_what_the_assistant_wrote_is_a_target(sets):
    root, _ = sets
    held = open_corpus(config(root, "chats"), BYTES).heldout_batches()
    trained = take(open_corpus(config(root, "chats"), BYTES).train_batches(), 5)
    for batches, chats, times in ((held, [10, 11], 1), (trained, range(10), 2)):
        rows = [row[row != LOSS_IGNORE].tolist() for batch in batches for row in batch["targets"]]
        learnt = [BYTES.decode(row, skip_special_tokens=False) for row in rows if row]
        assert sorted(learnt) == sorted(["".join(ANSWERS[i]) for i in chats] * times)


@pytest.mark.parametrize("names", [("chats",), ("text", "chats")])
def test_resuming_goes_on_with_the_batches_to_come_in_either_format(sets, names):
    root, _ = sets
    iterator = open_corpus(config(root, *names), BYTES).train_batches()
    take(iterator, 3)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = take(iterator, 6)
    again = open_corpus(config(root, *names), BYTES).train_batches()
    again.set_state(state)
    assert_same(take(again, 6), expected)
    rows = np.concatenate([batch["targets"] for batch in expected])
    spans = [np.any(row[:5] == LOSS_IGNORE) for row in rows]
    assert any(spans)
    assert all(spans) == (names == ("chats",))
    with pytest.raises(ValueError, match="belongs to other data"):
        open_corpus(config(root, "text"), BYTES).train_batches().set_state(state)


def test_what_is_learnt_is_shown_in_colour_and_the_rest_is_not(sets):
    root, _ = sets
    console = Console(width=200, force_terminal=True, color_system="standard", highlight=False)
    with console.capture() as capture:
        for panel in sample(load_manifest(root / "chats"), "train", samples=1, row=3):
            console.print(panel)
    out, learnt = capture.get(), sum(len(BYTES.encode(a, add_special_tokens=False).ids) for a in ANSWERS[3])
    assert f", {learnt} learnt" in out
    assert f"tokens, {learnt} of them learnt (in colour)" in out
    colour = "\x1b[36m"
    assert f"{colour}It is 6.<|im_end|>\x1b[0m" in out
    assert f"{colour}yes<|im_end|>\x1b[0m" in out
    for told in ("<|startoftext|><|im_start|>user", "what is 3 + 3?<|im_end|>", "<|im_start|>assistant"):
        assert f"\x1b[2m{told}\x1b[0m" in out
    with console.capture() as capture:
        for panel in sample(load_manifest(root / "text"), "train", samples=1):
            console.print(panel)
    assert "document begins, document ends" in capture.get()
    assert "learnt" not in capture.get()
