"""Mixes: llama.cpp's choices for each tensor, as `test_llama_cpp` finds them there."""

import math
from collections import Counter

import pytest
from gguf_models import LFM2_350M, MODELS, shapes

from lfm_jax.quant import MIXES, mix, type_size


def types(model, name, **kwargs):
    arch, pattern, sizes = MODELS[model]
    return mix(name, shapes(pattern, **sizes), arch=arch, **kwargs)


def layers(found, tensor, type):
    """The layers in which a tensor has a type."""
    return [int(name.split(".")[1]) for name, given in found.items() if name.endswith(f".{tensor}.weight")
            and given == type]


def test_q4_k_m_of_the_350m():
    found = types("350M", "Q4_K_M")
    assert found["token_embd.weight"] == "Q6_K"
    assert layers(found, "ffn_down", "Q6_K") == [0, 1, 4, 7, 10, 13, 14, 15]
    assert layers(found, "attn_v", "Q6_K") == [8, 14]  # The third and the sixth with attention.
    assert Counter(found.values()) == {"F32": 55, "Q4_K": 82, "Q6_K": 11}
    assert {name for name, type in found.items() if type == "F32"} == {
        name for name in found if "norm" in name or "shortconv.conv" in name}


@pytest.mark.parametrize(("name", "megabytes"), [
    ("F32", 1417.9), ("F16", 709.1), ("BF16", 709.1), ("Q8_0", 376.8), ("Q4_K_M", 226.9), ("Q4_0", 216.9)])
def test_sizes_of_the_350m(name, megabytes):
    tensors = shapes(LFM2_350M, width=1024, ffn=4608, vocab=65536, kv=512)
    assert sum(map(math.prod, tensors.values())) == 354_483_968
    size = sum(math.prod(tensors[tensor][:-1]) * type_size(type).row_bytes(tensors[tensor][-1])
               for tensor, type in mix(name, tensors, arch="lfm2").items())
    assert size / 1e6 == pytest.approx(megabytes, abs=0.06)


@pytest.mark.parametrize("name", MIXES)
def test_what_most_tensors_have(name):
    found = types("untied", name)
    counted = Counter(type for type in found.values() if type != "F32" or name == "F32")
    assert counted.most_common(1)[0][0] == MIXES[name]
    plain = name in ("F32", "F16", "BF16", "Q8_0")
    assert found["output.weight"] == (MIXES[name] if plain else "Q6_K")
    assert found["token_embd.weight"] == MIXES[name]


def test_the_first_layers_of_q4_k_s_and_of_q4_0_with_importance():
    found = types("350M", "Q4_K_S")
    assert layers(found, "ffn_down", "Q5_K") == [0, 1]
    assert layers(found, "attn_v", "Q5_K") == [2, 5, 8, 10]
    assert layers(types("350M", "Q4_0", importance=True), "ffn_down", "Q4_1") == [0, 1]
    assert layers(types("350M", "Q4_0"), "ffn_down", "Q4_1") == []


def test_rows_that_are_not_whole_blocks():
    assert set(types("narrow", "Q4_K_M").values()) == {"F32", "Q5_0", "Q8_0"}
    assert set(types("narrow", "Q5_K_M").values()) == {"F32", "Q5_1", "Q8_0"}
    assert types("narrow", "Q4_0")["token_embd.weight"] == "Q8_0"  # As Q6_K, and 192 is no multiple of 256.
    assert set(types("odd", "Q4_K_M").values()) == {"F32", "F16"}


def test_experts():
    tensors = types("8 experts", "Q4_K_M")
    assert {type for name, type in tensors.items() if "attn_v" in name or "attn_k.weight" in name} == {"Q8_0"}
    assert set(layers(tensors, "attn_output", "Q5_K")) == set(layers(tensors, "attn_v", "Q8_0"))
    assert layers(tensors, "ffn_down_exps", "Q6_K") == [4, 7, 10, 13, 14, 15]
    assert {type for name, type in tensors.items() if "ffn_gate_inp" in name or "probs" in name} == {"F32"}
    assert layers(types("4 experts", "Q4_K_M"), "attn_v", "Q8_0") == []


def test_values_of_70b_models():
    found = types("80 layers", "Q4_K_M")
    assert layers(found, "attn_v", "Q4_K") == []
    assert len(layers(found, "attn_v", "Q5_K")) + len(layers(found, "attn_v", "Q6_K")) == 80


def test_other_names_and_architectures_are_refused():
    with pytest.raises(ValueError, match="'Q4_K' is no type of GGUF files; take one of F32, F16, BF16"):
        mix("Q4_K", {}, arch="lfm2")
    with pytest.raises(ValueError, match="arch 'falcon' has other rules; expected one of lfm2, lfm2moe, llama"):
        mix("F16", {}, arch="falcon")
