import shutil

import pytest
import transformers

import lfm_jax as lfm
from lfm_jax.cli import main
from lfm_jax.testing import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "model"
    tokenizer = tiny_tokenizer()
    lfm.save_hf(tiny_model(vocab_size=tokenizer.get_vocab_size()), path, tokenizer=tokenizer)
    return path


def run(*args):
    with pytest.raises(SystemExit) as status:
        main([str(a) for a in args])
    return status.value.code


def test_generate_prints_prompt_and_text_and_streams_what_generate_gives(checkpoint, capsys):
    assert run("generate", checkpoint, "the quick", "--max-new-tokens", "6") == 0
    model, tokenizer = lfm.load(checkpoint)
    text = lfm.generate(model, tokenizer, "the quick", max_new_tokens=6)[0]
    assert capsys.readouterr().out == f"the quick{text}\n"


def test_convert_writes_a_directory_that_transformers_loads(checkpoint, tmp_path, capsys):
    assert run("convert", checkpoint, tmp_path / "half", "--dtype", "bfloat16") == 0
    assert "wrote" in capsys.readouterr().out
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert model.config.hidden_size == 32
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "half")("fox").input_ids[0] == 1


@pytest.mark.parametrize("verb", ["generate", "chat", "convert", "bench", "train"])
def test_help_explains_each_verb(verb, capsys):
    assert run(verb, "--help") == 0
    assert len(capsys.readouterr().out) > 200


def test_bad_input_is_one_clear_line_and_status_2(checkpoint, tmp_path, capsys):
    assert run("generate", tmp_path / "none", "x") == 2
    assert "is not a directory" in capsys.readouterr().err
    bare = tmp_path / "bare"
    shutil.copytree(checkpoint, bare)
    (bare / "tokenizer.json").unlink()
    assert run("generate", bare, "x") == 2
    assert "no tokenizer.json" in capsys.readouterr().err
    assert run("generate", checkpoint, "x", "--temprature", "1") == 2
    assert "--temperature" in capsys.readouterr().err
    assert run("convert", checkpoint, checkpoint) == 2
    assert str(checkpoint) in capsys.readouterr().err


def test_generate_without_a_prompt_is_refused(checkpoint, capsys):
    assert run("generate", checkpoint) == 2
    assert "prompt" in capsys.readouterr().err
