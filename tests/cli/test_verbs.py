"""The table of verbs: help in groups, the nearest verb, versions, and that all this starts without JAX."""

import subprocess
import sys
from importlib import metadata

import pytest
from running import run

from lfm_jax.cli import machine
from lfm_jax.cli.verbs import VERBS, beginning_with, find


def test_help_lists_every_verb_once_under_its_group(capsys):
    assert run("--help") == 0
    text = capsys.readouterr().out
    assert run() == 0
    assert capsys.readouterr().out == text
    sections = {part.split(":\n")[0]: part.splitlines()[1:] for part in text.split("\n\n")}
    for group in {verb.group for verb in VERBS}:
        expected = [[*verb.name.split(), *verb.summary.split()] for verb in VERBS if verb.group == group]
        assert [line.split() for line in sections[group]] == expected
    assert len({verb.name for verb in VERBS}) == len(VERBS)


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.name)
def test_each_verb_explains_itself(verb, capsys):
    function, config = verb.resolve()
    assert run(*verb.name.split(), "--help") == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: lfm {verb.name} ")
    assert ("[RECIPE.yaml ...]" in text) == (config is not None)
    assert " ".join(text.split()).count(" ".join(function.__doc__.split("\n")[0].split())) == 1
    assert len(text) > 200


def test_a_word_with_several_verbs_lists_them(capsys):
    for args in (["data"], ["data", "--help"]):
        assert run(*args) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[:2] for line in lines if line.startswith("  ")] == [["data", "build"], ["data", "show"],
                                                                                          ["data", "distill"]]


@pytest.mark.parametrize(("words", "nearest"), [
    ("genrate x", "generate"), ("tran", "train"), ("dat show x", "data"), ("data shwo x", "data show"),
    ("classfy x", "classify"),
])
def test_a_mistyped_verb_names_the_nearest(words, nearest, capsys):
    assert run(*words.split()) == 2
    assert f"the nearest is {nearest!r}; `lfm --help` lists all" in capsys.readouterr().err


def test_a_verb_like_none_points_to_help(capsys):
    assert run("xyzzy", "--steps", "1") == 2
    assert capsys.readouterr().err == "lfm: there is no verb 'xyzzy'; `lfm --help` lists all\n"


def test_verbs_are_found_by_their_words():
    assert find(["data", "show", "x"]).name == "data show"
    assert find(["data"]) is None
    assert find([]) is None
    assert find(["train", "data", "show"]).name == "train"
    assert beginning_with("train") == ()


def test_the_first_page_and_the_versions_come_without_jax():
    code = ("import sys; from lfm_jax.cli import main\n"
            "for args in [], ['--version'], ['nothing']:\n"
            "    try: main(args)\n"
            "    except SystemExit as status: print('status', status.code)\n"
            "print(sorted({'jax', 'flax', 'numpy', 'tyro', 'rich'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *_, versions, first, second, modules = done.stdout.splitlines()
    assert done.stdout.count("status 0") == 2
    assert (first, second, modules) == ("status 0", "status 2", "[]")
    assert versions.startswith(f"lfm_jax {metadata.version('lfm_jax')}, jax {metadata.version('jax')}, ")
    assert f"flax {metadata.version('flax')}" in versions


def test_ctrl_c_is_a_status_and_no_traceback(monkeypatch, capsys):
    def interrupted(clear=False):
        raise KeyboardInterrupt

    monkeypatch.setattr(machine, "cache", interrupted)
    assert run("cache") == 130
    assert capsys.readouterr().err == ""


def test_python_m_is_the_same_command():
    done = subprocess.run([sys.executable, "-m", "lfm_jax.cli", "nothing"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert "there is no verb 'nothing'" in done.stderr
