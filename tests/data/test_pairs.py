import itertools
import json
import re

import numpy as np
import pytest
from chats import TURNS, turns, write

from lfm_jax import ModelConfig
from lfm_jax.data.config import ChatData
from lfm_jax.data.corpora.pairs import PairCorpus
from lfm_jax.data.pairs import read_pairs
from lfm_jax.data.sources import find_files
from lfm_jax.testing import tiny_tokenizer

TOKENIZER = tiny_tokenizer(vocab_size=300)
MODEL = ModelConfig(vocab_size=TOKENIZER.get_vocab_size(), layer_types=("conv",), hidden_size=8, ffn_size=8)
ASKED = [{"role": "user", "content": "q"}]


def says(text):
    return [{"role": "assistant", "content": text}]


def read(path):
    problems = []
    return read_pairs(find_files([str(path)], suffixes=(".jsonl",)), ("id",), problems), problems


def test_all_forms_of_a_pair_are_one(tmp_path):
    forms = [
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
        {"prompt": ASKED, "chosen": says("good"), "rejected": says("bad"), "id": 7},
        {"messages": ASKED, "chosen": says("good"), "rejected": "bad"},
        {"chosen": ASKED + says("good"), "rejected": ASKED + says("bad")},
        {"prompt": "q", "chosen": ASKED + says("good"), "rejected": ASKED + says("bad"), "tools": None},
    ]
    pairs, problems = read(write(tmp_path / "pairs.jsonl", forms))
    assert not problems
    assert {(pair.text, pair.chosen.text, pair.rejected.text) for pair in pairs} == {
        (pairs[0].text, pairs[0].chosen.text, pairs[0].rejected.text)}
    assert pairs[0].chosen[:3] == (ASKED + says("good"), None, 1)
    assert str(pairs[4]) == f"{tmp_path / 'pairs.jsonl'}, line 5"


def test_a_conversation_parts_at_an_answer(tmp_path):
    begin = turns("a", "b", "c")["messages"]
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    rejected = [*begin, call, {"role": "tool", "content": "r"}, *says("no")]
    (pair,), problems = read(write(tmp_path / "pairs.jsonl", [
        {"chosen": begin + says("yes"), "rejected": rejected, "tools": [{"name": "f"}]}]))
    assert not problems
    assert (pair.chosen.prompt, pair.rejected.prompt) == (3, 3)
    assert pair.rejected.messages == rejected
    assert pair.rejected.tools == [{"name": "f"}]


BAD = [
    ({"prompt": "q", "chosen": "a", "rejected": "a"}, "chosen and rejected are equal"),
    ({"chosen": ASKED + says("a"), "rejected": ASKED + says("a")}, "chosen and rejected are equal"),
    ({"chosen": ASKED + says("a"), "rejected": turns("x", "b")["messages"]}, "no common prompt: their first messages"),
    ({"chosen": says("a"), "rejected": says("b")}, "it has no prompt"),
    ({"chosen": turns("q", "a", "x", "b")["messages"], "rejected": turns("q", "a", "y", "b")["messages"]},
     "part at message 2, which in chosen has the role user"),
    ({"chosen": ASKED, "rejected": ASKED + says("a")}, "chosen has no answer of its own"),
    ({"prompt": "q", "chosen": " ", "rejected": "b"}, "chosen is empty"),
    ({"prompt": "q", "chosen": "a", "rejected": ""}, "rejected is empty"),
    ({"prompt": "x", "chosen": ASKED + says("a"), "rejected": ASKED + says("b")}, "is not what chosen and rej"),
    ({"prompt": "q", "chosen": ASKED + says("a"), "rejected": "b"}, "the other an answer; write both alike"),
    ({"prompt": "q", "chosen": "a"}, "no rejected: its keys are 'prompt', 'chosen'"),
    ({"prompt": "q", "chosen": "a", "rejected": "b", "score": 1}, "'score' is not known.*data.ignore"),
    ({"prompt": "q", "messages": ASKED, "chosen": "a", "rejected": "b"}, "a prompt and messages"),
    ({"prompt": ASKED + says("x"), "chosen": "a", "rejected": "b"}, "chosen, after its prompt: message 2 is of the"),
    ({"prompt": "q", "chosen": [], "rejected": "b"}, r"chosen is \[\]; expected a list of messages or a text"),
]


def test_every_bad_line_is_named(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join([*(json.dumps(line) for line, _ in BAD), "[1]"]))
    pairs, problems = read(path)
    assert not pairs
    assert len(problems) == len(BAD) + 1
    for i, (problem, (_, says)) in enumerate(zip(problems, BAD, strict=False)):
        assert problem.startswith(f"{path}, line {i + 1}: ")
        assert re.search(says, problem), problem


def corpus(path, template=TURNS, **changes):
    fields = {"sources": (str(path),), "seq_len": 512, "batch_size": 1, "heldout_fraction": 0.0}
    return PairCorpus(ChatData(**(fields | changes)), TOKENIZER, MODEL, template)


def answers(row):
    """[(all of a segment, what is learnt of it)] as texts."""
    found = []
    for segment in range(1, row["segment_ids"].max() + 1):
        at = row["segment_ids"] == segment
        found.append(tuple(TOKENIZER.decode(ids[ids >= 0].tolist(), skip_special_tokens=False)
                           for ids in (row["tokens"][at], row["targets"][at])))
    return found


def test_both_of_a_pair_share_a_row_and_only_answers_are_learnt(tmp_path):
    lines = [{"prompt": f"q{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(40)]
    lines[7] = {"prompt": turns("x", "seen", "q7")["messages"], "chosen": "good 7", "rejected": "bad 7"}
    found = corpus(write(tmp_path / "pairs.jsonl", lines), seq_len=1024)
    seen = []
    for row in found.train_rows:
        texts = answers(row)
        assert len(texts) % 2 == 0
        assert len(texts) <= 32
        for (chosen, good), (rejected, bad) in itertools.batched(texts, 2):
            n = int(re.search(r"good (\d+)", good)[1])
            assert (good, bad) == (f"good {n}<|im_end|>\n", f"bad {n}<|im_end|>\n")
            assert f"q{n}<" in chosen
            assert f"q{n}<" in rejected
            seen.append(n)
    assert sorted(seen) == list(range(40))
    assert len(found.train_rows) >= 3, "16 pairs share a row at most"
    assert found.train_rows.learnt.tolist() == [np.sum(row["targets"] >= 0) for row in found.train_rows]


def test_pairs_that_are_too_long_are_dropped_or_cut_and_told(tmp_path):
    path = write(tmp_path / "pairs.jsonl", [
        {"prompt": "q", "chosen": "a", "rejected": "b"}, {"prompt": "q", "chosen": "a", "rejected": "b" + 90 * " x"},
        {"prompt": 90 * "q ", "chosen": "a", "rejected": "b"},
    ])
    dropped = corpus(path, seq_len=64)
    assert "3 pairs, 2 longer than 64 tokens dropped" in str(dropped)
    cut = corpus(path, seq_len=64, too_long="cut")
    assert "3 pairs, 1 longer than 64 tokens cut, 1 longer than 64 tokens dropped" in str(cut)
    texts = [text for row in cut.train_rows for text in answers(row)]
    assert sum(good == "a<|im_end|>\n" for _, good in texts) == 2, "the shorter answer is whole"
    assert any(bad.startswith("b x") and "<|im_end|>" not in bad for _, bad in texts)


def test_answers_that_the_template_writes_alike_are_refused(tmp_path):
    template = TURNS.replace('(message["content"] or "")', '(message["content"] or "")[:1]')
    path = write(tmp_path / "pairs.jsonl", [{"prompt": "q", "chosen": "ab", "rejected": "ac"}])
    with pytest.raises(ValueError, match="line 1: the chat template writes chosen and rejected alike"):
        corpus(path, template=template)


def test_all_answers_to_a_prompt_are_held_out_or_none(tmp_path):
    lines = [{"prompt": f"q{i % 20}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(60)]
    found = corpus(write(tmp_path / "pairs.jsonl", lines), heldout_fraction=0.3)
    sides = [{re.search(r"q\d+", text)[0] for row in rows for text, _ in answers(row)}
             for rows in (found.train_rows, found.heldout_rows)]
    assert all(sides)
    assert not sides[0] & sides[1]
