"""Shape and limits of an engine."""

from __future__ import annotations

import dataclasses
from typing import Literal

from lfm_jax.problems import raise_problems

STEPS = 32
"""The most steps of one dispatch."""
SHORT = 2048
"""Up to this many tokens in a slot, a CPU is faster with several prompts at a time and with somewhat fewer rows,
although such a dispatch copies its slots."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Shape and limits of an engine.

    Raises:
      ValueError: on construction; the message lists every bad field.
    """

    slots: tuple[tuple[int, int], ...] = ((16, 2048),)
    """(number, tokens) of each kind of slot, on each replica. A request goes to the shortest kind that holds prompt
    and max_new_tokens. Empty: 16 of 2048, and one as long as the model was trained for, or as memory allows."""
    chunk: int = 256
    """Tokens of a prompt that are taken in at a time, and of a block of the prefix cache. While prompts are taken in,
    running requests get a token after each chunk."""
    prefill_rows: int | None = None
    """Prompts taken in side by side, `chunk` tokens of each per turn. None: 8, but on a CPU, whose time grows with
    the tokens, `chunk` tokens in all: one prompt, or four short ones where three wait in slots of up to SHORT
    tokens."""
    steps: int = 8
    """The most steps of generation in one turn of the engine, which looks for new requests between turns."""
    draft: int = 0
    """Tokens drafted a step by prompt lookup; 0 for none. Pays where few requests run and answers repeat the prompt.
    Requests with a grammar or a penalty, as `lfm serve` has by default, get none."""
    prefix_cache_bytes: int = 0
    """Bytes of device memory for cached states of prompt prefixes; 0 caches none. Each kind of slot gets an equal
    part."""
    max_queue: int = 1024
    """The most requests that may wait for a slot, new ones included."""
    max_logprobs: int = 0
    """How many of the likeliest tokens a request may ask for at most; 0 turns log-probabilities off."""
    logprobs_of: Literal["model", "sampled"] = "model"
    """What the log-probabilities of generated tokens are by: the model alone, or the distribution that a token is drawn
    from, after temperature, penalties, filters, bias and grammar."""
    max_stop_ids: int = 8
    fixed_rows: bool = False
    """Whether dispatches always have the same shape: all slots, with drafts, when they generate, and the same number of
    prompts when they take in prompts. This is slower, but what a request gets then does not depend on other requests
    even through the rounding of a sum. With `draft` this holds as long as none of them has a grammar, which stops
    drafts for all."""
    kv: Literal["model", "int8"] = "model"
    """What slots keep keys and values in: the dtype of the model, or int8 with a scale for each head of a token, which
    takes about half of bfloat16. Conv tails and recurrences keep theirs."""
    joined: bool = False
    """Whether the weights of queries, keys and values are one matrix, and so w1 and w3: fewer kernels in a step, which
    few rows on a GPU spend much of their time launching. Results are the same but for rounding, on a CPU to the bit up
    to 256 rows. The engine then holds a copy of these weights. Narrow weights and those with places for adapters stay
    as they are; over a mesh it is refused."""
    adapters: int = 0
    """Places for adapters (LoRA). Requests of several may share a dispatch, and adapters come and go without a
    compilation; each step computes all places, used or not. 0: none."""
    adapter_rank: int = 16
    """The largest rank of an adapter in these places. Memory and time grow with places times rank."""
    memory_bytes: int | None = None
    """Bytes of a device's memory that the engine may use; None: all that the device reports."""

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {getattr(self, name)!r}; it must be a whole number of at least {least}"
            for name, least in (("chunk", 16), ("prefill_rows", 1), ("steps", 1), ("draft", 0),
                                ("prefix_cache_bytes", 0), ("max_queue", 1), ("max_logprobs", 0),
                                ("max_stop_ids", 1), ("adapters", 0), ("adapter_rank", 1), ("memory_bytes", 1))
            if not (type(getattr(self, name)) is int and getattr(self, name) >= least)
            and not (name in ("prefill_rows", "memory_bytes") and getattr(self, name) is None)
        ]
        if type(self.chunk) is int and self.chunk & (self.chunk - 1):
            problems.append(f"chunk is {self.chunk}; it must be a power of 2")
        if type(self.steps) is int and self.steps > STEPS:
            problems.append(f"steps is {self.steps}; at most {STEPS}")
        if not isinstance(self.slots, (tuple, list)) or not all(_is_list(kind) and len(kind) == 2
                                               and all(type(x) is int and x > 0 for x in kind) for kind in self.slots):
            problems.append(f"slots is {self.slots!r}; it must list (number, tokens), both above 0")
        elif len({length for _, length in self.slots}) < len(self.slots):
            problems.append(f"slots {self.slots!r} names a length twice")
        if self.kv not in ("model", "int8"):
            problems.append(f"kv is {self.kv!r}; choose model or int8")
        if self.logprobs_of not in ("model", "sampled"):
            problems.append(f"logprobs_of is {self.logprobs_of!r}; choose model or sampled")
        if type(self.joined) is not bool:
            problems.append(f"joined is {self.joined!r}; it must be true or false")
        raise_problems("EngineConfig is not valid", problems)

    def prompts_at_once(self, kind: tuple[int, int], width: int) -> list[int]:
        """Returns the numbers of prompts of `width` tokens that a dispatch may take in, in ascending order, for a kind
        of slot (number, tokens): `prefill_rows`, or what suits the device."""
        import jax

        slots, length = kind
        if self.prefill_rows is None and jax.default_backend() == "cpu":
            group = min(slots, 4)
            fits = group * width <= self.chunk and length <= SHORT and not self.fixed_rows
            return sorted({1, group}) if fits else [1]
        return [min(slots, self.prefill_rows or 8)]


def _is_list(value: object) -> bool:
    return isinstance(value, (tuple, list)) and bool(value)


DEFAULT = EngineConfig()
