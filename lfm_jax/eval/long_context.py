"""Tasks of long contexts, made from any text: how much a model finds in what it has read.

The kinds are those of RULER (arXiv 2404.06654), and so is the score: the share of the wanted strings that stand in the
answer. Documents depend on tokenizer, text, seed and their number alone, and are as long as fits: a prompt and its
answer together never have more tokens than the task's name says.
"""

from __future__ import annotations

import bisect
import hashlib
import random
import re
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset
from lm_eval.api.task import ConfigurableTask

SHORTEST, LONGEST = 1024, 32768
GROUP = "long_context"
DOCUMENTS = 55
"""Of a task: five at each depth."""
DEPTHS = 11
"""A needle stands at 0 %, 10 %, ... 100 % of the text, in turn."""
METRIC = "found"
KEYS, HOPS, COMMON = 8, 4, 10
"""Needles of `needle_keys`, hops of a variable's value, and words that are common."""
OFTEN, RARELY = 10, 2
"""How often a common word and another one stand in a list; twice, thrice as often where there are too few words."""
_READ = 4_000_000
"""Characters that are read of a text."""
_NAME = re.compile(r"(\w+?)_(\d+)")

Count = Callable[[str], int]
"""The tokens of a prompt as the model gets it."""


class Document(NamedTuple):
    """One question."""

    prompt: str
    wanted: list[str]
    depth: float | None
    """Where in the text what is asked for stands, 0 to 1; None: all over it."""


class Text:
    """What contexts are made of.

    Args:
      text: its lines.
      name: what an error calls it.

    Raises:
      ValueError: it has too few lines or words.
    """

    def __init__(self, text: str, name: str):
        self.lines = text[:_READ].splitlines()
        self.words = sorted(set(re.findall(r"\b[a-z]{5,9}\b", text)))
        if len(self.lines) < 100 or len(self.words) < 500:
            raise ValueError(f"text {name} has {len(self.lines)} lines and {len(self.words)} words of five to nine "
                             "letters (a to z); it must have at least 100 and 500")
        self.digest = hashlib.sha256(text[:_READ].encode()).hexdigest()[:16]


def read_text(path: Path | None = None) -> Text:
    """Reads what contexts are made of.

    Args:
      path: a file, or a folder with files in UTF-8 (others are passed over); None: the source of Python's standard
        library.

    Raises:
      ValueError: it cannot be read, or has too few lines or words.
    """
    text = ""
    for file in _files(path):
        try:
            text += file.read_text(encoding="utf-8").strip("\n") + "\n"
        except OSError as error:
            raise ValueError(f"text {file} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            continue
        if len(text) >= _READ:
            break
    return Text(text, str(path))


def _files(path: Path | None) -> Iterator[Path]:
    if path is not None:
        if not path.exists():
            raise ValueError(f"text {path} is not there")
        yield from sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        return
    library = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(library.rglob("*.py")):
        # What a build writes of itself has the paths of a machine.
        written = file.name.startswith("_sysconfigdata")
        if not written and not {"site-packages", "dist-packages", "test", "tests"} & {*file.relative_to(library).parts}:
            yield file


# -------------------------------------------------------------------- kinds


def _context(text: Text, draw: random.Random, needles: Sequence[tuple[float, str]]) -> Callable[[int], str]:
    """Returns a function that gives n lines of the text, with a line for each (depth, needle) among them."""
    start = draw.randrange(len(text.lines))

    def of(n: int) -> str:
        lines = [text.lines[(start + i) % len(text.lines)] for i in range(n)]
        for depth, needle in sorted(needles, reverse=True):
            lines.insert(round(depth * n), needle)
        return "\n".join(lines)

    return of


def _needles(text: Text, draw: random.Random, depth: float, keys: int) -> Made:
    names = draw.sample(text.words, keys)
    numbers = draw.sample(range(1_000_000, 10_000_000), keys)
    depths = [depth, *(draw.random() for _ in names[1:])]
    context = _context(text, draw, [(at, f"The secret number of {name} is {number}.")
                                    for at, name, number in zip(depths, names, numbers, strict=True)])
    return Made(
        lambda n: f"Somewhere in the following text a secret number is told. Remember it.\n\n{context(n)}\n\n"
                  f"What is the secret number of {names[0]} in the text above? Write the number and nothing else.\n"
                  "Answer:",
        [str(numbers[0])], depth,
    )


def _variables(text: Text, draw: random.Random, depth: float) -> Made:
    del depth
    letters = [chr(ord("A") + i) for i in range(26)]
    names: list[str] = []
    while len(names) < 2 * (HOPS + 1):
        name = "".join(draw.choices(letters, k=5))
        if name not in names:
            names.append(name)
    needles, values = [], draw.sample(range(10_000, 100_000), 2)
    for value, chain in zip(values, (names[: HOPS + 1], names[HOPS + 1 :]), strict=True):
        sources = [str(value), *(f"VAR {name}" for name in chain)]
        places = sorted(draw.random() for _ in chain)
        needles += [(at, f"VAR {name} = {source}") for at, name, source in zip(places, chain, sources, strict=False)]
    context = _context(text, draw, needles)
    return Made(
        lambda n: f"In the following text variables are assigned. Follow their values.\n\n{context(n)}\n\n"
                  f"Which {HOPS + 1} variables have the value {values[0]} in the text above, set directly or through "
                  "others? Write their names and nothing else.\nAnswer:",
        names[: HOPS + 1], None,
    )


def _common_words(text: Text, draw: random.Random, depth: float) -> Made:
    del depth
    words = draw.sample(text.words, len(text.words))
    common: list[str] = []
    for word in words:  # None that would be found within another one.
        if len(common) < COMMON and not any(word != other and word in other for other in words):
            common.append(word)
    others = [word for word in words if word not in common]
    seed = draw.random()

    def prompt(n: int) -> str:
        whole, rest = divmod(max(n - 1, 0), len(others))
        listed = common * OFTEN * (whole + 1) + (others * whole + others[: min(n, rest + 1)]) * RARELY
        random.Random(seed).shuffle(listed)
        return ("The following is a list of words, in which some come much more often than the others.\n\n"
                f"{' '.join(listed)}\n\nWhich {COMMON} words are the most common in the list above? Write them and "
                "nothing else.\nAnswer:")

    return Made(prompt, common, None)


class Made(NamedTuple):
    """A document whose length is still open."""

    prompt: Callable[[int], str]
    """With so many lines or words beside what is wanted."""
    wanted: list[str]
    depth: float | None


class Kind(NamedTuple):
    """A kind of task."""

    make: Callable[[Text, random.Random, float], Made]
    answer: int
    """Tokens of an answer."""


KINDS = {
    "needle": Kind(lambda text, draw, depth: _needles(text, draw, depth, 1), 32),
    "needle_keys": Kind(lambda text, draw, depth: _needles(text, draw, depth, KEYS), 32),
    "variable_tracking": Kind(_variables, 96),
    "common_words": Kind(_common_words, 128),
}


# -------------------------------------------------------------------- documents and tasks


def documents(kind: str, length: int, number: int, text: Text, count: Count, seed: int = 0) -> list[Document]:
    """Makes the first documents of a task.

    Args:
      length: the most tokens of a prompt and its answer.
      count: counts the tokens of a prompt.

    Raises:
      ValueError: what is asked for does not fit into the length.
    """
    found = []
    for i in range(number):
        draw = random.Random(f"{seed} {kind} {length} {i}")
        made = KINDS[kind].make(text, draw, i % DEPTHS / (DEPTHS - 1))
        room = length - KINDS[kind].answer
        n = _fitting(made, room, count)
        found.append(Document(made.prompt(n), made.wanted, made.depth))
    return found


def _fitting(made: Made, room: int, count: Count) -> int:
    """The number of lines or words with which a prompt fills the room."""
    top = 16
    while count(made.prompt(top)) <= room:
        top *= 2
    n = bisect.bisect_right(range(top + 1), room, lo=top // 2 if top > 16 else 0,
                            key=lambda n: count(made.prompt(n))) - 1
    while n >= 0 and count(made.prompt(n)) > room:  # A longer text may have fewer tokens.
        n -= 1
    if n < 0:
        raise ValueError(f"a question of {count(made.prompt(0))} tokens does not fit into {room}; name a longer task, "
                         "or a shorter system message")
    return n


def score(answer: str, wanted: Sequence[str]) -> float:
    """Returns the share of the wanted strings that stand in an answer, in upper or lower case."""
    return sum(each.lower() in answer.lower() for each in wanted) / len(wanted)


def parse_name(name: str, max_length: int) -> list[tuple[str, int]]:
    """Returns the (kind, length) pairs of a name such as `needle_4096`, or of the group; none for other names.

    Raises:
      ValueError: a length that there is not, or that the model does not read.
    """
    if name == GROUP:
        lengths = [SHORTEST << i for i in range((LONGEST // SHORTEST).bit_length()) if SHORTEST << i <= max_length]
        if not lengths:
            raise ValueError(f"the model reads {max_length} tokens; {GROUP} begins at {SHORTEST}")
        return [(kind, length) for kind in KINDS for length in lengths]
    match = _NAME.fullmatch(name)
    if match is None or match[1] not in KINDS:
        return []
    length = int(match[2])
    if not SHORTEST <= length <= LONGEST:
        raise ValueError(f"there is no task {name}: lengths go from {SHORTEST} to {LONGEST} tokens")
    if length > max_length:
        raise ValueError(f"{name} is longer than what the model reads, {max_length} tokens")
    return [(match[1], length)]


def make_tasks(
    names: Sequence[tuple[str, int]], path: Path | None, count: Count, number: int | None, seed: int = 0
) -> list[ConfigurableTask]:
    """Makes tasks of (kind, length) pairs.

    Args:
      path: of the text; see `Text`.
      count: see `documents`.
      number: documents of a task; None: DOCUMENTS.
    """
    if not names:
        return []
    text = read_text(path)
    return [_task(kind, length, documents(kind, length, number or DOCUMENTS, text, count, seed), text.digest, seed)
            for kind, length in dict.fromkeys(names)]


def _task(kind: str, length: int, docs: Sequence[Document], digest: str, seed: int) -> ConfigurableTask:
    rows = [doc._asdict() for doc in docs]
    return ConfigurableTask(config={
        "task": f"{kind}_{length}",
        "custom_dataset": lambda **_: {"test": Dataset.from_list(rows)},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{wanted | join(', ')}}",
        "process_results": lambda doc, answers: {METRIC: score(answers[0], doc["wanted"])},
        "metric_list": [{"metric": METRIC, "aggregation": "mean", "higher_is_better": True}],
        "generation_kwargs": {"until": [], "max_gen_toks": KINDS[kind].answer, "do_sample": False},
        "num_fewshot": 0,
        "metadata": {"version": 1, "text": digest, "seed": seed},
    })
