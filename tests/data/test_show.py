"""`lfm data build` and `lfm data show`, as a user calls them."""

import json

import pytest
from running import run

from lfm_jax.data.manifest import load_manifest
from lfm_jax.text.tokenizer import train_bpe


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    root = tmp_path_factory.mktemp("show")
    train_bpe([], vocab_size=270).save(str(root / "tokenizer.json"))
    with open(root / "a.jsonl", "w") as file:
        for i in range(60):
            file.write(json.dumps({"text": f"document {i} [bold]not markup[/bold]" + " and on" * (i % 7)}) + "\n")
    (root / "long.txt").write_text("many words " * 100)
    (root / "build.yaml").write_text(
        f"sources: [{root}/a.jsonl, {root}/long.txt]\nout: {root}/set\ntokenizer: {root}\nseq_len: 256\n"
    )
    assert run("data", "build", str(root / "build.yaml"), "--heldout-fraction", "0.1") == 0
    return root / "set"


def test_flags_win_over_the_file(built):
    assert load_manifest(built).heldout_fraction == 0.1


def test_it_shows_counts_efficiency_lengths_and_rows(built, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert run("data", "show", str(built), "--verify") == 0
    out = capsys.readouterr().out
    manifest = load_manifest(built)
    assert "every checksum right" in out
    for counts in (manifest.train, manifest.heldout):
        assert f"{counts.tokens:,}" in out
        assert f"{counts.efficiency(256):.2%}" in out
    assert "32-63" in out
    assert "64-127" in out
    assert out.count("─ train row") == 3
    assert "[bold]not markup[/bold]" in out, "text is shown as it is"
    assert "document begins, document ends" in out
    assert "more pieces (--row" in out


def test_one_row_is_shown_whole_with_every_border(built, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    manifest = load_manifest(built)
    for row in range(manifest.train.rows):
        assert run("data", "show", str(built), "--row", str(row)) == 0
    out = capsys.readouterr().out
    assert out.count("▌piece") == manifest.train.pieces
    assert out.count("document begins") == out.count("document ends") == manifest.train.documents
    assert out.count("many words") in range(95, 101)  # Cut where pieces meet.
    held = sum(f"document {i} " in out for i in range(60))
    assert held + ("many words" in out) == manifest.train.documents


def test_it_refuses_clearly(built, capsys):
    assert run("data", "show", str(built), "--row", "999") == 2
    assert "row is 999; the train split" in capsys.readouterr().err
    assert run("data", "show", str(built.parent)) == 2
    assert "is not a built dataset" in capsys.readouterr().err
    shard = built / load_manifest(built).shards[0].name
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    try:
        assert run("data", "show", str(built)) == 2
        assert str(shard) in capsys.readouterr().err
    finally:
        shard.write_bytes(whole)
