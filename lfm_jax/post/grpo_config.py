"""GRPOConfig: how answers are sampled, rewarded and learnt from."""

from __future__ import annotations

import dataclasses
import math
from typing import get_args

from lfm_jax.post.policy_gradient import Normalisation
from lfm_jax.problems import raise_problems
from lfm_jax.sampling import Sampling

_AS_SAMPLED = Sampling(temperature=1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GRPOConfig:
    """Group-relative policy optimisation (`method: grpo`).

    A rollout has `data.batch_size * updates` answers, `generations` to each prompt.

    Raises:
      ValueError: on construction, one message that lists every bad field.
    """

    rewards: tuple[str, ...] = ()
    """What answers are worth: names of `post/rewards.py` (tool_call, json_schema, answer, regex, length), or functions
    (completion, example) -> float of one's own, as MODULE:FUNCTION or FILE.py:FUNCTION."""
    reward_weights: tuple[float, ...] = ()
    """Of each reward in the sum; 1 each where left out."""
    generations: int = 8
    """G, answers to a prompt, of which each is compared with the others."""
    updates: int = 1
    """Optimizer steps on the answers of one rollout, each on data.batch_size of them."""
    max_new_tokens: int = 256
    """Most tokens of an answer; prompts of more than data.seq_len less as many are dropped."""
    sampling: Sampling = _AS_SAMPLED
    """How answers are sampled: the temperature."""
    slots: int = 64
    """Answers that are generated side by side, each in a slot of data.seq_len tokens; over a mesh, by each of the
    engine's copies of the model."""
    prefix_cache_bytes: int = 0
    """Bytes for the states of beginnings that prompts share, such as a long system message. Answers to one prompt share
    it anyway."""
    epsilon_low: float = 0.2
    """A token counts no further once its ratio to what it was sampled with is below 1 - epsilon_low ..."""
    epsilon_high: float = 0.2
    """... or above 1 + epsilon_high (DAPO: 0.28)."""
    normalisation: Normalisation = "token"
    """token: the mean over all tokens (DAPO); sequence: over answers, of the mean over the tokens of each (GRPO);
    constant: over answers, of the sum over the tokens of each, over max_new_tokens (Dr. GRPO)."""
    scale_advantages: bool = True
    """Divide by the standard deviation of a group; Dr. GRPO does not."""
    mask_truncated: bool = True
    """Learn nothing from answers that max_new_tokens cut off; their rewards count in their groups."""
    beta: float = 0.0
    """Weight of KL(policy || the model of init_from)."""
    samples_every: int = 10
    """Rollouts between those of which answers are written to samples.jsonl in the run directory. 0: none is."""
    samples: int = 2
    """Prompts of a rollout that are written there, with all their answers."""

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {getattr(self, name)!r}; it must be a whole number of at least {least}"
            for name, least in (("generations", 2), ("updates", 1), ("max_new_tokens", 1), ("slots", 1),
                                ("prefix_cache_bytes", 0), ("samples_every", 0), ("samples", 1))
            if type(getattr(self, name)) is not int or getattr(self, name) < least
        ]
        if self.reward_weights and len(self.reward_weights) != len(self.rewards):
            problems.append(f"reward_weights has {len(self.reward_weights)} numbers for {len(self.rewards)} rewards; "
                            "give one for each, or none")
        if len(set(self.rewards)) < len(self.rewards):
            problems.append(f"rewards names one twice: {', '.join(self.rewards)}; give it a weight instead")
        if not 0 < self.epsilon_low < 1:
            problems.append(f"epsilon_low is {self.epsilon_low}; it must be between 0 and 1")
        if not self.epsilon_high > 0:
            problems.append(f"epsilon_high is {self.epsilon_high}; it must be above 0")
        if not 0 <= self.beta < math.inf:
            problems.append(f"beta is {self.beta}; it must not be negative")
        if self.normalisation not in get_args(Normalisation):
            problems.append(f"normalisation is {self.normalisation!r}; choose one of "
                            f"{', '.join(get_args(Normalisation))}")
        raise_problems("GRPOConfig is not valid", problems + self._sampling_problems())

    def _sampling_problems(self) -> list[str]:
        """What stands against the ratio of two models' probabilities of a token."""
        problems = []
        if not self.sampling.temperature > 0:
            problems.append(f"sampling.temperature is {self.sampling.temperature}; it must be above 0, since greedy "
                            "answers to a prompt are all the same")
        for name in ("top_k", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty"):
            if getattr(self.sampling, name) != getattr(_AS_SAMPLED, name):
                problems.append(f"sampling.{name} is {getattr(self.sampling, name)}; leave it out: a token counts "
                                "by its probability in the distribution that it was drawn from, and the trainer makes "
                                "that from logits and temperature alone")
        if self.sampling.seed != _AS_SAMPLED.seed:
            problems.append("sampling.seed is set; answers follow from data.seed")
        return problems

    @property
    def weights(self) -> dict[str, float]:
        """The weight of each reward."""
        return dict(zip(self.rewards, self.reward_weights or [1.0] * len(self.rewards), strict=True))
