"""The description of a kind of operator or feed-forward, besides its module, and the tables of kinds.

Counts, decode state, memory of a training step and the notation of ablations all read the row of a kind. None of them
knows a kind by name, and no row has defaults, so that nothing can be left out unnoticed for a new kind. This file needs
no JAX: modules are named by their import path.

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
"""Bytes of an element by dtype."""
TPU_LANES = 128
"""A TPU fills the last dimension of an array up to a multiple of this: heads of width 64 take twice their bytes."""


class Share(NamedTuple):
    """The part of a micro-batch that one device works on."""

    tokens: float
    seq_len: int
    tensor: int
    """Devices that share the channels, heads and units of each layer."""
    chip: Chip | None

    @property
    def lanes(self) -> int:
        """The last dimension of an array is padded to a multiple of this."""
        return TPU_LANES if self.chip is not None and self.chip.torus_dims else 1


class Kept(NamedTuple):
    """Elements of `ModelConfig.dtype` per token that differentiation keeps of an operator or a feed-forward, besides
    its input and its normed input. tests/plan compares them with compiled programs."""

    products: float
    """Results of products with weights: what `remat: dots` keeps."""
    unrolled: float
    """In layers compiled one by one, where XLA recomputes elementwise values at each use."""
    scanned: float
    """In layers that are scanned: all that `jax.ad_checkpoint.print_saved_residuals` lists."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerKind:
    """The fields that operators and feed-forwards share. Functions take the model's config."""

    name: str
    """As in `ModelConfig.layer_types` and `ffn_types`."""
    module: str | type
    """The NNX module, or its import path: `package.module:Class`."""
    params: Callable[[ModelConfig], int]
    """Number of parameters."""
    matrices: Callable[[ModelConfig], int]
    """Elements of the matrices, which are gathered for use where `fsdp` splits them."""
    products: Callable[[ModelConfig], float]
    """Multiply-adds per token in products with the matrices."""
    kept: Callable[[ModelConfig, Share], Kept]
    """What a training step keeps for the backward pass."""

    def find_module(self) -> Any:
        """Returns the class of the NNX module."""
        return found(self.module)

    def problems(self, others: list[Any]) -> list[str]:
        """Returns what keeps the row from joining the others of its table."""
        wrong = [f"{field.name} is None; every field of {type(self).__name__} is needed"
                 for field in dataclasses.fields(self) if getattr(self, field.name) is None]
        if self.name in [other.name for other in others]:
            wrong.append(f"name {self.name!r} is taken; remove that kind first, or choose another name")
        return wrong


@dataclasses.dataclass(frozen=True, kw_only=True)
class OperatorKind(LayerKind):
    """An operator, which mixes tokens."""

    mixing: Callable[[ModelConfig, int], float]
    """Multiply-adds per token besides `products`, in a document of T tokens: taps, steps of a recurrence, scores."""
    traded: Callable[[ModelConfig], float]
    """Elements per token that a pass moves between devices that share time (`context`), except those whose number does
    not grow with the tokens, such as halos and carried states."""
    state: str | type
    """The decode state (`state.LayerState`), or its import path: `package.module:Class`."""
    state_bytes: Callable[[ModelConfig, int, int], int]
    """Bytes of the decode state of one sequence with room for T tokens, in a dtype of that many bytes."""
    rolls_back: bool
    """Whether the state can go back by some tokens (`state.rollback`), which drafts need."""
    letter: str
    """Its letter in the patterns of ablations."""
    forms: Mapping[str, Mapping[str, Any]]
    """Values of the ablations' axis `operator` for this kind, each with the fields of `ModelConfig` that it sets; empty
    if the axis leaves the kind out."""

    def find_state(self) -> Any:
        """Returns the class of the decode state."""
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
    """A feed-forward, which works on each token by itself."""

    width: str
    """The field of ModelConfig with the width of its hidden layer, in which all of its counts are linear."""
    last_product: Callable[[ModelConfig], float]
    """The part of `products` that makes the output, which no backward pass recomputes."""
    buffers: Mapping[str, Callable[..., Any] | str]
    """Weights that have no gradient: the name of each in the module, and the rule that changes it after a training step
    (`feed_forward.Rule`) or the rule's import path."""

    def find_rule(self, buffer: str) -> Any:
        """Returns the rule of a buffer."""
        return found(self.buffers[buffer])


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
        """Removes a kind, so that another one can have its name.

        Raises:
          ValueError: no kind has that name.
        """
        del self._kinds[self[name].name]

    def __getitem__(self, name: str) -> K:
        """Returns a kind; raises ValueError, with the known names, if none has that name."""
        if name not in self._kinds:
            raise ValueError(f"{name!r} is not a known {self.what}; choose from {', '.join(self._kinds)}")
        return self._kinds[name]

    def __contains__(self, name: object) -> bool:
        return name in self._kinds

    def __iter__(self) -> Iterator[str]:
        return iter(self._kinds)

    def kinds(self) -> list[K]:
        """Returns the kinds in the order of their registration."""
        return list(self._kinds.values())


def found(place: Any) -> Any:
    """Returns what was given itself, or imports what is at `package.module:name`."""
    return pkgutil.resolve_name(place) if isinstance(place, str) else place
