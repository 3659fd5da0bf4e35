"""What a frozen model says, kept in files: at its places, made once, resumed, refused where it is of something else."""

import os
from functools import partial

import numpy as np
import pytest
from chats import TURNS, turns, write

from lfm_jax import ModelConfig
from lfm_jax.data.batch import LOSS_IGNORE
from lfm_jax.data.config import ChatData
from lfm_jax.data.corpora.chats import ChatCorpus
from lfm_jax.post import stored as module
from lfm_jax.post.stored import Field, is_complete, stored
from lfm_jax.testing import tiny_tokenizer

TOKENIZER = tiny_tokenizer(vocab_size=300)
MODEL = ModelConfig(vocab_size=TOKENIZER.get_vocab_size(), layer_types=("conv",), hidden_size=8, ffn_size=8)
T, B = 40, 3
FIELDS = {"ids": Field((2,), "uint16"), "scores": Field((), "float32")}


class Sayer:
    """Says of each place its token, and how it stands."""

    digest = "d"

    def __init__(self):
        self.calls = 0

    def __call__(self, batch):
        self.calls += 1
        assert batch["tokens"].shape == (B, T)
        ids = np.stack([batch["tokens"], batch["positions"]], axis=2)
        return {"ids": ids, "scores": -batch["tokens"] - batch["segment_ids"] / 8}


class NoRows(list):
    learnt = ()

    def digest(self):
        return "none"


@pytest.fixture
def rows(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARD_ROWS", 4)
    path = write(tmp_path / "chats.jsonl", [turns(f"question {i}", "yes " * (1 + i % 3)) for i in range(22)])
    data = ChatData(sources=(str(path),), seq_len=T, batch_size=B, heldout_fraction=0.0)
    found = ChatCorpus(data, TOKENIZER, MODEL, TURNS).train_rows
    assert len(found) > 9
    return found


def opened(directory, rows, sayer, *, resuming=False, **about):
    return stored(directory, rows, FIELDS, B=B, T=T, about=about, speaker=lambda: sayer, resuming=resuming)


def opened_by(directory, rows, speaker):
    return stored(directory, rows, FIELDS, B=B, T=T, about={}, speaker=speaker)


def test_values_stand_at_learnt_targets_and_are_made_once(tmp_path, rows):
    sayer = Sayer()
    for _ in range(2):
        kept = opened(tmp_path / "kept", rows, sayer)
        for i, row in enumerate(rows):
            beside, learnt = kept.beside(i, row), row["targets"] != LOSS_IGNORE
            assert (beside["ids"].dtype, beside["scores"].dtype) == ("int32", "float32")
            np.testing.assert_array_equal(
                beside["ids"], np.where(learnt[:, None], np.stack([row["tokens"], row["positions"]], axis=1), 0))
            np.testing.assert_array_equal(
                beside["scores"], np.where(learnt, -row["tokens"] - row["segment_ids"] / 8, 0))
    assert sayer.calls == sum(-(-min(4, len(rows) - i) // B) for i in range(0, len(rows), 4))


def test_what_was_interrupted_goes_on(tmp_path, rows):
    first, directory = Sayer(), tmp_path / "kept"
    opened(directory, rows, first)
    files = {path.name: path.read_bytes() for path in directory.glob("*.npy")}
    (directory / "ids-00001.npy").unlink()
    again = Sayer()
    opened(directory, rows, again)
    assert 0 < again.calls < first.calls
    assert {path.name: path.read_bytes() for path in directory.glob("*.npy")} == files
    assert not list(directory.glob("*.partial"))


def test_what_is_of_something_else_or_damaged_is_refused(tmp_path, rows):
    directory = tmp_path / "kept"
    opened(directory, rows, Sayer(), of="a")
    with pytest.raises(ValueError, match=r"kept was made of something else(.|\n)*of: 'a' there, 'b' here"):
        opened(directory, rows, Sayer(), of="b")
    other = Sayer()
    other.digest = "e"
    with pytest.raises(ValueError, match="begun with other weights; restore them, or delete the directory"):
        opened(directory, rows, other, of="a")
    opened(directory, rows, other, of="a", resuming=True)
    file = directory / "scores-00001.npy"
    whole = file.read_bytes()
    file.write_bytes(whole[:-3])
    with pytest.raises(ValueError, match=r"scores-00001.npy is damaged; delete it"):
        opened(directory, rows, Sayer(), of="a")
    file.unlink()
    with pytest.raises(ValueError, match="begun with other weights"):
        opened(directory, rows, other, of="a")
    assert not file.exists()
    opened(directory, rows, Sayer(), of="a")
    assert file.read_bytes() == whole
    (directory / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest.json is damaged"):
        opened(directory, rows, Sayer(), of="a")


def test_the_manifest_says_when_all_is_there_of_no_rows_too(tmp_path, rows):
    class Broken(Sayer):
        def __call__(self, batch):
            raise RuntimeError

    def gone():
        raise ValueError("gone")

    for directory, kept in ((tmp_path / "kept", rows), (tmp_path / "none", NoRows())):
        open_with = partial(opened_by, directory, kept)

        if len(kept):
            with pytest.raises(RuntimeError):
                open_with(Broken)
            assert (directory / "manifest.json").exists()
            assert not is_complete(directory)
            with pytest.raises(ValueError, match="gone"):
                open_with(gone)
        open_with(Sayer)
        assert is_complete(directory)
        open_with(gone)


def test_no_file_stays_open(tmp_path, rows):
    kept = opened(tmp_path / "kept", rows, Sayer())
    for i, row in enumerate(rows):
        kept.beside(i, row)
    held = [os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")
            if os.path.islink(f"/proc/self/fd/{name}")]
    assert held
    assert not [path for path in held if path.startswith(str(tmp_path))]
