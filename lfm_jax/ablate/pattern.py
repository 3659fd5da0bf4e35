"""Layer patterns in a notation that can be read: `ccaccaccacacacac`, or `conv:10,attention:6,place:even`.

Dimensions: L layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, cast, get_args

from lfm_jax.config import PRESETS, LayerType
from lfm_jax.kinds import OPERATORS

Place = Literal["even", "front", "back", "sandwich", "lfm2"]
"""Where the layers of full attention stand. even: the middles of equal parts of the stack; front, back: all at one end;
sandwich: half of them at each end, the odd one in front; lfm2: as published (6 of 14 layers, of 16 or of 24, 8 of 30,
10 of 40)."""



class Form(NamedTuple):
    """A value of the axis `operator`."""

    kind: LayerType
    fields: Mapping[str, Any]
    """Of `ModelConfig`, that it sets."""


def letters() -> dict[str, LayerType]:
    """The letter of each kind of operator."""
    return {OPERATORS[kind].letter: kind for kind in OPERATORS}


def forms() -> dict[str, Form]:
    """The values of the axis `operator`."""
    return {form: Form(kind.name, fields) for kind in OPERATORS.kinds() for form, fields in kind.forms.items()}


def _names() -> dict[str, LayerType]:
    """What the counted notation calls each kind."""
    return {"attention" if kind == "full_attention" else kind: kind for kind in OPERATORS}


def _notation() -> str:
    each = ", ".join(f"{letter} for {kind}" for letter, kind in letters().items())
    return (f"write one letter a layer ({each}) or counts, as conv:10,attention:6,place:even (kinds "
            f"{', '.join(_names())}; places {', '.join(get_args(Place))})")



def parse_pattern(text: str) -> tuple[LayerType, ...]:
    """The layer types of a pattern.

    In counts `place` says where the attention layers stand (even if left out); the other kinds share the rest, each
    spread evenly.

    Raises:
      ValueError: not a pattern; says how to write one.
    """
    if ":" not in text:
        kinds = letters()
        unknown = sorted(set(text) - set(kinds))
        if unknown or not text:
            raise ValueError(f"pattern {text!r} {f'has {unknown}' if unknown else 'is empty'}; {_notation()}")
        return tuple(kinds[letter] for letter in text)
    names, counts = _names(), dict[LayerType, int]()
    place: str = "even"
    for part in text.split(","):
        name, _, value = (piece.strip() for piece in part.partition(":"))
        if name == "place":
            place = value
        elif name in names and value.isdigit() and names[name] not in counts:
            counts[names[name]] = int(value)
        else:
            raise ValueError(f"pattern {text!r} has {part.strip()!r}; {_notation()}")
    layers, attention = sum(counts.values()), counts.pop("full_attention", 0)
    if not layers:
        raise ValueError(f"pattern {text!r} has no layer; {_notation()}")
    at = set(attention_at(layers, attention, place))
    rest = iter(_spread(counts))
    return tuple("full_attention" if i in at else next(rest) for i in range(layers))


def place_of(text: str) -> Place | None:
    """Where a pattern in counts has its attention layers; None for letters."""
    parts = dict(part.split(":") for part in text.replace(" ", "").split(",")) if ":" in text else None
    return None if parts is None else cast(Place, parts.get("place", "even"))


def place_of_others(text: str) -> Place:
    """Where they stand if their number changes: as in the pattern, if that says a rule for any number, or else even."""
    place = place_of(text)
    return "even" if place is None or place == "lfm2" else place


def attention_at(layers: int, attention: int, place: str) -> tuple[int, ...]:
    """Indices of the attention layers among L.

    Raises:
      ValueError: more attention layers than layers, an unknown place, or `lfm2` for sizes that were not published.
    """
    if not 0 <= attention <= layers:
        raise ValueError(f"attention is {attention}; it must lie in 0..{layers}, the number of layers")
    if place == "even":
        return tuple((2 * i + 1) * layers // (2 * attention) for i in range(attention))
    if place == "front":
        return tuple(range(attention))
    if place == "back":
        return tuple(range(layers - attention, layers))
    if place == "sandwich":
        front = (attention + 1) // 2
        return (*range(front), *range(layers - attention + front, layers))
    if place == "lfm2":
        published = _published()
        if (layers, attention) not in published:
            known = ", ".join(f"{some} of {all_}" for all_, some in sorted(published))
            raise ValueError(f"place lfm2 is not known for {attention} of {layers} layers; only {known} are published: "
                             "choose another place")
        return published[layers, attention]
    raise ValueError(f"place is {place!r}; choose one of {', '.join(get_args(Place))}")


def _published() -> dict[tuple[int, int], tuple[int, ...]]:
    """Indices of the attention layers of each published LFM2, by the numbers of layers and of attention layers."""
    found = {}
    for preset in PRESETS.values():
        pattern = preset["layer_types"]
        if set(pattern) == {"conv", "full_attention"}:
            at = tuple(i for i, kind in enumerate(pattern) if kind == "full_attention")
            found[len(pattern), len(at)] = at
    return found


def to_letters(layer_types: tuple[LayerType, ...]) -> str:
    """The pattern with one letter a layer; `parse_pattern` reads it back."""
    return "".join(OPERATORS[kind].letter for kind in layer_types)


def _spread(counts: dict[LayerType, int]) -> list[LayerType]:
    """All of several kinds in one order, each spread evenly."""
    places = [((2 * i + 1) / (2 * n), order, kind)
              for order, (kind, n) in enumerate(counts.items()) for i in range(n)]
    return [kind for _, _, kind in sorted(places)]
