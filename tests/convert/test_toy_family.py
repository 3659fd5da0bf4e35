"""A second family registered from outside: other names, keys and layouts, leaves of several tensors and the reverse.

A family is one row: no file of the package knows of this one, nor of the feed-forward that some of its layers have.
"""

import dataclasses
import json

import hf_dirs
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file
from test_state_dict import bits, random_bits

import lfm_jax as lfm
from lfm_jax.convert import families
from lfm_jax.convert.families.family import Family
from lfm_jax.convert.families.lfm2 import LFM2
from lfm_jax.convert.hf import convert, tensors, write_hf
from lfm_jax.convert.weights import Weight
from lfm_jax.kinds import FEED_FORWARDS, FeedForwardKind
from lfm_jax.layers import normal_param, param
from lfm_jax.testing import tiny_config, tiny_model


class Experts(nnx.Module):
    """The parameters of a router over two experts, as many as there are key/value heads; it is only stored here."""

    def __init__(self, config, *, rngs):
        E, D, F = config.num_kv_heads, config.hidden_size, config.ffn_size
        self.router = normal_param(rngs, (E, D), (None, "width"), config, decay=True, matrix=None)
        self.bias = param(jnp.zeros((E,)), (None,), config, decay=False, matrix=None)
        self.up = normal_param(rngs, (E, F, D), (None, "ffn", "width"), config, decay=True, matrix=None)
        self.down = normal_param(rngs, (E, D, F), (None, "width", "ffn"), config, decay=True, matrix=None)


EXPERTS = FeedForwardKind(
    name="experts", module=Experts, params=lambda c: 0, matrices=lambda c: 0, products=lambda c: 0,
    kept=lambda c, share: None, last_product=lambda c: 0, buffers={}, width="ffn_size",
)
LAYERS = dict(qk_norm=False, layer_types=("conv", "full_attention", "conv", "full_attention"),
              ffn_types=("swiglu", "experts", "experts", "swiglu"))
"""Both feed-forwards beside both operators."""

WEIGHTS = (
    Weight("model", "wte", "embed", "V D -> V D"),
    Weight("block", "h.{i}.norms", ("blocks.{i}.operator_norm.weight", "blocks.{i}.ffn_norm.weight"), "(P D) -> {P} D"),
    Weight("conv", ("h.{i}.b", "h.{i}.c", "h.{i}.x"), "blocks.{i}.operator.in_proj", "{C} O D -> C O D"),
    Weight("conv", "h.{i}.taps", "blocks.{i}.operator.conv", "W D -> W D"),
    Weight("conv", "h.{i}.out", "blocks.{i}.operator.out_proj", "O D -> O D"),
    Weight("full_attention", "h.{i}.q", "blocks.{i}.operator.q_proj", "(H N) D -> N H D"),
    Weight("full_attention", "h.{i}.k.{K}", "blocks.{i}.operator.k_proj", "{K} D H -> K H D"),
    Weight("full_attention", "h.{i}.v", "blocks.{i}.operator.v_proj", "(K H) D -> K H D"),
    Weight("full_attention", "h.{i}.o", "blocks.{i}.operator.out_proj", "(N H) D -> D N H"),
    Weight("swiglu", "h.{i}.gate_up", ("blocks.{i}.feed_forward.w1", "blocks.{i}.feed_forward.w3"),
           "(P F) D -> {P} F D"),
    Weight("swiglu", "h.{i}.down", "blocks.{i}.feed_forward.w2", "D F -> D F"),
    Weight("experts", "h.{i}.router", "blocks.{i}.feed_forward.router", "K D -> K D"),
    Weight("experts", "h.{i}.router_bias", "blocks.{i}.feed_forward.bias", "K -> K"),
    Weight("experts", "h.{i}.experts.{K}.up", "blocks.{i}.feed_forward.up", "{K} D F -> K F D"),
    Weight("experts", "h.{i}.experts.{K}.down", "blocks.{i}.feed_forward.down", "{K} F D -> K D F"),
    Weight("model", "ln_f", "norm.weight", "D -> D"),
    Weight("model", "unembed", "head", "V D -> V D", when={"tie_embedding": False}),
)


def read(hf):
    return LFM2.read({**hf, "hidden_size": hf["n_embd"]}) | dict(qk_norm=False, ffn_types=tuple(hf["mlps"]))


def write(config):
    hf = LFM2.write(config)
    return {"n_embd": hf.pop("hidden_size"), "mlps": config.ffn_types} | hf


TOY = Family(
    name="Toy", model_types=("toy",), architectures=("ToyForCausalLM", "ToyOld"), read=read, write=write,
    features=LFM2.features | {"qk_norm": (False,), "ffn_types": ("swiglu", "experts")}, weights=WEIGHTS,
)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setattr(families, "FAMILIES", [LFM2, TOY])
    FEED_FORWARDS.register(EXPERTS)
    yield
    FEED_FORWARDS.remove("experts")


@pytest.fixture
def toy_dir(tmp_path):
    """Random bits for weights, in several files."""
    config = tiny_config(**LAYERS, param_dtype="bfloat16", dtype="bfloat16")
    write_hf(tmp_path / "toy", config, random_bits(config, "bfloat16").items(), max_shard_bytes=9_000)
    return tmp_path / "toy"


def test_a_directory_round_trips_to_the_bit(tmp_path, toy_dir):
    written = json.loads((toy_dir / "config.json").read_text())
    assert (written["model_type"], written["architectures"], written["n_embd"]) == ("toy", ["ToyForCausalLM"], 32)
    model, _ = lfm.load(toy_dir)
    assert model.config == tiny_config(**LAYERS, param_dtype="bfloat16", dtype="bfloat16")
    lfm.save_hf(model, tmp_path / "saved", max_shard_bytes=9_000)
    convert(toy_dir, tmp_path / "converted", max_shard_bytes=9_000)
    files = sorted(file.name for file in toy_dir.iterdir())
    assert len(files) > 4
    for name in ("saved", "converted"):
        assert sorted(file.name for file in (tmp_path / name).iterdir()) == files
        for file in files:
            assert (tmp_path / name / file).read_bytes() == (toy_dir / file).read_bytes(), file


def test_every_tensor_lies_where_its_row_says(toy_dir):
    given = {name: array for file in toy_dir.glob("*.safetensors") for name, array in load_file(file).items()}
    params = nnx.to_pure_dict(nnx.state(lfm.load(toy_dir)[0], nnx.Param))
    conv, attention = params["blocks"][0], params["blocks"][3]
    experts = [params["blocks"][i]["feed_forward"] for i in (1, 2)]
    D, N, H = 32, 4, 8
    expected = [
        (conv["operator_norm"]["weight"], given["h.0.norms"][:D]),
        (conv["ffn_norm"]["weight"], given["h.0.norms"][D:]),
        (conv["operator"]["in_proj"], np.stack([given[f"h.0.{part}"] for part in "bcx"])),
        (attention["operator"]["q_proj"], given["h.3.q"].reshape(H, N, D).swapaxes(0, 1)),
        (attention["operator"]["k_proj"], np.stack([given["h.3.k.0"].T, given["h.3.k.1"].T])),
        (attention["feed_forward"]["w1"], given["h.3.gate_up"][:48]),
        (attention["feed_forward"]["w3"], given["h.3.gate_up"][48:]),
        (experts[0]["router"], given["h.1.router"]),
        (experts[1]["bias"], given["h.2.router_bias"]),
        (experts[0]["up"], np.stack([given["h.1.experts.0.up"].T, given["h.1.experts.1.up"].T])),
        (experts[1]["down"], np.stack([given["h.2.experts.0.down"].T, given["h.2.experts.1.down"].T])),
    ]
    for ours, theirs in expected:
        np.testing.assert_array_equal(bits(ours), bits(np.ascontiguousarray(theirs)))


def test_a_state_dict_round_trips_and_is_checked_name_by_name():
    config = tiny_config(**LAYERS, tie_embedding=False)
    state_dict = random_bits(config, "float32")
    assert {"h.1.k.0", "h.1.k.1", "unembed"} <= state_dict.keys()
    for part, layers in (("gate_up", "03"), ("router", "12"), ("experts", "12"), ("down", "0123")):
        assert {name.split(".")[1] for name in state_dict if part in name} == set(layers)
    back = lfm.to_state_dict(lfm.from_state_dict(state_dict, config))
    assert list(back) == list(state_dict) == list(tensors(config))
    for name, array in back.items():
        np.testing.assert_array_equal(bits(array), bits(state_dict[name]), err_msg=name)
    del state_dict["h.1.k.1"]
    state_dict["h.1.k.0"] = state_dict["h.1.k.0"].T
    state_dict["h.1.k.2"] = state_dict["h.1.k.0"]
    state_dict["h.0.router"] = state_dict.pop("h.2.router")
    state_dict["h.1.down"] = state_dict.pop("h.1.experts.1.down")
    with pytest.raises(ValueError, match="is not this model") as e:
        lfm.from_state_dict(state_dict, config)
    assert str(e.value).splitlines()[1:] == [
        "  - missing: h.1.k.1 [32, 8]", "  - missing: h.1.experts.1.down [48, 32]", "  - missing: h.2.router [2, 32]",
        "  - unexpected: h.1.k.2 [8, 32]", "  - unexpected: h.0.router [2, 32]", "  - unexpected: h.1.down [48, 32]",
        "  - wrong shape: h.1.k.0 is [8, 32]; config expects [32, 8]",
    ]


def test_a_tied_head_is_known_by_its_row():
    config = tiny_config(qk_norm=False)
    given = random_bits(config, "float32")
    lfm.from_state_dict(given | {"unembed": given["wte"].copy()}, config)
    with pytest.raises(ValueError, match="unembed differs from wte, but the config ties them"):
        lfm.from_state_dict(given | {"unembed": given["wte"][::-1].copy()}, config)


def test_leaves_of_two_dtypes_make_no_tensor(tmp_path):
    graphdef, params = nnx.split(tiny_model(qk_norm=False), nnx.Param)
    norm = params["blocks"][0]["ffn_norm"]["weight"]
    params["blocks"][0]["ffn_norm"]["weight"] = norm.replace(norm[...].astype(jnp.bfloat16))
    model = nnx.merge(graphdef, params)
    with pytest.raises(ValueError, match=r"wrong dtype: h\.0\.norms is bfloat16 and float32; expected"):
        lfm.save_hf(model, tmp_path / "x")


def test_files_and_models_find_their_family(tmp_path):
    lfm.save_hf(tiny_model(), tmp_path / "lfm2")
    lfm.save_hf(tiny_model(qk_norm=False), tmp_path / "toy")
    hf_dirs.edit_json(tmp_path / "toy", "config.json", architectures=["ToyOld"])
    assert lfm.load(tmp_path / "lfm2")[0].config.qk_norm
    assert not lfm.load(tmp_path / "toy")[0].config.qk_norm
    hf_dirs.edit_json(tmp_path / "toy", "config.json", architectures=["Lfm2ForCausalLM"])
    with pytest.raises(ValueError, match="expected a list with ToyForCausalLM, ToyOld for model_type 'toy'"):
        lfm.load(tmp_path / "toy")
    hf_dirs.edit_json(tmp_path / "toy", "config.json", model_type="llama")
    with pytest.raises(ValueError, match=r"model_type is 'llama'; expected 'lfm2' \(LFM2\), 'toy' \(Toy\)"):
        lfm.load(tmp_path / "toy")
    with pytest.raises(ValueError, match=r"Toy in transformers has no post_norm=True; such a model"):
        lfm.save_hf(tiny_model(qk_norm=False, post_norm=True), tmp_path / "x")


def test_a_family_that_forgets_a_parameter_loses_nothing_in_silence(tmp_path, monkeypatch):
    """It claims models with norms of heads and routers with a bias, for which its table has no names."""
    rows = tuple(row for row in WEIGHTS if row.names != "h.{i}.router_bias")
    monkeypatch.setattr(families, "FAMILIES", [dataclasses.replace(TOY, features={}, weights=rows)])
    model = tiny_model(ffn_types=("swiglu", "swiglu", "experts"))
    for use in (lambda: lfm.save_hf(model, tmp_path / "x"), lambda: lfm.to_state_dict(model),
                lambda: lfm.from_state_dict(random_bits(model.config, "float32"), model.config)):
        with pytest.raises(ValueError, match="the tensors of the format are not this model") as e:
            use()
        assert str(e.value).splitlines()[1:] == [
            f"  - no tensor has the parameter blocks.{name}"
            for name in ("1.operator.k_norm.weight", "1.operator.q_norm.weight", "2.feed_forward.bias")
        ]
    assert list(tmp_path.iterdir()) == []
