"""The weight table: every tensor of an LFM2 checkpoint, its place in our tree and the layout of both sides.

Each row is data. Both directions of a conversion, the checks and the files all fold over the rows.

Dimensions: V vocabulary, D and E model width (E is the output side of a square matrix), F feed-forward width,
N query heads, K key/value heads, H head width, W conv taps, C the three gates of the convolution (B, C, h).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from lfm_jax.config import ITEMSIZE, ModelConfig
from lfm_jax.convert.families import family_of

Where = Literal["model", "untied", "block", "conv", "conv_bias", "full_attention"]


@dataclasses.dataclass(frozen=True)
class Weight:
    """One row: a tensor of the model (or, with `{i}`, of each of its layers)."""

    where: Where
    """`model` is once, `untied` once if the head is not the embedding, the others once in each such layer."""
    hf: str
    """Name in a PyTorch state dict or safetensors file."""
    path: str
    """Path in our parameter tree."""
    layout: str
    """`HF axes -> our axes`; brackets are one HF axis that holds several of ours, outermost first."""


WEIGHTS: tuple[Weight, ...] = (
    Weight("model", "model.embed_tokens.weight", "embed", "V D -> V D"),
    Weight("block", "model.layers.{i}.operator_norm.weight", "blocks.{i}.operator_norm.weight", "D -> D"),
    Weight("conv", "model.layers.{i}.conv.in_proj.weight", "blocks.{i}.operator.in_proj", "(C E) D -> C E D"),
    Weight("conv_bias", "model.layers.{i}.conv.in_proj.bias", "blocks.{i}.operator.in_bias", "(C E) -> C E"),
    Weight("conv", "model.layers.{i}.conv.conv.weight", "blocks.{i}.operator.conv", "D 1 W -> W D"),
    Weight("conv_bias", "model.layers.{i}.conv.conv.bias", "blocks.{i}.operator.conv_bias", "D -> D"),
    Weight("conv", "model.layers.{i}.conv.out_proj.weight", "blocks.{i}.operator.out_proj", "E D -> E D"),
    Weight("conv_bias", "model.layers.{i}.conv.out_proj.bias", "blocks.{i}.operator.out_bias", "E -> E"),
    Weight("full_attention", "model.layers.{i}.self_attn.q_proj.weight", "blocks.{i}.operator.q_proj",
           "(N H) D -> N H D"),
    Weight("full_attention", "model.layers.{i}.self_attn.k_proj.weight", "blocks.{i}.operator.k_proj",
           "(K H) D -> K H D"),
    Weight("full_attention", "model.layers.{i}.self_attn.v_proj.weight", "blocks.{i}.operator.v_proj",
           "(K H) D -> K H D"),
    Weight("full_attention", "model.layers.{i}.self_attn.out_proj.weight", "blocks.{i}.operator.out_proj",
           "D (N H) -> D N H"),
    Weight("full_attention", "model.layers.{i}.self_attn.q_layernorm.weight", "blocks.{i}.operator.q_norm.weight",
           "H -> H"),
    Weight("full_attention", "model.layers.{i}.self_attn.k_layernorm.weight", "blocks.{i}.operator.k_norm.weight",
           "H -> H"),
    Weight("block", "model.layers.{i}.ffn_norm.weight", "blocks.{i}.ffn_norm.weight", "D -> D"),
    Weight("block", "model.layers.{i}.feed_forward.w1.weight", "blocks.{i}.feed_forward.w1", "F D -> F D"),
    Weight("block", "model.layers.{i}.feed_forward.w3.weight", "blocks.{i}.feed_forward.w3", "F D -> F D"),
    Weight("block", "model.layers.{i}.feed_forward.w2.weight", "blocks.{i}.feed_forward.w2", "D F -> D F"),
    Weight("model", "model.embedding_norm.weight", "norm.weight", "D -> D"),
    Weight("untied", "lm_head.weight", "head", "V D -> V D"),
)
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A row of the table with the sizes of one model filled in."""

    name: str
    """HF name."""
    path: tuple[str | int, ...]
    """Keys from the root of our parameter tree."""
    hf_shape: tuple[int, ...]
    split_shape: tuple[int, ...]
    """`hf_shape` with bracketed axes taken apart and axes of 1 left out."""
    order: tuple[int, ...]
    """Permutation that brings the split axes to our order."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in our tree."""
        return tuple(self.split_shape[i] for i in self.order)

    def to_ours(self, hf: np.ndarray) -> np.ndarray:
        """HF layout -> ours, a view where NumPy can give one."""
        return hf.reshape(self.split_shape).transpose(self.order)

    def to_hf(self, ours: np.ndarray) -> np.ndarray:
        """Our layout -> HF's, the exact inverse of `to_ours`."""
        return ours.transpose(np.argsort(self.order)).reshape(self.hf_shape)


def tensors(config: ModelConfig) -> list[Tensor]:
    """Every tensor of a model of this shape, in the order of a checkpoint file.

    Raises:
      ValueError: the model has something that LFM2 in `transformers` cannot express, so its tensors have no name.
    """
    family_of(config)  # Raises if there is none.
    sizes = _sizes(config)
    expanded: list[Tensor] = []
    for per_layer, rows in itertools.groupby(WEIGHTS, key=lambda row: "{i}" in row.hf):
        rows = list(rows)
        for i, kind in enumerate(config.layer_types if per_layer else (None,)):
            present = {"model", "block", kind}
            present |= set() if config.tie_embedding else {"untied"}
            present |= {"conv_bias"} if config.conv_bias and kind == "conv" else set()
            expanded += [_expand(row, i, sizes) for row in rows if row.where in present]
    return expanded


def _sizes(config: ModelConfig) -> dict[str, int]:
    D = config.hidden_size
    return {"V": config.vocab_size, "D": D, "E": D, "F": config.ffn_size, "N": config.num_heads,
            "K": config.num_kv_heads, "H": config.head_dim, "W": config.conv_taps, "C": 3}


def _expand(row: Weight, i: int, sizes: Mapping[str, int]) -> Tensor:
    hf_axes, our_axes = row.layout.split(" -> ")
    # Each HF axis as the list of ours that it holds: several in brackets, none for an axis of 1.
    groups = [axis.strip("()").replace("1", "").split() for axis in re.findall(r"\([^)]*\)|\S+", hf_axes)]
    split = [axis for group in groups for axis in group]
    return Tensor(
        name=row.hf.format(i=i),
        path=tuple(int(key) if key.isdigit() else key for key in row.path.format(i=i).split(".")),
        hf_shape=tuple(math.prod(sizes[axis] for axis in group) for group in groups),
        split_shape=tuple(sizes[axis] for axis in split),
        order=tuple(split.index(axis) for axis in our_axes.split()),
    )


# -------------------------------------------------------------------- where weights come from


class Spec(NamedTuple):
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: str
    """`float32`, `bfloat16`, ...; for what we do not read, the name that the source gives it."""


@dataclasses.dataclass(frozen=True)
class Source:
    """Named tensors in HF layout that are read one at a time: a directory, a state dict, a model."""

    specs: Mapping[str, Spec]
    read: Callable[[str], np.ndarray]
    lost: frozenset[str] = frozenset()
    """Named by an index that is wrong about them: reported as that, so not as missing too."""


def common_dtype(source: Source, dtype: Any) -> tuple[str | None, list[str]]:
    """The dtype to keep parameters in: `dtype` if given, else the one that all of them are stored in.

    Returns:
      (name or None, problems): a dtype that is not ours to keep, or several where none was asked for.
    """
    if dtype is not None:
        try:
            name = jnp.dtype(dtype).name
        except TypeError:
            name = str(dtype)
        return (name, []) if name in ITEMSIZE else (None, [f"dtype is {name}; choose one of {', '.join(ITEMSIZE)}"])
    by_dtype: dict[str, list[str]] = {}
    for tensor, spec in source.specs.items():
        if spec.dtype in ITEMSIZE:
            by_dtype.setdefault(spec.dtype, []).append(tensor)
    if len(by_dtype) > 1:
        found = "; ".join(f"{name}: {len(held)} tensors, first {held[0]}" for name, held in sorted(by_dtype.items()))
        return None, [f"wrong dtype: tensors are stored in several ({found}); pass dtype= to bring them to one"]
    return next(iter(by_dtype), None), []


def check(source: Source, config: ModelConfig) -> list[str]:
    """Everything that keeps the source from being this model: missing, unexpected, wrong shape, wrong dtype.

    A head that comes with a tied model, as in a PyTorch state dict, is accepted where it equals the embedding.
    """
    expected = {t.name: t.hf_shape for t in tensors(config)}
    if config.tie_embedding and HEAD in source.specs:
        expected[HEAD] = expected[EMBED]
    known = source.specs.keys() | source.lost
    problems = [f"missing: {name} {list(shape)}" for name, shape in expected.items() if name not in known]
    problems += [
        f"unexpected: {name} {list(spec.shape)}" for name, spec in source.specs.items() if name not in expected
    ]
    for name, shape in expected.items():
        spec = source.specs.get(name)
        if spec is not None and tuple(spec.shape) != shape:
            problems.append(f"wrong shape: {name} is {list(spec.shape)}; config expects {list(shape)}")
    problems += [
        f"wrong dtype: {name} is {spec.dtype}; expected {', '.join(ITEMSIZE)}"
        for name, spec in source.specs.items() if spec.dtype not in ITEMSIZE
    ]
    if not problems and config.tie_embedding and HEAD in source.specs:
        head, embed = (source.read(name) for name in (HEAD, EMBED))
        if head.dtype != embed.dtype or not np.array_equal(_bits(head), _bits(embed)):
            problems.append(f"unexpected: {HEAD} differs from {EMBED}, but the config ties them; set "
                            "tie_word_embeddings to false to keep both")
    return problems


def _bits(array: np.ndarray) -> np.ndarray:
    return array.view(f"u{array.dtype.itemsize}")


def cast(name: str, array: np.ndarray, dtype: str) -> np.ndarray:
    """The array in another dtype, rounded to nearest; the array itself where it has that dtype.

    Raises:
      ValueError: a finite value becomes infinite.
    """
    target = jnp.dtype(dtype)
    if array.dtype == target:
        return array
    with np.errstate(over="ignore", invalid="ignore"):
        result = array.astype(target)
    overflow = int(np.count_nonzero(np.isinf(result))) - int(np.count_nonzero(np.isinf(array)))
    if overflow:
        raise ValueError(f"{name}: {overflow} finite values of {array.dtype} are too large for {dtype}; choose "
                         "bfloat16 or float32")
    return result


def refuse(what: str, problems: Iterable[str]) -> None:
    """Raises one ValueError that lists every problem; does nothing if there is none."""
    lines = [f"  - {problem}" for problem in problems]
    if lines:
        raise ValueError("\n".join([what + ":", *lines]))
