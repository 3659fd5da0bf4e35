"""What the network promises about its programs."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from lfm_jax import model as network
from lfm_jax.testing import tiny_model


@pytest.fixture
def lower():
    """StableHLO of a pass with a state, traced anew each time."""
    kinds = ("conv", "full_attention", "conv", "full_attention", "conv", "conv")
    model = tiny_model(layer_types=kinds)
    graphdef, params = nnx.split(model, nnx.Param)
    tokens_BT = jnp.ones((2, 5), jnp.int32)

    def text():
        def forward(params, state, tokens_BT):
            return nnx.merge(graphdef, params)(tokens_BT, None, tokens_BT, state, "last", padding="right")

        jax.clear_caches()
        return jax.jit(forward).lower(nnx.to_pure_dict(params), model.init_state(2, 16), tokens_BT).as_text()

    return text


def test_equal_blocks_with_a_state_are_traced_once_and_the_program_is_the_same(lower, monkeypatch):
    traced = []
    call = network.Block.__call__
    monkeypatch.setattr(network.Block, "__call__", lambda block, *args, **kwargs: (
        traced.append((block.kind, kwargs["only_B1"] is not None)), call(block, *args, **kwargs))[1])
    once = lower()
    assert sorted(traced) == [("conv", False), ("conv", True), ("full_attention", False)]
    monkeypatch.setattr(network, "_with_state", lambda block, x_BTD, **inputs: block(x_BTD, **inputs))
    traced.clear()
    assert lower() == once
    assert len(traced) == 6
