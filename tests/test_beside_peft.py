"""`experiments/beside_peft.py`: both sides learn the same of the same chats, and the table says what they took."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
sys.path.insert(0, str(Path(__file__).parent / "post"))

import beside_peft
from chats import drawn, write
from transformers import LlamaConfig, LlamaForCausalLM
from tuning import base

from lfm_jax.adapters.config import LoRAConfig
from lfm_jax.adapters.targets import named_targets
from lfm_jax.testing import tiny_config

SIZES = {"lfm_jax": 1, "peft": 3}


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    yield 1
    torch.set_num_threads(before)


def test_chats_of_packed_rows():
    batch = {"tokens": [[5, 6, 7, 8, 0], [9, 0, 0, 0, 0]], "targets": [[-1, 7, -1, 3, -1], [4, -1, -1, -1, -1]],
             "segment_ids": [[1, 1, 2, 2, 0], [1, 0, 0, 0, 0]]}
    found = beside_peft.documents({name: np.array(rows) for name, rows in batch.items()})
    none = beside_peft.IGNORE
    assert found == [([5, 6, 7], [none, none, 7]), ([7, 8, 3], [none, none, 3]), ([9, 4], [none, 4])]


def test_both_sides_take_the_same_steps(tmp_path, monkeypatch, one_thread):
    model = base(tmp_path / "base", layer_types=("full_attention",))
    chats = write(tmp_path / "chats.jsonl", drawn(24))
    flags = ["--rows", "2", "--seq-len", "384", "--steps", "2", "--threads", str(one_thread)]
    args = beside_peft.parsed([str(model), str(chats), *flags, "--folder", str(tmp_path)])
    monkeypatch.setattr(beside_peft, "LEARNING", beside_peft.LEARNING | {"peak_lr": 0.02})
    beside_peft.prepare(args, tmp_path)
    losses = []
    for side, make in zip(SIZES, (beside_peft.ours, beside_peft.theirs), strict=True):
        args.size = SIZES[side]
        take = make(args, "float32")
        losses.append([take(i) for i in range(3)])
    np.testing.assert_allclose(*losses, rtol=2e-5)
    args.size = 2
    unlearnt = beside_peft.ours(args, "float32")
    assert abs(unlearnt(2) - losses[0][2]) > 1e-3


def test_names_of_matrices_in_llama():
    ours = named_targets(tiny_config(layer_types=("full_attention",) * 2, qk_norm=False), LoRAConfig())
    theirs = LlamaForCausalLM(LlamaConfig(
        vocab_size=8, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2))
    linear = {name for name, module in theirs.named_modules() if isinstance(module, torch.nn.Linear)}
    assert {beside_peft.their_name(name, theirs) for name in ours} == linear - {"lm_head"}
    assert beside_peft.their_name("blocks.1.feed_forward.w2", theirs) == "model.layers.1.mlp.down_proj"


def test_what_is_on_record_is_not_measured_again(tmp_path, monkeypatch, capsys):
    model, chats = base(tmp_path / "base"), write(tmp_path / "chats.jsonl", drawn(8))
    records = tmp_path / "records" / "peft.jsonl"
    measured = []

    def beside(args, folder, dtype, sizes):
        measured.append(dtype)
        steps = [{"seconds": s, "loss": 4.0 - s, "peak": 10.0 * s} for s in (9.0, 1.0, 2.0, 3.0)]
        slower = [step | {"seconds": 2 * step["seconds"]} for step in steps]
        return {"tokens": [100] * 4, "chats": [2] * 4, "lfm_jax": steps, "peft": slower}

    monkeypatch.setattr(beside_peft, "beside", beside)
    monkeypatch.setattr(beside_peft, "prepare", lambda args, folder: None)
    args = [str(model), str(chats), "--records", str(records), "--ours", "1", "--theirs", "2", "--dtypes"]
    for dtypes in (["float32"], ["float32", "bfloat16"], ["float32", "bfloat16"]):
        assert beside_peft.main([*args, *dtypes]) == 0
    assert measured == ["float32", "bfloat16"]
    page = capsys.readouterr().out
    assert "| float32 | lfm_jax | 1 | -5.00000 | 1.00000 | 2.00 (1.00 to 3.00) | 50 | 2.00 | 30 | 90 |" in page
    assert "| bfloat16 | peft | 2 | -5.00000 | 1.00000 | 4.00 (2.00 to 6.00) | 25 |  | 30 | 90 |" in page
    assert len([json.loads(line) for line in records.read_text().splitlines()]) == 2
    assert beside_peft.main([*args[:-1], "--rank", "4", "--dtypes", "float32"]) == 0
    assert measured[2:] == ["float32"]


@pytest.mark.parametrize(("side", "chosen"), [("lfm_jax", 2), ("peft", 8)])
def test_the_fastest_size_is_taken(side, chosen):
    args = beside_peft.parsed(["model", "chats", "--rows", "4"])
    done = [{"what": "trial", "dtype": "float32", "side": side, "size": size, "seconds": seconds}
            for size, seconds in ((1, 3.0), (2, 2.0), (4, 2.5), (8, 1.0))]
    assert beside_peft.fastest(args, Path("nowhere"), side, "float32", done, done.append) == chosen
