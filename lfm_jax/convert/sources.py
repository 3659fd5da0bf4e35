"""Where weights come from: named tensors that are read one at a time, checked before any is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from lfm_jax.config import ITEMSIZE, ModelConfig
from lfm_jax.convert.weights import EMBED, HEAD, Group, Weight, groups


class Spec(NamedTuple):
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: str
    """`float32`, `bfloat16`, ...; for what we do not read, the name that the source gives it."""


@dataclasses.dataclass(frozen=True)
class Source:
    """Named tensors in a file's layout that are read one at a time: a directory, a state dict, a model."""

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


def check(source: Source, weights: tuple[Weight, ...], config: ModelConfig) -> list[str]:
    """Everything that keeps the source from being this model: missing, unexpected, wrong shape, wrong dtype.

    A head that comes with a tied model, as in a PyTorch state dict, is accepted where it equals the embedding.
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
    """The head that the source has although the config ties it to the embedding."""
    if not config.tie_embedding:
        return None
    untied = groups(weights, config.replace(tie_embedding=False))
    head = next((group for group in untied if group.paths == (HEAD,)), None)
    return head if head is not None and source.specs.keys() >= set(head.names) else None


def _bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")


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
