"""`lfm.merge`: each method beside its formula in float64, what it holds in memory, what it refuses."""

import json
import re
import weakref

import numpy as np
import optax
import pytest
from flax import nnx
from safetensors.numpy import load_file

import lfm_jax as lfm
from lfm_jax.convert import safetensors_io
from lfm_jax.convert.hf import tensors, write_hf
from lfm_jax.convert.sources import Source
from lfm_jax.post.merge_methods import METHODS, drop, elected_mean, slerp, trim
from lfm_jax.recipe import to_plain
from lfm_jax.testing import tiny_config, tiny_tokenizer
from lfm_jax.text.tokenizer import load_tokenizer
from lfm_jax.train.checkpoint import CheckpointManager
from lfm_jax.train.state import new_state

MOE = dict(ffn_types=("swiglu", "moe", "moe"), num_experts=3, active_experts=2, expert_size=16)
BIAS = "model.layers.1.feed_forward.expert_bias"
OPTIONS = dict(weights=[0.5, 2.0, 1.0], density=[0.5, 0.3, 0.8], seed=3)


def save(path, seed=0, dtype="float32", near=None, tokenizer=None, **changes):
    """A directory of random weights, or of some near those of another directory."""
    config, rng = tiny_config(**changes).replace(param_dtype=dtype), np.random.default_rng(seed)
    start = {} if near is None else load_file(near / "model.safetensors")

    def arrays():
        for name, shape in tensors(config).items():
            array = rng.standard_normal(shape).astype(np.float32)
            array = array if near is None else start[name].astype(np.float32) + array / 8
            yield name, array.astype("float32" if name.endswith("expert_bias") else dtype)

    write_hf(path, config, arrays(), tokenizer=tokenizer)
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save(tmp_path_factory.mktemp("merge") / "base", **MOE)


@pytest.fixture(scope="module")
def tuned(base):
    """Three models that began from `base`."""
    return [save(base.parent / f"tuned{seed}", seed, near=base, **MOE) for seed in (1, 2, 3)]


def weights_of(path):
    return load_file(path / "model.safetensors")


def options(method):
    return {name: value for name, value in OPTIONS.items() if name in METHODS[method].reads}


# -------------------------------------------------------------------- the formulas


def plain_ties(base, deltas, weights):
    """TIES entry by entry, as its paper has it."""
    merged = base.copy()
    for at in np.ndindex(base.shape):
        entries = [(w, d[at]) for w, d in zip(weights, deltas, strict=True)]
        elected = np.sign(sum(w * d for w, d in entries))
        agreeing = [(w, d) for w, d in entries if d != 0 and np.sign(d) == elected]
        if agreeing:
            merged[at] += sum(w * d for w, d in agreeing) / sum(w for w, _ in agreeing)
    return merged


def plain_trim(delta, density):
    kept = np.zeros(delta.size)
    largest = np.argsort(-np.abs(delta), axis=None)[: max(1, round(density * delta.size))]
    kept[largest] = delta.reshape(-1)[largest]
    return kept.reshape(delta.shape)


def plain_drop(delta, density, place, name):
    draws = np.random.default_rng([OPTIONS["seed"], place, *name.encode()]).random(delta.shape, np.float32)
    return np.where(draws < density, delta / density, 0)


def plain(method, name, base, models):
    w, densities = OPTIONS["weights"], OPTIONS["density"]
    deltas = [model - base for model in models]
    if name.endswith("expert_bias"):
        return np.average(models, axis=0, weights=w)
    if method == "linear":
        return np.average(models, axis=0, weights=w)
    if method.startswith("dare"):
        deltas = [plain_drop(d, p, i, name) for i, (d, p) in enumerate(zip(deltas, densities, strict=True))]
    if method == "ties":
        deltas = [plain_trim(d, p) for d, p in zip(deltas, densities, strict=True)]
    if method.endswith("ties"):
        return plain_ties(base, deltas, w)
    return base + sum(wi * d for wi, d in zip(w, deltas, strict=True))


@pytest.mark.parametrize("method", [name for name in METHODS if name != "slerp"])
def test_each_method_is_its_formula(method, base, tuned, tmp_path):
    started = {"base": base} if "base" in METHODS[method].reads else {}
    lfm.merge(tmp_path / "out", tuned, method, **started, **options(method))
    merged, of_base, *models = map(weights_of, (tmp_path / "out", base, *tuned))
    assert merged.keys() == of_base.keys()
    for name, array in merged.items():
        expected = plain(method, name, of_base[name].astype(np.float64), [m[name].astype(np.float64) for m in models])
        np.testing.assert_allclose(array, expected, rtol=1e-5, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp_is_its_formula(t, base, tmp_path):
    far = save(tmp_path / "far", 9, **MOE)
    lfm.merge(tmp_path / "out", [base, far], "slerp", t=t)
    merged, first, second = map(weights_of, (tmp_path / "out", base, far))
    for name, array in merged.items():
        a, b = first[name].astype(np.float64), second[name].astype(np.float64)
        angle = np.arccos(np.vdot(a, b) / np.linalg.norm(a) / np.linalg.norm(b))
        arc = (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)
        expected = (1 - t) * a + t * b if name.endswith("expert_bias") else arc
        np.testing.assert_allclose(array, expected, rtol=1e-5, atol=2e-6, err_msg=name)
        if t in (0, 1):
            np.testing.assert_array_equal(array, [first, second][int(t)][name])


def test_slerp_keeps_length_and_is_linear_where_parallel():
    one, other = np.float32([[2, 0]]), np.float32([[0, 2]])
    np.testing.assert_allclose(slerp(one, other, 0.5), [[2**0.5, 2**0.5]], rtol=1e-6)
    np.testing.assert_allclose(slerp(one, 3 * one, 0.25), [[3, 0]])
    np.testing.assert_allclose(slerp(one, -one, 0.25), [[1, 0]])
    np.testing.assert_allclose(slerp(one, 0 * one, 0.25), [[1.5, 0]])
    nearly, less = np.float32([1, 0.03]), np.float32([1, 0.04])  # Cosines of 0.99955 and 0.99920.
    x = np.float32([1, 0])
    np.testing.assert_array_equal(slerp(x, nearly, 0.5), np.float32([1, 0.015]))
    assert np.linalg.norm(slerp(x, less, 0.5)) > np.linalg.norm((x + less) / 2) + 1e-4


def test_ties_by_hand():
    a, b, c = np.float32([[3, -4, 1, 2, 0], [-5, 3, 1, -2, 0], [1, 6, 0, 0, 0]])
    # Elected: -, +, +, none (2 against 2), none. Those that agree: b; b and c; a and b, since 0 has no sign.
    np.testing.assert_array_equal(elected_mean([a, b, c], [1, 1, 1]), [-5, 4.5, 1, 0, 0])
    # 4 * 3 - 5 + 1, -16 + 9, 4 + 1, 8 - 2: the first entries are 12 + 1 over 4 + 1, and so on.
    expected = np.float32([13 / 5, -4, 1, 2, 0])
    np.testing.assert_allclose(elected_mean([a, b, c], [4, 1, 1]), expected)


def test_trimming_by_hand():
    x = np.float32([[1, -5], [3, -2]])
    np.testing.assert_array_equal(trim(x, 0.5), [[0, -5], [3, 0]])
    np.testing.assert_array_equal(trim(x, 1.0), x)
    np.testing.assert_array_equal(trim(x, 0.01), [[0, -5], [0, 0]])
    np.testing.assert_array_equal(trim(np.float32([2, -2, 1]), 0.34), [2, -2, 0])


def test_dropping_keeps_a_share_and_the_mean():
    x = np.full(100_000, 2, np.float32)
    y = drop(x, 0.25, [0, 1, 2])
    assert set(np.unique(y)) == {0, 8}
    assert np.mean(y != 0) == pytest.approx(0.25, abs=0.005)
    np.testing.assert_array_equal(drop(x, 1.0, [0]), x)


# -------------------------------------------------------------------- what is dropped, read, kept


def dropped_of(path, base):
    return {name: array != weights_of(base)[name] for name, array in weights_of(path).items()}


def test_what_is_dropped_depends_on_seed_place_and_name_alone(base, tuned, tmp_path):
    first, second, _ = tuned
    runs = {"one": dict(models=[first], seed=1), "again": dict(models=[second], seed=1, weights=2.0),
            "other": dict(models=[first], seed=2), "place": dict(models=[base, first], seed=1)}
    for name, run in runs.items():
        lfm.merge(tmp_path / name, method="dare_linear", base=base, density=0.5, max_shard_bytes=10**9, **run)
    one, again, other, place = (dropped_of(tmp_path / name, base) for name in runs)
    for name in one.keys() - {name for name in one if name.endswith("expert_bias")}:
        np.testing.assert_array_equal(one[name], again[name], err_msg=name)
        assert (one[name] != other[name]).any()
        assert (one[name] != place[name]).any()
    layers = [one[f"model.layers.{i}.feed_forward.gate.weight"] for i in (1, 2)]
    assert (layers[0] != layers[1]).any()


def test_one_tensor_of_each_model_is_held(base, tuned, tmp_path, monkeypatch):
    """A reader that notes what is asked for, and what of it is still there."""
    held, most, asked, open_directory = set(), [0], [], safetensors_io.open_directory

    def recording(directory):
        source, problems = open_directory(directory)

        def read(name):
            array = source.read(name)
            asked.append((directory.name, name))
            held.add(id(array))
            most[0] = max(most[0], len(held))
            weakref.finalize(array, held.discard, id(array))
            return array

        return Source(source.specs, read, source.lost), problems

    monkeypatch.setattr(safetensors_io, "open_directory", recording)
    for method in ("linear", "dare_ties"):
        asked.clear()
        most[0] = 0
        started = [] if method == "linear" else [base]
        lfm.merge(tmp_path / method, tuned, method, base=base if started else None, **options(method))
        names = [path.name for path in [*started, *tuned]]
        assert asked == [(model, name) for name in tensors(tiny_config(**MOE)) for model in names]
        assert most[0] == len(names)
        assert not held


def test_files_and_dtype_are_those_of_the_first(tmp_path):
    tokenizer = tiny_tokenizer(vocab_size=280)
    size = dict(vocab_size=tokenizer.get_vocab_size())
    first = save(tmp_path / "first", 1, "bfloat16", tokenizer=tokenizer, **size)
    second = save(tmp_path / "second", 2, "float16", tokenizer=tokenizer, max_position=512, eos_ids=(7, 2), **size)
    (first / "chat_template.jinja").write_text("{{ first }}")
    lfm.merge(tmp_path / "out", [first, second], "linear", weights=[3, 1], max_shard_bytes=50_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (first / name).read_bytes()
    merged = {name: x for file in (tmp_path / "out").glob("*.safetensors") for name, x in load_file(file).items()}
    for name, x in merged.items():
        a, b = (weights_of(path)[name].astype(np.float32) for path in (first, second))
        np.testing.assert_allclose(x.astype(np.float32), 0.75 * a + 0.25 * b, rtol=2**-8, atol=1e-6)
    lfm.merge(tmp_path / "wide", [first, second], "slerp", dtype="float32")
    model, loaded = lfm.load(tmp_path / "wide")
    assert model.config.param_dtype == "float32"
    assert loaded.to_str() == tokenizer.to_str()


def test_a_run_and_a_gguf_file_are_merged(tmp_path):
    tokenizer = tiny_tokenizer(vocab_size=280)
    size = dict(vocab_size=tokenizer.get_vocab_size())
    first, second = (save(tmp_path / str(seed), seed, tokenizer=tokenizer, **size) for seed in (1, 2))
    model, _ = lfm.load(first)
    manager = CheckpointManager(tmp_path / "run", keep=1)
    state = new_state(nnx.to_pure_dict(nnx.state(model, nnx.Param)), {}, optax.sgd(0.1))
    manager.save(1, state, {}, {"model": to_plain(model.config)})
    manager.close()
    tokenizer.save(str(tmp_path / "run" / "tokenizer.json"))
    other, _ = lfm.load(second)
    lfm.save_gguf(other, tmp_path / "other.gguf", tokenizer, type="F32")
    lfm.merge(tmp_path / "a", [first, second], "linear", weights=[1, 2])
    for name, models in (("b", ["run", "other.gguf"]), ("c", ["other.gguf", "run"])):
        lfm.merge(tmp_path / name, [tmp_path / model for model in models], "linear",
                  weights=[1, 2] if name == "b" else [2, 1])
        for tensor, array in weights_of(tmp_path / name).items():
            np.testing.assert_allclose(array, weights_of(tmp_path / "a")[tensor], rtol=1e-6, atol=1e-6)
        assert load_tokenizer(tmp_path / name).encode("the fox").ids == tokenizer.encode("the fox").ids


# -------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(("method", "given", "message"), [
    ("mean", {}, "method is 'mean'; choose one of linear, slerp, task_arithmetic, ties, dare_linear, dare_ties"),
    ("ties", dict(density=0.5), "ties needs base, the model that the others were fine-tuned from"),
    ("ties", dict(base=True), "ties needs density, the share of each difference that is kept, such as 0.5"),
    ("linear", dict(base=True), "linear does not read base; leave it out"),
    ("linear", dict(density=0.5), "linear does not read density"),
    ("ties", dict(base=True, density=0.5, seed=0), "ties does not read seed"),
    ("task_arithmetic", dict(base=True, t=0.5), "task_arithmetic does not read t"),
    ("slerp", {}, "slerp goes between two models; models has 3"),
    ("linear", dict(weights=[1, 1, -2]), "weights are 1, 1, -2, which sum to 0; linear divides by their sum"),
    ("linear", dict(weights=[1, 1]), "weights has 2 numbers for 3 models; give one for each, or one for all"),
    ("linear", dict(weights=float("nan")), "weights are nan, nan, nan; they must be finite"),
    ("task_arithmetic", dict(base=True, weights=0), "weights are all 0"),
    ("ties", dict(base=True, density=0.5, weights=[1, -1, 1]), "those of ties, shares of a mean, must be above 0"),
    ("dare_ties", dict(base=True, density=0), "density is 0, 0, 0; it must be above 0 and at most 1"),
    ("dare_linear", dict(base=True, density=[0.5, 1.5, 1]), "density is 0.5, 1.5, 1; it must be above 0"),
    ("dare_linear", dict(base=True, density=0.5, seed=-1), "seed is -1"),
    ("linear", dict(dtype="int8"), "dtype is int8; choose one of float32, bfloat16, float16"),
    ("linear", dict(max_shard_bytes=0), "max_shard_bytes is 0"),
])
def test_options_that_do_not_fit(method, given, message, base, tuned, tmp_path):
    given = given | ({"base": base} if given.get("base") else {})
    with pytest.raises(ValueError, match=re.escape(message)) as refused:
        lfm.merge(tmp_path / "out", tuned, method, **given)
    assert len(str(refused.value).splitlines()) == 2
    assert not any(tmp_path.iterdir())


def test_the_number_of_models_and_the_options_of_slerp(base, tmp_path):
    for models, method, given, message in (
        ([base], "linear", {}, "linear needs at least 2 of models; models has 1"),
        ([], "ties", dict(base=base, density=1), "ties needs at least 1 of models; models has 0"),
        ([base, base], "slerp", dict(weights=0.5), "slerp does not read weights"),
        ([base, base], "slerp", dict(t=1.5), "t is 1.5; it must be from 0"),
    ):
        with pytest.raises(ValueError, match=message):
            lfm.merge(tmp_path / "out", models, method, **given)


def test_all_that_is_wrong_comes_in_one_message(base, tmp_path):
    tokenizer, small = tiny_tokenizer(vocab_size=280), tiny_tokenizer("a b c " * 50, vocab_size=280)
    size = dict(vocab_size=300)
    first = save(tmp_path / "first", tokenizer=tokenizer, **size)
    shape = save(tmp_path / "shape", tokenizer=tokenizer, ffn_size=64, rope_theta=5e3, **size)
    words = save(tmp_path / "words", tokenizer=small, **size)
    none = save(tmp_path / "none", **size)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "here").touch()
    with pytest.raises(ValueError, match="cannot merge into") as refused:
        lfm.merge(tmp_path / "out", [first, shape, words, none, tmp_path / "gone"], "ties", density=2)
    lines = str(refused.value).splitlines()
    for line, found in zip(lines[1:], (
        "ties needs base", "density is 2, 2, 2, 2, 2", f"{tmp_path / 'gone'}: ",
        f"{shape}: ffn_size is 64, but 48 in {first}", f"{shape}: rope_theta is 5000.0, but 1000000.0 in {first}",
        f"{words}: its tokenizer differs from that of {first} in model, so that the same ids mean different things",
        f"{none}: it has no tokenizer, but {first} has one", "out is not empty",
    ), strict=True):
        assert found in line
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["here"]


def test_a_projection_of_vectors_is_refused(base, tmp_path):
    first = save(tmp_path / "first", **MOE)
    (first / "1_Dense").mkdir()
    (first / "1_Dense" / "model.safetensors").touch()
    with pytest.raises(ValueError, match="first: it has a projection of its vectors"):
        lfm.merge(tmp_path / "out", [base, first], "linear")


def test_weights_that_are_not_finite_leave_nothing(base, tuned, tmp_path):
    broken = save(tmp_path / "broken", near=base, **MOE)
    size = int.from_bytes((broken / "model.safetensors").read_bytes()[:8], "little")
    header = json.loads((broken / "model.safetensors").read_bytes()[8 : 8 + size])
    with (broken / "model.safetensors").open("r+b") as file:
        for name, value in ((BIAS, np.inf), ("model.layers.2.ffn_norm.weight", np.nan)):
            file.seek(8 + size + header[name]["data_offsets"][0])
            file.write(np.float32(value).tobytes())
    with pytest.raises(ValueError, match="not finite") as refused:
        lfm.merge(tmp_path / "out", [tuned[0], broken], "ties", base=base, density=0.5)
    lines = str(refused.value).splitlines()[1:]
    assert [line.split(" holds ")[0] for line in lines] == [
        f"  - {broken}: {name}" for name in (BIAS, "model.layers.2.ffn_norm.weight")]
    with pytest.raises(ValueError, match="too large for float32; use smaller weights"):
        lfm.merge(tmp_path / "out", tuned, "task_arithmetic", base=base, weights=1e39)
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_it_tells_how_far_it_is(tuned, tmp_path, monkeypatch):
    monkeypatch.setattr("lfm_jax.post.merge.TELL_SECONDS", -1.0)
    told = []
    lfm.merge(tmp_path / "out", tuned, "linear", tell=told.append)
    count = len(tensors(tiny_config(**MOE)))
    assert told == [f"{i} of {count} tensors are merged" for i in range(1, count + 1)]
