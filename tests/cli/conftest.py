import pytest

import lfm_jax as lfm
from lfm_jax.testing import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A Hugging Face directory of a tiny model."""
    path = tmp_path_factory.mktemp("cli") / "model"
    tokenizer = tiny_tokenizer()
    lfm.save_hf(tiny_model(vocab_size=tokenizer.get_vocab_size()), path, tokenizer=tokenizer)
    return path
