"""`experiments/tool_caller/run.py --smoke`: the whole life on toy data, killed on its way."""

import copy
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))

import jax.numpy as jnp
import pytest
from tool_caller import engines, size
from tool_caller import life as lives
from tool_caller import page as pages
from tool_caller.config import HERE, Life
from verified_pairs import _message, balanced

from lfm_jax.ablate.stats import wilson
from lfm_jax.recipe import load_recipe
from lfm_jax.text.tokenizer import SPECIAL_TOKENS

ROOT = Path(__file__).parents[1]
ENGINES = ("lfm_jax", "transformers")


def test_a_life_that_is_killed_goes_on_and_ends_with_a_page(tmp_path):
    out, page = tmp_path / "out", tmp_path / "page"
    command = [sys.executable, str(ROOT / "experiments" / "tool_caller" / "run.py"), "--smoke", "--out", str(out),
               "--page", str(page)]
    done = out / "seed-0" / "done"
    with (tmp_path / "said").open("wb") as said:
        killed = subprocess.Popen(command, stderr=said)
        until = time.monotonic() + 600
        while not (done / "measured-pretrain.json").exists():
            assert killed.poll() is None, (tmp_path / "said").read_text()[-3000:]
            assert time.monotonic() < until, (tmp_path / "said").read_text()[-3000:]
            time.sleep(0.05)
        os.kill(killed.pid, signal.SIGKILL)
        killed.wait()
    before = {path: path.stat().st_mtime_ns for path in [*done.glob("*.json"), *(out / "data" / "done").glob("*.json")]}

    ended = subprocess.run(command, capture_output=True, text=True)

    assert ended.returncode == 0, ended.stderr[-3000:]
    assert {path.name for path in before} >= {"prepare.json", "size.json", "pretrain.json", "measured-pretrain.json"}
    assert {path: path.stat().st_mtime_ns for path in before} == before
    results = json.loads((page / "results.json").read_text())
    check(results["seeds"]["0"])
    text = (page / "README.md").read_text()
    assert str(tmp_path) not in text + (page / "results.json").read_text()
    assert "run.py --smoke --out OUT --page PAGE" in text
    for part in ("`measured", "None", "nan"):
        assert part not in text
    for name in ("pretrain", "prefer", "narrow"):
        assert f"| `{name}` |" in text
    for picture in ("calls.png", "bits.png", "losses.png"):
        assert (page / picture).stat().st_size > 1000


def check(steps):
    """Every station was measured, and engines with the same weights agree."""
    found = {name: record["found"] for name, record in steps.items()}
    for name, at in found.items():
        if name.startswith("measured-"):
            assert 0 < at["scores"]["text"]["bits_per_byte"][0] < 20
            assert 0 <= at["scores"]["plain"]["seen.called"][0] <= 1
    # A grammar holds what even an untaught model writes.
    assert found["measured-narrow"]["scores"]["constrained"]["json.schema_compliance"][0] == 1
    assert found["measured-narrow"]["gave"]["prefer"]["bits_per_byte"][1] is not None
    assert found["prepare"]["heldout_books"]
    assert found["pairs"]["pairs"] > 0
    sizes = found["files"]
    assert sizes["narrow-Q4_0.gguf"] < sizes["prefer-Q8_0.gguf"] < sizes["prefer-F32.gguf"]
    rows = {(row["weights"], row["engine"]): row for row in found["engines"]}
    assert {engine for _, engine in rows} == set(ENGINES)
    for row in rows.values():
        assert row["equal"] + sum(row["exceptions"].values()) == row["turns"]
        assert "unexplained" not in row["exceptions"]
    assert rows["narrow", "lfm_jax"]["equal"] == rows["narrow", "lfm_jax"]["turns"]
    assert found["served"]["equal"] == found["served"]["turns"] == 2  # One of a seen service, one of an unseen one.
    assert [row["engine"] for row in found["speed"]] == ["lfm_jax"]


def test_a_page_names_no_paths():
    given = ["--books", "/home/me/books", "--llama_cpp=/opt/python", "--seed", "1"]
    assert lives.shown(given) == ["--books", "BOOKS", "--llama-cpp=LLAMA_CPP", "--seed", "1"]


def test_seeds_of_one_life_have_its_settings(tmp_path):
    def life(*flags):
        return load_recipe(Life, [HERE / "life.yaml"], ["--out", str(tmp_path), *flags])

    lives._check(life())
    lives._check(life("--seed", "1", "--minutes.pairs", "9"))
    with pytest.raises(ValueError, match=r"begun with other settings: vocab_size 4096, not 512"):
        lives._check(life("--seed", "1", "--vocab-size", "512"))


def test_the_chosen_width_is_the_best_at_its_own_rate(monkeypatch):
    # A rate of a wide model would promise a narrow one more tokens than it will see.
    rates = {64: 5.0, 96: 15.0, 128: 45.0, 160: 60.0, 192: 70.0}
    timed = []
    monkeypatch.setattr(size, "timed_rate", lambda life, width: timed.append(width) or rates[width])
    life = load_recipe(Life, [HERE / "life.yaml"], ["--widths", *map(str, rates)])

    found = size.choose(life)

    of = {row["width"]: row for row in found["widths"]}
    for width in timed:
        assert of[width]["gflops"] == rates[width]
        alone = size.choose(dataclasses.replace(life, widths=(width,), rate=rates[width]))
        assert of[width]["expected_loss"] == alone["expected_loss"] >= found["expected_loss"]
    assert len(timed) == len({*timed}) > 1
    assert found["width"] in timed
    assert found["expected_loss"] == min(row["expected_loss"] for row in found["widths"])


def test_a_width_beside_a_fast_one_is_timed_before_it_is_left_out(monkeypatch):
    rates = {64: 35.0, 96: 36.0, 128: 57.0, 160: 57.0, 192: 61.0, 224: 61.0, 256: 61.0, 320: 61.0, 384: 61.0}
    monkeypatch.setattr(size, "timed_rate", lambda life, width: rates[width])

    assert size.choose(load_recipe(Life, [HERE / "life.yaml"], []))["width"] == 128


def test_a_python_without_llama_cpp_is_refused_at_once(tmp_path):
    life = load_recipe(Life, [HERE / "life.yaml"], ["--out", str(tmp_path), "--llama-cpp", "false"])
    with pytest.raises(ValueError, match="no Python with the module llama_cpp"):
        lives._need_llama_cpp(life)


def test_as_many_pairs_are_for_a_call_as_against_one():
    sides = {"call": [{"tool_calls": []}], "text": [{"content": ""}]}
    pairs = [{"i": i, "line": {"chosen": sides[chosen], "rejected": sides[rejected]}} for i, (chosen, rejected) in
             enumerate([["call", "call"], *[["call", "text"]] * 3, ["text", "call"], ["text", "text"]])]
    assert [pair["i"] for pair in balanced(pairs)] == [0, 1, 4, 5]
    assert [pair["i"] for pair in balanced(pairs[:4])] == [0]


def test_an_answer_that_is_another_one_without_its_marks_makes_no_pair():
    marks = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))
    assert _message({"tools": []}, "<|tool_call_start<|im_end|>|>[f()]<|tool_call_end|>", marks) is None
    assert _message({"tools": []}, "Which<|pad|> one?", marks) == {"role": "assistant", "content": "Which one?"}


def test_intervals_of_shares_stay_between_0_and_1_and_none_or_all_claim_none():
    low, high = wilson(0.5, 25)
    assert pages._cell([[0.5, 0.1, 40]], "plain") == f"0.500 [{low:.3f}, {high:.3f}]"
    assert pages._cell([[0.5, 0.1, 40]], "text") == "0.500 [0.304, 0.696]"
    assert pages._cell([[0.97, 0.02, 40]], "plain") == "0.970 [0.902, 0.991]"
    assert pages._cell([[0.0, 0.0, 40]], "plain") == "0.000"
    assert pages._cell([[1.0, 0.0, 40]], "plain") == "1.000"


def test_a_page_of_two_seeds_says_what_is_of_which(tmp_path):
    results = json.loads((HERE.parents[1] / "docs" / "tool_caller" / "results.json").read_text())
    again = copy.deepcopy(results["seeds"]["0"])
    for row in again["engines"]["found"]:
        row["turns"] = 81
    (tmp_path / "results.json").write_text(json.dumps(results | {"seeds": {"0": results["seeds"]["0"], "1": again}}))

    text = pages.write_page(tmp_path).read_text()

    assert "| 0 | `prefer` | transformers | `prefer-hf` | 80 |" in text
    assert "| 1 | `prefer` | transformers | `prefer-hf` | 81 |" in text
    assert "of the first." in text
    assert "Interrupted and continued: size, " in text


@pytest.mark.parametrize(("margin", "rounding", "why"), [
    (0.005, None, engines.TIE), (0.5, engines.WEIGHTS, engines.WEIGHTS), (0.5, None, engines.UNEXPLAINED),
    (2.0, engines.WEIGHTS, engines.UNEXPLAINED)])
def test_a_call_that_differs_is_explained_by_the_margin_of_its_first_other_token(monkeypatch, margin, rounding, why):
    def model(tokens_BT, logits):
        assert tokens_BT.tolist() == [[1, 2, 5]]  # The prompt, and what both wrote.
        return (jnp.zeros((1, 1, 12)).at[0, 0, 7].set(margin),)

    monkeypatch.setattr(engines, "generate_tokens", lambda *_, **__: [SimpleNamespace(tokens=[5, 7, 9])])
    judge = object.__new__(engines._Judge)
    judge.model, judge.stop_ids = model, [0]
    assert judge._why([1, 2], [5, 8, 9], rounding) == why
    assert judge._why([1, 2], [5, 7, 9], rounding) == engines.UNEXPLAINED  # The same tokens, and other calls.
