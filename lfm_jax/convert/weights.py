"""Names and layouts that translate between the tensors of a file and the leaves of our parameter tree.

A format is a table of `Weight` rows, which hold names and layouts, and a writer, which puts a stream of (name, array)
into a file. The rows of safetensors are `Family.weights`, their writer is `safetensors_io.write`. Both directions of a
conversion and all checks fold over the rows.

Dimensions: V vocabulary, D and O model width (O is the output side of a square matrix), F feed-forward width,
N query heads, K key/value heads, H head width, W conv taps, C the three gates of the convolution (B, C, h), E experts,
U width of an expert, R the two halves of a head that rotary embedding turns into each other, J pairs of a head.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from lfm_jax.config import ModelConfig
from lfm_jax.weight_kinds import WeightKind

LeafPath = tuple[str | int, ...]
"""Keys from the root of our parameter tree to a leaf."""
EMBED: LeafPath = ("embed",)
HEAD: LeafPath = ("head",)


@dataclasses.dataclass(frozen=True)
class Weight:
    """One row: tensors of the model, or of each of its layers (`{i}`), and the leaves that they correspond to.

    Mostly one tensor is one leaf. If there are several on a side, an axis in braces counts them, and their names are a
    tuple or a template with the letter of that axis: `layers.{i}.heads.{K}.k_proj` with `{K} H D -> K H D` is a tensor
    for each head, stacked into one leaf; `(P F) D -> {P} F D` with two paths is one tensor that holds two leaves.

    Raises:
      ValueError: the sides of the layout differ in their axes, or several names or paths have no axis that counts them.
    """

    where: str
    """`model` for once, `block` for once in each layer, or a kind of operator or feed-forward: once in each layer with
    it."""
    names: str | tuple[str, ...]
    """Names in the file."""
    paths: str | tuple[str, ...]
    """Paths in our parameter tree: keys with dots between them."""
    layout: str
    """`axes of a tensor -> axes of a leaf`: parentheses make one axis of several, outermost first; 1 is an axis of
    length 1; an axis in braces comes first and counts the arrays of a side."""
    when: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Values of fields of ModelConfig that models with these tensors have; other models leave the row out."""
    dtype: str | None = None
    """The dtype of tensors and leaves if it is not `ModelConfig.param_dtype`."""

    def __post_init__(self) -> None:
        axes = [_axes(side) for side in self.layout.split(" -> ")]
        letters = [sorted(letter for axis in side for letter in axis.letters) for side in axes]
        if len(axes) != 2 or letters[0] != letters[1] or len(set(letters[0])) != len(letters[0]):
            raise ValueError(f"{self.names}: the layout {self.layout!r} needs two sides with the same axes, each once")
        for labels, (first, *others) in zip((self.names, self.paths), axes, strict=True):
            several = not isinstance(labels, str) or any(f"{{{letter}}}" in labels for letter in first.letters)
            if first.counts != several or (several and not first.letters) or any(axis.counts for axis in others):
                raise ValueError(f"{labels}: the layout {self.layout!r} needs a first axis in braces where there are "
                                 "several, and only there")


class _Axis(NamedTuple):
    letters: tuple[str, ...]
    """The elementary axes that it is made of; none for an axis of 1."""
    counts: bool
    """Whether it is in braces."""


def _axes(side: str) -> list[_Axis]:
    tokens = re.findall(r"\([^)]*\)|\S+", side)
    letters = [tuple(letter for letter in token.strip("(){}").split() if letter != "1") for token in tokens]
    return [_Axis(held, token.startswith("{")) for held, token in zip(letters, tokens, strict=True)]


class Side(NamedTuple):
    """One side of a layout with sizes filled in: arrays of one shape."""

    shape: tuple[int, ...]
    """The shape of each array."""
    count: int | None
    """The number of arrays if an axis in braces counts them, else None."""
    letters: tuple[str, ...]
    sizes: tuple[int, ...]
    """Elementary axes and their lengths; the axis that counts comes first."""

    def join(self, arrays: Iterable[np.ndarray]) -> np.ndarray:
        """Returns one array with the elementary axes: a view of a single array, or a copy of several, one by one."""
        if self.count is None:
            [joined] = arrays
            return joined.reshape(self.sizes)
        joined = None
        for i, array in zip(range(self.count), arrays, strict=True):
            joined = np.empty((self.count, *self.shape), array.dtype) if joined is None else joined
            joined[i] = array
        assert joined is not None  # Nothing is counted by an axis of length 0.
        return joined.reshape(self.sizes)

    def part(self, joined: np.ndarray) -> list[np.ndarray]:
        """Inverts `join`."""
        return [joined.reshape(self.shape)] if self.count is None else [*joined.reshape(self.count, *self.shape)]


@dataclasses.dataclass(frozen=True)
class Group:
    """A row with the sizes of a model, and one of its layers, filled in."""

    names: tuple[str, ...]
    paths: tuple[LeafPath, ...]
    tensor: Side
    leaf: Side
    dtype: str
    """That of the leaves, and of tensors that are written."""
    own_dtype: bool
    """Whether it is not that of the model."""

    def to_leaves(self, tensors: Iterable[np.ndarray]) -> list[np.ndarray]:
        """Turns tensors into leaves, as views if NumPy can make them. It takes a tensor only when it needs it."""
        return _relay(tensors, self.tensor, self.leaf)

    def to_tensors(self, leaves: Iterable[np.ndarray]) -> list[np.ndarray]:
        """Inverts `to_leaves` exactly."""
        return _relay(leaves, self.leaf, self.tensor)


def _relay(arrays: Iterable[np.ndarray], source: Side, target: Side) -> list[np.ndarray]:
    return target.part(source.join(arrays).transpose([source.letters.index(letter) for letter in target.letters]))


def groups(weights: Iterable[Weight], config: ModelConfig) -> list[Group]:
    """Fills the sizes of a model into a table. The groups are in the order of a file: adjacent rows of layers come
    layer by layer."""
    sizes = _sizes(config)
    found: list[Group] = []
    for per_layer, rows in itertools.groupby(weights, key=lambda row: row.where != "model"):
        rows = [row for row in rows if all(getattr(config, name) == value for name, value in row.when.items())]
        for i, layer in enumerate(config.layers if per_layer else [("model",)]):
            found += [_group(row, i, sizes, config.param_dtype) for row in rows if row.where in (*layer, "block")]
    return found


def _sizes(config: ModelConfig) -> dict[str, int]:
    D = config.hidden_size
    return {"V": config.vocab_size, "D": D, "O": D, "F": config.ffn_size, "N": config.num_heads,
            "K": config.num_kv_heads, "H": config.head_dim, "W": config.conv_taps, "C": 3,
            "E": config.num_experts, "U": config.expert_size, "R": 2, "J": config.head_dim // 2}


def _group(row: Weight, i: int, sizes: Mapping[str, int], dtype: str) -> Group:
    tensor, leaf = (_axes(side) for side in row.layout.split(" -> "))
    for labels, (first, *_) in ((row.names, tensor), (row.paths, leaf)):
        if not isinstance(labels, str):
            sizes = {**sizes, first.letters[0]: len(labels)}
    paths = (path.split(".") for path in _labels(row.paths, leaf[0], i, sizes))
    return Group(
        names=_labels(row.names, tensor[0], i, sizes),
        paths=tuple(tuple(int(key) if key.isdigit() else key for key in path) for path in paths),
        tensor=_side(tensor, sizes),
        leaf=_side(leaf, sizes),
        dtype=row.dtype or dtype,
        own_dtype=row.dtype is not None,
    )


def _labels(labels: str | tuple[str, ...], first: _Axis, i: int, sizes: Mapping[str, int]) -> tuple[str, ...]:
    if not isinstance(labels, str):
        return tuple(label.format(i=i) for label in labels)
    if not first.counts:
        return (labels.format(i=i),)
    [letter] = first.letters
    return tuple(labels.format(i=i, **{letter: j}) for j in range(sizes[letter]))


def _side(axes: list[_Axis], sizes: Mapping[str, int]) -> Side:
    lengths = [math.prod(sizes[letter] for letter in axis.letters) for axis in axes]
    letters = tuple(letter for axis in axes for letter in axis.letters)
    counted = axes[0].counts
    return Side(tuple(lengths[counted:]), lengths[0] if counted else None, letters, tuple(sizes[x] for x in letters))


# -------------------------------------------------------------------- our tree


def leaf(params: Mapping[Any, Any], path: LeafPath) -> jax.Array | WeightKind:
    """Returns the weight at a path of a parameter tree; all weights that are written to files are read with it."""
    value: Any = params
    for key in path:
        value = value[key]
    return value


def misfits(table: Iterable[Group], params: Mapping[Any, Any]) -> list[str]:
    """Returns where a table and the leaves of a tree differ: a leaf that the table lacks would be lost in silence."""
    made = {path: group.leaf.shape for group in table for path in group.paths}
    there = dict(_shapes(params, ()))
    problems = [f"no tensor has the parameter {_dotted(path)}" for path in there if path not in made]
    problems += [f"a tensor is for the parameter {_dotted(path)}, which is not there" for path in made
                 if path not in there]
    problems += [f"the parameter {_dotted(path)} is {list(shape)}, but made from tensors {list(made[path])}"
                 for path, shape in there.items() if path in made and made[path] != shape]
    return problems


def _shapes(params: Mapping[Any, Any], parents: LeafPath) -> Iterator[tuple[LeafPath, tuple[int, ...]]]:
    for key, value in params.items():
        if isinstance(value, Mapping):
            yield from _shapes(value, (*parents, key))
        else:
            yield (*parents, key), value.shape


def _dotted(path: LeafPath) -> str:
    return ".".join(map(str, path))
