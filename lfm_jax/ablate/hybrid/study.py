"""The study of a trained model that keeps k of its attention layers: its recipe, its arms, what it costs by count.

Dimensions: T tokens of a row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple, get_args

from lfm_jax.ablate.pattern import attention_at
from lfm_jax.config import DType, ModelConfig
from lfm_jax.post.hybridise import hybrid_config
from lfm_jax.problems import raise_problems

Place = Literal["even", "chosen", "from_first"]
ORIGINAL = "original"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage of distillation.

    Raises:
      ValueError: on construction; the message lists every bad field.
    """

    rows: int
    """Rows that are learnt from, each once; the same for every arm, in the same order. They begin at places that are
    drawn, so that many rows of few books overlap."""
    peak_lr: float

    def __post_init__(self) -> None:
        problems = [] if self.rows >= 1 else [f"rows is {self.rows}; it must be at least 1"]
        problems += [] if self.peak_lr > 0 else [f"peak_lr is {self.peak_lr}; it must be above 0"]
        raise_problems("Stage is not valid", problems)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HybridStudy:
    """What `experiments/hybridise.py` is asked.

    Raises:
      ValueError: on construction, one message that lists every bad field.
    """

    movable: ClassVar[frozenset[str]] = frozenset({
        "out", "model", "books", "texts", "tasks_data", "attention", "places", "repeated", "seeds", "minutes",
        "keep_models", "checkpoint_every", "question",
    })
    """Fields that may change between two calls in one directory: none changes what is there already."""

    name: str
    question: str
    """What the study is to answer, for the report's head."""
    out: str
    """Directory of studies; this one's lies in its folder `name`."""
    model: str
    """The original, whatever `lfm.load` takes; its layers are full attention."""
    books: str
    """A directory of texts (.txt, searched recursively) to learn from."""
    heldout_books: tuple[str, ...]
    """Shell patterns over names of files in `books` that are measured on and never learnt from."""
    texts: tuple[str, ...]
    """Files of other kinds of text, which are measured on: a JSON object with a `text` in each line, a document. The
    stem of a file's name says the kind. Needles are hidden in the first."""
    tasks: tuple[str, ...] = ()
    """Tasks of lm-eval of which each document is right or wrong, such as arc_easy and piqa."""
    tasks_data: str | None = None
    """A directory with their data, as of `lfm eval`."""
    tasks_documents: int = 100
    """The first so many documents of each."""
    attention: tuple[int, ...]
    """Numbers k of attention layers that are kept; all of the model's are the original itself, which is not trained."""
    places: tuple[Place, ...] = ("even", "chosen")
    """Which are kept. even: the middles of equal parts of the stack; chosen: the most important (`importance`);
    from_first: the first layer of each equal part."""
    taps: int = 3
    """W of the convolutions."""
    dtype: DType = "float32"
    """Of activations and products, while learning and while measuring; the original's too."""
    seq_len: int
    """T, tokens of a row."""
    batch_size: int
    seed: int = 0
    """Of the passages, their order and the documents."""
    start_rows: int = 16
    """Rows on which the taps are fitted that convolutions begin with."""
    layers: Stage
    """Stage 1: all layers at once, each learns its own output; one run for all arms."""
    importance_rows: int = 4
    """Rows on which layers are weighed; of the books that are learnt from, so that no choice has seen the others."""
    tokens: Stage
    """Stage 2, of each arm: the teacher's distribution of the next token."""
    top_k: int = 32
    """Tokens of it at each place."""
    freeze: tuple[str, ...] = ("embed",)
    """What stage 2 does not train."""
    repeated: tuple[str, ...] = ()
    """Arms that are trained with more seeds, such as k6-even."""
    seeds: int = 3
    """Seeds of these; each is another order of the same rows."""
    text_documents: int = 40
    """Documents of held-out books, and of each of `texts`, of which the perplexity is measured."""
    recall_documents: int = 11
    """Documents at each length of needle and recall: a multiple of 11 has each depth as often."""
    lengths: tuple[int, ...] = (256, 512, 1024, 2048)
    """Of needle and recall, in tokens."""
    cost_contexts: tuple[int, ...] = (256, 2048, 8192)
    """Contexts at which decoding is timed. Empty: no costs are measured."""
    checkpoint_every: int = 50
    """Steps between checkpoints of a run."""
    keep_models: bool = False
    """Whether the weights of an arm stay once it is measured."""
    minutes: float | None = None
    """Stops after so long, with all that is done kept; the same command goes on."""

    def __post_init__(self) -> None:
        problems = [f"{name} is {getattr(self, name)}; it must be at least {least}" for name, least in (
            ("taps", 1), ("seq_len", 8), ("batch_size", 1), ("seed", 0), ("start_rows", 1), ("importance_rows", 1),
            ("top_k", 1), ("seeds", 1), ("text_documents", 2), ("recall_documents", 2), ("tasks_documents", 2),
            ("checkpoint_every", 1)) if getattr(self, name) < least]
        problems += [f"{name} is empty; name one" for name in (
            "name", "out", "model", "books", "heldout_books", "texts", "attention", "places", "lengths")
            if not getattr(self, name)]
        problems += [f"attention has {k}; it must be at least 0" for k in self.attention if k < 0]
        problems += [f"{name}.rows {stage.rows} is not a multiple of batch_size {self.batch_size}"
                     for name, stage in (("layers", self.layers), ("tokens", self.tokens))
                     if stage.rows % max(self.batch_size, 1)]
        problems += [f"places has {place!r}; choose of {', '.join(get_args(Place))}"
                     for place in self.places if place not in get_args(Place)]
        kinds = ["books", *(Path(file).stem for file in self.texts)]
        problems += [f"texts has another {kind!r}; name each file by its kind, and none {kinds[0]!r}"
                     for kind in dict.fromkeys(kinds) if kinds.count(kind) > 1]
        problems += [f"lengths has {n}; needle and recall take 128 tokens at least" for n in self.lengths if n < 128]
        if self.minutes is not None and not self.minutes > 0:
            problems.append(f"minutes is {self.minutes}; it must be above 0")
        raise_problems("HybridStudy is not valid", problems)

    @property
    def directory(self) -> Path:
        return Path(self.out) / self.name


class Arm(NamedTuple):
    """A model of the study."""

    name: str
    k: int
    place: str
    """A `Place`, or `all` where there is no choice."""
    attention_at: tuple[int, ...]
    seed: int

    @property
    def directory(self) -> str:
        """Its folder."""
        return self.name if not self.seed else f"{self.name}-seed{self.seed}"


def arms(study: HybridStudy, layers: int, importance: Mapping[int, float]) -> list[Arm]:
    """All arms, the original first, further seeds last.

    Args:
      layers: attention layers of the original, which are all of its layers.
      importance: of each layer; the k largest are those that `chosen` keeps.

    Raises:
      ValueError: k is over the number of layers, or `repeated` names no arm.
    """
    raise_problems("attention does not fit the model", [
        f"it has {k}, and the model has {layers} attention layers" for k in study.attention if k > layers])
    found = [Arm(ORIGINAL, layers, "all", tuple(range(layers)), study.seed)]
    for k in dict.fromkeys(study.attention):
        if k == 0:
            found.append(Arm("k0", 0, "all", (), study.seed))
        elif k < layers:
            best = sorted(sorted(importance, key=lambda i: -importance[i])[:k])
            at: dict[Place, tuple[int, ...]] = {
                "even": attention_at(layers, k, "even"), "chosen": tuple(best),
                "from_first": tuple(i * layers // k for i in range(k)),
            }
            found += [Arm(f"k{k}-{place}", k, place, at[place], study.seed) for place in study.places]
    names = [arm.name for arm in found[1:]]
    raise_problems("repeated names arms that there are not", [
        f"{name}; the arms are {', '.join(names)}" for name in study.repeated if name not in names])
    return found + [arm._replace(seed=study.seed + i) for arm in found if arm.name in study.repeated
                    for i in range(1, study.seeds)]


def counted(study: HybridStudy, original: ModelConfig) -> dict[str, float]:
    """FLOPs of each part of the study, by count: two per multiply-add, a step of training three times its forward pass
    (more than is done where weights are frozen), compilation and costs left out."""
    T, L = study.seq_len, original.num_layers
    head = 2 * original.hidden_size * original.vocab_size
    none = hybrid_config(original, (), study.taps)
    made = arms(study, L, dict.fromkeys(range(L), 0.0))
    config = {arm: hybrid_config(original, arm.attention_at, study.taps) for arm in made}
    read = sum(study.lengths) * 2 * study.recall_documents + (1 + len(study.texts)) * study.text_documents * T
    read += 150 * study.tasks_documents * len(study.tasks)  # A guess: four answers of 35 tokens.
    teacher = original.flops_per_token(T)
    return {
        "layers": study.layers.rows * T * (teacher + 3 * none.flops_per_token(T) - 4 * head),
        "importance": (L + 1) * study.importance_rows * T * (teacher + head),
        "teacher": len({arm.seed for arm in made[1:]}) * study.tokens.rows * T * teacher,
        "tokens": sum(3 * config[arm].flops_per_token(T) for arm in made[1:]) * study.tokens.rows * T,
        "measuring": sum(config[arm].flops_per_token(max(study.lengths)) for arm in made) * read,
    }


def describe(found: Sequence[Arm]) -> str:
    """The arms in a line."""
    return ", ".join(arm.directory for arm in found)
