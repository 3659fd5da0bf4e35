"""Shape and limits of an engine, and the memory that it will take."""

from __future__ import annotations

import dataclasses

from lfm_jax.problems import raise_problems

STEPS = 32
"""Most steps of one dispatch."""
SHORT = 2048
"""Tokens of a slot up to which a CPU gains by several prompts at one time, or by somewhat fewer rows, although such a
dispatch copies its slots."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Shape and limits of an engine.

    Raises:
      ValueError: on construction, one message that lists every bad field.
    """

    slots: tuple[tuple[int, int], ...] = ((16, 2048),)
    """(number, tokens) of each kind of slot, on each replica. A request goes to the shortest kind that holds prompt
    and max_new_tokens."""
    chunk: int = 256
    """Tokens of a prompt taken in at one time, and of a block of the prefix cache. While prompts are taken in, others
    get a token after each such number of tokens."""
    prefill_rows: int | None = None
    """Prompts taken in side by side, `chunk` tokens of each in a turn. None: 8, but on a CPU, which takes as long as
    there are tokens, `chunk` tokens in all: one prompt, or where three wait in slots of up to SHORT tokens, four
    short ones."""
    steps: int = 8
    """Tokens generated at most between two looks at what else there is to do."""
    draft: int = 0
    """Tokens drafted a step by prompt lookup; 0 for none. Pays where few requests run and answers repeat the prompt.
    Requests with a grammar or a repetition penalty, which `lfm serve` has by default, get none."""
    prefix_cache_bytes: int = 0
    """Device memory for states of prompt prefixes; 0 for none. The kinds of slot share it evenly, each for its own."""
    max_queue: int = 1024
    """Requests that may wait; those that have just come count too."""
    max_logprobs: int = 0
    """Most likeliest tokens that a request may ask for; 0: no log-probabilities at all."""
    max_stop_ids: int = 8
    max_biases: int = 16
    fixed_rows: bool = False
    """Every dispatch of generation takes all slots, however few are in use, and drafts tokens whoever wants them.
    So does a dispatch that takes in prompts always have as many rows. Slower, and then what a request gets does not
    depend on what others run even by the rounding of a sum; with `draft`, as long as none of them has a grammar, which
    stops drafts for all."""
    memory_bytes: int | None = None
    """Memory of a device that may be used; None: what the device says it has."""

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {getattr(self, name)!r}; it must be a whole number of at least {least}"
            for name, least in (("chunk", 16), ("prefill_rows", 1), ("steps", 1), ("draft", 0),
                                ("prefix_cache_bytes", 0), ("max_queue", 1), ("max_logprobs", 0),
                                ("max_stop_ids", 1), ("max_biases", 1), ("memory_bytes", 1))
            if not (type(getattr(self, name)) is int and getattr(self, name) >= least)
            and not (name in ("prefill_rows", "memory_bytes") and getattr(self, name) is None)
        ]
        if type(self.chunk) is int and self.chunk & (self.chunk - 1):
            problems.append(f"chunk is {self.chunk}; it must be a power of 2")
        if type(self.steps) is int and self.steps > STEPS:
            problems.append(f"steps is {self.steps}; at most {STEPS}")
        if not _is_list(self.slots) or not all(_is_list(kind) and len(kind) == 2
                                               and all(type(x) is int and x > 0 for x in kind) for kind in self.slots):
            problems.append(f"slots is {self.slots!r}; it must list (number, tokens), both above 0")
        elif len({length for _, length in self.slots}) < len(self.slots):
            problems.append(f"slots {self.slots!r} names a length twice")
        raise_problems("EngineConfig is not valid", problems)

    def prompts_at_once(self, kind: tuple[int, int], width: int) -> list[int]:
        """How many prompts of `width` tokens a dispatch may take in, rising, for slots of a kind (number, tokens):
        `prefill_rows`, or what suits the devices at hand."""
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
