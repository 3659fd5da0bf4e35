"""Importance of inputs: mean squares as float64 has them, files both ways, and what an exported file gains."""

import struct

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax import nnx
from gguf_kinds import keys_of, model, tensors_of, tokenizer

from lfm_jax.convert.gguf.archs import arch_of
from lfm_jax.convert.gguf.calibration import importance
from lfm_jax.convert.gguf.imatrix import Imatrix, read_imatrix, write_imatrix
from lfm_jax.convert.gguf.models import save_gguf
from lfm_jax.convert.weights import groups
from lfm_jax.quant import dequantize

TEXT = "the quick brown fox jumps over the lazy dog, 12345 times\n" * 5
CONTEXT = 32


def shapes(made):
    table = groups(arch_of(made.config)[0].weights, made.config)
    return {name: group.tensor.shape for group in table for name in group.names}


def pieces_of(config):
    ids = tokenizer().encode(TEXT, add_special_tokens=False).ids
    return [[config.bos_id, *ids[i : i + CONTEXT - 1]] for i in range(0, len(ids), CONTEXT - 1)]


def in_float64(config, params, tokens):
    """The inputs of every matrix of all layers: name -> a list of rows for each matrix."""
    found = {}
    positions, x_TD = np.arange(len(tokens)), params["embed"][tokens]

    def note(i, names, rows):
        for name in names.split():
            found[f"blk.{i}.{name}.weight"] = rows if isinstance(rows, list) else [rows]

    for i, layer in enumerate(config.layers):
        p, names = params["blocks"][i], {"conv": "shortconv.in_proj", "full_attention": "attn_q attn_k attn_v"}
        operator, out = p["operator"], {"conv": "shortconv.out_proj", "full_attention": "attn_output"}
        h_TD = reference.rms_norm(x_TD, p["operator_norm"]["weight"], config.norm_eps)
        note(i, names[layer.operator], h_TD)
        run = reference.OPERATORS[layer.operator]
        eye = np.eye(config.hidden_size).reshape(operator["out_proj"].shape)
        note(i, out[layer.operator], run(operator | {"out_proj": eye}, h_TD, positions, config))
        x_TD = x_TD + run(operator, h_TD, positions, config)
        h_TD = reference.rms_norm(x_TD, p["ffn_norm"]["weight"], config.norm_eps)
        ffn = p["feed_forward"]
        if layer.feed_forward == "swiglu":
            note(i, "ffn_gate ffn_up", h_TD)
            note(i, "ffn_down", reference.swiglu(ffn | {"w2": np.eye(config.ffn_size)}, h_TD, config))
        else:
            note(i, "ffn_gate_inp", h_TD)
            scores_TE = reference.sigmoid(h_TD @ ffn["router"].T) + ffn["expert_bias"]
            chosen_TA = np.argsort(-scores_TE, axis=1, kind="stable")[:, : config.active_experts]
            rows = [h_TD[(chosen_TA == e).any(1)] for e in range(config.num_experts)]
            note(i, "ffn_gate_exps ffn_up_exps", rows)
            note(i, "ffn_down_exps", [reference.silu(x @ w1) * (x @ w3)
                                      for x, w1, w3 in zip(rows, ffn["w1"], ffn["w3"], strict=True)])
        x_TD = x_TD + reference.FEED_FORWARDS[layer.feed_forward](ffn, h_TD, config)
    return found


@pytest.fixture(scope="module")
def made():
    made = model("moe", remat="full", experts_impl="blocks")
    made.blocks[1].feed_forward.expert_bias[...] = np.array([0, 0, 0, 0, 0, -9], np.float32)  # One is never chosen.
    return made


@pytest.fixture(scope="module")
def seen(made):
    said = []
    found = importance(made, tokenizer(), TEXT, context=CONTEXT, dataset="foxes", tell=said.append)
    count = len(pieces_of(made.config))
    assert count > 4, "more than one batch"
    assert said[-1] == f"{count} of {count} pieces of 32 tokens are read"
    assert (found.chunks, found.chunk_size, found.datasets) == (count, CONTEXT, ("foxes",))
    return found


def test_sums_are_those_of_float64(made, seen):
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), nnx.to_pure_dict(nnx.state(made, nnx.Param)))
    pieces = [in_float64(made.config, params, piece) for piece in pieces_of(made.config)]
    assert seen.squares.keys() == pieces[0].keys()
    for name in pieces[0]:
        rows = [np.concatenate(parts) for parts in zip(*(piece[name] for piece in pieces), strict=True)]
        np.testing.assert_array_equal(seen.counts[name], [len(x) for x in rows], err_msg=name)
        expected = np.stack([np.square(x).sum(0) for x in rows])
        np.testing.assert_allclose(seen.squares[name], expected, rtol=1e-4, atol=1e-9, err_msg=name)
    assert seen.counts["blk.1.ffn_up_exps.weight"][5] == 0


def test_every_matrix_of_the_layers_is_there_and_fits(made, seen):
    matrices = {name: shape for name, shape in shapes(made).items()
                if name.startswith("blk") and len(shape) > 1 and not name.endswith("shortconv.conv.weight")}
    assert seen.squares.keys() == matrices.keys()
    found, problems = seen.importance(shapes(made))
    assert problems == []
    assert {name: x.shape for name, x in found.items()} == {
        name: (*shape[:-2], shape[-1]) for name, shape in matrices.items()}
    np.testing.assert_array_equal(found["blk.1.ffn_down_exps.weight"][5], 1)
    name = "blk.0.shortconv.in_proj.weight"
    np.testing.assert_allclose(found[name], seen.squares[name][0] / seen.counts[name], rtol=1e-6)


def test_files_come_back_and_are_those_of_llama_cpp(seen, tmp_path):
    write_imatrix(tmp_path / "x.gguf", seen)
    found = read_imatrix(tmp_path / "x.gguf")
    assert (found.datasets, found.chunks, found.chunk_size) == (seen.datasets, seen.chunks, seen.chunk_size)
    assert found.path == str(tmp_path / "x.gguf")
    for name, squares in seen.squares.items():
        np.testing.assert_allclose(found.squares[name], squares, rtol=1e-6)
        np.testing.assert_array_equal(found.counts[name], seen.counts[name])
    keys, tensors = keys_of(tmp_path / "x.gguf"), tensors_of(tmp_path / "x.gguf")
    assert keys == {"general.architecture": "imatrix", "general.type": "imatrix", "imatrix.datasets": ["foxes"],
                    "imatrix.chunk_count": seen.chunks, "imatrix.chunk_size": CONTEXT}
    assert tensors["blk.1.ffn_up_exps.weight.in_sum2"][:2] == ("F32", (6, 64))
    assert tensors["blk.1.ffn_up_exps.weight.counts"][:2] == ("F32", (6, 1))
    assert tensors["blk.0.ffn_up.weight.counts"][:2] == ("F32", (1, 1))


def test_the_older_format_is_read(tmp_path):
    means = {"blk.0.ffn_up.weight": np.arange(1, 65, dtype="<f4"), "blk.1.ffn_up_exps.weight": np.ones(6 * 64, "<f4")}
    data = struct.pack("<i", len(means))
    for name, x in means.items():
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", 3, len(x)) + (3 * x).tobytes()
    (tmp_path / "old.dat").write_bytes(data + struct.pack("<ii", 7, 5) + b"foxes")
    found = read_imatrix(tmp_path / "old.dat")
    assert (found.chunks, found.datasets) == (7, ("foxes",))
    weights, problems = found.importance(shapes(model("moe")))
    assert problems == []
    np.testing.assert_array_equal(weights["blk.0.ffn_up.weight"], means["blk.0.ffn_up.weight"])
    np.testing.assert_array_equal(weights["blk.1.ffn_up_exps.weight"], np.ones((6, 64)))
    (tmp_path / "bare.dat").write_bytes(data)
    assert read_imatrix(tmp_path / "bare.dat").squares.keys() == means.keys()
    for cut in (0, 2, 9, len(data) - 1):
        (tmp_path / "cut.dat").write_bytes(data[:cut])
        with pytest.raises(ValueError, match="cannot read imatrix"):
            read_imatrix(tmp_path / "cut.dat")


def test_what_is_no_imatrix_is_refused(made, tmp_path):
    save_gguf(made, tmp_path / "model.gguf", type="F32")
    with pytest.raises(ValueError, match="it has no sums of squares"):
        read_imatrix(tmp_path / "model.gguf")
    half = Imatrix({"a": np.ones((1, 4))}, {"a": np.ones(1)})
    write_imatrix(tmp_path / "a.gguf", half)
    data = (tmp_path / "a.gguf").read_bytes()
    (tmp_path / "b.gguf").write_bytes(data.replace(b"a.counts", b"b.counts"))
    with pytest.raises(ValueError, match=r"a\.counts is missing"):
        read_imatrix(tmp_path / "b.gguf")
    assert half.importance(shapes(made))[1] == ["imatrix given has none of the tensors of this model"]
    wide = Imatrix({"blk.0.ffn_up.weight": np.ones((1, 32))}, {"blk.0.ffn_up.weight": np.ones(1)}, path="x")
    with pytest.raises(ValueError, match=r"imatrix x: blk\.0\.ffn_up\.weight has \[1, 32\] inputs; expected \[64\]"):
        save_gguf(made, tmp_path / "c.gguf", imatrix=wide)


def test_an_exported_file_has_smaller_errors_where_they_count(tmp_path):
    made = model("hybrid", hidden_size=256, num_heads=16, ffn_size=256)
    spread = np.exp(np.random.default_rng(0).standard_normal(256, np.float32))
    made.blocks[0].ffn_norm.weight[...] = jnp.asarray(spread)
    seen = importance(made, tokenizer(), TEXT, context=CONTEXT, dataset="foxes")
    write_imatrix(tmp_path / "foxes.imatrix", seen)
    save_gguf(made, tmp_path / "plain.gguf", type="Q4_K_M")
    save_gguf(made, tmp_path / "weighted.gguf", type="Q4_K_M", imatrix=tmp_path / "foxes.imatrix")
    name = "blk.0.ffn_up.weight"
    w, weight = np.asarray(made.blocks[0].feed_forward.w3[...]), seen.importance(shapes(made))[0][name]
    errors = []
    for file in ("plain", "weighted"):
        type, shape, data = tensors_of(tmp_path / f"{file}.gguf")[name]
        assert type == "Q4_K"
        errors.append(float((weight * (dequantize(data, type, shape) - w) ** 2).mean()))
    assert errors[1] < 0.8 * errors[0]
    keys = keys_of(tmp_path / "weighted.gguf")
    assert {name.removeprefix("quantize.imatrix."): x for name, x in keys.items() if name.startswith("quantize.")} == {
        "file": str(tmp_path / "foxes.imatrix"), "dataset": "foxes", "entries_count": len(seen.squares),
        "chunks_count": seen.chunks}
    assert gguf.LlamaFileType(keys["general.file_type"]) == gguf.LlamaFileType.MOSTLY_Q4_K_M


def test_limits(made):
    two = importance(made, tokenizer(), TEXT, context=CONTEXT, max_pieces=2)
    assert two.chunks == 2
    assert two.counts["blk.0.ffn_up.weight"] == 2 * CONTEXT
    for options, problem in (({"context": 1}, "context is 1"), ({"text": ""}, "has no tokens")):
        with pytest.raises(ValueError, match=problem):
            importance(made, tokenizer(), **{"text": TEXT} | options)
    with pytest.raises(ValueError, match=r"lfm2 in llama\.cpp has no conv_bias=True"):
        importance(model(conv_bias=True), tokenizer(), TEXT)
