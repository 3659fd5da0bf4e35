"""Adapters in PEFT's files, both ways: `peft` puts ours on `transformers`' models, we put its on ours."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from helpers import long, rel_err, tokens_like
from oracle import hf_config, hf_model
from safetensors.numpy import load_file, save_file

from lfm_jax.adapters.config import LoRAConfig
from lfm_jax.adapters.peft import CONFIG, TENSORS, Adapter, load_adapter, save_adapter
from lfm_jax.adapters.trees import adapt, init_adapter, merge
from lfm_jax.convert.families import config_from_hf
from lfm_jax.convert.hf import from_state_dict
from lfm_jax.model import abstract_model
from lfm_jax.testing import tiny_config

peft = pytest.importorskip("peft")

LORA = LoRAConfig(rank=3, alpha=6, dropout=0.1)
TOKENS = tokens_like((2, 9), 0)


@pytest.fixture(scope="module", params=["lfm2", long("lfm2_moe"), long("lfm3")])
def both(request):
    """(model of `transformers`, config, parameters). In `make test-long` the other families too."""
    config = hf_config(request.param)
    theirs = hf_model(config)
    ours = config_from_hf(config.to_dict(), param_dtype="float32", dtype="float32")
    ours = from_state_dict(theirs.state_dict(), ours)
    return theirs, ours.config, nnx.to_pure_dict(nnx.state(ours, nnx.Param))


def logits(config, weights):
    graphdef, _ = abstract_model(config)
    return np.asarray(jax.jit(lambda w: nnx.merge(graphdef, w)(TOKENS)[0])(weights))


def torch_logits(model):
    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()


def noisy(config, lora):
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init_adapter(config, lora, jax.random.key(0)))
    return jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes)


def test_peft_puts_ours_on_its_model(both, tmp_path):
    theirs, config, params = both
    lora = LoRAConfig(rank=3, alpha=6, rank_pattern={"q_proj": 2}, alpha_pattern={r"layers\.0\.conv\.in_proj": 4.5})
    adapter = Adapter(config, lora, noisy(config, lora))
    save_adapter(adapter, tmp_path / "ours", base="LiquidAI/LFM2.5-350M")
    found = peft.PeftModel.from_pretrained(theirs, tmp_path / "ours")
    try:
        expected = torch_logits(found)
    finally:
        found.unload()
    mine = logits(config, adapt(config, lora, params, adapter.weights))
    assert rel_err(mine, expected) < 1e-4
    assert rel_err(mine, torch_logits(theirs)) > 1e-2
    assert rel_err(logits(config, merge(config, lora, params, adapter.weights)), mine) < 1e-5
    again = load_adapter(tmp_path / "ours", config)
    assert (again.lora.rank, again.lora.alpha_pattern) == (3, lora.alpha_pattern)
    jax.tree.map(np.testing.assert_array_equal, again.weights, adapter.weights)


THEIRS = {
    "list": dict(target_modules=["out_proj", "w1", "gate_proj"], r=2, lora_alpha=7, lora_dropout=0.1),
    "patterns": dict(target_modules=["in_proj", "k_proj", "w2"], r=4, rank_pattern={"0.conv.in_proj": 2, "k_proj": 3},
                     alpha_pattern={"w2": 32}, use_rslora=True),
    "expression": dict(target_modules=r".*\.(0|2)\.(conv\.(in|out)_proj|self_attn\.[qv]_proj)", r=2),
}


@pytest.mark.parametrize("case", THEIRS)
def test_ours_has_pefts(both, case, tmp_path):
    theirs, config, params = both
    torch.manual_seed(0)
    found = peft.get_peft_model(theirs, peft.LoraConfig(task_type="CAUSAL_LM", **THEIRS[case]))
    try:
        for name, w in found.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(w, 0, 0.3)
        found.save_pretrained(tmp_path / "theirs")
        expected = torch_logits(found)
    finally:
        found.unload()
    adapter = load_adapter(tmp_path / "theirs", config)
    weights = adapt(config, adapter.lora, params, jax.tree.map(jnp.asarray, adapter.weights))
    assert rel_err(logits(config, weights), expected) < 1e-4
    save_adapter(adapter, tmp_path / "again")
    first, second = (load_file(tmp_path / name / TENSORS) for name in ("theirs", "again"))
    jax.tree.map(np.testing.assert_array_equal, first, second)
    jax.tree.map(np.testing.assert_array_equal, load_adapter(tmp_path / "again", config).weights, adapter.weights)


def saved(tmp_path, change, tensors=lambda found: found):
    """An adapter whose files are changed."""
    config = tiny_config()
    save_adapter(Adapter(config, LORA, noisy(config, LORA)), tmp_path / "adapter")
    raw = json.loads((tmp_path / "adapter" / CONFIG).read_text())
    (tmp_path / "adapter" / CONFIG).write_text(json.dumps(raw | change))
    save_file(tensors(load_file(tmp_path / "adapter" / TENSORS)), tmp_path / "adapter" / TENSORS)
    return tmp_path / "adapter", config


def test_what_is_not_supported_is_listed_at_once(tmp_path):
    path, config = saved(tmp_path, dict(
        use_dora=True, bias="all", modules_to_save=["lm_head"], layer_replication=[[0, 1]], init_lora_weights="pissa",
        something_new=3,
    ))
    with pytest.raises(ValueError, match="cannot load the adapter") as error:
        load_adapter(path, config)
    for line in ("use_dora is True", "bias is 'all'", "modules_to_save is ['lm_head']", "layer_replication is [[0, 1]]",
                 "init_lora_weights is 'pissa'", "something_new is 3"):
        assert f"{CONFIG}: {line}, which is not supported" in str(error.value)


def test_tensors_that_do_not_fit_are_listed_at_once(tmp_path):
    name = "base_model.model.model.layers.{}.lora_A.weight"

    def changed(tensors):
        tensors["base_model.model.lm_head.lora_A.weight"] = np.zeros((3, 32), np.float32)
        tensors[name.format("0.conv.in_proj")] = np.zeros((3, 31), np.float32)
        tensors[name.format("0.conv.out_proj")] = np.zeros((3, 32), np.int8)
        tensors[name.format("1.self_attn.k_proj")][0, 0] = np.nan
        del tensors[name.format("1.self_attn.q_proj")]
        return tensors

    path, config = saved(tmp_path, {}, changed)
    with pytest.raises(ValueError, match="cannot load the adapter") as error:
        load_adapter(path, config)
    for line in ("unexpected: base_model.model.lm_head.lora_A.weight [3, 32]",
                 "wrong shape: base_model.model.model.layers.0.conv.in_proj.lora_A.weight is [3, 31]; expected [3, 32]",
                 "wrong dtype: base_model.model.model.layers.0.conv.out_proj.lora_A.weight is int8",
                 "not finite: base_model.model.model.layers.1.self_attn.k_proj.lora_A.weight",
                 "missing: base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight [3, 32]"):
        assert line in str(error.value)


@pytest.mark.parametrize(("change", "message"), [
    (dict(peft_type="LOHA"), "peft_type is 'LOHA'; only LORA"),
    (dict(target_modules=["gate_proj", "o_proj"]), "'o_proj'. names no matrix"),
    (dict(target_modules=[1]), r"\[1\] names no matrix"),
    (dict(target_modules="nothing.*"), "'nothing.*' names no matrix"),
    (dict(target_modules="("), "no regular expression"),
    (dict(target_modules=None), "target_modules is None"),
    (dict(r=2), r"wrong shape: .*lora_A.weight is \[3, 32\]; expected \[2, 32\]"),
    (dict(lora_alpha="x"), "alpha is 'x'; it must be a number"),
])
def test_configs_that_do_not_fit(change, message, tmp_path):
    path, config = saved(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        load_adapter(path, config)


def test_a_directory_without_an_adapter(tmp_path):
    message = (r"(?s)adapter_config.json is missing.*adapter_model.safetensors is missing.*"
               r"`lfm export RUN DIR --format peft`")
    with pytest.raises(ValueError, match=message):
        load_adapter(tmp_path, tiny_config())
    config = tiny_config(layer_types=("recurrence",))
    with pytest.raises(ValueError, match="cannot be exported"):
        save_adapter(Adapter(config, LORA, noisy(config, LORA)), tmp_path / "new")
    (tmp_path / "x").write_text("")
    with pytest.raises(ValueError, match="not empty"):
        save_adapter(Adapter(tiny_config(), LORA, {}), tmp_path)
