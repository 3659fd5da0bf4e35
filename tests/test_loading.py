"""What a path is: decided by one table, which a new kind joins by one row."""

import dataclasses

import pytest
from flax import nnx
from limits import LIMITS, limited

import lfm_jax as lfm
from lfm_jax import loading
from lfm_jax.loading import GGUF, HUGGING_FACE, RUN, ModelSource, recognise
from lfm_jax.testing import tiny_config, tiny_model, tiny_tokenizer
from lfm_jax.train import checkpoint


def test_a_directory_is_known_by_what_is_in_it(tmp_path):
    for name in ("hf", "run"):
        (tmp_path / name).mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    (tmp_path / "run" / "checkpoints").mkdir()
    assert recognise(tmp_path / "hf") is HUGGING_FACE
    assert recognise(str(tmp_path / "run")) is RUN
    (tmp_path / "run" / "config.json").write_text("{}")
    assert recognise(tmp_path / "run") is HUGGING_FACE, "an export in the directory of its run is the export"
    (tmp_path / "empty.gguf").write_bytes(b"")
    (tmp_path / "blob").write_bytes(b"GGUF...")  # As files lie in caches.
    assert recognise(tmp_path / "empty.gguf") is recognise(tmp_path / "blob") is GGUF


def test_what_is_no_model_is_refused_with_all_that_is_accepted(tmp_path):
    accepted = r"a model is a Hugging Face directory \(with config\.json\) or a run directory of lfm train \(with check"
    with pytest.raises(ValueError, match=rf"{tmp_path} has no model in it; {accepted}"):
        lfm.load(tmp_path)
    (tmp_path / "file").write_text("")
    for name in ("file", "nothing"):
        with pytest.raises(ValueError, match=rf"{name} is not a directory; {accepted}"):
            lfm.load(tmp_path / name)


def test_a_run_without_a_finished_checkpoint_says_so(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="holds no finished checkpoint yet"):
        lfm.load(tmp_path)


@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_limits_in_the_tokenizer_of_a_run_are_not_loaded(tmp_path, monkeypatch, limits):
    class Manager:
        """Of a run whose checkpoint is the tiny model."""

        def __init__(self, run_dir, keep):
            assert (run_dir / "checkpoints").is_dir()

        def latest_step(self):
            return 1

        def metadata(self):
            return {"config": {"model": dataclasses.asdict(tiny_config())}}

        def restore_params(self, abstract_params):
            return nnx.to_pure_dict(nnx.split(tiny_model(), nnx.Param)[1])

        def close(self):
            pass

    monkeypatch.setattr(checkpoint, "CheckpointManager", Manager)
    (tmp_path / "checkpoints").mkdir()
    limited(tiny_tokenizer(), **limits).save(str(tmp_path / "tokenizer.json"))
    assert lfm.load(tmp_path)[1].to_str() == tiny_tokenizer().to_str()


def test_another_source_is_one_row(tmp_path, monkeypatch):
    model = tiny_model()
    own = ModelSource("a file of ours (.toy)", lambda path: path.suffix == ".toy", lambda _, dtype, __: (model, dtype))
    monkeypatch.setattr(loading, "SOURCES", [*loading.SOURCES, own])
    assert lfm.load(tmp_path / "x.toy", dtype="float16") == (model, "float16")
    with pytest.raises(ValueError, match=r"or a file of ours \(\.toy\)"):
        lfm.load(tmp_path / "x.gguf")
