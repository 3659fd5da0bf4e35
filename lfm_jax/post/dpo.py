"""Preference optimisation: pairs of answers, beside the model as it was before (`preferences.py` has the loss).

Dimensions: B rows, T time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import jax
import jax.numpy as jnp

from lfm_jax.config import ModelConfig
from lfm_jax.data.batch import LOSS_IGNORE
from lfm_jax.data.corpora.pairs import MOST_PAIRS, PairCorpus
from lfm_jax.kernels.logprobs import token_logprobs
from lfm_jax.model import LFM
from lfm_jax.post.preferences import Answers, PreferenceKind, preference_loss
from lfm_jax.post.stored import Field, Frozen
from lfm_jax.post.tuning import CorpusTuning
from lfm_jax.problems import raise_problems
from lfm_jax.train.objective import BatchArray, DeviceBatch, OverTargets, Terms

if TYPE_CHECKING:
    from lfm_jax.post.config import TuneConfig

REFERENCE = "reference"
"""The model that a run begins with, and what it says of the answers."""
ReferenceKind = Literal["once", "model"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPOConfig:
    """What `method: dpo` minimises.

    Raises:
      ValueError: on construction, one message that lists every bad field.
    """

    loss: PreferenceKind = "sigmoid"
    """sigmoid: DPO. sigmoid_norm: the same of rewards by token, LFM2's. ipo: a squared distance of such rewards."""
    beta: float = 0.1
    """How dear it is to leave the reference."""
    label_smoothing: float = 0.0
    """Share of pairs taken to be the wrong way round; not with ipo."""
    reference: ReferenceKind = "once"
    """What the model said before the run. once: asked before the first step and kept in the run directory; model: a
    frozen copy of it works in every step (with lora the model without its adapter, which is no copy)."""

    def __post_init__(self) -> None:
        problems = [f"{name} is {getattr(self, name)!r}; choose one of {', '.join(get_args(kind))}"
                    for name, kind in (("loss", PreferenceKind), ("reference", ReferenceKind))
                    if getattr(self, name) not in get_args(kind)]
        if not self.beta > 0:
            problems.append(f"beta is {self.beta}; it must be above 0")
        if not 0 <= self.label_smoothing < 0.5 or (self.label_smoothing and self.loss == "ipo"):
            problems.append(f"label_smoothing is {self.label_smoothing}; it must be at least 0 and below 0.5, and 0 "
                            "with ipo")
        raise_problems("DPOConfig is not valid", problems)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preference(OverTargets):
    """Mean over pairs of the loss of `preferences.preference_loss`; how pairs stand in rows says `corpora/pairs.py`."""

    dpo: DPOConfig
    loss_chunk: int = 512
    """Tokens whose logits are in memory at one time."""

    @property
    def arrays(self) -> dict[str, BatchArray]:
        """int32 [B, T] each; with `reference: once` also its log-probabilities of targets, float32 [B, T]."""
        once = {REFERENCE: BatchArray(dtype="float32")} if self.dpo.reference == "once" else {}
        return super().arrays | once

    @property
    def others(self) -> tuple[str, ...]:
        return () if self.dpo.reference == "once" else (REFERENCE,)

    def weight(self, batch: DeviceBatch) -> jax.Array:
        """Pairs."""
        return jnp.sum(_pairs(batch), dtype=jnp.float32)

    def __call__(self, model: LFM, batch: DeviceBatch, others: Mapping[str, LFM] | None = None) -> Terms:
        model.config.need_causal("preference optimisation")
        hidden_BTD, aux = model.hidden(batch["tokens"], batch["positions"], batch["segment_ids"])
        with jax.named_scope("loss"):
            policy_BT = token_logprobs(hidden_BTD, model.head_VD, batch["targets"], chunk=self.loss_chunk)
            reference_BT = batch[REFERENCE] if others is None else self.logprobs(others[REFERENCE], batch)
            reference_BT = jax.lax.stop_gradient(reference_BT)
            learnt_BT, pairs_B = batch["targets"] != LOSS_IGNORE, _pairs(batch)

            def of_pair(pair: jax.Array) -> tuple[jax.Array, Mapping[str, jax.Array]]:
                """Of one pair in each row, where it is."""
                sides = (Answers(policy_BT, reference_BT, learnt_BT & (batch["segment_ids"] == 2 * pair + side))
                         for side in (1, 2))
                return preference_loss(*sides, kind=self.dpo.loss, beta=self.dpo.beta,
                                       label_smoothing=self.dpo.label_smoothing, weight_B=pairs_B > pair)

            found = jax.vmap(of_pair)(jnp.arange(MOST_PAIRS))
        total, sums = jax.tree.map(lambda x: jnp.sum(x, axis=0), tuple(found))
        return Terms(total, sums, aux)

    def logprobs(self, model: LFM, batch: DeviceBatch) -> jax.Array:
        """Log-probabilities of targets, float32 [B, T]."""
        hidden_BTD, _ = model.hidden(batch["tokens"], batch["positions"], batch["segment_ids"])
        return token_logprobs(hidden_BTD, model.head_VD, batch["targets"], chunk=self.loss_chunk)


def _pairs(batch: DeviceBatch) -> jax.Array:
    """[B], pairs of each row."""
    return jnp.max(batch["segment_ids"], axis=1) // 2


def dpo_objective(config: TuneConfig) -> Preference:
    return Preference(dpo=config.dpo, loss_chunk=config.loss_chunk)


def dpo_others(config: TuneConfig) -> dict[str, ModelConfig]:
    """The copy of the model, where there has to be one."""
    return {REFERENCE: config.model} if config.dpo.reference == "model" and not config.lora.rank else {}


class DPO(CorpusTuning):
    """Pairs of answers, and what the reference says of them.

    Raises:
      ValueError: on construction: see `CorpusTuning` and `PairCorpus`.
    """

    def open_corpus(self) -> PairCorpus:
        return PairCorpus(self._config.data, self.tokenizer, self._config.model, self.template)

    def prepare(self, run_dir: Path, *, resuming: bool) -> None:
        super().prepare(run_dir, resuming=resuming)
        config = self._config
        if config.dpo.reference == "once":
            objective = dpo_objective(config)

            def reference() -> Frozen:
                return Frozen(config.training(), self.weights(),
                              lambda model, batch: {REFERENCE: objective.logprobs(model, batch)}, config.rows,
                              config.seq_len)

            # What rounds the weights that the run begins with.
            about = {"model.quantize": config.model.quantize, "lora.quantize": config.lora.quantize}
            self.keep(run_dir / REFERENCE, {REFERENCE: Field((), "float32")}, about, reference, resuming=resuming)

    def others(self) -> dict[str, Any]:
        """The model as its first step computes with it."""
        return {REFERENCE: self.as_begun()}

    def measured(self, sums: Mapping[str, float], weight: float, *, all_batches: bool) -> tuple[dict[str, float], str]:
        """Held-out means over pairs."""
        means = {f"heldout_{name}": x / weight for name, x in sums.items()}
        return means, (f"held-out loss {means['heldout_loss']:.4f}, accuracy {means['heldout_accuracy']:.1%}, reward "
                       f"margin {means['heldout_reward_margin']:.4f}")
