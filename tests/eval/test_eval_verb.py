"""`lfm eval` and `lfm eval compare`, on tasks over files."""

import json
import math
import random
import subprocess
import sys
import time

import numpy as np
import pytest
from running import run
from toy_tasks import TASKS, rows, toy_tasks

import lfm_jax as lfm
from lfm_jax.cli import main
from lfm_jax.eval import compare as comparing
from lfm_jax.eval import lm
from lfm_jax.eval.tasks import load_tasks
from lfm_jax.testing import tiny_model, tiny_tokenizer

QUICK = ["--max-length", "256", "--slots", "2", "--batch-tokens", "512"]


def read(directory):
    return json.loads((directory / "results.json").read_text())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Tasks whose data files have names relative to them."""
    folder = toy_tasks(tmp_path_factory.mktemp("data"))
    for path in folder.glob("*.yaml"):
        path.write_text(path.read_text().replace(f"{folder}/", ""))
    return folder


@pytest.fixture(scope="module")
def command(data, directory):
    """The arguments of an evaluation."""

    def make(output, *args, tasks=tuple(TASKS), model=directory):
        return ["eval", model, "--tasks", ",".join(tasks), "--data", data, "--output", output, *QUICK, *args]

    return make


@pytest.fixture(scope="module")
def evaluate(command):
    return lambda *args, **options: run(*command(*args, **options))


@pytest.fixture(scope="module")
def whole(evaluate, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "out"
    assert evaluate(output) == 0
    return output


def test_a_page_and_results(whole, directory):
    results = read(whole)
    assert results["results"].keys() == set(TASKS)
    assert results["lfm_jax"]["settings"]["max_length"] == 256
    assert (whole / "samples_toy_choice.jsonl").read_text().count("\n") == len(rows())
    page = (whole / "report.md").read_text()
    acc = results["results"]["toy_choice"]["acc,none"]
    assert f"| toy_choice | Yaml | 0 | 8 | none | acc ↑ | {acc:.4f} |" in page
    assert results["lfm_jax"]["model_hash"] in page
    assert "| limit | all documents |" in page


def test_killed_at_any_moment_it_repeats_nothing(command, whole, tmp_path, monkeypatch, capsys):
    class KilledError(Exception):
        pass

    asked = []
    real = lm.run

    def watched(model, tokenizer, tasks, *options):
        asked.append(len(tasks))
        for i, found in enumerate(real(model, tokenizer, tasks, *options)):
            if len(asked) == 1 and i == 3:
                raise KilledError
            yield found

    monkeypatch.setattr(lm, "run", watched)
    with pytest.raises(KilledError):
        main([str(arg) for arg in command(tmp_path / "out")])
    kept = (tmp_path / "out" / "answers.jsonl").read_bytes()
    (tmp_path / "out" / "answers.jsonl").write_bytes(kept + b'{"key": "4f')
    assert not (tmp_path / "out" / "results.json").exists()
    capsys.readouterr()
    assert run(*command(tmp_path / "out")) == 0
    assert asked == [8, 5]
    assert f"loglikelihood: {3 * len(rows())} requests, {3 * len(rows())} of them answered before" in (
        capsys.readouterr().err)
    assert read(tmp_path / "out")["results"] == read(whole)["results"]
    assert (tmp_path / "out" / "answers.jsonl").read_bytes().startswith(kept)


def test_a_process_that_is_killed_and_started_again(command, whole, tmp_path):
    output = tmp_path / "out"
    answers = output / "answers.jsonl"
    args = [str(arg) for arg in command(output)]
    with subprocess.Popen([sys.executable, "-m", "lfm_jax.cli", *args], stderr=subprocess.DEVNULL) as process:
        while not (answers.exists() and b"\n" in answers.read_bytes()):
            assert process.poll() is None
            time.sleep(0.005)
        process.kill()
    assert process.returncode == -9
    kept = answers.read_bytes()
    kept = kept[: kept.rindex(b"\n") + 1]
    assert run(*args) == 0
    keys = [json.loads(line)["key"] for line in answers.read_bytes().splitlines()]
    wanted = [json.loads(line)["key"] for line in (whole / "answers.jsonl").read_bytes().splitlines()]
    assert answers.read_bytes().startswith(kept)
    assert 0 < kept.count(b"\n") < len(keys) == len(set(keys))
    assert set(keys) == set(wanted)
    assert read(output)["results"] == read(whole)["results"]


def test_shards_answer_everything_once(evaluate, whole, tmp_path, monkeypatch):
    output = tmp_path / "out"
    for shard in ("0/2", "1/2"):
        assert evaluate(output, "--num-fewshot", "1", "--shard", shard) == 0
        assert not (output / "results.json").exists()
    parts = [[json.loads(line)["key"] for line in (output / f"answers-{i}-of-2.jsonl").read_text().splitlines()]
             for i in range(2)]
    assert all(parts)
    keys = [key for part in parts for key in part]
    assert len(keys) == len(set(keys))
    monkeypatch.setattr("lfm_jax.eval.scoring.Scorer._on_copy", lambda *_: iter(()))
    monkeypatch.setattr(lm, "run", lambda model, tokenizer, tasks, *_: iter(tasks and pytest.fail("asked again")))
    assert evaluate(output, "--num-fewshot", "1") == 0
    monkeypatch.undo()
    assert evaluate(tmp_path / "alone", "--num-fewshot", "1") == 0
    assert read(output)["results"] == read(tmp_path / "alone")["results"]
    assert (tmp_path / "alone" / "answers.jsonl").read_text().count("\n") == len(keys)
    assert (output / "answers.jsonl").read_bytes() == b""


def test_narrow_weights_are_another_model(evaluate, whole, tmp_path):
    assert evaluate(tmp_path / "out", "--quantize", "int4", tasks=["toy_choice"]) == 0
    narrow, full = read(tmp_path / "out"), read(whole)
    assert narrow["lfm_jax"]["settings"]["quantize"] == "int4"
    assert narrow["lfm_jax"]["model_hash"] != full["lfm_jax"]["model_hash"]
    assert "| quantize | int4 |" in (tmp_path / "out" / "report.md").read_text()


def test_chat_shots_limit_and_predictions_alone(evaluate, tmp_path, directory):
    output = tmp_path / "out"
    assert evaluate(output, "--predict-only", "--limit", "3", "--num-fewshot", "1", "--apply-chat-template",
                    "--system-message", "Think of foxes.", tasks=["toy_choice"]) == 0
    samples = [json.loads(line) for line in (output / "samples_toy_choice.jsonl").read_text().splitlines()]
    prompt = samples[0]["arguments"]["gen_args_0"]["arg_0"]
    assert prompt.startswith("<|startoftext|><|im_start|>system\nThink of foxes.")
    assert prompt.count("<|im_start|>assistant\n") == 2
    assert len(samples) == 3
    assert "nothing was scored" in (output / "report.md").read_text()
    assert run("eval", "compare", output, output) == 2


def test_compare(evaluate, whole, tmp_path, capsys):
    tokenizer = tiny_tokenizer()
    lfm.save_hf(tiny_model(3, vocab_size=tokenizer.get_vocab_size()), tmp_path / "other", tokenizer=tokenizer)
    assert evaluate(tmp_path / "out", model=tmp_path / "other") == 0
    capsys.readouterr()
    assert run("eval", "compare", whole, tmp_path / "out") == 0
    table = capsys.readouterr().out
    one, other = (read(each)["results"]["toy_perplexity"]["bits_per_byte,none"] for each in (whole, tmp_path / "out"))
    assert f"| toy_perplexity | none | bits_per_byte | 8 | {one:.4f} | {other:.4f} | {other - one:+.4f} |" in table
    assert "| 8 | 0.0000 | 0.0000 | +0.0000 | +0.0000 to +0.0000 | nothing can be told apart |" in table
    assert evaluate(whole, model=tmp_path / "other") == 2  # The results of another model are not overwritten.
    assert "has the results of another model" in capsys.readouterr().err
    assert evaluate(tmp_path / "out", "--limit", "5", model=tmp_path / "other") == 0
    assert run("eval", "compare", whole, tmp_path / "out") == 2
    assert "toy_choice has 8 documents in the first and 5 in the second" in capsys.readouterr().err


@pytest.mark.parametrize(("shift", "higher", "verdict"), [
    (0.3, True, "better"), (-0.3, True, "worse"), (0.3, False, "worse"), (0.3, None, "higher"),
    (0.0, True, comparing.CANNOT_TELL),
])
def test_intervals(shift, higher, verdict):
    draw = np.random.default_rng(1)
    one = draw.normal(size=200)
    other = one + shift + draw.normal(scale=0.5, size=200)
    scores = float(one.mean()), float(other.mean())
    found = comparing._difference(("t", "acc", "none"), scores, [one.tolist(), other.tolist()], higher)
    error = (other - one).std(ddof=1) / math.sqrt(200)
    centre = scores[1] - scores[0]
    assert [found.low, found.high] == pytest.approx([centre - 1.96 * error, centre + 1.96 * error], abs=0.15 * error)
    assert found.verdict == verdict
    other_score = comparing._difference(("t", "f1", "none"), (0.5, 0.6), [one.tolist(), other.tolist()], higher)
    assert other_score.verdict == "not a mean over several documents: no interval"


@pytest.mark.parametrize("values", [([1.0], [0.0]), ([[1, 1, 7], [1, 1, 7]], [[0, 1, 7], [0, 1, 7]])])
def test_one_document_or_one_chat_says_nothing(values):
    found = comparing._difference(("t", "acc", "none"), (1.0, 0.0), values, True)
    assert (found.low, found.verdict) == (None, "not a mean over several documents: no interval")


def test_data_on_disk_takes_the_place_of_a_shipped_data_set(tmp_path, monkeypatch):
    """The shipped piqa without its labels would score 0 in silence."""
    import lm_eval.tasks

    shipped = f"{lm_eval.tasks.__path__[0]}/piqa"
    monkeypatch.setattr("lfm_jax.eval.tasks.TaskManager", lambda include_path, include_defaults: (
        lm_eval.tasks.TaskManager(include_path=shipped, include_defaults=False)))
    (tmp_path / "piqa").mkdir()
    docs = [{"goal": "catch a fox", "sol1": "run", "sol2": "sleep", "label": 0}] * 3
    for split in ("train", "validation"):
        (tmp_path / "piqa" / f"{split}.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    _, [task] = load_tasks(["piqa"], tmp_path)
    assert len(task.eval_docs) == 3
    for path in (tmp_path / "piqa").iterdir():
        path.write_text("".join(json.dumps({k: doc[k] for k in ("goal", "sol1", "sol2")}) + "\n" for doc in docs))
    with pytest.raises(ValueError, match="piqa: the right answer of a document is 'label', and its choices are"):
        load_tasks(["piqa"], tmp_path)
    (tmp_path / "piqa" / "train.jsonl").rename(tmp_path / "piqa" / "trian.jsonl")
    (tmp_path / "piqa" / "validation.jsonl").unlink()
    wrong = r"trian.jsonl is no split of it; it has .*\n.* 'validation', of which there is no file"
    with pytest.raises(ValueError, match=wrong):
        load_tasks(["piqa"], tmp_path)


SHUFFLED = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
process_docs: !function functions.shuffled
output_type: generate_until
doc_to_text: "{{{{order}}}}"
doc_to_target: ""
"""


def shuffling_tasks(folder):
    """Two tasks that draw the order of choices as they read their documents, as gpqa does, and their group."""
    folder.mkdir()
    (folder / "functions.py").write_text(
        "import random\n\ndef shuffled(docs):\n"
        "    return docs.map(lambda doc: {'order': str(random.sample(range(99), 5))})\n")
    for name in ("one", "two"):
        (folder / f"{name}.jsonl").write_text('{"a": 1}\n{"a": 2}\n')
        (folder / f"{name}.yaml").write_text(SHUFFLED.format(name=name, file=folder / f"{name}.jsonl"))
    (folder / "both.yaml").write_text("group: both\ntask: [one, two]\n")
    return folder


def test_documents_are_the_same_in_any_process_and_company(tmp_path):
    def orders(folder, names, seed):
        random.seed(seed)
        np.random.seed(seed)
        _, tasks = load_tasks(names, folder)
        leaves = [leaf for task in tasks for leaf in (task.get_all_tasks() if names == ["both"] else [task])]
        return {leaf.task_name: [doc["order"] for _, doc in leaf.doc_iterator()] for leaf in [*leaves, *leaves]}

    here = shuffling_tasks(tmp_path / "here")
    alone = orders(here, ["two"], 1)
    assert len({*alone["two"]}) == 2
    for folder in (here, shuffling_tasks(tmp_path / "there")):  # In another place nothing is cached.
        assert orders(folder, ["one", "two"], 2)["two"] == orders(folder, ["both"], 3)["two"] == alone["two"]


def test_data_on_disk_are_used_in_groups(tmp_path, monkeypatch):
    import lm_eval.tasks

    shipped = str(shuffling_tasks(tmp_path / "shipped"))
    monkeypatch.setattr("lfm_jax.eval.tasks.TaskManager", lambda include_path, include_defaults: (
        lm_eval.tasks.TaskManager(include_path=shipped, include_defaults=False)))
    (tmp_path / "data" / "two").mkdir(parents=True)
    (tmp_path / "data" / "two" / "test.jsonl").write_text('{"a": 3}\n')
    _, [group] = load_tasks(["both"], tmp_path / "data")
    assert {task.task_name: [doc["a"] for doc in task.eval_docs] for task in group.get_all_tasks()} == {
        "one": [1, 2], "two": [3]}


def test_a_task_that_needs_another_package_says_so(tmp_path):
    (tmp_path / "toy.yaml").write_text("task: toy\ndoc_to_text: !function toy_functions.text\n")
    (tmp_path / "toy_functions.py").write_text("import a_package_that_is_missing\n")
    with pytest.raises(ValueError, match="a_package_that_is_missing is not installed, and one of the tasks needs it"):
        load_tasks(["toy"], tmp_path)


@pytest.mark.parametrize(("args", "message"), [
    (["--tasks", ","], "tasks is empty"), (["--tasks", "x", "--limit", "0"], "limit is 0"),
    (["--tasks", "x", "--num-fewshot", "-1"], "num_fewshot is -1; it must be at least 0"),
    (["--tasks", "x", "--slots", "0"], "slots is 0; it must be at least 1"),
    (["--tasks", "x", "--shard", "2/2"], "shard is '2/2'"),
    (["--tasks", "toy_choice", "--data", "nowhere"], "data nowhere is not a directory"),
    (["--tasks", "needle_1024", "--max-length", "1024", "--constrained"], "long contexts cannot be constrained"),
    (["--tasks", "json_schema", "--text", "nowhere"], "leave --text out"),
    (["--tasks", "json_schema", "--checkers", "nowhere"], "leave --checkers out"),
])
def test_what_cannot_be_evaluated(args, message, directory, tmp_path, capsys):
    assert run("eval", directory, "--output", tmp_path / "out", *args) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_directories_that_are_none_of_ours(tmp_path, capsys, evaluate):
    assert run("eval", "compare", tmp_path, tmp_path) == 2
    assert "results.json cannot be read" in capsys.readouterr().err
    (tmp_path / "results.json").write_text("{}")
    assert run("eval", "compare", tmp_path, tmp_path) == 2
    assert evaluate(tmp_path) == 2
    assert capsys.readouterr().err.count("is not of lfm eval") == 2
