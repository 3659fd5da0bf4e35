"""PyTorch weights in memory: bit-equal both ways, copied, and refused with everything listed."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from oracle import CASES, hf_config, hf_model, in_files

from lfm_jax.convert.families import config_from_hf
from lfm_jax.convert.hf import from_state_dict, tensors, to_state_dict
from lfm_jax.convert.sources import cast
from lfm_jax.problems import MAX_PROBLEMS
from lfm_jax.testing import tiny_config

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def bits(array):
    return np.asarray(array).view(f"u{np.asarray(array).dtype.itemsize}")


def random_bits(config, dtype, seed=0):
    """A state dict in NumPy whose values are random bits: NaN payloads, infinities and subnormals among them."""
    rng = np.random.default_rng(seed)
    return {
        name: rng.integers(0, 256, (*shape[:-1], shape[-1] * jnp.dtype(dtype).itemsize), np.uint8)
        .view(jnp.dtype(dtype)) for name, shape in tensors(config).items()
    }


def as_torch(array):
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


@pytest.mark.parametrize("framework", ["numpy", "torch"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip_keeps_every_bit(dtype, framework):
    config = tiny_config(conv_bias=True, tie_embedding=False, param_dtype=dtype)
    given = random_bits(config, dtype)
    back = to_state_dict(from_state_dict(given if framework == "numpy" else {k: as_torch(v) for k, v in given.items()},
                                         config))
    assert list(back) == list(tensors(config))
    for name, array in back.items():
        assert array.dtype == jnp.dtype(dtype)
        assert array.flags.c_contiguous
        assert array.flags.writeable
        np.testing.assert_array_equal(bits(array), bits(given[name]), err_msg=name)


@pytest.mark.parametrize("case", ["four-taps-bias", "untied", "wide-heads", "lfm3-bare"])
def test_state_dict_of_transformers_both_ways(case):
    hf = hf_model(hf_config(**CASES[case]))
    config = config_from_hf(hf.config.to_dict())
    back = to_state_dict(from_state_dict(in_files(hf), config))
    other = hf_model(hf_config(**CASES[case]), seed=1)
    missing, unexpected = other.load_state_dict({k: torch.from_numpy(v) for k, v in back.items()}, strict=False)
    assert missing == ([HEAD] if config.tie_embedding else [])
    assert unexpected == []
    for (name, p), q in zip(hf.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_weights_are_copied_not_shared():
    config = tiny_config()
    given = random_bits(config, "float32")
    model = from_state_dict(given, config)
    before = {name: bits(array).copy() for name, array in to_state_dict(model).items()}
    for array in given.values():
        array[...] = 3
    to_state_dict(model)[EMBED][...] = 4
    for name, array in to_state_dict(model).items():
        np.testing.assert_array_equal(bits(array), before[name], err_msg=name)


def test_values_are_rounded_only_to_another_param_dtype():
    config = tiny_config(param_dtype="bfloat16")
    given = {name: np.full(shape, 1.01, np.float32) for name, shape in tensors(config).items()}
    model = from_state_dict(given, config)
    assert model.embed[...].dtype == jnp.bfloat16
    np.testing.assert_array_equal(to_state_dict(model)[EMBED], jnp.full_like(given[EMBED], 1.01, jnp.bfloat16))
    given["model.embedding_norm.weight"][3] = 1e6
    with pytest.raises(ValueError, match=r"model\.embedding_norm\.weight: 1 finite values of float32 are too large"):
        from_state_dict(given, tiny_config(param_dtype="float16"))


def test_cast_keeps_infinities_and_nan():
    values = np.asarray([np.inf, -np.inf, np.nan, 65504.0], np.float32)
    np.testing.assert_array_equal(cast("x", values, "float16"), values.astype(np.float16))
    assert cast("x", values, "float32") is values


def test_tied_head_is_accepted_where_it_equals_the_embedding():
    config = tiny_config()
    given = random_bits(config, "float32")
    from_state_dict(given | {HEAD: given[EMBED].copy()}, config)
    changed = given[EMBED].copy()
    changed[0, 0] = -changed[0, 0]
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        from_state_dict(given | {HEAD: changed}, config)
    with pytest.raises(ValueError, match=r"wrong shape: lm_head\.weight is \[3, 32\]"):
        from_state_dict(given | {HEAD: changed[:3]}, config)


def test_an_error_names_each_tensor_however_many_there_are():
    config = tiny_config()
    with pytest.raises(ValueError, match="is not this model") as e:
        from_state_dict({}, config)
    expected = [f"  - missing: {name} {list(shape)}" for name, shape in tensors(config).items()]
    assert str(e.value).splitlines()[1:] == expected
    assert len(expected) > MAX_PROBLEMS


@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_one_error_lists_everything(framework):
    config = tiny_config()
    given = random_bits(config, "float32")
    del given["model.layers.0.conv.conv.weight"]
    given["model.layers.7.ffn_norm.weight"] = given["model.embedding_norm.weight"]
    given["model.layers.1.self_attn.q_proj.weight"] = given["model.layers.1.self_attn.q_proj.weight"][:, :5].copy()
    given["model.embedding_norm.weight"] = np.ones(32, np.float64)
    given["model.layers.2.ffn_norm.weight"] = np.ones(32, np.int64)
    if framework == "torch":
        given = {name: torch.from_numpy(array) for name, array in given.items()}
        given["model.layers.2.operator_norm.weight"] = torch.ones(32, dtype=torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="is not this model") as e:
        from_state_dict(given, config)
    lines = str(e.value).splitlines()[1:]
    assert lines == [
        "  - missing: model.layers.0.conv.conv.weight [32, 1, 3]",
        "  - unexpected: model.layers.7.ffn_norm.weight [32]",
        "  - wrong shape: model.layers.1.self_attn.q_proj.weight is [32, 5]; config expects [32, 32]",
    ] + [f"  - wrong dtype: {line}; expected float32, bfloat16, float16" for line in (
        *(["model.layers.2.operator_norm.weight is float8_e4m3fn"] if framework == "torch" else []),
        "model.layers.2.ffn_norm.weight is int64",
        "model.embedding_norm.weight is float64",
    )]
