"""Adapters where models are loaded: merged, beside narrow weights, of runs; what verbs make of them."""

import jax
import numpy as np
import pytest
import yaml
from flax import nnx
from helpers import rel_err, tokens_like

import lfm_jax as lfm
from lfm_jax import init_from, recipe
from lfm_jax.adapters.config import LoRAConfig
from lfm_jax.adapters.peft import Adapter
from lfm_jax.adapters.trees import init_adapter
from lfm_jax.adapters.weights import Adapted
from lfm_jax.cli import main
from lfm_jax.pretrain.config import TrainConfig
from lfm_jax.pretrain.run import train
from lfm_jax.quant.weights import Quantized
from lfm_jax.testing import tiny_model, tiny_tokenizer
from lfm_jax.weight_kinds import WeightKind

LORA = LoRAConfig(rank=2, alpha=8)
TOKENS = tokens_like((2, 9), 0)


def logits(model):
    graphdef, params = nnx.split(model, nnx.Param)
    run = jax.jit(lambda params: nnx.merge(graphdef, params)(TOKENS)[0])
    return np.asarray(run(nnx.to_pure_dict(params)))


def noisy(config):
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init_adapter(config, LORA, jax.random.key(0)))
    return jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def where(tmp_path_factory):
    """A directory with `base` and `adapter`."""
    path = tmp_path_factory.mktemp("adapters")
    tokenizer = tiny_tokenizer(vocab_size=300)
    model = tiny_model(vocab_size=tokenizer.get_vocab_size(), ffn_size=64)
    lfm.save_hf(model, path / "base", tokenizer)
    lfm.save_adapter(Adapter(model.config, LORA, noisy(model.config)), path / "adapter")
    return path


def test_merged_beside_and_narrow(where):
    merged, _ = lfm.load(where / "base", adapter=where / "adapter")
    beside, tokenizer = lfm.load(where / "base", adapter=where / "adapter", merge=False)
    plain, _ = lfm.load(where / "base")
    assert tokenizer is not None
    assert isinstance(beside.blocks[0].operator.in_proj[...], Adapted)
    expected = logits(merged)
    assert rel_err(logits(beside), expected) < 1e-5
    assert rel_err(logits(plain), expected) > 1e-2
    narrow, _ = lfm.load(where / "base", quantize="int8", adapter=where / "adapter")
    np.testing.assert_array_equal(logits(narrow), logits(lfm.quantize(merged, "int8")))
    kept, _ = lfm.load(where / "base", quantize="int8", adapter=where / "adapter", merge=False)
    assert isinstance(kept.blocks[0].operator.in_proj[...].base, Quantized)


def test_verbs_merge_it(where, tmp_path, capsys):
    flags = ["--adapter", str(where / "adapter")]
    for verb, *more in (["convert"], ["export", "--type", "F32"]):
        with pytest.raises(SystemExit) as status:
            main([verb, str(where / "base"), str(tmp_path / verb), *more, *flags])
        assert status.value.code == 0
    expected = logits(lfm.load(where / "base", adapter=where / "adapter")[0])
    for made in ("convert", "export"):
        model, tokenizer = lfm.load(tmp_path / made)
        np.testing.assert_allclose(logits(model), expected, rtol=1e-5, atol=1e-5)
        assert tokenizer is not None
    with pytest.raises(SystemExit) as status:
        main(["generate", str(where / "base"), "the", "--adapter", str(tmp_path / "nowhere")])
    assert status.value.code == 2
    assert "adapter_config.json is missing" in capsys.readouterr().err


@pytest.fixture(scope="module")
def run(where):
    """A run that trains an adapter over narrow weights."""
    (where / "text").mkdir()
    (where / "text" / "a.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 60)
    model, _ = lfm.load(where / "base")
    content = dict(
        run_dir=str(where / "run"), steps=3, init_from=str(where / "base"), model=recipe.to_plain(model.config),
        data=dict(sources=[str(where / "text")], seq_len=16, batch_size=4, heldout_fraction=0.0),
        optimizer=dict(peak_lr=1e-2, warmup_steps=0), lora=dict(rank=2, quantize="int8", targets=["in_proj", "w2"]),
        freeze=["blocks.0.feed_forward.*"],
    )
    (where / "run.yaml").write_text(yaml.safe_dump(content))
    config = recipe.load_recipe(TrainConfig, where / "run.yaml")
    (where / "again.yaml").write_text(recipe.dump_recipe(config))
    assert recipe.load_recipe(TrainConfig, where / "again.yaml") == config
    train(config)
    return where / "run"


def test_the_model_of_a_run(run, where, tmp_path, capsys):
    merged, _ = lfm.load(run)
    beside, _ = lfm.load(run, merge=False)
    w2 = beside.blocks[1].feed_forward.w2[...]
    assert isinstance(w2.base, Quantized)
    assert np.abs(np.asarray(w2.b_OR)).max() > 0
    assert isinstance(beside.blocks[0].feed_forward.w2[...], Quantized)  # It was frozen.
    assert rel_err(logits(beside), logits(merged)) < 1e-5
    half, _ = lfm.load(run, "bfloat16")
    assert half.blocks[1].feed_forward.w2[...].dtype == "bfloat16"
    with pytest.raises(SystemExit) as status:
        main(["export", str(run), str(tmp_path / "peft"), "--format", "peft"])
    assert status.value.code == 0
    over, _ = lfm.load(where / "base", quantize="int8", adapter=tmp_path / "peft", merge=False)
    np.testing.assert_array_equal(logits(over), logits(beside))
    with pytest.raises(SystemExit):
        main(["export", str(where / "base"), str(tmp_path / "no"), "--format", "peft"])
    assert "--format peft writes what a run with lora has trained" in capsys.readouterr().err


def test_the_merged_model_of_a_run_is_a_model_for_all(run):
    """What has no adapter was narrow, and is plain too."""
    merged, _ = lfm.load(run)
    params = nnx.to_pure_dict(nnx.split(merged, nnx.Param)[1])
    begun = init_from.weights(str(run), merged.config)
    assert jax.tree.structure(begun) == jax.tree.structure(params)
    assert not any(isinstance(w, WeightKind) for w in jax.tree.leaves(
        params, is_leaf=lambda w: isinstance(w, WeightKind)))
    narrow, _ = lfm.load(run, quantize="int8")
    assert isinstance(narrow.embed[...], Quantized)


def test_a_run_whose_base_has_changed_is_refused(run, where):
    other = where / "other"
    model, tokenizer = lfm.load(where / "base")
    model.norm.weight[...] = model.norm.weight[...] * 1.001
    lfm.save_hf(model, other, tokenizer)
    (where / "base").rename(where / "moved")
    other.rename(where / "base")
    try:
        with pytest.raises(ValueError, match="holds other weights than those that"):
            lfm.load(run)
    finally:
        (where / "base").rename(other)
        (where / "moved").rename(where / "base")
