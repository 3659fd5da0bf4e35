"""`lfm.quantize`: a model whose matrices stay in 8 or 4 bits while it runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from lfm_jax.config import ModelConfig, Quantize
from lfm_jax.layers import OUT_IN, Matrix, Traits
from lfm_jax.model import LFM, abstract_model, param_traits
from lfm_jax.problems import raise_problems
from lfm_jax.quant.weights import GroupQuantized, Quantized
from lfm_jax.weight_kinds import WeightKind

FORMS = {form: (form.split(":")[0], int(form.split(":")[1]) if ":" in form else None) for form in get_args(Quantize)}
"""Kind and group of each `config.Quantize`."""


def quantize(model: LFM, kind: str, group: int | None = None) -> LFM:
    """Makes a model whose matrices, embedding and head are kept in a narrow type, and widened inside each product.

    Norms, biases, taps of convolutions, routers and vectors stay as they are. The model that is given is not changed;
    `lfm.load(path, quantize=...)` never holds all of it.

    Args:
      model: with parameters of float32, bfloat16 or float16.
      kind: `int8` or `int4`, or `w8a8`: int8, and the rows that meet them are rounded to int8 as well. That changes
        what the model computes a little more, and is what a CPU multiplies fast.
      group: how many inputs of an output share a scale: 32, 128, or None for all of them.

    Returns:
      The model, for inference: gradients by its narrow weights do not exist. `save_hf` writes them widened.

    Raises:
      ValueError: an unknown kind or group, a group that does not divide the inputs of a matrix, a model that is
        quantised already, or a weight that is not finite; the message names the tensors.
    """
    graphdef, state = nnx.split(model, nnx.Param)
    return nnx.merge(graphdef, quantize_params(nnx.to_pure_dict(state), model.config, form_of(kind, group)))


def form_of(kind: str, group: int | None) -> str:
    """Returns the form of FORMS that a kind and a group make; raises ValueError if there is none."""
    for form, found in FORMS.items():
        if found == (kind, group):
            return form
    kinds = dict.fromkeys(kind for kind, _ in FORMS.values())
    if kind not in kinds:
        raise ValueError(f"kind is {kind!r}; choose one of {', '.join(kinds)}")
    groups = ", ".join(str(group) for other, group in FORMS.values() if other == kind)
    raise ValueError(f"group is {group!r}; of {kind} it is one of {groups}")


def quantize_params(params: Any, config: ModelConfig, form: str) -> Any:
    """Does as `quantize` to a dict of parameters, which it empties, so that each array can be freed as it goes.

    It can be traced, and then does not ask whether numbers are finite.
    """
    leaf = keeper(config, form)
    found = [path for path, w in jax.tree.leaves_with_path(params, is_leaf=_is_kind) if _is_kind(w)]
    if found:
        raise ValueError(f"{_dotted(found[0])} is quantised already, or stands for an array in another way; quantise "
                         "the model that was loaded")

    def emptied(node: dict[Any, Any], path: tuple[Any, ...]) -> dict[Any, Any]:
        kept = {}
        for key in list(node):
            value = node.pop(key)
            kept[key] = emptied(value, (*path, key)) if isinstance(value, dict) else leaf((*path, key), value)
            del value
        return kept

    return emptied(params, ())


def keeper(config: ModelConfig, form: str) -> Callable[[tuple[Any, ...], Any], Any]:
    """Returns the function that makes a model's weight at a path of its parameters from an array, narrow or not.

    Raises:
      ValueError: as `quantize`.
    """
    if form not in FORMS:
        raise ValueError(f"quantize is {form!r}; choose one of {', '.join(FORMS)}")
    kind, group = FORMS[form]
    matrices = {_keys(path): narrow_matrix(traits) for path, traits in jax.tree.leaves_with_path(param_traits(config))}
    problems = []
    for path, w in jax.tree.leaves_with_path(abstract_model(config)[1]):
        matrix = matrices[_keys(path)]
        size = 0 if matrix is None else math.prod(w.shape[axis] for axis in matrix.inputs)
        if group and size % group:
            problems.append(f"{_dotted(path)} has {size} inputs, which groups of {group} do not divide")
    raise_problems(f"cannot quantise to {form}; choose another group", problems)

    def leaf(path: tuple[Any, ...], w: Any) -> Any:
        w, matrix = jnp.asarray(w), matrices[path]
        if matrix is None:
            return w
        made, finite = narrowed(w, matrix, kind, group)
        if not isinstance(finite, jax.core.Tracer) and not finite:
            name = ".".join(map(str, path))
            raise ValueError(f"{name} has values that are not finite, which have no scale; repair the checkpoint")
        return made

    return leaf


def narrow_matrix(traits: Traits) -> Matrix | None:
    """Returns the axes of a parameter that becomes narrow: a matrix between activations, the table or the head."""
    return OUT_IN if "vocab" in traits.axes else traits.matrix


def narrowed(w: jax.Array, matrix: Matrix, kind: str, group: int | None) -> tuple[WeightKind, jax.Array]:
    """Returns an array in a narrow type, and whether all of it was finite."""
    if group:
        return GroupQuantized.of(w, matrix, kind, group)
    by_int8 = kind == "w8a8"
    return Quantized.of(w, matrix, "int8" if by_int8 else kind, by_int8=by_int8)


def _is_kind(w: Any) -> bool:
    return isinstance(w, WeightKind)


def _keys(path: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(entry.key for entry in path)


def _dotted(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, _keys(path)))
