"""`experiments/beside_generate.py` and `experiments/mismatch.py`: what is counted as sampled, and how far apart two
passes over the same tokens are."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
sys.path.insert(0, str(Path(__file__).parent / "post"))

import beside_generate
import mismatch
import numpy as np
import pytest
import torch
from chats import drawn, write
from tuning import base


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    root = tmp_path_factory.mktemp("generate")
    model = base(root / "base", layer_types=("full_attention",))
    write(root / "chats.jsonl", drawn(12))
    before = torch.get_num_threads()
    yield [str(model), str(root / "chats.jsonl"), "--prompts", "2", "--generations", "3", "--max-new-tokens", "6",
           "--seq-len", "512", "--slots", "6", "--threads", "1"]
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def chat(flags):
    args = beside_generate.parser("", "records.jsonl", rollouts=1).parse_args(flags)
    return args, beside_generate.read(args, args.prompts)


def test_both_samplers_agree_with_a_forward_pass(chat):
    args, prompts = chat
    for measure in (mismatch.ours, mismatch.theirs):
        differences = measure(args, prompts, "float32")
        assert 6 <= len(differences) <= 36
        assert differences.max() < 1e-5


def test_the_sampler_keeps_the_log_probability_of_what_follows():
    sampler, scores = mismatch.Sampler(), torch.tensor([[0.0, 1.0]])
    assert sampler(torch.tensor([[0]]), scores) is scores
    sampler(torch.tensor([[0, 1]]), torch.tensor([[2.0, 0.0]]))
    sampler.take(torch.tensor([[0, 1, 1]]))
    wanted = [np.log(np.exp(1) / (1 + np.exp(1))), np.log(1 / (1 + np.exp(2)))]
    np.testing.assert_allclose([x.item() for x in sampler.found], wanted, rtol=1e-6)


def test_rollouts_of_both_sides(chat):
    args, prompts = chat
    for make in (beside_generate.ours, beside_generate.theirs):
        lengths, cut = make(args, prompts, "float32")(prompts.prompts, 1)
        assert len(lengths) == 6
        assert 0 < cut <= lengths.count(6)
        assert min(lengths) >= 1


def test_too_few_prompts(flags):
    args = beside_generate.parser("", "records.jsonl", rollouts=1).parse_args(flags)
    with pytest.raises(ValueError, match=r"has \d+ prompts of at most 506 tokens, and 999 are needed"):
        beside_generate.read(args, 999)


def test_rates_and_ratios():
    rows = [{"dtype": "float32", "side": side, "rollout": i, "seconds": s, "answers": 10, "tokens": tokens, "cut": 5}
            for side, i, s, tokens in (("lfm_jax", 1, 1.0, 100), ("lfm_jax", 2, 2.0, 400), ("lfm_jax", 3, 1.0, 300),
                                       ("transformers", 1, 2.0, 100), ("transformers", 2, 8.0, 400),
                                       ("transformers", 3, 9.0, 300))]
    page = beside_generate.table(rows)
    assert "| float32 | lfm_jax | 3 | 200 (100 to 300) | 10.00 | 26.7 | 50% | 4.00 | 4.00 |" in page
    assert "| float32 | transformers | 3 | 50 (33 to 50) | 1.25 | 26.7 | 50% |  |  |" in page


def test_what_is_on_record_is_not_measured_again(flags, tmp_path, monkeypatch, capsys):
    measured = []

    def measure(args, prompts, dtype):
        measured.append(dtype)
        return np.array([0.0, 2e-5, 2e-3, 0.5])

    for side in ("ours", "theirs"):
        monkeypatch.setattr(mismatch, side, measure)
    monkeypatch.setattr(mismatch, "read", lambda args, count: None)
    args = [*flags, "--records", str(tmp_path / "r" / "m.jsonl"), "--figure", str(tmp_path / "f" / "m.png")]
    for dtypes in (["float32"], ["float32", "bfloat16"]):
        assert mismatch.main([*args, "--dtypes", *dtypes]) == 0
    assert measured == ["float32", "float32", "bfloat16", "bfloat16"]
    page = capsys.readouterr().out
    assert "| transformers | bfloat16 | 4 | 1.3e-01 | 1.0e-03 | 4.9e-01 | 5.0e-01 | 75.00% | 50.00% | 25.00%" in page
    assert (tmp_path / "f" / "m.png").read_bytes().startswith(b"\x89PNG")
