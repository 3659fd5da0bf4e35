"""Distillation: chats, and what a teacher makes of each place in them (`distillation.py` has the loss).

Dimensions: B rows, T time, K tokens of the teacher.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import jax
import optax

from lfm_jax import init_from
from lfm_jax.config import ModelConfig
from lfm_jax.data.batch import LOSS_IGNORE
from lfm_jax.data.corpora.chats import ChatCorpus
from lfm_jax.kernels.topk_logprobs import TopTokens, top_tokens
from lfm_jax.loading import model_config
from lfm_jax.model import LFM
from lfm_jax.post.distillation import distillation_loss
from lfm_jax.post.layer_outputs import TEACHER, LayerOutputs, layer_problems
from lfm_jax.post.stored import Field, Frozen, is_complete
from lfm_jax.post.tuning import SIDES, CorpusTuning
from lfm_jax.pretrain.objective import NextToken
from lfm_jax.problems import raise_problems
from lfm_jax.text.tokenizer import TOKENIZER_FILE, load_tokenizer
from lfm_jax.train.objective import BatchArray, DeviceBatch, Objective, OverTargets, Terms
from lfm_jax.train.step import Training

if TYPE_CHECKING:
    from lfm_jax.post.config import TuneConfig

IDS, LOGPROBS = "teacher_ids", "teacher_logprobs"
Learnt = Literal["assistant", "all"]
Match = Literal["tokens", "layers"]
StoredType = Literal["float16", "float32"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """What `method: distill` minimises, and by whom: LFM2's tempered, decoupled top-K objective (arXiv 2511.23404).

    Raises:
      ValueError: on construction, one message that lists every bad field.
    """

    teacher: str = ""
    """A model with the student's tokenizer: a Hugging Face directory, the directory of a run, a GGUF file, or a Hub id
    (OWNER/NAME or OWNER/NAME@REVISION). With `model.quantize` it may be init_from itself."""
    match: Match = "tokens"
    """tokens: the teacher's distribution of the next token; layers: the outputs of those of its layers whose operator
    is another one, each by itself (`layer_outputs.py`). Then top_k, temperature and cross_entropy say nothing, and the
    teacher works in every step."""
    top_k: int = 32
    """Tokens of the teacher's distribution at each place that the student sees."""
    temperature: float = 1.0
    """Both distributions within these tokens are softened by it."""
    cross_entropy: float = 0.0
    """Weight of next-token prediction beside it."""
    learn: Learnt = "assistant"
    """The places that count: where the assistant writes, or all."""
    stored: str | None = None
    """A directory with what the teacher says of every row, made by `lfm data distill` or at the beginning of the run.
    None: the teacher works in every step."""
    stored_type: StoredType = "float32"
    """Of the log-probabilities in it."""

    def __post_init__(self) -> None:
        problems = [f"{name} is {getattr(self, name)!r}; choose one of {', '.join(get_args(kind))}"
                    for name, kind in (("match", Match), ("learn", Learnt), ("stored_type", StoredType))
                    if getattr(self, name) not in get_args(kind)]
        if type(self.top_k) is not int or self.top_k < 1:
            problems.append(f"top_k is {self.top_k!r}; it must be a whole number of at least 1")
        if not self.temperature > 0:
            problems.append(f"temperature is {self.temperature}; it must be above 0")
        if not self.cross_entropy >= 0:
            problems.append(f"cross_entropy is {self.cross_entropy}; it must not be negative")
        if self.match == "layers":
            problems += [f"{name} is of match: tokens, and match is layers; leave it out"
                         for name in ("top_k", "temperature", "cross_entropy", "stored")
                         if getattr(self, name) != getattr(type(self), name)]
        if self.stored == "":
            problems.append("stored is empty; name a directory, or leave it out")
        raise_problems("DistillConfig is not valid", problems)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distillation(OverTargets):
    """Mean over learnt targets of `distillation.distillation_loss`."""

    distill: DistillConfig
    loss_chunk: int = 512
    """Tokens whose logits are in memory at one time."""

    @property
    def arrays(self) -> dict[str, BatchArray]:
        """int32 [B, T] each; of a stored teacher also its tokens, [B, T, K]."""
        arrays = super().arrays
        if self.distill.stored is not None:
            axes = ("batch", "time", self.distill.top_k)
            arrays |= {IDS: BatchArray(axes), LOGPROBS: BatchArray(axes, "float32")}
        return arrays

    @property
    def others(self) -> tuple[str, ...]:
        return (TEACHER,) if self.distill.stored is None else ()

    def __call__(self, model: LFM, batch: DeviceBatch, others: Mapping[str, LFM] | None = None) -> Terms:
        model.config.need_causal("distillation")
        hidden_BTD, aux = model.hidden(batch["tokens"], batch["positions"], batch["segment_ids"])
        with jax.named_scope("loss"):
            teacher = TopTokens(batch[IDS], batch[LOGPROBS]) if others is None else self.best(others[TEACHER], batch)
            found = distillation_loss(
                hidden_BTD, model.head_VD, teacher, batch["targets"], batch["targets"] != LOSS_IGNORE,
                temperature=self.distill.temperature, cross_entropy_weight=self.distill.cross_entropy,
                chunk=self.loss_chunk,
            )
        return Terms(found.total, found.sums, aux)

    def best(self, teacher: LFM, batch: DeviceBatch) -> TopTokens:
        """The teacher's best tokens of each place."""
        hidden_BTD, _ = teacher.hidden(batch["tokens"], batch["positions"], batch["segment_ids"])
        return top_tokens(hidden_BTD, teacher.head_VD, self.distill.top_k, chunk=self.loss_chunk)


def distill_objective(config: TuneConfig) -> Objective:
    return LayerOutputs() if config.distill.match == "layers" else _of_tokens(config)


def _of_tokens(config: TuneConfig) -> Distillation:
    return Distillation(distill=config.distill, loss_chunk=config.loss_chunk)


def distill_others(config: TuneConfig) -> dict[str, ModelConfig]:
    """The teacher, where it works in every step."""
    distill = config.distill
    return {TEACHER: teacher_config(distill.teacher)} if distill.teacher and distill.stored is None else {}


@functools.lru_cache(maxsize=4)
def teacher_config(name: str) -> ModelConfig:
    """The config of a teacher, whose weights keep their types.

    Raises:
      ValueError: see `lfm.load`.
    """
    return model_config(name)


def distill_problems(config: TuneConfig) -> list[str]:
    """A line for each thing that student and teacher do not have in common."""
    name, model = config.distill.teacher, config.model
    if not name:
        return ["distill.teacher is empty; name the model to learn from"]
    if _said_all(config.distill):
        return []
    try:
        teacher = teacher_config(name)
    except ValueError as error:
        return [f"distill.teacher: {error}"]
    problems = []
    if teacher.vocab_size != model.vocab_size:
        problems.append(f"distill.teacher {name} has {teacher.vocab_size} tokens and the student {model.vocab_size}; "
                        "its distributions are over other tokens: choose a teacher with the student's tokenizer")
    if not teacher.causal:
        problems.append(f"distill.teacher {name} is an encoder; name a causal model")
    if config.distill.match == "layers":
        problems += layer_problems(teacher, model)
    if config.distill.top_k > model.vocab_size:
        problems.append(f"distill.top_k {config.distill.top_k} exceeds the {model.vocab_size} tokens there are")
    if config.seq_len > teacher.max_position:
        problems.append(f"rows of {config.seq_len} tokens exceed the teacher's max_position {teacher.max_position}")
    return problems


def _said_all(distill: DistillConfig) -> bool:
    """Whether the directory of what the teacher says is complete, so that the teacher was found to fit."""
    return distill.stored is not None and all(is_complete(Path(distill.stored) / side) for side in SIDES)


class Distill(CorpusTuning):
    """Chats, and a teacher.

    Raises:
      ValueError: on construction: see `CorpusTuning` and `ChatCorpus`, or the teacher has another tokenizer.
    """

    def open_corpus(self) -> ChatCorpus:
        config = self._config
        if not _said_all(config.distill):
            self._check_tokens()
        return ChatCorpus(config.data, self.tokenizer, config.model, self.template,
                          all_learnt=config.distill.learn == "all")

    def prepare(self, run_dir: Path, *, resuming: bool) -> None:
        super().prepare(run_dir, resuming=resuming)
        self.store(resuming=resuming)

    def store(self, *, resuming: bool = False) -> None:
        """Has the teacher say what is not stored yet; nothing where it works in every step."""
        config, distill = self._config, self._config.distill
        if distill.stored is None:
            return
        objective = _of_tokens(config)

        def teacher() -> Frozen:
            training = Training(model=teacher_config(distill.teacher), objective=NextToken(),
                                optimizer=optax.identity())
            return Frozen(training, self._teacher(),
                          lambda model, batch: dict(zip((IDS, LOGPROBS), objective.best(model, batch), strict=True)),
                          config.rows, config.seq_len)

        K, ids = distill.top_k, "uint16" if config.model.vocab_size <= 2**16 else "uint32"
        self.keep(Path(distill.stored), {IDS: Field((K,), ids), LOGPROBS: Field((K,), distill.stored_type)},
                  {"learn": distill.learn, "teacher": distill.teacher}, teacher, resuming=resuming)

    def others(self) -> dict[str, Any]:
        return {TEACHER: self._teacher()}

    def _teacher(self) -> Any:
        name = self._config.distill.teacher
        return init_from.weights(name, teacher_config(name))

    def _check_tokens(self) -> None:
        name = self._config.distill.teacher
        with init_from.sidecar_files(name) as directory:
            if not (directory / TOKENIZER_FILE).exists():
                raise ValueError(f"distill.teacher {name} has no {TOKENIZER_FILE}, so that nothing says whether its "
                                 "tokens are the student's; put its model's there")
            theirs = load_tokenizer(directory).get_vocab(with_added_tokens=True)
        ours = self.tokenizer.get_vocab(with_added_tokens=True)
        if ours != theirs:
            other = min(ours.items() ^ theirs.items(), key=lambda item: item[1])
            raise ValueError(f"distill.teacher {name} has another tokenizer than the student: token {other[1]} is "
                             f"{_named(ours, other[1])} here and {_named(theirs, other[1])} there; choose a teacher "
                             "with the student's tokenizer")

    def measured(self, sums: Mapping[str, float], weight: float, *, all_batches: bool) -> tuple[dict[str, float], str]:
        """Held-out means over learnt tokens, in nats; of layers, shares."""
        means = {f"heldout_{name}": x / weight for name, x in sums.items()}
        if self._config.distill.match == "layers":
            return means, f"held out, {means['heldout_loss']:.4f} of the layers' work is left undone"
        divergence = means["heldout_kl_mass"] + means["heldout_kl_top"]
        return means, (f"held-out loss {means['heldout_loss']:.4f}, divergence from the teacher {divergence:.4f}, "
                       f"cross-entropy {means['heldout_cross_entropy']:.4f} nats/learnt token")


def _named(vocabulary: Mapping[str, int], id: int) -> str:
    return next((repr(token) for token, i in vocabulary.items() if i == id), "none")
