"""Block types: the bytes that GGUF readers expect, llama.cpp's errors, importance, edges."""

import sys

import gguf
import ml_dtypes
import numpy as np
import pytest
from quant_tensors import COLUMNS, KINDS, relative_error, tensor, weights

from lfm_jax.quant import block_types, dequantize, quantize, type_size
from lfm_jax.quant.block_types import BLOCKS, PLAIN

LLAMA_CPP = {
    "Q8_0": ((0.005305, 0.005199), (0.008228, 0.007265), (0.009576, 0.008806), (0.003809, 0.003809)),
    "Q4_0": ((0.085015, 0.061122), (0.124580, 0.092835), (0.133424, 0.104308), (0.060191, 0.040154)),
    "Q4_1": ((0.077914, 0.043973), (0.096643, 0.053124), (0.112989, 0.062498), (0.029129, 0.019716)),
    "Q5_0": ((0.042640, 0.029640), (0.063108, 0.047599), (0.072893, 0.059708), (0.030595, 0.019663)),
    "Q5_1": ((0.038053, 0.021006), (0.047453, 0.026993), (0.054276, 0.030561), (0.014034, 0.009392)),
    "Q4_K": ((0.071130, 0.045192), (0.089673, 0.057151), (0.103188, 0.070161), (0.029891, 0.020059)),
    "Q5_K": ((0.036216, 0.024237), (0.046320, 0.032603), (0.053020, 0.040163), (0.014757, 0.010080)),
    "Q6_K": ((0.017684, 0.012534), (0.025168, 0.018669), (0.029057, 0.020564), (0.012680, 0.008564)),
}
"""Relative errors of llama.cpp's ggml_quantize_chunk (October 2026, llama-cpp-python 0.3.36) on each of KINDS, without
and with importance."""
RE_ROUNDED = ("Q4_1", "Q5_1")
"""Types that with importance we round once more with the final scale, by which the square of the error falls by 1 %."""


def bits(x):
    return np.ascontiguousarray(x, np.float32).view(np.uint32)


def by_gguf(rows, type):
    return gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[type])


@pytest.mark.parametrize("importance", [None, weights()], ids=["plain", "importance"])
@pytest.mark.parametrize("type", [*PLAIN, *BLOCKS])
def test_gguf_reads_our_bytes_as_we_do(type, importance):
    x = tensor("heavy")
    rows = quantize(x, type, importance)
    assert rows.shape == (len(x), type_size(type).row_bytes(COLUMNS))
    found = dequantize(rows, type, x.shape)
    np.testing.assert_array_equal(bits(found), bits(by_gguf(rows, type)))
    np.testing.assert_array_equal(bits(found), bits(dequantize(rows.tobytes(), type, x.shape)))
    assert relative_error(found, x) < 0.25


@pytest.mark.parametrize("type", [type for type in BLOCKS if type.endswith("_K")])
def test_any_bytes_are_read_as_gguf_reads_them(type):
    records = np.frombuffer(np.random.default_rng(0).bytes(64 * type_size(type).bytes), BLOCKS[type][1]).copy()
    for key in {"d", "dmin"} & set(records.dtype.names):
        records[key] = np.random.default_rng(1).standard_normal(64)
    rows = records.view(np.uint8).reshape(8, -1)
    found = dequantize(rows, type, (8, 8 * 256))
    np.testing.assert_array_equal(bits(found), bits(by_gguf(rows, type)))


@pytest.mark.parametrize("type", ["Q2_K", "IQ4_NL", "MXFP4"])
def test_what_only_gguf_knows_is_read(type):
    size = type_size(type)
    rows = np.random.default_rng(0).integers(0, 60, (3, size.row_bytes(512)), np.uint8)
    np.testing.assert_array_equal(bits(dequantize(rows, type, (3, 512))), bits(by_gguf(rows, type)))


def test_sizes_are_those_of_gguf():
    for type in (*PLAIN, *BLOCKS):
        assert type_size(type) == gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type]]


@pytest.mark.parametrize("type", LLAMA_CPP)
def test_errors_are_those_of_llama_cpp(type):
    for kind, figures in zip(KINDS, LLAMA_CPP[type], strict=True):
        x = tensor(kind)
        for importance, theirs in zip((None, weights()), figures, strict=True):
            ours = relative_error(dequantize(quantize(x, type, importance), type, x.shape), x, importance)
            lower = 0.98 if type in RE_ROUNDED and importance is not None else 0.995
            assert lower * theirs < ours < 1.005 * theirs, (kind, importance is not None)


@pytest.mark.parametrize("type", [type for type in BLOCKS if type != "Q8_0"])
def test_importance_lowers_the_error_that_it_weights(type):
    x, importance = tensor("normal"), weights()
    plain, weighted = (dequantize(quantize(x, type, w), type, x.shape) for w in (None, importance))
    assert relative_error(weighted, x, importance) < 0.95 * relative_error(plain, x, importance)
    # Only ratios count, and a power of two changes no rounding, however far it goes.
    for power in (2, 100, -100):
        np.testing.assert_array_equal(quantize(x, type, np.ldexp(importance, power)), quantize(x, type, importance))


@pytest.mark.parametrize("type", [type for type in BLOCKS if type != "Q8_0"])
def test_blocks_without_importance_are_kept_and_take_none_from_others(type):
    x, importance = tensor("normal"), weights()
    np.testing.assert_array_equal(
        quantize(x, type, np.zeros(COLUMNS, np.float32)), quantize(x, type, np.ones(COLUMNS, np.float32)))
    partly = np.where(np.arange(COLUMNS) < 32, 0, importance)
    found, full = (dequantize(quantize(x, type, w), type, x.shape) for w in (partly, importance))
    assert relative_error(found[:, :32], x[:, :32]) < 0.15
    assert relative_error(found, x, partly) < 1.01 * relative_error(full, x, partly)


@pytest.mark.parametrize("type", ["Q4_K", "Q4_0"])
def test_each_matrix_of_a_stack_has_its_own_importance(type, monkeypatch):
    x = np.stack([tensor("normal"), tensor("heavy"), tensor("columns")])
    importance = np.stack([weights(), weights()[::-1], np.ones(COLUMNS, np.float32)])
    rows = quantize(x, type, importance)
    alone = [quantize(x[e], type, importance[e]) for e in range(3)]
    np.testing.assert_array_equal(rows, np.stack(alone))
    monkeypatch.setattr(block_types, "_CHUNK", 5 * COLUMNS)  # Some pieces have rows of two matrices.
    np.testing.assert_array_equal(quantize(x, type, importance), rows)
    np.testing.assert_array_equal(dequantize(rows, type, x.shape)[1], dequantize(alone[1], type, x.shape[1:]))


@pytest.mark.parametrize("importance", [False, True])
@pytest.mark.parametrize("type", [*PLAIN, *BLOCKS])
@pytest.mark.parametrize("shape", [(256,), (0, 256), (0, 2, 256), (2, 0, 256), (1, 2, 3, 256)])
def test_any_number_of_rows_and_axes(type, shape, importance):
    x = np.resize(tensor("normal"), shape)
    w = np.ones(shape[:-2] * (len(shape) == 3) + shape[-1:]) if importance else None
    rows = quantize(x, type, w)
    assert rows.shape == (*shape[:-1], type_size(type).row_bytes(shape[-1]))
    np.testing.assert_allclose(dequantize(rows, type, shape), x, atol=0.01)


def test_narrow_floats_are_taken_as_they_are():
    x = tensor("normal").astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(quantize(x, "Q4_K"), quantize(x.astype(np.float32), "Q4_K"))
    np.testing.assert_array_equal(quantize(x, "BF16").reshape(-1), x.reshape(-1).view(np.uint8))


@pytest.mark.parametrize("importance", [None, weights(256)], ids=["plain", "importance"])
@pytest.mark.parametrize("type", BLOCKS)
def test_edges(type, importance):
    rows = {
        "zeros": np.zeros(256),
        "constant": np.full(256, 0.3),
        "negative constant": np.full(256, -0.3),
        "negative only": -np.abs(tensor("normal", 1, 256)[0]),
        "tiny": np.full(256, 1e-30),
        "one huge value": np.where(np.arange(256) == 77, 1000.0, 1e-3),
    }
    x = np.stack(list(rows.values())).astype(np.float32)
    found = dict(zip(rows, dequantize(quantize(x, type, importance), type, x.shape), strict=True))
    assert not found["zeros"].any()
    assert not found["tiny"].any()
    for constant in ("constant", "negative constant"):
        np.testing.assert_allclose(found[constant], rows[constant], rtol=0.02)
    step = 1 / 7 if type in ("Q4_0", "Q5_0") else 1 / 15
    np.testing.assert_allclose(found["negative only"], rows["negative only"], atol=step * np.ptp(rows["negative only"]))
    assert found["one huge value"][77] == pytest.approx(1000, rel=0.02)
    assert np.abs(found["one huge value"]).sum() == pytest.approx(1000, rel=0.2)


def test_what_cannot_be_written_is_refused_by_name():
    x = tensor("normal")
    for bad in (np.nan, np.inf, -np.inf):
        for type in ("Q4_K", "Q8_0", "F16"):
            broken = x.copy()
            broken[3, 7] = bad
            with pytest.raises(ValueError, match=r"blk\.0\.ffn_up\.weight has NaN or infinite numbers"):
                quantize(broken, type, name="blk.0.ffn_up.weight")
    for type, large in (("Q4_K", 1e9), ("Q6_K", 1e10), ("Q4_0", 1e7), ("Q8_0", 1e8), ("F16", 1e5), ("BF16", 3.4e38)):
        for importance in (None, weights()):
            with pytest.raises(ValueError, match=rf"the array has numbers too large for {type}"):
                quantize(np.where(np.arange(COLUMNS) == 3, np.float32(large), x), type, importance)
    with pytest.raises(ValueError, match=r"Q4_K needs rows of a multiple of 256 numbers, not \[24, 480\]"):
        quantize(x[:, :480], "Q4_K")
    with pytest.raises(ValueError, match="cannot write the type 'Q3_K'; take one of F32, F16"):
        quantize(x, "Q3_K")
    with pytest.raises(ValueError, match=r"importance \[256\] for \[24, 512\]; expected \[512\]"):
        quantize(x, "Q4_K", weights(256))
    with pytest.raises(ValueError, match="importance must be finite and not negative"):
        quantize(x, "Q4_K", -weights())


def test_what_cannot_be_read_is_refused():
    rows = quantize(tensor("normal"), "Q4_K")
    with pytest.raises(ValueError, match=r"Q4_K \[25, 512\] has 7,200 bytes, not 6,912"):
        dequantize(rows, "Q4_K", (25, 512))
    with pytest.raises(ValueError, match="rows of a multiple of 256"):
        dequantize(rows, "Q4_K", (24, 500))
    with pytest.raises(ValueError, match="'Q4_L' is no type of GGUF tensors"):
        type_size("Q4_L")


def test_without_the_library_k_quants_work_and_the_rest_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    x = tensor("normal")
    assert relative_error(dequantize(quantize(x, "Q6_K"), "Q6_K", x.shape), x) < 0.02
    with pytest.raises(ImportError, match=r"pip install 'lfm_jax\[gguf\]'"):
        quantize(x, "Q8_0")
