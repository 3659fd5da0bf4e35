"""`lfm export`, `lfm imatrix`, and the other verbs on a GGUF file."""

import json
import sys

import gguf
import numpy as np
import optax
import pytest
from flax import nnx
from running import run

import lfm_jax as lfm
from lfm_jax.convert.gguf.imatrix import read_imatrix
from lfm_jax.convert.hub import model_name
from lfm_jax.loading import chat_template
from lfm_jax.recipe import to_plain
from lfm_jax.testing import tiny_model, tiny_tokenizer
from lfm_jax.train.checkpoint import CheckpointManager
from lfm_jax.train.state import new_state

TEMPLATE = "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "model"
    tokenizer = tiny_tokenizer()
    made = tiny_model(vocab_size=tokenizer.get_vocab_size(), hidden_size=32, num_heads=4, head_dim=8)
    lfm.save_hf(made, path, tokenizer)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


@pytest.fixture(scope="module")
def file(directory, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    assert run("export", directory, path, "--type", "F32") == 0
    return path


def type_of(path):
    return gguf.LlamaFileType(gguf.GGUFReader(path).fields["general.file_type"].contents()).name


def test_export_writes_what_it_says(directory, file, tmp_path, capsys):
    assert run("export", directory, tmp_path / "a.gguf") == 0
    assert capsys.readouterr().out.startswith(f"wrote {tmp_path}/a.gguf: 0.")
    assert type_of(tmp_path / "a.gguf") == "MOSTLY_Q4_K_M"
    assert run("export", file, tmp_path / "b.gguf") == 0
    assert type_of(tmp_path / "b.gguf") == "ALL_F32"
    assert run("export", file, tmp_path / "b.gguf") == 2
    assert "b.gguf exists, and nothing is overwritten" in capsys.readouterr().err


def test_an_imatrix_is_made_and_used(directory, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("the quick brown fox\n" * 40)
    made = tmp_path / "x.imatrix"
    assert run("imatrix", directory, tmp_path / "text.txt", made, "--context", "16", "--pieces", "3") == 0
    printed = capsys.readouterr()
    assert printed.out == f"wrote {made}: 3 pieces, 17 matrices\n"
    assert "3 of 3 pieces of 16 tokens are read" in printed.err
    assert read_imatrix(made).datasets == ("text.txt",)
    assert run("imatrix", directory, tmp_path / "text.txt", made) == 2
    assert run("export", directory, tmp_path / "a.gguf", "--type", "Q4_0", "--imatrix", made) == 0
    assert gguf.GGUFReader(tmp_path / "a.gguf").fields["quantize.imatrix.chunks_count"].contents() == 3


def test_a_run_is_exported(directory, file, tmp_path):
    made, tokenizer = lfm.load(directory)
    manager = CheckpointManager(tmp_path / "run", keep=1)
    state = new_state(nnx.to_pure_dict(nnx.state(made, nnx.Param)), {}, optax.sgd(0.1))
    manager.save(1, state, {}, {"model": to_plain(made.config)})
    manager.close()
    tokenizer.save(str(tmp_path / "run" / "tokenizer.json"))
    assert run("export", tmp_path / "run", tmp_path / "a.gguf", "--type", "F32") == 0
    ours, theirs = (gguf.GGUFReader(path).tensors for path in (tmp_path / "a.gguf", file))
    assert [tensor.name for tensor in ours] == [tensor.name for tensor in theirs]
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one.data, other.data, err_msg=one.name)
    assert lfm.load(tmp_path / "a.gguf")[1].encode("the fox").ids == tokenizer.encode("the fox").ids


def test_generate_takes_a_file_as_it_takes_its_directory(directory, file, capsys):
    texts = []
    for path in (directory, file):
        assert run("generate", path, "the quick", "--max-new-tokens", 8) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


def test_convert_takes_a_file(directory, file, tmp_path):
    assert run("convert", file, tmp_path / "hf") == 0
    assert (tmp_path / "hf" / "chat_template.jinja").read_text() == TEMPLATE
    names = ("model.safetensors", "config.json")
    ours, theirs = ([path / name for name in names] for path in (tmp_path / "hf", directory))
    assert ours[0].read_bytes() == theirs[0].read_bytes()
    differing = {"initializer_range"}
    first, second = (json.loads(path.read_text()) for path in (ours[1], theirs[1]))
    assert {key for key in first | second if first.get(key) != second.get(key)} <= differing
    assert chat_template(tmp_path / "hf") == chat_template(file)


def test_a_file_has_the_name_of_its_model(file):
    assert model_name(file) == "tiny"


def test_without_the_library_its_extra_is_named(directory, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert run("export", directory, tmp_path / "a.gguf") == 2
    assert "pip install 'lfm_jax[gguf]'" in capsys.readouterr().err


def test_programs_are_exported(directory, tmp_path, capsys):
    """tests/export/ runs them."""
    sizes = ("--programs.prompts", "8", "--programs.max-len", "16")
    assert run("export", directory, tmp_path / "programs", "--format", "stablehlo", *sizes) == 0
    manifest = json.loads((tmp_path / "programs" / "manifest.json").read_text())
    assert [*manifest["programs"]] == ["decode", "prefill_8"]
    assert manifest["max_len"] == 16
    printed = capsys.readouterr()
    assert printed.out == f"wrote {tmp_path}/programs\n"
    assert "prefill_8.tpu.jaxexport" in printed.err
    for wrong, message in (((*sizes,), "--programs is for --format stablehlo"),
                           (("--format", "stablehlo", "--type", "F32"), "--type and --imatrix are of GGUF files")):
        assert run("export", directory, tmp_path / "other", *wrong) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
