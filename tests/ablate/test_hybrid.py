"""The study of fewer attention layers: its arms, its numbers, and all of it on a tiny model."""

import copy
import dataclasses
import importlib
import itertools
import json
import math
import random
import shutil
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from tiny_runs import Breaking, Broken

import lfm_jax as lfm
from lfm_jax.ablate.hybrid import measure, passages
from lfm_jax.ablate.hybrid import run as runs
from lfm_jax.ablate.hybrid.page import bootstrap, share, write_page
from lfm_jax.ablate.hybrid.run import StoppedError, run_study
from lfm_jax.ablate.hybrid.study import ORIGINAL, HybridStudy, Stage, arms, counted
from lfm_jax.eval.long_context import Text, documents
from lfm_jax.init_from import write_model
from lfm_jax.post.distill import Distill
from lfm_jax.recipe import load_recipe
from lfm_jax.testing import tiny_model, tiny_tokenizer
from lfm_jax.train.processes import StopRequest
from lfm_jax.train.runner import RunResult

CONFIGS = Path(__file__).parents[2] / "configs" / "ablations"


def broken(*args):
    raise Broken


def prose(seed, lines):
    """Lines of made-up words."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(3, 9))) for _ in range(900)]
    return "".join(" ".join(draw.choices(words, k=9)) + "\n" for _ in range(lines))


def write_documents(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("hybrid")
    (root / "books").mkdir()
    for i, name in enumerate(("one", "two", "held")):
        (root / "books" / f"{name}.txt").write_text(prose(i, 120))
    write_documents(root / "wiki.jsonl", [prose(9 + i, 40) for i in range(4)])
    tokenizer = tiny_tokenizer(prose(0, 120), vocab_size=400)
    fields = dict(layer_types=("full_attention",) * 2, qk_norm=False, vocab_size=tokenizer.get_vocab_size())
    lfm.save_hf(tiny_model(vocab_size=fields["vocab_size"]), root / "hf", tokenizer)
    write_model(tiny_model(**fields), root / "model", str(root / "hf"))
    return root


def study(root, name="whole", **changes):
    fields = dict(
        name=name, question="How many?", out=str(root), model=str(root / "model"), books=str(root / "books"),
        heldout_books=("held*",), texts=(str(root / "wiki.jsonl"),), attention=(2, 1, 0), places=("chosen",),
        start_rows=4, importance_rows=2, seq_len=48, batch_size=2,
        layers=Stage(rows=8, peak_lr=1e-2), tokens=Stage(rows=8, peak_lr=1e-3),
        top_k=8, text_documents=4, recall_documents=2, lengths=(1024,), cost_contexts=(), checkpoint_every=2,
    )
    return HybridStudy(**fields | changes)


@pytest.fixture(scope="module")
def whole(root):
    page = run_study(study(root))
    return page, [json.loads(line) for line in (root / "whole" / "results.jsonl").read_text().splitlines()]


def test_all_of_the_study_on_a_tiny_model(root, whole):
    page, records = whole
    found = {record["arm"]: record for record in records if record["kind"] == "arm"}
    assert list(found) == [ORIGINAL, "k1-chosen", "k0"]
    weighed = next(record["kl"] for record in records if record["kind"] == "importance")
    assert found["k1-chosen"]["attention_at"] == [int(max(weighed, key=weighed.get))]
    assert [len(arm["curve"]) for arm in list(found.values())[1:]] == [4, 4]
    assert not (root / "whole" / "arms" / "k0" / "run").exists(), "weights go once they are measured"
    text = page.read_text()
    assert all(f"| {name} |" in text for name in found)
    nats = found["k0"]["recall"]["needle"]["1024"]["nats"]
    assert f"| k0 | {sum(nats) / len(nats):.1f} [" in text.partition("Nats of the right answer.")[2]
    assert {file.name for file in page.parent.iterdir()} == {"README.md", "text.png", "recall.png", "layers.png"}
    assert str(root) not in text + (root / "whole" / "results.jsonl").read_text()


def test_selections_are_compared_document_by_document(whole, tmp_path):
    records = copy.deepcopy(whole[1])
    other = copy.deepcopy(next(record for record in records if record.get("arm") == "k1-chosen"))
    other |= {"arm": "k1-even", "place": "even"}
    for of in other["text"].values():  # Twice the perplexity of each document.
        of["nats"] = [x + n * math.log(2) for x, n in zip(of["nats"], of["tokens"], strict=True)]
    for of in (of for by_length in other["recall"].values() for of in by_length.values()):
        of["nats"] = [x - 3 for x in of["nats"]]
    again = copy.deepcopy(other) | {"place": "chosen", "arm": "k1-chosen", "seed": 1}  # Is compared with none.
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(x) + "\n" for x in [*records, other, again]))
    text = write_page(tmp_path / "results.jsonl", tmp_path / "report").read_text()
    rows = text.partition("## Which layers")[2].partition("##")[0].strip().splitlines()[4:]
    assert rows == ["| k1-even and k1-chosen | 2 [2, 2] | 2 [2, 2] | -3.0 [-3.0, -3.0] | -3.0 [-3.0, -3.0] |"]
    assert "## Which layers" not in whole[0].read_text()


def test_the_original_is_measured_as_it_is_to_the_bit(root, whole):
    model, tokenizer = lfm.load(root / "model")
    asked = study(root)
    original = next(record for record in whole[1] if record.get("arm") == ORIGINAL)
    assert measure.measure_text(asked, model, measure.text_documents(asked, tokenizer)) == original["text"]
    assert "heldout_loss" not in original


def test_a_study_that_breaks_off_ends_with_the_same_numbers(root, whole, monkeypatch):
    """In the middle of a run, and between two measurements; what is done is not done again."""
    (root / "broken").mkdir()
    for name in ("study.yaml", "data", "original", "start", "layers", "layers.json", "importance.json"):
        bring = shutil.copytree if (root / "whole" / name).is_dir() else shutil.copy
        bring(root / "whole" / name, root / "broken" / name)
    write_documents(root / "changed.jsonl", [prose(i, 30) for i in range(100)])  # What was measured first counts.
    asked = study(root, "broken", attention=(0,), texts=(str(root / "changed.jsonl"),))
    train_data, measured = Distill.train_data, measure.measure_recall
    with pytest.raises(ValueError, match=r"holds another study(.|\n)*name: 'whole' there, 'broken' here"):
        run_study(asked)
    (root / "broken" / "study.yaml").unlink()
    monkeypatch.setattr(Distill, "train_data", lambda self, rows: Breaking(train_data(self, rows), 4))
    with pytest.raises(Broken):
        run_study(asked)
    monkeypatch.setattr(Distill, "train_data", train_data)

    monkeypatch.setattr(measure, "measure_recall", broken)
    with pytest.raises(Broken):
        run_study(asked)
    monkeypatch.setattr(measure, "measure_recall", measured)
    for name in ("importance", "started"):
        monkeypatch.setattr(runs, name, broken)
    monkeypatch.setattr(measure, "measure_text", broken)
    run_study(asked)
    ours, theirs = ([record for record in map(json.loads, (root / name / "results.jsonl").read_text().splitlines())
                     if record.get("arm") in (ORIGINAL, "k0")] for name in ("broken", "whole"))
    assert ours == theirs


def test_time_that_is_over_while_a_run_ends_is_not_forgotten(root, whole, monkeypatch):
    (root / "slice").mkdir()
    for name in ("data", "original", "start"):
        shutil.copytree(root / "whole" / name, root / "slice" / name)

    reached = []

    def ended(config):
        """A run whose last step is made when it is asked to stop."""
        reached.append(config)
        with StopRequest() as stop:
            while not stop.due():
                time.sleep(0.01)
        return RunResult(Path(config.run_dir), config.steps, config.steps, {})

    monkeypatch.setattr(runs, "tune", ended)
    with pytest.raises(StoppedError):
        run_study(study(root, "slice", minutes=0.05))
    assert reached
    assert not (root / "slice" / "layers.json").exists()


def test_arms_and_their_seeds(root):
    places = ("even", "chosen", "from_first")
    asked = study(root, attention=(6, 3, 2, 0), places=places, repeated=("k2-chosen",), seeds=2)
    weights = {i: float(i == 4) + 0.1 * i for i in range(6)}
    found = arms(asked, 6, weights)
    assert [(arm.directory, arm.attention_at) for arm in found] == [
        ("original", (0, 1, 2, 3, 4, 5)), ("k3-even", (1, 3, 5)), ("k3-chosen", (3, 4, 5)),
        ("k3-from_first", (0, 2, 4)), ("k2-even", (1, 4)), ("k2-chosen", (4, 5)), ("k2-from_first", (0, 3)),
        ("k0", ()), ("k2-chosen-seed1", (4, 5)),
    ]
    with pytest.raises(ValueError, match="texts has another 'books'; name each file by its kind, and none 'books'"):
        study(root, texts=("a/books.jsonl",))
    with pytest.raises(ValueError, match=r"has 7, and the model has 6"):
        arms(study(root, attention=(7,)), 6, weights)
    with pytest.raises(ValueError, match=r"k9; the arms are k2-chosen, k1-chosen, k0"):
        arms(study(root, repeated=("k9",)), 3, weights)
    with pytest.raises(ValueError, match=r"taps is 0(.|\n)*books is empty(.|\n)*layers.rows 8 is not a multiple of"):
        study(root, taps=0, books="", batch_size=3)


def test_an_answer_is_right_if_greedy_decoding_writes_it(root):
    model, tokenizer = lfm.load(root / "model")
    prompt = tokenizer.encode(prose(3, 2)).ids[:20]
    graphdef, params = nnx.split(model, nnx.Param)
    logits_of = jax.jit(lambda tokens: nnx.merge(graphdef, params)(tokens)[0])

    def logits(tokens):
        return np.asarray(logits_of(np.array([tokens + [0] * (32 - len(tokens))], np.int32))[0, len(tokens) - 1])

    tokens = list(prompt)
    for _ in range(3):
        tokens.append(int(np.argmax(logits(tokens))))
    score = measure.Scorer(model, (32,))
    (logprobs, hit), (_, miss) = score([tokens, [*tokens[:-1], (tokens[-1] + 1) % 400]])
    assert hit[-3:].all()
    assert list(miss[-3:]) == [True, True, False]
    wanted = logits(tokens[:-1])
    assert logprobs[-1] == pytest.approx(float(wanted[tokens[-1]] - np.logaddexp.reduce(wanted)), abs=1e-4)


def test_needles_of_paragraphs_fill_the_length_and_stand_where_they_should(root, tmp_path):
    write_documents(tmp_path / "paragraphs.jsonl", [prose(i, 12).replace("\n", " ") for i in range(150)])
    count = len(prose(0, 1).split())

    def tokens(text):
        return 2 * len(text.split())

    write_documents(tmp_path / "short.jsonl", ["Two lines.", "No more."])
    with pytest.raises(ValueError, match=r"short.jsonl has 2 lines"):
        measure.haystack(tmp_path / "short.jsonl")
    text = Text(measure.haystack(tmp_path / "paragraphs.jsonl"), "paragraphs")
    for i, doc in enumerate(documents("needle", 512, 11, text, tokens)):
        assert 512 - 32 - 4 * count < tokens(doc.prompt) <= 512 - 32
        before, _, after = doc.prompt.partition("The secret number of")
        assert tokens(before) / (tokens(before) + tokens(after)) == pytest.approx(i / 10, abs=0.2)


def test_books_that_have_too_few_passages_are_refused(tmp_path):
    few = itertools.cycle([("one", [1]), ("two", [2])])
    with pytest.raises(ValueError, match=r"2 different passages, and tokens.rows asks for 3"):
        passages.write_passages(tmp_path / "tokens.jsonl", few, 3)
    assert not (tmp_path / "tokens.jsonl").exists()


def test_passages_are_whole_rows_of_books_and_nothing_is_held_out_twice(root, tmp_path):
    tokenizer = lfm.load(root / "model")[1]
    books = passages.Books(root / "books", ("held*",))
    assert len(books.train) == 2
    found = passages.drawn(books.train, tokenizer, 48, "1 x")
    text, ids = next(found)
    assert len(ids) == 49
    assert any(text in book for book in books.train)
    assert tokenizer.encode(text, add_special_tokens=False).ids == ids
    assert next(passages.drawn(books.train, tokenizer, 48, "1 x"))[0] == text
    passages.write_passages(tmp_path / "x.jsonl", found, 30)
    assert len(set((tmp_path / "x.jsonl").read_text().splitlines())) == 30
    with pytest.raises(ValueError, match=r"no file in .* is named so"):
        passages.Books(root / "books", ("nobody*",))
    with pytest.raises(ValueError, match="3 of them held out"):
        passages.Books(root / "books", ("*",))
    with pytest.raises(ValueError, match="none has 99999 tokens"):
        next(passages.drawn(["short\n"], tokenizer, 99998, "1"))


@pytest.mark.parametrize(("lines", "message"), [
    ([], "has no document"),
    (['{"text": "a"}', "a"], r"x.jsonl:2 is no JSON object with a text; write \{\"text\": \"...\"\}"),
    (['{"text": 1}'], "x.jsonl:1 is no JSON object"),
    (['{"text": "Robert <unk> is"}'], "x.jsonl:1 has <unk> in the place of rare words"),
])
def test_documents_that_cannot_be_measured_on(lines, message, tmp_path):
    (tmp_path / "x.jsonl").write_text("".join(f"{line}\n" for line in lines))
    with pytest.raises(ValueError, match=message):
        passages.documents(tmp_path / "x.jsonl")


def test_texts_come_of_the_questions_that_are_asked_about_them(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(CONFIGS.parents[1] / "experiments"))
    eval_files = importlib.import_module("eval_files")
    text = "One\u2028line. Question: which?"
    (tmp_path / "llm_foundry").mkdir()
    rows = [{"query": f"Passage: {text}\nQuestion: {ask}?"} for ask in ("why", "how")]
    (tmp_path / "llm_foundry" / "boolq.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert eval_files.main([str(tmp_path), str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert said.out == "texts/wikipedia: 1 documents\n"
    assert "texts/abstracts: " in said.err
    assert passages.documents(tmp_path / "out" / "texts" / "wikipedia.jsonl") == [text]


def test_an_interval_is_that_of_documents_drawn_again():
    values = np.random.default_rng(0).normal(size=400)
    found = bootstrap(lambda i: values[i].mean(1), 400)
    half = 1.96 * values.std() / 20
    assert found.mean == pytest.approx(values.mean())
    assert (found.mean - found.low, found.high - found.mean) == (pytest.approx(half, rel=0.1),) * 2


def test_a_share_has_an_interval_also_where_none_or_all_are_right():
    assert share([False] * 11).form(".2f") == "0.00 [0.00, 0.26]"
    assert share([True] * 11).form(".2f") == "1.00 [0.74, 1.00]"
    assert share([1.0, 0.0] * 50).form(".3f") == "0.500 [0.404, 0.596]"


@pytest.mark.parametrize(("sizes", "trained"), [((), 13), (("hybridise-gpu",), 17)])
def test_the_shipped_study_is_valid_and_its_cost_is_counted(sizes, trained):
    files = [CONFIGS / "hybridise.yaml", *(CONFIGS / "sizes" / f"{name}.yaml" for name in sizes)]
    asked = load_recipe(HybridStudy, files)
    smol = lfm.ModelConfig(
        layer_types=("full_attention",) * 30, vocab_size=49152, hidden_size=576, ffn_size=1536, num_heads=9,
        num_kv_heads=3, qk_norm=False, max_position=8192)
    found = counted(asked, smol)
    assert len(arms(asked, 30, dict.fromkeys(range(30), 0.0))) == 1 + trained
    one = counted(dataclasses.replace(asked, attention=(0,), repeated=()), smol)
    assert one["layers"] == found["layers"]
    assert trained - 2 < found["tokens"] / one["tokens"] < trained + 2
