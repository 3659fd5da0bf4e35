"""Beside llama.cpp itself (llama-cpp-python): the same types for the same tensors, and the same errors."""

import gguf
import numpy as np
import pytest
from gguf_models import MODELS, numbers, shapes, write
from llama_cpp_side import quantised
from quant_tensors import relative_error

from lfm_jax.quant import MIXES, dequantize, mix, quantize

pytestmark = pytest.mark.long


def importance_of(tensors):
    """Importance of each matrix: [columns], or [E, columns] where there are experts."""
    return {
        name: np.exp(np.random.default_rng(list(name.encode())).standard_normal((*shape[:-2], shape[-1]))).astype("f4")
        for name, shape in tensors.items() if len(shape) > 1 and name != "token_embd.weight"
    }


def by_llama_cpp(source, path, name, importance=None):
    """Quantises a file with llama.cpp and opens what comes out."""
    return {tensor.name: tensor for tensor in gguf.GGUFReader(quantised(source, path, name, importance)).tensors}


@pytest.mark.parametrize("model", MODELS)
def test_types_are_those_of_llama_cpp(model, tmp_path):
    arch, pattern, sizes = MODELS[model]
    tensors = shapes(pattern, **sizes)
    write(tmp_path / "f32.gguf", model)
    for name in MIXES:
        for importance in (None, importance_of(tensors)):
            found = by_llama_cpp(tmp_path / "f32.gguf", tmp_path / "out.gguf", name, importance)
            theirs = {tensor: entry.tensor_type.name for tensor, entry in found.items()}
            assert mix(name, tensors, arch=arch, importance=importance is not None) == theirs, name


@pytest.mark.parametrize("with_importance", [False, True], ids=["plain", "importance"])
@pytest.mark.parametrize("model", ["350M", "narrow", "8 experts"])
def test_errors_are_those_of_llama_cpp(model, with_importance, tmp_path):
    _, pattern, sizes = MODELS[model]
    tensors = shapes(pattern, **sizes)
    importance = importance_of(tensors) if with_importance else None
    write(tmp_path / "f32.gguf", model)
    worst = {}
    for name in ("F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0"):
        for tensor, entry in by_llama_cpp(tmp_path / "f32.gguf", tmp_path / "out.gguf", name, importance).items():
            type, x = entry.tensor_type.name, numbers(tensor, tensors[tensor])
            weight = importance.get(tensor) if importance else None
            spread = None if weight is None else np.broadcast_to(weight[..., None, :], x.shape)
            ours = dequantize(quantize(x, type, weight, name=tensor), type, x.shape)
            theirs = dequantize(entry.data, type, x.shape)
            if type in ("F32", "F16", "BF16"):
                np.testing.assert_array_equal(ours, theirs)
            else:
                ratio = (relative_error(ours, x, spread) / relative_error(theirs, x, spread)) ** 2
                worst[type] = max(worst.get(type, 0), ratio)
    print(f"\n{model}: largest mean square error of a tensor over llama.cpp's:",
          ", ".join(f"{type} {ratio:.4f}" for type, ratio in sorted(worst.items())))
    assert max(worst.values()) < 1.02
