"""Attention layers of a trained model made into short convolutions, which start from what can be kept of them.

An attention layer reads values from its input by one matrix and writes its output by another; between them each head
takes a mean of its values with weights that depend on the text. A double-gated convolution (`operators/short_conv.py`)
has the same two matrices, and between them taps, the same for every token. So it starts as:

- last stream of in_proj: values, for each query head those of its key/value head.
- out_proj: the attention's.
- gates: 1, by matrices of zeros and biases of ones.
- conv and its bias: for each channel the W taps and the constant that come nearest, by least squares over some text, to
  what attention makes of the values before out_proj.

Weights are transferred where they can be and the rest is fitted layer by layer, as in MOHAWK (arXiv 2408.10189) and
RADLADS (arXiv 2505.03005), of which the attention's counterparts are recurrences.

Dimensions: B rows, T time, D width, N query heads, K key/value heads, G = N / K, H head width, W taps, F = W + 1.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lfm_jax.config import ModelConfig
from lfm_jax.model import LFM, Block, abstract_model
from lfm_jax.problems import raise_problems

RIDGE = 1e-6
"""Of the least squares, relative to each feature's square: channels whose values are constant stay finite."""


def hybrid_config(config: ModelConfig, attention_at: Collection[int], taps: int) -> ModelConfig:
    """The config of a model that keeps some layers of full attention and has convolutions with biases for the others.

    Args:
      attention_at: indices of the layers that stay; all: the config as it is.
      taps: W.

    Raises:
      ValueError: what stays is no layer of full attention, or such a model cannot hold what is kept of the others.
    """
    attention = {i for i, kind in enumerate(config.layer_types) if kind == "full_attention"}
    problems = [f"layer {i} is to keep its attention, and it has none; layers with attention are {sorted(attention)}"
                for i in sorted(set(attention_at) - attention)]
    changed = attention - set(attention_at)
    if changed and config.num_heads * config.head_dim != config.hidden_size:
        problems.append(f"num_heads x head_dim is {config.num_heads * config.head_dim} and hidden_size "
                        f"{config.hidden_size}; a convolution has as many channels as the model is wide, so that they "
                        "must be equal")
    problems += [f"{name} is set; the values are not all that such an attention writes" for name in
                 ("attention_gate",) if changed and getattr(config, name)]
    kept = {"conv_bias": True, "conv_gates": "both", "conv_taps": taps}
    if changed and "conv" in config.layer_types:
        problems += [f"{name} is {getattr(config, name)!r} in the model's own convolutions; all have one form, and "
                     f"those to come need {value!r}" for name, value in kept.items() if getattr(config, name) != value]
    if changed and not config.causal:
        problems.append("causal is False; only causal attention is made into causal convolutions")
    raise_problems("the model cannot be made into such a hybrid", problems)
    if not changed:
        return config
    types = tuple("conv" if i in changed else kind for i, kind in enumerate(config.layer_types))
    return config.replace(layer_types=types, **kept)


def started(model: LFM, tokens_BT: np.ndarray, taps: int) -> dict[int, Any]:
    """The convolution that each layer of full attention would start as.

    Args:
      tokens_BT: rows of text, without padding, on which taps are fitted.
      taps: W.

    Returns:
      By layer, the weights of a `ShortConv`, as numpy arrays.

    Raises:
      ValueError: see `hybrid_config`.
    """
    config = model.config
    hybrid_config(config, (), taps)
    x_BTD, positions_BT, segment_ids_BT = model.inputs(
        jnp.asarray(tokens_BT), None, jnp.ones(tokens_BT.shape, jnp.int32))
    found = {}
    for i, (block, kind) in enumerate(zip(model.blocks, config.layer_types, strict=True)):
        graphdef, params = nnx.split(block, nnx.Param)
        own = nnx.to_pure_dict(params)
        next_BTD, sums = _layer(graphdef, own, x_BTD, positions_BT, segment_ids_BT,
                                taps=taps if kind == "full_attention" else 0)
        if sums is not None:
            found[i] = _convolution(config, own["operator"], *map(np.asarray, sums))
        x_BTD = next_BTD
    return found


@partial(jax.jit, static_argnames=("graphdef", "taps"))
def _layer(
    graphdef: nnx.GraphDef[Block], params: Any, x_BTD: jax.Array, positions_BT: jax.Array, segment_ids_BT: jax.Array, *,
    taps: int,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
    """(output of a layer, sums of the normal equations of its taps [D, F, F] and [D, F]; None without taps)."""
    inputs = dict(positions_BT=positions_BT, segment_ids_BT=segment_ids_BT, state=None)
    block = nnx.merge(graphdef, params)
    next_BTD, _, _ = block(x_BTD, **inputs)
    if not taps:
        return next_BTD, None
    D, N, H = params["operator"]["out_proj"].shape
    apart = jnp.eye(D, dtype=x_BTD.dtype).reshape(D, N, H)  # The heads as they are, one channel after another.
    heads = nnx.merge(graphdef, params | {"operator": params["operator"] | {"out_proj": apart}})
    normed_BTD = heads.operator_norm(x_BTD)
    y_BTD = heads.operator(normed_BTD, **inputs)[0].astype(jnp.float32)
    h_BTD = (normed_BTD @ _values(params["operator"], D).T).astype(jnp.float32)
    # Oldest first, as the taps are.
    shifted = [jnp.pad(h_BTD, ((0, 0), (back, 0), (0, 0)))[:, : h_BTD.shape[1]] for back in range(taps)[::-1]]
    features_FBTD = jnp.stack([*shifted, jnp.ones_like(h_BTD)])
    precise = jax.lax.Precision.HIGHEST
    return next_BTD, (jnp.einsum("fbtd,gbtd->dfg", features_FBTD, features_FBTD, precision=precise),
                      jnp.einsum("fbtd,btd->df", features_FBTD, y_BTD, precision=precise))


def _values(operator: Any, D: int) -> Any:
    """[D, D]: what makes each channel of the heads' values, one query head after another."""
    v_KHD = operator["v_proj"]
    groups = D // (v_KHD.shape[0] * v_KHD.shape[1])
    return v_KHD.repeat(groups, axis=0).reshape(D, D)


def _convolution(config: ModelConfig, operator: Any, gram_DFF: np.ndarray, moment_DF: np.ndarray) -> Any:
    D, dtype = config.hidden_size, config.param_dtype
    gram_DFF, moment_DF = gram_DFF.astype(np.float64), moment_DF.astype(np.float64)
    diagonal_DF = np.einsum("dff->df", gram_DFF)
    ridge_DFF = np.eye(gram_DFF.shape[1]) * (RIDGE * diagonal_DF + np.finfo(np.float32).tiny)[:, :, None]
    fitted_DF = np.linalg.solve(gram_DFF + ridge_DFF, moment_DF[:, :, None])[:, :, 0]
    zeros_D, zeros_DD = np.zeros(D), np.zeros((D, D))
    weights = {
        "in_proj": np.stack([zeros_DD, zeros_DD, np.asarray(_values(operator, D))]),
        "in_bias": np.stack([zeros_D + 1, zeros_D + 1, zeros_D]),
        "conv": fitted_DF[:, :-1].T, "conv_bias": fitted_DF[:, -1],
        "out_proj": np.asarray(operator["out_proj"]).reshape(D, D), "out_bias": zeros_D,
    }
    return {name: np.asarray(jnp.asarray(w, dtype)) for name, w in weights.items()}


def hybridised(model: LFM, operators: Mapping[int, Any], taps: int) -> LFM:
    """The model with convolutions in the place of the attention of some layers; all else is as it was.

    Args:
      operators: weights of a `ShortConv` with biases by layer, as `started` gives them or as they were trained since.

    Raises:
      ValueError: see `hybrid_config`.
    """
    stays = [i for i, kind in enumerate(model.config.layer_types) if kind == "full_attention" and i not in operators]
    config = hybrid_config(model.config, stays, taps)
    weights: Any = nnx.to_pure_dict(nnx.split(model, nnx.Param)[1])
    blocks = {i: block | ({"operator": jax.tree.map(jnp.asarray, operators[i])} if i in operators else {})
              for i, block in weights["blocks"].items()}
    return nnx.merge(abstract_model(config)[0], weights | {"blocks": blocks})


def convolutions(model: LFM) -> dict[int, Any]:
    """The weights of a model's convolutions by layer, as `hybridised` takes them."""
    weights: Any = nnx.to_pure_dict(nnx.split(model, nnx.Param)[1])
    return {i: weights["blocks"][i]["operator"] for i, kind in enumerate(model.config.layer_types) if kind == "conv"}


def importance(original: LFM, operators: Mapping[int, Any], tokens_BT: np.ndarray, taps: int) -> dict[int, float]:
    """How far a model is from itself with one layer's attention alone made into a convolution, for each such layer:
    KL(original || changed) of the next token, in nats, mean over all places of some text.

    Layers that matter are those whose attention convolution replaces badly. Distilling to hybrid models by such scores
    is due to arXiv 2512.20569, which gives attention back to one layer of a student without any; here one is taken from
    the original, so that scores do not rest on a student that is far from it.

    Args:
      operators: as for `hybridised`; a score is given for each.
      tokens_BT: rows of text, without padding.
    """
    changed = hybridised(original, operators, taps)
    (graphdef, params), (other, others) = (nnx.split(model, nnx.Param) for model in (original, changed))
    size = original.config.num_layers

    @jax.jit
    def hidden(params: Any, others: Any, tokens_BT: jax.Array, changed_L: jax.Array) -> jax.Array:
        model, hybrid = nnx.merge(graphdef, params), nnx.merge(other, others)
        x_BTD, positions_BT, segment_ids_BT = model.inputs(tokens_BT, None, jnp.ones_like(tokens_BT))
        inputs = dict(positions_BT=positions_BT, segment_ids_BT=segment_ids_BT, state=None)
        for i, blocks in enumerate(zip(model.blocks, hybrid.blocks, strict=True)):
            if i in operators:
                kept, made = (lambda x_BTD, block=block: block(x_BTD, **inputs)[0] for block in blocks)
                x_BTD = jax.lax.cond(changed_L[i], made, kept, x_BTD)
            else:
                x_BTD = blocks[0](x_BTD, **inputs)[0]
        return model.norm(x_BTD)

    @jax.jit
    def divergence(head: Any, p_BTD: jax.Array, q_BTD: jax.Array) -> jax.Array:
        def of_row(rows: tuple[jax.Array, jax.Array]) -> jax.Array:
            logp_TV, logq_TV = (jax.nn.log_softmax((x_TD @ head.T).astype(jnp.float32)) for x_TD in rows)
            return jnp.sum(jnp.exp(logp_TV) * (logp_TV - logq_TV))

        return jnp.sum(jax.lax.map(of_row, (p_BTD, q_BTD)))

    head, sums = jnp.asarray(original.head_VD), dict.fromkeys(sorted(operators), 0.0)
    for row_T in tokens_BT:
        row_BT = jnp.asarray(row_T)[None]
        as_it_is_BTD = hidden(params, others, row_BT, jnp.zeros(size, bool))
        for i in sums:
            one_BTD = hidden(params, others, row_BT, jnp.arange(size) == i)
            sums[i] += float(divergence(head, as_it_is_BTD, one_BTD))
    return {i: total / tokens_BT.size for i, total in sums.items()}
