"""What verbs print and write, and what they refuse."""

import json
import shutil

import jax
import numpy as np
import pytest
import transformers
from flax import nnx
from running import run

import lfm_jax as lfm
from lfm_jax import loading
from lfm_jax.engine.request import LOGITS_NOT_FINITE
from lfm_jax.testing import tiny_model, tiny_tokenizer
from lfm_jax.text.chat import DEFAULT_TEMPLATE


def test_generate_prints_prompt_and_text_and_streams_what_generate_gives(checkpoint, capsys):
    assert run("generate", checkpoint, "the quick", "--max-new-tokens", "6") == 0
    model, tokenizer = lfm.load(checkpoint)
    text = lfm.generate(model, tokenizer, "the quick", max_new_tokens=6)[0]
    assert capsys.readouterr().out == f"the quick{text}\n"


def test_generate_and_batch_with_narrow_weights(checkpoint, tmp_path, capsys):
    assert run("generate", checkpoint, "the quick", "--max-new-tokens", "6", "--quantize", "w8a8") == 0
    model, tokenizer = lfm.load(checkpoint)
    text = lfm.generate(lfm.quantize(model, "w8a8"), tokenizer, "the quick", max_new_tokens=6)[0]
    assert capsys.readouterr().out == f"the quick{text}\n"
    assert run("generate", checkpoint, "the quick", "--quantize", "int3") == 2
    assert "int4:32" in capsys.readouterr().err
    request = {"custom_id": "1", "url": "/v1/completions", "body": {"prompt": "the quick", "max_tokens": 6,
                                                                  "temperature": 0}}
    (tmp_path / "in.jsonl").write_text(json.dumps(request))
    flags = ["--quantize", "w8a8", "--engine.slots", "1", "128", "--engine.chunk", "64", "--engine.kv", "int8"]
    assert run("batch", checkpoint, tmp_path / "in.jsonl", tmp_path / "out.jsonl", *flags) == 0
    told = capsys.readouterr().err
    _, params = nnx.split(lfm.quantize(model, "w8a8"), nnx.Param)
    size = sum(x.nbytes for x in jax.tree.leaves(nnx.to_pure_dict(params)))
    assert f"{size / 2**20:10,.1f} MiB  parameters" in told
    [answer] = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert answer["response"]["status_code"] == 200


@pytest.mark.parametrize(("flags", "problem"), [
    (("--max-new-tokens", "9999"), "with max_new_tokens 9999 more than"), (("--max-new-tokens", "0"), "at least 1"),
    (("--stop", ""), "at least one character"),
])
def test_generate_prints_nothing_of_what_it_refuses(checkpoint, capsys, flags, problem):
    for prompts in (["the quick"], ["the quick", "brown fox"]):
        assert run("generate", checkpoint, *prompts, *flags) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert problem in err


def test_damaged_weights_are_one_line_below_what_came_of_them(tmp_path, capsys):
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=tokenizer.get_vocab_size(), tie_embedding=False)
    [unread] = tokenizer.encode("\n", add_special_tokens=False).ids
    model.embed[...] = model.embed[...].at[unread].set(np.nan)
    lfm.save_hf(model, tmp_path / "broken", tokenizer=tokenizer)
    assert run("generate", tmp_path / "broken", "the quick\n") == 2
    assert capsys.readouterr() == ("the quick\n\n", f"lfm: {LOGITS_NOT_FINITE}\n")
    assert run("classify", tmp_path / "broken", "the quick", "--labels", "fox", "dog") == 2
    assert capsys.readouterr() == ("", f"lfm: {LOGITS_NOT_FINITE}\n")


def test_convert_writes_a_directory_that_transformers_loads(checkpoint, tmp_path, capsys):
    assert run("convert", checkpoint, tmp_path / "half", "--dtype", "bfloat16") == 0
    assert "wrote" in capsys.readouterr().out
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert model.config.hidden_size == 32
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "half")("fox").input_ids[0] == 1


def test_bad_input_is_one_clear_line_and_status_2(checkpoint, tmp_path, capsys):
    assert run("generate", tmp_path / "none", "x") == 2
    assert "is not a directory" in capsys.readouterr().err
    bare = tmp_path / "bare"
    shutil.copytree(checkpoint, bare)
    (bare / "tokenizer.json").unlink()
    assert run("generate", bare, "x") == 2
    assert "has no tokenizer;" in capsys.readouterr().err
    assert run("generate", checkpoint, "x", "--temprature", "1") == 2
    assert "--temperature" in capsys.readouterr().err
    assert run("convert", checkpoint, checkpoint) == 2
    assert str(checkpoint) in capsys.readouterr().err


def test_generate_without_a_prompt_is_refused(checkpoint, capsys):
    assert run("generate", checkpoint) == 2
    assert "prompt" in capsys.readouterr().err


SCHEMA = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}}, "required": ["n"],
          "additionalProperties": False}


def test_extract_prints_a_line_of_json_for_each_text(checkpoint, tmp_path, capsys):
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps(SCHEMA))
    texts = ["the quick", "brown fox"]
    assert run("extract", checkpoint, *texts, "--schema", schema, "--max-new-tokens", "24") == 0
    lines = capsys.readouterr().out.splitlines()
    model, tokenizer = lfm.load(checkpoint)
    assert [json.loads(line) for line in lines] == lfm.extract(model, tokenizer, texts, SCHEMA, max_new_tokens=24)
    assert all(0 <= json.loads(line)["n"] <= 9 for line in lines)


def test_classify_prints_the_likeliest_label_first(checkpoint, capsys):
    labels = ["fox", "dog", "lazy"]
    assert run("classify", checkpoint, "the quick", "--labels", *labels) == 0
    printed = json.loads(capsys.readouterr().out)
    model, tokenizer = lfm.load(checkpoint)
    expected = lfm.classify(model, tokenizer, "the quick", labels, template=DEFAULT_TEMPLATE)
    assert printed == {label: round(chance, 6) for label, chance in expected.items()}
    assert list(printed.values()) == sorted(printed.values(), reverse=True)


def test_a_template_that_cannot_be_read_is_named(checkpoint, tmp_path, capsys):
    path = tmp_path / "model"
    shutil.copytree(checkpoint, path)
    for content, problem in ((b"\xff\xfe", "chat_template.jinja is no UTF-8 text"), (b"{% for %}", "not valid Jinja")):
        (path / "chat_template.jinja").write_bytes(content)
        for command in (["chat", path], ["classify", path, "x", "--labels", "a", "b"]):
            assert run(*command) == 2
            out, err = capsys.readouterr()
            assert (out, err.count("\n")) == ("", 1)
            assert problem in err


def test_extract_and_classify_refuse_before_they_load(checkpoint, tmp_path, capsys):
    schema = tmp_path / "schema.json"
    assert run("extract", checkpoint, "--schema", schema) == 2
    assert "at least one text" in capsys.readouterr().err
    assert run("extract", "nowhere", "x", "--schema", schema) == 2
    assert f"schema {schema} cannot be read: No such file" in capsys.readouterr().err
    for content, problem in ((b"{", "is not valid JSON"), (b"[1]", "holds a list; expected a JSON object"),
                             (b'{"not":' * 9999, "is nested too deeply"), (b"\xff{}", "is not valid JSON: 'utf-8'"),
                             (b"\xef\xbb\xbf[1]", "holds a list")):  # A byte order mark is no part of it.
        schema.write_bytes(content)
        assert run("extract", "nowhere", "x", "--schema", schema) == 2
        assert f"schema {schema} {problem}" in capsys.readouterr().err
    assert run("classify", checkpoint, "--labels", "a", "b") == 2
    assert "at least one text" in capsys.readouterr().err
    assert run("classify", checkpoint, "x", "--labels", "a") == 2
    assert "at least two different texts" in capsys.readouterr().err


def test_batch_refuses_before_it_loads(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(loading, "load", lambda *args: pytest.fail("a model was loaded for nothing"))
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    assert run("batch", checkpoint, source, target) == 2
    assert f"{source} cannot be read: No such file" in capsys.readouterr().err
    source.write_text("{}\n")
    assert run("batch", tmp_path / "none", source, target) == 2
    assert "is not a directory" in capsys.readouterr().err
    assert not target.exists()
    answered = '{"id": "line-0", "custom_id": null, "response": null, "error": {"code": "bad_line"}}\n'
    target.write_text(answered)
    assert run("batch", checkpoint, source, target) == 1
    assert "1 with an error" in capsys.readouterr().out
    assert target.read_text() == answered
