import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lfm_jax.kernels.linear import FEW_ROWS, joined, linear, linears

SHAPES = {  # x, w, inputs
    "matrix": ((3, 5, 8), (12, 8), 1),
    "one row": ((1, 1, 8), (12, 8), 1),
    "several outputs": ((2, 5, 8), (3, 4, 8), 1),
    "several inputs": ((2, 5, 3, 4), (8, 3, 4), 2),
}


@pytest.mark.parametrize("impl", ["dot", "left", "auto"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_float64_forward_and_gradient(shape, impl):
    x_shape, w_shape, inputs = shape
    keys = jax.random.split(jax.random.key(0), 2)
    x, w = jax.random.normal(keys[0], x_shape), jax.random.normal(keys[1], w_shape)
    x64, w64 = np.asarray(x, np.float64), np.asarray(w, np.float64)
    n_in = int(np.prod(x_shape[-inputs:]))
    want = (x64.reshape(-1, n_in) @ w64.reshape(-1, n_in).T).reshape(*x_shape[:-inputs], *w_shape[:-inputs])
    y, pull = jax.vjp(jax.jit(lambda x, w: linear(x, w, inputs=inputs, impl=impl)), x, w)
    np.testing.assert_allclose(y, want, atol=1e-5)
    g = np.cos(np.arange(want.size)).reshape(want.shape)
    dx, dw = pull(jnp.asarray(g, jnp.float32))
    g2 = g.reshape(-1, int(np.prod(w_shape[:-inputs])))
    np.testing.assert_allclose(dx, (g2 @ w64.reshape(-1, n_in)).reshape(x_shape), atol=1e-5)
    np.testing.assert_allclose(dw, (g2.T @ x64.reshape(-1, n_in)).reshape(w_shape), atol=1e-5)


@pytest.mark.parametrize("rows", [1, FEW_ROWS + 1])
def test_products_of_joined_weights_are_those_of_each(rows):
    keys = jax.random.split(jax.random.key(0), 4)
    ws = [jax.random.normal(key, (n, 4, 8)) for key, n in zip(keys, (3, 2, 1), strict=False)]
    x = jax.random.normal(keys[3], (rows, 1, 8))
    for y, w in zip(linears(x, joined(ws), (3, 2, 1)), ws, strict=True):
        np.testing.assert_allclose(y, linear(x, w), atol=1e-5)


@pytest.mark.parametrize("impl", ["dot", "left"])
def test_bfloat16_products_accumulate_in_the_dtype_asked_for(impl):
    x = jnp.full((2, 1000), 0.1, jnp.bfloat16)
    w = jnp.full((3, 1000), 0.1, jnp.float32)
    assert linear(x, w, impl=impl).dtype == jnp.bfloat16
    wide = linear(x, w, dtype="float32", impl=impl)
    assert wide.dtype == jnp.float32
    np.testing.assert_allclose(wide, 1000 * float(jnp.bfloat16(0.1)) ** 2, rtol=1e-5)


def test_few_rows_on_a_cpu_keep_the_weights_on_the_left():
    def first_operand(rows):
        w, x = jax.ShapeDtypeStruct((48, 32), "float32"), jax.ShapeDtypeStruct((rows, 32), "float32")
        text = jax.jit(linear).lower(x, w).compile().as_text()
        return next(line for line in text.splitlines() if " dot(" in line or "custom-call(" in line)

    assert f"f32[48,{8}]" in first_operand(8)
    assert f"f32[{FEW_ROWS + 1},48]" in first_operand(FEW_ROWS + 1)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="differ in their last 1 axes"):
        linear(jnp.zeros((2, 3)), jnp.zeros((4, 5)))
    with pytest.raises(ValueError, match="impl is 'right'"):
        linear(jnp.zeros((2, 3)), jnp.zeros((4, 3)), impl="right")
