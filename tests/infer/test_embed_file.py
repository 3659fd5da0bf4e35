"""`lfm embed`: lines in, the vectors of `lfm.embed` out, whole or not at all."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

import lfm_jax as lfm
from lfm_jax.cli import main
from lfm_jax.infer import embed_file as module
from lfm_jax.infer.embed import load_encoder
from lfm_jax.testing import tiny_model, tiny_tokenizer

TEXTS = ["fox", "", "the lazy dog\u2028over", "é " * 30, "jumps"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("embed") / "encoder"
    tokenizer = tiny_tokenizer()
    lfm.save_hf(tiny_model(vocab_size=tokenizer.get_vocab_size(), causal=False), path, tokenizer=tokenizer)
    return path


def run(*args):
    with pytest.raises(SystemExit) as status:
        main(["embed", *map(str, args)])
    return status.value.code


@pytest.mark.parametrize("name", ["texts.txt", "strings.jsonl", "objects.jsonl"])
def test_each_line_gets_its_vector(model, tmp_path, capsys, monkeypatch, name):
    monkeypatch.setattr(module, "AT_A_TIME", 2)
    monkeypatch.setattr(module, "TELL_SECONDS", 0)
    lines = {"texts.txt": TEXTS, "strings.jsonl": map(json.dumps, TEXTS),
             "objects.jsonl": (json.dumps({"id": 3, "text": text}) for text in TEXTS)}[name]
    (tmp_path / name).write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    expected = lfm.embed(*lfm.load(model), TEXTS, "query", dimensions=8)
    for target in ("vectors.npy", "vectors.jsonl"):
        assert run(model, tmp_path / name, tmp_path / target, "--kind", "query", "--dimensions", 8) == 0
        out, err = capsys.readouterr()
        assert out == f"{tmp_path / target}: vectors of 5 texts\n"
        assert "2 of 5 texts" in err
    np.testing.assert_allclose(np.load(tmp_path / "vectors.npy"), expected, atol=1e-6)
    rows = [json.loads(line) for line in (tmp_path / "vectors.jsonl").open()]
    assert [row["index"] for row in rows] == [0, 1, 2, 3, 4]
    np.testing.assert_allclose([row["embedding"] for row in rows], expected, atol=1e-6)
    assert {one.name for one in tmp_path.iterdir()} == {name, "vectors.npy", "vectors.jsonl"}


@pytest.mark.parametrize(("name", "content", "target", "flags", "problem"), [
    ("a.txt", b"x", "v.csv", (), "must end in .npy or .jsonl"),
    ("a.txt", b"x", "there.npy", (), "there.npy is there already; name a new file"),
    ("a.txt", b"", "v.npy", (), "a.txt has no texts"),
    ("b.txt", None, "v.npy", (), "b.txt cannot be read: No such file"),
    ("a.txt", b"x\n\xff", "v.npy", (), "line 2 of"),
    ("a.jsonl", b'"x"\n{"txt": "y"}\n', "v.npy", (), 'expected a JSON string, or an object with a "text"'),
    ("a.jsonl", b"x\n", "v.npy", (), "line 1 of"),
    ("a.txt", b"x", "v.npy", ("--dimensions", 33), "dimensions is 33"),
    ("a.jsonl", b'"x"\n"\\ud800"', "v.npy", (), "line 2 of"),
    ("a.txt", b"x", "nowhere/v.npy", (), "nowhere first"),
    (".", None, "v.npy", (), "is no regular file; write the texts into one"),
])
def test_what_is_refused_leaves_nothing(model, tmp_path, capsys, name, content, target, flags, problem):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    (tmp_path / "there.npy").write_bytes(b"mine")
    before = {one.name for one in tmp_path.iterdir()}
    assert run(model, tmp_path / name, tmp_path / target, *flags) == 2
    assert problem in capsys.readouterr().err
    assert {one.name for one in tmp_path.iterdir()} == before
    assert (tmp_path / "there.npy").read_bytes() == b"mine"


def test_a_source_that_is_read_once_or_changes_leaves_nothing(model, tmp_path):
    read, write = os.pipe()
    os.write(write, b"x\ny\n")
    os.close(write)
    source, target = tmp_path / "a.txt", tmp_path / "v.npy"
    with pytest.raises(ValueError, match="is no regular file"):
        module.embed_file(lambda: load_encoder(model), Path(f"/dev/fd/{read}"), target)
    os.close(read)

    def meanwhile(content):
        source.write_bytes(content)
        return load_encoder(model)

    source.write_bytes(b"x\ny\n")
    with pytest.raises(ValueError, match="had 2 texts and has fewer now"):
        module.embed_file(lambda: meanwhile(b"x\n"), source, target)
    assert [one.name for one in tmp_path.iterdir()] == ["a.txt"]
    source.write_bytes(b"x\ny\n")
    assert module.embed_file(lambda: meanwhile(b"x\ny\nz\n"), source, target) == 2
    np.testing.assert_array_equal(np.load(target), load_encoder(model).embed(["x", "y"]))
