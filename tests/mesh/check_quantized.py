"""Narrow weights over a mesh: every matrix of a model split, gathered and multiplied as on one device."""

import jax
import numpy as np
import pytest
from flax import nnx
from helpers import long, rel_err, tokens_like
from jax.sharding import PartitionSpec as P
from meshes import mesh_of

from lfm_jax import quantize
from lfm_jax.model import param_axes
from lfm_jax.sharding import shardings
from lfm_jax.testing import tiny_model

CHANGES = dict(
    vocab_size=96, hidden_size=64, ffn_size=128, head_dim=32, expert_size=64, num_experts=4, active_experts=2,
    layer_types=("conv", "sliding_attention", "full_attention"), ffn_types=("swiglu", "moe", "swiglu"),
    sliding_window=5, tie_embedding=False, attention_gate=True,
)


@pytest.mark.parametrize("sizes", [dict(fsdp=2, tensor=2, expert=2), long(dict(data=2, fsdp=2, tensor=2))], ids=str)
@pytest.mark.parametrize(("kind", "group"), [("int8", 32), ("int4", None), ("w8a8", None)])
def test_logits_are_those_of_one_device(kind, group, sizes):
    """In `make test-long` another mesh."""
    model = quantize(tiny_model(**CHANGES), kind, group)
    graphdef, params = nnx.split(model, nnx.Param)
    params, tokens = nnx.to_pure_dict(params), tokens_like((8, 6), 0, high=96)
    run = jax.jit(lambda params, tokens: nnx.merge(graphdef, params)(tokens)[0])
    expected = run(params, tokens)
    mesh = mesh_of(**sizes)
    with jax.set_mesh(mesh):
        layout = shardings(params, param_axes(model.config))
        placed = jax.device_put(params, layout)
        rows = jax.device_put(tokens, jax.NamedSharding(mesh, P(tuple(a for a in ("data", "fsdp", "expert") if
                                                                      sizes.get(a, 1) > 1), None)))
        found = run(placed, rows)
    w1 = placed["blocks"][0]["feed_forward"]["w1"].values
    assert w1.addressable_shards[0].data.size == w1.size // 4
    assert rel_err(np.asarray(found), expected) < (3e-2 if kind == "w8a8" else 1e-5)
