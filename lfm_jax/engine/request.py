"""Requests to the engine, and the events and continuations that it returns."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np

from lfm_jax.config import ModelConfig
from lfm_jax.problems import raise_problems
from lfm_jax.sampling import GREEDY, Sampling

if TYPE_CHECKING:
    from lfm_jax.structured.grammar import Matcher

Finish = Literal["stop", "length", "cancelled", "deadline", "grammar", "failed"]
"""`stop`: a stop id. `length`: max_new_tokens. `cancelled` and `deadline` may come at any time, also while it waits.
`grammar`: the request's grammar lets no token follow, or takes too much work. `failed`: the model's logits were not
finite, or the engine has failed. The event of the last two says why."""
LOGITS_NOT_FINITE = "the model's logits are not finite: its weights are damaged, or its dtype is too narrow for them"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt to continue n times.

    Raises:
      ValueError: on construction; the message lists every bad field and how to fix it.
    """

    prompt: Sequence[int]
    """Token ids, at least one."""
    max_new_tokens: int = 64
    """0 takes in the prompt, for its `prompt_logprobs` or for the prefix cache, and generates nothing."""
    min_new_tokens: int = 0
    """The number of tokens before the first stop id, unless a grammar allows nothing else."""
    sampling: Sampling = GREEDY
    n: int = 1
    """Continuations; number i has the seed `sampling.seed + i`."""
    stop_ids: Sequence[int] | None = None
    """Tokens that end a continuation; None means the model's eos ids."""
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    """Added to the logits of tokens; -inf forbids a token, unless a grammar allows no other."""
    logprobs: int | None = None
    """Return the log-probability of each token and of this many likeliest tokens, before sampling parameters apply
    (unless `EngineConfig.logprobs_of` says otherwise)."""
    prompt_logprobs: bool = False
    """Return those of the prompt's tokens too."""
    grammar: Matcher | None = None
    """A matcher, at its start, of the grammar that each continuation follows with a copy. The tokens that end its text
    must be among `stop_ids`."""
    adapter: str | None = None
    """The name of one that the engine has (`Engine.load_adapter`); None for the model alone."""
    deadline: float | None = None
    """Seconds after submission at which the request is ended."""

    def __post_init__(self) -> None:
        problems = []
        object.__setattr__(self, "prompt", _ids(self.prompt))
        if self.prompt is None or not len(self.prompt):
            problems.append("prompt must be a list of at least one token id")
        for name, least in (("max_new_tokens", 0), ("min_new_tokens", 0), ("n", 1)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                problems.append(f"{name} is {value!r}; it must be a whole number of at least {least}")
        if not problems and self.min_new_tokens > self.max_new_tokens:
            problems.append(f"min_new_tokens {self.min_new_tokens} exceeds max_new_tokens {self.max_new_tokens}")
        if not isinstance(self.logit_bias, Mapping) or not all(
            type(i) is int and isinstance(x, (int, float)) and (math.isfinite(x) or x == -math.inf)
            for i, x in self.logit_bias.items()
        ):
            problems.append("logit_bias must map token ids to numbers or -inf")
        if self.logprobs is not None and (type(self.logprobs) is not int or self.logprobs < 0):
            problems.append(f"logprobs is {self.logprobs!r}; it must be None or a whole number of at least 0")
        if self.prompt_logprobs and self.logprobs is None:
            problems.append("prompt_logprobs needs logprobs, the number of likeliest tokens to return")
        if self.deadline is not None and not (isinstance(self.deadline, (int, float)) and self.deadline > 0):
            problems.append(f"deadline is {self.deadline!r}; it must be above 0 seconds")
        raise_problems("Request is not valid", problems)

    @property
    def size(self) -> int:
        """The number of tokens that its slot must have room for."""
        return len(self.prompt) + self.max_new_tokens

    def choice_sampling(self, choice: int) -> Sampling:
        """Returns the sampling parameters of continuation number `choice`."""
        return dataclasses.replace(self.sampling, seed=(self.sampling.seed + choice) % 2**32)

    def check(self, config: ModelConfig) -> None:
        """Raises ValueError for token ids that the model lacks."""
        V = config.vocab_size
        problems = [
            f"{name} has {bad[:5]}; token ids lie in 0..{V - 1}"
            for name, ids in (("prompt", self.prompt), ("stop_ids", self.stop_ids or ()),
                              ("logit_bias", list(self.logit_bias)))
            if (bad := [i for i in ids if not 0 <= i < V])
        ]
        raise_problems("Request does not fit the model", problems)


def _ids(prompt: Sequence[int]) -> list[int] | None:
    if isinstance(prompt, (str, bytes)):
        return None
    array = np.asarray(prompt)
    return array.tolist() if array.ndim == 1 and (not array.size or np.issubdtype(array.dtype, np.integer)) else None


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """Log-probabilities at one position, from the model alone: before temperature, penalties, bias and masks; those of
    generated tokens are what `EngineConfig.logprobs_of` says."""

    token: int
    logprob: float
    best: tuple[tuple[int, float], ...]
    """The likeliest tokens with their log-probabilities, best first."""


@dataclasses.dataclass(frozen=True)
class Event:
    """New tokens of one continuation, or its end."""

    choice: int
    tokens: list[int]
    """New tokens, a stop id included."""
    logprobs: list[TokenLogprob] | None = None
    """One for each new token, if they were asked for."""
    prompt_logprobs: list[TokenLogprob] | None = None
    """Of the prompt's tokens from the second on; with the first event, if they were asked for."""
    cached_tokens: int | None = None
    """Tokens of the prompt that came from the prefix cache; with the first event, once the prompt is taken in."""
    finish: Finish | None = None
    """Set with the last event of a continuation."""
    reason: str | None = None
    """Why `finish` is `grammar` or `failed`."""


@dataclasses.dataclass(frozen=True)
class Continuation:
    """A continuation that has ended."""

    tokens: list[int]
    """A stop id included."""
    finish: Finish
    reason: str | None = None
    """Why `finish` is `grammar` or `failed`."""
    logprobs: list[TokenLogprob] | None = None
    """One for each token, if they were asked for."""


Listener = Callable[[Event], None]
"""Called by the engine's thread; must be quick. An exception it raises is printed and ignored."""


class EngineFullError(RuntimeError):
    """As many requests wait as may."""


class UnknownAdapterError(ValueError):
    """The engine has no adapter of this name."""


class ContextLengthError(ValueError):
    """More tokens than a slot can hold, in the words that client libraries of OpenAI's look for."""

    def __init__(self, limit: int, prompt_tokens: int, max_new_tokens: int):
        self.limit, self.prompt_tokens, self.max_new_tokens = limit, prompt_tokens, max_new_tokens
        super().__init__(
            f"This model's maximum context length is {limit} tokens. However, you requested "
            f"{prompt_tokens + max_new_tokens} tokens ({prompt_tokens} in the messages, {max_new_tokens} in the "
            "completion). Please reduce the length of the messages or completion."
        )
