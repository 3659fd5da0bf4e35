"""DataConfig and ChatData: what a run learns from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from datetime import date
from typing import Annotated, Any, Literal, get_args

import tyro
import yaml

from lfm_jax.problems import raise_problems
from lfm_jax.text.tokenizer import TOKENIZER_FILE


class DataUsedUp(ValueError):
    """The epoch limits of a mixture are met."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixturePart:
    """A built dataset in a mixture: `{path: data/web, weight: 0.7}` in a recipe, the same in quotes as a flag."""

    path: str
    """Directory that `lfm data build` made."""
    weight: float = 1.0
    """Share of the rows, relative to the other weights; kept to about one part in a hundred."""
    epochs: int | None = None
    """Most passes over it; a run that asks for more is refused. None: any number."""


def _part_from_yaml(text: str) -> MixturePart:
    try:
        plain = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{text!r} is not valid YAML ({str(error).splitlines()[0]})") from None
    if isinstance(plain, str):
        return MixturePart(path=plain)
    names = [field.name for field in dataclasses.fields(MixturePart)]
    if not isinstance(plain, dict) or "path" not in plain or not set(plain) <= set(names):
        raise ValueError(f"{text!r} must be a path or a mapping with path and perhaps {' and '.join(names[1:])}")
    return MixturePart(**plain)


def _part_to_yaml(part: Any) -> list[str]:
    return [yaml.safe_dump(dataclasses.asdict(part), default_flow_style=True, width=math.inf, sort_keys=False).strip()]


_PART = tyro.constructors.PrimitiveConstructorSpec(
    nargs=1,
    metavar="PATH|'{path: PATH, weight: W, epochs: N}'",
    instance_from_str=lambda args: _part_from_yaml(args[0]),
    is_instance=lambda value: isinstance(value, MixturePart),
    str_from_instance=_part_to_yaml,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to train on, text (`sources`) or built datasets (`mixture`), and the shape of a batch of it.

    Raises:
      ValueError: on construction, one message that lists every bad field and how to mend it.
    """

    sources: tuple[str, ...] = ()
    """Files (.txt, .md, .py, .jsonl), directories (read recursively) and globs to train on."""
    mixture: tuple[Annotated[MixturePart, _PART], ...] = ()
    """Datasets made by `lfm data build` to train on instead of sources; held-out rows and tokenizer are theirs."""
    seq_len: int
    """T, tokens of a row; a longer document is cut into pieces."""
    batch_size: int
    """B, rows of one optimizer step over all devices."""
    heldout: tuple[str, ...] = ()
    """Files, directories and globs never trained on, for the held-out loss; overrides heldout_fraction."""
    heldout_fraction: float = 0.02
    """Share of the source files held out, chosen by a hash of their names (`data/heldout.py`). 0: none."""
    exclude: tuple[str, ...] = ()
    """Shell patterns of files and directories to leave out, for example `tests` or `lib/old`."""
    text_field: str = "text"
    """Key of the text in the JSON object on each line of a .jsonl file."""
    tokenizer: str | None = None
    """A tokenizer.json or a directory with one. None: train one on the training files, or that of the mixture."""
    seed: int = 0
    """Of the order of the data; what is held out does not depend on it."""
    prefetch: int = 2
    """Batches of a mixture to read ahead, each on a thread of its own. 0: each is read when it is needed."""

    def __post_init__(self) -> None:
        raise_problems("DataConfig is not valid", _problems(self))


def field_problems(c: Any, *, names: Sequence[str], counts: Sequence[tuple[str, int]]) -> list[str]:
    """What is wrong with fields of a kind that configs of data share.

    Args:
      names: fields that are tuples of non-empty strings.
      counts: fields that are whole numbers, each with its least value. `heldout_fraction` is checked always.
    """
    problems = []
    for name in names:
        value = getattr(c, name)
        if not (isinstance(value, tuple) and all(isinstance(v, str) and v for v in value)):
            problems.append(f"{name} is {value!r}; it must be a tuple of non-empty strings")
    for name, least in counts:
        value = getattr(c, name)
        if not (type(value) is int and value >= least):
            problems.append(f"{name} is {value!r}; it must be a whole number of at least {least}")
    fraction = c.heldout_fraction
    if not (isinstance(fraction, (int, float)) and 0 <= fraction < 1):
        problems.append(f"heldout_fraction is {fraction!r}; it must be a number from 0 up to but not including 1")
    return problems


def _problems(c: DataConfig) -> list[str]:
    problems = field_problems(
        c, names=("sources", "heldout", "exclude"),
        counts=(("seq_len", 1), ("batch_size", 1), ("seed", 0), ("prefetch", 0)),
    )

    def need(ok: bool, message: str) -> None:
        if not ok:
            problems.append(message)

    for part in c.mixture:
        need(isinstance(part.path, str) and part.path != "", f"mixture names the path {part.path!r}; name a directory")
        need(isinstance(part.weight, (int, float)) and 0 < part.weight < math.inf,
             f"mixture gives {part.path} the weight {part.weight!r}; it must be a number above 0")
        need(part.epochs is None or (type(part.epochs) is int and part.epochs >= 1),
             f"mixture gives {part.path} {part.epochs!r} epochs; it must be a whole number of at least 1, or left out")
    paths = [part.path for part in c.mixture]
    need(len(set(paths)) == len(paths), f"mixture names a path twice: {paths}; add up its weights")
    if c.mixture:
        text_only = [name for name in ("sources", "heldout", "exclude") if getattr(c, name) != ()]
        need(not text_only, f"{' and '.join(text_only)} belong to text, not to built datasets (mixture); drop either")
    else:
        need(c.sources != (),
             "sources is empty; name at least one file, directory or glob, or built datasets in mixture")
    need(isinstance(c.text_field, str) and c.text_field != "", f"text_field is {c.text_field!r}; name a JSON key")
    need(c.tokenizer is None or (isinstance(c.tokenizer, str) and c.tokenizer != ""),
         f"tokenizer is {c.tokenizer!r}; give the path of a {TOKENIZER_FILE} or of its directory, or leave it out")
    return problems


TooLong = Literal["drop", "cut"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatData:
    """Chats to learn from, or pairs of answers (`data/chats.py` and `data/pairs.py` say what they look like), and the
    shape of a batch of them.

    Raises:
      ValueError: on construction, one message that lists every bad field and how to mend it.
    """

    sources: tuple[str, ...]
    """Files (.jsonl, .jsonl.gz, .jsonl.xz), directories (read recursively) and globs to train on."""
    seq_len: int
    """T, tokens of a row; whole chats share one."""
    batch_size: int
    """B, rows of one optimizer step over all devices."""
    too_long: TooLong = "drop"
    """What becomes of a chat of more than T tokens: dropped, or cut at its end."""
    heldout: tuple[str, ...] = ()
    """Files, directories and globs never trained on, for the held-out loss; overrides heldout_fraction."""
    heldout_fraction: float = 0.02
    """Share of the chats held out, chosen by a hash of each. 0: none."""
    ignore: tuple[str, ...] = ("id",)
    """Keys of the objects in the files that are left out; any other unknown key is refused."""
    date: str | None = None
    """The day that a chat template writes, if it writes one: 2026-01-31."""
    seed: int = 0
    """Of what shares a row and of the order; what is held out does not depend on it."""
    prefetch: int = 2
    """Batches to make ahead, each on a thread of its own. 0: each is made when it is needed."""

    def __post_init__(self) -> None:
        problems = field_problems(
            self, names=("sources", "heldout", "ignore"),
            counts=(("seq_len", 1), ("batch_size", 1), ("seed", 0), ("prefetch", 0)),
        )
        if self.sources == ():
            problems.append("sources is empty; name at least one file, directory or glob")
        if self.too_long not in get_args(TooLong):
            problems.append(f"too_long is {self.too_long!r}; choose one of {', '.join(get_args(TooLong))}")
        try:
            _ = self.date is None or date.fromisoformat(self.date)
        except (TypeError, ValueError):
            problems.append(f"date is {self.date!r}; write it as 2026-01-31")
        raise_problems("ChatData is not valid", problems)
