"""The experts of a mixture against float64 numpy, and the work that they take.

Dimensions: M tokens, A active experts of a token, E experts, D width, F width of an expert.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tpu_aot
from helpers import rel_err
from hypothesis import given
from hypothesis import strategies as st

from lfm_jax.kernels import experts as kernel
from lfm_jax.kernels import reference
from lfm_jax.kernels.experts import IMPLS, block_rows, experts, in_blocks
from lfm_jax.sharding import AMPERE, HOPPER

D, F = 12, 20
ANYWHERE = [impl for impl in IMPLS if impl != "pallas_gpu"]
TPU = tpu_aot.TOPOLOGIES["v5e"]


def problem(chosen_MA, E, seed=0, dtype=np.float32, D=D, F=F):
    rng = np.random.default_rng(seed)
    shapes = dict(x_MD=(len(chosen_MA), D), w1_EDF=(E, D, F), w3_EDF=(E, D, F), w2_EFD=(E, F, D))
    arrays = {name: (rng.standard_normal(shape) * shape[-2] ** -0.5).astype(dtype) for name, shape in shapes.items()}
    return arrays | {"weight_MA": rng.uniform(0.1, 1, chosen_MA.shape).astype(np.float32)}


def choices(kind, M, A, E):
    rng = np.random.default_rng(M)
    chosen_MA = np.stack([rng.permutation(E)[:A] for _ in range(M)])
    if kind == "all on one":
        chosen_MA = np.broadcast_to(np.arange(A), (M, A))
    if kind == "padding":
        chosen_MA[rng.random(M) < 0.4] = E
    if kind == "another device's":  # As over a mesh: outside of [0, E), and only some choices of a token.
        chosen_MA = np.where(rng.random((M, A)) < 0.5, chosen_MA, rng.choice([-3, E + 4], (M, A)))
    return chosen_MA.astype(np.int32)


@pytest.mark.parametrize("impl", ANYWHERE)
@pytest.mark.parametrize(("kind", "M", "A", "E"), [
    ("even", 61, 3, 7), ("even", 1, 4, 8), ("even", 300, 1, 2), ("all on one", 90, 2, 5), ("padding", 61, 2, 4),
    ("padding", 3, 1, 1), ("another device's", 61, 3, 7),
])
def test_values_and_gradients_equal_float64(impl, kind, M, A, E):
    chosen_MA = choices(kind, M, A, E)
    args = problem(chosen_MA, E)
    dy_MD = np.random.default_rng(1).standard_normal((M, D)).astype(np.float32)

    @jax.jit
    def run(args, chosen_MA, dy_MD):
        y_MD, pull = jax.vjp(lambda args: experts(**args, chosen_MA=chosen_MA, impl=impl), args)
        return y_MD, pull(dy_MD)[0]

    y_MD, gradients = run(args, chosen_MA, dy_MD)
    expected_MD, expected = reference.experts(**args, chosen_MA=chosen_MA)
    np.testing.assert_allclose(y_MD, expected_MD, atol=1e-5 * np.abs(expected_MD).max())
    for name, gradient in expected(dy_MD).items():
        np.testing.assert_allclose(gradients[name], gradient, atol=1e-5 * np.abs(gradient).max(), err_msg=name)


@pytest.mark.parametrize("impl", ANYWHERE)
def test_bfloat16_sums_in_float32(impl):
    chosen_MA = choices("even", 40, 4, 8)
    args = problem(chosen_MA, 8, dtype=jnp.bfloat16)
    y_MD = experts(**args, chosen_MA=chosen_MA, impl=impl)
    assert y_MD.dtype == jnp.bfloat16
    assert rel_err(y_MD, reference.experts(**args, chosen_MA=chosen_MA)[0]) < 2**-7


@given(st.integers(0, 99), st.sampled_from([0.0, 0.3, 1.0]), st.integers(3, 7),
       st.sampled_from([(40, 3, 8), (1, 2, 4)]))
def test_blocks_hold_every_row_once_and_little_beside(seed, padding, used_experts, shape):
    (M, A, b), E = shape, 7
    rng = np.random.default_rng(seed)
    chosen_MA = np.stack([rng.permutation(used_experts)[:A] for _ in range(M)])
    chosen_MA[rng.random(M) < padding] = E
    row_Nb, expert_N, used = jax.tree.map(np.asarray, in_blocks(jnp.asarray(chosen_MA), E, b))
    rows = row_Nb[:used]
    held = np.sort(rows[rows < M * A])
    np.testing.assert_array_equal(held, np.flatnonzero(chosen_MA.reshape(-1) < E))
    assert (row_Nb[used:] == M * A).all()
    for row_b, e in zip(rows, expert_N, strict=False):
        assert (chosen_MA.reshape(-1)[row_b[row_b < M * A]] == e).all()
    assert rows.size <= M * A + E * b


def test_padding_takes_no_work():
    """Blocks of real tokens only; `ragged` has groups of real tokens only."""
    chosen_MA = jnp.full((64, 4), 8).at[:2].set(jnp.arange(4))
    assert in_blocks(chosen_MA, 8, 8).used == 4
    np.testing.assert_array_equal(kernel._sizes(chosen_MA, 8), [2, 2, 2, 2, 0, 0, 0, 0])


@pytest.mark.parametrize("impl", ["ragged", "blocks"])
def test_what_padding_holds_reaches_no_gradient(impl):
    chosen_MA = choices("padding", 30, 2, 4)
    args, padding_M = problem(chosen_MA, 4), (chosen_MA == 4).all(axis=1)
    args["x_MD"][padding_M] = np.nan
    gradients = jax.grad(lambda args: jnp.sum(experts(**args, chosen_MA=chosen_MA, impl=impl)))(args)
    assert padding_M.any()
    assert np.isfinite(gradients.pop("x_MD")[~padding_M]).all()
    assert all(np.isfinite(gradient).all() for gradient in gradients.values())


def test_a_result_does_not_depend_on_the_batch():
    """To the bit: one row is computed in a block of several, as in a batch."""
    chosen_MA = choices("even", 9, 2, 4)
    args = problem(chosen_MA, 4)
    run = jax.jit(lambda chosen_MA, args: experts(**args, chosen_MA=chosen_MA, impl="blocks"))
    together_MD = run(chosen_MA, args)
    for m in range(9):
        alone = args | {name: args[name][m : m + 1] for name in ("x_MD", "weight_MA")}
        np.testing.assert_array_equal(run(chosen_MA[m : m + 1], alone)[0], together_MD[m])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_of_as_many_tokens_a_result_does_not_depend_on_the_others(dtype):
    """To the bit, at real widths: neighbours that choose the same experts, others, or none as idle slots do."""
    M, A, E, wide = 64, 4, 8, dict(D=1024, F=896)
    chosen_MA = choices("even", M, A, E)
    args = problem(chosen_MA, E, dtype=dtype, **wide)
    run = jax.jit(lambda chosen_MA, args: experts(**args, chosen_MA=chosen_MA, impl="blocks"))
    together_MD = run(chosen_MA, args)
    for seed in range(4):
        others = problem(chosen_MA, E, seed + 1, dtype, **wide)
        place, chosen = 13 * seed, chosen_MA.copy() if seed else np.full_like(chosen_MA, E)
        chosen[place:] = chosen_MA[5]
        x_MD, weight_MA = others["x_MD"], others["weight_MA"]
        x_MD[place], weight_MA[place], chosen[place] = args["x_MD"][5], args["weight_MA"][5], chosen_MA[5]
        moved_MD = run(chosen, args | dict(x_MD=x_MD, weight_MA=weight_MA))
        np.testing.assert_array_equal(moved_MD[place], together_MD[5])


def sizes(M, A, E, D, F, dtype=jnp.bfloat16):
    shapes = dict(x_MD=(M, D), w1_EDF=(E, D, F), w3_EDF=(E, D, F), w2_EFD=(E, F, D))
    args = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()}
    return args | {"weight_MA": jax.ShapeDtypeStruct((M, A), jnp.float32)}, jax.ShapeDtypeStruct((M, A), jnp.int32)


def gradient(args, chosen_MA, impl):
    return jax.grad(lambda args: jnp.sum(experts(**args, chosen_MA=chosen_MA, impl=impl).astype(jnp.float32)))(args)


def test_temporaries_on_cpu():
    """Forward the sum in float32 and one block; with the gradient those of the weights in float32, no hidden layer."""
    M, A, E, D, F = 512, 4, 16, 256, 512
    args, chosen = sizes(M, A, E, D, F, jnp.float32)
    hidden = 4 * M * A * F
    forward = jax.jit(lambda args, chosen: experts(**args, chosen_MA=chosen, impl="blocks")).lower(args, chosen)
    assert forward.compile().memory_analysis().temp_size_in_bytes < hidden
    backward = jax.jit(lambda args, chosen: gradient(args, chosen, "blocks")).lower(args, chosen).compile()
    weights = 3 * 4 * E * D * F
    assert backward.memory_analysis().temp_size_in_bytes < weights + hidden
    assert block_rows(M, A, E) == 64


@tpu_aot.requires_libtpu
def test_a_tpu_multiplies_active_experts_only():
    """FLOPs within 5 % of the active ones, forward and with the gradient. Temporaries, in copies of the active hidden
    layer: forward under 3; with the gradient 26, of which 24 are the weights, copied transposed."""
    M, A, E, D, F = 2048, 4, 32, 2048, 1792
    active = 2 * M * A * 3 * D * F
    args, chosen = sizes(M, A, E, D, F)
    forward = tpu_aot.compile_for(TPU, lambda args, chosen: experts(**args, chosen_MA=chosen, impl="ragged"),
                                  args, chosen)
    assert forward.cost_analysis()["flops"] == pytest.approx(active, rel=0.05)
    hidden = 2 * M * A * F
    assert forward.memory_analysis().temp_size_in_bytes < 3 * hidden
    backward = tpu_aot.compile_for(TPU, lambda args, chosen: gradient(args, chosen, "ragged"), args, chosen)
    assert backward.cost_analysis()["flops"] == pytest.approx(3 * active, rel=0.05)
    assert backward.memory_analysis().temp_size_in_bytes < 28 * hidden


def test_what_does_not_fit_is_refused():
    chosen_MA = choices("even", 4, 2, 3)
    args = problem(chosen_MA, 3)
    with pytest.raises(ValueError, match="choose one of auto, dense, ragged, blocks, pallas_gpu"):
        experts(**args, chosen_MA=chosen_MA, impl="sparse")
    with pytest.raises(ValueError, match=r"w2_EFD has shape \(2, 20, 12\); expected \(3, 20, 12\)"):
        experts(**args | {"w2_EFD": args["w2_EFD"][:2]}, chosen_MA=chosen_MA)
    with pytest.raises(ValueError, match=r"weight_MA has shape \(4, 1\); expected \(4, 2\)"):
        experts(**args | {"weight_MA": args["weight_MA"][:, :1]}, chosen_MA=chosen_MA)


@pytest.mark.parametrize(("platform", "capability", "M", "D", "dtype", "chosen"), [
    ("cpu", 0, 4, 128, jnp.bfloat16, "blocks"), ("tpu", 0, 4, 128, jnp.bfloat16, "ragged"),
    ("gpu", HOPPER, 4, 128, jnp.bfloat16, "pallas_gpu"), ("gpu", HOPPER, 10**5, 128, jnp.float16, "pallas_gpu"),
    ("gpu", HOPPER, 4, 192, jnp.bfloat16, "ragged"), ("gpu", HOPPER, 10**5, 128, jnp.float32, "dense"),
    ("gpu", AMPERE, 10**5, 128, jnp.bfloat16, "dense"), ("gpu", AMPERE, 4, 128, jnp.bfloat16, "ragged"),
])
def test_what_is_chosen(monkeypatch, platform, capability, M, D, dtype, chosen):
    monkeypatch.setattr(kernel, "platform", lambda: platform)
    monkeypatch.setattr(kernel, "nvidia_capability", lambda: capability)
    for impl in IMPLS:
        monkeypatch.setitem(kernel.IMPLS, impl, lambda *args, impl=impl: jnp.zeros(0) if impl == chosen else 1 / 0)
    args, choice = sizes(M, 4, 32, D, 256, dtype)
    jax.eval_shape(lambda args, choice: experts(**args, chosen_MA=choice), args, choice)
