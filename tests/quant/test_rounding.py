"""Rounding on the device: what a file would hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lfm_jax.quant.block_types import BLOCKS, dequantize, quantize
from lfm_jax.quant.rounding import rounded, straight_through


def weights(seed=0, rows=64, columns=512):
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((rows, columns)).astype(np.float32) * rng.lognormal(size=(rows, 1)).astype(np.float32)
    w[0] = 0
    w[1, :64] = 0.25
    w[2, 5] = 1e4
    w[3] = -np.abs(w[3])
    return w * np.float32(0.02)


@pytest.mark.parametrize("type", ["F32", "F16", "BF16", *BLOCKS])
def test_it_is_what_a_file_holds(type):
    """On the device a number on the border of two steps may take the other one."""
    w = weights()
    expected = dequantize(quantize(w, type), type, w.shape)
    found = np.asarray(jax.jit(rounded, static_argnums=1)(w, type))
    other = found != expected
    assert other.mean() <= 1e-4 * (type in ("Q4_0", "Q8_0"))
    np.testing.assert_allclose(np.abs(found - w)[other], np.abs(expected - w)[other], rtol=1e-4)


@pytest.mark.parametrize("type", ["Q4_0", "Q8_0", "F16", "BF16"])
def test_what_is_rounded_stays_as_it_is(type):
    """So that a file of the rounded weights holds them, bit for bit, wherever they were rounded."""
    w = np.asarray(rounded(weights(), type))
    np.testing.assert_array_equal(dequantize(quantize(w, type), type, w.shape), w)
    np.testing.assert_array_equal(rounded(w, type), w)


@pytest.mark.parametrize(("type", "dtype"), [("Q4_0", "float32"), ("Q4_K", "float32"), ("Q8_0", "bfloat16")])
def test_the_derivative_goes_straight_through(type, dtype):
    w, c = jnp.asarray(weights(), dtype), jnp.asarray(weights(1), dtype)
    value, gradient = jax.jit(jax.value_and_grad(lambda w: jnp.sum(straight_through(w, type) * c)))(w)
    assert value.dtype == gradient.dtype == dtype
    np.testing.assert_array_equal(gradient, c)
    np.testing.assert_array_equal(straight_through(w, type), rounded(w, type).astype(dtype))
