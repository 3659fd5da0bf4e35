"""What is refused: one ValueError that lists everything, before a weight is read, with nothing left behind."""

import json
import os
import re
import shutil

import hf_dirs
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from lfm_jax.convert import hf, safetensors_io
from lfm_jax.convert.hf import convert, load_hf, save_hf, write_hf
from lfm_jax.testing import tiny_model

CONV, NORM = "model.layers.0.conv.conv.weight", "model.embedding_norm.weight"


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return hf_dirs.save(tmp_path_factory.mktemp("hf") / "single")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    return hf_dirs.save(tmp_path_factory.mktemp("hf") / "sharded", shards=True)


@pytest.fixture
def broken(tmp_path, single):
    return shutil.copytree(single, tmp_path / "broken")


@pytest.fixture
def shards(tmp_path, sharded):
    return shutil.copytree(sharded, tmp_path / "shards")


@pytest.fixture
def weights_stay_unread(monkeypatch):
    """Refused on headers alone: neither a model is filled nor a file of weights begun."""
    def touched(*_):
        raise AssertionError("a weight was read or written before all checks had passed")

    monkeypatch.setattr(hf, "build", touched)
    monkeypatch.setattr(safetensors_io, "write", touched)


untouched = pytest.mark.usefixtures("weights_stay_unread")


def refusal(path, **options):
    """The problems that `load_hf` lists; `convert` must list the same and leave nothing."""
    with pytest.raises(ValueError, match="cannot load") as loading:
        load_hf(path, **options)
    home = path.parent
    before = sorted(os.listdir(home))
    with pytest.raises(ValueError, match="cannot convert") as converting:
        convert(path, home / "dst", **options)
    assert sorted(os.listdir(home)) == before
    problems = str(loading.value).splitlines()[1:]
    assert str(converting.value).splitlines()[1:] == problems
    assert all(problem.startswith("  - ") for problem in problems)
    return [problem.removeprefix("  - ") for problem in problems]


def index_of(path):
    return json.loads((path / hf_dirs.INDEX).read_text())


def edit_index(path, change):
    index = index_of(path)
    change(index["weight_map"])
    (path / hf_dirs.INDEX).write_text(json.dumps(index))


# -------------------------------------------------------------------- tensors


@untouched
def test_tensors_that_do_not_fit_are_all_listed(broken):
    def spoil(weights):
        del weights[CONV]
        weights["model.layers.3.ffn_norm.weight"] = np.ones(32, np.float32)
        weights["model.layers.1.self_attn.k_proj.weight"] = np.ones((32, 16), np.float32)
        weights["model.layers.0.conv.in_proj.bias"] = np.ones(96, np.float32)
        weights[NORM] = np.ones(32, np.int8)
        weights["model.layers.2.ffn_norm.weight"] = np.ones(32, np.float64)

    hf_dirs.edit_weights(broken, spoil)
    dtypes = "expected float32, bfloat16, float16"
    assert sorted(refusal(broken)) == [
        f"missing: {CONV} [32, 1, 3]",
        "unexpected: model.layers.0.conv.in_proj.bias [96]",
        "unexpected: model.layers.3.ffn_norm.weight [32]",
        f"wrong dtype: {NORM} is I8; {dtypes}",
        f"wrong dtype: model.layers.2.ffn_norm.weight is F64; {dtypes}",
        "wrong shape: model.layers.1.self_attn.k_proj.weight is [32, 16]; config expects [16, 32]",
    ]


@untouched
def test_fp8_is_refused(broken):
    save_file({NORM: torch.ones(32).to(torch.float8_e4m3fn)}, broken / "model.safetensors")
    assert f"wrong dtype: {NORM} is F8_E4M3; expected float32, bfloat16, float16" in refusal(broken)


@untouched
def test_file_without_tensors(broken):
    save_file({}, broken / "model.safetensors")
    problems = refusal(broken)
    assert len(problems) == 29
    assert all(problem.startswith("missing: ") for problem in problems)


@untouched
@pytest.mark.parametrize("dtype", ["int8", "float64", "fp8", 3])
def test_dtype_asked_for_is_checked(broken, dtype):
    assert refusal(broken, dtype=dtype) == [f"dtype is {dtype}; choose one of float32, bfloat16, float16"]


@untouched
@pytest.mark.parametrize("cut", [1, 5000])
def test_truncated_file(broken, cut):
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-cut])
    [problem] = refusal(broken)
    assert re.match(r"model\.safetensors is truncated, damaged or not readable \(.*\); fetch it again", problem)


@untouched
@pytest.mark.parametrize("content", [b"", b"\x00" * 8, b"\xff" * 64, b"version https://git-lfs.github.com/spec/v1\n"])
def test_damaged_file(broken, content):
    (broken / "model.safetensors").write_bytes(content)
    assert "model.safetensors is truncated" in refusal(broken)[0]


# -------------------------------------------------------------------- index


@untouched
def test_index_that_names_what_is_not_there(shards):
    names = sorted(index_of(shards)["weight_map"].items(), key=lambda item: item[1])
    (first, first_file), (last, last_file) = names[0], names[-1]
    extra = "model-00009-of-00009.safetensors"

    def change(weight_map):
        weight_map[first] = last_file
        weight_map[last] = extra

    edit_index(shards, change)
    assert sorted(refusal(shards)) == sorted([
        f"{hf_dirs.INDEX} maps {first} to {last_file}, which does not have it",
        f"unexpected: {first} in {first_file}, which {hf_dirs.INDEX} does not list",
        f"unexpected: {last} in {last_file}, which {hf_dirs.INDEX} does not list",
        f"{hf_dirs.INDEX} names {extra}: {extra} is missing",
    ])


@untouched
def test_truncated_shard_is_one_problem(shards):
    file = shards / index_of(shards)["weight_map"][NORM]
    file.write_bytes(file.read_bytes()[:-1])
    [problem] = refusal(shards)
    assert problem.startswith(f"{file.name} is truncated")


@untouched
@pytest.mark.parametrize(("content", "expected"), [
    ("{", "is not valid JSON"),
    ("[" * 100_000, "is not valid JSON"),
    ("[]", "holds a list, not an object"),
    ("{}", "has no weight_map"),
    ('{"weight_map": []}', "has no weight_map"),
    ('{"weight_map": {}}', "has no weight_map"),
])
def test_malformed_index(shards, content, expected):
    (shards / hf_dirs.INDEX).write_text(content)
    [problem] = refusal(shards)
    assert problem.startswith(f"{hf_dirs.INDEX} {expected}")


@untouched
@pytest.mark.parametrize("file", ["../single/model.safetensors", "/etc/model.safetensors", "a/b.safetensors",
                                  "..\\x.safetensors", "a\0.safetensors", "", ".."])
def test_index_entry_that_leaves_the_directory(shards, single, file):
    edit_index(shards, lambda weight_map: weight_map.update({NORM: file}))
    assert any(problem.startswith(f"{hf_dirs.INDEX} maps {NORM} to {file!r}; ") for problem in refusal(shards))
    assert not any("missing: " in problem for problem in refusal(shards))


@untouched
@pytest.mark.parametrize(("file", "wrong"), [(3, "expected a file name"),
                                             ("pytorch_model.bin", "only .safetensors files are read")])
def test_index_entry_of_another_kind(shards, file, wrong):
    edit_index(shards, lambda weight_map: weight_map.update({NORM: file}))
    assert f"{hf_dirs.INDEX} maps {NORM} to {file!r}; {wrong}" in refusal(shards)


# -------------------------------------------------------------------- files


@untouched
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_link_that_leaves_the_directory(broken, tmp_path, name):
    (tmp_path / "elsewhere").write_text("{}")
    (broken / name).unlink(missing_ok=True)
    (broken / name).symlink_to("../elsewhere")
    assert refusal(broken)[0].startswith(f"{name} leaves the directory: it leads to ")


@untouched
def test_carried_file_that_leaves_the_directory(broken, tmp_path):
    (tmp_path / "secret").write_text("secret")
    (broken / "merges.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=r"merges\.txt leaves the directory"):
        convert(broken, tmp_path / "dst")
    with pytest.raises(ValueError, match=r"merges\.txt leaves the directory"):
        save_hf(tiny_model(), tmp_path / "dst", source=broken)


@untouched
@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.pth"])
def test_pickle_files(broken, name):
    (broken / "model.safetensors").rename(broken / name)
    [problem] = refusal(broken)
    assert problem.startswith(f"{name}: pickle files are not read")
    assert "convert to safetensors" in problem
    assert "pickle file" in refusal(broken / name)[0]


@untouched
def test_no_weights_and_no_index(broken, shards):
    (broken / "model.safetensors").unlink()
    assert refusal(broken) == [f"neither model.safetensors nor {hf_dirs.INDEX} is there"]
    (shards / hf_dirs.INDEX).unlink()
    [problem] = refusal(shards)
    assert "but model-00001-of-" in problem
    assert problem.endswith("fetch the index too")


@untouched
def test_no_directory(tmp_path):
    assert refusal(tmp_path / "nothing") == ["there is no such directory"]
    (tmp_path / "file").write_text("")
    assert refusal(tmp_path / "file") == ["this is a file; expected a directory with config.json and model.safetensors"]


@untouched
@pytest.mark.parametrize(("content", "expected"), [
    ("", "config.json is not valid JSON"),
    ("\ufeff{", "config.json is not valid JSON"),
    ("3", "config.json holds a int, not an object"),
    ('{"model_type": "llama"}', "config.json: model_type is 'llama'; expected 'lfm2'"),
    ('{"model_type": "lfm2"}', "config.json: lacks hidden_size"),
    ('{"model_type": "lfm2", "architectures": ["Lfm2BidirectionalForMaskedLM"]}',
     "config.json: architectures is ['Lfm2BidirectionalForM"),
])
def test_config_that_is_not_lfm2(broken, content, expected):
    (broken / "config.json").write_text(content)
    [problem] = refusal(broken)
    assert problem.startswith(expected)
    (broken / "config.json").unlink()
    assert refusal(broken) == ["config.json is missing"]


@untouched
@pytest.mark.parametrize("changes", [
    dict(hidden_size="32"), dict(num_attention_heads=None), dict(layer_types=[["conv"], "conv", "conv"]),
    dict(rope_parameters=[1]), dict(intermediate_size=1e400), dict(eos_token_id="x"), dict(num_hidden_layers=-1),
    dict(layer_types=None, full_attn_idxs=3), dict(vocab_size=True),
])
def test_config_with_junk_is_refused_as_such(broken, changes):
    hf_dirs.edit_json(broken, "config.json", **changes)
    assert refusal(broken)[0].startswith("config.json: ")


@untouched
def test_tokenizer_that_cannot_be_read(broken):
    (broken / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"cannot load(.|\n)*tokenizer\.json"):
        load_hf(broken)


@untouched
def test_problems_of_every_kind_come_together(broken, tmp_path):
    hf_dirs.edit_weights(broken, lambda weights: weights.pop(NORM))
    hf_dirs.edit_json(broken, "config.json", hidden_size=33)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    with pytest.raises(ValueError, match="cannot convert") as e:
        convert(broken, tmp_path / "full", dtype="int4", max_shard_bytes=0)
    for part in ("missing: " + NORM, "wrong shape: model.layers.0.conv", "dtype is int4", "is not empty",
                 "max_shard_bytes is 0"):
        assert part in str(e.value)
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["mine"]


# -------------------------------------------------------------------- writing


def test_destination_is_never_overwritten(tmp_path, single):
    (tmp_path / "file").write_text("mine")
    for dst in (tmp_path / "file", single):
        for write in (lambda dst=dst: convert(single, dst), lambda dst=dst: save_hf(tiny_model(), dst)):
            with pytest.raises(ValueError, match=r"is not empty|is a file"):
                write()
    assert (tmp_path / "file").read_text() == "mine"


def test_empty_and_linked_destinations_are_filled(tmp_path, single):
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    convert(single, tmp_path / "link")
    convert(single, tmp_path / "new" / "deeper")
    expected = hf_dirs.tensors_of(single)
    assert hf_dirs.tensors_of(tmp_path / "empty") == hf_dirs.tensors_of(tmp_path / "new" / "deeper") == expected
    assert sorted(os.listdir(tmp_path)) == ["empty", "link", "new"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("after", [0, 5, 20])
def test_failed_write_leaves_nothing(tmp_path, error, after):
    model = tiny_model()

    def arrays():
        for i, pair in enumerate(hf.to_state_dict(model).items()):
            if i == after:
                raise error
            yield pair

    for existing in (False, True):
        if existing:
            (tmp_path / "dst").mkdir()
        with pytest.raises(type(error)):
            write_hf(tmp_path / "dst", model.config, arrays(), max_shard_bytes=9_000)
        assert [path for path in tmp_path.rglob("*") if path != tmp_path / "dst"] == []
        assert (tmp_path / "dst").exists() == existing


def test_overflow_in_the_middle_of_a_conversion_leaves_nothing(tmp_path, broken):
    hf_dirs.edit_weights(broken, lambda weights: weights[NORM].__setitem__(3, 1e6))
    with pytest.raises(ValueError, match=rf"{NORM}: 1 finite values of float32 are too large for float16"):
        convert(broken, tmp_path / "dst", dtype="float16")
    assert os.listdir(tmp_path) == ["broken"]


def test_stream_that_is_not_the_model_is_refused(tmp_path):
    model = tiny_model()
    good = list(hf.to_state_dict(model).items())
    name, array = good[3]
    before, after = good[:3], good[4:]
    for stream in (good[:-1], [*good, good[0]], [good[1], good[0], *good[2:]], [*before, (name, array[:-1]), *after],
                   [*before, (name, array.astype(np.float16)), *after]):
        with pytest.raises(ValueError, match=r"expected model|more tensors than the"):
            write_hf(tmp_path / "dst", model.config, stream)
        assert os.listdir(tmp_path) == []


def test_model_that_no_family_can_express_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="qk_norm"):
        save_hf(tiny_model(qk_norm=False), tmp_path / "dst")
    assert os.listdir(tmp_path) == []
