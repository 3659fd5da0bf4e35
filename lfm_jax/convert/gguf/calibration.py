"""Importance of the inputs of matrices: their mean squares while a model reads a calibration text.

Dimensions: B batch, T time, I inputs, E experts, A active experts of a token, D width, F width of an expert.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lfm_jax.config import ModelConfig
from lfm_jax.convert.gguf.archs import arch_of
from lfm_jax.convert.gguf.imatrix import Imatrix
from lfm_jax.convert.weights import groups
from lfm_jax.feed_forward.moe import MoE
from lfm_jax.kernels.linear import linear, lookup
from lfm_jax.model import LFM, abstract_model
from lfm_jax.problems import raise_problems
from lfm_jax.text.codec import encoded
from lfm_jax.weight_kinds import WeightKind

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CONTEXT = 512
"""Tokens of a piece of the text, bos included, as in llama.cpp."""
_ROWS = 4
"""Pieces that are computed together."""
Sums = dict[str, tuple[jax.Array, jax.Array]]
"""By tensor: sums of squares [matrices, I], and counts [matrices]."""


def importance(
    model: LFM, tokenizer: Tokenizer, text: str, *, dataset: str = "", context: int = CONTEXT,
    max_pieces: int | None = None, tell: Callable[[str], None] = lambda message: None,
) -> Imatrix:
    """Reads a text with a model and returns how large the inputs of its matrices are (llama.cpp's imatrix).

    The text is cut into pieces of `context` tokens, each of which begins with bos. As llama.cpp, it looks at the
    matrices of all layers, and at neither table nor head.

    Args:
      text: a sample of what the model is for; some hundred thousand tokens are enough.
      dataset: what the text is called in a file.
      max_pieces: read no more pieces.
      tell: is told how far it is.

    Raises:
      ValueError: no architecture of llama.cpp can hold the model, or the text or the context is empty.
    """
    config = model.config
    raise_problems("importance is for models that GGUF files can hold", arch_of(config)[1], most=None)
    if context < 2:
        raise ValueError(f"context is {context}; it must be at least 2")
    ids = encoded(tokenizer, text, add_special_tokens=False).ids
    pieces = [[config.bos_id, *ids[i : i + context - 1]] for i in range(0, len(ids), context - 1)][:max_pieces]
    if not pieces:
        raise ValueError("the calibration text has no tokens; give one with some thousand words")
    observe, params = jax.jit(_observer(config)), nnx.to_pure_dict(nnx.state(model, nnx.Param))
    totals: dict[str, list[np.ndarray]] = {}
    for first in range(0, len(pieces), _ROWS):
        tokens_BT, segment_ids_BT = _padded(pieces[first : first + _ROWS], context)
        for name, sums in observe(params, tokens_BT, segment_ids_BT).items():
            new = [np.asarray(x, np.float64) for x in sums]
            totals[name] = [old + x for old, x in zip(totals[name], new, strict=True)] if name in totals else new
        tell(f"{min(first + _ROWS, len(pieces))} of {len(pieces)} pieces of {context} tokens are read")
    squares, counts = ({name: sums[i] for name, sums in totals.items()} for i in (0, 1))
    return Imatrix(squares, counts, (dataset,) if dataset else (), len(pieces), context)


def _padded(pieces: Sequence[Sequence[int]], context: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens and segment ids of a whole batch: one shape is one compilation."""
    tokens_BT, segment_ids_BT = np.zeros((2, _ROWS, context), np.int32)
    for row, piece in enumerate(pieces):
        tokens_BT[row, : len(piece)], segment_ids_BT[row, : len(piece)] = piece, 1
    return tokens_BT, segment_ids_BT


def _observer(config: ModelConfig) -> Callable[[Any, jax.Array, jax.Array], Sums]:
    """Returns a function (parameters, tokens, segment ids) -> the sums of one batch."""
    # Without rematerialisation, all products are in the program of `observe` itself.
    graphdef, _ = abstract_model(config.replace(remat="none"))
    names = {path: group.names[0] for group in groups(arch_of(config)[0].weights, config)
             for path in group.paths if path[0] == "blocks" and len(group.leaf.shape) > 1
             and not group.names[0].endswith("_exps.weight")}  # Those are noted expert by expert.

    def observe(params: Any, tokens_BT: jax.Array, segment_ids_BT: jax.Array) -> Sums:
        found: Sums = {}
        real_BT = (segment_ids_BT != 0).astype(jnp.float32)
        for (*parents, last), name in names.items():
            row: Any = functools.reduce(operator.getitem, parents, params)  # The tree is this call's own.
            row[last] = _Watched(row[last], name, real_BT, found)
        model = nnx.merge(graphdef, params)
        for i, block in enumerate(model.blocks):
            if isinstance(block.feed_forward, MoE):
                block.feed_forward = _watched_experts(block.feed_forward, f"blk.{i}.", real_BT, found)
        model(tokens_BT, None, segment_ids_BT, logits=None, padding="right")
        return found

    return observe


@dataclasses.dataclass(frozen=True, eq=False)
class _Watched(WeightKind):
    """A weight that notes the sums of squares of what it is multiplied by, while a program is traced."""

    weight: jax.Array | WeightKind
    name: str
    real_BT: jax.Array
    found: Sums

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    @property
    def dtype(self) -> jnp.dtype:
        return self.weight.dtype

    def astype(self, dtype: str | jnp.dtype) -> jax.Array:
        return self.weight.astype(dtype)

    def linear(self, x: jax.Array, *, inputs: int, dtype: jnp.dtype, impl: str) -> jax.Array:
        x_BTI = x.reshape(*self.real_BT.shape, -1)
        squares_I = _einsum("BT,BTI->I", self.real_BT, _squared(x_BTI))
        self.found[self.name] = squares_I[None], jnp.sum(self.real_BT)[None]
        return linear(x, self.weight, inputs=inputs, dtype=dtype, impl=impl)

    def lookup(self, ids_BT: jax.Array, dtype: str | jnp.dtype) -> jax.Array:
        return lookup(ids_BT, self.weight, dtype)


def _watched_experts(moe: MoE, prefix: str, real_BT: jax.Array, found: Sums) -> Callable[..., Any]:
    """Returns a feed-forward that does as `moe`, and notes the sums of each expert over the tokens that chose it."""

    def run(x_BTD: jax.Array, *, segment_ids_BT: jax.Array | None) -> Any:
        chosen_BTA = moe.route(x_BTD)[0]
        is_EBT = jnp.any(chosen_BTA == jnp.arange(moe.config.num_experts)[:, None, None, None], axis=-1) * real_BT
        count_E = jnp.sum(is_EBT, axis=(1, 2))

        def down(expert: Any) -> jax.Array:
            w1_DF, w3_DF, is_BT = expert
            hidden_BTF = jax.nn.silu(x_BTD @ w1_DF) * (x_BTD @ w3_DF)
            return _einsum("BT,BTF->F", is_BT, _squared(hidden_BTF))

        w1_EDF, w3_EDF = (w[...].astype(x_BTD.dtype) for w in (moe.w1, moe.w3))
        up = _einsum("EBT,BTD->ED", is_EBT, _squared(x_BTD)), count_E
        found[f"{prefix}ffn_gate_exps.weight"] = found[f"{prefix}ffn_up_exps.weight"] = up
        found[f"{prefix}ffn_down_exps.weight"] = jax.lax.map(down, (w1_EDF, w3_EDF, is_EBT)), count_E
        return moe(x_BTD, segment_ids_BT=segment_ids_BT)

    return run


def _squared(x: jax.Array) -> jax.Array:
    return jnp.square(x.astype(jnp.float32))


def _einsum(subscripts: str, *arrays: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, *arrays, precision=jax.lax.Precision.HIGHEST)
