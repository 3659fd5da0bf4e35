"""What a model is called that `lfm serve` and `lfm batch` are given by its path."""

import os
import shutil

import pytest
from running import run

from lfm_jax.serve import batch, launch


@pytest.fixture
def names(monkeypatch, tmp_path):
    """What the verbs call a model; they load and answer nothing."""
    found = []
    monkeypatch.setattr(launch, "open_service", lambda *args, **options: None)
    monkeypatch.setattr(launch, "serve", lambda service, name, *rest: found.append(name))
    monkeypatch.setattr(batch, "batch", lambda open_service, name, *rest, **options: found.append(name) or 0)

    def of(path, *flags):
        assert run("serve", path, "--port", "0", *flags) == run("batch", path, "in.jsonl", "out.jsonl") == 0
        return found[-2:]

    return of


@pytest.mark.parametrize(("folder", "name"), [
    ("models--LiquidAI--LFM2-350M/snapshots/0a1b2c", "LFM2-350M"), ("models--gpt2/snapshots/0a1b2c", "gpt2"),
    ("my-model", "my-model"), ("snapshots/v2", "v2"), ("models--LiquidAI--LFM2-350M/mine", "mine"),
])
def test_a_name_is_that_of_the_repository_or_the_directory(names, checkpoint, tmp_path, monkeypatch, folder, name):
    path, link = tmp_path / folder, tmp_path / "short"
    shutil.copytree(checkpoint, path)
    link.symlink_to(path)
    assert names(path) == [name] * 2
    assert names(link) == ["short"] * 2
    monkeypatch.chdir(path)
    for relative in (".", f"../{path.name}"):
        assert names(relative) == [name] * 2
    assert names(os.path.relpath(link)) == ["short"] * 2
    (path / "inside").mkdir()
    (tmp_path / "elsewhere").symlink_to(path / "inside")
    assert names(tmp_path / "elsewhere" / "..") == [name] * 2
    assert names(path, "--name", "other")[0] == "other"
