"""The programs of a pool in every shape that it calls them in: the order in which a server that has just started wants
them, and how each one is compiled before it is called.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lfm_jax.engine.config import SHORT, EngineConfig
from lfm_jax.engine.slots import NOWHERE, Programs, Slots, SlotShape

STAGES = 4
"""What the first request needs; what has no substitute; what makes requests quicker; what scores prompts."""


class Variant(NamedTuple):
    """One program in one shape."""

    name: str
    """Of the method of `Programs`."""
    rows: int = 0
    """That a dispatch has."""
    width: int = 0
    """Tokens of a prompt that it takes in, or of a block of the prefix cache."""
    plain: bool = False
    draft: int = 0
    fresh: bool = False

    def __str__(self) -> str:
        what = [f"{n} {unit}{'s' * (n > 1)}" for n, unit in ((self.rows, "row"), (self.width, "token")) if n]
        what += [name for name in ("plain", "draft", "fresh") if getattr(self, name)]
        return f"{self.name} ({', '.join(what)})" if what else self.name


def chunk_width(tokens: int, chunk: int) -> int:
    """The shape that the next `tokens` tokens of a prompt are taken in with: a power of 2 from 16 to `chunk`."""
    return min(chunk, max(16, 1 << (tokens - 1).bit_length()))


def chunk_widths(length: int, chunk: int) -> list[int]:
    """All shapes of prompts in slots of `length` tokens, rising. In long slots one: beside what is asked of these, the
    little that a narrower one would save is nothing."""
    if length > SHORT:
        return [chunk_width(length, chunk)]
    return sorted({chunk_width(n, chunk) for n in (*(1 << i for i in range(length.bit_length())), length)})


def general_decode(shape: SlotShape) -> Variant:
    """The form of `decode` that does for all requests, however many there are."""
    return Variant("decode", shape.slots, draft=shape.draft if shape.fixed_rows else 0)


def cache_variants(config: EngineConfig) -> list[Variant]:
    """What the prefix cache needs."""
    C = config.chunk
    return [Variant("snapshot", width=C), *[Variant("restore", width=C, fresh=fresh) for fresh in (True, False)]]


def variants(shape: SlotShape, config: EngineConfig) -> list[list[Variant]]:
    """All there are, in STAGES."""

    def of_prompts(name: str) -> list[Variant]:
        return [Variant(name, R, width) for width in reversed(chunk_widths(shape.length, config.chunk))
                for R in config.prompts_at_once((shape.slots, shape.length), width)]

    prefills, batch = of_prompts("prefill"), config.prompts_at_once((shape.slots, shape.length), config.chunk)[0]
    first = [prefills[0], Variant("start", prefills[0].rows), general_decode(shape)]
    drafted = {shape.draft} if shape.fixed_rows else {0, shape.draft}
    several = [Variant("stop", batch), Variant("copy", batch), Variant("bias")]
    if config.prefix_cache_bytes and shape.length > config.chunk:
        several += cache_variants(config)
    matched = [Variant(name, n) for n in sorted(shape.row_counts, reverse=True) for name in ("advance", "choose")]
    several += matched[:2]
    quick = [*[Variant("start", R) for R in sorted({v.rows for v in prefills})], *prefills]
    quick += [Variant("decode", n, plain=plain, draft=draft) for n in sorted(shape.row_counts, reverse=True)
              for plain in (True, False) for draft in sorted(drafted)]
    quick += matched[2:]
    stages = [first, several, quick, of_prompts("score") if config.max_logprobs else []]
    seen: set[Variant] = set()
    return [[v for v in stage if not (v in seen or seen.add(v))] for stage in stages]


def lower(programs: Programs, variant: Variant, params: Any, slots: Slots, shape: SlotShape) -> jax.stages.Lowered:
    """The program as `Pool` calls it, to be compiled. Of parameters and slots shapes are enough."""
    R, V, mesh = variant.rows, shape.config.vocab_size, jax.sharding.get_mesh()
    where_R, numbers_R = np.full(R, NOWHERE, np.int32), np.zeros(R, np.int32)
    tokens_RC, masks_RW = np.zeros((R, variant.width), np.int32), np.zeros((R, shape.mask_words), np.uint32)
    logits_RV = jax.ShapeDtypeStruct(
        (R, V), shape.config.logits_dtype, sharding=None if mesh.empty else NamedSharding(mesh, P(None, None))
    )
    number, adapter_R = np.int32(0), numbers_R if shape.adapters else None
    prompts = (params, slots, where_R, tokens_RC, numbers_R, numbers_R != 0, adapter_R)
    program = getattr(programs, variant.name)
    match variant.name:
        case "prefill":
            return program.lower(*prompts)
        case "score":
            return program.lower(*prompts, tokens_RC)
        case "start":
            asked = jax.tree.map(np.asarray, shape.asked(R))
            return program.lower(slots, logits_RV, numbers_R, where_R, asked, masks_RW)
        case "bias":
            return program.lower(slots, number, np.zeros(V, np.float32))
        case "decode":
            return program.lower(params, slots, number, rows=R, plain=variant.plain, draft=variant.draft)
        case "advance":
            return program.lower(params, slots, rows=R)
        case "choose":
            return program.lower(slots, logits_RV, masks_RW, rows=R)
        case "copy":
            return program.lower(slots, where_R, where_R)
        case "stop":
            return program.lower(slots, where_R)
        case "snapshot":
            return program.lower(slots, number, number, length=variant.width)
        case _:
            snapshot = programs.snapshot.lower(slots, number, number, length=variant.width)
            part = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), snapshot.out_info)
            if not mesh.empty:
                part = jax.tree.map(lambda x, layout: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout), part,
                                    snapshot.compile().output_shardings)
            return program.lower(slots, number, number, part, np.zeros(variant.width, np.int32), fresh=variant.fresh)
