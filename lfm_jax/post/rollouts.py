"""Rollouts: answers that the model in training gives to prompts, by an engine in the same process, as batches.

Dimensions: B answers of an optimizer step, one a row; T time.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from tokenizers import Tokenizer

from lfm_jax.data.batch import Batch
from lfm_jax.engine.config import EngineConfig
from lfm_jax.engine.engine import Engine
from lfm_jax.engine.placement import gathered, replica_mesh
from lfm_jax.engine.request import Continuation, Request
from lfm_jax.files import write_whole
from lfm_jax.model import abstract_model
from lfm_jax.post.answers import Answer, rows_of
from lfm_jax.post.policy_gradient import group_advantages
from lfm_jax.post.rewards import Rewarded, Rewards
from lfm_jax.stacking import unstack_layers
from lfm_jax.text.chat import reply_stage, turn_stop_ids
from lfm_jax.text.thoughts import split_thought, thinking
from lfm_jax.train.state import TrainState

if TYPE_CHECKING:
    from lfm_jax.post.config import TuneConfig

SAMPLES = "samples.jsonl"
_ORDER, _SAMPLING = 0, 1
"""What random numbers are for."""


class Example(NamedTuple):
    """A prompt, ready to be answered."""

    ids: list[int]
    judged: Mapping[str, Any]
    """What rewards see of it."""


class Rollouts:
    """A `driver.Experience`: batches of answers by the weights of the state that the first of them is for.

    Prompts come in a new order each epoch. Order and answers follow from (data.seed, rollout, prompt, answer) and the
    weights alone, and what is left of a rollout between two of its updates is part of the saved state, so that a run
    that is killed goes on to the bit.

    Over a mesh (`jax.set_mesh`) the engine works on the same devices: it has a copy of the model for each place along
    all axes but `tensor`, over which it is split. Weights that a step keeps in parts (`fsdp`) are gathered on the
    devices.

    Args:
      fingerprint: of the prompts and of all else that their order follows from.
    """

    def __init__(
        self, config: TuneConfig, examples: Sequence[Example], rewards: Rewards, tokenizer: Tokenizer,
        template: str | None, fingerprint: str,
    ):
        self._config, self._examples, self._rewards = config, examples, rewards
        self._tokenizer, self._fingerprint = tokenizer, fingerprint
        self._stop_ids = turn_stop_ids(tokenizer, config.model)
        self._thinking = thinking(tokenizer, template)
        self._samples = Samples(Path(config.run_dir) / SAMPLES)
        self._engine: Engine | None = None
        self._training = config.training()
        made = bool(config.model.scan_layers or config.model.quantize)
        # Others are handed over as they are; a compiled function would copy them.
        self._weights = jax.jit(self._weights_of) if made else self._weights_of
        self._rollouts = 0
        """Rollouts made so far."""
        self._answers: list[Answer] = []
        """Those of the last one that are still to be learnt from."""
        self._ended: float | None = None
        """When the last one did."""

    # ------------------------------------------------------------ driver.Experience

    def next_for(self, state: TrainState) -> tuple[Batch, dict[str, float]]:
        """Raises:
        ValueError: a reward failed; it says which one, and on which prompt.
        RuntimeError: the model's logits are not finite.
        """
        report = {} if self._answers else self._roll_out(state)
        B = self._config.data.batch_size
        batch, self._answers = self._answers[:B], self._answers[B:]
        return rows_of(batch, self._config.data.seq_len), report

    def get_state(self) -> dict[str, Any]:
        return {"fingerprint": self._fingerprint, "rollouts": self._rollouts, "answers": [*map(list, self._answers)]}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on exactly where the state was taken.

        Raises:
          ValueError: the state belongs to other data.
        """
        if state.get("fingerprint") != self._fingerprint:
            raise ValueError("the saved data position belongs to other data: the prompts, the tokenizer, the chat "
                             "template, batch_size, grpo.generations, grpo.updates or data.seed changed since; restore "
                             "them, or start a new run")
        self._rollouts, self._answers = state["rollouts"], [Answer(*x) for x in state["answers"]]

    # ------------------------------------------------------------ a rollout

    def _roll_out(self, state: TrainState) -> dict[str, float]:
        """Makes answers, and returns what is reported of them."""
        grpo = self._config.grpo
        weights = jax.block_until_ready(self._weights(state.params, state.frozen))
        began = time.monotonic()
        examples = [self._examples[i] for i in self._chosen(self._rollouts)]
        groups = self._sampled(weights, examples)
        seconds = time.monotonic() - began
        rewarded = [[self._rewarded(example, answer) for answer in group]
                    for example, group in zip(examples, groups, strict=True)]
        totals = np.array([[one.total for one in group] for group in rewarded])
        advantages = group_advantages(totals.reshape(-1), grpo.generations, scale=grpo.scale_advantages)
        self._answers = [
            Answer([*example.ids, *answer.tokens], len(example.ids), _logprobs(answer), float(advantage),
                   answer.finish == "stop" or not grpo.mask_truncated)
            for (example, answer), advantage in zip(_pairs(examples, groups), advantages, strict=True)
        ]
        if grpo.samples_every and self._rollouts % grpo.samples_every == 0:
            self._samples.write(self._rollouts, [
                self._shown(int(state.step) + 1, *one) for one in zip(
                    examples[: grpo.samples], groups, rewarded, advantages.reshape(totals.shape).tolist(), strict=False)
            ])
        report = _report(groups, rewarded, totals)
        ended = time.monotonic()
        report |= {"rollout/seconds": seconds,
                   "rollout/tokens_per_second": sum(len(x.tokens) for group in groups for x in group) / seconds}
        if self._ended is not None:
            report["rollout/share"] = seconds / (ended - self._ended)
        self._ended = ended
        self._rollouts += 1
        return report

    def _weights_of(self, params: Any, frozen: Any) -> Any:
        """The weights that a step computes with, as an engine takes them."""
        model = self._training.model_of(params, frozen)
        weights = nnx.to_pure_dict(nnx.split(model, nnx.Param)[1])
        if self._config.model.scan_layers:
            weights = unstack_layers(weights, self._config.model)
        return gathered(weights)

    def _chosen(self, rollout: int) -> list[int]:
        """Numbers of its prompts."""
        grpo, data, N = self._config.grpo, self._config.data, len(self._examples)
        prompts = data.batch_size * grpo.updates // grpo.generations
        first = rollout * prompts
        orders = {epoch: np.random.default_rng([data.seed, _ORDER, epoch]).permutation(N)
                  for epoch in range(first // N, (first + prompts - 1) // N + 1)}
        return [int(orders[i // N][i % N]) for i in range(first, first + prompts)]

    def _sampled(self, weights: Any, examples: Sequence[Example]) -> list[list[Continuation]]:
        """The answers to each prompt."""
        grpo, data = self._config.grpo, self._config.data
        if self._engine is None:
            mesh = jax.sharding.get_mesh()
            mesh = None if mesh.empty else replica_mesh(mesh)
            prompts = math.ceil(len(examples) / (1 if mesh is None else mesh.shape["data"]))
            slots = min(grpo.slots, prompts * grpo.generations)
            self._engine = Engine(nnx.merge(abstract_model(self._config.model)[0], weights), EngineConfig(
                slots=((slots, data.seq_len),), max_logprobs=1, logprobs_of="sampled",
                max_stop_ids=len(self._stop_ids) or 1, prefix_cache_bytes=grpo.prefix_cache_bytes), mesh)
        self._engine.use(weights)
        groups = self._engine.complete([
            Request(prompt=example.ids, max_new_tokens=grpo.max_new_tokens, n=grpo.generations, logprobs=0,
                    sampling=dataclasses.replace(grpo.sampling, seed=self._seed(place)), stop_ids=self._stop_ids)
            for place, example in enumerate(examples)
        ])
        failed = next((answer for group in groups for answer in group if answer.finish not in ("stop", "length")), None)
        if failed is not None:
            raise RuntimeError(f"an answer of rollout {self._rollouts} failed: {failed.reason or failed.finish}")
        return groups

    def _seed(self, place: int) -> int:
        """Of the group at a place of a rollout; its answers have the seeds from there on."""
        numbers = np.random.SeedSequence([self._config.data.seed, _SAMPLING, self._rollouts, place])
        return int(numbers.generate_state(1)[0])

    def _rewarded(self, example: Example, answer: Continuation) -> Rewarded:
        whole = text = self._text(answer)
        if self._thinking is not None:
            text = split_thought(whole, reply_stage(self._tokenizer, self._thinking, example.ids)).answer
        return self._rewards(text, {"reply": whole, **example.judged})

    def _text(self, answer: Continuation) -> str:
        """What the model wrote, its thought too, without the token that ends it."""
        ids = answer.tokens[:-1] if answer.finish == "stop" else answer.tokens
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def _shown(
        self, step: int, example: Example, group: Sequence[Continuation], rewarded: Sequence[Rewarded],
        advantages: Sequence[float],
    ) -> dict[str, Any]:
        answers = [
            {"text": self._text(answer), "reward": reward.total, "rewards": reward.by_name, "advantage": advantage,
             "tokens": len(answer.tokens), "finish": answer.finish}
            for answer, reward, advantage in zip(group, rewarded, advantages, strict=True)
        ]
        return {"step": step, "file": example.judged["file"], "line": example.judged["line"],
                "prompt": self._tokenizer.decode(example.ids, skip_special_tokens=False), "answers": answers}


class Samples:
    """A file of JSON lines with some answers of some rollouts. What a kill undid is dropped when it is done again."""

    def __init__(self, path: Path):
        self._path, self._begun = path, False

    def write(self, rollout: int, records: Sequence[Mapping[str, Any]]) -> None:
        """Adds the records of a rollout.

        Raises:
          OSError: they cannot be written.
        """
        if not self._begun and self._path.exists():
            *lines, _ = self._path.read_bytes().split(b"\n")  # A kill may have cut the last one, in a character too.
            kept = [line.decode() for line in lines if json.loads(line)["rollout"] < rollout]
            write_whole(self._path, "".join(f"{line}\n" for line in kept))
        self._begun = True
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({"rollout": rollout, **x}, ensure_ascii=False) + "\n" for x in records)


def _pairs(examples: Sequence[Example], groups: Sequence[Sequence[Continuation]]) -> list[tuple[Example, Continuation]]:
    return [(example, answer) for example, group in zip(examples, groups, strict=True) for answer in group]


def _logprobs(answer: Continuation) -> list[float]:
    assert answer.logprobs is not None  # They were asked for.
    return [one.logprob for one in answer.logprobs]


def _report(
    groups: Sequence[Sequence[Continuation]], rewarded: Sequence[Sequence[Rewarded]], totals: np.ndarray
) -> dict[str, float]:
    answers = [answer for group in groups for answer in group]
    lengths, by_name = [len(answer.tokens) for answer in answers], [one.by_name for group in rewarded for one in group]
    report = {
        "reward/mean": totals.mean(), "reward/std": totals.std(axis=1, ddof=1).mean(),
        "groups_of_one_reward": np.mean(totals.min(axis=1) == totals.max(axis=1)),
        "answer_tokens/mean": np.mean(lengths), "answer_tokens/max": max(lengths),
        "truncated": np.mean([answer.finish == "length" for answer in answers]),
        # What the tokens that were sampled estimate.
        "entropy": -np.mean([logprob for answer in answers for logprob in _logprobs(answer)]),
    }
    report |= {f"reward/{name}": np.mean([one[name] for one in by_name]) for name in by_name[0]}
    return {name: float(x) for name, x in report.items()}
