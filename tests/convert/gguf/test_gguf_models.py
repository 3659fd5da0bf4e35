"""Models to GGUF files and back: to the bit, whole or not at all, and what is refused with all reasons at once."""

import shutil

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from gguf_kinds import KINDS, TEMPLATE, keys_of, model, params, rewrite, tensors_of, tokenizer

import lfm_jax as lfm
from lfm_jax.convert.gguf import models
from lfm_jax.convert.gguf.imatrix import Imatrix
from lfm_jax.convert.gguf.models import export, save_gguf
from lfm_jax.loading import chat_template
from lfm_jax.quant import MIXES, dequantize
from lfm_jax.testing import tiny_model


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A Hugging Face directory with a tokenizer and a chat template."""
    path = tmp_path_factory.mktemp("hf") / "tiny"
    lfm.save_hf(model(), path, tokenizer())
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


@pytest.fixture(scope="module")
def f32(tmp_path_factory, directory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    export(directory, path, "F32")
    return path


def refusal(function, *args, **options):
    with pytest.raises(ValueError, match="cannot") as error:
        function(*args, **options)
    return [line.removeprefix("  - ") for line in str(error.value).splitlines()[1:]]


# -------------------------------------------------------------------- to the bit


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_quantised_comes_back_to_the_bit(kind, dtype, tmp_path):
    made = model(kind, param_dtype=dtype, dtype=dtype)
    type = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
    save_gguf(made, tmp_path / "one.gguf", tokenizer(), type=type)
    loaded, read = lfm.load(tmp_path / "one.gguf")
    assert loaded.config.replace(init_std=made.config.init_std) == made.config
    assert params(loaded) == params(made)
    save_gguf(loaded, tmp_path / "two.gguf", read, type=type)
    keys = [keys_of(tmp_path / name) for name in ("one.gguf", "two.gguf")]
    assert [found.pop("general.name") for found in keys] == ["one", "two"]
    assert keys[0] == keys[1]
    assert tensors_of(tmp_path / "one.gguf") == tensors_of(tmp_path / "two.gguf")


def test_a_file_of_a_directory_is_that_of_its_model(directory, f32, tmp_path):
    loaded, read = lfm.load(directory)
    for type in ("F32", "Q4_K_M"):
        save_gguf(loaded, tmp_path / f"{type}.gguf", read, type=type, source=directory)
        export(directory, tmp_path / f"{type} too.gguf", type)
        assert (tmp_path / f"{type}.gguf").read_bytes() == (tmp_path / f"{type} too.gguf").read_bytes()
    assert (tmp_path / "F32.gguf").read_bytes() == f32.read_bytes()
    assert chat_template(f32) == chat_template(directory) == TEMPLATE


def test_experts_of_a_directory_are_stacked(tmp_path):
    made = model("moe")
    lfm.save_hf(made, tmp_path / "hf")
    export(tmp_path / "hf", tmp_path / "moe.gguf", "F32")
    found, moe = tensors_of(tmp_path / "moe.gguf"), made.blocks[1].feed_forward
    for name, weights in (("gate", moe.w1), ("up", moe.w3), ("down", moe.w2)):
        type, shape, data = found[f"blk.1.ffn_{name}_exps.weight"]
        expected = np.swapaxes(np.asarray(weights[...]), 1, 2)
        assert (type, shape) == ("F32", expected.shape)
        assert data == expected.tobytes()
    assert params(lfm.load(tmp_path / "moe.gguf")[0]) == params(made)


def test_queries_and_keys_of_llama_are_permuted_as_by_its_converter(tmp_path):
    made = model("llama")
    save_gguf(made, tmp_path / "llama.gguf", type="F32")
    found = tensors_of(tmp_path / "llama.gguf")
    for name, weights in (("q", made.blocks[0].operator.q_proj), ("k", made.blocks[0].operator.k_proj)):
        w_NHD = np.asarray(weights[...])
        N, H, D = w_NHD.shape
        expected = w_NHD.reshape(N, 2, H // 2, D).swapaxes(1, 2)
        assert found[f"blk.0.attn_{name}.weight"][2] == expected.tobytes()


# -------------------------------------------------------------------- what is in a file


def test_keys_and_tensors_are_those_that_llama_cpp_reads(f32):
    keys = keys_of(f32)
    tokens, kinds, merges = (keys.pop(f"tokenizer.ggml.{name}") for name in ("tokens", "token_type", "merges"))
    assert keys == {
        "general.architecture": "lfm2", "general.type": "model", "general.name": "tiny", "general.file_type": 0,
        "general.size_label": keys["general.size_label"], "general.quantization_version": 2,
        "lfm2.block_count": 3, "lfm2.context_length": 4096, "lfm2.embedding_length": 64,
        "lfm2.feed_forward_length": 96, "lfm2.attention.head_count": 4, "lfm2.attention.head_count_kv": [0, 2, 0],
        "lfm2.attention.layer_norm_rms_epsilon": np.float32(1e-5), "lfm2.attention.key_length": 16,
        "lfm2.attention.value_length": 16, "lfm2.rope.freq_base": 1e6, "lfm2.vocab_size": 384,
        "lfm2.shortconv.l_cache": 3, "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "lfm2",
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 7, "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }
    size = tokenizer().get_vocab_size()
    assert len(tokens) == len(kinds) == 384
    assert tokens[:2] == ["<|pad|>", "<|startoftext|>"]
    assert tokens[size:] == [f"[PAD{i}]" for i in range(size, 384)]
    assert kinds == [3] * 14 + [1] * (size - 14) + [5] * (384 - size)
    assert len(merges) == size - 14 - 256
    assert {name: shape for name, (_, shape, _) in tensors_of(f32).items() if not name.startswith("blk.2")} == {
        "token_embd.weight": (384, 64), "token_embd_norm.weight": (64,),
        **{f"blk.{i}.{name}_norm.weight": (64,) for i in (0, 1) for name in ("attn", "ffn")},
        **{f"blk.{i}.ffn_{name}.weight": (96, 64) for i in (0, 1) for name in ("gate", "up")},
        **{f"blk.{i}.ffn_down.weight": (64, 96) for i in (0, 1)},
        "blk.0.shortconv.in_proj.weight": (192, 64), "blk.0.shortconv.conv.weight": (64, 3),
        "blk.0.shortconv.out_proj.weight": (64, 64),
        "blk.1.attn_q.weight": (64, 64), "blk.1.attn_k.weight": (32, 64), "blk.1.attn_v.weight": (32, 64),
        "blk.1.attn_output.weight": (64, 64), "blk.1.attn_q_norm.weight": (16,), "blk.1.attn_k_norm.weight": (16,),
    }


@pytest.mark.parametrize("type", MIXES)
def test_every_type_says_what_it_is(type, tmp_path):
    save_gguf(model(hidden_size=256, num_heads=16), tmp_path / "a.gguf", type=type)
    number = keys_of(tmp_path / "a.gguf")["general.file_type"]
    assert gguf.LlamaFileType(number).name.removeprefix("MOSTLY_").removeprefix("ALL_") == type
    assert tensors_of(tmp_path / "a.gguf")["blk.0.ffn_up.weight"][0] == MIXES[type]


# -------------------------------------------------------------------- quantised files


@pytest.mark.parametrize("type", ["Q8_0", "Q4_0"])
def test_blocks_that_round_to_themselves_need_no_source(type, tmp_path):
    save_gguf(model(hidden_size=256, num_heads=16), tmp_path / "a.gguf", type=type)
    loaded, _ = lfm.load(tmp_path / "a.gguf")
    assert loaded.config.param_dtype == "float32"
    save_gguf(loaded, tmp_path / "b.gguf", type=type)
    first, second = (tensors_of(tmp_path / name) for name in ("a.gguf", "b.gguf"))
    assert first.keys() == second.keys()
    assert {name for name in first if first[name] != second[name] and first[name][0] == type} == set()


@pytest.fixture(scope="module")
def k_quants(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "k.gguf"
    save_gguf(model("moe", hidden_size=256, num_heads=16, expert_size=256), path, tokenizer(), type="Q4_K_M")
    assert {"Q4_K", "Q6_K", "F32"} <= {type for type, *_ in tensors_of(path).values()}
    return path


def test_weights_are_those_of_the_blocks(k_quants):
    loaded, _ = lfm.load(k_quants)
    type, shape, data = tensors_of(k_quants)["blk.1.ffn_gate_exps.weight"]
    assert type == "Q4_K"
    np.testing.assert_array_equal(np.swapaxes(loaded.blocks[1].feed_forward.w1[...], 1, 2),
                                  dequantize(data, type, shape))


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_blocks_that_have_not_changed_are_kept(k_quants, tmp_path, dtype):
    loaded, _ = lfm.load(k_quants, dtype)
    loaded.blocks[0].feed_forward.w1[...] = loaded.blocks[0].feed_forward.w1[...] + 0.5
    save_gguf(loaded, tmp_path / "a.gguf", source=k_quants)
    before, after = tensors_of(k_quants), tensors_of(tmp_path / "a.gguf")
    assert keys_of(tmp_path / "a.gguf") == keys_of(k_quants)
    assert [name for name in before if after[name] != before[name]] == ["blk.0.ffn_gate.weight"]
    assert after["blk.0.ffn_gate.weight"][:2] == before["blk.0.ffn_gate.weight"][:2]
    save_gguf(loaded, tmp_path / "b.gguf", source=k_quants, type="Q6_K")
    other = tensors_of(tmp_path / "b.gguf")
    same = {name for name, (type, *_) in other.items() if type == before[name][0]} - {"blk.0.ffn_gate.weight"}
    assert same
    assert all(other[name] == before[name] for name in same)


def test_a_file_is_written_again_as_it_is_or_with_other_types(k_quants, tmp_path):
    export(k_quants, tmp_path / "same.gguf")
    assert tensors_of(tmp_path / "same.gguf") == tensors_of(k_quants)
    assert keys_of(tmp_path / "same.gguf") == keys_of(k_quants)
    export(k_quants, tmp_path / "f32.gguf", "F32")
    keys = keys_of(k_quants) | {"general.file_type": 0}
    assert keys_of(tmp_path / "f32.gguf") == keys
    assert params(lfm.load(tmp_path / "f32.gguf")[0]) == params(lfm.load(k_quants)[0])


def test_keys_that_we_do_not_know_are_kept(f32, tmp_path):
    def more(keys):
        keys["general.languages"] = ["en", "de"], [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.STRING]
        keys["general.odd"] = 2**40, [gguf.GGUFValueType.UINT64]

    source = rewrite(f32, tmp_path / "more.gguf", keys=more)
    export(source, tmp_path / "out.gguf", "Q8_0")
    fields = gguf.GGUFReader(tmp_path / "out.gguf").fields
    assert fields["general.languages"].contents() == ["en", "de"]
    assert fields["general.odd"].contents() == 2**40
    assert fields["general.odd"].types == [gguf.GGUFValueType.UINT64]
    assert fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q8_0


def test_the_dtype_left_out_loses_nothing(tmp_path):
    half = model(param_dtype="float16", dtype="float16")
    save_gguf(half, tmp_path / "half.gguf", type="F16")
    assert lfm.load(tmp_path / "half.gguf")[0].config.dtype == "float16"
    single = model()  # Its taps and norms stay float32.
    single.norm.weight[...] = jnp.full((64,), 1 + 2**-20)
    save_gguf(single, tmp_path / "mixed.gguf", type="F16")
    mixed = lfm.load(tmp_path / "mixed.gguf")[0]
    assert mixed.config.dtype == "float32"
    np.testing.assert_array_equal(mixed.norm.weight[...], single.norm.weight[...])
    assert lfm.load(tmp_path / "mixed.gguf", "bfloat16")[0].norm.weight[...].dtype == jnp.bfloat16


# -------------------------------------------------------------------- what is refused


def test_models_that_llama_cpp_cannot_express_are_refused_with_all_reasons(tmp_path, monkeypatch):
    def touched(*_, **__):
        raise AssertionError("a weight was quantised before all checks had passed")

    monkeypatch.setattr(models, "quantize", touched)
    odd = tiny_model(layer_types=("conv", "recurrence", "sliding_attention"), conv_bias=True, conv_gates="input",
                     conv_taps=1, conv_impl="lax", head_dim=6, post_norm=True)
    (tmp_path / "there.gguf").write_text("mine")
    found = refusal(save_gguf, odd, tmp_path / "there.gguf", type="Q3_K", imatrix=tmp_path / "none")
    has_no = [line.removeprefix("lfm2 in llama.cpp has no ") for line in found if line.startswith("lfm2 in ")]
    assert has_no == [
        "post_norm=True", "conv_gates=input", "recurrence layers", "sliding_attention layers", "conv_bias=True",
        "4 heads of 6 in a width of 32 (their product must be the width)",
        "models without full_attention layers, whose cache cannot be empty there", "convolutions of one tap",
    ]
    rest = [line for line in found if not line.startswith("lfm2 in ")]
    assert [line.split("; ")[0] for line in rest] == [
        f"{tmp_path}/there.gguf exists, and nothing is overwritten", "type is 'Q3_K'",
        f"imatrix {tmp_path}/none does not exist"]
    assert (tmp_path / "there.gguf").read_text() == "mine"
    moe = model("moe", expert_bias=False, normed_weights=False, expert_scale=2.0)
    assert refusal(save_gguf, moe, tmp_path / "no" / "x.gguf") == [
        *(f"lfm2moe in llama.cpp has no {what}" for what in ("expert_bias=False", "normed_weights=False",
                                                             "expert_scale=2.0")),
        f"there is no directory {tmp_path}/no; make it first"]
    assert refusal(save_gguf, model(causal=False), tmp_path / "x.gguf") == ["lfm2 in llama.cpp has no causal=False"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there.gguf"]


def test_a_write_that_fails_leaves_nothing(tmp_path):
    bad = model()
    bad.blocks[2].feed_forward.w2[...] = jnp.full((64, 96), jnp.nan)
    with pytest.raises(ValueError, match=r"blk\.2\.ffn_down\.weight has NaN or infinite numbers"):
        save_gguf(bad, tmp_path / "x.gguf", type="Q8_0")
    assert list(tmp_path.iterdir()) == []


def test_a_source_of_another_model_is_refused(f32, tmp_path):
    [problem] = refusal(save_gguf, model("llama"), tmp_path / "x.gguf", source=f32)
    assert problem == (f"{f32} holds another model, without such blk.0.attn_q.weight, blk.0.attn_k.weight, "
                       "blk.0.attn_v.weight and 2 more")
    [problem] = refusal(save_gguf, model(ffn_size=64), tmp_path / "x.gguf", source=f32)
    assert problem.startswith(f"{f32} holds another model, without such blk.0.ffn_gate.weight, blk.0.ffn_up.weight, ")


def test_an_imatrix_that_would_change_nothing_is_refused(f32, tmp_path):
    name = "blk.0.ffn_up.weight"
    weights = Imatrix({name: np.ones((1, 64))}, {name: np.ones(1)})
    [problem] = refusal(export, f32, tmp_path / "x.gguf", imatrix=weights)
    assert problem == "an imatrix changes nothing where all blocks stay; name a type too"
    export(f32, tmp_path / "x.gguf", "Q4_0", weights)


def test_a_model_of_the_hub_has_its_own_name(directory, tmp_path):
    snapshots = tmp_path / "models--Org--tiny-lfm" / "snapshots"
    snapshots.mkdir(parents=True)
    (snapshots / "0123").symlink_to(directory)
    export(snapshots / "0123", tmp_path / "x.gguf", "F16")
    assert keys_of(tmp_path / "x.gguf")["general.name"] == "tiny-lfm"


def test_damaged_files_are_one_problem(f32, k_quants, tmp_path):
    data, broken = f32.read_bytes(), tmp_path / "broken.gguf"
    for cut in (0, 3, 5, 30, 300, 5000, len(data) // 2, len(data) - 1):
        broken.write_bytes(data[:cut])
        [problem] = refusal(lfm.load, broken)
        assert "does not begin as a GGUF file" in problem if cut < 4 else "truncated or damaged" in problem
        with pytest.raises(ValueError, match=r"truncated or damaged|does not begin"):
            chat_template(broken)
        assert refusal(export, broken, tmp_path / "out.gguf") == [problem]
    broken.write_bytes(data[:4] + data[8:])
    assert "truncated or damaged" in refusal(lfm.load, broken)[0]
    assert refusal(models.load_gguf, tmp_path / "none.gguf") == ["there is no such file"]
    shutil.copy(f32, tmp_path / "without a suffix")
    assert params(lfm.load(tmp_path / "without a suffix")[0]) == params(model())


def test_tensors_that_do_not_fit_are_all_listed(f32, tmp_path):
    def spoil(tensors):
        del tensors["blk.0.shortconv.conv.weight"]
        tensors["blk.1.attn_q.bias"] = np.zeros(64, np.float32)
        tensors["blk.1.attn_k.weight"] = np.zeros((64, 64), np.float32)
        tensors["blk.2.ffn_norm.weight"] = np.zeros(64, np.int32)

    assert sorted(refusal(lfm.load, rewrite(f32, tmp_path / "x.gguf", tensors=spoil), dtype="int8")) == [
        "dtype is int8; choose one of float32, bfloat16, float16",
        "missing: blk.0.shortconv.conv.weight [64, 3]",
        "unexpected: blk.1.attn_q.bias [64]",
        "wrong shape: blk.1.attn_k.weight is [64, 64]; config expects [32, 64]",
        "wrong type: blk.2.ffn_norm.weight is I32, whose numbers cannot be read",
    ]


@pytest.mark.parametrize(("changes", "problem"), [
    ({"general.architecture": "qwen3"}, "general.architecture is 'qwen3'; expected lfm2, lfm2moe, llama"),
    ({"lfm2.block_count": None, "lfm2.shortconv.l_cache": None},
     "keys of lfm2: the keys block_count, shortconv.l_cache are missing"),
    ({"lfm2.attention.head_count_kv": [2, 2]}, "keys of lfm2: attention.head_count_kv has 2 entries but block_count"),
    ({"lfm2.attention.head_count_kv": [0, 2, 1]}, "keys of lfm2: attention.head_count_kv has [1, 2]; only one number"),
    ({"lfm2.attention.causal": False}, "keys of lfm2: attention.causal False is not supported"),
    ({"lfm2.rope.scaling.type": "yarn", "lfm2.rope.scaling.factor": 4.0},
     "keys of lfm2: rope.scaling.type 'yarn', rope.scaling.factor 4.0 are not supported"),
    ({"lfm2.attention.value_length": 8}, "keys of lfm2: attention.value_length is 8; only 16"),
    ({"lfm2.embedding_length": "wide"}, "keys of lfm2: "),
    ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.model is 'llama'; only gpt2, byte-level BPE, is supported"),
    ({"tokenizer.ggml.pre": "qwen2"}, "tokenizer.ggml.pre is 'qwen2'; only lfm2, smollm, gpt-2 are supported"),
    ({"tokenizer.ggml.token_type": None}, "tokenizer.ggml.tokens has 384 entries and token_type 0"),
])
def test_keys_that_are_not_those_of_a_model_here(f32, tmp_path, changes, problem):
    kinds = {str: "STRING", bool: "BOOL", int: "UINT32", float: "FLOAT32"}

    def spoil(keys):
        for name, value in changes.items():
            if value is None:
                del keys[name]
            elif isinstance(value, list):
                keys[name] = value, keys[name][1]
            else:
                keys[name] = value, [gguf.GGUFValueType[kinds[type(value)]]]

    [found] = refusal(lfm.load, rewrite(f32, tmp_path / "x.gguf", keys=spoil))
    assert found.startswith(problem)


def test_a_wrong_model_and_a_wrong_tokenizer_are_told_together(f32, tmp_path):
    def spoil(keys):
        keys["tokenizer.ggml.pre"] = "other", [gguf.GGUFValueType.STRING]

    path = rewrite(f32, tmp_path / "x.gguf", spoil, lambda tensors: tensors.pop("token_embd_norm.weight"))
    assert [line.split(":")[0] for line in refusal(lfm.load, path)] == [
        "missing", "tokenizer.ggml.pre is 'other'; only lfm2, smollm, gpt-2 are supported"]


def test_nothing_is_read_before_all_is_checked(f32, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "build", lambda *_: pytest.fail("a weight was read"))
    refusal(lfm.load, rewrite(f32, tmp_path / "x.gguf", tensors=lambda tensors: tensors.pop("token_embd.weight")))


# -------------------------------------------------------------------- how far it is


def test_progress_is_told_now_and_then(f32, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(models, "_TELL_SECONDS", -1.0)
    export(f32, tmp_path / "a.gguf", "Q8_0", tell=said.append)
    count = len(tensors_of(f32))
    assert said[0] == f"1 of {count} tensors are written"
    assert len(said) == count
    monkeypatch.setattr(models, "_TELL_SECONDS", 1e9)
    export(f32, tmp_path / "b.gguf", "Q8_0", tell=said.append)
    assert len(said) == count
