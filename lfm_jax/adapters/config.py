"""LoRAConfig: which matrices get an adapter, and of which size."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, get_args

import tyro

from lfm_jax.config import Quantize
from lfm_jax.problems import raise_problems

LIQUID = ("w1", "w2", "w3", "q_proj", "k_proj", "v_proj", "out_proj", "in_proj")
"""Liquid's own targets: all matrices of LFM2's operators and dense feed-forwards."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Low-rank adapters (arXiv 2106.09685): a target `W` computes `W x + scale B A dropout(x)`, and A and B are trained
    alone.

    Raises:
      ValueError: on construction, one message that lists every bad field.
    """

    rank: int = 8
    """Rows of A and columns of B. 0: no adapter, and the other fields keep their defaults."""
    alpha: float = 16.0
    """The scale is alpha / rank."""
    dropout: float = 0.0
    """Share of an adapter's inputs that a training step sets to zero (0.1 in Liquid's own recipes)."""
    rslora: bool = False
    """The scale is alpha / sqrt(rank), as in rank-stabilised LoRA (arXiv 2312.03732)."""
    targets: tuple[str, ...] = LIQUID
    """Names of modules in `transformers`, or their ends from a dot on: out_proj, conv.out_proj, 3.self_attn.q_proj.
    Names of our weights (blocks.3.operator.q_proj) mean the same. Of the default the names that the model has."""
    quantize: Literal["", Quantize] = ""
    """Keep the frozen weights in a narrow type (QLoRA, arXiv 2305.14314): a form of lfm.quantize, such as int8 or
    int4:32."""
    rank_pattern: Annotated[Mapping[str, int], tyro.conf.Suppress] = dataclasses.field(default_factory=dict, hash=False)
    """Ranks of some targets: regular expressions over ends of module names, the first that fits counts (PEFT's).
    Adapters that are read have them; a run refuses them."""
    alpha_pattern: Annotated[Mapping[str, float], tyro.conf.Suppress] = dataclasses.field(
        default_factory=dict, hash=False)
    """Alphas of some targets, in the same way."""

    def __post_init__(self) -> None:
        problems = []
        ranks = [("rank", self.rank, 0), *((f"rank_pattern {key}", n, 1) for key, n in self.rank_pattern.items())]
        problems += [f"{name} is {n!r}; it must be a whole number of at least {least}" for name, n, least in ranks
                     if type(n) is not int or n < least]
        above = {"alpha": self.alpha, **{f"alpha_pattern {key}": alpha for key, alpha in self.alpha_pattern.items()}}
        problems += [f"{name} is {x!r}; it must be a number above 0" for name, x in above.items()
                     if not isinstance(x, (int, float)) or not 0 < x < math.inf]
        if not 0 <= self.dropout < 1:
            problems.append(f"dropout is {self.dropout}; it must lie in [0, 1)")
        if not self.targets:
            problems.append(f"targets is empty; name at least one, as {', '.join(LIQUID)}")
        if self.quantize and self.quantize not in get_args(Quantize):
            problems.append(f"quantize is {self.quantize!r}; choose one of {', '.join(get_args(Quantize))}")
        for key in (*self.rank_pattern, *self.alpha_pattern):
            try:
                re.compile(key)
            except re.error as error:
                problems.append(f"the pattern {key!r} is no regular expression: {error}")
        if self.rank == 0 and not problems:
            changed = [field.name for field in dataclasses.fields(self) if field.name != "rank"
                       and getattr(self, field.name) != (field.default_factory() if callable(field.default_factory)
                                                         else field.default)]
            if changed:
                problems.append(f"rank is 0, which is no adapter, but {', '.join(changed)} "
                                f"{'are' if len(changed) > 1 else 'is'} given; set rank too")
        raise_problems("LoRAConfig is not valid", problems)

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Self:
        """The config of what a checkpoint holds of one, `recipe.to_plain`; missing fields have their defaults."""
        fields: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in plain.items()}
        return cls(**fields)

    def rank_of(self, name: str) -> int:
        """The rank of a module by its name in `transformers`."""
        return next((rank for key, rank in self.rank_pattern.items() if _fits(key, name)), self.rank)

    def scale_of(self, name: str) -> float:
        """The scale of a module by its name in `transformers`."""
        alpha = next((alpha for key, alpha in self.alpha_pattern.items() if _fits(key, name)), self.alpha)
        rank = self.rank_of(name)
        return alpha / (math.sqrt(rank) if self.rslora else rank)


NO_LORA = LoRAConfig(rank=0)


def _fits(key: str, name: str) -> bool:
    """As `get_pattern_key` of PEFT 0.21 (`peft/utils/other.py`)."""
    return re.match(rf"(.*\.)?({key})$", name) is not None
