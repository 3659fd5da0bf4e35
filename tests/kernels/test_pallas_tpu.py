"""The Pallas kernels for TPU, interpreted, against float64. Compiling them for real chips: test_pallas_tpu_aot.py."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import batches, rel_err
from hypothesis import given
from hypothesis import strategies as st

from lfm_jax.kernels import pallas_tpu, pallas_tpu_tiles, reference

TOLERANCE = 2e-5
F32, BF16 = jnp.float32, jnp.bfloat16


@pytest.fixture(scope="module", autouse=True)
def small_tiles():
    """Several tiles of time and of channels at shapes that compile and run fast when interpreted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pallas_tpu_tiles, "MAX_ROWS", 128)
        patch.setattr(pallas_tpu_tiles, "MAX_WIDTH", 128)
        patch.setattr(pallas_tpu, "_UNROLL", 2)
        yield patch


# ---- scan


def scan64(a_BTD, b_BTD, h0_BD, reverse):
    """One step after the other in float64; `a == 0` forgets."""
    a, b, state = (np.asarray(x, np.float64) for x in (a_BTD, b_BTD, h0_BD))
    h_BTD = np.zeros_like(b)
    for t in sorted(range(a.shape[1]), reverse=reverse):
        state = np.where(a[:, t] == 0, b[:, t], a[:, t] * state + b[:, t])
        h_BTD[:, t] = state
    return h_BTD, state


def scan_inputs(B, T, D, seed, dtypes=(F32, F32)):
    """Decays near 1, in between and near 0; where a row starts anew, exactly 0."""
    rng = np.random.default_rng(seed)
    near_1, between, near_0 = rng.uniform(0.999, 1, (B, T, D)), rng.uniform(-1, 1, (B, T, D)), np.full((B, T, D), 1e-30)
    kind = rng.random((B, T, D))
    a_BTD = np.where(kind < 0.8, near_1, np.where(kind < 0.95, between, near_0))
    a_BTD[rng.random((B, T)) < 0.02] = 0
    b_BTD, h0_BD = rng.standard_normal((B, T, D)), rng.standard_normal((B, D))
    return jnp.asarray(a_BTD, dtypes[0]), jnp.asarray(b_BTD, dtypes[1]), jnp.asarray(h0_BD, F32)


@functools.partial(jax.jit, static_argnames="reverse")
def interpreted_scan(a_BTD, b_BTD, h0_BD, reverse):
    return pallas_tpu.scan(a_BTD, b_BTD, h0_BD, reverse=reverse, interpret=True)


def assert_scan_exact(args, reverse):
    h_BTD, last_BD = interpreted_scan(*args, reverse=reverse)
    expected_BTD, expected_BD = scan64(*args, reverse)
    assert h_BTD.dtype == last_BD.dtype == F32
    assert rel_err(h_BTD, expected_BTD) < TOLERANCE
    assert rel_err(last_BD, expected_BD) < TOLERANCE


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("T", "D"), [(301, 130), (1, 5)])
def test_scan_equals_float64(T, D, reverse):
    assert_scan_exact(scan_inputs(2, T, D, seed=T), reverse)


def test_scan_walks_several_groups_of_lanes_together(small_tiles):
    with small_tiles.context() as patch:
        patch.setattr(pallas_tpu_tiles, "MAX_WIDTH", 256)
        assert_scan_exact(scan_inputs(1, 256, 256, seed=1), reverse=True)


def test_scan_stays_exact_over_a_long_row(small_tiles):
    with small_tiles.context() as patch:
        patch.setattr(pallas_tpu_tiles, "MAX_ROWS", 1024)
        assert_scan_exact(scan_inputs(1, 32768, 5, seed=4), reverse=False)


@pytest.mark.parametrize("reverse", [False, True])
@given(resets=st.lists(st.integers(0, 300), min_size=1, max_size=20))
def test_nothing_passes_a_reset(resets, reverse):
    """Whatever stands before it, NaN and infinity included, in `a` and in `b`."""
    a_BTD, b_BTD, h0_BD = (np.array(x) for x in scan_inputs(2, 301, 130, seed=2))
    a_BTD[a_BTD == 0] = 0.5
    a_BTD[:, resets] = 0
    reset = max(resets) if reverse else min(resets)
    past = slice(reset + 1, None) if reverse else slice(0, reset)
    a_BTD[:, past], b_BTD[:, past], h0_BD[:] = np.inf, np.nan, np.nan
    h_BTD, last_BD = interpreted_scan(a_BTD, b_BTD, h0_BD, reverse=reverse)
    with np.errstate(invalid="ignore"):
        expected_BTD, expected_BD = scan64(a_BTD, b_BTD, h0_BD, reverse)
    after = slice(0, reset + 1) if reverse else slice(reset, None)
    assert rel_err(h_BTD[:, after], expected_BTD[:, after]) < TOLERANCE
    assert rel_err(last_BD, expected_BD) < TOLERANCE


def test_scan_keeps_its_state_in_float32_between_bfloat16_tokens():
    args = scan_inputs(2, 301, 130, seed=3, dtypes=(F32, BF16))
    h_BTD, last_BD = interpreted_scan(*args, reverse=False)
    expected_BTD, expected_BD = scan64(*args, reverse=False)
    assert h_BTD.dtype == BF16
    assert last_BD.dtype == F32
    assert rel_err(h_BTD, expected_BTD) < 4e-3
    assert rel_err(last_BD, expected_BD) < TOLERANCE


# ---- gated_conv


def reach_of(segment_ids_BT, W):
    """How many of the last W - 1 columns belong to each token's document; the history is its first one's."""
    B, T = segment_ids_BT.shape
    reach_BT = np.zeros((B, T), np.int32)
    for b in range(B):
        length = W - 1
        for t in range(T):
            new = t > 0 and segment_ids_BT[b, t] != segment_ids_BT[b, t - 1]
            length = 0 if new else length
            reach_BT[b, t] = min(length, W - 1)
            length += 1
    return reach_BT


def conv_inputs(B, T, D, W, *, gate_in=True, gate_out=True, bias=True, dtype=F32, seed=0):
    """Arguments by the names of the reference, and a cotangent."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    return dict(
        y_BTD=normal(B, T, D), w_WD=normal(W, D), tail_BVD=normal(B, W - 1, D),
        gate_in_BTD=normal(B, T, D) if gate_in else None, gate_out_BTD=normal(B, T, D) if gate_out else None,
        bias_D=normal(D) if bias else None,
    ), normal(B, T, D)  # fmt: skip


@jax.jit
def interpreted_conv(inputs, reach_BT, dz_BTD):
    """Output, and the gradient by every array that is there."""
    given_arrays = {name: x for name, x in inputs.items() if x is not None}

    def conv(arrays):
        full = inputs | arrays
        return pallas_tpu.gated_conv(
            full["y_BTD"], full["w_WD"], full["tail_BVD"], reach_BT, full["gate_in_BTD"], full["gate_out_BTD"],
            full["bias_D"], interpret=True,
        )  # fmt: skip

    z_BTD, pullback = jax.vjp(conv, given_arrays)
    return z_BTD, pullback(dz_BTD)[0]


def assert_conv_exact(inputs, segment_ids_BT, dz_BTD, tolerance=TOLERANCE):
    W, dtype = len(inputs["w_WD"]), inputs["y_BTD"].dtype
    reach_BT = None if segment_ids_BT is None else reach_of(segment_ids_BT, W)
    z_BTD, gradients = interpreted_conv(inputs, reach_BT, dz_BTD)
    arrays64 = {name: None if x is None else np.asarray(x, np.float64) for name, x in inputs.items()}
    expected_BTD, pullback = reference.causal_conv(**arrays64, segment_ids_BT=segment_ids_BT)
    expected = pullback(np.asarray(dz_BTD, np.float64))
    assert z_BTD.dtype == dtype
    assert rel_err(z_BTD, expected_BTD) < tolerance
    for name, gradient in gradients.items():
        assert gradient.dtype == dtype, name
        if gradient.size:
            assert rel_err(gradient, expected[name]) < tolerance, name


@pytest.mark.parametrize(
    ("T", "D", "W", "documents", "parts"),
    [
        (301, 130, 3, True, dict()),
        (256, 256, 3, False, dict(bias=False)),
        (3, 5, 7, True, dict()),
        (1, 5, 4, False, dict(gate_in=False)),
        (130, 5, 2, True, dict(gate_out=False)),
        (40, 130, 1, True, dict(gate_in=False, gate_out=False)),
        (129, 5, 9, False, dict(gate_in=False, gate_out=False, bias=False)),
    ],
)
def test_conv_and_every_gradient_equal_float64(T, D, W, documents, parts):
    inputs, dz_BTD = conv_inputs(2, T, D, W, seed=T, **parts)
    ids_BT = np.random.default_rng(T).integers(0, 2, (2, T)).cumsum(1) // 2 if documents else None
    assert_conv_exact(inputs, ids_BT, dz_BTD)


def test_conv_gradients_stay_exact_over_a_long_row(small_tiles):
    inputs, dz_BTD = conv_inputs(1, 32768, 5, 3, seed=5)
    with small_tiles.context() as patch:
        patch.setattr(pallas_tpu_tiles, "MAX_ROWS", 1024)
        assert_conv_exact(inputs, np.arange(32768)[None] // 1000, dz_BTD)


@given(segment_ids_BT=batches(2, 130))
def test_conv_keeps_documents_apart(segment_ids_BT):
    inputs, dz_BTD = conv_inputs(2, 130, 5, 7, seed=7)
    assert_conv_exact(inputs, segment_ids_BT, dz_BTD)


def test_nan_in_one_document_stays_there():
    inputs, dz_BTD = conv_inputs(2, 130, 5, 7, seed=8)
    ids_BT = np.repeat([[0, 1, 2]], 2, 0).repeat([60, 10, 60], 1)
    reach_BT = reach_of(ids_BT, 7)
    clean_BTD, clean = interpreted_conv(inputs, reach_BT, dz_BTD)
    other_BT = ids_BT != 1
    z_BTD, _ = interpreted_conv(inputs | dict(y_BTD=inputs["y_BTD"].at[:, 60:70].set(np.nan)), reach_BT, dz_BTD)
    np.testing.assert_array_equal(z_BTD[other_BT], clean_BTD[other_BT])
    _, gradients = interpreted_conv(inputs, reach_BT, dz_BTD.at[:, 60:70].set(np.nan))
    for name in ("y_BTD", "gate_in_BTD", "gate_out_BTD"):
        np.testing.assert_array_equal(gradients[name][other_BT], clean[name][other_BT])


def test_conv_sums_bfloat16_in_float32():
    inputs, dz_BTD = conv_inputs(2, 301, 130, 3, dtype=BF16, seed=9)
    assert_conv_exact(inputs, np.arange(301)[None].repeat(2, 0) // 50, dz_BTD, tolerance=4e-3)


def test_what_the_kernels_do_not_take_is_refused():
    x_BTD, w_WD = jnp.zeros((1, 4, 8), jnp.float16), jnp.zeros((3, 8))
    with pytest.raises(ValueError, match="b_BTD is float16"):
        pallas_tpu.scan(x_BTD.astype(F32), x_BTD, jnp.zeros((1, 8)), reverse=False)
    with pytest.raises(ValueError, match="y_BTD is float16"):
        pallas_tpu.gated_conv(x_BTD, w_WD, jnp.zeros((1, 2, 8)), None, None, None, None)
    with pytest.raises(ValueError, match="w_WD has 10 taps"):
        pallas_tpu.gated_conv(
            x_BTD.astype(F32), jnp.zeros((10, 8)), jnp.zeros((1, 9, 8)), None, None, None, None
        )  # fmt: skip
