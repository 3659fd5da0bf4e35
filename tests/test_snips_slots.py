"""`experiments/snips_slots.py` on an archive of the form of SNIPS: chats, measuring, scores."""

import io
import json
import sys
import tarfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "experiments"))
sys.path.insert(0, str(Path(__file__).parent / "post"))

import pytest
import snips_slots
from tuning import base

import lfm_jax as lfm
from lfm_jax.data.chats import read_chats
from lfm_jax.data.corpora.chats import ChatEncoder
from lfm_jax.data.sources import SourceFile
from lfm_jax.infer import extract
from lfm_jax.loading import chat_template


def pieces(*parts):
    """The pieces of a request: texts, and (text, slot)."""
    return {"data": [{"text": part} if isinstance(part, str) else {"text": part[0], "entity": part[1]}
                     for part in parts]}


TRAIN = [pieces("Rain in ", ("Oslo ", "city"), " on ", ("monday", "day"), "?"), pieces(("A", "city"), ("B", "city")),
         pieces("Rain in ", ("x" * 65, "city")), pieces("Fox \ud83c\udfb5 in ", ("Rome", "city"))]
TEST = [pieces("Snow in ", ("Bergen", "city"), " on ", ("sunday", "day"))] * 3
PLAY = [pieces("play ", ("fox", "song"))]


@pytest.fixture
def archive(tmp_path):
    files = {"Weather/train_Weather_full": {"Weather": TRAIN}, "Weather/validate_Weather": {"Weather": TEST},
             "Play/train_Play_full": {"Play": PLAY}, "Play/validate_Play": {"Play": PLAY * 2}}
    with tarfile.open(tmp_path / "snips.tar.xz", "w:xz") as out:
        for name, content in files.items():
            data = json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass")
            info = tarfile.TarInfo(f"snips/{name}.json")
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    return tmp_path / "snips.tar.xz"


def test_chats_are_what_extract_asks(archive, tmp_path):
    out = tmp_path / "out"
    assert snips_slots.main([str(archive), str(out)]) == 0
    problems = []
    chats = read_chats([SourceFile(out / "train.jsonl", "train.jsonl")], (), problems)
    assert not problems
    found = {chat.messages[1]["content"]: chat.messages[2]["content"] for chat in chats}
    assert found == {"Rain in Oslo  on monday?": '{"city": "Oslo", "day": "monday"}', "play fox": '{"song": "fox"}',
                     "Fox 🎵 in Rome": '{"city": "Rome"}'}
    model, tokenizer = lfm.load(base(tmp_path / "base"))
    schema = next(intent.schema for intent in snips_slots.read(archive) if intent.name == "Weather")
    [chat] = (chat for chat in chats if chat.messages[1]["content"] == "Fox 🎵 in Rome")
    for template in (None, chat_template(tmp_path / "base")):
        system = extract.EXTRACTION.replace("{schema}", json.dumps(schema, ensure_ascii=False))
        asked = extract._prompt(model, tokenizer, template, system, "Fox 🎵 in Rome", True)
        encoder = ChatEncoder(tokenizer, model.config, template, None)
        [tokens] = encoder.encode([encoder.render(chat)])
        assert tokens.ids[: len(asked)].tolist() == asked
        assert tokenizer.decode(tokens.ids[len(asked) :], skip_special_tokens=False).startswith('{"city": "Rome"}')


def test_requests_are_measured_once(archive, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(snips_slots, "MAX_NEW_TOKENS", 200)
    flags = [str(archive), str(tmp_path / "out"), "--measure", str(base(tmp_path / "base")), "--limit", "4"]
    assert snips_slots.main(flags) == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "measured.jsonl").read_text().splitlines()]
    assert [(row["intent"], len(row["answers"])) for row in rows] == [("Play", 2), ("Weather", 2)]
    assert all(row["answers"][0].keys() <= {"city", "day", "song"} for row in rows)
    monkeypatch.setattr(snips_slots, "load", None)  # Nothing is left to measure.
    before = capsys.readouterr().out
    assert snips_slots.main(flags) == 0
    assert capsys.readouterr().out == before
    assert "| all | 4 | 0.0 (0.0) | 0.0 (0.0) |" in before


def test_scores():
    assert snips_slots.counts({"city": " Oslo", "day": "sunday"}, {"city": "Oslo", "day": "monday"}) == (1, 1, 1)
    row = {"intent": "Play", "seconds": 2.0, "slots": [{"song": "fox"}, {"song": "dog", "day": "monday"}],
           "answers": [{"song": "fox"}, {"song": "dog"}]}
    page = snips_slots.table([row])
    # F1 is 4 / 5, of residuals 2 - 2 * 0.8 and 2 - 3 * 0.8.
    assert "| Play | 2 | 50.0 (50.0) | 80.0 (16.0) | 100.0 (0.0) | 66.7 (22.2) | 2 |" in page
