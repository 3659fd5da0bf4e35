"""The derivative and the padding of products by groups for Hopper GPUs, with a stand-in for JAX's kernels, and their
lowering for CUDA. `lfm selfcheck` compares the kernels themselves with float64 on a GPU.

Dimensions: M tokens, A active experts, E experts, D width, F width of an expert, R rows, I inputs, O outputs.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import rel_err
from jax import ShapeDtypeStruct as Shape
from jax.experimental.pallas.ops.gpu import transposed_ragged_dot_mgpu

from lfm_jax.kernels import pallas_gpu_experts, reference
from lfm_jax.kernels.experts import experts
from lfm_jax.kernels.pallas_gpu_experts import BLOCK, grouped_product

D, F = 128, 256


def ragged_dot(rows_RI, w, *, group_sizes, transpose_rhs, grid_block_n, **blocks):
    """Rows of no group are not written."""
    w_EIO = jnp.swapaxes(w, 1, 2) if transpose_rhs else w
    assert len(rows_RI) % BLOCK == 0
    assert w_EIO.shape[2] // BLOCK % grid_block_n == 0
    out_RO = jax.lax.ragged_dot(rows_RI, w_EIO, group_sizes)
    return jnp.where((jnp.arange(len(rows_RI)) < group_sizes.sum())[:, None], out_RO, jnp.nan)


def transposed_ragged_dot(rows_RI, dy_RO, *, group_sizes, **blocks):
    """What is of another group is multiplied by 0."""
    assert len(rows_RI) % BLOCK == 0
    group_R = jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(len(rows_RI)), side="right")
    mine_ER = (group_R == jnp.arange(len(group_sizes))[:, None]).astype(rows_RI.dtype)
    return jnp.einsum("ER,RI,RO->EIO", mine_ER, rows_RI, dy_RO)


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(pallas_gpu_experts, "_kernel", lambda name: globals()[name])


def problem(M, A, E):
    rng = np.random.default_rng(0)
    chosen_MA = np.stack([rng.permutation(E)[:A] for _ in range(M)]).astype(np.int32)
    chosen_MA[1:][rng.random(M - 1) < 0.3] = E
    chosen_MA[chosen_MA == 1] = 0  # An expert without tokens.
    shapes = dict(x_MD=(M, D), w1_EDF=(E, D, F), w3_EDF=(E, D, F), w2_EFD=(E, F, D))
    args = {name: (rng.standard_normal(shape) * shape[-2] ** -0.5).astype(jnp.bfloat16)
            for name, shape in shapes.items()}
    return args | {"weight_MA": rng.uniform(0.1, 1, chosen_MA.shape).astype(np.float32)}, chosen_MA


@pytest.mark.parametrize(("M", "A", "E"), [(61, 3, 7), (1, 2, 4), (128, 1, 2)])
def test_values_and_gradients_equal_float64(stand_in, M, A, E):
    args, chosen_MA = problem(M, A, E)
    dy_MD = np.random.default_rng(1).standard_normal((M, D)).astype(jnp.bfloat16)

    @jax.jit
    def run(args, dy_MD):
        y_MD, pull = jax.vjp(lambda args: experts(**args, chosen_MA=chosen_MA, impl="pallas_gpu"), args)
        return y_MD, pull(dy_MD)[0]

    y_MD, gradients = run(args, dy_MD)
    expected_MD, expected = reference.experts(**args, chosen_MA=chosen_MA)
    assert rel_err(y_MD, expected_MD) < 1e-2
    for name, gradient in expected(dy_MD).items():
        assert rel_err(gradients[name], gradient) < 2e-2, name


@pytest.mark.parametrize(("M", "A", "E", "D", "F"), [(4096, 4, 32, 2048, 1792), (1, 4, 64, 2048, 1536)])
def test_shapes_of_the_presets_lower_for_cuda(monkeypatch, M, A, E, D, F):
    """Three products, and for the gradient two of each: nine kernels."""
    device = SimpleNamespace(core_count=132)  # Asked for where the gradient's kernel is made.
    monkeypatch.setattr(transposed_ragged_dot_mgpu, "jax", SimpleNamespace(**vars(jax) | {"devices": lambda: [device]}))
    bf16 = jnp.bfloat16
    args = dict(x_MD=Shape((M, D), bf16), w1_EDF=Shape((E, D, F), bf16), w3_EDF=Shape((E, D, F), bf16),
                w2_EFD=Shape((E, F, D), bf16), weight_MA=Shape((M, A), jnp.float32))

    def train(args, chosen_MA):
        return jax.grad(lambda args: jnp.sum(experts(**args, chosen_MA=chosen_MA, impl="pallas_gpu"
                                                     ).astype(jnp.float32)))(args)

    lowered = jax.jit(train).trace(args, Shape((M, A), jnp.int32)).lower(lowering_platforms=("cuda",)).as_text()
    assert lowered.count("@mosaic_gpu_v2(") == 9


def test_what_the_kernels_cannot_do_is_refused():
    rows, w, sizes = jnp.ones((4, 128), jnp.bfloat16), jnp.ones((2, 128, 256), jnp.bfloat16), jnp.array([2, 2])
    with pytest.raises(ValueError, match="takes one half-precision dtype: cast, or choose another impl"):
        grouped_product(rows.astype(jnp.float32), w.astype(jnp.float32), sizes)
    with pytest.raises(ValueError, match=r"have shape \(128, 192\); impl='pallas_gpu' takes multiples of 128"):
        grouped_product(rows, w[..., :192], sizes)
