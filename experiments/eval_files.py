"""Writes task data on disk for `lfm eval --data`, from files as their authors publish them.

    python experiments/eval_files.py FILES OUT

FILES may hold arc_challenge_test.jsonl (AI2: question.stem, question.choices, answerKey), llm_foundry/arc_easy.jsonl
(query, choices, gold), piqa_valid.jsonl with piqa_valid-labels.lst, lambada_test.jsonl (text), wikitext2_test.txt and
gsm8k_test.jsonl with gsm8k_train.jsonl. OUT/TASK/SPLIT.jsonl then have the columns of the data sets on the Hub. Of
llm_foundry/boolq.jsonl and pubmed_qa_labeled.jsonl come texts, OUT/texts/{wikipedia,abstracts}.jsonl. What is not there
is left out, and said.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def main(argv: list[str]) -> int:
    if len(argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    files, out = map(Path, argv)
    for task, split, names, read in TASKS:
        paths = [files / name for name in names]
        missing = [str(path) for path in paths if not path.exists()]
        if missing:
            print(f"{task}/{split}: {', '.join(missing)} is not there", file=sys.stderr)
            continue
        target = out / task / f"{split}.jsonl"
        target.parent.mkdir(parents=True, exist_ok=True)
        rows = list(read(*paths))
        target.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        print(f"{task}/{split}: {len(rows):,} documents")
    return 0


def lines(path: Path) -> Iterator[Row]:
    return map(json.loads, path.read_bytes().splitlines())


def arc(path: Path) -> Iterator[Row]:
    for row in lines(path):
        choices = row["question"]["choices"]
        yield {"question": row["question"]["stem"], "answerKey": row["answerKey"],
               "choices": {key: [choice[key] for choice in choices] for key in ("text", "label")}}


def arc_of_queries(path: Path) -> Iterator[Row]:
    for row in lines(path):
        labels = list("ABCDE"[: len(row["choices"])])
        yield {"question": row["query"].removeprefix("Question: "), "answerKey": labels[row["gold"]],
               "choices": {"text": row["choices"], "label": labels}}


def piqa(path: Path, labels: Path) -> Iterator[Row]:
    for row, label in zip(lines(path), labels.read_text().split(), strict=True):
        yield row | {"label": int(label)}


def articles(path: Path) -> Iterator[Row]:
    parts = re.split(r"(?m)^(?= = [^=].* = $)", path.read_text(encoding="utf-8"))
    yield from ({"page": part} for part in parts if part.strip())


def passages_of(field: str, begins: str) -> Callable[[Path], Iterator[Row]]:
    """What questions are asked about, each text once."""
    def read(path: Path) -> Iterator[Row]:
        parts = (row[field].removeprefix(begins).rpartition("\nQuestion: ")[0] for row in lines(path))
        yield from ({"text": part} for part in dict.fromkeys(parts))

    return read


TASKS: tuple[tuple[str, str, tuple[str, ...], Callable[..., Iterable[Row]]], ...] = (
    ("arc_challenge", "test", ("arc_challenge_test.jsonl",), arc),
    ("arc_easy", "test", ("llm_foundry/arc_easy.jsonl",), arc_of_queries),
    ("piqa", "validation", ("piqa_valid.jsonl", "piqa_valid-labels.lst"), piqa),
    ("lambada_openai", "test", ("lambada_test.jsonl",), lines),
    ("wikitext", "test", ("wikitext2_test.txt",), articles),
    ("gsm8k", "test", ("gsm8k_test.jsonl",), lines),
    ("gsm8k", "train", ("gsm8k_train.jsonl",), lines),
    ("texts", "wikipedia", ("llm_foundry/boolq.jsonl",), passages_of("query", "Passage: ")),
    ("texts", "abstracts", ("llm_foundry/pubmed_qa_labeled.jsonl",), passages_of("context", "Context: ")),
)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
