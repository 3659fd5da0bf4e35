"""Tasks of long contexts: what is in them, how long they are, how answers count."""

import collections
import json
from pathlib import Path

import pytest

from lfm_jax.cli import main
from lfm_jax.eval.long_context import (
    COMMON,
    DEPTHS,
    HOPS,
    KEYS,
    KINDS,
    OFTEN,
    RARELY,
    _files,
    documents,
    make_tasks,
    parse_name,
    read_text,
    score,
)
from lfm_jax.testing import tiny_tokenizer


@pytest.fixture(scope="module")
def text():
    return read_text()


@pytest.fixture(scope="module")
def count():
    tokenizer = tiny_tokenizer(Path(json.__file__).read_text(), 600)
    return lambda prompt: len(tokenizer.encode(prompt).ids)


@pytest.fixture(scope="module", params=list(KINDS))
def made(request, text, count):
    return request.param, documents(request.param, 2048, DEPTHS, text, count)


def test_the_same_for_the_same_seed(made, text, count):
    kind, found = made
    again = documents(kind, 2048, 2, read_text(), count)
    assert again == found[:2]
    assert documents(kind, 2048, 1, text, count, seed=1)[0].prompt != found[0].prompt
    assert len({doc.prompt for doc in found}) == len(found)


def test_as_long_as_fits(made, count):
    kind, found = made
    room = 2048 - KINDS[kind].answer
    lengths = [count(doc.prompt) for doc in found]
    assert max(lengths) <= room
    assert min(lengths) > 0.9 * room  # The next line would be too much.


def test_what_is_asked_for_is_there(made):
    kind, found = made
    for doc in found:
        context, question = doc.prompt.rsplit("\n\n", 1)
        if kind.startswith("needle"):
            assert [doc.wanted[0]] == [n for n in doc.wanted if f" is {n}." in context]
            assert context.count("The secret number of ") == (1 if kind == "needle" else KEYS)
            body = context.split("\n")[2:]
            at = next(i for i, line in enumerate(body) if line.endswith(f"{doc.wanted[0]}."))
            assert at / (len(body) - 1) == pytest.approx(doc.depth, abs=0.05 if kind == "needle" else 0.2)
        elif kind == "variable_tracking":
            assigned = [line[4:].split(" = ") for line in context.split("\n") if line.startswith("VAR ")]
            values = {}
            for name, source in assigned:
                values[name] = values[source[4:]] if source.startswith("VAR") else source
            asked = next(word for word in question.split() if word.isdecimal() and len(word) == 5)
            assert len(values) == 2 * (HOPS + 1)
            assert {name for name, value in values.items() if value == asked} == set(doc.wanted)
        else:
            words = context.split("\n\n")[1].split()
            often = sorted(set(words), key=words.count)[-COMMON:]
            assert set(often) == set(doc.wanted)
            assert len(words) > 3 * COMMON
    if kind.startswith("needle"):
        assert [doc.depth for doc in found] == [i / 10 for i in range(11)]


def test_few_words_come_more_often(tmp_path):
    words = [f"{a}{b}{c}line" for a in "bdfgklm" for b in "aeiou" for c in "bcdfghklmnpqrst"]
    (tmp_path / "text.txt").write_text("".join(f"the {word} fox jumps\n" for word in words))
    [doc] = documents("common_words", 8192, 1, read_text(tmp_path), lambda prompt: len(prompt.split()))
    assert 0.98 * (8192 - KINDS["common_words"].answer) < len(doc.prompt.split()) <= 8192 - KINDS["common_words"].answer
    listed = collections.Counter(doc.prompt.split("\n\n")[1].split())
    assert {word for word, _ in listed.most_common(COMMON)} == set(doc.wanted)
    assert {listed.pop(word) for word in doc.wanted} == {OFTEN // RARELY * max(listed.values())}


def test_the_default_text_has_no_paths_of_a_build():
    assert not any(path.name.startswith("_sysconfigdata") for path in _files(None))


def test_scores():
    assert score("It is 1234567.", ["1234567"]) == 1
    assert score("It is 1234568.", ["1234567"]) == 0
    assert score("abcde, FGHIJ", ["ABCDE", "fghij", "KLMNO", "PQRST"]) == 0.5
    assert score("", ["a"]) == 0


def test_names_and_texts(tmp_path):
    assert parse_name("needle_keys_2000", 4096) == [("needle_keys", 2000)]
    assert parse_name("long_context", 3000) == [(kind, length) for kind in KINDS for length in (1024, 2048)]
    assert not any(parse_name(name, 4096) for name in ("arc_easy", "needles_4096", "needle"))
    for name, message in (("needle_512", "lengths go from 1024 to 32768"), ("needle_8192", "longer than what"),
                          ("needle_65536", "lengths go from")):
        with pytest.raises(ValueError, match=message):
            parse_name(name, 4096)
    with pytest.raises(ValueError, match="reads 512 tokens"):
        parse_name("long_context", 512)
    (tmp_path / "text.txt").write_text("the fox\n" * 200)
    with pytest.raises(ValueError, match="has 200 lines and 0 words"):
        read_text(tmp_path)
    with pytest.raises(ValueError, match="is not there"):
        read_text(tmp_path / "nowhere")


def test_what_does_not_fit(text):
    with pytest.raises(ValueError, match="a question of 9999 tokens does not fit into 992"):
        make_tasks([("needle", 1024)], None, lambda prompt: 9999, 1)


def test_a_tiny_model_is_measured(directory, tmp_path):
    words = [f"{a}{b}{c}line" for a in "bdfgklm" for b in "aeiou" for c in "bcdfghklmnpqrst"]
    source = tmp_path / "text.txt"
    source.write_text("".join(f"the {word} fox jumps\n" for word in words))
    args = ["eval", directory, "--tasks", "needle_1024,common_words_1200", "--output", tmp_path / "out", "--limit", 2,
            "--text", source, "--slots", 2, "--max-length", 1200, "--apply-chat-template",
            "--system-message", "Be brief."]
    with pytest.raises(SystemExit) as status:
        main([str(arg) for arg in args])
    assert status.value.code == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["results"]["needle_1024"]["found,none"] == 0
    assert "found_stderr,none" in results["results"]["common_words_1200"]
    assert results["lfm_jax"]["settings"]["text"] == str(source)
    kept = json.loads((tmp_path / "out" / "samples_needle_1024.jsonl").read_text().splitlines()[0])
    prompt = kept["arguments"]["gen_args_0"]["arg_0"]
    assert prompt.count("<|im_start|>") == 3
    assert kept["doc"]["wanted"][0] in prompt
