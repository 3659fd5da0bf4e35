"""Writes dialogues of Schema-Guided Dialogue (SGD) as chats with tool calls, for `lfm tune` and `lfm eval`.

    python experiments/sgd_tool_calls.py SGD_DIR OUT [--dialogues 200] [--seed 0] [--model SmolLM2.gguf]

SGD_DIR has sgd_{train,dev,test}.jsonl.xz: a dialogue a line, with tools and messages, in which the assistant has at
most one `tool_call` and tools answer with lists. OUT gets train.jsonl, dev.jsonl, and of the test split
tool_calls/seen.jsonl, dialogues of whose tools each, by name and parameters, is of a training dialogue too, and
tool_calls/unseen.jsonl, with a tool that none has. All are shuffled; the last two have so many dialogues, drawn.
Dialogues that offer two tools of one name are left out: a call would not say which it means.

--model is a GGUF file of SmolLM2, whose template knows no tools. OUT/base.gguf is the same model with LFM2's form of
tools and calls: our default template, and LFM2's two marks as names of two special tokens that SmolLM2's chats have no
use for, but its pretraining had: most of the others have one and the same embedding. It needs `lfm_jax[gguf]`.
"""

from __future__ import annotations

import argparse
import json
import lzma
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lfm_jax.text.chat import DEFAULT_TEMPLATE
from lfm_jax.text.tools import END, START

Dialogue = dict[str, Any]

MARKS = {"<filename>": START, "<repo_name>": END}
"""LFM2's names of tokens, by SmolLM2's."""
BOS = "{{- bos_token -}}\n"
"""What our template begins with; SmolLM2's chats have none before their first turn."""


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("sgd", type=Path)
    flags.add_argument("out", type=Path)
    flags.add_argument("--dialogues", type=int, default=200)
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--model", type=Path)
    args = flags.parse_args()
    train, dev, test = (read(args.sgd / f"sgd_{split}.jsonl.xz") for split in ("train", "dev", "test"))
    known = {signature(tool) for dialogue in train for tool in dialogue["tools"]}
    sides: dict[bool, list[Dialogue]] = {True: [], False: []}
    for dialogue in test:
        sides[all(signature(tool) in known for tool in dialogue["tools"])].append(dialogue)
    for name, dialogues, most in (
        ("train", train, None), ("dev", dev, None),
        ("tool_calls/seen", sides[True], args.dialogues), ("tool_calls/unseen", sides[False], args.dialogues),
    ):
        drawn = random.Random(args.seed).sample(dialogues, min(len(dialogues), most or len(dialogues)))
        write(args.out / f"{name}.jsonl", drawn, len(dialogues))
    if args.model:
        write_base(args.model, args.out / "base.gguf")


def read(path: Path) -> list[Dialogue]:
    """The dialogues of a split in which each tool has a name of its own."""
    with lzma.open(path, "rt", encoding="utf-8") as file:
        dialogues = [json.loads(line) for line in file]
    kept = [dialogue for dialogue in dialogues
            if len({tool["name"] for tool in dialogue["tools"]}) == len(dialogue["tools"])]
    print(f"{path.name}: {len(dialogues):,} dialogues, {len(dialogues) - len(kept)} left out")
    return kept


def signature(tool: dict[str, Any]) -> str:
    return json.dumps([tool["name"], tool["parameters"]], sort_keys=True)


def chat(dialogue: Dialogue) -> dict[str, Any]:
    """A dialogue in OpenAI's form."""
    messages: list[dict[str, Any]] = []
    for i, message in enumerate(dialogue["messages"]):
        if "tool_call" in message:
            call = message["tool_call"]
            arguments = json.dumps(call["arguments"], ensure_ascii=False)
            function = {"name": call["name"], "arguments": arguments}
            messages.append({"role": "assistant", "tool_calls": [
                {"id": f"call_{i}", "type": "function", "function": function}]})
        elif message["role"] == "tool":
            content = json.dumps(message["content"], ensure_ascii=False)
            messages.append({"role": "tool", "tool_call_id": f"call_{i - 1}", "content": content})
        else:
            messages.append(message)
    return {"id": dialogue["id"], "tools": dialogue["tools"], "messages": messages}


def write(path: Path, dialogues: Sequence[Dialogue], of: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    chats = [chat(dialogue) for dialogue in dialogues]
    path.write_text("".join(json.dumps(each, ensure_ascii=False) + "\n" for each in chats), encoding="utf-8")
    calls = sum("tool_calls" in message for each in chats for message in each["messages"])
    print(f"{path}: {len(chats):,} of {of:,} dialogues, {calls:,} calls")


def write_base(model: Path, out: Path) -> None:
    """Copies a GGUF file, with LFM2's marks in the vocabulary and a template that shows tools."""
    import gguf
    from gguf.scripts.gguf_new_metadata import MetadataDetails, copy_with_new_metadata

    reader = gguf.GGUFReader(model)
    tokens = reader.fields[gguf.Keys.Tokenizer.LIST].contents()
    if missing := MARKS.keys() - set(tokens):
        raise ValueError(f"{model} has no tokens {sorted(missing)}; give a GGUF file of SmolLM2")
    writer = gguf.GGUFWriter(out, reader.fields[gguf.Keys.General.ARCHITECTURE].contents())
    copy_with_new_metadata(reader, writer, {
        gguf.Keys.Tokenizer.LIST: MetadataDetails(
            gguf.GGUFValueType.ARRAY, [MARKS.get(token, token) for token in tokens],
            sub_type=gguf.GGUFValueType.STRING),
        gguf.Keys.Tokenizer.CHAT_TEMPLATE: MetadataDetails(
            gguf.GGUFValueType.STRING, DEFAULT_TEMPLATE.removeprefix(BOS)),
    }, remove_metadata=[])
    print(f"{out}: {model.name} with tools")


if __name__ == "__main__":
    main()
