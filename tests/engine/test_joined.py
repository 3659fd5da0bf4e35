"""Weights that an engine joins give the same answers, and what cannot be joined stays as it is."""

import dataclasses

import jax
import pytest
from engines import V, run
from flax import nnx
from helpers import KINDS

from lfm_jax import quantize
from lfm_jax.adapters.trees import with_places
from lfm_jax.engine.config import EngineConfig
from lfm_jax.engine.engine import Engine
from lfm_jax.engine.placement import joined_weights, joins
from lfm_jax.engine.request import Request
from lfm_jax.sharding import make_mesh
from lfm_jax.testing import tiny_model

CONFIG = EngineConfig(slots=((2, 64),), chunk=16, max_logprobs=1)


def params_of(model):
    return nnx.to_pure_dict(nnx.split(model, nnx.Param)[1])


def test_joined_weights_change_no_bit_and_later_weights_are_joined_too():
    model = tiny_model(vocab_size=V, **KINDS["hybrid"])
    engines = [Engine(model, dataclasses.replace(CONFIG, joined=joined)) for joined in (False, True)]
    requests = [Request(prompt=list(range(9, 9 + n)), max_new_tokens=12, logprobs=0, stop_ids=()) for n in (5, 20)]
    before = [run(made, *requests) for made in engines]
    later = jax.tree.map(lambda w: w * 1.25, params_of(model))
    for made in engines:
        made.use(later)
    for apart, joined in (before, [run(made, *requests) for made in engines]):
        assert [heard.tokens for heard in apart] == [heard.tokens for heard in joined]
        assert [heard.logprobs for heard in apart] == [heard.logprobs for heard in joined]
    assert [heard.logprobs for heard in before[0]] != [heard.logprobs for heard in apart]


def test_weights_of_one_input_are_joined_and_all_others_are_the_same_arrays():
    model = tiny_model(layer_types=("conv", "full_attention"), ffn_types=("moe", "swiglu"))
    params, config = params_of(model), model.config
    found = joined_weights(params, joins(model))
    assert found["blocks"][0]["operator"] == params["blocks"][0]["operator"]
    assert found["blocks"][0]["feed_forward"] == params["blocks"][0]["feed_forward"]
    operator, feed_forward = found["blocks"][1]["operator"], found["blocks"][1]["feed_forward"]
    heads = config.num_heads + 2 * config.num_kv_heads
    assert operator["q_proj"].shape == (heads, config.head_dim, config.hidden_size)
    assert operator["k_proj"].size == operator["v_proj"].size == feed_forward["w3"].size == 0
    assert feed_forward["w1"].shape == (2 * config.ffn_size, config.hidden_size)
    assert feed_forward["w2"] is params["blocks"][1]["feed_forward"]["w2"]
    assert params["blocks"][1]["feed_forward"]["w3"].size > 0  # What was given is as it was.


@pytest.mark.parametrize("kind", ["narrow", "with places for adapters"])
def test_weights_that_are_no_plain_arrays_stay_apart(kind):
    model = tiny_model()
    if kind == "narrow":
        model = quantize(model, "int8")
    params = params_of(model)
    if kind != "narrow":
        params = with_places(model.config, params, places=1, rank=2)
    found = joined_weights(params, joins(model))
    assert jax.tree.structure(found) == jax.tree.structure(params)
    assert all(new is old for new, old in zip(jax.tree.leaves(found), jax.tree.leaves(params), strict=True))


def test_joined_weights_over_a_mesh_are_refused():
    with pytest.raises(ValueError, match="joined is for one device"):
        Engine(tiny_model(), dataclasses.replace(CONFIG, joined=True), make_mesh(devices=jax.devices()[:1]))
    with pytest.raises(ValueError, match="joined is 1; it must be true or false"):
        EngineConfig(joined=1)
