"""Passages of books as `lfm tune` reads them, and the documents that arms are measured on.

Dimensions: T tokens of a row.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from lfm_jax.files import whole
from lfm_jax.problems import raise_problems

TEMPLATE = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
"""A chat template that leaves text as it is: a passage is what an assistant wrote, unasked."""
_CHARACTERS = 12
"""A token has fewer."""
_TRIES = 1000


class Books:
    """Texts, those that are learnt from and those that are held out.

    Raises:
      ValueError: on construction: there are none, or a side has none.
    """

    def __init__(self, directory: Path, heldout: Sequence[str]):
        files = sorted(directory.rglob("*.txt"))
        unknown = [pattern for pattern in heldout if not any(fnmatch(file.name, pattern) for file in files)]
        raise_problems("books cannot be used", [f"heldout_books has {pattern!r}, and no file in {directory} is named so"
                                                for pattern in unknown])
        held = [file for file in files if any(fnmatch(file.name, pattern) for pattern in heldout)]
        if not held or len(held) == len(files):
            raise ValueError(f"{directory} has {len(files)} texts (.txt), {len(held)} of them held out; give some to "
                             "learn from, and some to hold out")
        self.train = [file.read_text(encoding="utf-8") for file in files if file not in held]
        self.heldout = [file.read_text(encoding="utf-8") for file in held]


def drawn(texts: Sequence[str], tokenizer: Tokenizer, T: int, seed: str) -> Iterator[tuple[str, list[int]]]:
    """Endless passages of T + 1 tokens, each from the beginning of a line, as (text, ids): a text as often as it is
    long.

    Raises:
      ValueError: no text is that long.
    """
    draw = random.Random(seed)
    for _ in iter(int, 1):
        for _ in range(_TRIES):
            text = draw.choices(texts, [len(text) for text in texts])[0]
            begin = text.find("\n", draw.randrange(len(text))) + 1
            part = text[begin : begin + _CHARACTERS * (T + 1)].lstrip("\n")
            encoding = tokenizer.encode(part, add_special_tokens=False)
            if len(encoding.ids) > T:
                break
        else:
            raise ValueError(f"of {_TRIES} places in {len(texts)} texts none has {T + 1} tokens after it; give longer "
                             "texts, or a smaller seq_len")
        yield part[: encoding.offsets[T][1]], encoding.ids[: T + 1]


def write_passages(path: Path, passages: Iterator[tuple[str, list[int]]], number: int) -> None:
    """Writes so many passages as chats of one message, each another one.

    Raises:
      ValueError: the texts seem to have no more of them.
    """
    seen: set[str] = set()
    repeats = 0
    with whole(path) as file:
        while len(seen) < number:
            text, _ = next(passages)
            repeats = repeats + 1 if text in seen else 0
            if repeats == _TRIES:
                raise ValueError(f"the books have {len(seen)} different passages, and {path.stem}.rows asks for "
                                 f"{number}; give more books, or fewer rows")
            if not repeats:
                seen.add(text)
                record = {"messages": [{"role": "assistant", "content": text}]}
                file.write((json.dumps(record, ensure_ascii=False) + "\n").encode())


def rows(passages: Iterator[tuple[str, list[int]]], number: int) -> np.ndarray:
    """[number, T]: ids of passages."""
    return np.array([next(passages)[1][:-1] for _ in range(number)], np.int32)


def documents(path: Path) -> list[str]:
    """The documents of a file: a JSON object with a `text` in each line.

    Raises:
      ValueError: it cannot be read, a line has no text, or the text has `<unk>` for rare words.
    """
    try:
        lines = path.read_bytes().splitlines()  # Those of a str break inside JSON's strings too, as at U+2028.
    except OSError as error:
        raise ValueError(f"texts {path} cannot be read: {error.strerror}") from None
    found = []
    for number, line in enumerate(lines, 1):
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError):
            text = None
        if not isinstance(text, str):
            raise ValueError(f'{path}:{number} is no JSON object with a text; write {{"text": "..."}}')
        # What a model loses on it hides what it loses on words: it is 15 % of the tokens of WikiText-2 that has it.
        if "<unk>" in text:
            raise ValueError(f"{path}:{number} has <unk> in the place of rare words; give the text as it was written")
        found.append(text)
    if not found:
        raise ValueError(f"texts {path} has no document")
    return found
