"""Shape and limits of an engine, and the memory that it will take."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from lfm_jax.config import ITEMSIZE, ModelConfig

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from lfm_jax.infer.slots import SlotShape

STEPS = 32
"""Most steps of one dispatch."""


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
    """Tokens of a prompt taken in at one time, and of a block of the prefix cache."""
    prefill_rows: int | None = None
    """Prompts taken in side by side. None: one on a CPU, whose cores it fills, and 8 elsewhere."""
    steps: int = 8
    """Tokens generated between two looks at what else there is to do."""
    draft: int = 0
    """Tokens drafted a step by prompt lookup; 0 for none. Pays where few requests run and answers repeat the prompt."""
    prefix_cache_bytes: int = 0
    """Device memory for states of prompt prefixes; 0 for none."""
    max_queue: int = 1024
    """Requests that may wait."""
    max_logprobs: int = 0
    """Most likeliest tokens that a request may ask for; 0: no log-probabilities at all."""
    max_stop_ids: int = 8
    max_biases: int = 16
    memory_bytes: int | None = None
    """Memory of a device that may be used; None: what the device says it has."""

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {getattr(self, name)!r}; it must be a whole number of at least {least}"
            for name, least in (("chunk", 16), ("prefill_rows", 1), ("steps", 1), ("draft", 0),
                                ("prefix_cache_bytes", 0), ("max_queue", 1), ("max_logprobs", 0),
                                ("max_stop_ids", 1), ("max_biases", 1))
            if not (type(getattr(self, name)) is int and getattr(self, name) >= least)
            and not (name == "prefill_rows" and self.prefill_rows is None)
        ]
        if self.chunk & (self.chunk - 1):
            problems.append(f"chunk is {self.chunk}; it must be a power of 2")
        if self.steps > STEPS:
            problems.append(f"steps is {self.steps}; at most {STEPS}")
        if not self.slots or not all(len(kind) == 2 and all(type(x) is int and x > 0 for x in kind)
                                     for kind in self.slots):
            problems.append(f"slots is {self.slots!r}; it must list (number, tokens), both above 0")
        elif len({length for _, length in self.slots}) < len(self.slots):
            problems.append(f"slots {self.slots!r} names a length twice")
        if problems:
            raise ValueError("EngineConfig is not valid:\n" + "\n".join(f"  - {p}" for p in problems))

    def prompts_at_once(self) -> int:
        """`prefill_rows`, or what suits the devices at hand."""
        import jax

        return self.prefill_rows or (1 if jax.default_backend() == "cpu" else 8)

    def shapes(self, model: ModelConfig) -> list[SlotShape]:
        """What each kind of slot is compiled for, shortest first.

        Raises:
          ValueError: slots longer than the model's context, or drafts for a model whose state cannot go back.
        """
        from lfm_jax.infer.slots import SlotShape

        longest = max(length for _, length in self.slots)
        if longest > model.max_position:
            raise ValueError(f"slots of {longest} tokens exceed the model's max_position {model.max_position}")
        if self.draft and "recurrence" in model.layer_types:
            raise ValueError("draft needs layers whose state can go back, and a recurrence cannot; leave draft at 0")
        return [
            SlotShape(config=model, slots=number, length=length, draft=self.draft, max_logprobs=self.max_logprobs,
                      max_stop_ids=self.max_stop_ids, max_biases=self.max_biases)
            for number, length in sorted(self.slots, key=lambda kind: kind[1])
        ]

    def memory(self, model: ModelConfig, mesh: Mesh | None = None) -> dict[str, int]:
        """Bytes that an engine takes on a device, by what they are for; working memory is an estimate."""
        import jax

        V, R, tensor = model.vocab_size, self.prompts_at_once(), 1 if mesh is None else mesh.shape["tensor"]
        logits = 4 * V * max(R, max(n for n, _ in self.slots) * (1 + self.draft))
        if self.max_logprobs:
            logits = max(logits, 4 * V * R * self.chunk)
        found = {"parameters": model.num_params() * ITEMSIZE[model.param_dtype] // tensor}
        working = 0
        for shape in self.shapes(model):
            slots = jax.eval_shape(shape.init)
            state, rest = (sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
                           for tree in (slots.state, dataclasses.replace(slots, state=())))
            found[f"{shape.slots} slots of {shape.length} tokens"] = state // tensor + rest
            # A dispatch copies the rows that it works on, unless they are all there are.
            working = max(working, 2 * state // tensor * R // shape.slots)
        return found | {"prefix cache": self.prefix_cache_bytes, "working": working + 3 * logits}


DEFAULT = EngineConfig()
