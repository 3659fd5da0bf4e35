"""Life: the settings of the whole, with the minutes that each station may take."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from lfm_jax.problems import raise_problems

HERE = Path(__file__).parent
STATIONS = ("pretrain", "long", "sft", "prefer", "prefer-Q8_0", "prefer-Q4_0", "narrow")
"""What can be measured, in order."""
PLACES = ("out", "page", "llama_cpp", "books", "dialogues", "schemas")
"""Settings that are paths of a machine."""
BLOCKS = {"prefer": "prefer-Q8_0", "narrow": "narrow-Q4_0"}
"""The file in blocks that other engines run, by the station that it is made of."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Minutes:
    """What stations may take, in minutes of their steps; measuring comes on top."""

    pretrain: float
    long: float
    sft: float
    pairs: float
    """Sampling and judging of the answers that preferences are made of."""
    prefer: float
    narrow: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Life:
    """The life of a model that calls tools, from raw text to a GGUF file, every station measured.

    Stopped or killed and started again by the same command, it goes on where it was.

    Raises:
      ValueError: on construction, one message that lists every bad field.
    """

    books: Path = Path("books")
    """Directory with texts (.txt)."""
    dialogues: Path = Path("sgd")
    """Directory with sgd_{train,test}.jsonl.xz (experiments/sgd_tool_calls.py says what is in them)."""
    schemas: Path = Path("schemas")
    """Directory with JSON schemas, a file each, as of JSONSchemaBench."""
    out: Path = Path("runs/tool_caller")
    """Directory of all runs, files and measurements; each seed has one of its own in it."""
    page: Path = Path("docs", "tool_caller")
    """Directory of the page, with its figures and raw results."""
    llama_cpp: str = ""
    """A Python that has llama-cpp-python; empty: what is asked of llama.cpp is left out."""
    seed: int = 0
    """Of weights, order and samples. The page has all seeds that are there."""
    minutes: Minutes
    steps: int = 0
    """Steps of each training run in place of its minutes, to try the whole quickly; 0: as many as the minutes hold."""
    rate: float = 0.0
    """GFLOP/s of training that the size of the model is chosen for; 0: timed on this machine."""
    vocab_size: int
    pattern: str
    """Of operators, as in studies of `lfm ablate`."""
    widths: tuple[int, ...]
    """Sizes that the law chooses among: multiples of 32."""
    context: int
    """T of pre-training."""
    long_context: int
    """T of all that follows."""
    batch_tokens: int
    """Tokens of an optimizer step, up to whole rows."""
    heldout_books: float = 0.1
    """Share of the books that is held out, by a hash of their names."""
    passages: int
    """Passages of held-out books that bits per byte are measured on."""
    documents: int
    """Turns of held-out dialogues, of seen and of unseen services each, that calls are measured on."""
    base_documents: int
    """The same of models that have not seen a chat, and write until they are cut off."""
    schema_documents: int
    """JSON schemas that are to be followed."""
    samples: int = 4
    """Answers to a prompt that preferences are made of."""
    equal_documents: int
    """Turns, of each kind, that all engines answer."""
    served_documents: int
    """Turns, of each kind, that our server answers."""
    slots: int = 16
    """Texts that are generated side by side."""
    measured: tuple[str, ...] = STATIONS
    """Stations that are measured; those of `equal`, and `narrow`, must be among them."""
    equal: tuple[str, ...] = tuple(BLOCKS)
    """Stations whose weights all engines answer with."""
    forms: tuple[str, ...] = ("float32", "w8a8")
    """Forms of weights in which memory and speed are measured here."""
    repeats: int = 3
    """Measurements of memory and speed, each in a process of its own."""

    def __post_init__(self) -> None:
        problems = [f"{name} is {getattr(self, name)}; it must be at least 1" for name in (
            "vocab_size", "context", "batch_tokens", "passages", "documents", "base_documents", "schema_documents",
            "equal_documents", "served_documents", "slots", "repeats") if getattr(self, name) < 1]
        if self.samples < 2:
            problems.append(f"samples is {self.samples}; it must be at least 2, of which one is right and one wrong")
        if self.long_context < self.context:
            problems.append(f"long_context is {self.long_context}; it must be at least context, {self.context}")
        if not self.widths or any(width < 32 or width % 32 for width in self.widths):
            problems.append(f"widths is {self.widths}; name multiples of 32: blocks of GGUF files have 32 numbers")
        for name, known in (("measured", STATIONS), ("equal", tuple(BLOCKS))):
            if unknown := sorted({*getattr(self, name)} - {*known}):
                problems.append(f"{name} has {', '.join(unknown)}; choose among {', '.join(known)}")
        if not {*self.equal, "narrow"} <= set(self.measured):
            problems.append(f"measured is {self.measured}; it must have narrow and all of equal, {self.equal}")
        raise_problems("Life is not valid", problems)

    @property
    def max_position(self) -> int:
        """What the model reads: twice the length that it learns, since a prompt may be long and an answer follows."""
        return 2 * self.long_context

    @property
    def home(self) -> Path:
        """Directory of this seed."""
        return self.out / f"seed-{self.seed}"

    @property
    def data(self) -> Path:
        """Directory of the data, which all seeds share."""
        return self.out / "data"
