"""Chats as batches: exactly the assistant's tokens are learnt, rows repeat and resume, bad chats end it early."""

import itertools
import json

import numpy as np
import pytest
from chats import TURNS, drawn, turns, write
from helpers import long
from transformers import PreTrainedTokenizerFast

from lfm_jax.data.batch import LOSS_IGNORE
from lfm_jax.data.chats import OPENERS, read_chats
from lfm_jax.data.config import ChatData
from lfm_jax.data.corpora.chats import ChatCorpus, ChatEncoder
from lfm_jax.data.sources import find_files
from lfm_jax.testing import tiny_config, tiny_tokenizer
from lfm_jax.text.chat import DEFAULT_TEMPLATE

TOKENIZER = tiny_tokenizer()
MODEL = tiny_config(vocab_size=TOKENIZER.get_vocab_size())
BOS = MODEL.bos_id


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write(tmp_path_factory.mktemp("chats") / "drawn.jsonl", drawn(60))


def opened(file, template=TURNS, **changes):
    fields = dict(sources=(str(file),), seq_len=2048, batch_size=4, heldout_fraction=0.0)
    return ChatCorpus(ChatData(**(fields | changes)), TOKENIZER, MODEL, template)


def documents(batches):
    """(tokens, targets) of each document in batches."""
    for batch in batches:
        for tokens, targets, segments in zip(batch["tokens"], batch["targets"], batch["segment_ids"], strict=True):
            for segment in range(1, segments.max() + 1):
                yield tokens[segments == segment], targets[segments == segment]


def learnt_texts(corpus, batches=1):
    """By the first message of each chat, the learnt runs of it as text."""
    found = []
    for tokens, targets in documents(itertools.islice(corpus.train_batches(), batches)):
        runs = [[]]
        for target in targets:
            runs[-1] += [target] if target != LOSS_IGNORE else []
            if target == LOSS_IGNORE and runs[-1]:
                runs.append([])
        found.append([TOKENIZER.decode(run, skip_special_tokens=False) for run in runs if run])
        assert tokens[0] == BOS
        assert (tokens == BOS).sum() == 1
        assert (targets == BOS).sum() == 0
    return found


CHATS = [
    turns("hi", "yes", "and", "no"),
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "so", "tool_calls": [
        {"function": {"name": "f", "arguments": '{"x": "a b"}'}}]}, {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "two"}], "tools": [{"name": "f"}]},
    {"prompt": "hi", "completion": "only"},
    {"prompt": turns("hi", "given", "go on")["messages"], "completion": "learnt"},
]
CALL = '<|tool_call_start|>[f(x="a b")]<|tool_call_end|>'
LEARNT = [["yes", "no"], ["{}", "two"], ["only"], ["learnt"]]


@pytest.mark.parametrize(("template", "call"), [(TURNS, CALL + "so"), (None, "so" + CALL)])
def test_what_the_assistant_wrote_is_learnt_with_the_end_of_its_turn_and_nothing_else(tmp_path, template, call):
    corpus = opened(write(tmp_path / "a.jsonl", CHATS), template, batch_size=1)
    assert corpus.rows == 1
    expected = [[text.format(call) + "<|im_end|>\n" for text in chat] for chat in LEARNT]
    assert sorted(learnt_texts(corpus)) == sorted(expected)


@pytest.mark.parametrize("count", [40, long(500)])
def test_ids_and_masks_are_those_of_transformers(tmp_path, count):
    """Chats with tools and several turns, arguments as JSON text in the file."""
    records = drawn(count, seed=1)
    problems = []
    chats = read_chats(find_files([str(write(tmp_path / "a.jsonl", records))], suffixes=tuple(OPENERS)), (), problems)
    found = list(ChatEncoder(TOKENIZER, MODEL, TURNS, None)(chats, problems))
    assert not problems
    theirs = PreTrainedTokenizerFast(tokenizer_object=TOKENIZER, bos_token="<|startoftext|>", eos_token="<|im_end|>")
    for tokens, record in zip(found, records, strict=True):
        for call in itertools.chain(*(message.get("tool_calls", ()) for message in record["messages"])):
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        expected = theirs.apply_chat_template(
            record["messages"], tools=record.get("tools"), chat_template=TURNS, return_dict=True,
            return_assistant_tokens_mask=True)
        assert tokens.ids.tolist() == expected["input_ids"]
        assert tokens.learnt().astype(int).tolist() == expected["assistant_masks"]


def test_every_chat_is_there_once_an_epoch_isolated_and_in_a_new_order(file):
    corpus = opened(file, batch_size=1)
    rows = corpus.rows
    both = list(itertools.islice(corpus.train_batches(), 2 * rows))
    epochs = [sorted(tuple(tokens) for tokens, _ in documents(part)) for part in (both[:rows], both[rows:])]
    assert len(epochs[0]) == 60
    assert epochs[0] == epochs[1]
    assert any(not np.array_equal(a["tokens"], b["tokens"]) for a, b in zip(both[:rows], both[rows:], strict=True))
    for batch in both:
        assert all(x.shape == (1, 2048) and x.dtype == np.int32 for x in batch.values())
        learnt = batch["targets"] != LOSS_IGNORE
        assert not learnt[batch["segment_ids"] == 0].any()
        # Targets are shifted in the data: the next token of the same chat.
        inside = learnt[:, :-1] & (batch["segment_ids"][:, 1:] == batch["segment_ids"][:, :-1])
        assert (batch["targets"][:, :-1] == batch["tokens"][:, 1:])[inside].all()
    assert corpus.steps(2) == 2 * rows
    assert opened(file, batch_size=4).steps(1.5) == -(-3 * rows // 8)


def same(batches, others):
    for batch, other in zip(batches, others, strict=True):
        for key in batch:
            np.testing.assert_array_equal(batch[key], other[key])


def test_batches_resume_exactly_for_any_number_of_processes(file):
    iterator = opened(file).train_batches()
    list(itertools.islice(iterator, 5))
    state = json.loads(json.dumps(iterator.get_state()))
    expected = list(itertools.islice(iterator, 8))
    for rows in (None, np.array([0, 1]), np.array([2, 3])):
        fresh = opened(file).train_batches(rows)
        fresh.set_state(state)
        mine = slice(None) if rows is None else rows
        same(itertools.islice(fresh, 8), [{key: x[mine] for key, x in batch.items()} for batch in expected])
    for changes in (dict(seed=1), dict(batch_size=2), dict(seq_len=2049), dict(template=None)):
        with pytest.raises(ValueError, match="belongs to other data"):
            opened(file, **changes).train_batches().set_state(state)


def test_chats_that_are_too_long_are_dropped_or_cut_and_told(tmp_path):
    file = write(tmp_path / "a.jsonl", [turns("q", "a"), turns("q", "b " * 40), turns("q " * 60, "c")])
    dropped = opened(file, seq_len=32, batch_size=1)
    assert "3 chats, 2 longer than 32 tokens dropped" in str(dropped)
    assert learnt_texts(dropped) == [["a<|im_end|>\n"]]
    cut = opened(file, seq_len=32, batch_size=1, too_long="cut")
    assert "1 longer than 32 tokens cut, 1 longer than 32 tokens dropped" in str(cut)
    [[text]] = [texts for texts in learnt_texts(cut, 2) if texts != ["a<|im_end|>\n"]]
    assert text.startswith("b b b")
    assert "<|im_end|>" not in text
    with pytest.raises(ValueError, match="every chat is longer than seq_len 8; raise seq_len, or set too_long to cut"):
        opened(file, seq_len=8)


def test_chats_are_held_out_by_file_or_by_what_they_say(file, tmp_path):
    corpus = opened(file, heldout_fraction=0.3)
    held, others = ([tuple(tokens) for tokens, _ in documents(batches)] for batches in (
        corpus.heldout_batches(), itertools.islice(corpus.train_batches(), corpus.rows)))
    assert 5 < len(held) < 35
    assert not set(held) & set(others)
    assert len(set(held) | set(others)) == len({*map(str, drawn(60))})
    assert "; held out: " in str(corpus)
    named = write(tmp_path / "held.jsonl", [turns("q", "a")])
    assert len(list(documents(opened(file, heldout=(str(named),)).heldout_batches()))) == 1
    for changes, says in ((dict(heldout=(str(file),)), "takes every file of sources"),
                          (dict(sources=(str(named),), heldout_fraction=0.1), "of 1 chats leaves none held out")):
        with pytest.raises(ValueError, match=says):
            opened(file, **changes)


WITH_A_CALL = [turns("q", "a"), CHATS[1]]


@pytest.mark.parametrize(("template", "records", "says"), [
    (TURNS.replace('call["function"]["name"]', '"it"'), WITH_A_CALL, "line 2: the chat template leaves 'f', of the "),
    (TURNS.replace("value | tojson", '"..."'), WITH_A_CALL, "line 2: the chat template leaves 'b', of the call of 'f'"),
    (TURNS.replace('if message["tool_calls"]', 'if 0 and message["tool_calls"]'), WITH_A_CALL, "line 2: .* leaves 'f'"),
    ("{{ raise_exception('no') if messages | length > 2 }}" + DEFAULT_TEMPLATE, WITH_A_CALL, "line 2: .*no"),
    ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", [turns("q", "a")],
     r"line 1: .*put {% generation %} and {% endgeneration %} around"),
    ("{{ bos_token }}{% generation %}{% endgeneration %}{{ messages[1].content }}", [turns("q", "a")],
     "line 1: nothing of it is learnt"),
    (None, [turns("q", "a<|im_end|>\n")], "line 1: .*would begin or end a turn"),
    (TURNS, [turns("q", "a"), turns("q", "a") | {"tols": []}, turns("q")], "line 2: .*the nearest is 'tools'"),
    ('{{ strftime_now("%d") }}' + TURNS, [turns("q", "a")], r"data.date, such as 2026-01-31"),
])
def test_bad_chats_are_named_before_a_run(tmp_path, template, records, says):
    with pytest.raises(ValueError, match=says) as caught:
        opened(write(tmp_path / "a.jsonl", records), template)
    if len(records) == 3:
        assert "line 3: it has no message of the assistant" in str(caught.value), "all come together"


def test_the_day_that_a_template_writes_is_the_one_named(tmp_path):
    template = TURNS.replace("{{- bos_token -}}", '{{- bos_token + strftime_now("%Y-%m-%d") -}}')
    corpus = opened(write(tmp_path / "a.jsonl", [turns("q", "a")]), template, date="2025-12-31", batch_size=1)
    tokens = next(corpus.train_batches())["tokens"][0]
    assert "2025-12-31" in TOKENIZER.decode(tokens.tolist())


def test_a_config_says_all_that_is_wrong_with_it():
    with pytest.raises(ValueError, match=r"batch_size is 0(.|\n)*sources is empty(.|\n)*too_long is 'x'(.|\n)*date is"):
        ChatData(sources=(), seq_len=8, batch_size=0, too_long="x", date="today")
