import pytest
from hf_backend import MAX_LENGTH, OPTIONS, hf_backend

import lfm_jax as lfm
from lfm_jax.eval import EvalModel
from lfm_jax.testing import tiny_model, tiny_tokenizer
from lfm_jax.text.chat import DEFAULT_TEMPLATE


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A Hugging Face directory of a tiny model, with a chat template that writes bos."""
    path = tmp_path_factory.mktemp("eval") / "model"
    tokenizer = tiny_tokenizer()
    lfm.save_hf(tiny_model(vocab_size=tokenizer.get_vocab_size()), path, tokenizer=tokenizer)
    (path / "chat_template.jinja").write_text(DEFAULT_TEMPLATE)
    return path


@pytest.fixture(scope="module")
def theirs(directory):
    """lm-eval's own backend; one text at a time, as a longer neighbour there lets a text go on behind its end."""
    return hf_backend(directory, batch_size=1, max_length=MAX_LENGTH)


@pytest.fixture(scope="module")
def loaded(directory):
    return lfm.load(directory)


@pytest.fixture(scope="module")
def ours(loaded):
    return EvalModel(*loaded, **OPTIONS)
