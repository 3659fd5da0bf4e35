"""Sources of weights: named tensors that are checked before any is read, and read one at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Set
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lfm_jax.config import ITEMSIZE, ModelConfig
from lfm_jax.convert.weights import EMBED, HEAD, Group, Weight, groups


class Spec(NamedTuple):
    """Shape and dtype of a tensor, known before it is read."""

    shape: tuple[int, ...]
    dtype: str
    """`float32`, `bfloat16`, ..., or the source's own name for a dtype that is not supported."""


@dataclasses.dataclass(frozen=True)
class Source:
    """Named tensors in the layout of a file, read one at a time: a directory, a state dict or a model."""

    specs: Mapping[str, Spec]
    read: Callable[[str], np.ndarray]
    lost: frozenset[str] = frozenset()
    """Tensors that an index names wrongly: they are reported as that, and not as missing too."""


def common_dtype(source: Source, dtype: Any, apart: Set[str] = frozenset()) -> tuple[str | None, list[str]]:
    """Finds the dtype for parameters: `dtype` if given, else the one that all of them but `apart` are stored in.

    Returns:
      (name or None, problems): the dtype is not supported, or none was given and the tensors have several.
    """
    if dtype is not None:
        try:
            name = jnp.dtype(dtype).name
        except TypeError:
            name = str(dtype)
        return (name, []) if name in ITEMSIZE else (None, [f"dtype is {name}; choose one of {', '.join(ITEMSIZE)}"])
    by_dtype: dict[str, list[str]] = {}
    for tensor, spec in source.specs.items():
        if spec.dtype in ITEMSIZE and tensor not in apart:
            by_dtype.setdefault(spec.dtype, []).append(tensor)
    if len(by_dtype) > 1:
        found = "; ".join(f"{name}: {len(held)} tensors, first {held[0]}" for name, held in sorted(by_dtype.items()))
        return None, [f"wrong dtype: tensors are stored in several ({found}); pass dtype= to bring them to one"]
    return next(iter(by_dtype), None), []


def check(source: Source, weights: tuple[Weight, ...], config: ModelConfig) -> list[str]:
    """Returns the differences between a source and a model: tensors that are missing, unexpected, or of a wrong shape
    or dtype.

    A source of a tied model may have a head, as PyTorch state dicts do, if it equals the embedding.
    """
    expected = {name: group.tensor.shape for group in groups(weights, config) for name in group.names}
    known = source.specs.keys() | source.lost
    problems = [f"missing: {name} {list(shape)}" for name, shape in expected.items() if name not in known]
    head = _tied_head(source, weights, config)
    if head is not None:
        expected |= dict.fromkeys(head.names, head.tensor.shape)
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
    if not problems and head is not None:
        embed = next(group for group in groups(weights, config) if group.paths == (EMBED,))
        [ours], [theirs] = (group.to_leaves(map(source.read, group.names)) for group in (embed, head))
        if ours.dtype != theirs.dtype or not np.array_equal(_bits(ours), _bits(theirs)):
            problems.append(f"unexpected: {', '.join(head.names)} differs from {', '.join(embed.names)}, but the "
                            "config ties them; set tie_word_embeddings to false to keep both")
    return problems


def _tied_head(source: Source, weights: tuple[Weight, ...], config: ModelConfig) -> Group | None:
    """Returns the head if the source has one although the config ties it to the embedding."""
    if not config.tie_embedding:
        return None
    untied = groups(weights, config.replace(tie_embedding=False))
    head = next((group for group in untied if group.paths == (HEAD,)), None)
    return head if head is not None and source.specs.keys() >= set(head.names) else None


def _bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")


def cast(name: str, array: np.ndarray, dtype: str) -> np.ndarray:
    """Returns the array in another dtype, rounded to nearest; the array itself if it has that dtype already.

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
