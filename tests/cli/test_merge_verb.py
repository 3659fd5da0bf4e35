"""`lfm merge`: flags, what it prints, and that bad input is one message and status 2."""

import pytest
from running import run
from safetensors.numpy import load_file

import lfm_jax as lfm
from lfm_jax.convert.hf import write_hf
from lfm_jax.testing import tiny_config


@pytest.fixture(scope="module")
def models(checkpoint, tmp_path_factory):
    """Two models near `checkpoint`."""
    start = load_file(checkpoint / "model.safetensors")
    vocab_size, path = len(start["model.embed_tokens.weight"]), tmp_path_factory.mktemp("merge")
    for factor in (2, 3):
        write_hf(path / str(factor), tiny_config(vocab_size=vocab_size),
                 ((name, factor * array) for name, array in start.items()), source=checkpoint)
    return [path / "2", path / "3"]


def test_merge_does_what_python_does(checkpoint, models, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("lfm_jax.post.merge.TELL_SECONDS", -1.0)
    flags = ("--weights", 0.5, 0.25, "--density", 0.4, "--seed", 7, "--dtype", "bfloat16")
    assert run("merge", tmp_path / "a", "--method", "dare_ties", "--base", checkpoint, "--models", *models, *flags) == 0
    printed = capsys.readouterr()
    assert printed.out == f"wrote {tmp_path}/a\n"
    assert printed.err.startswith("lfm: 1 of ")
    lfm.merge(tmp_path / "b", models, "dare_ties", base=checkpoint, weights=[0.5, 0.25], density=0.4, seed=7,
              dtype="bfloat16")
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == sorted({path.name for path in checkpoint.iterdir()})
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_bad_input_is_one_message(checkpoint, models, tmp_path, capsys):
    assert run("merge", tmp_path / "a", "--method", "linear", "--models", checkpoint, *models, "--weights", 1, 1,
               "--density", 0.5) == 2
    message = capsys.readouterr().err
    assert "linear does not read density; leave it out" in message
    assert "weights has 2 numbers for 3 models" in message
    assert run("merge", tmp_path / "a", "--method", "mean", "--models", checkpoint) == 2
    assert "task_arithmetic" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
