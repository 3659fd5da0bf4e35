"""Offline batches: one answer a line whatever the line is, resumed anywhere, spread over machines."""

import fcntl
import functools
import json
import os
import re

import pytest

from lfm_jax.engine.config import EngineConfig
from lfm_jax.engine.service import Service
from lfm_jax.serve.batch import EXAMPLE, batch
from lfm_jax.testing import tiny_model, tiny_tokenizer

LINES = [
    {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "the", "max_tokens": 4}},
    {"custom_id": "b", "url": "/v1/chat/completions", "body": {"messages": [{"role": "user", "content": "x"}],
                                                               "max_tokens": 3}},
    "not JSON {",
    {"custom_id": "c", "body": {"messages": []}},
    {"custom_id": "d", "url": "/v1/models", "body": {}},
    {"custom_id": "e"},
    [1, 2],
    {"custom_id": "f", "body": {"messages": [{"role": "user", "content": "x"}], "stream": True}},
    {"custom_id": "g", "url": "/v1/completions", "body": {"prompt": "the", "max_tokens": 4, "model": "other"}},
    *({"custom_id": f"n{i}", "url": "/v1/completions", "body": {"prompt": f"fox {i}", "max_tokens": 2 + i}}
      for i in range(12)),
]
STATUS = [200, 200, None, 400, None, None, None, None, 200, *[200] * 12]


@functools.cache
def parts():
    tokenizer = tiny_tokenizer()
    return tiny_model(vocab_size=tokenizer.get_vocab_size()), tokenizer


def service(**changes):
    return Service(*parts(), None, EngineConfig(slots=((4, 128),), chunk=32, **changes))


def run(source, target, **changes):
    return batch(service, "tiny", source, target, **changes)


def not_opened():
    raise AssertionError("a model was loaded for nothing")


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in LINES))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_ids(rows):
    """Ids of answers and times are new each time."""
    for row in rows:
        if row["response"] and row["response"]["status_code"] == 200:
            for key in ("id", "created"):
                del row["response"]["body"][key]
    return rows


def test_one_answer_a_line_and_resuming_anywhere(source, tmp_path):
    target = tmp_path / "out.jsonl"
    assert run(source, target) == 6
    rows = read(target)
    assert [row["id"] for row in rows] == [f"line-{i}" for i in range(len(LINES))]
    assert [row["custom_id"] for row in rows] == ["a", "b", None, "c", "d", "e", None, "f", "g",
                                                  *(f"n{i}" for i in range(12))]
    assert [row["response"] and row["response"]["status_code"] for row in rows] == STATUS
    for row in rows:
        assert (row["response"] is None) == (row["error"] is not None)
    for i, sentence in ((2, "the line is not valid JSON: "), (5, "the line has no body; write an object with"),
                        (6, "the line is not an object; write one, as")):
        assert rows[i]["error"]["message"].startswith(sentence)
        assert EXAMPLE in rows[i]["error"]["message"]
    assert "url is '/v1/models'" in rows[4]["error"]["message"]
    assert "does not stream" in rows[7]["error"]["message"]
    assert rows[9]["response"]["body"]["usage"]["completion_tokens"] <= 2
    whole = target.read_bytes()
    expected = without_ids(rows)
    for cut in (0, 10, len(whole) // 3, len(whole) - 5):  # As a kill leaves it.
        target.write_bytes(whole[:cut])
        assert run(source, target) == 6
        assert without_ids(read(target)) == expected
        assert target.read_bytes().startswith(whole[: whole.rfind(b"\n", 0, cut) + 1])  # What was there stays.
    assert batch(not_opened, "tiny", source, target) == 6  # Nothing is left to do.
    assert without_ids(read(target)) == expected


def test_answers_in_order_are_on_disk_before_they_replace_the_others(tmp_path, monkeypatch):
    source, target, synced, replaced = tmp_path / "in.jsonl", tmp_path / "out.jsonl", set(), []
    source.write_text("not JSON {\n")
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (synced.add(os.fstat(file).st_ino), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda a, b: (replaced.append((os.stat(a).st_ino in synced, b)), replace(a, b)))
    assert run(source, target) == 1
    assert replaced == [(True, target)]


def test_shards_together_are_the_whole(source, tmp_path):
    rows = []
    for i in range(3):
        run(source, tmp_path / f"{i}.jsonl", shard=f"{i}/3")
        rows += read(tmp_path / f"{i}.jsonl")
    assert sorted(int(row["id"].removeprefix("line-")) for row in rows) == list(range(len(LINES)))


def test_what_cannot_be_worked_on_is_refused_before_a_model_is_loaded(source, tmp_path):
    def refused(source, target, **changes):
        batch(not_opened, "tiny", source, target, **changes)

    with pytest.raises(ValueError, match="write I/N"):
        refused(source, tmp_path / "out.jsonl", shard="3/3")
    with pytest.raises(ValueError, match="cannot be read"):
        refused(tmp_path / "none.jsonl", tmp_path / "out.jsonl")
    other = tmp_path / "other.jsonl"
    other.write_text("{}\n")
    with pytest.raises(ValueError, match="is not a file of batch answers"):
        refused(source, other)
    assert other.read_text() == "{}\n"
    for content in (b"no line's end", b'{"id": "line-0"}\nand more'):  # Nothing is cut off that we did not write.
        other.write_bytes(content)
        with pytest.raises(ValueError, match="is not a file of batch answers"):
            refused(source, other)
        assert other.read_bytes() == content
    other.write_text('{"id": "line-99"}\n')
    with pytest.raises(ValueError, match="answers line 99"):
        refused(source, other)


def test_lines_are_bytes_between_line_feeds(tmp_path):
    """A byte order mark, a carriage return inside, bytes that are no text, names that are none."""
    body = '"url": "/v1/completions", "body": {"prompt": "the", "max_tokens": 2}'
    source = tmp_path / "in.jsonl"
    source.write_bytes(b"\n".join([
        b"\xef\xbb\xbf" + f'{{"custom_id": "a", {body}}}'.encode(), f'{{"custom_id": "b",\r{body}}}'.encode(),
        f'{{"custom_id": "c\xff", {body}}}'.encode("latin-1"), rf'{{"custom_id": "\ud83d", {body}}}'.encode(),
        f'{{"custom_id": NaN, {body}}}'.encode(), f'{{"custom_id": "d", {body}}}'.encode(),
    ]))
    target = tmp_path / "out.jsonl"
    assert run(source, target) == 3
    rows = read(target)
    assert [row["custom_id"] for row in rows] == ["a", "b", None, None, None, "d"]
    assert [row["error"] is None for row in rows] == [True, True, False, False, False, True]
    assert "utf-8" in rows[2]["error"]["message"]


def test_what_is_wrong_with_a_line_is_a_sentence(tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [f'{{"body": {body}}}' for body in ("null", "[1]", '"x"')] + [
        "3", "null", "[" * 99999, '{"custom_id": "\\ud83d"}', f'{{"url": {"[" * 99999}', "{}", EXAMPLE]
    source.write_text("".join(f"{line}\n" for line in lines))
    assert run(source, target) == len(lines) - 1
    *rows, last = read(target)
    said = [row["error"]["message"] for row in rows]
    assert [text.split(";")[0] for text in said] == [
        "the line has no body", *["body is not an object"] * 2, *["the line is not an object"] * 2,
        "the line is nested too deeply", "custom_id is '\\ud83d', which holds half of a surrogate pair",
        "the line is nested too deeply", "the line has no body"]
    assert not re.search("Error|Exception", "".join(said))
    assert (last["custom_id"], last["response"]["status_code"]) == ("1", 200)


def test_a_custom_id_comes_back_as_it_came(tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    ids = [7, "7", 0, -(10**30), "", None, 1.5, True, ["a"]]
    source.write_text("".join(json.dumps({"custom_id": i, "url": "/v1/completions", "body": {
        "prompt": "the", "max_tokens": 2}}) + "\n" for i in ids))
    assert run(source, target) == 3
    rows = read(target)
    assert [row["custom_id"] for row in rows] == [*ids[:6], None, None, None]
    assert type(rows[0]["custom_id"]) is int
    for row in rows[6:]:
        assert "must be a text or a whole number" in row["error"]["message"]


def test_other_models_are_one_warning_a_run(tmp_path, capsys):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    models = ["tiny", None, "gpt-4o", "gpt-4o", "other", 5]
    source.write_text("".join(json.dumps({"url": "/v1/completions", "body": {
        "prompt": "the", "max_tokens": 2, "model": model}}) + "\n" for model in models))
    assert run(source, target) == 1
    assert [row["response"]["status_code"] for row in read(target)] == [200] * 5 + [400]
    assert {row["response"]["body"]["model"] for row in read(target)[:5]} == {"tiny"}
    [warning] = [line for line in capsys.readouterr().err.splitlines() if "asks for the model" in line]
    assert warning == "lfm: line-2 asks for the model 'gpt-4o'; 'tiny' answers every line, whatever it asks for"


def test_a_full_queue_is_waited_for(source, tmp_path):
    two = {"url": "/v1/completions", "body": {"prompt": ["the", "fox"], "max_tokens": 2}}  # Never room for both.
    source.write_text(source.read_text() + json.dumps(two) + "\n")
    batch(lambda: service(max_queue=1), "tiny", source, tmp_path / "out.jsonl")
    rows = read(tmp_path / "out.jsonl")
    assert [row["response"] and row["response"]["status_code"] for row in rows] == [*STATUS, 400]
    assert "2 prompts at once; at most 1" in rows[-1]["response"]["body"]["error"]["message"]


def test_a_failed_engine_answers_nothing_in_its_last_breath(source, tmp_path, monkeypatch, capsys):
    target = tmp_path / "out.jsonl"
    failing = service()
    turns = iter(range(3))
    step = failing.engine.step
    monkeypatch.setattr(failing.engine, "step", lambda: next(turns) * 0 or step())
    with pytest.raises(ValueError, match=r"the engine has failed: StopIteration.*answers so far are kept"):
        batch(lambda: failing, "tiny", source, target)
    assert {row["response"]["status_code"] for row in read(target) if row["response"]} <= {200, 400}
    assert len(read(target)) < len(LINES)
    assert run(source, target) == 6  # The rest.
    assert [row["response"] and row["response"]["status_code"] for row in read(target)] == STATUS


def test_one_call_a_target_and_shards_beside_each_other(source, tmp_path):
    with (tmp_path / "b.jsonl").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        run(source, tmp_path / "a.jsonl", shard="0/2")
        with pytest.raises(ValueError, match="another call is at work on"):
            run(source, tmp_path / "b.jsonl", shard="1/2")
