"""What has to be known of a kind of operator or feed-forward beside its module, and the tables that hold the kinds.

Counts, decode state, memory of a training step and the notation of ablations all read a kind's row: none of them knows
a kind by name, and no row has defaults, so that nothing about a new kind can be left out unnoticed. Needs nothing of
JAX: modules are named by where they are.

Dimensions: D model width, T tokens of a document.
"""

from __future__ import annotations

import dataclasses
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from lfm_jax.problems import raise_problems

if TYPE_CHECKING:
    from lfm_jax.chips import Chip
    from lfm_jax.config import ModelConfig

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of an element, by dtype."""
TPU_LANES = 128
"""A TPU fills the last dimension of an array up to a multiple of this: heads of width 64 take twice their bytes."""


class Share(NamedTuple):
    """What of a micro-batch one device works on."""

    tokens: float
    seq_len: int
    tensor: int
    """Devices that share the channels, heads and units of each layer."""
    chip: Chip | None

    @property
    def lanes(self) -> int:
        """What the last dimension of an array is filled up to a multiple of."""
        return TPU_LANES if self.chip is not None and self.chip.torus_dims else 1


class Kept(NamedTuple):
    """Elements of `ModelConfig.dtype` a token that differentiation keeps of an operator or a feed-forward, beside its
    input and its normed input. tests/plan compares them with compiled programs."""

    products: float
    """Results of products with weights: what `remat: dots` keeps."""
    unrolled: float
    """In layers compiled one by one, where XLA computes elementwise values again where they are used."""
    scanned: float
    """In layers that are scanned: all that `jax.ad_checkpoint.print_saved_residuals` lists."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerKind:
    """What operators and feed-forwards have in common. Functions take the model's config."""

    name: str
    """As in `ModelConfig.layer_types` and `ffn_types`."""
    module: str | type
    """The NNX module, or where it is: `package.module:Class`."""
    params: Callable[[ModelConfig], int]
    """Number of parameters."""
    matrices: Callable[[ModelConfig], int]
    """Elements of the matrices, which are gathered for use where `fsdp` splits them."""
    products: Callable[[ModelConfig], float]
    """Multiply-adds a token in products with the matrices."""
    kept: Callable[[ModelConfig, Share], Kept]
    """What a training step keeps for the backward pass."""

    def find_module(self) -> Any:
        """The class of the NNX module."""
        return found(self.module)

    def problems(self, others: list[Any]) -> list[str]:
        """What keeps the row from standing beside others of its table."""
        wrong = [f"{field.name} is None; every field of {type(self).__name__} is needed"
                 for field in dataclasses.fields(self) if getattr(self, field.name) is None]
        if self.name in [other.name for other in others]:
            wrong.append(f"name {self.name!r} is taken; remove that kind first, or choose another name")
        return wrong


@dataclasses.dataclass(frozen=True, kw_only=True)
class OperatorKind(LayerKind):
    """An operator: what mixes tokens."""

    mixing: Callable[[ModelConfig, int], float]
    """Multiply-adds a token beside `products`, in a document of T tokens: taps, steps of a recurrence, scores."""
    traded: Callable[[ModelConfig], float]
    """Elements a token that a pass moves between devices that share time (`context`), but for those whose number does
    not grow with the tokens, as halos and carried states."""
    state: str | type
    """The decode state (`state.LayerState`), or where it is: `package.module:Class`."""
    state_bytes: Callable[[ModelConfig, int, int], int]
    """Bytes of the decode state of one sequence with room for T tokens, in a dtype of that many bytes."""
    rolls_back: bool
    """Whether the state can go back by some tokens (`state.rollback`), as drafts ask for."""
    letter: str
    """In the patterns of ablations."""
    forms: Mapping[str, Mapping[str, Any]]
    """Values of the ablations' axis `operator` that mean this kind, each with the fields of `ModelConfig` that it sets.
    Empty: the axis leaves it out."""

    def find_state(self) -> Any:
        """The class of the decode state."""
        return found(self.state)

    def problems(self, others: list[Any]) -> list[str]:
        wrong = super().problems(others)
        if self.letter is not None and not (len(self.letter) == 1 and self.letter.isalpha()):
            wrong.append(f"letter is {self.letter!r}; it must be one letter")
        for other in others:
            if self.letter == other.letter:
                wrong.append(f"letter {self.letter!r} is that of {other.name}; choose another one")
            wrong += [f"form {form!r} is one of {other.name}; choose another name"
                      for form in self.forms or () if form in other.forms]
        return wrong


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeedForwardKind(LayerKind):
    """A feed-forward: what works on each token by itself."""

    last_product: Callable[[ModelConfig], float]
    """Those of `products` that make the output, which no backward pass makes again."""


class Table[K: LayerKind]:
    """Kinds by name."""

    def __init__(self, what: str):
        self.what = what
        self._kinds: dict[str, K] = {}

    def register(self, kind: K) -> None:
        """Adds a kind.

        Raises:
          ValueError: a field is missing, or the name, the letter or a form is taken; all problems in one message.
        """
        raise_problems(f"{self.what} {kind.name!r} cannot be registered", kind.problems(self.kinds()))
        self._kinds[kind.name] = kind

    def remove(self, name: str) -> None:
        """Takes a kind out again, so that another one can have its name.

        Raises:
          ValueError: there is none of that name.
        """
        del self._kinds[self[name].name]

    def __getitem__(self, name: str) -> K:
        """Raises ValueError, with the names there are, if there is none of that name."""
        if name not in self._kinds:
            raise ValueError(f"{name!r} is no {self.what}; choose from {', '.join(self._kinds)}")
        return self._kinds[name]

    def __contains__(self, name: object) -> bool:
        return name in self._kinds

    def __iter__(self) -> Iterator[str]:
        return iter(self._kinds)

    def kinds(self) -> list[K]:
        """In the order in which they were registered."""
        return list(self._kinds.values())


def found(place: str | type) -> Any:
    """The class itself, or the one at `package.module:Class`, imported when first asked for."""
    return pkgutil.resolve_name(place) if isinstance(place, str) else place
