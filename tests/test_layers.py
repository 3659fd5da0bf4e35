"""RMSNorm and rotary against float64 numpy, and where each of them keeps float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import nnx
from helpers import rel_err

from lfm_jax.layers import RMSNorm, normal_param, rotary
from lfm_jax.testing import tiny_config

RNG = np.random.default_rng(0)


def test_rms_norm():
    norm = RMSNorm(7, tiny_config(norm_eps=1e-2))
    x, w = RNG.standard_normal((2, 3, 7)).astype(np.float32), RNG.standard_normal(7).astype(np.float32)
    norm.weight[...] = jnp.asarray(w)
    assert rel_err(norm(jnp.asarray(x)), reference.rms_norm(x.astype(np.float64), w, 1e-2)) < 1e-6
    tiny = 1e-3 * x  # Here eps decides.
    assert rel_err(norm(jnp.asarray(tiny)), reference.rms_norm(tiny.astype(np.float64), w, 1e-2)) < 1e-6


def test_rms_norm_squares_in_float32():
    norm = RMSNorm(4, tiny_config())
    out = norm(jnp.full((1, 4), 1e4, jnp.float16))  # 1e8 is beyond float16.
    assert out.dtype == jnp.float16
    np.testing.assert_allclose(out, 1.0)


@pytest.mark.parametrize("H", [2, 8, 10])
def test_rotary_turns_the_halves(H):
    x = RNG.standard_normal((2, 50, 3, H)).astype(np.float32)
    positions = np.stack([np.arange(50), np.arange(50)[::-1] * 40]).astype(np.int32)
    out = rotary(jnp.asarray(x), jnp.asarray(positions), 1e6)
    for row in range(2):
        assert rel_err(out[row], reference.rotate(x[row].astype(np.float64), positions[row], 1e6)) < 2e-4
        assert rel_err(out[row, :, :, 0] ** 2 + out[row, :, :, H // 2] ** 2,
                       x[row, :, :, 0] ** 2 + x[row, :, :, H // 2] ** 2) < 1e-5
    np.testing.assert_array_equal(out[0, 0], x[0, 0])


@pytest.mark.parametrize(("fraction", "turning"), [(0.5, 2), (0.3, 1), (0.9, 3), (0.0, 0), (1.0, 4)])
def test_rotary_of_a_share_of_the_pairs(fraction, turning):
    """They turn as fast as in a whole head, and the others keep every bit."""
    x = RNG.standard_normal((1, 9, 2, 8)).astype(np.float32)
    positions = np.arange(9, dtype=np.int32)[None]
    out, whole = (np.asarray(rotary(jnp.asarray(x), jnp.asarray(positions), 50.0, share)) for share in (fraction, 1.0))
    for first in (0, 4):
        np.testing.assert_array_equal(out[..., first : first + turning], whole[..., first : first + turning])
        np.testing.assert_array_equal(out[..., first + turning : first + 4], x[..., first + turning : first + 4])
    assert rel_err(out[0], reference.rotate(x[0].astype(np.float64), positions[0], 50.0, fraction)) < 1e-5


def test_rotary_products_know_only_the_distance():
    q, k = RNG.standard_normal((2, 1, 1, 1, 16)).astype(np.float32)

    def product(at, to):
        turned = (rotary(jnp.asarray(x), jnp.full((1, 1), p), 1e4) for x, p in ((q, at), (k, to)))
        return float(jnp.sum(next(turned) * next(turned)))

    assert abs(product(107, 100) - product(7, 0)) < 1e-3
    assert abs(product(107, 100) - product(8, 0)) > 1e-2


def test_rotary_keeps_angles_in_float32():
    """Position 1001 has no bfloat16; its angle must not be that of 1000."""
    x = jnp.ones((1, 1, 1, 2), jnp.bfloat16)
    out = rotary(x, jnp.asarray([[1001]]), 1e6)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float32).ravel(),
                               [np.cos(1001) - np.sin(1001), np.cos(1001) + np.sin(1001)], atol=0.01)


def test_init_has_the_configured_width_and_dtype():
    config = tiny_config(init_std=0.05, param_dtype="bfloat16")
    w = normal_param(nnx.Rngs(0), (200, 300), (None, None), config, decay=True, matrix=None)[...]
    assert w.dtype == jnp.bfloat16
    w32 = np.asarray(w, np.float32)
    assert abs(w32.std() / 0.05 - 1) < 0.02
    assert abs(w32.mean()) < 1e-3


def test_dtypes_follow_the_config():
    from lfm_jax import LFM

    config = tiny_config(dtype="bfloat16", param_dtype="float32", logits_dtype="bfloat16")
    model = nnx.eval_shape(lambda: LFM(config, rngs=nnx.Rngs(0)))
    assert {p.dtype for p in jax.tree.leaves(nnx.state(model, nnx.Param))} == {jnp.dtype("float32")}

    def run(logits):
        return jax.eval_shape(lambda: LFM(config, rngs=nnx.Rngs(0))(jnp.ones((1, 3), jnp.int32), logits=logits)[0])

    assert (run(None).dtype, run("all").dtype) == (jnp.bfloat16, jnp.bfloat16)
