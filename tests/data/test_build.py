"""`lfm data build`: what it writes, that it can be killed at any moment, and what it refuses."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from lfm_jax.data.build import BuildConfig, build, plan_blocks
from lfm_jax.data.heldout import is_heldout
from lfm_jax.data.manifest import BUILD_DIR, SPLITS, load_manifest
from lfm_jax.data.shards import Records
from lfm_jax.data.sources import SourceFile, Stretch, read_stretch
from lfm_jax.files import locked, write_whole
from lfm_jax.text.tokenizer import train_bpe

BYTES = train_bpe([], vocab_size=270)
T = 64


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    draw = np.random.default_rng(0)

    def text(longest):
        return "".join(draw.choice(list("abcdef \n"), size=draw.integers(1, longest)))

    with open(root / "lines.jsonl", "w") as file:
        for i in range(300):
            file.write(json.dumps({"text": f"{i}:{text(100)}"}) + "\n" * int(draw.integers(1, 3)))
    for i in range(6):
        (root / f"{i}.txt").write_text(f"book {i}: {text(900)}")
    (root / "empty.txt").write_text("")
    BYTES.save(str(root.parent / "bytes.json"))
    return root


def config(corpus, out, **changes):
    fields = dict(sources=(str(corpus),), out=str(out), tokenizer=str(corpus.parent / "bytes.json"), seq_len=T,
                  heldout_fraction=0.1, block_bytes=4000, workers=1)
    return BuildConfig(**(fields | changes))


def quiet(conf):
    return build(conf, show_progress=False)


def pieces_of(directory, split):
    manifest = load_manifest(directory)
    if not manifest.counts(split).rows:
        return
    for record in Records(manifest, split):
        lengths, ids, learnt = manifest.codec.split(record)
        assert learnt is None
        assert lengths.sum() <= manifest.seq_len
        yield from (piece.tolist() for piece in np.split(ids, np.cumsum(lengths + 1)[:-1]))


def documents(directory, split):
    """The texts of a split that are one piece, counted."""
    whole = (piece for piece in pieces_of(directory, split) if (piece[0], piece[-1]) == (1, 7))
    return Counter(BYTES.decode(piece[1:-1]) for piece in whole)


def source_texts(corpus):
    yield from ((corpus / f"{i}.txt").read_text() for i in range(6))
    for line in (corpus / "lines.jsonl").read_text().split("\n"):
        if line:
            yield json.loads(line)["text"]


def contents(directory):
    return {path.name: path.read_bytes() for path in sorted(Path(directory).rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def built(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("built") / "set"
    quiet(config(corpus, out))
    return out


def test_every_document_is_there_once_on_the_side_its_hash_says(corpus, built):
    manifest = load_manifest(built)
    texts = list(source_texts(corpus))
    assert len(manifest.of("train")) > 3
    for split, held in (("train", False), ("heldout", True)):
        mine = [text for text in texts if is_heldout(text, 0.1) is held]
        assert mine
        counts, found = manifest.counts(split), documents(built, split)
        assert found == Counter(text for text in mine if len(text) + 1 <= T)
        ids = [[1, *BYTES.encode(text, add_special_tokens=False).ids, 7] for text in mine]
        pairs = Counter(pair for piece in pieces_of(built, split) for pair in pairwise(piece))
        assert pairs == Counter(pair for document in ids for pair in pairwise(document))
        assert counts.documents == len(mine) == sum(counts.document_lengths)
        assert counts.text_bytes == sum(len(text.encode()) for text in mine)
        assert counts.tokens == counts.text_bytes + len(mine)
        assert counts.pieces == sum(-(-(len(text) + 1) // T) for text in mine) == sum(counts.piece_lengths)
        assert counts.rows == sum(shard.rows for shard in manifest.of(split)) == len(Records(manifest, split))


def test_duplicates_never_straddle_the_split(tmp_path):
    rows = [{"text": f"document {i % 50}"} for i in range(1000)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    BYTES.save(str(tmp_path / "bytes.json"))
    sets = [documents(quiet(config(tmp_path, tmp_path / f"set{seed}", sources=(str(tmp_path / "a.jsonl"),), seed=seed,
                                   tokenizer=str(tmp_path / "bytes.json"), heldout_fraction=fraction)).directory, split)
            for seed, fraction in ((0, 0.3), (1, 0.3)) for split in SPLITS]
    texts = [set(found) for found in sets]
    assert all(texts)
    assert not texts[0] & texts[1]
    assert len(texts[0] | texts[1]) == 50
    assert texts[:2] == texts[2:], "the split does not depend on the seed"
    assert all(n == 20 for found in sets for n in found.values())


def test_the_share_held_out_is_the_fraction():
    assert 0.08 < np.mean([is_heldout(f"text {i}", 0.1) for i in range(3000)]) < 0.12
    assert not any(is_heldout(f"text {i}", 0.0) for i in range(100))


def test_the_same_build_gives_the_same_bytes_whatever_the_number_of_workers(corpus, built, tmp_path):
    quiet(config(corpus, tmp_path / "two", workers=2))
    assert contents(tmp_path / "two") == contents(built)
    quiet(config(corpus, tmp_path / "other", seed=1))
    assert contents(tmp_path / "other").keys() == contents(built).keys()
    assert contents(tmp_path / "other") != contents(built)


def test_nothing_but_shards_manifest_and_tokenizer_is_left(built):
    names = {path.name for path in built.iterdir()}
    manifest = load_manifest(built)
    assert names == {"manifest.json", "tokenizer.json", *(shard.name for shard in manifest.shards)}
    manifest.check_files(content=True)


class Killed(BaseException):
    pass


def test_stopping_at_any_rename_and_going_on_gives_the_same_bytes(corpus, built, tmp_path, monkeypatch):
    # Files appear by rename, so what another process can find changes there and nowhere else.
    replace, left = os.replace, 0

    def replace_some(*args):
        nonlocal left
        if left == 0:
            raise Killed
        left -= 1
        replace(*args)

    out, conf, stops = tmp_path / "set", config(corpus, tmp_path / "set"), 0
    for steps in range(1000):
        left = 1 + steps % 3
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace_some)
            try:
                quiet(conf)
                break
            except Killed:
                stops += 1
        with pytest.raises(ValueError, match="its build has not finished; the same `lfm data build` goes on"):
            load_manifest(out)
    assert stops > 10
    assert contents(out) == contents(built)


@pytest.mark.parametrize("workers", [1, 2])
def test_sigkill_at_random_moments_and_going_on_gives_the_same_bytes(tmp_path, workers):
    draw = random.Random(workers)
    with open(tmp_path / "a.jsonl", "w") as file:
        for _ in range(2500):
            file.write(json.dumps({"text": "".join(draw.choices("abcdefgh ", k=draw.randint(1, 400)))}) + "\n")
    BYTES.save(str(tmp_path / "bytes.json"))
    conf = config(tmp_path, tmp_path / "set", sources=(str(tmp_path / "a.jsonl"),), block_bytes=8000, workers=workers,
                  tokenizer=str(tmp_path / "bytes.json"))
    whole = config(tmp_path, tmp_path / "whole", sources=conf.sources, block_bytes=8000, tokenizer=conf.tokenizer)
    quiet(whole)
    code = f"from lfm_jax.data import build as d\nif __name__ == '__main__': d.build(d.{conf!r}, show_progress=False)"
    (tmp_path / "run.py").write_text(code)
    kills = 0
    for attempt in range(40):
        before = len(list((tmp_path / "set" / BUILD_DIR).glob("block-*")))
        process = subprocess.Popen([sys.executable, str(tmp_path / "run.py")])
        if attempt < 4 - workers:
            while process.poll() is None and len(list((tmp_path / "set" / BUILD_DIR).glob("block-*"))) == before:
                time.sleep(0.002)  # Until it is at work.
            time.sleep(draw.uniform(0, 0.1))
            kills += process.poll() is None
            process.send_signal(signal.SIGKILL)
            process.wait()
        elif process.wait() == 0:
            break
    assert kills
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")


def test_what_a_killed_worker_left_is_cleared_away(corpus, built, tmp_path):
    work = tmp_path / "set" / BUILD_DIR
    with pytest.raises(Killed):
        interrupted(config(corpus, tmp_path / "set"))
    (work / "train-00000-of-00009.arrayrecord.123").write_bytes(b"half")
    quiet(config(corpus, tmp_path / "set"))
    assert contents(tmp_path / "set") == contents(built)


def interrupted(conf):
    """Builds half of it."""
    from lfm_jax.data import workers

    count = 0

    def stop_later(*args):
        nonlocal count
        count += 1
        if count == 3:
            raise Killed
        return build_block(*args)

    build_block, workers.build_block = workers.build_block, stop_later
    try:
        quiet(conf)
    finally:
        workers.build_block = build_block


def test_a_finished_build_is_found_done_and_another_one_refused(corpus, built):
    before = {path.name: path.stat().st_mtime_ns for path in built.iterdir()}
    assert quiet(config(corpus, built)) == load_manifest(built)
    assert {path.name: path.stat().st_mtime_ns for path in built.iterdir()} == before
    with pytest.raises(ValueError, match="holds another dataset") as error:
        quiet(config(corpus, built, seed=1, seq_len=32, exclude=("1.txt",)))
    for line in ("seed: 0 there, 1 here", f"seq_len: {T} there, 32 here", "sources.files: 8 there, 7 here"):
        assert f"  - {line}" in str(error.value)


def test_sources_that_change_while_it_is_built_are_refused(corpus, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in corpus.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    conf = config(corpus, tmp_path / "set", sources=(str(copy),))
    with pytest.raises(Killed):
        interrupted(conf)
    os.utime(copy / "1.txt", ns=(1, 1))
    with pytest.raises(ValueError, match="source files changed since the build"):
        quiet(conf)
    (copy / "1.txt").write_text("longer")
    with pytest.raises(ValueError, match=r"sources\.bytes"):
        quiet(conf)


def test_a_directory_with_other_things_is_refused(corpus, tmp_path):
    (tmp_path / "thesis.doc").write_text("mine")
    with pytest.raises(ValueError, match=r"is not empty \(thesis.doc\)"):
        quiet(config(corpus, tmp_path))


def test_two_builds_at_once_are_refused(corpus, tmp_path):
    (tmp_path / "set").mkdir()
    with locked(tmp_path / "set", "taken"), pytest.raises(ValueError, match="another build is at work"):
        quiet(config(corpus, tmp_path / "set"))
    quiet(config(corpus, tmp_path / "set"))


@pytest.mark.parametrize("workers", [1, 2])
def test_unreadable_documents_are_named_or_skipped(corpus, tmp_path, workers):
    lines = ['{"text": "good one"}', '{"text": 3}', "{broken", '{"text": "good two"}', '{"body": "x"}']
    (tmp_path / "bad.jsonl").write_text("\n".join(lines))
    conf = config(corpus, tmp_path / "set", sources=(str(tmp_path / "bad.jsonl"),), heldout_fraction=0.0,
                  workers=workers, block_bytes=20 * workers)
    with pytest.raises(ValueError, match="cannot be read") as error:
        quiet(conf)
    assert f"{tmp_path / 'bad.jsonl'}, line" in str(error.value)
    out = tmp_path / "skipped"
    manifest = quiet(config(corpus, out, sources=conf.sources, heldout_fraction=0.0, skip_unreadable=True))
    assert manifest.unreadable == 3
    assert set(documents(out, "train")) == {"good one", "good two"}


def test_a_large_vocabulary_is_stored_in_four_bytes(corpus, tmp_path):
    wide = train_bpe([], vocab_size=270)
    wide.add_tokens([f"<{i}>" for i in range(66_000)])
    wide.save(str(tmp_path / "wide.json"))
    (tmp_path / "a.txt").write_text("a<65999>b")
    manifest = quiet(config(corpus, tmp_path / "set", sources=(str(tmp_path / "a.txt"),), heldout_fraction=0.0,
                            tokenizer=str(tmp_path / "wide.json")))
    assert (manifest.dtype, manifest.vocab_size) == ("uint32", 66_270)
    assert manifest.codec.split(Records(manifest, "train")[0]).ids[2] == 66_269


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    BYTES.save(str(tmp_path / "bytes.json"))
    peaks, sizes = [], []
    for number, copies in enumerate((2, 2, 8)):  # Once to warm up.
        with open(tmp_path / "a.jsonl", "w") as file:
            for i in range(300 * copies):
                file.write(json.dumps({"text": f"{i} {'word ' * (i % 200)}"}) + "\n")
        conf = config(tmp_path, tmp_path / f"set{number}", sources=(str(tmp_path / "a.jsonl"),), block_bytes=100_000,
                      tokenizer=str(tmp_path / "bytes.json"))
        tracemalloc.start()
        manifest = quiet(conf)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        sizes.append(manifest.sources["bytes"])
    # A few kilobytes a block are known of it once it is done, which is of no account in blocks of 64 MiB.
    assert peaks[2] - peaks[1] < (sizes[2] - sizes[1]) / 3


@pytest.mark.parametrize("stop", [1, 7, 40, 1000])
def test_stretches_have_every_line_of_a_file_once(tmp_path, stop):
    lines = [json.dumps({"text": "x" * n}) + "\n" for n in (1, 30, 2, 80, 3)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines))
    size = path.stat().st_size
    plan = plan_blocks([SourceFile(path, "a.jsonl")], [size], stop * 16, seed=3)
    parts = sorted((part for block in plan for part in block), key=lambda part: part.start)
    assert [part.start for part in parts] == [0, *(part.stop for part in parts[:-1])]
    assert parts[-1].stop == size
    problems = []
    found = [text for part in parts for _, text in read_stretch(part, "text", problems)]
    assert found == [json.loads(line)["text"] for line in lines]
    assert not problems


def test_a_bad_line_is_numbered_from_the_start_of_its_file(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n' * 9 + "{bad\n")
    problems = []
    assert not list(read_stretch(Stretch(path, 100, 1000), "text", problems))[3:]
    assert f"{path}, line 10: not JSON" in problems[0]


def test_blocks_are_of_about_one_size_and_hold_everything(tmp_path):
    files, sizes = [], []
    for i, size in enumerate(np.random.default_rng(0).integers(1, 1000, 300).tolist()):
        files.append(SourceFile(tmp_path / f"{i}.txt", f"{i}.txt"))
        sizes.append(size)
    files.append(SourceFile(tmp_path / "giant.txt", "giant.txt"))
    sizes.append(60_000)
    plan = plan_blocks(files, sizes, 20_000, seed=0)
    assert sorted(part.path.name for block in plan for part in block) == sorted(file.name for file in files)
    totals = [sum(part.stop - part.start for part in block) for block in plan]
    assert all(totals)
    assert sorted(totals)[-2] < 22_000, "but for the file that is larger than a block"
    first = [int(part.path.stem) for part in plan[0] if part.path.stem != "giant"]
    assert first != sorted(first)


def test_manifest_says_what_was_built(corpus, built):
    plain = json.loads((built / "manifest.json").read_text())
    assert plain["format"] == 1
    assert (plain["seq_len"], plain["dtype"], plain["seed"], plain["heldout_fraction"]) == (T, "uint16", 0, 0.1)
    tokenizer = hashlib.blake2b(BYTES.to_str().encode(), digest_size=16).hexdigest()
    assert plain["tokenizer"] == tokenizer
    assert plain["sources"]["files"] == 8
    for shard in plain["shards"]:
        data = (built / shard["name"]).read_bytes()
        assert (shard["bytes"], shard["digest"]) == (len(data), hashlib.blake2b(data, digest_size=16).hexdigest())
    assert "directory" not in plain


def test_config_lists_every_bad_field():
    with pytest.raises(ValueError, match="BuildConfig is not valid") as error:
        BuildConfig(sources=(), out="", tokenizer="", seq_len=0, exclude=("",), text_field="", heldout_fraction=1.0,
                    bos_id=-1, eos_id=-1, seed=-1, block_bytes=0, workers=-1)
    fields = ("sources", "out", "tokenizer", "seq_len", "exclude", "text_field", "heldout_fraction", "bos_id", "eos_id",
              "seed", "block_bytes", "workers")
    assert len(str(error.value).splitlines()) == 1 + len(fields)
    for field in fields:
        assert f"  - {field} is " in str(error.value)


def test_many_processes_may_write_one_file(tmp_path):
    """None fails, and what is there at the end is whole."""
    from concurrent.futures import ThreadPoolExecutor

    texts = [str(i) * 2000 for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            list(pool.map(lambda text: write_whole(tmp_path / "file", text, by_many=True), texts))
    assert (tmp_path / "file").read_text() in texts
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
