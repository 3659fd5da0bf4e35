"""A model as compiled-for-later programs, which a process runs that has jax alone: `jax.export` artifacts.

A directory holds, for each platform, the programs `decode` and `prefill_T` for each length T of prompts, the weights as
safetensors, and `manifest.json`, which says in what order a program takes them. Every program is

    (weights, state, tokens_BT, length_B) -> (logits_BV, state)

over flat tuples of arrays: it reads the first `length` tokens of each row (0 leaves a row as it is), continues the
state and returns the logits of the last token read. An empty state is zeros.

Dimensions: B batch, T time, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh

from lfm_jax.convert import safetensors_io
from lfm_jax.convert.sources import Spec
from lfm_jax.files import whole, write_whole
from lfm_jax.model import LFM
from lfm_jax.problems import raise_problems
from lfm_jax.state import State, init_state

PLATFORMS = ("cpu", "cuda", "tpu")
MANIFEST = "manifest.json"
FORMAT = 1


def export_stablehlo(
    model: LFM,
    directory: str | Path,
    *,
    prompts: Sequence[int] = (128, 512),
    max_len: int = 1024,
    batch: int = 1,
    platforms: Sequence[str] = PLATFORMS,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Writes a model as programs for several platforms, made on this one.

    For cuda and tpu they are what XLA alone makes: no kernels of Pallas or cuDNN, which belong to versions of jax.

    Args:
      directory: made if it is missing; `manifest.json` is written last.
      prompts: the T of prefill programs. Shorter prompts are padded, longer ones go in several calls.
      max_len: tokens that a row of the state has room for.
      batch: rows.
      platforms: of `PLATFORMS`.
      say: gets a line for each file.

    Raises:
      ValueError: a model that predicts no next token, a platform that is not one, numbers below 1, a `max_len` above
        the model's context or below a prompt; the message lists all. Or the directory has files already.
      ImportError: flatbuffers is not installed.
    """
    config, directory = model.config, Path(directory)
    config.need_causal("an export of prefill and decode programs")
    problems = [f"platform {name!r} is none of {', '.join(PLATFORMS)}" for name in platforms if name not in PLATFORMS]
    problems += [f"{name} is {value}; it must be at least 1" for name, value in
                 (("batch", batch), ("max_len", max_len), *(("a prompt's length", T) for T in prompts)) if value < 1]
    problems += [f"prompts of {T} tokens do not fit into max_len {max_len}" for T in prompts if max_len < T]
    if max_len > config.max_position:
        problems.append(f"max_len is {max_len}, and the model's context holds {config.max_position}")
    graphdef, params = nnx.split(model, nnx.Param)
    weights = _named(nnx.to_pure_dict(params))
    if any(not jnp.issubdtype(x.dtype, jnp.floating) for x in weights.values()):
        problems.append("the model is quantised, which the file of weights cannot hold; export the model that it was "
                        "made from")
    raise_problems("cannot export these programs", problems)
    _need_flatbuffers()
    if directory.exists() and any(directory.iterdir()):
        raise ValueError(f"{directory} has files already; name another directory, or empty it")
    directory.mkdir(parents=True, exist_ok=True)

    state = jax.eval_shape(lambda: init_state(config, batch, max_len))
    say(f"{safetensors_io.SINGLE}: {len(weights)} tensors")
    specs = {name: Spec(x.shape, x.dtype.name) for name, x in weights.items()}
    arrays = ((name, np.asarray(x)) for name, x in weights.items())
    safetensors_io.write(directory, specs, arrays, sum(x.nbytes for x in weights.values()))

    programs: dict[str, dict[str, str]] = {}
    tree = jax.tree.structure(nnx.to_pure_dict(params))
    for platform in platforms:
        for T in (1, *sorted({*prompts} - {1})):
            name = "decode" if T == 1 else f"prefill_{T}"
            file = f"{name}.{platform}.jaxexport"
            say(file)
            exported = _program(graphdef, tree, [*weights.values()], state, (batch, T), platform)
            with whole(directory / file) as out:
                out.write(exported.serialize())
            programs.setdefault(name, {})[platform] = file
    manifest = {
        "format": FORMAT, "jax": jax.__version__, "batch": batch, "max_len": max_len, "vocab_size": config.vocab_size,
        "config": dataclasses.asdict(config), "programs": programs, "weights": [*weights],
        "state": [{"name": name, "shape": [*x.shape], "dtype": x.dtype.name} for name, x in _named(state).items()],
    }
    write_whole(directory / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def _program(
    graphdef: Any, tree: Any, weights: Sequence[Any], state: State, shape_BT: tuple[int, int], platform: str
) -> jax.export.Exported:
    state_tree = jax.tree.structure(state)

    def run(weights: Any, flat_state: Any, tokens_BT: jax.Array, length_B: jax.Array) -> Any:
        model = nnx.merge(graphdef, jax.tree.unflatten(tree, weights))
        segment_ids_BT = (jnp.arange(shape_BT[1]) < length_B[:, None]).astype(jnp.int32)
        logits_B1V, after = model(tokens_BT, segment_ids_BT=segment_ids_BT, padding="right", logits="last",
                                  state=jax.tree.unflatten(state_tree, flat_state))
        return logits_B1V[:, 0], tuple(jax.tree.leaves(after))

    def shapes(arrays: Sequence[Any]) -> tuple[jax.ShapeDtypeStruct, ...]:
        return tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays)

    ints = (jax.ShapeDtypeStruct(shape_BT, jnp.int32), jax.ShapeDtypeStruct(shape_BT[:1], jnp.int32))
    # Implementations are chosen by the device that a program is traced for.
    kind = {"cpu": "cpu", "cuda": "gpu", "tpu": "tpu"}[platform]
    mesh = AbstractMesh((), (), abstract_device=AbstractDevice(kind, 1, kind))
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.export.export(jax.jit(run), platforms=(platform,))(
            shapes(weights), shapes(jax.tree.leaves(state)), *ints)


def _named(tree: Any) -> dict[str, Any]:
    """Leaves by the path of their names, in the order of the tree."""
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in
            jax.tree_util.tree_leaves_with_path(tree)}


def _need_flatbuffers() -> None:
    try:
        import flatbuffers  # noqa: F401  Only to see whether it is there.
    except ImportError:
        raise ImportError("jax.export writes files with flatbuffers: pip install lfm_jax[export]") from None
