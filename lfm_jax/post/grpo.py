"""Group-relative policy optimisation: prompts, the model's own answers to them, and rewards."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from lfm_jax.config import ModelConfig
from lfm_jax.data.chats import OPENERS
from lfm_jax.data.prompts import Prompt, read_prompts
from lfm_jax.data.sources import find_files
from lfm_jax.post.answers import PolicyGradient
from lfm_jax.post.rewards import REWARDS, Rewards
from lfm_jax.post.rollouts import Example, Rollouts
from lfm_jax.post.tuning import Tuning
from lfm_jax.problems import raise_problems
from lfm_jax.text.chat import DEFAULT_TEMPLATE, encode_chat
from lfm_jax.text.templates import compiled_template
from lfm_jax.train.step import BASE

if TYPE_CHECKING:
    from lfm_jax.post.config import TuneConfig

OURS = ("file", "line", "reply")
"""Keys that rewards get beside those of a prompt: where it stands, and all that the model wrote."""


def grpo_objective(config: TuneConfig) -> PolicyGradient:
    """The objective of such a run."""
    grpo = config.grpo
    return PolicyGradient(
        temperature=grpo.sampling.temperature, epsilon_low=grpo.epsilon_low, epsilon_high=grpo.epsilon_high,
        normalisation=grpo.normalisation, beta=grpo.beta, loss_chunk=config.loss_chunk,
        max_tokens=grpo.max_new_tokens if grpo.normalisation == "constant" else None,
    )


def grpo_others(config: TuneConfig) -> dict[str, ModelConfig]:
    """The copy of the model that the policy is kept near to, where there has to be one."""
    return {BASE: config.model} if config.grpo.beta and not config.lora.rank else {}


def grpo_problems(config: TuneConfig) -> list[str]:
    """A line for each field that does not go with such a run."""
    grpo, data, problems = config.grpo, config.data, []
    answers = data.batch_size * grpo.updates
    if not grpo.rewards:
        problems.append(f"grpo.rewards is empty; name some of {', '.join(REWARDS)}, or a function of your own")
    if answers % grpo.generations:
        problems.append(f"data.batch_size {data.batch_size} times grpo.updates {grpo.updates} answers are no groups of "
                        f"grpo.generations {grpo.generations}; choose numbers that divide")
    if min(grpo.slots, answers) < grpo.generations:
        problems.append(f"grpo.slots is {grpo.slots}; it must be at least grpo.generations {grpo.generations}")
    if grpo.max_new_tokens >= data.seq_len:
        problems.append(f"grpo.max_new_tokens {grpo.max_new_tokens} leaves no room for a prompt in data.seq_len "
                        f"{data.seq_len}")
    if data.heldout or data.heldout_fraction:
        problems.append("grpo measures nothing on held-out prompts; set data.heldout_fraction to 0, leave data.heldout "
                        "out, and generate answers to them with a checkpoint")
    if data.too_long == "cut":
        problems.append("data.too_long is cut, but a prompt that is cut asks something else; set it to drop")
    if config.train_minutes is not None:
        problems.append("train_minutes counts steps without the time of rollouts; set steps or epochs instead")
    if config.lora.rank and config.lora.dropout:
        problems.append(f"lora.dropout is {config.lora.dropout}; set it to 0: with it the model that is trained is not "
                        "the one that sampled")
    return problems


class GRPO(Tuning):
    """Prompts, what rewards say of answers to them, and an engine that makes these with the weights of each step.

    Raises:
      ValueError: on construction: see `Tuning`; prompts that cannot be used, or that a reward cannot judge, a reward
        whose library is not installed, or several processes.
    """

    def __init__(self, config: TuneConfig):
        super().__init__(config)
        if jax.process_count() > 1:
            raise ValueError(f"grpo runs in one process, over all of its devices, and here are {jax.process_count()}; "
                             "start one alone (--processes 1, without --coordinator or --distributed)")
        try:
            self._rewards = Rewards(config.grpo.weights)
        except ImportError as error:
            raise ValueError(f"grpo.rewards: {error}") from error
        variables = _dated(self.template, config.data.date)
        problems: list[str] = []
        prompts = read_prompts(find_files(config.data.sources, suffixes=tuple(OPENERS)), config.data.ignore, problems)
        found = [self._example(prompt, variables, problems) for prompt in prompts]
        self._check_rewards(prompts, problems)
        raise_problems("prompts cannot be used", problems)
        longest = config.data.seq_len - config.grpo.max_new_tokens
        self._examples = [example for example in found if example is not None and len(example.ids) <= longest]
        self._dropped = len(prompts) - len(self._examples)
        if not self._examples:
            raise ValueError(f"sources {list(config.data.sources)}: none of {len(prompts)} prompts has at most "
                             f"{longest} tokens (data.seq_len less grpo.max_new_tokens); name other files, or raise "
                             "data.seq_len")
        digest = hashlib.blake2b(digest_size=16)
        for example in self._examples:
            judged = {key: x for key, x in example.judged.items() if key != "file"}  # It may move.
            text = json.dumps([example.ids, judged], sort_keys=True)
            digest.update(hashlib.blake2b(text.encode(), digest_size=16).digest())
        answers = config.data.batch_size * config.grpo.updates
        self._fingerprint = f"{digest.hexdigest()}-{answers}-{config.grpo.generations}-{config.data.seed}"

    def _example(self, prompt: Prompt, variables: Mapping[str, Any], problems: list[str]) -> Example | None:
        config = self._config
        if ours := [key for key in OURS if key in prompt.rest]:
            problems.append(f"{prompt}: it has the keys {', '.join(ours)}, which are ours in what rewards get; rename "
                            "them, or name them in data.ignore")
            return None
        try:
            ids = encode_chat(self.tokenizer, config.model, self.template, prompt.messages, prompt.tools,
                              variables=variables)
        except ValueError as error:
            problems.append(f"{prompt}: {error}")
            return None
        return Example(ids, _judged(prompt))

    def _check_rewards(self, prompts: list[Prompt], problems: list[str]) -> None:
        """Asks the rewards that come with the package of every prompt, and those of others, which may be slow, of one:
        what they miss in it must not end a run after hours."""
        built_in = [name for name in self._config.grpo.rewards if name in REWARDS]
        of_all = Rewards(dict.fromkeys(built_in, 1.0)) if built_in else self._rewards
        own = len(built_in) < len(self._config.grpo.rewards)
        for i, prompt in enumerate(prompts):
            example = {"reply": "", **_judged(prompt)}
            try:
                if i == 0 and own:
                    self._rewards("", example)
                elif built_in:
                    of_all("", example)
            except ValueError as error:
                problems.append(f"{prompt}: {error}")

    def steps(self) -> int:
        prompts = self._config.data.batch_size * self._config.grpo.updates // self._config.grpo.generations
        return math.ceil(self._config.epochs * len(self._examples) / prompts) * self._config.grpo.updates

    def __str__(self) -> str:
        longest = max(len(example.ids) for example in self._examples)
        over = f", {self._dropped:,} too long and dropped" if self._dropped else ""
        return f"{len(self._examples):,} prompts of at most {longest:,} tokens{over}"

    def train_data(self, rows: np.ndarray | None) -> Rollouts:
        assert rows is None  # There is one process.
        return Rollouts(self._config, self._examples, self._rewards, self.tokenizer, self.template, self._fingerprint)

    def others(self) -> dict[str, Any]:
        return {name: self.as_begun() for name in grpo_others(self._config)}

    def heldout(self) -> Iterable[Mapping[str, np.ndarray]]:
        return ()

    def measured(
        self, sums: Mapping[str, float], weight: float, *, all_batches: bool
    ) -> tuple[dict[str, float], str]:
        """Never asked: nothing is held out (`grpo_problems`)."""
        raise AssertionError("grpo holds nothing out")


def _dated(template: str | None, date: str | None) -> dict[str, Any]:
    """The variables of a template that writes the date.

    Raises:
      ValueError: it does, and none is given.
    """
    if date is not None:
        return {"strftime_now": datetime.fromisoformat(date).strftime}
    if "strftime_now" in compiled_template(template or DEFAULT_TEMPLATE)[1]:
        raise ValueError("the chat template writes the date, and a run must not ask other questions each day; name one "
                         "in data.date, such as 2026-01-31")
    return {}


def _judged(prompt: Prompt) -> dict[str, Any]:
    """What rewards see of a prompt."""
    where = {"file": str(prompt.path), "line": prompt.line, "prompt": prompt.messages}
    return where | ({"tools": prompt.tools} if prompt.tools else {}) | prompt.rest
