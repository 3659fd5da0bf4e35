"""Marks that an adapter cannot learn to write are reported before the run."""

import numpy as np
import pytest
from tuning import desk, load, recipe

from lfm_jax import init_from
from lfm_jax.post.alike import alike
from lfm_jax.post.sft import SFT
from lfm_jax.testing import tiny_tokenizer


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return desk(tmp_path_factory.mktemp("alike"))


def test_added_tokens_with_the_same_row():
    tokenizer = tiny_tokenizer()
    start, end, turn = (tokenizer.token_to_id(name) for name in
                        ("<|tool_call_start|>", "<|tool_call_end|>", "<|im_end|>"))
    table_VD = np.random.default_rng(0).normal(size=(tokenizer.get_vocab_size(), 64))
    plain = next(i for i in range(len(table_VD)) if i not in tokenizer.get_added_tokens_decoder())
    table_VD[end] = table_VD[plain] = table_VD[start] + 0.05 * table_VD[turn]
    assert alike(table_VD, {start, turn, plain}, tokenizer) == [("<|tool_call_start|>", ["<|tool_call_end|>"])]
    assert alike(table_VD, {turn, plain}, tokenizer) == []
    table_VD[end] += 0.5 * table_VD[turn]
    assert alike(table_VD, {start}, tokenizer) == []


@pytest.mark.parametrize("rank", [0, 4])
def test_an_adapter_reports_them_and_full_training_does_not(root, monkeypatch, capsys, rank):
    config = load(recipe(root, root / f"rank-{rank}", lora={"rank": rank}))
    method = SFT(config)
    weights = init_from.weights(config.init_from, config.model)
    weights["embed"] = np.ones_like(weights["embed"])
    monkeypatch.setattr(init_from, "weights", lambda *_: weights)
    assert method.weights() is weights
    reported = capsys.readouterr().err
    assert ("cannot tell <|im_end|> from" in reported) == (rank > 0)
    assert "<|im_start|>: their rows" not in reported  # No chat learns to write it.
