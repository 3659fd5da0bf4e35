"""Each feed-forward by itself against float64 numpy."""

import jax.numpy as jnp
import numpy as np
import reference
from flax import nnx
from helpers import rel_err

from lfm_jax.feed_forward.swiglu import SwiGLU
from lfm_jax.testing import tiny_config


def test_swiglu():
    ffn = SwiGLU(tiny_config(hidden_size=5, ffn_size=9), rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).standard_normal((1, 3, 5)).astype(np.float32)
    w1, w3, w2 = (np.asarray(w[...], np.float64) for w in (ffn.w1, ffn.w3, ffn.w2))
    expected = (reference.silu(x @ w1.T) * (x @ w3.T)) @ w2.T
    y, reports = ffn(jnp.asarray(x), segment_ids_BT=None)
    assert reports == {}
    assert rel_err(y, expected) < 1e-6
    assert ffn(jnp.asarray(x, jnp.bfloat16), segment_ids_BT=None)[0].dtype == jnp.bfloat16
