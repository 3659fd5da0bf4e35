"""Directories both ways: bit-equal, loaded by `transformers`, everything beside the weights carried along."""

import json
import shutil

import hf_dirs
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import torch
from flax import nnx
from helpers import rel_err, tokens_like
from limits import LIMITS, limited
from oracle import CASES
from test_state_dict import bits
from tokenizers import Tokenizer
from transformers import AutoTokenizer, Lfm2Config, Lfm2ForCausalLM

import lfm_jax as lfm
from lfm_jax.convert.families import config_from_hf
from lfm_jax.convert.hf import chat_template, convert, load_hf, save_hf, tensors, to_state_dict, write_hf
from lfm_jax.testing import tiny_model, tiny_tokenizer

OLD_STYLE = dict(
    architectures=["Lfm2ForCausalLM"], model_type="lfm2", vocab_size=97, hidden_size=32, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, full_attn_idxs=[1], block_ff_dim=64, block_multiple_of=8,
    block_ffn_dim_multiplier=1.1, block_auto_adjust_ff_dim=True, conv_L_cache=4, conv_bias=True, conv_dim=32,
    conv_dim_out=32, block_dim=32, num_heads=4, use_pos_enc=True, block_norm_eps=1e-5, norm_eps=1e-4,
    block_use_swiglu=True, block_use_xavier_init=True, block_out_init_scale=1.0, rope_theta=500.0, tie_embedding=True,
    torch_dtype="bfloat16", bos_token_id=1, eos_token_id=7, pad_token_id=0, max_position_embeddings=4096,
)
"""Keys as the first LFM2 releases have them."""


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer(vocab_size=280)


@pytest.fixture(scope="module")
def source(tmp_path_factory, tokenizer):
    """A directory with all that a release has beside its weights."""
    path = hf_dirs.save(tmp_path_factory.mktemp("hf") / "source", vocab_size=300)
    tokenizer.save(str(path / "tokenizer.json"), pretty=False)
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"):
        (path / name).write_text(json.dumps({"file": name, "chat_template": "{{ old }}"}))
    (path / "generation_config.json").write_text('{"temperature": 0.1,  "do_sample": true, "eos_token_id": [7, 2]}')
    for name in ("merges.txt", "tokenizer.model", "LICENSE", "chat_template.jinja"):
        (path / name).write_bytes(name.encode() + b"\r\n\x00")
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (path / "training_args.bin").write_bytes(b"not opened, not carried")
    return path


def random_dir(path, dtype, **fields):
    """Our own writer with random bits for values, NaN payloads among them."""
    from test_state_dict import random_bits

    config = tiny_model(**fields).config.replace(param_dtype=dtype)
    write_hf(path, config, random_bits(config, dtype).items())
    return path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_hf_to_jax_to_hf_is_bit_equal(tmp_path, dtype):
    first = random_dir(tmp_path / "a", dtype, conv_bias=True)
    model, tokenizer = load_hf(first)
    assert tokenizer is None
    assert model.config.param_dtype == model.config.dtype == dtype
    save_hf(model, tmp_path / "b")
    convert(first, tmp_path / "c", max_shard_bytes=9_000)
    convert(tmp_path / "c", tmp_path / "d")
    expected = hf_dirs.tensors_of(first)
    assert {tag for tag, _, _ in expected.values()} == {{"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[dtype]}
    for name in "bcd":
        assert hf_dirs.tensors_of(tmp_path / name) == expected
    assert (tmp_path / "b" / "model.safetensors").read_bytes() == (tmp_path / "d" / "model.safetensors").read_bytes()
    assert (tmp_path / "a" / "config.json").read_bytes() == (tmp_path / "d" / "config.json").read_bytes()


@pytest.mark.parametrize("case", CASES)
def test_transformers_loads_the_result_with_equal_logits(tmp_path, case):
    src = hf_dirs.save(tmp_path / "src", **CASES[case])
    save_hf(load_hf(src)[0], tmp_path / "dst")
    assert hf_dirs.tensors_of(tmp_path / "dst") == hf_dirs.tensors_of(src)
    assert torch.equal(hf_dirs.logits(tmp_path / "dst"), hf_dirs.logits(src))


@pytest.mark.parametrize("shards", [False, True])
def test_directories_of_save_pretrained(tmp_path, shards):
    src = hf_dirs.save(tmp_path / "src", torch.bfloat16, shards=shards)
    assert (src / hf_dirs.INDEX).exists() == shards
    convert(src, tmp_path / "dst", max_shard_bytes=20_000)
    index = json.loads((tmp_path / "dst" / hf_dirs.INDEX).read_text())
    sizes = {file.name: file.stat().st_size for file in (tmp_path / "dst").glob("*.safetensors")}
    assert set(index["weight_map"].values()) == set(sizes)
    assert len(sizes) > 1
    assert max(sizes.values()) < 20_000 + 4_000  # and a header
    config = config_from_hf(json.loads((tmp_path / "dst" / "config.json").read_text()))
    assert index["metadata"]["total_size"] == 2 * config.num_params()
    assert config.param_dtype == "bfloat16"
    assert list(index["weight_map"]) == list(tensors(config))
    assert hf_dirs.tensors_of(tmp_path / "dst") == hf_dirs.tensors_of(src)
    assert torch.equal(hf_dirs.logits(tmp_path / "dst"), hf_dirs.logits(src))


def test_a_tensor_larger_than_a_shard_has_one_of_its_own(tmp_path):
    src = random_dir(tmp_path / "src", "float32")
    convert(src, tmp_path / "dst", max_shard_bytes=1)
    assert len(list((tmp_path / "dst").glob("*.safetensors"))) == len(hf_dirs.tensors_of(src))
    assert hf_dirs.tensors_of(tmp_path / "dst") == hf_dirs.tensors_of(src)


def test_old_style_config_builds_the_same_network(tmp_path):
    hf = Lfm2ForCausalLM(Lfm2Config(**OLD_STYLE)).to(torch.bfloat16)
    hf.save_pretrained(tmp_path / "src")
    (tmp_path / "src" / "config.json").write_text(json.dumps(OLD_STYLE))
    convert(tmp_path / "src", tmp_path / "dst")
    written = json.loads((tmp_path / "dst" / "config.json").read_text())
    assert written["intermediate_size"] == 48  # int(2/3 * 64) = 42, times 1.1 = 46, up to a multiple of 8.
    for key in ("full_attn_idxs", "num_heads", "theta"):
        assert key not in written
    old, new = (Lfm2ForCausalLM.from_pretrained(tmp_path / name) for name in ("src", "dst"))
    assert str(old) == str(new)
    for key in ("layer_types", "norm_eps", "rope_parameters", "conv_L_cache", "eos_token_id", "dtype"):
        assert getattr(old.config, key) == getattr(new.config, key), key
    assert torch.equal(hf_dirs.logits(tmp_path / "dst"), hf_dirs.logits(tmp_path / "src"))


@pytest.mark.parametrize("dtype", ["bfloat16", jnp.float16, np.dtype("float32")])
def test_dtype_is_that_of_config_and_weights(tmp_path, dtype):
    name = jnp.dtype(dtype).name
    src = hf_dirs.save(tmp_path / "src")
    model, _ = load_hf(src, dtype=dtype)
    assert model.config.param_dtype == model.config.dtype == name
    convert(src, tmp_path / "dst", dtype=dtype)
    converted = load_hf(tmp_path / "dst")[0]
    assert converted.config == model.config
    theirs = Lfm2ForCausalLM.from_pretrained(src).to(getattr(torch, name)).state_dict()
    for key, array in to_state_dict(converted).items():
        assert array.dtype == jnp.dtype(dtype)
        np.testing.assert_array_equal(bits(array), bits(to_state_dict(model)[key]))
        np.testing.assert_array_equal(array.astype(np.float32), theirs[key].float().numpy(), err_msg=key)


def test_stored_dtype_wins_over_that_of_the_config(tmp_path):
    src = hf_dirs.save(tmp_path / "src")
    hf_dirs.edit_json(src, "config.json", dtype="bfloat16")
    convert(src, tmp_path / "dst")
    assert hf_dirs.tensors_of(tmp_path / "dst") == hf_dirs.tensors_of(src)
    assert json.loads((tmp_path / "dst" / "config.json").read_text())["dtype"] == "float32"


def test_several_stored_dtypes_need_a_choice(tmp_path):
    src = hf_dirs.save(tmp_path / "src")
    hf_dirs.edit_weights(src, lambda w: w.update({name: array.astype(np.float16) for name, array in w.items()
                                                  if "norm" in name}))
    with pytest.raises(ValueError, match=r"float16: 9 tensors, first .*float32: 20 tensors, first .*pass dtype="):
        load_hf(src)
    assert load_hf(src, dtype="float32")[0].norm.weight[...].dtype == jnp.float32


def test_a_model_cast_by_its_owner_is_saved_as_it_is(tmp_path):
    import jax
    from flax import nnx

    graphdef, params = nnx.split(tiny_model(), nnx.Param)
    save_hf(nnx.merge(graphdef, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)), tmp_path / "half")
    assert {tag for tag, _, _ in hf_dirs.tensors_of(tmp_path / "half").values()} == {"BF16"}
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"


def test_tied_head_in_a_file_is_dropped_where_equal_and_refused_where_not(tmp_path):
    src = hf_dirs.save(tmp_path / "src")
    expected = hf_dirs.tensors_of(src)
    hf_dirs.edit_weights(src, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].copy()}))
    convert(src, tmp_path / "dst")
    assert hf_dirs.tensors_of(tmp_path / "dst") == expected
    hf_dirs.edit_weights(src, lambda w: w["lm_head.weight"].__setitem__((0, 0), 9))
    with pytest.raises(ValueError, match=r"lm_head\.weight differs"):
        load_hf(src)


def test_everything_beside_the_weights_is_carried_verbatim(tmp_path, source, tokenizer):
    model, loaded = load_hf(source)
    assert loaded.to_str() == tokenizer.to_str()
    convert(source, tmp_path / "converted")
    save_hf(model, tmp_path / "saved", source=source)
    save_hf(model, tmp_path / "same-tokenizer", loaded, source=source)
    kept = {str(file.relative_to(source)): file.read_bytes() for file in source.rglob("*") if file.is_file()}
    for name in ("config.json", "model.safetensors", "training_args.bin"):
        del kept[name]
    assert len(kept) == 11
    for name in ("converted", "saved", "same-tokenizer"):
        files = {str(file.relative_to(tmp_path / name)): file.read_bytes()
                 for file in (tmp_path / name).rglob("*") if file.is_file()}
        assert files.keys() == kept.keys() | {"config.json", "model.safetensors"}
        assert {key: files[key] for key in kept} == kept


@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_limits_in_a_tokenizer_file_are_carried_and_not_loaded(tmp_path, source, tokenizer, limits):
    shutil.copytree(source, tmp_path / "source")
    file = tmp_path / "source" / "tokenizer.json"
    limited(tokenizer, **limits).save(str(file), pretty=False)
    model, loaded = load_hf(tmp_path / "source")
    assert loaded.to_str() == tokenizer.to_str()
    convert(tmp_path / "source", tmp_path / "converted")
    for name, given in (("loaded", loaded), ("file", Tokenizer.from_file(str(file))), ("none", None)):
        save_hf(model, tmp_path / name, given, source=tmp_path / "source")
    for name in ("converted", "loaded", "file", "none"):
        for carried in ("tokenizer.json", "tokenizer_config.json", "vocab.json"):
            assert (tmp_path / name / carried).read_bytes() == (tmp_path / "source" / carried).read_bytes()


def test_tokenizer_of_ours_loads_in_transformers(tmp_path, tokenizer):
    model = tiny_model(vocab_size=300)
    save_hf(model, tmp_path / "hf", tokenizer)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "the quick brown fox\n\n    jumps 1234 \N{SNOWMAN} <|im_end|>"
    assert theirs.encode(text) == tokenizer.encode(text).ids
    assert theirs.decode(theirs.encode(text), skip_special_tokens=False) == "<|startoftext|>" + text
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 7, 0)
    assert theirs.model_max_length == model.config.max_position
    assert load_hf(tmp_path / "hf")[1].to_str() == tokenizer.to_str()
    generation = Lfm2ForCausalLM.from_pretrained(tmp_path / "hf").generation_config
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 7, 0)


def test_another_tokenizer_replaces_that_of_the_source(tmp_path, source):
    other = tiny_tokenizer("1 2 3 4 5 6", vocab_size=275)
    save_hf(load_hf(source)[0], tmp_path / "a", other, source=source)
    assert load_hf(tmp_path / "a")[1].to_str() == other.to_str()
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == [
        "LICENSE", "additional_chat_templates", "chat_template.jinja", "config.json", "generation_config.json",
        "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]
    assert "file" not in json.loads((tmp_path / "a" / "tokenizer_config.json").read_text())
    old = hf_dirs.save(tmp_path / "old")
    (old / "tokenizer_config.json").write_text('{"chat_template": "{{ kept }}"}')
    save_hf(load_hf(old)[0], tmp_path / "b", other, source=old)
    assert chat_template(tmp_path / "b") == "{{ kept }}"


def test_chat_template_from_file_string_or_list(tmp_path):
    def config(value):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
        return chat_template(tmp_path)

    assert chat_template(tmp_path) is None
    assert config(None) is None
    assert config("{{ a }}") == "{{ a }}"
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    assert config(named) == "d"
    assert config(named[:1]) == "t"
    for bad in ([*named[:1], {"name": "rag", "template": "r"}], 3, ["x"], []):
        with pytest.raises(ValueError, match="chat_template in"):
            config(bad)
    (tmp_path / "chat_template.jinja").write_text("{{ file }}")
    assert config("{{ a }}") == "{{ file }}"
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not valid JSON"):
        chat_template(tmp_path)


def test_hub_cache_links_are_followed(tmp_path):
    """`snapshots/REVISION/name -> ../../blobs/HASH`, as huggingface_hub lays its cache out."""
    flat = hf_dirs.save(tmp_path / "flat", shards=True)
    snapshot, blobs = tmp_path / "models--x--y" / "snapshots" / "abc", tmp_path / "models--x--y" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, file in enumerate(sorted(flat.iterdir())):
        (blobs / f"hash{i}").write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(f"../../blobs/hash{i}")
    convert(snapshot, tmp_path / "dst")
    assert hf_dirs.tensors_of(tmp_path / "dst") == hf_dirs.tensors_of(flat)
    assert not (tmp_path / "dst" / "generation_config.json").is_symlink()


def test_loaded_model_has_the_logits_of_the_oracle(tmp_path):
    """One look at the numbers themselves; parity in breadth has its own tests."""
    import jax
    from flax import nnx
    from helpers import rel_err

    src = hf_dirs.save(tmp_path / "src", **CASES["four-taps-bias"])
    model, _ = load_hf(src)
    graphdef, params = nnx.split(model, nnx.Param)
    tokens = np.random.default_rng(0).integers(1, 97, (2, 19))
    actual = jax.jit(lambda p: nnx.merge(graphdef, p)(jnp.asarray(tokens))[0])(nnx.to_pure_dict(params))
    assert rel_err(actual, hf_dirs.logits(src)) < 1e-4


def test_a_file_of_one_family_that_an_earlier_one_can_express_too(tmp_path):
    """LFM3 without what is new in it: its tensors have the names of LFM3, and are exported with those of LFM2."""
    plain = dict(model_type="lfm3", use_sandwich_norm=False, use_attention_gate=False,
                 layer_types=("conv", "full_attention"), rope_parameters={
                     "full_attention": {"rope_type": "default", "rope_theta": 1e4},
                     "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}})
    theirs = oracle.hf_model(oracle.hf_config(**plain))
    theirs.save_pretrained(tmp_path / "lfm3")
    model, _ = lfm.load(tmp_path / "lfm3")
    tokens = tokens_like((1, 9), 0, 1, 97)
    assert rel_err(model(tokens)[0], oracle.forward(theirs, tokens)[1]) < 1e-4
    convert(tmp_path / "lfm3", tmp_path / "lfm2")
    assert json.loads((tmp_path / "lfm2" / "config.json").read_text())["model_type"] == "lfm2"
    again, of_dict = lfm.load(tmp_path / "lfm2")[0], lfm.from_state_dict(theirs.state_dict(), model.config)
    for other in (again, of_dict):
        for a, b in zip(*(jax.tree.leaves(nnx.state(m, nnx.Param)) for m in (other, model)), strict=True):
            np.testing.assert_array_equal(a, b)


def test_stop_ids_of_the_generation_config_are_the_models_too(tmp_path):
    path = tmp_path / "m"
    save_hf(tiny_model(eos_ids=(7,)), path)
    (path / "generation_config.json").write_text('{"eos_token_id": [7, 2, 5000]}')
    assert load_hf(path)[0].config.eos_ids == (7, 2)  # 5000 is beyond the vocabulary.
    (path / "generation_config.json").write_text('{"temperature": 0.3}')
    assert load_hf(path)[0].config.eos_ids == (7,)
    (path / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"generation_config\.json"):
        load_hf(path)
