"""Raw data to what the stations read: texts, chats, held-out sets, a tokenizer.

    data/texts/            dialogues.jsonl, training dialogues as plain text
    data/chats/            chats.jsonl to learn from
    data/asked.jsonl       some of them, of which preferences are made
    data/eval/             heldout.yaml, heldout.jsonl, tool_calls/{seen,unseen}.jsonl, json_schema/*.json
    data/tokenizer/        tokenizer.json, chat_template.jinja
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sgd_tool_calls as sgd

from lfm_jax.convert.sidecars import CHAT_TEMPLATE
from lfm_jax.data.config import DataConfig
from lfm_jax.data.corpora import make_tokenizer
from lfm_jax.data.corpora.text import heldout_documents, train_documents
from lfm_jax.data.heldout import split_files
from lfm_jax.data.sources import find_files
from lfm_jax.files import say, write_whole
from lfm_jax.text.chat import DEFAULT_TEMPLATE, render_chat, with_calls
from lfm_jax.text.tokenizer import SPECIAL_TOKENS, TOKENIZER_FILE
from tool_caller.config import Life

PASSAGE = 6000
"""Characters of a passage: about 1,600 tokens."""
LONGEST_SCHEMA = 600
"""Characters of a schema; longer ones leave so small a model no room to be told apart."""
ASKED = 1500
"""Training dialogues of which preferences are made; more than there is time for."""
DIALOGUES_SEED = 0
HELDOUT_TASK = """\
task: heldout
dataset_path: json
dataset_kwargs: {data_files: {test: heldout.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
"""
SPECIAL = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))
"""Names of special tokens, which stand in no text that is learnt from."""


def prepare(life: Life) -> dict[str, Any]:
    """Writes all of it; returns counts.

    Raises:
      ValueError: raw data that is not there.
    """
    for name, path, pattern in (("books", life.books, "*.txt"), ("dialogues", life.dialogues, "sgd_train.jsonl.xz"),
                                ("schemas", life.schemas, "*.json")):
        if not path.is_dir() or not any(path.rglob(pattern)):
            raise ValueError(f"{name} {path} has no {pattern}; name the directory that has, as --{name} DIR")
    counts = {**_dialogues(life), **_schemas(life)}
    say("tokenizer: byte-pair encoding of books and dialogues ...")
    data = texts(life, T=life.context, B=1)
    tokenizer = make_tokenizer(data, vocab_size=life.vocab_size)
    if tokenizer.get_vocab_size() < life.vocab_size:
        raise ValueError(f"the texts have pairs for {tokenizer.get_vocab_size()} tokens only; lower vocab_size, which "
                         f"is {life.vocab_size}")
    folder = life.data / "tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / CHAT_TEMPLATE, DEFAULT_TEMPLATE)
    write_whole(folder / TOKENIZER_FILE, tokenizer.to_str(pretty=True))
    passages = _passages([*heldout_documents(data)], life.passages)
    write_whole(life.data / "eval" / "heldout.yaml", HELDOUT_TASK)
    _write(life.data / "eval" / "heldout.jsonl", [{"text": passage} for passage in passages])
    ids = sum(len(encoding.ids) for encoding in tokenizer.encode_batch(passages, add_special_tokens=False))
    return counts | {
        "train_bytes": train_documents(data).num_bytes, "passages": len(passages),
        "heldout_books": [Path(name).stem for name in data.heldout],
        "bytes_per_token": sum(len(passage.encode()) for passage in passages) / ids,
    }


def texts(life: Life, *, T: int, B: int) -> DataConfig:
    """What pre-training learns from, in rows of T tokens."""
    files = find_files([str(life.books)])
    _, heldout = split_files(files, life.heldout_books)
    return DataConfig(sources=(str(life.books), str(life.data / "texts")),
                      heldout=tuple(str(file.path) for file in heldout), seq_len=T, batch_size=B)


def _dialogues(life: Life) -> dict[str, Any]:
    """Chats to learn from, the same as plain text, and held-out ones of seen and of unseen services."""
    train, test = (sgd.read(life.dialogues / f"sgd_{split}.jsonl.xz") for split in ("train", "test"))
    draw = random.Random(DIALOGUES_SEED)
    known = {sgd.signature(tool) for dialogue in train for tool in dialogue["tools"]}
    for name, side in (("seen", True), ("unseen", False)):
        found = [d for d in test if all(sgd.signature(tool) in known for tool in d["tools"]) is side]
        path = life.data / "eval" / "tool_calls" / f"{name}.jsonl"
        # As many dialogues as turns: some are left over.
        sgd.write(path, draw.sample(found, min(life.documents, len(found))), len(found))
    chats = [sgd.chat(dialogue) for dialogue in draw.sample(train, len(train))]
    _write(life.data / "chats" / "chats.jsonl", chats)
    _write(life.data / "asked.jsonl", chats[-ASKED:])
    _write(life.data / "texts" / "dialogues.jsonl", [{"text": plain_text(chat)} for chat in chats])
    return {"training_dialogues": len(chats), "test_dialogues": len(test)}


def plain_text(chat: dict[str, Any]) -> str:
    """A chat as its template writes it, without special tokens."""
    messages = [dict(message) for message in chat["messages"]]
    for message in messages:
        if "tool_calls" in message:
            calls = [call["function"] for call in message["tool_calls"]]
            message["tool_calls"] = [call | {"arguments": json.loads(call["arguments"])} for call in calls]
    text = render_chat(DEFAULT_TEMPLATE, with_calls(DEFAULT_TEMPLATE, messages), tools=chat["tools"],
                       add_generation_prompt=False, bos_token="")
    return SPECIAL.sub("", text)


def _schemas(life: Life) -> dict[str, Any]:
    """Short schemas of objects, drawn."""
    folder = life.data / "eval" / "json_schema"
    folder.mkdir(parents=True, exist_ok=True)
    short = [path for path in sorted(life.schemas.rglob("*.json")) if path.stat().st_size <= LONGEST_SCHEMA]
    drawn = random.Random(0).sample(short, min(life.schema_documents, len(short)))
    for path in drawn:
        write_whole(folder / f"{path.parent.name}-{path.name}", path.read_text(encoding="utf-8"))
    return {"schemas": len(drawn), "short_schemas": len(short)}


def _passages(documents: Sequence[str], count: int) -> list[str]:
    """Passages spread evenly over all documents."""
    starts = [(i, at) for i, text in enumerate(documents) for at in range(0, max(1, len(text) - PASSAGE), PASSAGE)]
    count = min(count, len(starts))
    spread = (starts[n * len(starts) // count] for n in range(count))
    return [documents[i][at : at + PASSAGE] for i, at in spread]


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
